"""The progress bar of everything that takes long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from transformers.utils import logging

T = TypeVar("T", covariant=True)


class ProgressBar(Protocol[T]):
    """What `progress_bar` returns: iterated over, or entered and moved by hand."""

    def __iter__(self) -> Iterator[T]: ...

    def __enter__(self) -> ProgressBar[T]: ...

    def __exit__(self, *exception: Any) -> None: ...

    def update(self, number: int = 1) -> object:
        """Move on by so many units."""


def progress_bar(
    items: Iterable[T] | None = None, *, description: str, unit: str, total: int | None = None, **options: Any
) -> ProgressBar[T]:
    """A bar on stderr that moves as `items` are iterated over, or by its `update`.

    It is shown on the main process only, and never after `transformers.utils.logging.disable_progress_bar()`.

    Args:
        total: how many units there are, where `items` does not tell.
        options: others of `tqdm.tqdm`, such as `unit_scale=True` for bytes.
    """
    is_main = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    bar = logging.tqdm if is_main else logging.EmptyTqdm
    return bar(items, desc=description, unit=unit, total=total, **options)  # type: ignore[no-any-return]
