"""The model's own loss, and what share of a batch's mean each example has in it.

A batch's loss is a mean over its examples (classification) or over all of its tokens that have a label (language
models). Example i, which has n_i of the N terms, adds n_i / N of its own loss to it. So a gradient of the mean by what
belongs to the example alone is multiplied by N / n_i.
"""

from __future__ import annotations

import inspect
import weakref
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
from hf_attnkit.models.discovery import quiet, require_gradients
from hf_attnkit.models.known import known
from hf_attnkit.observing.batches import IGNORED, known_options, written_by

LABELS = ("given", "predicted")


def with_labels(model: PreTrainedModel, inputs: Mapping[str, Any], labels: str) -> tuple[dict[str, Any], Tensor]:
    """The batch with labels for the model's loss, padding's left out, and the terms `(examples,)` of each example.

    Args:
        labels: "given" takes the batch's own; a causal language model without any learns its input. "predicted" takes
            the model's answers for labels. Neither is looked at where the loss needs none (CLIP's `return_loss`).

    Raises:
        ValueError: for a model without a loss, or made in inference mode, and labels that are missing, out of range, of
            no single example, or cannot be predicted.
    """
    require_gradients(model)
    if _asks_for_its_loss(model):
        return dict(inputs) | {"return_loss": True}, _each_example(inputs)
    names = _label_names(model)
    inputs = dict(inputs)
    if labels == "predicted":
        written = _read_by_the_decoder(model, inputs)
        inputs = {name: value for name, value in inputs.items() if name not in names} | written
        inputs |= _predicted(model, inputs)
    elif any(inputs.get(name) is None for name in names):
        if not (_is_causal(model) and "input_ids" in inputs):
            tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
            raise ValueError(
                f"labels are missing: this method needs the loss of {type(model).__name__}, so every batch needs "
                f"{' and '.join(map(repr, names))} (this one has {', '.join(map(repr, tensors))}); or give "
                'labels="predicted", which takes the model\'s own answers'
            )
        inputs["labels"] = _next_tokens(model, inputs)
    inputs.pop("label", None)
    if "labels" not in names:
        return inputs, _question(inputs, names)
    given = inputs["labels"]
    if isinstance(given, Tensor) and given.is_floating_point():
        return inputs, torch.ones(len(given), device=given.device)
    if isinstance(given, Tensor):
        given = inputs["labels"] = given.long()  # no loss takes shorter integers
        _require_classes(model, given)
        if _writes(model, given):
            return _per_written_token(inputs)
        if given.shape == _tokens(inputs):
            return _per_token(model, inputs)
    if not isinstance(given, Tensor) and not all(isinstance(each, Mapping) for each in given):
        raise ValueError(f"labels is a {type(given).__name__}; it must be a tensor, or a list of mappings (boxes)")
    main = inputs.get(model.main_input_name)
    number = len(main if isinstance(main, Tensor) else _each_example(inputs))
    if isinstance(given, Tensor) and given.numel() == number:
        return inputs, (given != IGNORED).float().flatten()
    if number > 1:
        found = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"in a {type(given).__name__}"
        raise ValueError(
            f"labels {found} are neither one for each of {number} examples nor one for each token, so what an example "
            f"adds to the loss of {type(model).__name__} cannot be told; give batches of one example"
        )
    return inputs, torch.ones(1)


def batch_loss(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """The loss of a batch from `with_labels`; as the model computes it, a scalar.

    Without that of a router of experts: it belongs to no example.

    Raises:
        ValueError: if it is not finite.
    """
    options = {"return_dict": True} | known_options(model, {"output_router_logits": False})
    loss: Tensor = model(**{**inputs, **options}).loss
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
    return any(each.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for each in type(model).__mro__)


# By model, whether its loss compares what it puts out for a token with the label of the next one.
_shifting: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def _shifts(model: PreTrainedModel) -> bool:
    """Whether its loss compares what it puts out for a token with the label of the next one.

    Its class does not say it: Llama's and LLaVA's do, those of BartForCausalLM and XLM do not. A loss that does, does
    not look at the label of the first token.
    """
    if model not in _shifting:
        inputs = known(model).discovery.inputs
        losses = []
        try:
            with quiet(model), same_config(model):
                for label in (0, 1):
                    labels = torch.full_like(inputs["input_ids"], IGNORED)
                    labels[-1, 0] = label  # the last row has no padding
                    losses.append(model(**inputs, labels=labels, return_dict=True).loss.nan_to_num())
            _shifting[model] = torch.equal(*losses)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a model's code raises says that these are not its labels
            _shifting[model] = _is_causal(model)
    return _shifting[model]


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
    if "Classification" not in type(model).__name__:
        _require_tokens(model, labels)
        return
    if classes == 1:
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ValueError(
            f"label {wrong[0].item()} is none of the {classes} classes of this {type(model).__name__} (0 to "
            f"{classes - 1}; {IGNORED} for none); correct the labels, or load the model with num_labels"
        )


def _require_tokens(model: PreTrainedModel, labels: Tensor) -> None:
    """The same for labels that are tokens."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or labels.dim() != 2:
        return
    rows = len(weight)
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= rows))]
    if len(wrong):
        raise ValueError(
            f"label {wrong[0].item()} is none of the {rows} tokens of this {type(model).__name__} (0 to {rows - 1}; "
            f"{IGNORED} for none); take the tokenizer of this model"
        )


def _per_token(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    labels = inputs["labels"]
    counts = _predictable(labels, inputs) if _shifts(model) else _real(labels, inputs)
    labels = labels.masked_fill(~counts, IGNORED)
    return inputs | {"labels": labels}, (labels != IGNORED).sum(-1).float()


def _real(tokens: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Which of the tokens `(B, T)` are no padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device).bool()


def _predictable(tokens: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Which of the tokens `(B, T)` follow another one of their text.

    The first is predicted by none of it: by nothing, by padding on its left, or in a packed row by the document before
    it.
    """
    real = _real(tokens, inputs)
    counts = real & F.pad(real[:, :-1], (1, 0))
    begins = starts(inputs.get("position_ids"), inputs.get("attention_mask"))
    return counts if begins is None else counts & ~begins.to(counts.device)


def _next_tokens(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """The tokens as labels for predicting them, where the model's loss expects them."""
    ids: Tensor = inputs["input_ids"]
    if _shifts(model):
        return ids
    return F.pad(ids.masked_fill(~_predictable(ids, inputs), IGNORED)[:, 1:], (0, 1), value=IGNORED)


def _writes(model: PreTrainedModel, labels: Tensor) -> bool:
    """Whether the labels are tokens that a decoder writes, whatever the encoder reads."""
    reads = getattr(model.config, "is_encoder_decoder", False)
    return bool(reads) and labels.dim() == 2 and "Classification" not in type(model).__name__


def _per_written_token(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    labels, mask = inputs["labels"], inputs.get("decoder_attention_mask")
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        labels = labels.masked_fill(~mask.to(labels.device).bool(), IGNORED)
    return inputs | {"labels": labels}, (labels != IGNORED).sum(-1).float()


def _read_by_the_decoder(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the decoder of a model that writes reads: its own answers, as labels, would be read in the place of it."""
    other = any(word in type(model).__name__ for word in ("Classification", "QuestionAnswering"))
    if other or not getattr(model.config, "is_encoder_decoder", False):
        return {}
    written = written_by(inputs, model)
    labels, shift = written.pop("labels", None), getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
        return written
    if labels is not None and shift is not None:
        return written | {"decoder_input_ids": shift(labels=labels)}
    raise ValueError(
        f'labels="predicted" are the answers of {type(model).__name__} to decoder_input_ids, which the batch does not '
        "have; give them"
    )


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
    is_each = answers.shape == _tokens(inputs) and not _writes(model, answers)
    return {"labels": F.pad(answers[:, :-1], (1, 0), value=IGNORED) if is_each and _shifts(model) else answers}
