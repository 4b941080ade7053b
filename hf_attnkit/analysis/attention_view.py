"""`attention_view`: what every head attends to, as one page that needs nothing else; of one model, or before and after.

    view = attention_view(model, tokenizer("The keys to the cabinet are here.", return_tensors="pt"), tokenizer)
    view.save("attention.html")

The weights are those that the model's own kinds compute, from the attention calls as they come: nothing is switched to
eager attention, and the matrix of a long input is never formed, see `view.blockwise`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.analysis.view import flow as flows
from hf_attnkit.analysis.view import rollout as rollouts
from hf_attnkit.analysis.view.collect import collect
from hf_attnkit.analysis.view.difference import Difference, differences
from hf_attnkit.analysis.view.images import given_images
from hf_attnkit.analysis.view.maps import Example
from hf_attnkit.analysis.view.matching import same_layers
from hf_attnkit.analysis.view.page import make_page
from hf_attnkit.common.checks import integer
from hf_attnkit.common.state import plain_mode
from hf_attnkit.models.layers import AttentionLayer, attention_layers
from hf_attnkit.observing.attention_calls import has_softmax

EXACT_TOKENS = 256
MAX_EXAMPLES = 16
# What configs call the number of positions that a model has.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_source_positions", "n_ctx")


@dataclass(frozen=True, repr=False)
class AttentionView:
    """What `attention_view` found; shows itself in a notebook.

    Attributes:
        title: of the page.
        names: of the model, and of the one that it is compared with.
        examples: one for each row of the inputs.
        compared: the same of the other model; empty without.
        differences: for each example one for each of its attentions; empty without.
        importance: `(num_layers, num_heads)` scores that the page shows, or `None`.
        notes: what the reader must know.
    """

    title: str
    names: tuple[str, ...]
    examples: tuple[Example, ...]
    compared: tuple[Example, ...] = ()
    differences: tuple[tuple[Difference, ...], ...] = ()
    importance: Tensor | None = None
    notes: tuple[str, ...] = ()

    def rollout(self, example: int = 0) -> list[rollouts.Rollout]:
        """Attention rollout, see `hf_attnkit.analysis.view.rollout`.

        Raises:
            ValueError: if some attention has no weights.
        """
        found, why = rollouts.rollout(self.examples[example])
        if why and not found:
            raise ValueError(f"{why}, so attention rollout says nothing")
        return found

    def attention_flow(self, token: int, *, example: int = 0, queries: int | None = None) -> list[flows.Flow]:
        """Attention flow from a token, see `hf_attnkit.analysis.view.flow`; its time is about that number of tokens
        cubed, times the square of the number of layers: half a minute for 64 tokens and 12 layers.

        Args:
            token: unit of the sequence: a token, or a block where maps are pooled.
            queries: number of the sequence; by default that of the last attention.

        Raises:
            ValueError: for a token that is not there, or if some attention has no weights.
        """
        found = self.examples[example]
        queries = found.maps[-1].queries if queries is None else queries
        units = found.sequences[queries].units
        token = integer(token, "token", minimum=0, maximum=units - 1, why=f"sequence {queries} has {units} units")
        return flows.attention_flow(found, queries, token)

    @cached_property
    def html(self) -> str:
        """The page."""
        return make_page(
            self.title, self.names, self.examples, self.compared, self.differences, self.importance, self.notes
        )

    def noted(self, note: str) -> AttentionView:
        """The same with one note more at its head."""
        return replace(self, notes=(*self.notes, note))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page.

        Raises:
            ValueError: if it cannot be written there.
        """
        target = _writable(path)
        try:
            target.write_text(self.html, encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from error
        return target

    def __repr__(self) -> str:
        maps = self.examples[0].maps
        heads = sum(each.num_heads for each in maps)
        return f"{self.title}: {len(self.examples)} example(s), {len(maps)} attentions, {heads} heads"

    def _repr_html_(self) -> str:
        # Its rules and scripts are its own, so it gets a document of its own.
        return (
            '<iframe sandbox="allow-scripts" style="width:100%;height:56rem;border:0" '
            f'srcdoc="{escape(self.html, quote=True)}"></iframe>'
        )


@plain_mode()
def attention_view(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    tokenizer: Any = None,
    image: Any = None,
    *,
    compare: PreTrainedModel | None = None,
    path: str | os.PathLike[str] | None = None,
    names: Sequence[str] = ("before", "after"),
    title: str | None = None,
    importance: Tensor | None = None,
    exact_tokens: int = EXACT_TOKENS,
) -> AttentionView:
    """Look at what every head attends to, on one page.

    Args:
        model: any model that attends through Transformers' interface, whatever attention it runs; unchanged.
        inputs: of the model, a batch of up to 16 examples; padding is left out.
        tokenizer: names the tokens; a processor that has one will do. By default they are numbers of the vocabulary.
        image: the picture (of Pillow, or an array `(height, width, 3)`) that patches are laid over, in the proportions
            in which the model sees it; a list for several. By default it is made from `pixel_values`.
        compare: the model after a change (heads removed, merged, streaming, another attention, training). The same
            inputs run through both.
        path: where to write the page.
        names: what `model` and `compare` are called.
        title: of the page; by default the model's class.
        importance: `(num_layers, num_heads)`, as from `head_importance(model, ...)`, shown next to each head.
        exact_tokens: up to how many tokens maps are of tokens. Longer sequences are pooled into at most 64 blocks, and
            the strongest keys of each query are kept.

    Raises:
        TypeError: if a model is no plain `PreTrainedModel`.
        ValueError: for a model that never calls the interface, or has linear attention alone; inputs that are longer
            than the model, or hold no or too many examples; a picture that the model cannot have seen; models with
            other layers; scores of other heads; a path that cannot be written.
    """
    target = None if path is None else _writable(path)
    exact_tokens = integer(exact_tokens, "exact_tokens", minimum=1)
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"inputs is a {type(inputs).__name__}; give a mapping of model inputs, such as a tokenizer returns with "
            'return_tensors="pt"'
        )
    layers = _visible_layers(model)
    _require_scores(importance, layers)
    count = _examples_in(model, inputs)
    images = None
    if image is not None:
        pixels = inputs.get("pixel_values")
        if not isinstance(pixels, Tensor):
            raise ValueError("an image is given, and inputs have no pixel_values, of which attention would be patches")
        images = given_images(image, len(pixels))
    arguments = (inputs, tokenizer, images)
    examples = _collected(model, *arguments, count=count, exact_tokens=exact_tokens)
    if images is not None and not any(each.grid for example in examples for each in example.sequences):
        raise ValueError(
            f"an image is given, and no attention of {type(model).__name__} is over its patches alone, as far as its "
            "config says (patch_size); leave image out"
        )
    compared: list[Example] = []
    found: list[tuple[Difference, ...]] = []
    if compare is not None:
        new_layers = _visible_layers(compare)
        same_layers(layers, new_layers)
        compared = _collected(compare, *arguments, count=count, exact_tokens=exact_tokens)
        for one, other in zip(examples, compared, strict=True):
            found.append(tuple(differences((layers, one), (new_layers, other))))
    view = AttentionView(
        title or f"Attention of {type(model).__name__}",
        tuple(map(str, names))[: 1 if compare is None else 2],
        tuple(examples),
        tuple(compared),
        tuple(found),
        None if importance is None else importance.detach().float().cpu(),
        tuple(_notes(model, examples)),
    )
    if target is not None:
        view.save(target)
    return view


def _visible_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    layers = attention_layers(model)
    name = type(model).__name__
    hidden = [layer for layer in layers if layer.refusal]
    if hidden:
        raise ValueError(
            f"{hidden[0].name} of {name} does not attend through Transformers' attention interface "
            f"({hidden[0].refusal}), so its weights cannot be seen as it runs. What its heads add to the model can: "
            "head_importance(model, batches, method='contribution')"
        )
    if not any(has_softmax(layer.module) and not layer.is_empty for layer in layers):
        raise ValueError(
            f"no attention of {name} has weights (linear attention, or no head is left); look at the model before the "
            "change (hf_attnkit.restore_attention)"
        )
    return layers


def _examples_in(model: PreTrainedModel, inputs: Mapping[str, Any]) -> int:
    ids, main = inputs.get("input_ids"), inputs.get(model.main_input_name)
    pixels = inputs.get("pixel_values")
    counts = [len(each) for each in (main, pixels) if isinstance(each, Tensor) and each.dim()]
    if isinstance(ids, Tensor) and ids.dim() > 1:
        counts.append(len(ids.flatten(0, -2)))
    elif isinstance(ids, Tensor):
        raise ValueError(f"input_ids has shape {tuple(ids.shape)}; it must be (batch, tokens)")
    if not counts:
        embeddings = next((len(each) for each in inputs.values() if isinstance(each, Tensor) and each.dim() > 1), 0)
        counts = [embeddings]
    count = max(counts)
    if not 1 <= count <= MAX_EXAMPLES:
        raise ValueError(f"inputs hold {count} examples; a page shows 1 to {MAX_EXAMPLES}: give fewer rows")
    return count


def _collected(
    model: PreTrainedModel, inputs: Mapping[str, Any], tokenizer: Any, images: list[Tensor] | None, *, count: int,
    exact_tokens: int,
) -> list[Example]:  # fmt: skip
    try:
        return collect(model, inputs, tokenizer, images, count=count, exact_tokens=exact_tokens)
    except (IndexError, RuntimeError) as error:
        limit, length = _limit(model), _length(inputs)
        if limit is not None and length > limit:
            raise ValueError(
                f"inputs have {length} tokens and {type(model).__name__} has {limit} positions; cut them: "
                f"tokenizer(text, truncation=True, max_length={limit})"
            ) from error
        raise


def _notes(model: PreTrainedModel, examples: Sequence[Example]) -> list[str]:
    limit = _limit(model)
    longest = max((len(each.labels) for example in examples for each in example.sequences if each.is_text), default=0)
    if limit is not None and longest > limit:
        return [f"The input has {longest} tokens, and the model was made for {limit}."]
    return []


def _limit(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config()
    found = [value for name in _LENGTHS if isinstance(value := getattr(config, name, None), int) and value > 0]
    return max(found, default=None)


def _length(inputs: Mapping[str, Any]) -> int:
    ids = [inputs.get(name) for name in ("input_ids", "decoder_input_ids", "attention_mask")]
    return max((each.shape[-1] for each in ids if isinstance(each, Tensor) and each.dim()), default=0)


def _require_scores(importance: Tensor | None, layers: Sequence[AttentionLayer]) -> None:
    if importance is None:
        return
    shape = (len(layers), max(layer.num_heads for layer in layers))
    if not isinstance(importance, Tensor) or tuple(importance.shape) != shape:
        found = tuple(importance.shape) if isinstance(importance, Tensor) else type(importance).__name__
        raise ValueError(
            f"importance is {found}; it must be a tensor (num_layers, num_heads) = {shape}, as "
            "head_importance(model, batches) gives"
        )


def _writable(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give the name of a file in it, such as {target / 'attention.html'}")
    if not target.parent.is_dir():
        raise ValueError(f"{target} cannot be written: {target.parent} is no folder; make it first")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise _unwritable(path, PermissionError("permission denied"))
    return target


def _unwritable(path: str | os.PathLike[str], error: OSError) -> ValueError:
    return ValueError(f"{os.fspath(path)} cannot be written ({error}); give a path in a folder that you may write to")
