"""Run batches through a model to look at what happens inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .change import evaluation_mode
from .families import input_device

LABELS = ("labels", "label")


def run_batches(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, description: str
) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Each batch on the model's device, and a function that runs the model on it: in evaluation mode, no gradients.

    Logits over a vocabulary are computed for the last token only, and no cache is filled: see `spare_options`.

    Raises:
        ValueError: if `batches` is empty, or a batch is no mapping.
    """
    device, seen = input_device(model), 0
    options = spare_options(model)
    for batch in tqdm(batches, desc=description, unit="batch"):
        inputs = to_device(batch, device)
        seen += 1

        def run(inputs: dict[str, Any] = inputs) -> Any:
            with torch.no_grad(), evaluation_mode(model):
                return model(**(inputs | options))

        yield inputs, run
    if not seen:
        raise ValueError(
            "batches is empty; give at least one batch of model inputs (an iterator is spent after one use)"
        )


def spare_options(model: PreTrainedModel) -> dict[str, Any]:
    """Keywords of the model's forward that spare it what nobody looks at: a cache, and logits of all but one token."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in {"logits_to_keep": 1, "use_cache": False}.items() if name in known}


def real_mask(x: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Which activations `(batch, tokens, features)` are of real tokens and not of padding: bool `(batch, tokens)`.

    Raises:
        ValueError: if the batch has an `attention_mask` that does not say which tokens are padding.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return x.new_ones(x.shape[:-1], dtype=torch.bool)
    # A choice among several texts has them along an axis of its own, which the model folds into the batch.
    if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.flatten(0, -2).shape != x.shape[:2]:
        raise ValueError(
            f"attention_mask must be a tensor (batch, tokens), here {tuple(x.shape[:2])}, to tell which tokens are "
            f"padding; got {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
        )
    return mask.flatten(0, -2).to(x.device).bool()


def real_tokens(x: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Activations without padding's, `(real tokens, features)`; see `real_mask`."""
    return x[real_mask(x, inputs)]


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch's tensors on `device`, labels left out: nobody asks for a loss."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch must be a mapping of model inputs such as {{'input_ids': ..., 'attention_mask': ...}}, got "
            f"{type(batch).__name__}"
        )
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in LABELS
    }
