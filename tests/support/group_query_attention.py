"""One GroupQueryAttention as a graph of its own, over a cache that is written in place."""

from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper
from support.matmul_nbits import Floats, running

from gemma_export.runtime.native import ATTENTION, library


@dataclass(frozen=True)
class Attention:
    """Of the symbols in shape comments: H query heads, K key heads, D numbers of a head, S slots."""

    query_heads: int
    key_heads: int
    head: int
    slots: int
    window: int = 0
    softcap: float = 0.0

    def graph(self) -> ModelProto:
        node = helper.make_node(
            "GroupQueryAttention",
            ["qkv", "", "", "past_keys", "past_values", "last", "longest", "cosines", "sines"],
            ["y", "keys", "values"],
            domain="com.microsoft",
            num_heads=self.query_heads,
            kv_num_heads=self.key_heads,
            do_rotary=1,
            scale=self.head**-0.5,
            softcap=self.softcap,
            local_window_size=self.window or -1,
        )
        angles = np.arange(self.slots)[:, None] * 1e4 ** (-2 * np.arange(self.head // 2) / self.head)
        floats = ("qkv", "past_keys", "past_values")
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in floats]
        inputs += [
            helper.make_tensor_value_info(name, TensorProto.INT32, None) for name in ("last", "longest")
        ]
        outputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "keys", "values")
        ]
        tables = [
            numpy_helper.from_array(table.astype(np.float32), name)
            for name, table in {"cosines": np.cos(angles), "sines": np.sin(angles)}.items()
        ]
        graph = helper.make_graph([node], "attention", inputs, outputs, tables)
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def session(self, name: str, threads: int = 1) -> ort.InferenceSession:
        """One that runs these kernels."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        with running(name):
            path = library()
            if path is not None:
                options.add_session_config_entry(ATTENTION, "1")
                options.register_custom_ops_library(str(path))
            return ort.InferenceSession(
                self.graph().SerializeToString(), options, providers=["CPUExecutionProvider"]
            )


class Cache:
    """Keys and values of B rows, with numbers in all slots."""

    def __init__(self, attention: Attention, batch: int = 1, seed: int = 0) -> None:
        shape = (2, batch, attention.key_heads, attention.slots, attention.head)
        self.keys, self.values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attend(session: ort.InferenceSession, cache: Cache, qkv: Floats, last: list[int]) -> Floats:
    """One step [B, T, (H + 2K)·D] whose rows end in the slots `last`; the cache gets its keys and values."""
    binding = session.io_binding()
    qkv = np.ascontiguousarray(qkv)
    for name, array in (("keys", cache.keys), ("values", cache.values)):
        where = ("cpu", 0, TensorProto.FLOAT, array.shape, array.ctypes.data)
        binding.bind_input(f"past_{name}", *where)
        binding.bind_output(name, *where)
    binding.bind_cpu_input("qkv", qkv)
    binding.bind_cpu_input("last", np.array(last, np.int32))
    binding.bind_cpu_input("longest", np.array(max(last) + 1, np.int32))
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    # Outputs come in the order in which they were bound.
    y: Floats = binding.get_outputs()[-1].numpy().copy()
    assert y.shape[:2] == qkv.shape[:2]
    return y
