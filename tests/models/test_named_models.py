"""Models that people bring, by name: changed, they are what float64 says, generate, and come back from disk.

The reference is a float64 copy of the model as it was, with the removed heads' outputs zeroed or the merged heads
repeated. A float32 model may be off from it by twice what the untouched model in float32 is, and by a rounding of sums
of as many terms as its widest layer has.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.any_model import zeroed
from support.cutting import a_group
from support.every_type import small_model
from support.subprocesses import run_python
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, EncoderDecoderConfig, EncoderDecoderModel, PreTrainedModel

from hf_attnkit import convert_to_gqa, head_importance, load_pretrained, prune_heads, swap_attention
from hf_attnkit.models.discovery import Discovery, discover
from hf_attnkit.models.known import part_configs
from hf_attnkit.models.ownership import ownerships
from hf_attnkit.models.tensors import cloned, tensors_in

# By name: the projections of keys and values, where they are two.
KEYS_AND_VALUES = {
    "clip": ("k_proj", "v_proj"), "whisper": ("k_proj", "v_proj"), "llava": ("k_proj", "v_proj"),
    "encoder-decoder": ("key", "value"), "bert decoder": ("key", "value"),
    "mixtral": ("k_proj", "v_proj"), "gemma2": ("k_proj", "v_proj"),
    "gpt_oss": ("k_proj", "v_proj"), "albert": ("key", "value"),
}  # fmt: skip
NAMES = (*KEYS_AND_VALUES, "modernbert", "opt", "gpt_neox", "gpt2")
GENERATORS = ("mixtral", "gemma2", "gpt_oss", "opt", "gpt_neox", "gpt2", "llava", "whisper", "encoder-decoder")
every_model = pytest.mark.parametrize("name", NAMES)
EPS = torch.finfo(torch.float32).eps
WIDTH = 99  # the longest sum, over the vocabulary


def named(name: str) -> PreTrainedModel:
    if name not in ("encoder-decoder", "bert decoder"):
        return small_model(name)
    torch.manual_seed(0)
    one = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
           "num_attention_heads": 4, "initializer_range": 0.3}  # fmt: skip
    if name == "bert decoder":  # with cross-attention to an encoder that its caller runs
        return BertLMHeadModel(BertConfig(**one, is_decoder=True, add_cross_attention=True)).eval()
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**one), BertConfig(**one))
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    return EncoderDecoderModel(config=config).eval()


def with_inputs(name: str) -> tuple[PreTrainedModel, Discovery]:
    """A model and what was found out about it; its inputs have a padded row."""
    model = named(name)
    probe = None
    if name == "encoder-decoder":
        ids = torch.arange(3, 19).view(2, 8)
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        probe = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :5] + 9}
    found = discover(model, probe)
    if name == "gemma2":  # in float64 its eager softmax is NaN at queries that see no key
        found.inputs["attention_mask"] = torch.ones_like(found.inputs["attention_mask"])
    return model, found


def double(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float64; grouped matrix products of experts have none."""
    copied = copy.deepcopy(model).double()
    for config in part_configs(copied):
        config._experts_implementation_internal = "eager"
    return copied


def kept_weight(model: PreTrainedModel, found: Discovery) -> nn.Parameter:
    """A weight that no change of heads touches: of the last norm outside of attention."""
    inside = tuple(f"{attention.path}." for attention in found.attentions)
    names = [name for name, p in model.named_parameters() if p.dim() == 1 and re.search("norm|ln_", name.lower())]
    return model.get_parameter([name for name in names if name.endswith("weight") and not name.startswith(inside)][-1])


def results(model: PreTrainedModel, found: Discovery, context: AbstractContextManager | None = None) -> list[Tensor]:
    """Outputs at tokens, and gradients of the embeddings and of a kept weight, in float64."""
    inputs = {
        name: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in cloned(found.inputs).items()
    }
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.weight.requires_grad][-1]
    kept = kept_weight(model, found)
    mask = inputs.get("attention_mask")
    with context or nullcontext():
        outputs = [
            out[mask.bool()] if mask is not None and out.dim() == 3 and out.shape[:2] == mask.shape else out
            for out in tensors_in(model(**inputs))
        ]
        generator = torch.Generator().manual_seed(3)
        total = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs)
        assert isinstance(total, Tensor)
        gradients = torch.autograd.grad(total, [embeddings, kept])
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    return [tensor.detach().double() for tensor in (*outputs, *gradients)]


def assert_close(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert torch.isfinite(truth).all()
        allowed = 2 * (b - truth).abs().max() + WIDTH * EPS * truth.abs().max()
        assert (a - truth).abs().max() <= allowed


def groups_of(model: PreTrainedModel, found: Discovery) -> tuple[list[Any], dict[int, list[int]]]:
    """A group of heads of each attention."""
    owned = ownerships(model, found.attentions)
    return owned, {each.index: a_group(each.num_heads, owned[each.index]) for each in found.attentions}


@every_model
def test_swapped(name: str) -> None:
    model, found = with_inputs(name)
    plain, exact = results(model, found), results(double(model), found)
    assert_close(results(swap_attention(model, "flash"), found), plain, exact)


@every_model
def test_pruned_and_swapped(name: str, tmp_path: Path) -> None:
    model, found = with_inputs(name)
    owned, heads = groups_of(model, found)
    precise = double(model)
    plain = results(model, found, zeroed(model, found, owned, heads))
    exact = results(precise, found, zeroed(precise, found, owned, heads))
    whole = results(precise, found)
    assert (whole[0] - exact[0]).abs().max() > 1e-3 * exact[0].abs().max()
    probe = found.inputs if name == "encoder-decoder" else None
    prune_heads(model, heads, probe=probe)
    assert_close(results(model, found), plain, exact)
    swap_attention(model, "flash")
    want = results(model, found)
    assert_close(want, plain, exact)
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, type(model)).eval()
    assert all(torch.equal(a, b) for a, b in zip(results(again, found), want, strict=True))


def repeat_means(model: PreTrainedModel, found: Discovery, names: tuple[str, str]) -> None:
    """Give all key/value heads of each attention their mean."""
    for attention in found.attentions:
        module = model.get_submodule(attention.path)
        for linear in (getattr(module, name) for name in names):
            for parameter in linear.parameters():
                grouped = parameter.data.unflatten(0, (attention.num_key_value_heads, -1))
                parameter.data = grouped.mean(0, keepdim=True).expand_as(grouped).flatten(0, 1).contiguous()


@pytest.mark.parametrize("name", KEYS_AND_VALUES)
def test_converted(name: str, tmp_path: Path) -> None:
    model, found = with_inputs(name)
    names = KEYS_AND_VALUES[name]
    repeated, precise = copy.deepcopy(model), double(model)
    for each in (repeated, precise):
        repeat_means(each, found, names)
    plain, exact = results(repeated, found), results(precise, found)
    convert_to_gqa(model, 1, method="mean")
    want = results(model, found)
    assert_close(want, plain, exact)
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, type(model)).eval()
    assert all(torch.equal(a, b) for a, b in zip(results(again, found), want, strict=True))


def generated(model: PreTrainedModel, found: Discovery, **options: Any) -> Tensor:
    inputs = {k: v for k, v in cloned(found.inputs).items() if k not in ("use_cache", "decoder_input_ids")}
    if "attention_mask" in inputs and not model.config.is_encoder_decoder:
        inputs["attention_mask"] = inputs["attention_mask"].sort(-1).values  # padding on the left
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "disable_compile": True}
    tokens: Tensor = model.generate(**inputs, **settings, **options)
    return tokens


@pytest.mark.parametrize("name", GENERATORS)
def test_generation_with_a_cache_equals_that_without(name: str) -> None:
    """Token for token, of the pruned model and of the same with a window."""
    model, found = with_inputs(name)
    _, heads = groups_of(model, found)
    first = {index: gone for index, gone in heads.items() if index in (0, found.attentions[-1].index)}
    prune_heads(model, first, probe=found.inputs if name == "encoder-decoder" else None)
    for change in (None, "sliding_window"):
        if change:
            swap_attention(model, change, window=3)
        want = generated(model, found, use_cache=False)
        assert torch.equal(generated(model, found), want)
        if name in ("mixtral", "opt"):
            assert torch.equal(generated(model, found, cache_implementation="static"), want)


PLAIN: dict[str, Callable[[PreTrainedModel], object]] = {
    "mixtral": functools.partial(convert_to_gqa, num_key_value_heads=1),
    "gpt_oss": functools.partial(convert_to_gqa, num_key_value_heads=1),
    "gemma2": functools.partial(convert_to_gqa, num_key_value_heads=1),
}


@pytest.mark.slow
def test_plain_checkpoints_load_without_this_package(tmp_path: Path) -> None:
    """In one process where it cannot be imported: with Transformers' classes, the outputs bit for bit."""
    expected: dict[str, Mapping[str, Any]] = {}
    for name, change in PLAIN.items():
        model, found = with_inputs(name)
        change(model)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            torch.save((found.inputs, model(**cloned(found.inputs)).logits), tmp_path / f"{name}.pt")
        expected[name] = {"class": type(model).__name__}
    printed = run_python(
        """
        import sys
        sys.modules["hf_attnkit"] = None  # importing it raises
        import torch
        from pathlib import Path
        from transformers import AutoModelForCausalLM

        for path in sorted(Path(sys.argv[1]).glob("*.pt")):
            model = AutoModelForCausalLM.from_pretrained(path.with_suffix("")).eval()
            inputs, logits = torch.load(path)
            with torch.no_grad():
                print(path.stem, torch.equal(model(**inputs).logits, logits), model.config.num_key_value_heads)
        """,
        tmp_path,
    )
    assert printed.splitlines() == [f"{name} True 1" for name in sorted(PLAIN)]


def test_scores_of_a_decoder_with_cross_attention() -> None:
    """Entropies by definition, from eager attention's weights in float64; the last layers are the cross-attention."""
    model, found = with_inputs("bert decoder")
    assert [each.is_cross for each in found.attentions] == [False, False, True, True]
    inputs = {name: value for name, value in found.inputs.items() if name != "use_cache"}
    inputs |= {"input_ids": inputs["input_ids"][1:], "attention_mask": inputs["attention_mask"][1:]}
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][1:]
    scores = head_importance(model, [inputs], method="entropy", normalize=False)
    eager = double(model)
    eager.set_attn_implementation("eager")
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].double()
    output = eager(**inputs, output_attentions=True)
    weights = [*output.attentions, *output.cross_attentions]  # (1, heads, queries, keys)
    want = torch.stack([(p * torch.where(p > 0, p, 1.0).log()).sum(-1).mean((0, 2)) for p in weights])
    assert want.max() - want.min() > 0.05
    torch.testing.assert_close(scores.double(), want, rtol=0, atol=WIDTH * EPS * float(want.abs().max()))
