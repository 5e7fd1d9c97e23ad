"""What calibration found, as values and as a file: the form and the numbers of every linear layer.

The file is JSON and belongs to one checkpoint and one shape of graph, whose digests it names. Codes that were
chosen one by one (GPTQ) are too many for it: they stand in a safetensors file beside it, named by its hash.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from gemma_export.disk import disk_errors
from gemma_export.errors import ScalesError, UsageError
from gemma_export.graphs.formats import Form
from gemma_export.runtime.bundle import hash_file
from gemma_export.runtime.manifest import CacheScales
from gemma_export.schema import MisshapenError, read_value

FORMAT = "gemma-export-scales"
FORMAT_VERSION = 1

_FILE_LIMIT = 256 << 20  # A 7B model has 20 MB of them; what is larger is some other file and is not read.
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38  # Numbers that fp32 holds without losing digits.
_AGAIN = "Make it again with `gemma-export calibrate`."

Method = Literal["nearest", "mse", "gptq", "none"]


@dataclass(frozen=True)
class LinearScales:
    """What was chosen for one linear layer, or for the embedding table.

    Attributes:
        form: How the product is computed.
        method: How the codes were chosen.
        block: Columns that share a scale; None for one scale per row.
        activation_scale: Of the form `w8a8-tensor`.
        error: Squared error of the output / squared output, over the calibration text; None where it was not
            measured.
        candidates: The same error of everything else that was tried, by name.
    """

    form: Form
    method: Method
    block: int | None = None
    activation_scale: float | None = None
    error: float | None = None
    candidates: Mapping[str, float] | None = None


@dataclass(frozen=True)
class CalibrationText:
    """What the numbers were collected on.

    Attributes:
        source: A file's name, or `written by the model`.
        samples: Sequences.
        tokens: Tokens of all of them.
        seed: That chose or wrote them.
        digest: SHA-256 of the token ids.
    """

    source: str
    samples: int
    tokens: int
    seed: int
    digest: str


@dataclass(frozen=True)
class ScaleTable:
    """All of a calibration.

    Attributes:
        target: The target it was made for; two may have schemes of one name.
        scheme: The scheme, as the manifest names it.
        graph: Digest of the graph's weights by name and shape.
        checkpoint: Digest of the checkpoint.
        text: What it was made on; None where nothing was run.
        smoothing: By the name of the norm or projection that makes a value x (`layers.0.input_layernorm`,
            `layers.0.mlp.up_proj`): what each channel of x is divided by, and the columns of the weights that
            read it are multiplied with.
        linears: By name of the weight without `.weight`, merged as the graph has it.
        cache: Scales of an 8-bit cache by layer; empty where the cache was not calibrated.
        codes: SHA-256 of the safetensors file with the stored codes; None where there is none.
    """

    target: str
    scheme: str
    graph: str
    checkpoint: str
    text: CalibrationText | None
    smoothing: Mapping[str, tuple[float, ...]]
    linears: Mapping[str, LinearScales]
    cache: tuple[CacheScales, ...] = ()
    codes: str | None = None

    @classmethod
    def from_json(cls, text: str, name: str = "The scales file") -> "ScaleTable":
        """Reads a table.

        Args:
            text: The contents of the file.
            name: What to call it in an error.

        Raises:
            ScalesError: It is not JSON, no scales file, of another format version, misshapen, or has a number
                that no scale can be.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ScalesError(f"{name} is not JSON: {error}.", _AGAIN) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ScalesError(
                f"{name} is not a scales file.", "Give the file that `gemma-export calibrate` wrote."
            )
        _check_version(data.get("format_version"), name)
        try:
            table: ScaleTable = read_value(data, cls)
        except MisshapenError as error:
            raise ScalesError(f"{name}: {error}.", _AGAIN) from None
        _check(table, name)
        return table

    def to_json(self) -> str:
        """The table as JSON text, a line for each layer; `from_json` reads it back to an equal value.

        Raises:
            ScalesError: A number cannot be a scale or an error.
        """
        _check(self, "The scales")
        # `asdict` copies each of a million numbers by itself.
        fields = asdict(replace(self, smoothing={})) | {"smoothing": self.smoothing}
        data = {"format": FORMAT, "format_version": FORMAT_VERSION, **fields}
        return "{\n" + ",\n".join(f"  {_json(key)}: {_block(value)}" for key, value in data.items()) + "\n}\n"

    @classmethod
    def read(cls, path: Path) -> "ScaleTable":
        """Reads a file.

        Raises:
            UsageError: There is no such file.
            ScalesError: It cannot be read, or `from_json` refuses it.
        """
        try:
            if path.stat().st_size > _FILE_LIMIT:
                raise ScalesError(f"{path} is too large for a scales file.", _AGAIN)
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UsageError(
                f"There is no file {path}.", "Check its path, or make it with `gemma-export calibrate`."
            ) from None
        except UnicodeDecodeError:
            raise ScalesError(f"{path} is not JSON: it is not UTF-8.", _AGAIN) from None
        except OSError as error:
            raise ScalesError(
                f"{path} cannot be read: {error.strerror or error}.", "Give a file that you may read."
            ) from None
        return cls.from_json(text, str(path))

    def write(self, path: Path) -> None:
        """Writes a file, whole or not at all; codes are written beside it before (`codes_path`).

        Raises:
            ScalesError: A number cannot be a scale or an error.
            StorageError: The disk refuses.
        """
        text = self.to_json()
        draft = path.with_name(f".{path.name}.partial")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # A text's name may hold bytes that are not UTF-8; their escapes are valid JSON.
                draft.write_text(text, encoding="utf-8", errors="backslashreplace")
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)


def codes_path(path: Path) -> Path:
    """Where the codes of a scales file stand: beside it."""
    return path.with_name(f"{path.stem}.codes.safetensors")


def open_codes(table: ScaleTable, path: Path) -> Path | None:
    """The file with a table's codes, after its hash was verified; None where the table has none.

    Args:
        table: What was read.
        path: The scales file it was read from.

    Raises:
        ScalesError: The codes are missing, cannot be read, or are not those the table names.
    """
    if table.codes is None:
        return None
    codes = codes_path(path)
    try:
        found = hash_file(codes)
    except FileNotFoundError:
        raise ScalesError(
            f"{path} needs the codes in {codes.name}, which is not beside it.",
            "Keep the two files together, or make them again with `gemma-export calibrate`.",
        ) from None
    except OSError as error:
        raise ScalesError(
            f"{codes} cannot be read: {error.strerror or error}.", "Give a file that you may read."
        ) from None
    if found != table.codes.lower():
        raise ScalesError(
            f"{codes} is not the file that {path.name} names: its SHA-256 is {found[:12]}…, not "
            f"{table.codes[:12]}….",
            "Keep the two files of a calibration together, or make them again with `gemma-export calibrate`.",
        )
    return codes


class HasWeightShapes(Protocol):
    """A model's shape, as `exporter.config.GemmaConfig` has it."""

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every weight."""


def graph_digest(config: HasWeightShapes) -> str:
    """SHA-256 over the names and shapes of a model's weights: what a table's names and lengths depend on."""
    shapes = [[name, *shape] for name, shape in config.weight_shapes.items()]
    return hashlib.sha256(_json(shapes).encode()).hexdigest()


def require(table: ScaleTable, target: str, scheme: str, graph: str, checkpoint: str) -> None:
    """Sees to it that a table belongs to a build.

    Args:
        table: The table.
        target: The build's target.
        scheme: The name of the build's scheme.
        graph: `graph_digest` of its model.
        checkpoint: Digest of its checkpoint.

    Raises:
        ScalesError: It was made for another target, scheme, shape or checkpoint; the sentence says which.
    """
    if table.target != target:
        raise ScalesError(
            f"The scales were made for the target {table.target}, and this build's is {target}.",
            f"Build with --target {table.target}, or calibrate again with --target {target}.",
        )
    if table.scheme != scheme:
        raise ScalesError(
            f"The scales were made for the scheme {table.scheme}, and this build's is {scheme}.",
            f"Build with --scheme {table.scheme}, or calibrate again with --scheme {scheme}.",
        )
    if table.graph != graph:
        raise ScalesError(
            "The scales were made for a model of another shape.", "Calibrate again with this checkpoint."
        )
    if table.checkpoint != checkpoint:
        raise ScalesError(
            f"The scales were made for another checkpoint: its digest is {table.checkpoint[:12]}…, "
            f"this one's {checkpoint[:12]}….",
            "Build from the checkpoint that they were made for, or calibrate again with this one.",
        )


def _check_version(version: object, name: str) -> None:
    if type(version) is not int or version < 1:
        raise ScalesError(f"{name}: format_version is {version!r}, not a version number.", _AGAIN)
    if version > FORMAT_VERSION:
        raise ScalesError(
            f"{name} has format version {version}; this gemma-export reads up to {FORMAT_VERSION}.",
            "Upgrade gemma-export, or calibrate again with this one.",
        )


def _check(table: ScaleTable, name: str) -> None:
    """Numbers that have the right type and can still not be true."""
    for place, scales in _scales(table):
        for index, scale in enumerate(scales):
            if not _SMALLEST <= scale <= _LARGEST:  # A comparison with NaN is false.
                where = f"{place}[{index}]" if len(scales) > 1 else place
                raise ScalesError(
                    f"{name}: {where} is {_short(scale)}; a scale is positive and finite.", _AGAIN
                )
    for place, error in _errors(table):
        if not 0 <= error <= _LARGEST:
            raise ScalesError(
                f"{name}: {place} is {_short(error)}; an error is finite and not negative.", _AGAIN
            )
    for linear, chosen in table.linears.items():
        place = f"{name}: linears[{linear!r}]"
        if chosen.block == 0:
            raise ScalesError(f"{place}.block is 0; it must be at least 1.", _AGAIN)
        if chosen.form == "w8a8-tensor" and chosen.activation_scale is None:
            raise ScalesError(f"{place} has the form w8a8-tensor and no activation_scale.", _AGAIN)
        if chosen.method == "gptq" and table.codes is None:
            raise ScalesError(f"{place} has stored codes, and no file of codes is named.", _AGAIN)


def _scales(table: ScaleTable) -> Iterator[tuple[str, Sequence[float]]]:
    for name, vector in table.smoothing.items():
        yield f"smoothing[{name!r}]", vector
    for name, linear in table.linears.items():
        if linear.activation_scale is not None:
            yield f"linears[{name!r}].activation_scale", [linear.activation_scale]
    for layer, cache in enumerate(table.cache):
        yield f"cache[{layer}].key", cache.key
        yield f"cache[{layer}].value", cache.value


def _errors(table: ScaleTable) -> Iterator[tuple[str, float]]:
    for name, linear in table.linears.items():
        if linear.error is not None:
            yield f"linears[{name!r}].error", linear.error
        for candidate, error in (linear.candidates or {}).items():
            yield f"linears[{name!r}].candidates[{candidate!r}]", error


def _short(number: float) -> str:
    return text if len(text := repr(number)) <= 30 else text[:27] + "..."


def _block(value: Any) -> str:
    """JSON of a field of the table: a mapping with a line for each entry, anything else in one line."""
    if not isinstance(value, Mapping) or not value:
        return _json(value)
    return "{\n" + ",\n".join(f"    {_json(key)}: {_json(item)}" for key, item in value.items()) + "\n  }"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
