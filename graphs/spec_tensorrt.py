"""What must hold of a graph that TensorRT is to compile.

Most of what breaks one of these rules is built without a word: into an engine that computes something else,
that stores a weight once for each profile, or that makes numbers of all codes in memory, in every step.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

import onnx_ir as ir

from gemma_export.graphs import spec
from gemma_export.graphs.formats import Form
from gemma_export.graphs.tensors import streamed

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
CODES = frozenset({ir.DataType.INT8, ir.DataType.INT4})
TO_WEIGHT = frozenset({"Cast", "DequantizeLinear", "Transpose"})
"""What may stand between a product and its weight."""
FINISHING = frozenset({"Cast", "Mul"})
"""What may stand between a product and what splits it."""


def every_layer_has_its_attention(model: ir.Model) -> str | None:
    """Each layer: one Attention; or as many products with keys as with values, and a Softmax between two."""
    counts = Counter(node.op_type for node in model.graph)
    if problem := spec.differences(counts, spec.fused_operators(model)):
        return problem
    products = 0
    for key, value in zip(model.graph.outputs[1::2], model.graph.outputs[2::2], strict=True):
        of_keys, of_values = (Counter(_readers(cache)) for cache in (key, value))
        if of_keys != of_values or (of_keys != {"Attention": 1} and set(of_keys) != {"MatMul"}):
            return f"{key.name} is read by {dict(of_keys)}, {value.name} by {dict(of_values)}"
        products += of_keys["MatMul"]
    return spec.differences(counts, {"Softmax": products})


def attention_has_no_soft_cap(model: ir.Model) -> str | None:
    """TensorRT's parser refuses it. In fp32, which TensorRT has no attention in either, it is for others."""
    for node in _nodes(model, "Attention"):
        if "softcap" in node.attributes and node.outputs[0].dtype != ir.DataType.FLOAT:
            return f"{node.name} has one"
    return None


def products_read_caches_where_they_lie(model: ir.Model) -> str | None:
    """The transposed view, of keys and values: any other is copied in each step, with all its slots."""
    for node in _nodes(model, "MatMul"):
        if spec.reads_cache(node) and not any(_is_transposed_cache(value, model) for value in node.inputs):
            return f"{node.name} reads another view of a cache"
    return None


def _is_transposed_cache(value: ir.Value | None, model: ir.Model) -> bool:
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Transpose":
        return False
    return list(node.attributes["perm"].as_ints()) == [0, 1, 3, 2] and node.inputs[0] in model.graph.outputs


def scores_are_capped_in_fp32(model: ir.Model) -> str | None:
    """Between the products of a decomposed attention nothing is rounded."""
    for node in (*_nodes(model, "Softmax"), *_nodes(model, "Tanh")):
        if node.outputs[0].dtype != ir.DataType.FLOAT:
            return f"{node.name} is in {_format(node.outputs[0])}"
    return None


def masks_have_the_format_of_queries(model: ir.Model) -> str | None:
    """A fused attention adds the mask as it is."""
    for node in _nodes(model, "Attention"):
        query, mask = node.inputs[0], node.inputs[3]
        if query is None or mask is None or query.dtype != mask.dtype:
            return f"{node.name} has queries in {_format(query)} and its mask in {_format(mask)}"
    return None


def operands_have_one_format(model: ir.Model) -> str | None:
    """A network of strong types casts nothing by itself."""
    for node in model.graph:
        formats = {value.dtype for value in node.inputs if value is not None and value.dtype in FLOATS}
        if len(formats) > 1:
            return f"{node.name or node.op_type} reads {' and '.join(sorted(map(str, formats)))}"
    return None


def caches_are_scattered_in_place(model: ir.Model) -> str | None:
    """One TensorScatter of floats along the slots: anything else copies the whole cache in every step."""
    for past, present in zip(model.graph.inputs[2:], model.graph.outputs[1:], strict=True):
        node = present.producer()
        if node is None or node.op_type != "TensorScatter" or node.inputs[0] is not past:
            return f"{present.name} is not {past.name} after one TensorScatter"
        linear = node.attributes.get_string("mode", "linear") == "linear"
        if node.attributes.get_int("axis", -2) not in (-2, 2) or not linear:
            return f"{present.name} is not written along the slots"
        if past.dtype not in FLOATS:
            return f"{past.name} is in {_format(past)}"
    return None


def weights_are_rows_behind_one_transpose(model: ir.Model) -> str | None:
    """Each product reads its weight [N, K], as it is stored: of [K, N] each profile stores its own copy."""
    for node in _products(model):
        value, turns = node.inputs[1], []
        while value is not None and (maker := value.producer()) is not None and maker.op_type in TO_WEIGHT:
            turns += [maker.attributes["perm"].as_ints()] if maker.op_type == "Transpose" else []
            value = maker.inputs[0]
        if streamed(value) is None:
            return f"{node.name} multiplies with nothing that is stored"
        if [list(turn) for turn in turns] != [[1, 0]]:
            return f"{node.name} reads {value.name if value else ''} through {len(turns)} transposes"
    return None


def products_get_an_axis_before_they_are_split(model: ir.Model) -> str | None:
    """Of a product that is split along its last axis, each profile stores a weight of its own."""
    for node in _nodes(model, "Split"):
        product = _before(node.inputs[0], FINISHING)
        if product is not None and product.op_type == "MatMul":
            return f"{product.name} is split as it is"
    return None


def codes_only_become_numbers(model: ir.Model) -> str | None:
    """A constant of codes is read by DequantizeLinear alone; a zero point is none."""
    for value in model.graph.initializers.values():
        for use in value.uses() if value.dtype in CODES else ():
            zero_point = use.idx == 2 and use.node.op_type in ("QuantizeLinear", "DequantizeLinear")
            if not zero_point and (use.node.op_type, use.idx) != ("DequantizeLinear", 0):
                return f"{value.name} is read by {use.node.op_type}"
    return None


def codes_of_8_bits_have_one_step(model: ir.Model) -> str | None:
    """With a scale per row, numbers are made of the whole weight, in memory, for every token."""
    for node in _nodes(model, "DequantizeLinear"):
        codes, scale = node.inputs[0], node.inputs[1]
        if streamed(codes) is None or codes is None or codes.dtype != ir.DataType.INT8:
            continue
        if scale is None or scale.shape is None or len(scale.shape) != 0:
            return f"{codes.name} has {list(scale.shape or ()) if scale else 'no'} scales"
    return None


def table_of_codes_is_read_once(model: ir.Model) -> str | None:
    """Lookup and head read one transposed view of one DequantizeLinear; of numbers, one table as it is."""
    tables = [_before(node.inputs[0], {"Transpose"}) for node in _nodes(model, "Gather")]
    numbers = [
        node
        for node in tables
        if node is not None and node.op_type == "DequantizeLinear" and streamed(node.inputs[0]) is not None
    ]
    if not numbers:
        return spec.embedding_is_stored_once(model)
    codes = numbers[0].inputs[0]
    assert codes is not None
    readers = [use.node for value in (codes, *numbers[0].outputs) for use in value.uses()]
    if len(numbers) != 1 or [node.op_type for node in readers] != ["DequantizeLinear", "Transpose"]:
        return f"{codes.name} is read by {', '.join(node.op_type for node in readers)}"
    views = sorted(use.node.op_type for use in readers[1].outputs[0].uses())
    return None if views == ["Gather", "MatMul"] else f"{codes.name} is read by {', '.join(views)}"


def products_have_all_tokens_on_one_axis(model: ir.Model) -> str | None:
    """With an axis for the batch, a profile for several rows stores weights of its own."""
    for node in _products(model):
        x = node.inputs[0]
        if x is None or x.shape is None or len(x.shape) != 3 or x.shape[0] != 1:
            return f"{node.name} reads {x.name if x else 'nothing'} {list(x.shape or ()) if x else ''}"
    return None


def _products(model: ir.Model) -> list[ir.Node]:
    """The products with weights."""
    return [node for node in _nodes(model, "MatMul") if not spec.reads_cache(node)]


def _readers(value: ir.Value) -> Iterator[str]:
    """The operators that read a value, however it is turned or cast for them."""
    for use in value.uses():
        if use.node.op_type in ("Cast", "Transpose"):
            yield from _readers(use.node.outputs[0])
        else:
            yield use.node.op_type


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def _before(value: ir.Value | None, passed: Collection[str]) -> ir.Node | None:
    """The operator that makes a value, before those that are passed."""
    node = None if value is None else value.producer()
    return _before(node.inputs[0], passed) if node is not None and node.op_type in passed else node


def _format(value: ir.Value | None) -> str:
    return "no format" if value is None or value.dtype is None else value.dtype.name.lower()


_RULES: tuple[spec.Rule, ...] = (
    spec.inputs_and_outputs_follow_the_contract,
    spec.only_standard_operators,
    spec.every_value_has_a_type,
    spec.every_initializer_has_a_value,
    spec.no_initializer_is_unused,
    every_layer_has_its_attention,
    attention_has_no_soft_cap,
    products_read_caches_where_they_lie,
    scores_are_capped_in_fp32,
    spec.attention_masks_are_explicit,
    masks_have_the_format_of_queries,
    operands_have_one_format,
    caches_are_scattered_in_place,
    spec.caches_are_written_at_their_positions,
    weights_are_rows_behind_one_transpose,
    products_have_all_tokens_on_one_axis,
    products_get_an_axis_before_they_are_split,
)
TENSORRT = spec.Spec("TensorRT", (*_RULES, spec.embedding_is_stored_once))


def quantized(forms: Mapping[str, Form]) -> spec.Spec:
    """The rules of a quantized graph, and that its products have the forms chosen for them, by name."""
    rules = (
        *_RULES,
        table_of_codes_is_read_once,
        spec.no_weight_is_stored_twice,
        codes_only_become_numbers,
        codes_of_8_bits_have_one_step,
        spec.forms_are_those_chosen(forms),
    )
    return spec.Spec("quantized TensorRT", rules)
