"""What TensorRT's parser made of a graph, before it is compiled."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CacheUpdate:
    """A write into the cache.

    Attributes:
        name: The operator's.
        reads_input: The cache is the network's own input.
        makes_output: The result is the network's own output, so that it can have the input's memory.
    """

    name: str
    reads_input: bool
    makes_output: bool


@dataclass(frozen=True)
class NetworkFacts:
    """A parsed network.

    Attributes:
        attention: The causal form of every attention, by the operator's name.
        updates: Every write into the cache.
        unread: Inputs that the parser takes no notice of, by name.
    """

    attention: dict[str, str]
    updates: tuple[CacheUpdate, ...]
    unread: tuple[str, ...]


def read_network(trt: Any, network: Any) -> NetworkFacts:
    """Reads a network that was just parsed."""
    attention: dict[str, str] = {}
    updates: list[CacheUpdate] = []
    read: set[str] = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        operands = (layer.get_input(number) for number in range(layer.num_inputs))
        read |= {operand.name for operand in operands if operand is not None}
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # The binding's way to a layer's own attributes.
            found = layer.attention
            kind = getattr(found, "causal_kind", None)  # Before 10.16 there is only whether, and not how.
            if kind is None:
                kind = "UPPER_LEFT" if found.causal else "NONE"
            attention[layer.name.removesuffix("_AttentionInput")] = str(kind).rpartition(".")[2]
        elif layer.type == trt.LayerType.KV_CACHE_UPDATE:
            source, result = layer.get_input(0), layer.get_output(0)
            updates.append(CacheUpdate(layer.name, source.is_network_input, result.is_network_output))
    inputs = (network.get_input(index).name for index in range(network.num_inputs))
    return NetworkFacts(attention, tuple(updates), tuple(name for name in inputs if name not in read))
