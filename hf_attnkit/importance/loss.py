"""The model's own loss, and what share of a batch's mean each example has in it.

A batch's loss is a mean over its examples (classification) or over all of its tokens that have a label (language
models). Example i, which has n_i of the N terms, adds n_i / N of its own loss to it. So a gradient of the mean by what
belongs to the example alone is multiplied by N / n_i.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_attnkit.attention.packing import starts
from hf_attnkit.common.state import replace_state

LABELS = ("given", "predicted")
IGNORED = -100  # the label that Transformers' losses leave out


def with_labels(model: PreTrainedModel, inputs: Mapping[str, Any], labels: str) -> tuple[dict[str, Any], Tensor]:
    """The batch with labels for the model's loss, padding's left out, and the terms `(examples,)` of each example.

    Args:
        labels: "given" takes the batch's own; a causal language model without any learns its input. "predicted" takes
            the model's answers for labels. Neither is looked at where the loss needs none (CLIP's `return_loss`).

    Raises:
        ValueError: for a model without a loss, or labels that are missing, out of range or cannot be predicted.
    """
    if _asks_for_its_loss(model):
        return dict(inputs) | {"return_loss": True}, _each_example(inputs)
    names = _label_names(model)
    inputs = dict(inputs)
    if labels == "predicted":
        inputs = {name: value for name, value in inputs.items() if name not in names}
        inputs |= _predicted(model, inputs)
    elif any(inputs.get(name) is None for name in names):
        if not (_is_causal(model) and "input_ids" in inputs):
            tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
            raise ValueError(
                f"labels are missing: this method needs the loss of {type(model).__name__}, so every batch needs "
                f"{' and '.join(map(repr, names))} (this one has {', '.join(map(repr, tensors))}); or give "
                'labels="predicted", which takes the model\'s own answers'
            )
        inputs["labels"] = inputs["input_ids"]
    inputs.pop("label", None)
    if "labels" not in names:
        return inputs, _question(inputs, names)
    given, tokens = inputs["labels"], _tokens(inputs)
    if given.is_floating_point():
        return inputs, torch.ones(len(given), device=given.device)
    _require_classes(model, given)
    if _writes(model, given):
        return _per_written_token(inputs)
    if given.shape == tokens:
        return _per_token(model, inputs)
    return inputs, (given != IGNORED).float().flatten()


def batch_loss(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """The loss of a batch from `with_labels`; as the model computes it, a scalar.

    Raises:
        ValueError: if it is not finite.
    """
    loss: Tensor = model(**inputs, return_dict=True).loss
    if not loss.isfinite():
        raise ValueError(
            f"the loss of a batch is {loss.item()}: activations contain NaN or infinity; run the model in bfloat16 or "
            "float32 and look at the batch"
        )
    return loss


@contextmanager
def same_config(model: PreTrainedModel) -> Iterator[None]:
    """The config is afterwards as it was; sequence classifiers write `problem_type` into it with their first loss."""
    state = dict(model.config.__dict__)
    try:
        yield
    finally:
        replace_state(model.config, state)


def _tokens(inputs: Mapping[str, Any]) -> torch.Size:
    """The batch's shape in tokens: `(B, T)`, or with an axis of choices; empty for what is no text."""
    if isinstance(inputs.get("input_ids"), Tensor):
        return inputs["input_ids"].shape
    embedded = inputs.get("inputs_embeds")
    return embedded.shape[:-1] if isinstance(embedded, Tensor) else torch.Size()


def _is_causal(model: PreTrainedModel) -> bool:
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _asks_for_its_loss(model: PreTrainedModel) -> bool:
    """Whether it has a loss without labels, such as CLIP, which matches texts and images of a batch."""
    accepted = inspect.signature(model.forward).parameters
    return "return_loss" in accepted and "labels" not in accepted


def _each_example(inputs: Mapping[str, Any]) -> Tensor:
    first = next(value for value in inputs.values() if isinstance(value, Tensor) and value.dim())
    return torch.ones(len(first), device=first.device)


def _label_names(model: PreTrainedModel) -> tuple[str, ...]:
    accepted = inspect.signature(model.forward).parameters
    if "labels" in accepted and "next_sentence_label" not in accepted:
        return ("labels",)
    if "start_positions" in accepted and "end_positions" in accepted:
        return ("start_positions", "end_positions")
    reason = "adds two losses" if "labels" in accepted else "has no loss"
    raise ValueError(
        f"{type(model).__name__} {reason}, and this method needs the gradient of one; load the model with the head of "
        "its task, or take a method without labels such as 'contribution'"
    )


def _question(inputs: Mapping[str, Any], names: Sequence[str]) -> Tensor:
    positions = torch.stack([inputs[name].flatten() for name in names])
    length = _tokens(inputs)[-1]
    if positions.min() < 0 or positions.max() >= length:
        raise ValueError(f"{' and '.join(names)} lie outside the {length} tokens of a batch; leave such examples out")
    return torch.ones_like(positions[0], dtype=torch.float32)


def _require_classes(model: PreTrainedModel, labels: Tensor) -> None:
    """Raise `ValueError` for the number of a class that a classifier does not have; on a GPU the loss would only say
    that the device failed."""
    classes = model.config.num_labels
    if "Classification" not in type(model).__name__ or classes == 1:
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ValueError(
            f"label {wrong[0].item()} is none of the {classes} classes of this {type(model).__name__} (0 to "
            f"{classes - 1}; {IGNORED} for none); correct the labels, or load the model with num_labels"
        )


def _per_token(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    labels = inputs["labels"]
    mask = inputs.get("attention_mask")
    counts = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.to(labels.device).bool()
    if _is_causal(model):
        # The first token of a text is predicted by none of it: by nothing, by padding on its left, or in a packed row
        # by the document before it.
        counts = counts & F.pad(counts[:, :-1], (1, 0))
        begins = starts(inputs.get("position_ids"), mask)
        counts = counts if begins is None else counts & ~begins.to(counts.device)
    labels = labels.masked_fill(~counts, IGNORED)
    return inputs | {"labels": labels}, (labels != IGNORED).sum(-1).float()


def _writes(model: PreTrainedModel, labels: Tensor) -> bool:
    """Whether the labels are tokens that a decoder writes, whatever the encoder reads."""
    reads = getattr(model.config, "is_encoder_decoder", False)
    return bool(reads) and labels.dim() == 2 and "Classification" not in type(model).__name__


def _per_written_token(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    labels, mask = inputs["labels"], inputs.get("decoder_attention_mask")
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        labels = labels.masked_fill(~mask.to(labels.device).bool(), IGNORED)
    return inputs | {"labels": labels}, (labels != IGNORED).sum(-1).float()


def _problem(model: PreTrainedModel) -> str | None:
    return getattr(model.config, "problem_type", None)


@torch.no_grad()
def _predicted(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    output = model(**inputs, return_dict=True)
    if "start_logits" in output:
        return {f"{end}_positions": output[f"{end}_logits"].argmax(-1) for end in ("start", "end")}
    logits = output.logits
    binary = logits.shape == _tokens(inputs) and logits.shape[-1] != model.config.num_labels
    if logits.shape[-1] == 1 or binary or _problem(model) in ("multi_label_classification", "regression"):
        raise ValueError(
            f'labels="predicted" takes the likeliest class, and {type(model).__name__} does not choose one of several '
            f"classes (logits {tuple(logits.shape)}); give the batches labels"
        )
    answers = logits.argmax(-1)
    # Position t of a causal language model predicts the label of t + 1.
    return {"labels": F.pad(answers[:, :-1], (1, 0), value=IGNORED) if _is_causal(model) else answers}
