"""The model that ships, as a canonical graph and as a torch module whose products can be rounded."""

from functools import cache

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from support.graphs import cloned
from torch import nn

from gemma_export.exporter.decoder import Decoder, rotary_tables
from gemma_export.exporter.source import Source, open_source
from gemma_export.exporter.trace import bind_weights, trace
from gemma_export.graphs import schedule
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.quantization import (
    LinearQuantization,
    Quantization,
    round_per_block,
    round_per_token,
    round_trip,
)

Array = npt.NDArray[np.float32]

SLOTS = 32
TABLE = LinearQuantization("w8", WeightFormat(8, 256))
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@cache
def tiny_source() -> Source:
    return open_source(size="tiny")


@cache
def _traced() -> ir.Model:
    return trace(tiny_source().config, SLOTS, all_logits=True)


def tiny_canonical() -> ir.Model:
    """The canonical graph with the logits of all tokens."""
    source = tiny_source()
    model = cloned(_traced())
    bind_weights(model, source.config, source.weights)
    schedule.canonicalize(model)
    return model


def every_layer(
    how: LinearQuantization,
    table: LinearQuantization | None = None,
    *,
    layers: int | None = None,
    **others: LinearQuantization,
) -> Quantization:
    """One way for all layers, but for the `others`, by the last part of a layer's name.

    The table's is the layers' where it can be.
    """
    linears = {"embed_tokens": table or (how if how.form == "w8" else TABLE)}
    for i in range(tiny_source().config.num_layers if layers is None else layers):
        linears |= {f"layers.{i}.{name}": others.get(name.rsplit(".", 1)[1], how) for name in LINEARS}
    return Quantization({}, linears)


def tiny_feeds(tokens: int = 24, seed: int = 0) -> dict[str, npt.NDArray[np.generic]]:
    """A prompt over an empty cache."""
    config = tiny_source().config
    rng = np.random.default_rng(seed)
    cache_shape = (1, config.num_kv_heads, SLOTS, config.head_dim)
    parts = [f"{i}.{part}" for i in range(config.num_layers) for part in ("key", "value")]
    return {
        "input_ids": rng.integers(3, config.vocab_size, (1, tokens)),
        "position_ids": np.arange(tokens, dtype=np.int64)[None],
        **{f"past_key_values.{part}": np.zeros(cache_shape, np.float32) for part in parts},
    }


def rounded_decoder(quantization: Quantization) -> Decoder:
    """The eager decoder whose products are those that the forms compute, in fp32.

    Integers are not used: numbers that were rounded to codes are multiplied.
    """
    source = tiny_source()
    decoder = Decoder(source.config, SLOTS, all_logits=True).eval()
    for name, parameter in decoder.named_parameters():
        weight = source.weights[name]
        parameter.data = weight.read(0, weight.shape[0]).float()
    decoder.rotary_cos, decoder.rotary_sin = rotary_tables(source.config, SLOTS)
    merged = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    merged |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            prefix, last = name.rsplit(".", 1)
            how = quantization.linears[f"{prefix}.{merged.get(last, last)}"]
            _round_product(module, how)
    table = quantization.linears["embed_tokens"]
    if table.format is None:
        decoder.embed_tokens.weight.data = decoder.embed_tokens.weight.data.half().float()
    else:
        decoder.embed_tokens.weight.data = round_trip(
            decoder.embed_tokens.weight.data, table.format, table.rounding
        )
        decoder.norm.register_forward_hook(lambda module, args, output: rounded_input(output, table))
    return decoder


def _round_product(linear: nn.Linear, how: LinearQuantization) -> None:
    if how.format is None:
        linear.weight.data = linear.weight.half().float()
        return
    linear.weight.data = round_trip(linear.weight.data, how.format, how.rounding)
    linear.register_forward_pre_hook(lambda module, args: (rounded_input(args[0], how),))


def rounded_input(x: torch.Tensor, how: LinearQuantization) -> torch.Tensor:
    """Activations [.., K] as a form on a CPU multiplies them."""
    assert how.format is not None
    return round_per_token(x) if how.form == "w8a8-token" else round_per_block(x, how.format)


def decoder_logits(decoder: Decoder, feeds: dict[str, npt.NDArray[np.generic]]) -> Array:
    """Logits [1, T, V]."""
    names = [name for name in feeds if name.startswith("past")]
    with torch.no_grad():
        logits, _ = decoder(
            torch.from_numpy(feeds["input_ids"]),
            torch.from_numpy(feeds["position_ids"]),
            [torch.from_numpy(feeds[name].copy()) for name in names],
        )
    array: Array = logits.numpy()
    return array


def relative_error(found: Array, expected: Array) -> float:
    """Largest absolute difference / largest absolute value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
