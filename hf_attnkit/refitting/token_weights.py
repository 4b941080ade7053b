"""How much each token counts in a fit.

**Relative.** The residual stream of a decoder's first tokens is hundreds of times as large as that of most others, and
after a change that of further tokens can be too. Where all tokens count alike, the squared errors of these few decide
what is fitted, and how firmly (see docs/conversion.md). The next layer reads the stream through a norm: to it an error
is a share of the token's own stream. With s_t the stream after the attention, a prime for the untouched model, and |.|
the root mean square of the features,

    w_t = 2 / max(|s_t|^2 + |s'_t|^2, 2 f),    f = FLOOR * the median of |s'|^2

With both, a token that is large in one of the models alone does not count more than any other. The floor f is for
tokens whose stream is next to nothing, as of padding that no mask tells: a norm has an eps for these.

**Gradient.** By what the attention's output does to the outputs of the model. With z these outputs (logits, or last
hidden states), r random signs and y_t what a layer's attention puts out for token t,

    w_t = g_t / mean g,    g_t = | d (r . z) / d y_t |^2,    E g_t = | dz / dy_t |_F^2

In a classifier's last layer only the first token's output is read: a fit in which all count alike spends itself on
outputs that nobody sees. No labels: z is what is to be kept, whatever it is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.common.state import evaluation_mode, frozen
from hf_attnkit.models.discovery import require_gradients
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.observing.outputs import mixed, run_whole

TOKEN_WEIGHTS = ("relative", "gradient", "uniform")
FLOOR = 0.01


class NoGradientError(RuntimeError):
    """Nothing tells what a token's attention does to the model's outputs."""


def floor_of(streams: Sequence[Tensor], real: Sequence[Tensor]) -> float:
    """f, of the untouched model's residual stream after the attention `(..., M)` in each batch; 0: it is empty.

    Args:
        real: bool `(...)` for each batch, False for padding.
    """
    squares = [_mean_square(stream)[mask] for stream, mask in zip(streams, real, strict=True)]
    found = torch.cat(squares)
    return FLOOR * float(found.median()) if len(found) else 0.0


def relative_weights(stream: Tensor, before: Tensor, floor: float) -> Tensor:
    """w_t, float32 `(...)`.

    Args:
        stream, before: the residual stream `(..., M)` after the attention, now and in the untouched model.
        floor: f, above 0.
    """
    return 2 / (_mean_square(stream) + _mean_square(before)).clamp(min=2 * floor)


def _mean_square(x: Tensor) -> Tensor:
    return x.float().square().mean(-1)


def gradient_norms(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Sequence[Mapping[str, Any]]
) -> dict[int, list[Tensor]]:
    """g_t of each layer for each batch, shaped as the output of its projection without features, float32.

    A forward and a backward pass for each batch, without gradients of parameters; of a layer's gradient only g_t is
    kept. Calls of one module in one forward pass are one after the other along the first axis.

    Raises:
        ValueError: for a model that was made in inference mode.
        NoGradientError: if the model's forward pass has no gradient, as with tensors that are changed in place.
    """
    require_gradients(model)
    generator = torch.Generator().manual_seed(0)
    norms: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}
    for batch in batches:
        found: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(frozen(model))
            stack.enter_context(torch.enable_grad())
            for layer in layers:
                stack.callback(_watch(layer.output, found[layer.index]).remove)
            outputs = run_whole(model, batch)
            total = mixed(outputs, batch, generator)
            try:
                total.backward()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise NoGradientError(f"{type(model).__name__} has no gradient: {error}") from error
        for layer in layers:
            norms[layer.index].append(torch.cat(found[layer.index]))
    return norms


def weights_of(norms: Sequence[Tensor], real: Sequence[Tensor]) -> list[Tensor]:
    """w_t of one layer for each batch: mean 1 over real tokens, 0 for padding.

    Args:
        norms: g_t, for each batch.
        real: bool of the same shapes, False for padding.
    """
    total = sum(float(norm[mask].sum(dtype=torch.float64)) for norm, mask in zip(norms, real, strict=True))
    mean = total / max(sum(int(mask.sum()) for mask in real), 1)
    if not 0 < mean < float("inf"):  # nothing of this layer is seen, or it is beyond float32: no token is told apart
        return [mask.float() for mask in real]
    return [norm / mean * mask for norm, mask in zip(norms, real, strict=True)]


def _watch(linear: nn.Module, found: list[Tensor]) -> Any:
    """Append g_t for each call of the module, once it is known; 0 where nothing that is put out depends on it."""

    def look(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        norm = output.new_zeros(output.shape[:-1], dtype=torch.float32)
        found.append(norm)
        # Parameters get no gradient, so something else in the graph must ask for one.
        output = output + output.new_zeros((), requires_grad=True)

        def note(gradient: Tensor) -> None:
            norm.copy_(gradient.float().square().sum(-1))

        output.register_hook(note)
        return output

    return linear.register_forward_hook(look)
