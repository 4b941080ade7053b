"""Small inputs under which a model runs, made from its forward's arguments and its config.

Two rows, of which the first has padding where the model takes a mask; encoder and decoder of different length, so
that cross-attention can be told. Several guesses, the fullest first: a model of several parts is tried with an image
and text, then with text.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

ENCODER_TOKENS, DECODER_TOKENS = 8, 6


def sample_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Guesses of inputs, best first; all on the model's device, in its dtype, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    known = inspect.signature(model.forward).parameters
    makers = {"pixel_values": _pixels, "input_features": _features, "input_values": _waveform}
    main = model.main_input_name
    if main in makers:
        own = {main: makers[main](model, generator)}
        if "input_ids" in known:
            text = _tokens(model, known, generator)
            try:
                yield _with_placeholders(model, text, own[main]) | own
            except Exception:  # whatever a model's code raises says that it has no placeholders
                yield text | own
        if "decoder_input_ids" in known:
            ids = _ids(model, DECODER_TOKENS, generator)
            yield own | {"decoder_input_ids": ids, "use_cache": False}
        yield own
        return
    text = _tokens(model, known, generator)
    for name, maker in makers.items():
        if name in known and _part(model.config, name) is not None:
            made = maker(model, generator)
            # Some take several images a text, along an axis of their own.
            for given in (made, made.unsqueeze(1)) if name == "pixel_values" else (made,):
                try:
                    yield _with_placeholders(model, text, given) | {name: given}
                except Exception:  # whatever a model's code raises says that this is not its image
                    yield text | {name: given}
    if states := _of_an_encoder(model, known, generator):
        yield text | states
    yield text
    if getattr(model.config, "pad_token_id", None) is None:  # without one, classifiers find the last token of one row
        yield {name: each[:1] if isinstance(each, Tensor) else each for name, each in text.items()}
    if "pixel_values" in known:
        yield text | {"pixel_values": _pixels(model, generator)}
    # Several choices a text, along an axis of their own.
    yield {name: each[:, None].repeat(1, 2, 1) if isinstance(each, Tensor) else each for name, each in text.items()}


def input_device(model: nn.Module) -> torch.device:
    """Where the model's inputs go; images enter through a convolution, tokens through an embedding."""
    try:
        device: torch.device = next(model.get_input_embeddings().parameters()).device  # type: ignore[operator]
    except (NotImplementedError, AttributeError, StopIteration):  # several inputs (CLIP), or none of tokens
        device = next(model.parameters()).device
    return device


def _number(config: PreTrainedConfig, *names: str, default: int) -> int:
    """The first of these fields that the config, or its text or decoder part, has."""
    for part in (config, *_parts(config)):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return default


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configs inside a config."""
    return [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]


def _part(config: PreTrainedConfig, name: str) -> PreTrainedConfig | None:
    """The config's part that takes this input, or `None`."""
    word = "vision" if name == "pixel_values" else "audio"
    for key in (f"{word}_config", f"{word}_encoder", "encoder"):
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            return part
    return None


def _ids(model: PreTrainedModel, length: int, generator: torch.Generator) -> Tensor:
    """Two rows of token ids, none of which is special."""
    size = _number(model.config, "vocab_size", default=32)
    special: set[int] = set()
    for part in (model.config, *_parts(model.config)):
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index")):
                special |= set(value if isinstance(value, (list, tuple)) else [value])
    plain = [token for token in range(min(size, 1000)) if token not in special]
    picks = torch.randint(len(plain), (2, length), generator=generator)
    return torch.tensor(plain)[picks].to(input_device(model))


def _tokens(model: PreTrainedModel, known: Any, generator: torch.Generator) -> dict[str, Any]:
    ids = _ids(model, ENCODER_TOKENS, generator)
    inputs: dict[str, Any] = {"input_ids": ids}
    is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False)) and "decoder_input_ids" in known
    if is_encoder_decoder or "Decoder" not in type(model).__name__:
        # An encoder-decoder's sequence classifier, and CLIP, take the output where the text ends.
        end = _number(model.config, "eos_token_id", default=-1)
        if 0 <= end < _number(model.config, "vocab_size", default=32):
            ids[:, -1] = end
    if "attention_mask" in known or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        if is_encoder_decoder:
            mask = mask.flip(-1)
            ids[0, -3] = ids[0, -1]
        inputs["attention_mask"] = mask
    if is_encoder_decoder:
        inputs["decoder_input_ids"] = _ids(model, DECODER_TOKENS, generator)
    if "use_cache" in known or is_encoder_decoder:
        inputs["use_cache"] = False
    if getattr(model.config, "add_cross_attention", False):
        inputs |= _of_an_encoder(model, known, generator)
    return inputs


def _of_an_encoder(model: PreTrainedModel, known: Any, generator: torch.Generator) -> dict[str, Any]:
    """What a decoder alone attends to next to its own tokens, if its forward takes that."""
    config = model.config
    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False)
    if not is_decoder or "encoder_hidden_states" not in known:
        return {}
    width = _number(config, "cross_attention_hidden_size", "hidden_size", "d_model", default=0)
    states = torch.randn(2, DECODER_TOKENS, width, generator=generator)
    return {"encoder_hidden_states": states.to(input_device(model), model.dtype)}


def _pixels(model: PreTrainedModel, generator: torch.Generator) -> Tensor:
    config = _part(model.config, "pixel_values") or model.config
    size = getattr(config, "image_size", None) or getattr(config, "input_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    shape: list[int] = [2, _number(config, "num_channels", "in_channels", "in_chans", default=3), height, width]
    frames = getattr(config, "num_frames", None)
    if isinstance(frames, int):
        shape.insert(1, frames)
    return torch.randn(shape, generator=generator).to(input_device(model), model.dtype)


def _features(model: PreTrainedModel, generator: torch.Generator) -> Tensor:
    config = _part(model.config, "input_features") or model.config
    bins = _number(
        config,
        "num_mel_bins",
        "feature_size",
        "feature_projection_input_dim",
        "input_feat_per_channel",
        "input_dim",
        default=80,
    )
    positions = getattr(config, "max_source_positions", None)
    # Whisper's encoder takes windows of one length only, features before time; others take time before features.
    if hasattr(model.config, "max_source_positions") and "Speech2Text" not in type(model).__name__ and positions:
        features = torch.randn(2, bins, 2 * positions, generator=generator)
    else:
        features = torch.randn(2, 64, bins, generator=generator)
    return features.to(input_device(model), model.dtype)


def _waveform(model: PreTrainedModel, generator: torch.Generator) -> Tensor:
    """A sound wave, or its spectrogram where the model takes that by the same name."""
    bins, length = (getattr(model.config, name, None) for name in ("num_mel_bins", "max_length"))
    shape = (2, length, bins) if isinstance(bins, int) and isinstance(length, int) else (2, 3200)
    return torch.randn(shape, generator=generator).to(input_device(model), model.dtype)


def _with_placeholders(model: PreTrainedModel, text: dict[str, Any], given: Tensor) -> dict[str, Any]:
    """Text with a token for each vector that the image gives, where the model has such a token."""
    token = _number(model.config, "image_token_id", "image_token_index", default=-1)
    if token < 0 or not hasattr(model, "get_image_features"):
        return text
    with torch.no_grad():
        features = model.get_image_features(pixel_values=given)
    found = getattr(features, "pooler_output", features)
    number = found[0].shape[0] if isinstance(found, (list, tuple)) else found.shape[-2]
    ids = text["input_ids"]
    ids = torch.cat([ids[:, :4], ids.new_full((len(ids), number), token), ids[:, 4:]], 1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return text | {"input_ids": ids, "attention_mask": mask}
