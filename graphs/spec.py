"""What must hold of a graph, checked after each stage.

The rules are data: a name and a function that returns what is wrong, or None. A graph that breaks one stops
the build with the rule's name, before anything is written.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from gemma_export.errors import GraphError
from gemma_export.graphs.formats import Form
from gemma_export.graphs.tensors import streamed

MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's own operators."""

PRODUCTS = ("MatMulInteger", "MatMulNBits", "FusedMatMul", "MatMul")
"""Operators that multiply with a weight: those of the target cpu, and the standard one."""

Rule = Callable[[ir.Model], str | None]


@dataclass(frozen=True)
class Spec:
    """A stage's name and its rules."""

    stage: str
    rules: tuple[Rule, ...]

    def check(self, model: ir.Model) -> None:
        """Raises GraphError for the first rule that the graph breaks."""
        for rule in self.rules:
            problem = rule(model)
            if problem is not None:
                raise GraphError(
                    f"The {self.stage} graph breaks the rule '{rule.__name__.replace('_', ' ')}': {problem}.",
                    "This is a defect of a graph pass: please report it with the command that was run.",
                )


def num_layers(model: ir.Model) -> int:
    """Layers of the decoder, counted by its cache inputs."""
    return (len(model.graph.inputs) - 2) // 2


def num_attentions(model: ir.Model) -> int:
    """Attentions that are one operator."""
    return sum(node.op_type == "Attention" for node in model.graph)


def num_norms(model: ir.Model) -> int:
    """RMSNorms of the decoder, counted by stored weights that are read: two or four a layer, and the last."""
    stored = model.graph.initializers.values()
    return sum(
        str(value.name).endswith(("norm.weight", "norm.gain")) and bool(value.uses()) for value in stored
    )


def inputs_and_outputs_follow_the_contract(model: ir.Model) -> str | None:
    """Names, order and axes as in `docs/design.md`."""
    layers = num_layers(model)
    parts = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    wanted_inputs = ["input_ids", "position_ids", *(f"past_key_values.{part}" for part in parts)]
    wanted_outputs = ["logits", *(f"present.{part}" for part in parts)]
    if [value.name for value in model.graph.inputs] != wanted_inputs:
        return f"inputs are {[value.name for value in model.graph.inputs][:4]}…"
    if [value.name for value in model.graph.outputs] != wanted_outputs:
        return f"outputs are {[value.name for value in model.graph.outputs][:3]}…"
    for past, present in zip(model.graph.inputs[2:], model.graph.outputs[1:], strict=True):
        if past.shape is None or len(past.shape) != 4 or not isinstance(past.shape[2], int):
            return f"{past.name} is not [batch, kv_heads, slots, head_dim] with a static number of slots"
        if past.dtype != present.dtype or past.shape != present.shape:
            return f"{present.name} differs from {past.name} in type or shape"
    return None if model.graph.outputs[0].dtype == ir.DataType.FLOAT else "logits are not fp32"


def only_standard_operators(model: ir.Model) -> str | None:
    """Nothing that a runtime other than onnxruntime would not know."""
    others = {f"{node.domain}::{node.op_type}" for node in model.graph if node.domain}
    return f"it holds {sorted(others)}" if others else None


def every_initializer_has_a_value(model: ir.Model) -> str | None:
    """A name without bytes would be written as garbage."""
    missing = [value.name for value in model.graph.initializers.values() if value.const_value is None]
    return f"{missing[:3]} have none" if missing else None


def every_value_has_a_type(model: ir.Model) -> str | None:
    """Passes that choose number formats look at types; a value without one would be passed over."""
    untyped = [value.name for node in model.graph for value in node.outputs if value.dtype is None]
    return f"{untyped[:3]} have none" if untyped else None


def no_initializer_is_unused(model: ir.Model) -> str | None:
    """An unused weight is a weight that some pass forgot."""
    unused = [value.name for value in model.graph.initializers.values() if not value.uses()]
    return f"{unused[:3]} are" if unused else None


def caches_are_written_straight(model: ir.Model) -> str | None:
    """Between a cache input and its output stands one writing operator and nothing else."""
    for past, present in zip(model.graph.inputs[2:], model.graph.outputs[1:], strict=True):
        writer = present.producer()
        if writer is None or writer.op_type not in ("TensorScatter", "GroupQueryAttention"):
            return f"{present.name} is made by {writer.op_type if writer else 'nothing'}"
        if past not in writer.inputs:
            return f"{present.name} does not come from {past.name}"
    return None


def caches_are_written_at_their_positions(model: ir.Model) -> str | None:
    """Slot = position; in a cache shorter than the longest position mod its size, with a mask as wide."""
    slots = [value.shape[2] for value in model.graph.inputs[2:] if value.shape is not None]
    longest = max(size for size in slots if isinstance(size, int))
    masks = _masks_by_cache(model)
    for past, present, size in zip(model.graph.inputs[2:], model.graph.outputs[1:], slots, strict=True):
        writer = present.producer()
        if writer is None or writer.op_type != "TensorScatter":
            continue
        divisor = _divisor(writer.inputs[2])
        if divisor != (None if size == longest and divisor is None else size):
            return f"{past.name} of {size} slots is written at positions modulo {divisor or 'nothing'}"
        mask = masks.get(present)
        if mask is not None and mask.shape is not None and mask.shape[-1] != size:
            return f"{past.name} has {size} slots, and its mask {mask.shape[-1]}"
    return None


def _masks_by_cache(model: ir.Model) -> dict[ir.Value, ir.Value | None]:
    """The mask of the attention that reads each updated cache as it is."""
    return {
        cache: node.inputs[3]
        for node in model.graph
        if node.op_type == "Attention"
        for cache in node.inputs[1:3]
        if cache is not None
    }


def _divisor(index: ir.Value | None) -> int | None:
    """What positions are divided by on their way to a write; None where they are not."""
    node = None if index is None else index.producer()
    if node is None:
        return None
    if node.op_type != "Mod":
        return _divisor(node.inputs[0]) if node.inputs else None
    size = node.inputs[1]
    return None if size is None or size.const_value is None else int(size.const_value.numpy())


def embedding_is_stored_once(model: ir.Model) -> str | None:
    """One table, read by the lookup and by the head, and no second initializer over the same rows."""
    lookups = [
        node for node in model.graph if node.op_type == "Gather" and streamed(node.inputs[0]) is not None
    ]
    if len(lookups) != 1:
        return f"{len(lookups)} lookups read a stored table"
    table, tensor = lookups[0].inputs[0], streamed(lookups[0].inputs[0])
    assert table is not None
    assert tensor is not None
    for value in model.graph.initializers.values():
        other = streamed(value)
        if value is not table and other is not None and other.source.name == tensor.source.name:
            return f"{value.name} stores the rows of {table.name} again"
    readers = Counter(_reader(use.node) for use in table.uses())
    return None if readers["Gather"] == 1 and len(readers) == 2 else f"the table is read by {dict(readers)}"


def _reader(node: ir.Node) -> str:
    """The operator that reads a table, seen through what turns it, casts it or repeats its scales."""
    if node.op_type in ("Transpose", "Cast", "Expand"):
        for use in node.outputs[0].uses():
            return _reader(use.node)
    return node.op_type


def fused_operators_are_all_there(model: ir.Model) -> str | None:
    """Each norm; each layer: two rotations, two cache writes, one attention."""
    layers = num_layers(model)
    counts = Counter(node.op_type for node in model.graph)
    return differences(counts, {**fused_operators(model), "Attention": layers, "Softmax": 0})


def fused_operators(model: ir.Model) -> dict[str, int]:
    """How often the operators that are made of others must be there, whatever becomes of attention."""
    layers = num_layers(model)
    return {
        "RMSNormalization": num_norms(model),
        "RotaryEmbedding": 2 * layers,
        "TensorScatter": 2 * layers,
        "Gelu": layers,
        "ScatterElements": 0,
    }


def attention_masks_are_explicit(model: ir.Model) -> str | None:
    """No `is_causal`, no count of valid slots: TensorRT misreads the one and ignores the other."""
    for node in model.graph:
        if node.op_type != "Attention":
            continue
        if node.attributes.get("is_causal") is not None:
            return f"{node.name} sets is_causal"
        if len(node.inputs) < 4 or node.inputs[3] is None or any(node.inputs[4:]):
            return f"{node.name} has no mask, or more inputs than a mask"
    return None


def cpu_operators_are_all_there(model: ir.Model) -> str | None:
    """Each layer: one fused attention, four products; one head."""
    layers = num_layers(model)
    counts = Counter(node.op_type for node in model.graph)
    wanted = {
        "GroupQueryAttention": layers,
        "FusedMatMul": 4 * layers + 1,
        "Attention": 0,
        "MatMul": 0,
        "Transpose": 0,
    }
    return differences(counts, wanted)


def norms_and_activations_are_all_there(model: ir.Model) -> str | None:
    """Each norm; each layer: one activation."""
    counts = Counter(node.op_type for node in model.graph)
    return differences(counts, {"RMSNormalization": num_norms(model), "Gelu": num_layers(model)})


def norms_and_activations_are_fused(model: ir.Model) -> str | None:
    """As functions that are defined: each layer's activation, and each norm of a sum."""
    counts = Counter(node.op_type for node in model.graph)
    wanted = {"GatedGelu": num_layers(model), "Gelu": 0, "Split": 0, "norms": num_norms(model)}
    counts["norms"] = counts["RMSNormalization"] + counts["ResidualNorm"]
    for node in model.graph:
        normed = node.inputs[0] if node.op_type == "RMSNormalization" else None
        maker = None if normed is None else normed.producer()
        if maker is not None and maker.op_type == "Add":
            return f"{node.name} is of a sum"
        if node.domain and node.domain != MICROSOFT and node.op_identifier() not in model.functions:
            return f"nothing defines {node.op_type}, as {node.name} is"
    return differences(counts, wanted)


def quantized_operators_are_all_there(model: ir.Model) -> str | None:
    """As in fp32 but for the products, which are of any form; tokens are rounded for those of integers."""
    layers = num_layers(model)
    counts = Counter(node.op_type for node in model.graph)
    wanted = {
        "GroupQueryAttention": layers,
        "QuantizeLinear": counts["MatMulInteger"],
        "Attention": 0,
        "MatMul": 0,
        "Transpose": 0,
    }
    counts["products"], wanted["products"] = sum(counts[name] for name in PRODUCTS), 4 * layers + 1
    return differences(counts, wanted)


def quantized_table_is_stored_once(model: ir.Model) -> str | None:
    """One table, of numbers or of codes and scales, each read by the lookup and by the head."""
    lookups: dict[ir.Value, ir.Node] = {
        node.inputs[0]: node
        for node in model.graph
        if node.op_type == "Gather" and node.inputs[0] is not None and streamed(node.inputs[0]) is not None
    }
    stored = {table.dtype for table in lookups}
    if ir.DataType.UINT8 not in stored:
        return embedding_is_stored_once(model)
    for table in lookups:
        readers = Counter(_reader(use.node) for use in table.uses())
        if readers != {"Gather": 1, "MatMulNBits": 1}:
            return f"{table.name} is read by {dict(readers)}"
    codes = next(table for table in lookups if table.dtype == ir.DataType.UINT8)
    return None if len(lookups) == 2 else f"{len(lookups)} lookups read stored tables beside {codes.name}"


def no_weight_is_stored_twice(model: ir.Model) -> str | None:
    """What is stored as codes is not stored as numbers too, nor as other codes."""
    matrices = [
        (str(value.name), streamed(value))
        for value in model.graph.initializers.values()
        if not str(value.name).endswith(".scales")
    ]
    names: dict[str, str] = {}
    for name, tensor in matrices:
        if tensor is None:
            continue
        if (other := names.setdefault(tensor.source.name, name)) != name:
            return f"{name} stores {tensor.source.name} again, which {other} stores"
    return None


def codes_are_read_as_codes(model: ir.Model) -> str | None:
    """Every product over integers reads stored codes; scales are in 16 bits for blocks, or one per row."""
    for node in model.graph:
        if node.op_type not in ("MatMulInteger", "MatMulNBits"):
            continue
        codes, scales = node.inputs[1], node.inputs[2]
        wanted = ir.DataType.INT8 if node.op_type == "MatMulInteger" else ir.DataType.UINT8
        if codes is None or streamed(codes) is None or codes.dtype != wanted:
            return f"{node.name} reads no stored codes"
        if node.op_type == "MatMulNBits" and not _are_small(scales, node.inputs[0]):
            return (
                f"{node.name} has no scales that are stored in bfloat16, or one per row, "
                "and have the format of what it reads"
            )
    return None


def _are_small(scales: ir.Value | None, x: ir.Value | None) -> bool:
    """Whether scales are stored in bfloat16, or one per row, and made numbers of the format of x."""
    stored = _stored(scales)
    assert scales is not None
    assert x is not None
    tensor = streamed(stored)
    small = stored.dtype == ir.DataType.BFLOAT16 or (tensor is not None and tensor.shape[-1] == 1)
    return tensor is not None and small and scales.dtype == x.dtype


def forms_are_those_chosen(forms: Mapping[str, Form]) -> Rule:
    """A rule: each layer, by name, and the head, by the table's, has the form that was chosen for it.

    Args:
        forms: Of every linear layer and the table, `embed_tokens`, by name.
    """

    def every_product_has_its_form(model: ir.Model) -> str | None:
        found = dict.fromkeys(forms, "missing")
        for node in model.graph:
            if node.op_type in PRODUCTS and not reads_cache(node):
                found[str(_stored(node.inputs[1]).name).rsplit(".", 1)[0]] = _form(node)
        wrong = [
            f"{name} is {form}, not {forms.get(name)}"
            for name, form in found.items()
            if form != forms.get(name)
        ]
        return "; ".join(wrong[:3]) or None

    return every_product_has_its_form


def reads_cache(product: ir.Node) -> bool:
    """Whether a product is one of attention's own: of queries and keys, or of weights and values."""
    makers = [_before_transpose(value) for value in product.inputs]
    return any(node is not None and node.op_type == "TensorScatter" for node in makers)


def _before_transpose(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return _before_transpose(node.inputs[0]) if node is not None and node.op_type == "Transpose" else node


def _stored(value: ir.Value | None) -> ir.Value:
    """The initializer behind what casts it, transposes it or says what its codes stand for."""
    assert value is not None
    producer = value.producer()
    return value if producer is None else _stored(producer.inputs[0])


def _form(product: ir.Node) -> str:
    """The form of a product, by its operator or by the format of what is stored."""
    match product.op_type:
        case "MatMulInteger":
            return "w8a8-token"
        case "MatMulNBits":
            return f"w{product.attributes['bits'].as_int()}"
        case "MatMul" if _stored(product.inputs[1]).dtype == ir.DataType.INT4:
            return "w4"
        case "MatMul" if _stored(product.inputs[1]).dtype == ir.DataType.INT8:
            x = product.inputs[0]
            producer = None if x is None else x.producer()
            rounded = producer is not None and producer.op_type == "DequantizeLinear"
            return "w8a8-tensor" if rounded else "w8"
        case _:
            return "float"


def differences(counts: Counter[str], wanted: dict[str, int]) -> str | None:
    """Which operators there are more or fewer of than there must be, for a message."""
    wrong = [f"{counts[name]} {name}, not {count}" for name, count in wanted.items() if counts[name] != count]
    return "; ".join(wrong) or None


RAW = Spec("traced", (inputs_and_outputs_follow_the_contract, only_standard_operators))
CANONICAL = Spec(
    "canonical",
    (
        inputs_and_outputs_follow_the_contract,
        only_standard_operators,
        every_value_has_a_type,
        every_initializer_has_a_value,
        no_initializer_is_unused,
        caches_are_written_straight,
        caches_are_written_at_their_positions,
        embedding_is_stored_once,
        fused_operators_are_all_there,
        attention_masks_are_explicit,
    ),
)
FLOATS = (
    inputs_and_outputs_follow_the_contract,
    every_initializer_has_a_value,
    no_initializer_is_unused,
    caches_are_written_straight,
    embedding_is_stored_once,
    cpu_operators_are_all_there,
)
"""Of a graph for onnxruntime's own operators, whatever runs them."""
CODES = (
    inputs_and_outputs_follow_the_contract,
    every_initializer_has_a_value,
    no_initializer_is_unused,
    caches_are_written_straight,
    quantized_table_is_stored_once,
    no_weight_is_stored_twice,
    codes_are_read_as_codes,
    quantized_operators_are_all_there,
)
"""The same where it is quantized."""
CPU = Spec("onnxruntime CPU", (*FLOATS, norms_and_activations_are_fused))
CPU_QUANTIZED = Spec("quantized CPU", (*CODES, norms_and_activations_are_fused))


def cpu_quantized(forms: Mapping[str, Form]) -> Spec:
    """The rules of a quantized CPU graph, and that its products have the forms chosen for them, by name."""
    return Spec(CPU_QUANTIZED.stage, (*CPU_QUANTIZED.rules, forms_are_those_chosen(forms)))
