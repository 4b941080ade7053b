"""Which rows of which matrix make the queries, keys and values of any attention, and what lies behind them.

Rows are those that each head owns. What lies between a projection and the product decides whether heads may get
another basis. That is tried: the module runs alone with random parameters, and each head's rows are turned by a random
map of the kind that methods fold into the weights.

    query, key   M W x: a factor for each rotated pair as a complex number, any matrix for what is not rotated
    value        M W x, any matrix
    output       M a, a what a head puts out

What arrives must be turned by the same map. A norm, a clip, another rotation or a gate for each component fails this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_attnkit.models.attention import Attention, by_head, is_linear
from hf_attnkit.models.discovery import quiet
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.ownership import signature
from hf_attnkit.models.random_run import RandomRun, random_leaves
from hf_attnkit.models.rotary_pairs import Rope, rotary_pairs

ROLES = ("query", "key", "value")
# In float32 rounding explains a difference of a few hundred epsilons.
BOUND = 2**10 * torch.finfo(torch.float32).eps
# Random maps are this large, so that activations that are clipped are.
SIZE = 100.0


@dataclass(frozen=True)
class Rows:
    """Where the heads of a role lie.

    Attributes:
        path: of the `nn.Linear` or Conv1D in the attention's module.
        rows: `(heads, size of a head)`, numbers of output features.
    """

    path: str
    rows: Tensor


@dataclass(frozen=True)
class Projected:
    """The projections of an attention.

    Attributes:
        rows: by role ("query", "key", "value").
        problems: by role, why its heads are no plain rows of one matrix.
        rope: how keys are rotated, or `None`.
        between_keys: what is between the projections of queries and keys and their product, that another basis of a
            head would not follow; empty where nothing is.
        between_values: the same of values and the output projection.
        other_inputs: of "query" and "value", those whose projection takes another input than the keys'.
        takes_outputs: whether the output projection takes what the heads put out as it is.
        per_head: parameters next to the projections that have something for each head.
    """

    rows: dict[str, Rows]
    problems: dict[str, str]
    rope: Rope | None = None
    between_keys: str = ""
    between_values: str = ""
    other_inputs: frozenset[str] = frozenset()
    takes_outputs: bool = False
    per_head: tuple[str, ...] = ()


def projected(model: nn.Module, attentions: Sequence[Attention], owned: Sequence[Ownership]) -> list[Projected]:
    """The projections of each attention; looked at once for those that are alike."""
    known: dict[tuple[Any, ...], Projected] = {}
    found = []
    for attention, own in zip(attentions, owned, strict=True):
        key = (*signature(attention), tuple(own.coupled))
        if key not in known:
            known[key] = _look(model, attention, own)
        found.append(known[key])
    return found


def _look(model: nn.Module, attention: Attention, owned: Ownership) -> Projected:
    numbers = {
        "query": list(range(attention.num_heads)),
        "key": [owned.key_heads.index(group) for group in range(owned.num_key_value_heads)],
    }
    numbers["value"] = numbers["key"]
    found = {role: _rows(attention, owned, role, numbers[role]) for role in ROLES}
    rows = {role: one for role, one in found.items() if isinstance(one, Rows)}
    problems = {role: one for role, one in found.items() if isinstance(one, str)}
    in_use = {f"{one.path}.{leaf}" for one in rows.values() for leaf in ("weight", "bias")}
    if owned.output is not None:
        inside = owned.output.removeprefix(f"{attention.path}.")
        in_use |= {f"{inside}.weight", f"{inside}.bias"}
    per_head = tuple(name for name in owned.owned if name not in in_use)
    if not attention.calls_interface:
        return Projected(rows, problems | dict.fromkeys(ROLES, attention.reason), per_head=per_head)
    if attention.calls_per_forward > 1:
        problems = dict.fromkeys(ROLES, f"it attends {attention.calls_per_forward} times in one forward pass")
        return Projected({}, problems, per_head=per_head)
    group = attention.num_heads // owned.num_key_value_heads
    if any(owned.key_head_of(h, attention.num_heads) != h // group for h in range(attention.num_heads)):
        problems["key"] = problems["value"] = "query heads share them in another order than one after the other"
    leaves = random_leaves(attention.module)
    pairs = rotary_pairs(model, attention, owned, leaves)
    rope = None if pairs is None else pairs.rope
    with quiet(model), torch.enable_grad():
        behind = _Behind(attention, owned, rows, rope, leaves)
        keys = behind.between("key", in_use) or behind.between("query", in_use) or behind.next_to()
        if keys and pairs is not None and rope is None:
            keys = f"a rotation in pairs {list(pairs.pairs)[:4]}..., which no method knows,"
        return Projected(
            rows, problems, rope, keys, behind.between("value", in_use) or behind.between_output(),
            behind.other_inputs(), behind.takes_outputs, per_head,
        )  # fmt: skip


class _Behind:
    """What is behind the projections of one attention."""

    def __init__(
        self,
        attention: Attention,
        owned: Ownership,
        rows: Mapping[str, Rows],
        rope: Rope | None,
        leaves: dict[str, Tensor],
    ) -> None:
        self._attention, self._owned, self._rows, self._leaves = attention, owned, rows, leaves
        generator = torch.Generator().manual_seed(3)
        count = owned.num_key_value_heads
        sizes = {"key": attention.head_dim, "query": attention.head_dim, "value": attention.value_head_dim}
        numbers = {"key": count, "query": attention.num_heads, "value": count}
        self._maps = {
            role: _maps(numbers[role], sizes[role], rope if role != "value" else None, generator) for role in ROLES
        }
        self._output_maps = _maps(attention.num_heads, attention.value_head_dim, None, generator)
        self._given: dict[str, Tensor] = {}
        self._plain = self._run(notes=True)
        self._turned = self._run(turn=True)

    def _run(self, *, turn: bool = False, turn_output: bool = False, notes: bool = False) -> RandomRun:
        run, module = RandomRun(self._attention, self._leaves), self._attention.module
        if turn_output:
            run.turn = lambda output: torch.einsum("hef,bqhf->bqhe", self._output_maps.to(output), output)
        with ExitStack() as stack:
            for role, own in self._rows.items():
                target = module.get_submodule(own.path)
                if notes:

                    def note(_: nn.Module, args: tuple[Any, ...], role: str = role) -> None:
                        self._given.setdefault(role, args[0].detach())

                    stack.callback(target.register_forward_pre_hook(note).remove)
                if turn:

                    def change(_: nn.Module, __: Any, out: Tensor, role: str = role, own: Rows = own) -> Tensor:
                        rows = own.rows.flatten().to(out.device)
                        heads = out[..., rows].unflatten(-1, own.rows.shape)
                        turned = torch.einsum("hef,...hf->...he", self._maps[role].to(out), heads)
                        return out.index_copy(-1, rows, turned.flatten(-2))

                    stack.callback(target.register_forward_hook(change).remove)
            run.forward()
        return run

    def between(self, role: str, in_use: set[str]) -> str:
        """What is behind the projection of a role, or nothing."""
        if role not in self._rows:
            return ""
        before, after = self._plain.heads[role], self._turned.heads[role]
        heads = range(len(before)) if role == "query" else self._owned.key_heads
        maps = self._maps[role][list(heads)].to(before)
        if _same(torch.einsum("hef,hbqf->hbqe", maps, before), after):
            return ""
        names = list(self._plain.leaves)
        gradients = torch.autograd.grad(
            before.square().sum(), list(self._plain.leaves.values()), retain_graph=True, allow_unused=True
        )
        behind = [n for n, g in zip(names, gradients, strict=True) if g is not None and n not in in_use]
        return ", ".join(behind) or "something without parameters (a norm, a clip, a rotation that cannot be told)"

    def next_to(self) -> str:
        """What queries or keys make next to their product, such as a term of relative positions; or nothing."""
        before, after = self._plain.beside, self._turned.beside
        same = len(before) == len(after) and all(map(_equal, before, after))
        return "" if same else "a bias of the scores, made of queries or keys,"

    def between_output(self) -> str:
        """What is between the heads' outputs and the output projection, that another basis would not follow."""
        if self._owned.output is None or self._owned.output in self._owned.coupled:
            return "no output projection that takes each head's output by itself"
        if self._plain.taken is None:  # outside of the module, and seen to take the outputs as they are
            return "" if self._attention.output is not None else "an output projection outside of the module"
        size = self._attention.value_head_dim
        before = by_head(self._plain.taken.detach(), size)
        turned = self._run(turn_output=True).taken
        assert turned is not None
        want = torch.einsum("hef,hbqf->hbqe", self._output_maps.to(before), before)
        return "" if _same(want, by_head(turned.detach(), size)) else "a gate or a norm of the heads' outputs"

    @property
    def takes_outputs(self) -> bool:
        """Whether the output projection takes what the heads put out, bit for bit."""
        taken = self._plain.taken
        if taken is None:
            return self._attention.output is not None
        return _equal(by_head(taken.detach(), self._attention.value_head_dim), self._plain.heads["output"])

    def other_inputs(self) -> frozenset[str]:
        """Roles whose projection takes something else than that of the keys."""
        key = self._given.get("key")
        if key is None:
            return frozenset()
        return frozenset(r for r in ("query", "value") if r in self._given and not _equal(self._given[r], key))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and float((a - b).abs().max()) <= BOUND * float(a.abs().max())


def _maps(number: int, size: int, rope: Rope | None, generator: torch.Generator) -> Tensor:
    """Random maps `(number, size, size)` that commute with the rotation."""
    maps = torch.randn(number, size, size, generator=generator) * SIZE / size**0.5
    if rope is None:
        return maps
    maps[:, : rope.size], maps[:, :, : rope.size] = 0, 0
    first, second = (torch.tensor(part) for part in rope.pairs())
    real, imaginary = SIZE * torch.randn(2, number, len(first), generator=generator)
    maps[:, first, first], maps[:, second, second] = real, real
    maps[:, first, second], maps[:, second, first] = -imaginary, imaginary
    return maps


def _rows(attention: Attention, owned: Ownership, role: str, numbers: list[int]) -> Rows | str:
    """The rows of one matrix that make the heads of a role, or why there are none."""
    if len(numbers) == 1:
        return _rows_of_one(attention, owned, role)
    names = [name for name, one in owned.owned.items() if role in one.rows]
    matrices = [name for name in names if name in owned.matrices]
    linear = [name for name in matrices if is_linear(attention.module.get_submodule(name.rpartition(".")[0]))]
    if len(linear) != 1 or not linear[0].endswith(".weight"):
        return "they have no rows of their own in a matrix" if not matrices else f"{', '.join(matrices)} make them"
    path = linear[0].removesuffix(".weight")
    if extra := [name for name in names if name not in (linear[0], f"{path}.bias")]:
        return f"{extra[0]} has something for each of them next to the matrix"
    own = owned.owned[linear[0]]
    if (found := len(own.rows[role])) <= max(numbers):
        return f"{linear[0]} has rows of {found} heads and not of {max(numbers) + 1}"
    rows = [own.of(role, number) for number in numbers]
    size = attention.value_head_dim if role == "value" else attention.head_dim
    if any(len(each) != size for each in rows):
        return f"{linear[0]} has {len(rows[0])} rows for a head of {size} (latent attention)"
    if own.dim != (1 if isinstance(attention.module.get_submodule(path), Conv1D) else 0):
        return f"{linear[0]} takes them and does not make them"
    return Rows(path, torch.stack(rows))


def _rows_of_one(attention: Attention, owned: Ownership, role: str) -> Rows | str:
    """The rows that make the only head of a role. All heads alike reach them, so that they are in nobody's."""
    names = [name for name, one in owned.reached.items() if role in one.rows and name.endswith(".weight")]
    if len(names) != 1:
        return "they have no rows of their own in a matrix" if not names else f"{', '.join(names)} make them"
    rows = owned.reached[names[0]].of(role, 0)
    size = attention.value_head_dim if role == "value" else attention.head_dim
    if len(rows) != size:
        return f"{names[0]} has {len(rows)} rows for a head of {size} (latent attention)"
    return Rows(names[0].removesuffix(".weight"), rows[None])
