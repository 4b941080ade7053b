"""What Transformers' own functions do with the arguments that change a softmax: a bound of the scores, learned sinks.

Not every implementation applies what a model passes. What looks at attention asks here, and the answer is tried: the
function and the definition attend to the same few random tokens, with each of the changes and without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_attnkit.attention.kernels import capped
from hf_attnkit.attention.mask import Mask

# Arguments of a model's attention call that change its softmax: a bound of the scores, and learned sinks.
OF_SCORES = ("softcap", "s_aux")
# Some functions take the softmax in float32 whatever they are given.
BOUND = 2**8 * torch.finfo(torch.float32).eps


@torch.no_grad()
def as_stock_applies(
    module: nn.Module, function: Callable[..., Any], mask: Mask, query: Tensor, key: Tensor, value: Tensor
) -> Mask:
    """The mask with that of `softcap` and `sinks` which the function applies.

    Args:
        function: of Transformers' attention interface, as `module` calls it.
        query, key, value: of a call, for their numbers of heads and sizes; their values do not count.

    Raises:
        ValueError: if what it computes is none of the combinations.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, part.shape[1], 3, part.shape[3], generator=generator).double().to(query.device)
        for part in (query, key, value)
    )
    scaling = query.shape[-1] ** -0.5 * 3  # scores large enough for a bound to show, and for no key to win alone
    given = {"softcap": mask.softcap, "s_aux": mask.sinks}
    keywords = {name: found for name, found in given.items() if found is not None}
    theirs = function(module, q, k, v, None, scaling=scaling, dropout=0.0, is_causal=False, **keywords)[0]
    everything = Mask.aligned(3, 3, is_causal=False, device=query.device)
    off: dict[float, Mask] = {}
    for softcap in {mask.softcap, None}:
        for sinks in [mask.sinks, None][: 1 if mask.sinks is None else 2]:
            tried, found = (dataclasses.replace(each, softcap=softcap, sinks=sinks) for each in (everything, mask))
            ours, _ = capped.attention(q, k, v, tried, scaling=scaling)
            off.setdefault(float((ours.transpose(1, 2) - theirs).abs().max()), found)
    least = min(off)
    if not least <= BOUND * float(v.abs().max()):
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(keywords)}, and what its attention function makes of that is "
            "neither a bound of the scores nor a sink, so what it attends to is not known; take a score of the heads' "
            "outputs, such as 'contribution'"
        )
    return off[least]
