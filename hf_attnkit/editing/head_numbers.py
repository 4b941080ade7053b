"""The attributes of an attention module that hold numbers of heads: found by value, proven by running.

Which attributes the module reads while it runs is recorded. Those whose value is one of the quantities that change
(heads, key/value heads, rows of a cut parameter ...) are candidates for the new value; the most likely choice is tried
first, by the attribute's name, and then the others, until the module gives what its remaining heads gave before.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hf_attnkit.editing.undo import Undo
from hf_attnkit.models.attention import is_linear

TRIES = 256

Place = tuple[Any, str]
Parts = tuple[Sequence[int], Sequence[int]]


@contextmanager
def recorded_reads(owners: Iterable[Any]) -> Iterator[dict[tuple[int, str], Place]]:
    """The attributes of these objects that are integers, or lists of them, and read meanwhile: `(owner, name)`."""
    reads: dict[tuple[int, str], Place] = {}
    classes = [(owner, type(owner)) for owner in {id(owner): owner for owner in owners}.values()]

    def recording(kind: type) -> type:
        def read(self: Any, name: str) -> Any:
            value = kind.__getattribute__(self, name)  # type: ignore[call-arg]
            if type(value) is int or (type(value) is list and all(type(each) is int for each in value)):
                reads[id(self), name] = self, name
            return value

        return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})

    try:
        for owner, kind in classes:
            object.__setattr__(owner, "__class__", recording(kind))
        yield reads
    finally:
        for owner, kind in classes:
            object.__setattr__(owner, "__class__", kind)


def readable(module: nn.Module) -> list[Any]:
    """What an attention module may read numbers from: itself, the modules in it and their configs."""
    modules = [each for each in module.modules() if not is_linear(each)]
    configs = [each.config for each in modules if isinstance(getattr(each, "config", None), PreTrainedConfig)]
    return [*modules, *configs]


def quantities(
    before: tuple[int, int], after: tuple[int, int], sizes: tuple[int, int], rows: Iterable[tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """Numbers that may change, as (before, after), by what they are.

    Args:
        before, after: numbers of query and of key/value heads.
        sizes: of a head of queries and of values.
        rows: sizes of cut parameters, before and after.
    """
    (heads, groups), (heads_after, groups_after) = before, after
    found = {
        "heads": (heads, heads_after),
        "key/value heads": (groups, groups_after),
        "heads per group": (heads // groups, heads_after // groups_after),
    }
    for size in sizes:
        found[f"heads of {size}"] = heads * size, heads_after * size
        found[f"key/value heads of {size}"] = groups * size, groups_after * size
    return found | {f"rows {old}": (old, new) for old, new in rows}


def candidates(
    places: Iterable[Place], numbers: Mapping[str, tuple[int, int]], parts: Parts = ((), ())
) -> list[tuple[Place, list[Any]]]:
    """For each attribute whose value is one of the quantities: the values it may take, likeliest first.

    Args:
        parts: sizes of the query, key and value in one matrix, before and after. The size by which a module splits
            what the matrix puts out (GPT-2) becomes the list of them, which `torch.split` takes as well.
    """
    found: list[tuple[Place, list[Any]]] = []
    before, after = list(parts[0]), list(parts[1])
    for owner, name in places:
        value = getattr(owner, name)
        if isinstance(value, list):
            if value == before != after:
                found.append(((owner, name), [after]))
            continue
        if "split" in name and isinstance(owner, nn.Module) and set(before) == {value} and len(set(after)) > 1:
            found.append(((owner, name), [after]))
            continue
        meant = [what for what, (old, _) in numbers.items() if old == value]
        if not any(numbers[what][1] != value for what in meant):
            continue
        likely = sorted(meant, key=lambda what: _unlikely(name, what))
        values = [numbers[what][1] for what in likely]
        # One whose name says something else keeps its value if it can: few tokens need not show what it changes.
        stays = _is_other(name) or all(_unlikely(name, what) for what in meant)
        values.insert(0 if stays else len(values), value)
        found.append(((owner, name), list(dict.fromkeys(values))))
    return found


def _unlikely(name: str, what: str) -> int:
    """How unlikely an attribute of this name holds this quantity, 0 or 1."""
    is_group, is_size = "group" in name, bool(re.search(r"dim|size|width|embed|inner|hidden|rank", name))
    is_key_value = bool(re.search(r"kv|key|value", name)) and not is_group
    return int(
        (what == "heads per group") != is_group
        or what.startswith("key/value") != is_key_value
        or (" of " in what or what.startswith("rows")) != is_size
    )


def _is_other(name: str) -> bool:
    """Whether an attribute of this name rather says something else than how many heads there are."""
    return bool(
        re.search(r"head_(dim|size)|layer|index|idx|hidden_size|d_model|rope|rotary|window|vocab|position", name)
    )


def settle(found: list[tuple[Place, list[Any]]], undo: Undo, works: Callable[[], str]) -> list[tuple[Place, Any]]:
    """Set the attributes so that the module works, trying the likeliest values first.

    Args:
        works: says what is wrong, or nothing.

    Returns:
        What was set.

    Raises:
        ValueError: if nothing works; what was set is undone.
    """
    options = [[(rank, value) for rank, value in enumerate(values)] for _, values in found]
    tries = itertools.islice(_by_rank(options), TRIES)
    first = ""
    for choice in tries:
        start = len(undo)
        chosen = [(place, value) for (place, _), (_, value) in zip(found, choice, strict=True)]
        changed = [(place, value) for place, value in chosen if getattr(*place) != value]
        for (owner, name), value in changed:
            undo.set(owner, name, value)
        problem = works()
        if not problem:
            return changed
        first = first or problem
        undo.back_to(start)
    names = ", ".join(f"{type(owner).__name__}.{name}={getattr(owner, name)}" for (owner, name), _ in found)
    raise ValueError(f"{first}; tried other values for {names or 'no attribute: none holds a number of heads'}")


def _by_rank(options: list[list[tuple[int, Any]]]) -> Iterator[tuple[tuple[int, Any], ...]]:
    """All choices, those with the fewest departures from the likeliest first."""
    for changed in range(len(options) + 1):
        for where in itertools.combinations(range(len(options)), changed):
            others = [options[i][1:] if i in where else options[i][:1] for i in range(len(options))]
            yield from itertools.product(*others)


def unread(module: nn.Module, read: Iterable[Place], numbers: Mapping[str, tuple[int, int]]) -> list[tuple[str, int]]:
    """Attributes that nothing read, but whose name and value say a number of heads, with the new value."""
    seen = {name for owner, name in read if owner is module}
    found = []
    for name, value in vars(module).items():
        if name in seen or type(value) is not int or name.startswith("_"):
            continue
        if not re.search(r"heads?$|nheads|groups$|all_head_size", name):
            continue
        fits = [what for what, (old, _) in numbers.items() if old == value and not _unlikely(name, what)]
        if fits and numbers[fits[0]][1] != value:
            found.append((name, numbers[fits[0]][1]))
    return found
