"""Shows every activation of a decoder layer, by name, to whoever wants to look: an audit, a calibration.

Names, with the layer's own in front (`layers.3.`); arrays are fp32, [B, T, …] unless a shape is given:

| name | what |
|---|---|
| `input_layernorm`, `post_attention_layernorm`, … | outputs of the norms |
| `self_attn.q_proj`, `.k_proj`, `.v_proj`, `.o_proj` | outputs of the projections |
| `self_attn.query`, `self_attn.key` | after RoPE [B, H, T, h], [B, K, S, h] |
| `self_attn.scores` | query · key before the scale, the soft-cap and the mask [B, K, G, T, S] |
| `self_attn.attended` | the heads' results, merged: the input of `o_proj` |
| `mlp.gate_proj`, `.up_proj`, `.down_proj` | outputs of the projections |
| `mlp.product` | gelu(gate) · up: the input of `down_proj` |
| `attention_residual`, `mlp_residual` | the residual stream after each addition |

`embedding`, `norm` and `logits`, which belong to no layer, are shown by the reference itself.
"""

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from gemma_export.exporter.decoder import DecoderLayer, rotate

Observe = Callable[[str, npt.NDArray[np.float32]], None]


@contextmanager
def watch(
    layer: DecoderLayer, prefix: str, observe: Observe | None, wanted: AbstractSet[str] | None = None
) -> Iterator[None]:
    """Calls `observe` with each activation of `layer` while the context lasts; with None, does nothing.

    Args:
        layer: The layer, whose results are not touched.
        prefix: The layer's name, put before each activation's.
        observe: Gets a name and an array that is only good during the call.
        wanted: Names from the table above, without the layer's: nothing is computed for any other. None shows
            all.
    """
    if observe is None:
        yield
        return

    def asked(*names: str) -> bool:
        return wanted is None or not wanted.isdisjoint(names)

    def show(name: str, tensor: Tensor) -> None:
        if asked(name):
            observe(f"{prefix}.{name}", tensor.detach().numpy())

    attention = layer.self_attn
    queries: list[Tensor] = []

    def after(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: show(name, output)

    def before(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: show(name, args[0])

    def after_attention(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        cos, sin, key = args[2], args[3], output[1]
        show("self_attn.key", key)
        projected = queries.pop()
        if not asked("self_attn.query", "self_attn.scores"):
            return
        query = rotate(attention._heads(projected, attention.query_heads), cos, sin)
        show("self_attn.query", query)
        if not asked("self_attn.scores"):
            return
        folded = query.reshape(query.shape[0], attention.kv_heads, -1, *query.shape[2:])  # [B, K, G, T, h]
        show("self_attn.scores", folded @ key[:, :, None].transpose(-1, -2))

    with ExitStack() as hooks:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) or name.endswith("layernorm"):
                hooks.enter_context(module.register_forward_hook(after(name)))
        hooks.enter_context(
            attention.q_proj.register_forward_hook(lambda module, args, output: queries.append(output))
        )
        hooks.enter_context(attention.o_proj.register_forward_pre_hook(before("self_attn.attended")))
        hooks.enter_context(layer.mlp.down_proj.register_forward_pre_hook(before("mlp.product")))
        hooks.enter_context(attention.register_forward_hook(after_attention))
        hooks.enter_context(layer.mlp_norm.register_forward_pre_hook(before("attention_residual")))
        hooks.enter_context(
            layer.register_forward_hook(lambda module, args, output: show("mlp_residual", output[0]))
        )
        yield
