"""Decoders: one graph for the prompt and for each step, which takes a cache of keys and values and returns it longer.

The graph is traced with two new tokens behind a cache, so that both numbers stay open. A prompt is that graph with an
empty cache. All layers keep all keys there, also those whose kind sees only a window: the window is
in the graph's mask.

It is compared with `model.generate`, whose cache is the model's own: the same tokens, and logits as far apart as
rounding explains.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from hf_attnkit.export import inputs
from hf_attnkit.export.proof import FACTORS, Compared, first_line, largest, rounded
from hf_attnkit.models.discovery import quiet
from hf_attnkit.models.positions import positions

STEPS = 4
_TEXT = ("input_ids", "attention_mask")


def export_decoder(model: PreTrainedModel, opset: int | None) -> Any:
    """`ExportedModel` with the one component "model"."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    prompt = _prompt(inputs.traced_inputs(model, _TEXT))
    # Not `DynamicCache(config=...)`, whose layers of a model's own window drop keys by a count in Python.
    cache = DynamicCache()
    known = inspect.signature(model.forward).parameters
    positions = (prompt["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with_positions = {"position_ids": positions} if "position_ids" in known else {}
    model(**prompt, **with_positions, past_key_values=cache, use_cache=True)
    if len(cache.layers) == 0:
        raise ValueError("it keeps nothing in Transformers' DynamicCache, which is what the graph takes and returns")
    new = prompt["input_ids"][:, -2:]
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(new)], dim=1)
    given: dict[str, Any] = {"input_ids": new, "attention_mask": mask}
    if with_positions:
        given["position_ids"] = (mask.cumsum(-1) - 1)[:, -2:]
    given |= {"past_key_values": cache, "use_cache": True}
    return OnnxExporter().export(model, given, OnnxConfig(dynamic=True, opset_version=opset))


def empty_cache(exported: Any, batch: int) -> DynamicCache:
    """What a prompt begins with: no keys and values, in the shapes and dtype that the graph says.

    Args:
        exported: an `ExportedModel` of a decoder.
        batch: rows of the prompt.
    """
    cache = DynamicCache()
    graph = {each.name.removeprefix("input."): each for each in exported.runners["model"].session.get_inputs()}
    while (name := f"past_key_values.layers.{len(cache.layers)}.keys") in graph:
        shapes = [graph[name.replace("keys", part)].shape for part in ("keys", "values")]
        dtype = torch.float16 if graph[name].type == "tensor(float16)" else torch.float32
        keys, values = (torch.zeros(batch, int(shape[1]), 0, int(shape[3]), dtype=dtype) for shape in shapes)
        cache.update(keys, values, len(cache.layers))
    return cache


def generate(exported: Any, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> Tensor:
    """Greedy generation with an exported decoder.

    Args:
        exported: what `ExportedModel.from_pretrained(folder)` returns.
        input_ids, attention_mask: `(batch, tokens)`, padded on the left.
        max_new_tokens: how many; nothing stops earlier.

    Returns:
        The new ids `(batch, max_new_tokens)`.
    """
    steps = _steps(exported, input_ids, attention_mask, None, max_new_tokens)
    return torch.cat([logits.argmax(-1, keepdim=True) for logits in steps], dim=1)


def compare_decoder(model: PreTrainedModel, exported: Any, dtype: torch.dtype | None) -> list[Compared]:
    """Compare prompts and `STEPS` tokens after them, as `proof.compare` does.

    Raises:
        ValueError: if the file does not run, puts out other tokens, or differs by more than rounding explains.
    """
    limit = positions(model)
    lengths = [length if limit is None else min(length, limit - STEPS) for length in inputs.LENGTHS]
    pairs = [(batch, length) for batch in inputs.BATCHES for length in sorted(set(lengths))]
    return [_compare(model, exported, batch, length, dtype) for batch, length in pairs]


def _compare(model: PreTrainedModel, exported: Any, batch: int, length: int, dtype: torch.dtype | None) -> Compared:
    prompt = _prompt(inputs.make_inputs(model, _TEXT, batch, length))
    where = f"{STEPS} tokens after {batch} rows of {length} tokens"
    with quiet(model):
        made = model.generate(**prompt, generation_config=_greedy(output_logits=True, return_dict_in_generate=True))
    tokens, wanted = made.sequences[:, length:], torch.stack(made.logits, 1).float()
    try:
        steps = list(_steps(exported, prompt["input_ids"], prompt["attention_mask"], tokens, STEPS))
    except Exception as error:  # of the runtime's own classes
        raise ValueError(f"{where}: the file does not run: {first_line(error)}") from error
    got = torch.stack(steps, 1).float()
    if not torch.isfinite(got).all():
        raise ValueError(f"{where}: logits of the file are not finite")
    size = largest(wanted)
    off, bound = largest(got.double() - wanted.double()), float("inf")
    if dtype is not None:
        bound = FACTORS[dtype] * (_moved(model, prompt, tokens, dtype) + torch.finfo(dtype).eps * size)
        if off > bound:
            raise ValueError(
                f"{where}: logits differ from the model's by {off:.1e}, more than {bound:.1e}, which rounding explains"
            )
        picked = got.argmax(-1)
        # Of two logits that are equal up to rounding either may win.
        lost = wanted.amax(-1) - wanted.gather(-1, picked[..., None])[..., 0]
        if bool((lost > 2 * bound).any()):
            raise ValueError(f"{where}: the file puts out other tokens than the model")
    return Compared(batch, length, off / size, bound / size)


def _moved(model: PreTrainedModel, prompt: Mapping[str, Tensor], tokens: Tensor, dtype: torch.dtype) -> float:
    """How far one rounding of each module's output moves the logits of these tokens."""
    ids = torch.cat([prompt["input_ids"], tokens[:, :-1]], dim=1)
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(tokens[:, :-1])], dim=1)
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with quiet(model):
        plain = model(**given).logits[:, -tokens.shape[1] :]
        with rounded(model, torch.finfo(dtype).eps):
            moved = model(**given).logits[:, -tokens.shape[1] :]
    return largest(moved.double() - plain.double())


def _steps(exported: Any, ids: Tensor, mask: Tensor, tokens: Tensor | None, count: int) -> Iterator[Tensor]:
    """Of each step the logits of the next token `(batch, vocabulary)`; `tokens` `(batch, count)` are put in instead."""
    cache: Any = empty_cache(exported, len(ids))
    taken = exported.components["model"].metadata.kwargs
    for step in range(count):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        outputs = exported(**{name: value for name, value in given.items() if name in taken})
        cache, logits = outputs["past_key_values"], outputs["logits"][:, -1]
        yield logits
        ids = logits.argmax(-1, keepdim=True) if tokens is None else tokens[:, step : step + 1]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)


def _prompt(padded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows with their padding on the left alone, as prompts have it."""
    ids, mask = padded["input_ids"], padded["attention_mask"]
    order = mask.argsort(dim=-1, stable=True)  # what is hidden comes first
    return {"input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order)}


def _greedy(**options: Any) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False, use_cache=True, pad_token_id=0, min_new_tokens=STEPS, max_new_tokens=STEPS, **options
    )
