"""What belongs to a head is what its gradient says.

The module that attends runs alone, on what it was given, with random float32 parameters of the same shapes (weights
that are zero by accident, or 16 bits, would mislead; the real ones are not touched). For each head h the gradient of a
random combination of `query[:, h]` with respect to each parameter is exactly zero except in the rows of that head:

    query head 0   q_proj.weight  x x . . . . . .      "x": some gradient in this row
    query head 1                  . . x x . . . .
    ...
    all alike      k_norm.weight  x x                  shared: it stays
    overlapping    q_norm.weight  and q_proj.weight    coupled: it cannot be cut, and is named

The same for key/value heads with `key` and `value`. Parameters that only the output sees (sinks, gates, biases of the
scores) show by the gradient of what the output projection takes, with query, key and value held fixed.

A module that never calls the interface shows all of it by what its output projection takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from hf_attnkit.models.attention import Attention, by_head, given_by_head, is_linear
from hf_attnkit.models.discovery import quiet
from hf_attnkit.models.interface import Call, watched
from hf_attnkit.models.owners import Owners, owners_of
from hf_attnkit.models.tensors import as_float32, tensors_in

ROLES = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Ownership:
    """What belongs to the heads of an attention, by the parameters' names in its module.

    Attributes:
        owned: rows (along one dimension) by head; other rows of these parameters stay.
        shared: parameters that all heads touch alike.
        coupled: parameters that cannot be cut, and why; nothing can be cut where there is one.
        key_heads: for each key/value head, as keys arrive, the number of the key/value head whose parameters make it:
            a module may repeat its keys before it attends. `(0, 1, 2, ...)` where it does not.
        output: path of the output projection in the model, or `None`, which `coupled` then explains.
        matrices: the owned parameters that have more than one dimension.
    """

    owned: dict[str, Owners]
    shared: tuple[str, ...]
    coupled: dict[str, str]
    key_heads: tuple[int, ...]
    output: str | None
    matrices: frozenset[str] = frozenset()

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads that have parameters of their own."""
        return max(self.key_heads) + 1

    def key_head_of(self, head: int, num_heads: int) -> int:
        """The key/value head, by its parameters, of a query head."""
        return self.key_heads[head * len(self.key_heads) // num_heads]

    def rows_per_head(self, role: str) -> int:
        """How many rows of matrices each head of a role owns."""
        return sum(
            int(one.rows[role][0].sum())
            for name, one in self.owned.items()
            if role in one.rows and name in self.matrices
        )

    @property
    def problem(self) -> str:
        """Why heads cannot be cut, or nothing."""
        return "; ".join(f"{name}: {why}" for name, why in self.coupled.items())


def signature(attention: Attention) -> tuple[Any, ...]:
    """What attentions have in common whose heads own the same: class, shapes and numbers."""
    shapes = tuple((name, tuple(p.shape)) for name, p in attention.module.named_parameters())
    numbers = (attention.num_heads, attention.num_key_value_heads, attention.head_dim, attention.value_head_dim)
    inside = attention.output is not None and attention.output.startswith(f"{attention.path}.")
    output = attention.output.removeprefix(attention.path) if inside and attention.output else None
    flags = (attention.is_cross, attention.position_bias, attention.keywords, attention.calls_interface)
    return type(attention.module), shapes, numbers, output, flags, tuple(sorted(attention.inputs[1]))


def ownerships(model: nn.Module, attentions: Sequence[Attention]) -> list[Ownership]:
    """What belongs to the heads of each attention; looked at once for those that are alike.

    Raises:
        ValueError: for a module that does not run alone on what it was given.
    """
    known: dict[tuple[Any, ...], Ownership] = {}
    found = []
    for attention in attentions:
        key = signature(attention)
        if key not in known:
            known[key] = ownership(model, attention)
        one = known[key]
        if one.output is not None and attention.output != one.output:
            path = attention.output
            if path is None:  # found inside the module, at the same place in each
                path = attention.path + one.output.removeprefix(_path_of(known, one, attentions))
            one = replace(one, output=path)
        found.append(one)
    return [_with_bias(attention, one, attentions, found) for attention, one in zip(attentions, found, strict=True)]


def _with_bias(
    attention: Attention, one: Ownership, attentions: Sequence[Attention], found: Sequence[Ownership]
) -> Ownership:
    """The same, coupled where a bias of the scores, head by head, is one for several attentions (T5)."""
    if not attention.calls_interface and (given := given_by_head(attention)):
        return replace(one, coupled=one.coupled | {", ".join(given): "others give it something for each head"})
    if not attention.position_bias:
        return one
    takers = [each for each in attentions if each.position_bias and given_by_head(each)]
    if not takers:
        return one
    made = [
        f"{each.path}.{name}"
        for each, other in zip(attentions, found, strict=True)
        for name, owners in other.owned.items()
        if each.position_bias and set(owners.rows) == {"output"}
    ]
    own = [name for name in made if name.startswith(f"{attention.path}.")]
    name = (own or made or ["the bias of its scores"])[0]
    why = f"a bias of the scores, head by head, is one for several attentions ({len(takers)} take it from elsewhere)"
    return replace(one, coupled=one.coupled | {name: why})


def _path_of(known: dict[tuple[Any, ...], Ownership], one: Ownership, attentions: Sequence[Attention]) -> str:
    return next(each.path for each in attentions if known.get(signature(each)) is one)


def ownership(model: nn.Module, attention: Attention) -> Ownership:
    """What belongs to the heads of one attention; see the top of this file."""
    run = Run(attention)
    with quiet(model), torch.enable_grad():
        run.forward()
        return _read(run)


class Run:
    """One forward pass of an attention module alone, with random parameters, and the tensors that show its heads."""

    def __init__(self, attention: Attention) -> None:
        self.attention, self.module = attention, attention.module
        generator = torch.Generator().manual_seed(0)
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        self.leaves: dict[str, Tensor] = {
            name: _random(parameter, generator).to(device).requires_grad_()
            for name, parameter in self.module.named_parameters()
            if parameter.is_floating_point()
        }
        for name, buffer in self.module.named_buffers():
            if buffer.is_floating_point() and "running_" not in name:  # what a batch norm keeps takes no gradient
                self.leaves[name] = buffer.detach().to(torch.float32, copy=True).requires_grad_()
        self.heads: dict[str, Tensor] = {}  # (heads, batch, positions, size) by role
        self.attended: Tensor | None = None  # the output, before gates; leaf of what the output projection takes
        self.taken: Tensor | None = None  # what the output projection takes
        self.output = attention.output

    def forward(self) -> None:
        """Run it.

        Raises:
            ValueError: if it does not run alone.
        """
        args, kwargs = as_float32(self.attention.inputs)
        names = {id(module): name for name, module in self.attention.module.named_modules()}
        found: list[tuple[str, Tensor]] = []

        def watch(call: Call) -> tuple[Tensor, Any]:
            if call.query.dim() != 4:
                raise ValueError(f"its queries have {call.query.dim()} dimensions and not 4")
            self.heads = {"query": _by_head(call.query), "key": _by_head(call.key), "value": _by_head(call.value)}
            call.query, call.key, call.value = (x.detach() for x in (call.query, call.key, call.value))
            output, weights = call.run()
            self.heads["output"] = output.permute(2, 0, 1, 3)
            self.attended = torch.ones_like(output, requires_grad=True)
            return output * self.attended, weights

        def take(module: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor) and (self.attended is not None or not self.heads):
                found.append((names[id(module)], given[0]))

        with ExitStack() as stack:
            for module in self.module.modules():
                if is_linear(module):
                    stack.callback(module.register_forward_pre_hook(take).remove)
            stack.enter_context(watched([self.module], watch))
            if not self.attention.calls_interface:
                stack.enter_context(_SoftmaxOfItsOwn())
            try:
                result = functional_call(self.module, self.leaves, args, kwargs)
            except Exception as error:
                raise ValueError(
                    f"{self.attention.path} ({type(self.module).__name__}) does not run alone on what the model gave "
                    f"it: {type(error).__name__}: {str(error)[:200]}"
                ) from error
        self._choose_output(found, result)

    def _choose_output(self, found: list[tuple[str, Tensor]], result: Any) -> None:
        """What the output projection takes: its input in the module, or the module's output where it lies outside."""
        path, width = self.attention.path, self.attention.num_heads * self.attention.value_head_dim
        if self.output is not None:
            inside = self.output.removeprefix(f"{path}.") if self.output.startswith(f"{path}.") else None
            self.taken = next((taken for name, taken in found if name == inside), None)
            if self.taken is None and not self.attention.calls_interface:
                self.taken = next(iter(tensors_in(result)), None)
            return
        for name, taken in found:  # a gate or a norm lies between: the first that depends on the output
            if taken.shape[-1] == width and taken.requires_grad and self._depends(taken):
                self.output, self.taken = f"{path}.{name}", taken
                return

    def _depends(self, taken: Tensor) -> bool:
        if self.attended is None:
            return False
        (gradient,) = torch.autograd.grad(taken.sum(), [self.attended], retain_graph=True, allow_unused=True)
        return gradient is not None


class _SoftmaxOfItsOwn(TorchFunctionMode):
    """Softmax that is not blind to what all scores of a row have in common, as a key projection's bias is.

    The gradient of such a bias through a softmax is zero but for rounding, which would tell nothing.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") == "softmax":
            scores = args[0] if args else (kwargs or {})["input"]
            return result * (1 + scores.tanh())
        return result


def _random(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of a size that neither saturates nor vanishes: a matrix keeps its input's size."""
    values = torch.randn(parameter.shape, generator=generator)
    return values / max(1, parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 1 + 0.1 * values


def _by_head(tensor: Tensor) -> Tensor:
    """`(batch, heads, positions, size)` to `(heads, batch, positions, size)`."""
    return tensor.transpose(0, 1)


def _touched(heads: Tensor, leaves: dict[str, Tensor], seen: Callable[[str, int, Tensor], None]) -> None:
    """Tell `seen` the gradient of each head's random combination by each leaf, where there is one."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(heads.shape[1:], generator=generator).to(heads.device)
    if not heads.requires_grad:
        return
    for head in range(len(heads)):
        gradients = torch.autograd.grad(
            (heads[head] * weights).sum(), list(leaves.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                seen(name, head, gradient)


def _read(run: Run) -> Ownership:
    attention, coupled = run.attention, {}
    roles = dict(run.heads)
    if run.taken is None or run.output is None:
        if attention.output is None:
            coupled["output projection"] = (
                "no matrix product takes the attention's output, nor one that depends on it head by head"
            )
    else:
        slices = _slices(run.taken, attention)
        if slices is None or not _is_head_by_head(run, slices):
            coupled[run.output] = (
                "it takes a mixture of the heads: something between the attention and it (a norm over all heads, "
                "another order) makes each of its inputs depend on several"
            )
        else:
            roles["output"] = slices
    touched: dict[str, dict[str, list[list[Tensor]]]] = {}
    for role, heads in roles.items():
        rows = functools.partial(_note, touched, role, len(heads))
        _touched(heads, run.leaves, rows)
    buffers = {name for name, _ in run.module.named_buffers()}
    owned: dict[str, Owners] = {}
    shared: list[str] = []
    by_role: dict[str, dict[str, Owners | str | None]] = {role: {} for role in roles}
    for name, roles_of in touched.items():
        parts: dict[str, Owners] = {}
        for role, by_dim in roles_of.items():
            one = owners_of(role, by_dim)
            by_role[role][name] = one
            if isinstance(one, str):
                coupled[name] = one
            elif one is not None:
                parts[role] = one
        if name in coupled:
            continue
        if not parts:
            if name not in buffers:
                shared.append(name)
            continue
        try:
            owned[name] = functools.reduce(Owners.joined, parts.values())
        except ValueError as error:
            coupled[name] = str(error)
    coupled |= _mixed(run, roles, by_role, owned)
    key_heads = _key_heads(roles, by_role, attention, coupled)
    matrices = frozenset(name for name in owned if run.leaves[name].dim() > 1)
    return Ownership(owned, tuple(shared), coupled, key_heads, run.output, matrices)


def _note(
    touched: dict[str, dict[str, list[list[Tensor]]]], role: str, count: int, name: str, head: int, gradient: Tensor
) -> None:
    """Keep, of a gradient, which rows along each dimension it touches."""
    nonzero = gradient != 0
    dims = range(nonzero.dim())
    rows = [nonzero.any(tuple(d for d in dims if d != dim)) if nonzero.dim() > 1 else nonzero for dim in dims]
    table = touched.setdefault(name, {}).setdefault(role, [[torch.zeros_like(r) for r in rows] for _ in range(count)])
    table[head] = rows


def _slices(taken: Tensor, attention: Attention) -> Tensor | None:
    """What the output projection takes, by head: `(heads, batch, positions, size)`."""
    if taken.shape[-1] != attention.num_heads * attention.value_head_dim:
        return None
    return by_head(taken, attention.value_head_dim)


def _is_head_by_head(run: Run, slices: Tensor) -> bool:
    """Whether slice h of what the output projection takes depends on the output of head h and no other."""
    if run.attended is None:
        return True  # a module that never calls the interface: its parameters tell
    for head in range(len(slices)):
        if not slices.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(slices[head].sum(), [run.attended], retain_graph=True, allow_unused=True)
        if gradient is None:
            return False
        heads = (gradient != 0).any(-1).flatten(0, 1).any(0)
        if not heads[head] or heads.sum() != 1:
            return False
    return True


def _mixed(
    run: Run,
    roles: dict[str, Tensor],
    by_role: dict[str, dict[str, Owners | str | None]],
    owned: dict[str, Owners],
) -> dict[str, str]:
    """Matrices of which each head takes everything, though heads of that role have parameters of their own.

    Keys that all heads share (multi-query) are made by a matrix without owners too, but then nothing else has any.
    """
    found: dict[str, str] = {}
    for role, heads in roles.items():
        if len(heads) < 2:
            continue
        parts = by_role[role]
        matrices = [n for n, one in parts.items() if isinstance(one, Owners) and run.leaves[n].dim() > 1]
        vectors = [n for n, one in parts.items() if isinstance(one, Owners) and run.leaves[n].dim() == 1]
        whole = [n for n, one in parts.items() if one is None and run.leaves[n].dim() > 1]
        if not matrices and whole and (vectors or role == "query"):
            why = f"every {role} head depends on all of it"
            if vectors:
                why += f", through a norm over all heads together or the like ({', '.join(vectors)})"
            found[whole[-1]] = why
    return found


def _key_heads(
    roles: dict[str, Tensor],
    by_role: dict[str, dict[str, Owners | str | None]],
    attention: Attention,
    coupled: dict[str, str],
) -> tuple[int, ...]:
    """For each key head, as it arrives, the head whose parameters make it; see `Ownership`."""
    if not attention.calls_interface:
        # What is shared within groups: the coarsest partition that owned rows have.
        groups = [one.partition() for one in by_role["output"].values() if isinstance(one, Owners)]
        coarse = [group for group in groups if group is not None]
        return min(coarse, key=max, default=tuple(range(attention.num_heads)))
    number = len(roles["key"])
    partitions = set()
    for role in ("key", "value"):
        parts = [one for one in by_role[role].values() if isinstance(one, Owners)]
        if parts:
            fine = [group for group in (one.partition() for one in parts) if group is not None]
            partitions.add(max(fine, key=max, default=tuple(range(number))))
        else:
            partitions.add((0,) * number)
    if len(partitions) > 1:
        coupled.setdefault("keys and values", f"they are shared among heads differently: {sorted(partitions)}")
    return max(partitions, key=max)
