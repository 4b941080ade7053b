"""Run batches through a model to look at what happens inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.attention.packing import starts
from hf_attnkit.common.progress import progress_bar
from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.models.attention_layer import OfLength
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.models.sample_inputs import input_device
from hf_attnkit.models.token_ids import require_known_tokens

# What a batch may carry for a loss.
LABELS = ("labels", "label", "start_positions", "end_positions")
IGNORED = -100  # the label that Transformers' losses leave out


def run_batches(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, description: str
) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Each batch on the model's device, and a function that runs the model on it: in evaluation mode, no gradients.

    Logits over a vocabulary are computed for the last token only, and no cache is filled: see `spare_options`.

    Raises:
        ValueError: as `on_device`.
    """
    options = spare_options(model)
    for inputs in on_device(model, batches, description=description):

        def run(inputs: dict[str, Any] = inputs) -> Any:
            with torch.no_grad(), evaluation_mode(model):
                return model(**(inputs | options))

        yield inputs, run


def on_device(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, description: str, labels: bool = False
) -> Iterator[dict[str, Any]]:
    """Each batch on the model's device; see `to_device`.

    Raises:
        ValueError: if `batches` is empty, or a batch is no mapping or all padding.
    """
    seen = 0
    for batch in progress_bar(batches, description=description, unit="batch"):
        yield to_device(batch, model, labels=labels)
        seen += 1
    if not seen:
        raise ValueError(
            "batches is empty; give at least one batch of model inputs (an iterator is spent after one use)"
        )


def spare_options(model: PreTrainedModel) -> dict[str, Any]:
    """Keywords of the model's forward that turn off what is not needed: the cache, and logits before the last token."""
    return known_options(model, {"logits_to_keep": 1, "use_cache": False})


def known_options(model: PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the model's forward takes."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in options.items() if name in known}


def real_mask(
    x: Tensor, inputs: Mapping[str, Any], padding: str = "attention_mask", of_length: OfLength | None = None
) -> Tensor:
    """Which activations `(batch, tokens, features)` are of real tokens and not of padding: bool `(batch, tokens)`.

    Args:
        padding: the input that says it; see `AttentionLayer`.
        of_length: how that becomes one of the activations where it is of other positions; see `AttentionLayer`.

    Raises:
        ValueError: if the batch has an `attention_mask` that does not say which tokens are padding.
    """
    mask = inputs.get(padding)
    if mask is None:
        return x.new_ones(x.shape[:-1], dtype=torch.bool)
    if of_length is not None and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != x.shape[1]:
        mask = of_length(x.shape[1], mask)
    # A choice among several texts has them along an axis of its own, which the model folds into the batch.
    if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.flatten(0, -2).shape != x.shape[:2]:
        raise ValueError(
            f"{padding} must be a tensor (batch, tokens), here {tuple(x.shape[:2])}, to tell which tokens are "
            f"padding; got {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}. Give batches "
            "of one length without it"
        )
    return mask.flatten(0, -2).to(x.device).bool()


def real_tokens(
    x: Tensor, inputs: Mapping[str, Any], padding: str = "attention_mask", of_length: OfLength | None = None
) -> Tensor:
    """Activations without padding's, `(real tokens, features)`; see `real_mask`."""
    return x[real_mask(x, inputs, padding, of_length)]


def to_device(batch: Mapping[str, Any], model: PreTrainedModel, *, labels: bool = False) -> dict[str, Any]:
    """What the model is to run: the batch's tensors on its device, and no cache.

    Without a cache Transformers keeps the documents of a packed row apart (`position_ids` that restart), with one it
    does not.

    Args:
        labels: keep them; else they are left out, since nobody asks for a loss. Labels that an encoder-decoder's
            decoder reads stay, and say which of its tokens are padding where nothing else does.

    Raises:
        ValueError: if the batch is no mapping, its `input_ids` are no tensor or none, its `attention_mask` calls every
            token padding, a token id is outside of the vocabulary, or it is packed in a way in which a decoder attends
            across documents.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch must be a mapping of model inputs such as {{'input_ids': ..., 'attention_mask': ...}}, got "
            f"{type(batch).__name__}; give an iterable of such mappings, [batch] for a single one"
        )
    _require_a_tensor(batch.get("input_ids"))
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.any():
        raise ValueError(
            f"a batch is all padding: its attention_mask {tuple(mask.shape)} is zero everywhere; leave the batch out, "
            "or give 1 for real tokens"
        )
    require_known_tokens(model, batch)
    _require_apart(batch, model)
    device = input_device(model)
    written = {} if labels else written_by(batch, model)
    inputs = {
        name: _usable(value).to(device) if isinstance(value, Tensor) else value
        for name, value in (dict(batch) | written).items()
        if labels or name not in LABELS or name in written
    }
    return inputs | known_options(model, {"use_cache": False})


def _require_a_tensor(ids: Any) -> None:
    """Raise `ValueError` for what a tokenizer gives that was not asked for tensors, and for a batch of nothing."""
    if ids is None or (isinstance(ids, Tensor) and ids.numel() and ids.dim() > 1):
        return
    found = f"of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
    raise ValueError(
        f"input_ids is {found}; it must be a tensor (batch, tokens) that is not empty: give the tokenizer "
        "return_tensors='pt'"
    )


def written_by(batch: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """What labels `(batch, tokens)` say of the tokens of a decoder: which they are, and which of them are padding.

    Without other inputs of the decoder an encoder-decoder makes them of its labels. Left without these it does not
    run, or (BART) reads the encoder's text.
    """
    labels, known = batch.get("labels"), inspect.signature(model.forward).parameters
    reads = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not (reads and isinstance(labels, Tensor) and labels.dim() == 2 and "labels" in known):
        return {}
    given = [batch.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds")]
    ids = next((each for each in given if each is not None), None)
    if labels.is_floating_point() or (ids is not None and ids.shape[:2] != labels.shape):
        return {}
    found: dict[str, Any] = {} if ids is not None else {"labels": labels}
    if batch.get("decoder_attention_mask") is None and "decoder_attention_mask" in known:
        # A label that is ignored in front of others is of a token that is read.
        real = (labels != IGNORED).flip(-1).cumsum(-1).flip(-1) > 0
        real[:, 0] = True  # what begins the text
        found["decoder_attention_mask"] = real.long()
    return found


def _usable(value: Tensor) -> Tensor:
    # Autograd refuses tensors that were made in inference mode.
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value


def _require_apart(batch: Mapping[str, Any], model: PreTrainedModel) -> None:
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or starts(positions, mask) is None:
        return
    if any(getattr(layer.module, "is_causal", False) for layer in attention_layers(model, adapters=True)):
        raise ValueError(
            "position_ids restart within a row, so the batch is packed, and it has an attention_mask, with which "
            "Transformers lets a document attend to those before it; leave attention_mask out"
        )
