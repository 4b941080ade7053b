"""Attentions that lost all of their heads.

Transformers' attention classes cannot run without one: they shape by `view(*shape, -1, head_dim)`, which has no answer
for zero elements, and the cache takes its length from the keys of layer 0. So such an attention keeps a stand-in, one
head whose weights are zero: it adds nothing, gets no gradient, and runs, caches, saves and loads as any head does.
The config records 0 heads for the module, see `editing.head_record`, and the module says so.
"""

from __future__ import annotations

from torch import nn

# Of a module that attends and whose heads were cut by what they own: how many are left.
HEADS_LEFT = "hf_attnkit_heads_left"


def has_no_heads(module: nn.Module) -> bool:
    """Whether its one head is a stand-in."""
    return getattr(module, HEADS_LEFT, None) == 0
