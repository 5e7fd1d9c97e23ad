"""Reads JSON values as frozen dataclasses: the schema is the fields and their types.

Every field has to be there; keys that are no field are ignored, so that a later release of the same format
version may add some.
"""

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class MisshapenError(ValueError):
    """A value that has not the shape of its field; the text says where it stands and what it must be."""


def read_value(value: Any, wanted: Any, place: str = "") -> Any:
    """A parsed JSON value as the type `wanted`.

    Args:
        value: What `json.loads` gave.
        wanted: A dataclass, `Literal` of texts, `X | None`, `int | str`, `tuple[X, ...]`, `Mapping[str, X]`,
            `str`, `bool`, `float`, `Any`, or `int`, which must not be negative.
        place: Where the value stands, for the message; nothing where it is the whole.

    Raises:
        MisshapenError: It is something else.
    """
    origin, arguments = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return value
    if is_dataclass(wanted) and isinstance(wanted, type):
        return _read_dataclass(value, wanted, place)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        raise _misshapen(place, value, "one of " + ", ".join(f'"{choice}"' for choice in arguments))
    if origin in (Union, types.UnionType):
        return _read_union(value, arguments, place)
    if origin is tuple:
        if not isinstance(value, list):
            raise _misshapen(place, value, "a list")
        if arguments[0] is float and all(type(item) in (int, float) for item in value):
            return tuple(value)  # There may be a million: no place is spelled out for what is right.
        return tuple(read_value(item, arguments[0], f"{place}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _misshapen(place, value, "an object")
        return {key: read_value(item, arguments[1], f"{place}[{key!r}]") for key, item in value.items()}
    return _read_plain(value, wanted, place)


def _read_plain(value: Any, wanted: type, place: str) -> Any:
    if wanted is int and (type(value) is not int or value < 0):
        raise _misshapen(place, value, "a whole number that is not negative")
    if wanted is float and type(value) not in (int, float):
        raise _misshapen(place, value, "a number")
    if wanted in (str, bool) and type(value) is not wanted:
        raise _misshapen(place, value, {str: "text", bool: "true or false"}[wanted])
    return value


def _read_union(value: Any, choices: tuple[Any, ...], place: str) -> Any:
    if value is None and type(None) in choices:
        return None
    present = [choice for choice in choices if choice is not type(None)]
    if len(present) == 1:
        return read_value(value, present[0], place)
    for choice in present:
        if type(value) is choice:
            return read_value(value, choice, place)
    raise _misshapen(place, value, "another type")


def _read_dataclass(value: Any, wanted: type, place: str) -> Any:
    if not isinstance(value, dict):
        raise _misshapen(place, value, "an object")
    hints = get_type_hints(wanted)
    read = {}
    for name in (field.name for field in fields(wanted)):
        inner = f"{place}.{name}" if place else name
        if name not in value:
            raise MisshapenError(f"{inner} is missing")
        read[name] = read_value(value[name], hints[name], inner)
    return wanted(**read)


def _misshapen(place: str, value: object, wanted: str) -> MisshapenError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return MisshapenError(f"{place or 'the whole'} is {shown}; it must be {wanted}")
