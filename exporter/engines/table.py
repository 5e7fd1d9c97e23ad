"""An engine as the audit found it, for people: what it runs, what it needs, and where that fits."""

from rich.markup import escape
from rich.table import Table

from gemma_export.exporter.engines.budget import devices_for, gib
from gemma_export.runtime.manifest import EngineInfo, Manifest, ProfileInfo, Range

_FLAVOURS = {"rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}


def engine_table(engine: EngineInfo, manifest: Manifest) -> Table:
    """What an engine of a bundle is."""
    rows = max((profile.batch.max for profile in engine.profiles), default=1)
    cache = manifest.bytes.cache_per_row * rows
    activations = max((profile.activation_bytes for profile in engine.profiles), default=0)
    total = engine.weight_bytes + cache + activations
    fitting = [device.name for device in devices_for(total, engine.sms)]
    sms = ", ".join(map(str, engine.sms))
    size = manifest.files[engine.file].size
    lines = {
        "engine": f"{engine.file}, {gib(size)}",
        "built by": f"{_FLAVOURS[engine.flavour]} {engine.version}, for SM {sms}",
        "kernels": ", ".join(f"{count} {kind}" for kind, count in sorted(engine.kernels.items())),
        **{f"profile {profile.name}": _profile(profile) for profile in engine.profiles},
        "weights": gib(engine.weight_bytes),
        "cache": f"{gib(cache)} for {_count(rows, 'row')} of {manifest.graph.max_length:,} tokens",
        "memory": f"{gib(total)} with the larger profile's activations",
        "fits on": ", ".join(fitting) or "no device of the table with such a GPU",
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines.items():
        table.add_row(escape(name), escape(text))
    return table


def _profile(profile: ProfileInfo) -> str:
    return (
        f"{_range(profile.batch, 'row')} of {_range(profile.tokens, 'token')}, "
        f"activations {gib(profile.activation_bytes)}"
    )


def _range(sizes: Range, what: str) -> str:
    fixed = sizes.min == sizes.max
    return _count(sizes.max, what) if fixed else f"{sizes.min} to {_count(sizes.max, what)}"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
