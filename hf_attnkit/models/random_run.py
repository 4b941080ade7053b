"""One forward pass of an attention module alone, with random float32 parameters, for its gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from hf_attnkit.models.attention import Attention, is_linear
from hf_attnkit.models.interface import Call, watched
from hf_attnkit.models.tensors import as_float32, tensors_in


class RandomRun:
    """One forward pass of an attention module alone, with random parameters, and the tensors that show its heads."""

    def __init__(self, attention: Attention, leaves: dict[str, Tensor] | None = None) -> None:
        """
        Args:
            leaves: of another run of the same attention: its parameters, where they are the same in both.
        """
        self.attention, self.module = attention, attention.module
        self.leaves: dict[str, Tensor] = random_leaves(self.module) if leaves is None else leaves
        self.products: dict[str, list[Tensor]] = {}  # by path in the module, what its matrix products give
        self.heads: dict[str, Tensor] = {}  # (heads, batch, positions, size) by role
        self.attended: Tensor | None = None  # the output, before gates; leaf of what the output projection takes
        self.taken: Tensor | None = None  # what the output projection takes
        self.output = attention.output
        self.beside: list[Tensor] = []  # tensors that the attention is given next to query, key and value
        self.turn: Callable[[Tensor], Tensor] | None = None  # applied to the output, (batch, queries, heads, size)

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
            self.beside = [x.detach() for x in tensors_in((call.mask, call.keywords))]
            call.query, call.key, call.value = (x.detach() for x in (call.query, call.key, call.value))
            output, weights = call.run()
            self.heads["output"] = output.permute(2, 0, 1, 3)
            output = output if self.turn is None else self.turn(output)
            self.attended = torch.ones_like(output, requires_grad=True)
            return output * self.attended, weights

        def take(module: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor) and (self.attended is not None or not self.heads):
                found.append((names[id(module)], given[0]))

        def give(module: nn.Module, _: tuple[Any, ...], result: Any) -> Any:
            if not isinstance(result, Tensor) or not result.requires_grad:
                return result
            self.products.setdefault(names[id(module)], []).append(result)
            return result.clone()  # which may be written into (DeBERTa): what was given stays a part of the graph

        with ExitStack() as stack:
            for module in self.module.modules():
                if is_linear(module):
                    stack.callback(module.register_forward_pre_hook(take).remove)
                    stack.callback(module.register_forward_hook(give).remove)
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

    def touched(self, number: Tensor, only: str | None = None) -> dict[str, list[Tensor]]:
        """Which entries, along each of its dimensions, the gradient of a number by each parameter is not zero in.

        Of a matrix product it is the gradient by what the product gives that is looked at: a row of the matrix has a
        gradient where its output has one. That is a few tokens wide where the matrix's gradient is as large as itself.

        Args:
            number: a sum over what the run gave.
            only: name of one parameter; the others are left out.

        Returns:
            By name, for each dimension bool `(size,)`; parameters that the number does not depend on are left out.
        """
        single, outputs = [], []
        for name in self.leaves if only is None else [only]:
            path, _, leaf = name.rpartition(".")
            if path in self.products and leaf in ("weight", "bias"):
                outputs += [(name, output) for output in self.products[path]]
            else:
                single.append(name)
        wanted = list({id(output): output for _, output in outputs}.values())
        inputs = [*(self.leaves[name] for name in single), *wanted]
        gradients = torch.autograd.grad(number, inputs, retain_graph=True, allow_unused=True) if inputs else ()
        found: dict[str, list[Tensor]] = {}
        for name, gradient in zip(single, gradients, strict=False):
            if gradient is not None:
                found[name] = _entries(gradient != 0)
        columns: dict[int, Tensor] = {}
        for output, gradient in zip(wanted, gradients[len(single) :], strict=True):
            if gradient is not None:
                columns[id(output)] = (gradient != 0).flatten(0, -2).any(0)
        for name, output in outputs:
            if id(output) in columns:
                entries = self._of_product(name, columns[id(output)])
                before = found.get(name)
                found[name] = entries if before is None else [a | b for a, b in zip(before, entries, strict=True)]
        return found

    def _of_product(self, name: str, columns: Tensor) -> list[Tensor]:
        """The same of a matrix or its bias, from the columns of its output."""
        leaf = self.leaves[name]
        if leaf.dim() == 1:
            return [columns]
        transposed = not isinstance(self.module.get_submodule(name.rpartition(".")[0]), nn.Linear)
        others = columns.any().expand(leaf.shape[0 if transposed else 1])
        return [others, columns] if transposed else [columns, others]

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


def random_leaves(module: nn.Module) -> dict[str, Tensor]:
    """Random values for the module's parameters, and copies of its buffers, by name, in float32; the same each time."""
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    leaves = {
        name: _random(parameter, generator).to(device).requires_grad_()
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point()
    }
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and "running_" not in name:  # what a batch norm keeps takes no gradient
            leaves[name] = buffer.detach().to(torch.float32, copy=True).requires_grad_()
    return leaves


def _entries(nonzero: Tensor) -> list[Tensor]:
    """Along each dimension, where there is anything."""
    dims = range(nonzero.dim())
    return [nonzero.any(tuple(d for d in dims if d != dim)) if nonzero.dim() > 1 else nonzero for dim in dims]


def _random(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of a size that neither saturates nor vanishes: a matrix keeps its input's size."""
    values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    return values / max(1, parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 1 + 0.1 * values


def _by_head(tensor: Tensor) -> Tensor:
    """`(batch, heads, positions, size)` to `(heads, batch, positions, size)`."""
    return tensor.transpose(0, 1)
