"""How well a language model predicts a text that it reads through its cache, a chunk at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.models.cache_size import held_bytes
from hf_attnkit.models.sample_inputs import input_device


@dataclass(frozen=True)
class Point:
    """After a chunk.

    Attributes:
        tokens: read so far.
        predicted: tokens of the chunk that were predicted: all but the text's first.
        loss: sum of their negative log-likelihoods in nats.
        cache_bytes: what the cache holds.
        memory_bytes: what the process holds: tensors on a GPU, else resident memory; `None` where it is not told.
    """

    tokens: int
    predicted: int
    loss: float
    cache_bytes: int
    memory_bytes: int | None


@torch.no_grad()
def read(model: PreTrainedModel, text: Tensor, chunk_size: int, step: Callable[[int], object]) -> list[Point]:
    """Read token ids `(T,)` through one cache, `chunk_size` at a time.

    Args:
        step: called with the number of tokens of each chunk, for a progress bar.
    """
    device, cache = input_device(model), DynamicCache(config=model.config)
    points, last = [], None
    with evaluation_mode(model):
        for start in range(0, len(text), chunk_size):
            chunk = text[start : start + chunk_size].to(device)
            logits = model(input_ids=chunk[None], past_key_values=cache, use_cache=True).logits[0]
            before = logits[:-1] if last is None else torch.cat([last, logits[:-1]])
            targets = chunk[len(chunk) - len(before) :]
            loss = F.cross_entropy(before.float(), targets, reduction="none").double().sum()
            last = logits[-1:].clone()  # a view would keep the chunk's logits
            points.append(Point(start + len(chunk), len(targets), float(loss), held_bytes(cache), held_memory(device)))
            step(len(chunk))
    return points


@torch.no_grad()
def read_fresh(
    model: PreTrainedModel, text: Tensor, first: int, context: int, step: Callable[[int], object]
) -> list[Point]:
    """The same tokens from `first` on, each behind `context` to twice as many that are read anew, without a cache.

    At the text's start there are fewer.
    """
    device, points = input_device(model), []
    with evaluation_mode(model):
        for start in range(first, len(text), context):
            ids = text[max(start - context, 0) : start + context].to(device)
            number = min(len(text) - start, context) - (start == 0)
            if not number:  # nothing is before the first token
                continue
            logits = model(input_ids=ids[None], use_cache=False).logits[0, -number - 1 : -1]
            loss = F.cross_entropy(logits.float(), ids[-number:], reduction="none").double().sum()
            points.append(Point(min(start + context, len(text)), number, float(loss), 0, held_memory(device)))
            step(number)
    return points


def perplexity(points: Iterable[Point], after: int = 0) -> float:
    """exp of the mean loss of the tokens after the first so many, a number that a chunk ends at."""
    counted = [point for point in points if point.tokens > after]
    return math.exp(sum(point.loss for point in counted) / sum(point.predicted for point in counted))


def held_memory(device: torch.device) -> int | None:
    """What the process holds now: tensors on a GPU, else resident memory, which Linux tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:")), None)
