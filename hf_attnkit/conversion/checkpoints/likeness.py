"""A small model of a checkpoint's class that tells where heads lie in the large one, of which no weight is read.

Rows that belong to a head depend on how the attention is built, and not on how many layers there are or how large the
vocabulary is; nor, where a config says the size of a head by itself, on how wide its inputs are. So the class is built
with few layers, small vocabulary and small feed-forward parts, its heads of full size and random, and looked at as any
model is. Each attention of the large model is then like one of the small model's, with the same class, shapes and
settings:

    model.layers.0.self_attn  ...  model.layers.79.self_attn      large, on the meta device
    model.layers.0.self_attn, model.layers.1.self_attn            small

Where two layers do not show all kinds that there are, more are built.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attnkit.conversion.plan import plan_gqa
from hf_attnkit.editing.head_record import KEY, VERSION
from hf_attnkit.loading import random_model
from hf_attnkit.models import known
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.layers import AttentionLayer, projected_layers
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.whole import configs_in

DEPTHS = (2, 4, 8)
_DEPTH = re.compile(r"(num_|n_)?((encoder|decoder|hidden)_)?layers?|(decoder_|encoder_)?num_hidden_layers")
_WIDE = re.compile(r"(.*_)?intermediate_size|(.*_)?ffn_dim|n_inner|d_ff|ffn_hidden_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Of a module: what says which one it is, or what it is doing, and not what it does.
_OF_EACH = re.compile(r"layer_?(idx|id|index|number)|idx|index|training")
VOCABULARY, WIDTH = 128, 64


@dataclass(frozen=True)
class Likeness:
    """An attention of the large model, and the one of the small model that it is like.

    Attributes:
        path: of the module that attends, in the large model.
        mate: in the small model.
        owned: what belongs to the mate's heads.
        layer: the mate's projections, numbered as the large model's.
        output: path of the output projection in the large model, or `None`.
    """

    path: str
    mate: Attention
    owned: Ownership
    layer: AttentionLayer
    output: str | None


class SmallModel:
    """The small model of a large one that is on the meta device.

    Attributes:
        likenesses: one for each attention of the large model, in calling order.

    Raises:
        ValueError: if no small one has attentions that all of the large model's are like.
    """

    def __init__(self, large: PreTrainedModel) -> None:
        reason = ""
        for is_narrow, depth in itertools.product((True, False), (*DEPTHS, None)):
            try:
                self._small = random_model(_shrunk(large.config, depth, is_narrow)).eval()
                if missing := _classes(large) - _classes(self._small):
                    raise ValueError(f"{depth} layers have no {', '.join(sorted(missing))}")
                self.likenesses = _likenesses(large, self._small)
                break
            except Exception as error:  # whatever a class says to such sizes; the next are nearer to its own
                reason = str(error)
        else:
            raise ValueError(
                f"no small {type(large).__name__} tells where its heads lie ({reason[:300]}); load the checkpoint with "
                "hf_attnkit.load_pretrained, call convert_to_gqa and save it"
            )
        self._large = large

    def converted_config(self, numbers: Sequence[int]) -> PreTrainedConfig:
        """The large model's config, with these numbers of key/value heads, as the converted model would save it.

        The small model is converted: as a whole where all layers change to one number, which Transformers' own fields
        may say, else one layer at a time.

        Raises:
            ValueError: if the small model does not run with such a number.
        """
        config = copy.deepcopy(self._large.config)
        changed = [
            (one, number) for one, number in zip(self.likenesses, numbers, strict=True)
            if number < one.layer.num_key_value_heads
        ]  # fmt: skip
        whole = len(changed) == len(numbers) and len(set(numbers)) == 1
        converted: dict[tuple[int | None, int], PreTrainedModel] = {}
        for one, number in changed:
            key = None if whole else one.mate.index, number
            if key not in converted:
                converted[key] = self._converted(*key)
            self._carry_over(config, converted[key].config, one)
        return config

    def _converted(self, index: int | None, number: int) -> PreTrainedModel:
        """The small model with this number in one attention, or in all."""
        small = copy.deepcopy(self._small)
        present = [own.num_key_value_heads for own in known.owned(self._small)]
        wanted = [number if index in (None, each) else old for each, old in enumerate(present)]
        return plan_gqa(small, wanted, method="first").apply()

    def _carry_over(self, config: PreTrainedConfig, after: PreTrainedConfig, one: Likeness) -> None:
        """Write what the conversion of a layer changed in the small model's config into the large one's."""
        for large, old, new in zip(
            list(configs_in(config)), list(configs_in(self._small.config)), list(configs_in(after)), strict=True
        ):
            said = getattr(new, KEY, None)
            for name, value in vars(new).items():
                if name == KEY or isinstance(value, PreTrainedConfig) or name.startswith("_"):
                    continue
                # The size of a head is said where the number of heads no longer implies it.
                is_said = name == "head_dim" and said == {"version": VERSION, "heads": {}} and vars(large)[name] is None
                if is_said or name not in vars(old) or vars(old)[name] != value:
                    setattr(large, name, copy.deepcopy(value))
            if said is None:
                continue
            heads = dict(said.get("heads", {}))
            layers = (getattr(large, KEY, None) or {}).get("heads", {}).get("layers", {})
            for path, entry in heads.pop("layers", {}).items():
                if f".{one.mate.path}".endswith(f".{path}"):
                    prefix = one.mate.path.removesuffix(path)
                    layers = layers | {one.path.removeprefix(prefix): self._placed(entry, one, prefix)}
            setattr(large, KEY, said | {"heads": heads | ({"layers": layers} if layers else {})})

    def _placed(self, entry: dict[str, Any], one: Likeness, prefix: str) -> dict[str, Any]:
        """What is recorded of the mate, of the attention of the large model."""
        if "output" not in entry:
            return copy.deepcopy(entry)
        moved = _moved(prefix + entry["output"], one.mate.path, one.path).removeprefix(prefix)
        return copy.deepcopy(entry) | {"output": moved}


def _shrunk(config: PreTrainedConfig, depth: int | None, is_narrow: bool) -> PreTrainedConfig:
    """A copy with so many layers, a small vocabulary and small feed-forward parts; heads as they are.

    Args:
        is_narrow: whether hidden states are small too.

    Raises:
        ValueError: if they cannot be, because their size decides that of a head.
    """
    found = copy.deepcopy(config)
    if is_narrow and True not in [_narrowed(each) for each in configs_in(found)]:
        raise ValueError(f"{type(config).__name__} has no size of heads of its own")
    for each in configs_in(found):
        each.dtype = torch.float32  # else a class whose parts are built by their configs has several
        names = [n for n, v in _numbers(each) if _DEPTH.fullmatch(n) and depth is not None and v > depth]
        deep = {getattr(each, name) for name in names}
        for name in names:
            setattr(each, name, depth)
        for name, value in list(vars(each).items()):
            if isinstance(value, list) and len(value) in deep:
                setattr(each, name, value[:depth])
        for name, value in _numbers(each):
            if _WIDE.fullmatch(name):
                setattr(each, name, min(value, WIDTH))
            elif name in _EXPERTS:
                used = max(
                    (v for n, v in _numbers(each) if n.endswith(("experts_per_tok", "topk", "moe_k"))), default=1
                )
                setattr(each, name, min(value, max(4, used)))
            elif name == "vocab_size":
                setattr(each, name, min(value, VOCABULARY))
        for name, value in list(vars(each).items()):
            if name.endswith("token_id") and value is not None:
                setattr(each, name, 1)
    return found


def _narrowed(config: PreTrainedConfig) -> bool:
    """Give a config small hidden states, if it says the size of a head by itself; whether it does."""
    heads, size = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if type(heads) is not int or type(size) is not int or not (hasattr(config, "head_dim") or hasattr(config, "d_kv")):
        return False
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = size // heads
    config.hidden_size = min(size, heads * max(WIDTH // heads, 1))  # some configs want a multiple
    return True


def _numbers(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    return ((name, value) for name, value in list(vars(config).items()) if type(value) is int)


def _classes(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def _likenesses(large: PreTrainedModel, small: PreTrainedModel) -> list[Likeness]:
    """Those of all attentions of the large model.

    Raises:
        ValueError: if one is like none of the small model's.
    """
    widths = {
        getattr(a, "hidden_size", None): getattr(b, "hidden_size", None)
        for a, b in zip(configs_in(large.config), configs_in(small.config), strict=True)
    }
    layers, owned = projected_layers(small), known.owned(small)
    attentions = known.known(small).attentions
    mates = list(zip(attentions, owned, layers, strict=True))
    order = {re.sub(r"\d+", "*", each.path): number for number, each in reversed(list(enumerate(attentions)))}
    stacks = {_stack(each.path): number for number, each in reversed(list(enumerate(attentions)))}
    found: list[tuple[tuple[bool, int, list[int], int], str, Attention, Ownership, AttentionLayer]] = []
    for path, module in large.named_modules():
        pattern = re.sub(r"\d+", "*", path)
        if pattern not in order:
            continue
        alike = [
            mate
            for mate in mates
            if re.sub(r"\d+", "*", mate[0].path) == pattern and _alike(module, mate[0].module, mate[1], widths)
        ]
        if not alike:
            raise ValueError(f"{path} is like no attention of a model with fewer layers")
        numbers = [int(number) for number in re.findall(r"\d+", path)]
        place = alike[0][0].is_cross, stacks[_stack(path)], numbers, order[pattern]
        found.append((place, path, *alike[0]))
    result = []
    for index, (_, path, mate, own, layer) in enumerate(sorted(found, key=lambda each: each[0])):
        output = None if own.output is None else _moved(own.output, mate.path, path)
        inside = {id(part): name for name, part in mate.module.named_modules()}
        parts = {
            role: large.get_submodule(f"{path}.{inside[id(part)]}")
            for role in ("query", "key", "value")
            if (part := getattr(layer, role)) is not None
        }
        if output is not None and layer.output is not None:
            parts["output"] = large.get_submodule(output)
        numbered = replace(layer, index=index, module=large.get_submodule(path), name=f"layer {index} ({path})",
                           saved_as=path, **parts)  # fmt: skip
        result.append(Likeness(path, mate, own, numbered, output))
    return result


def _stack(path: str) -> str:
    return re.split(r"\d+", path)[0]


def _alike(large: nn.Module, small: nn.Module, owned: Ownership, widths: dict[Any, Any]) -> bool:
    """Whether heads lie alike in both: same class and settings, and shapes but for the width of hidden states."""

    def same(a: Any, b: Any) -> bool:
        return bool(a == b) or (type(a) is int and widths.get(a, a) == b)

    if type(large).__name__ != type(small).__name__:
        return False
    ours, theirs = dict(large.named_parameters()), dict(small.named_parameters())
    if ours.keys() != theirs.keys() or any(ours[n].dim() != p.dim() for n, p in theirs.items()):
        return False
    if any(ours[name].shape[one.dim] != theirs[name].shape[one.dim] for name, one in owned.owned.items()
           if name in theirs):  # fmt: skip
        return False
    sizes = all(same(a, b) for name in ours for a, b in zip(ours[name].shape, theirs[name].shape, strict=True))
    a, b = _settings(large), _settings(small)
    return sizes and a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers and words on a module that say what it does."""
    kinds = (int, float, bool, str, type(None))
    return {name: value for name, value in vars(module).items()
            if isinstance(value, kinds) and not name.startswith("_") and not _OF_EACH.fullmatch(name)}  # fmt: skip


def _moved(path: str, mate: str, place: str) -> str:
    """The path in the large model of what is at `path` in the small one, next to an attention that is `mate` there."""
    parts, theirs, ours = path.split("."), mate.split("."), place.split(".")
    for i, part in enumerate(parts):
        if i >= len(theirs) or theirs[i] != part:
            break
        parts[i] = ours[i]
    return ".".join(parts)


def module_of(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A copy of a matrix product on the meta device with this weight and bias; perhaps a Conv1D."""
    found: Any = copy.deepcopy(module)
    found._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        found._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    return cast(nn.Linear, found)
