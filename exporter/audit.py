"""The audit of a quantized graph: what was asked to be codes is codes, and is computed with as codes.

A graph can say the same with floats: a layer that no pass matched, a table that is stored twice, a
DequantizeLinear that the runtime evaluates once for all when it loads. None of that changes a result, so the
parity gate does not see it; it costs the time and the memory that quantizing was to save. The audit looks at
the operators: of the graph as it was written and, for the target cpu, of what onnxruntime makes of it.

onnxruntime writes that down, with references to the weights where they are: none is read, copied or packed
(2B: one second in all, 340 MB with torch loaded).
"""

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from gemma_export.errors import GraphError, MissingDependencyError
from gemma_export.graphs.formats import TABLE, Form
from gemma_export.graphs.quantization import LinearQuantization

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
SHORT_FLOATS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
CODES = {ir.DataType.INT4: 4, ir.DataType.UINT4: 4, ir.DataType.INT8: 8, ir.DataType.UINT8: 8}
"""Bits of the formats of codes. MatMulNBits packs two codes of 4 bits into a uint8, and says so itself."""

FLOAT_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Einsum"})
CODE_PRODUCTS: Mapping[Form, frozenset[str]] = {
    "w8a8-token": frozenset({"MatMulInteger", "MatMulIntegerToFloat"}),
    "w8a8-tensor": frozenset({"MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul"}),
    "w8": frozenset({"MatMulNBits"}),
    "w4": frozenset({"MatMulNBits"}),
}
"""The operators that compute a form on a CPU. DynamicQuantizeMatMul computes none of them: it rounds the
activations of all tokens with one scale, which it finds at run time."""
PRODUCTS = FLOAT_PRODUCTS.union({"DynamicQuantizeMatMul", "QGemm"}, *CODE_PRODUCTS.values())
LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
LAYOUT = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"})
"""Operators that leave a weight's numbers as they are."""
FINISHING = LAYOUT | {"Cast", "Mul", "Add", "DequantizeLinear"}
"""Operators that may stand between a product and the output of its layer."""

ACCURACY_LEVELS = {"cpu": 4, "cuda": 0}
"""Of MatMulNBits, by target: a CPU makes floats of all codes in every step at any other; a GPU has only the
other, and makes them while it multiplies."""
SMALLEST_BLOCK = 16
"""Columns that share a scale: a tensor with more floats than one for that many codes holds no scales."""

_FATAL = 4  # onnxruntime's log level: what it logs as an error it also raises, and we tell it once
_DEFECT = "This is a defect of a graph pass: please report it with the command that was run."


@dataclass(frozen=True)
class AuditedTensor:
    """A weight, and what computes with it.

    Attributes:
        name: The linear layer, or the table.
        form: That was asked for.
        operator: What computes the product; with the table, the head's.
        lookup: What looks rows up in the same initializer; None of all but the table.
        bits: Of a code, or of a float.
        block: Columns that share a scale; None for one scale per row, and for floats.
        bytes: Of the weight and its scales.
        error: What calibration measured, as in `calibration.scales.LinearScales`; None where it did not.
    """

    name: str
    form: Form
    operator: str
    lookup: str | None
    bits: int
    block: int | None
    bytes: int
    error: float | None = None


def audit(
    graph: Path,
    linears: Mapping[str, LinearQuantization],
    target: str,
    errors: Mapping[str, float] = MappingProxyType({}),
) -> tuple[AuditedTensor, ...]:
    """Holds a graph against what it was asked to be.

    Args:
        graph: The graph's file, beside its weights; of those nothing is read.
        linears: What was asked for, by the name of a linear layer or of the table: all of them.
        target: `cpu`: products of codes, in the graph as it was written and as onnxruntime runs it. `cuda`:
            likewise, as it was written. Any other: codes behind a DequantizeLinear, as it was written.
        errors: What calibration measured, by name; passed on.

    Returns:
        One for each name, in the order of `linears`.

    Raises:
        GraphError: A layer is not what it was asked to be, which names it and the operator found instead; or
            a product has a weight that nothing was asked of; or onnxruntime cannot load the graph.
        MissingDependencyError: The target is cpu, and onnxruntime is not installed.
    """
    found = _audit(ir.load(graph).graph, linears, target, "the graph has")
    if target == "cpu":
        quantized = {name: how for name, how in linears.items() if how.form != "float"}
        as_run = optimized(graph, linears.keys() - quantized.keys())
        for name, tensor in _audit(as_run.graph, quantized, target, "onnxruntime runs").items():
            found[name] = replace(tensor, bytes=found[name].bytes)
    return tuple(replace(found[name], error=errors.get(name)) for name in linears)


def optimized(graph: Path, release: Collection[str] = ()) -> ir.Model:
    """The graph that onnxruntime's CPU provider would run, without its weights.

    Args:
        graph: The graph's file, beside its weights.
        release: Layers whose weights become inputs of the graph. So does whatever is stored in 16 bits:
            onnxruntime makes numbers of 32 bits of it, and would write down the result.

    Raises:
        GraphError: onnxruntime cannot load it, or makes too much of it to be written.
        MissingDependencyError: onnxruntime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependencyError(
            "The audit of a quantized graph needs onnxruntime, which is not installed.",
            "Install it with `pip install 'gemma-export[cpu]'`.",
        ) from error
    model = ir.load(graph)
    for value in [*model.graph.initializers.values()]:
        if value.dtype in SHORT_FLOATS or _owner(value, release) is not None:
            model.graph.initializers.pop(str(value.name))
            value.const_value = None
            model.graph.inputs.append(value)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(graph.parent)
    )
    # Nothing is going to be run, and a packed weight is a copy.
    options.add_session_config_entry("session.disable_prepacking", "1")
    with tempfile.TemporaryDirectory(prefix="gemma-export-") as folder:
        result = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(result)
        serialized = ir.to_proto(model).SerializeToString()
        try:
            ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # onnxruntime's exceptions share no base of their own.
            raise GraphError(
                f"onnxruntime {ort.__version__} cannot load the graph: {str(error).strip()}.",
                "If a serialization failed, it has made floats of more than 2 GB of weights. " + _DEFECT,
            ) from error
        return ir.load(result)


@dataclass(frozen=True)
class _Reader:
    """An operator that computes with something stored.

    Attributes:
        node: The operator; another of its inputs depends on the graph's.
        between: What stands between the operator and what is stored.
        stored: The initializers, the largest first.
    """

    node: ir.Node
    between: frozenset[ir.Node]
    stored: tuple[ir.Value, ...]

    @property
    def weight(self) -> ir.Value:
        """The largest initializer."""
        return self.stored[0]

    @property
    def dequantizer(self) -> ir.Node | None:
        """The DequantizeLinear between the operator and the weight."""
        found = [node for node in self.between if node.op_type == "DequantizeLinear"]
        return found[0] if len(found) == 1 else None

    def __str__(self) -> str:
        weight = self.weight
        assert weight.dtype is not None
        assert weight.shape is not None
        return f"{self.node.op_type} over {weight.dtype.numpy()} {list(weight.shape)} ({weight.name})"


class _NotAskedForError(Exception):
    """A layer is not what it was asked to be; the text is what it is instead."""


def _audit(
    graph: ir.Graph, linears: Mapping[str, LinearQuantization], target: str, verb: str
) -> dict[str, AuditedTensor]:
    """What was found of every layer, by name."""
    readers = list(_readers(graph))
    products = _products(readers)
    found: dict[str, AuditedTensor] = {}
    wrong: list[tuple[str, str]] = []
    for name, how in linears.items():
        try:
            product = _product(graph, name, readers, products)
            _check_product(product, how, target)
            found[name] = _tensor(name, how, readers, product)
        except _NotAskedForError as instead:
            wrong.append((name, str(instead)))
    if wrong:
        name, instead_of_it = wrong[0]
        others = f"; {len(wrong) - 1} more are wrong, {wrong[1][0]} among them" if len(wrong) > 1 else ""
        raise GraphError(
            f"{name} was to be {linears[name].form}, and {verb} {instead_of_it}{others}.", _DEFECT
        )
    for product in products:
        if _owner(product.weight, linears) is None:
            raise GraphError(f"Nothing says how a product is quantized: {verb} {product}.", _DEFECT)
    return found


def _products(readers: Iterable[_Reader]) -> list[_Reader]:
    """Every product with its weight: the largest of what it reads, the rest being scales and zero points."""
    largest: dict[ir.Node, _Reader] = {}
    for reader in readers:
        other = largest.get(reader.node)
        if reader.node.op_type in PRODUCTS and (
            other is None or _nbytes(reader.weight) > _nbytes(other.weight)
        ):
            largest[reader.node] = reader
    return list(largest.values())


def _product(graph: ir.Graph, name: str, readers: list[_Reader], products: list[_Reader]) -> _Reader:
    """What computes a layer.

    Raises:
        _NotAskedForError: Nothing does, or several do.
    """
    mine = [product for product in products if _owner(product.weight, (name,)) is not None]
    if len(mine) > 1:
        raise _NotAskedForError(" and ".join(map(str, mine)))
    if mine:
        return mine[0]
    output = "logits" if name == TABLE else name
    makers = [node for node in graph if any(value.name == output for value in node.outputs)]
    nodes = [product for node in makers if (product := _product_behind(node)) is not None]
    if nodes:
        others = [_described(product) for product in products if product.node is nodes[0]]
        raise _NotAskedForError(others[0] if others else f"{nodes[0].op_type} over nothing that is stored")
    rest = [str(reader) for reader in readers if _owner(reader.weight, (name,)) is not None]
    raise _NotAskedForError(f"{rest[0]} and no product" if rest else "nothing of that name")


def _tensor(name: str, how: LinearQuantization, readers: list[_Reader], product: _Reader) -> AuditedTensor:
    """What was found of a layer whose product is right.

    Raises:
        _NotAskedForError: Floats are stored beside codes, or the lookup reads another weight than the head.
    """
    mine = [reader for reader in readers if _owner(reader.weight, (name,)) is not None]
    stored = {value for reader in mine for value in reader.stored if _owner(value, (name,)) is not None}
    lookups = [reader for reader in mine if reader.node.op_type in LOOKUPS]
    lookup = next((reader.node.op_type for reader in lookups if reader.weight is product.weight), None)
    if name == TABLE and lookup is None:
        raise _NotAskedForError(
            f"{', '.join(map(str, lookups)) or 'no lookup'}, beside {product} for the head"
        )
    if how.form != "float":
        _check_floats(stored, product)
    return AuditedTensor(
        name,
        how.form,
        product.node.op_type,
        lookup,
        _bits(product),
        None if how.form == "float" or how.format is None else how.format.block,
        sum(_nbytes(value) for value in stored),
    )


def _check_product(reader: _Reader, how: LinearQuantization, target: str) -> None:
    """Checks what computes a layer.

    Raises:
        _NotAskedForError: It is not what computes the form.
    """
    if how.form == "float":
        right = reader.node.op_type in FLOAT_PRODUCTS and reader.weight.dtype in FLOATS
    elif target in ACCURACY_LEVELS:
        right = _is_product_of_codes(reader, how, ACCURACY_LEVELS[target])
    else:
        right = _is_product_behind_codes(reader, how)
    if not right:
        raise _NotAskedForError(_described(reader))


def _is_product_of_codes(reader: _Reader, how: LinearQuantization, accuracy_level: int) -> bool:
    """Whether onnxruntime computes with the codes themselves."""
    node, form = reader.node, how.format
    if node.op_type not in CODE_PRODUCTS[how.form] or reader.weight.dtype not in CODES or form is None:
        return False
    if any(other.op_type not in LAYOUT for other in reader.between) or _bits(reader) != form.bits:
        return False
    if node.op_type == "MatMulNBits":
        block = form.product_block(node.attributes.get_int("K"))
        return _block(node) == block and _accuracy(node) == accuracy_level
    rounding = _made_by(node.inputs[0])
    return rounding is not None and rounding.op_type == "QuantizeLinear"


def _is_product_behind_codes(reader: _Reader, how: LinearQuantization) -> bool:
    """Whether a product has codes behind a DequantizeLinear, and rounds activations where it was to."""
    node, form, dequantizer = reader.node, how.format, reader.dequantizer
    if node.op_type not in FLOAT_PRODUCTS or reader.weight.dtype not in CODES or form is None:
        return False
    if dequantizer is None or _bits(reader) != form.bits or _block(dequantizer) != form.block:
        return False
    meaning = _made_by(node.inputs[0])
    rounding = (
        _made_by(meaning.inputs[0]) if meaning is not None and meaning.op_type == "DequantizeLinear" else None
    )
    rounds = rounding is not None and rounding.op_type == "QuantizeLinear"
    return rounds == (how.form == "w8a8-tensor") and how.form != "w8a8-token"


def _check_floats(stored: Iterable[ir.Value], product: _Reader) -> None:
    """Checks that nothing but scales is stored as floats beside codes.

    Raises:
        _NotAskedForError: There is a tensor of floats too large for that.
    """
    codes = _nbytes(product.weight) * 8 // _bits(product)
    for value in stored:
        size = 0 if value.const_value is None else value.const_value.size
        if value.dtype in FLOATS and size * SMALLEST_BLOCK > codes:
            raise _NotAskedForError(f"{product}, beside {value.name} with {size:,} floats")


def _product_behind(node: ir.Node) -> ir.Node | None:
    """The product whose result a node finishes."""
    if node.op_type in PRODUCTS:
        return node
    if node.op_type not in FINISHING:
        return None
    producers = (value.producer() for value in node.inputs if value is not None)
    found = (_product_behind(producer) for producer in producers if producer is not None)
    return next((product for product in found if product is not None), None)


def _described(reader: _Reader) -> str:
    """A reader of a weight, and what of its way to compute may be wrong."""
    node, rounding = reader.node, _made_by(reader.node.inputs[0])
    if node.op_type == "MatMulNBits":
        how = f"{_bits(reader)} bits, blocks of {_block(node)}, accuracy level {_accuracy(node)}"
    elif reader.dequantizer is not None:
        how = f"blocks of {_block(reader.dequantizer)}, activations of {rounding and rounding.op_type}"
    elif rounding is not None and rounding.op_type == "DynamicQuantizeLinear":
        how = "one scale for the activations of all tokens"
    else:
        return str(reader)
    return f"{reader} with {how}"


def _readers(graph: ir.Graph) -> Iterator[_Reader]:
    """Every operator with each of its operands that is stored, or is made of nothing else than stored."""
    between: dict[ir.Value, frozenset[ir.Node]] = {}  # Of values that are, or are made of, what is stored.
    sources: dict[ir.Value, frozenset[ir.Value]] = {}
    for value in graph.initializers.values():
        between[value], sources[value] = frozenset(), frozenset({value})
    for node in graph:
        operands = [value for value in node.inputs if value is not None]
        if all(value in sources for value in operands):
            for output in node.outputs:
                between[output] = frozenset({node}).union(*(between[value] for value in operands))
                sources[output] = frozenset().union(*(sources[value] for value in operands))
            continue
        for value in dict.fromkeys(operands):
            if sources.get(value):
                stored = sorted(sources[value], key=_nbytes, reverse=True)
                yield _Reader(node, between[value], tuple(stored))


def _owner(value: ir.Value, names: Collection[str]) -> str | None:
    """The layer that an initializer belongs to: its name, or the beginning of it up to a full stop."""
    name = str(value.name)
    while name not in names:
        name, stop, _ = name.rpartition(".")
        if not stop:
            return None
    return name


def _made_by(value: ir.Value | None) -> ir.Node | None:
    """The operator that makes a value, before casts and changes of layout."""
    node = None if value is None else value.producer()
    return _made_by(node.inputs[0]) if node is not None and node.op_type in LAYOUT | {"Cast"} else node


def _bits(reader: _Reader) -> int:
    dtype = reader.weight.dtype
    assert dtype is not None
    if reader.node.op_type == "MatMulNBits":
        return reader.node.attributes.get_int("bits", 4)
    return CODES.get(dtype) or int(dtype.itemsize * 8)


def _block(node: ir.Node) -> int | None:
    return node.attributes.get_int("block_size", 0) or None


def _accuracy(node: ir.Node) -> int:
    return node.attributes.get_int("accuracy_level", 0)


def _nbytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes
