"""Gates on heads' outputs, and what the loss says about them: shared by gradient, fisher, taylor and l0.

A gate xi_h = 1 (Michel et al. 2019, arXiv 1905.10650) multiplies what head h passes to the output projection:

    input of the output projection  (B, T, H * D)  ->  (B, T, H, D) * gate (B, 1, H, 1)  ->  (B, T, H * D)

Every example has its own gates, so one backward pass of a batch gives all examples' gradients, whatever attention
runs. Padding is not gated. Only the gates are differentiated: parameters get no gradient and need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.importance.loss import batch_loss, same_config, with_labels
from hf_attnkit.importance.processes import over_processes
from hf_attnkit.models.layers import AttentionLayer, output_of
from hf_attnkit.observing.batches import on_device, real_mask

NO_LABELS = "no example of the batches has a label that counts; labels of -100 are ignored by the loss"


@contextmanager
def gated(
    layers: Sequence[AttentionLayer], inputs: Mapping[str, Any], gate: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Within the context, the heads' outputs at real tokens are multiplied by gates.

    Args:
        gate: called with the place of a layer and its heads' outputs `(B, T, H, D)`, gives their factors,
            broadcastable to `(B, T, H)`.
    """

    def hook(place: int, layer: AttentionLayer) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            heads = args[0].unflatten(-1, (layer.num_heads, layer.value_head_dim))
            real = real_mask(args[0], inputs, layer.padding, layer.of_length)
            factors = torch.where(real[..., None], gate(place, heads), 1.0)
            # Factors are float32 or better, so the gradient's sum over tokens and features is, too.
            return ((heads * factors[..., None]).to(args[0].dtype).flatten(-2), *args[1:])

        return multiply

    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            stack.callback(output_of(layer).register_forward_pre_hook(hook(place, layer)).remove)
        yield


class OpenGates:
    """Gates of 1 for each row of each call, as `gated` asks for them: ALBERT calls one module in all of its layers."""

    def __init__(self, number: int, per_token: bool) -> None:
        self._gates: list[list[Tensor]] = [[] for _ in range(number)]
        self._per_token = per_token

    def __call__(self, place: int, heads: Tensor) -> Tensor:
        # Patches of images are all in one row, which has no axis of its own (Qwen2-VL).
        rows, tokens, number, _ = heads.shape if heads.dim() == 4 else (1, *heads.shape)
        dtype = torch.promote_types(heads.dtype, torch.float32)
        gate = torch.ones(
            rows, tokens if self._per_token else 1, number, dtype=dtype, device=heads.device, requires_grad=True
        )
        self._gates[place].append(gate)
        return gate if heads.dim() == 4 else gate[0]

    def gradients(self, scalar: Tensor, layers: Sequence[AttentionLayer]) -> list[list[Tensor]]:
        """Of each layer's calls, `(rows, T, num_heads)`, T = 1 unless `per_token`.

        Raises:
            ValueError: for a layer that was not called.
        """
        idle = [layer.name for layer, own in zip(layers, self._gates, strict=True) if not own]
        if idle:
            raise ValueError(f"a batch does not reach {', '.join(idle)}; give all inputs that the model takes")
        gates = [gate for own in self._gates for gate in own]
        # A call may do nothing to the result: HRM's early cycles are outside the graph.
        found = iter(torch.autograd.grad(scalar, gates, allow_unused=True, materialize_grads=True))
        return [[next(found) for _ in own] for own in self._gates]


def example_gradients(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    batches: Iterable[Mapping[str, Any]],
    *,
    labels: str,
    per_token: bool = False,
    description: str,
) -> Iterator[list[Tensor]]:
    """For each batch and layer the gradient of every example's own loss by its gates.

    Examples without a term in the loss (all labels ignored) and those that are all padding are left out.

    Args:
        labels: see `loss.with_labels`.
        per_token: gates of their own for every token: dL/dxi_th = a_th . dL/da_th.

    Yields:
        Per layer `(examples, rows, T, num_heads)`, T = 1 unless `per_token`; 0 at padding. An example has several rows
        where the model folds its texts into the batch (multiple choice), otherwise one. A module that is called several
        times (ALBERT) has the gates of all its calls along T.
    """
    for batch in on_device(model, batches, description=description, labels=True):
        gates = OpenGates(len(layers), per_token)
        with torch.enable_grad(), evaluation_mode(model), same_config(model):
            inputs, terms = with_labels(model, batch, labels)
            if not terms.any():
                continue
            with gated(layers, inputs, gates):
                loss = batch_loss(model, inputs)
            gradients = gates.gradients(loss, layers)
        seen = (terms > 0) & _has_tokens(inputs, terms)
        scale = terms.sum() / terms[seen]
        found = []
        for layer, own in zip(layers, gradients, strict=True):
            calls = [_by_example(each, layer, len(terms)) for each in own]
            gradient = calls[0] if len(calls) == 1 else torch.cat([each.flatten(1, 2)[:, None] for each in calls], 2)
            found.append(gradient[seen.to(gradient.device)] * scale.to(gradient)[:, None, None, None])
        yield found


def _by_example(gradient: Tensor, layer: AttentionLayer, number: int) -> Tensor:
    """`(rows, T, num_heads)` to `(number, rows of an example, T, num_heads)`."""
    if len(gradient) % number:
        raise ValueError(
            f"{layer.name} attends to {number} examples in {len(gradient)} rows, so what belongs to which "
            "cannot be told; give batches of one example"
        )
    return gradient.unflatten(0, (number, -1))


def _has_tokens(inputs: Mapping[str, Any], terms: Tensor) -> Tensor:
    """Which examples are not all padding, bool `(examples,)`."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(terms, dtype=torch.bool)
    any_token: Tensor = mask.flatten(1).any(-1)
    return any_token.to(terms.device)


def sum_over_examples(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    batches: Iterable[Mapping[str, Any]],
    of: Callable[[Tensor], Tensor],
    *,
    labels: str,
    per_token: bool = False,
    description: str,
) -> tuple[list[Tensor], float]:
    """Per layer `(num_heads,)`, float64: the sum over all processes' examples; and their number.

    Args:
        of: from the gradients of `example_gradients` to what is summed, `(examples, num_heads)`.

    Raises:
        ValueError: if no example has a label, or a gradient is not finite.
    """
    sums = [torch.zeros(layer.num_heads + 1, dtype=torch.float64) for layer in layers]
    gradients = example_gradients(model, layers, batches, labels=labels, per_token=per_token, description=description)
    for batch in gradients:
        for total, gradient in zip(sums, batch, strict=True):
            total[:-1] += of(gradient.double()).sum(0).cpu()
            total[-1] += len(gradient)
    added = over_processes(layers, sums, "gradients of the loss by the heads' gates")
    if not added[0][-1]:
        raise ValueError(NO_LABELS)
    return [total[:-1] for total in added], float(added[0][-1])
