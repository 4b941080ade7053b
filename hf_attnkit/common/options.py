"""Options of a kind or a score: the fields of one frozen dataclass, which holds their defaults and checks them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def make(what: str, options_class: type[T], options: Mapping[str, Any]) -> T:
    """The dataclass with these options; its `__post_init__` checks their values.

    Args:
        what: has the options, for messages: "attention 'flash'".

    Raises:
        ValueError: for an unknown or missing option, and what the class itself refuses.
    """
    known = dataclasses.fields(options_class)  # type: ignore[arg-type] # any dataclass
    unknown = [str(name) for name in options if name not in {field.name for field in known}]
    if unknown:
        takes = ", ".join(field.name for field in known) or "no options"
        raise ValueError(f"{what} has no option {', '.join(unknown)}; it takes {takes}")
    required = [field.name for field in known if _is_required(field) and field.name not in options]
    if required:
        raise ValueError(f"{what} needs the option {', '.join(required)}, for example {required[0]}=64")
    return options_class(**options)


def changed(options: Any) -> dict[str, Any]:
    """The fields of such a dataclass that are not at their default: `make` builds an equal one from them."""
    values = {field.name: (field, getattr(options, field.name)) for field in dataclasses.fields(options)}
    return {name: value for name, (field, value) in values.items() if _is_required(field) or value != field.default}


def store(options: Any, **values: Any) -> None:
    """Write checked values into the fields of a frozen dataclass, from its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(options, name, value)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING
