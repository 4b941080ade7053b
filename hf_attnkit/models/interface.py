"""See a model's calls of Transformers' attention interface, and change what they give, while nothing of it changes.

A model asks `AttentionInterface` for the function that it then calls. For a while the function it is given is wrapped:
what runs is what would run anyway, the config and the registered names are untouched, masks are made as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface


@dataclass
class Call:
    """One call of the interface.

    Attributes:
        module: that attends.
        query: `(batch, num_heads, queries, head_dim)`.
        key, value: `(batch, num_key_value_heads, keys, head_dim)`; the value's head may have another size.
        mask: as the implementation takes it, or `None`.
        keywords: all others, such as `scaling`, `dropout`, `sliding_window`.
        function: that the model asked for.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    keywords: dict[str, Any]
    function: Callable[..., Any]

    def run(self) -> tuple[Tensor, Any]:
        """What the function gives: output `(batch, queries, num_heads, value head_dim)` and weights or `None`."""
        return self.function(self.module, self.query, self.key, self.value, self.mask, **self.keywords)


Watch = Callable[[Call], tuple[Tensor, Any]]


@contextmanager
def watched(modules: Iterable[nn.Module], watch: Watch) -> Iterator[None]:
    """Each call of the interface by one of `modules` goes to `watch` for a while, others' calls as ever.

    A function that calls another within, as swapped attention calls Transformers' for layers that keep it, is one call.
    """
    ours = {id(module) for module in modules}
    running: set[int] = set()
    get_interface, get_item = AttentionInterface.get_interface, AttentionInterface.__getitem__
    own_item = AttentionInterface.__dict__.get("__getitem__")

    def wrapped(function: Any) -> Any:
        if getattr(function, "_watched_by", None) is ours or not callable(function):
            return function

        @functools.wraps(function)
        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **keywords: Any
        ) -> Any:
            call = Call(module, query, key, value, attention_mask, keywords, function)
            if id(module) not in ours or id(module) in running:
                return call.run()
            running.add(id(module))
            try:
                return watch(call)
            finally:
                running.discard(id(module))

        attention._watched_by = ours  # type: ignore[attr-defined]
        return attention

    def ask(self: AttentionInterface, name: str, default: Callable) -> Callable:
        return wrapped(get_interface(self, name, default))

    def look_up(self: AttentionInterface, name: str) -> Callable:
        return wrapped(get_item(self, name))

    AttentionInterface.get_interface, AttentionInterface.__getitem__ = ask, look_up
    try:
        yield
    finally:
        AttentionInterface.get_interface = get_interface
        if own_item is None:
            del AttentionInterface.__getitem__
        else:
            AttentionInterface.__getitem__ = own_item
