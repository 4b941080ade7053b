"""Swapped attention in models that no table knows, against float64, with saved and loaded copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.every_type import small_model
from support.unchanged import unchanged
from support.windows import windows
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedModel,
)

import hf_attnkit
from hf_attnkit import (
    attention_backends,
    head_importance,
    head_statistics,
    load_pretrained,
    restore_attention,
    swap_attention,
)
from hf_attnkit.attention import proof
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.models import known
from hf_attnkit.models.interface import Call
from hf_attnkit.models.layers import attention_layers

TYPES = ("clip", "whisper", "llava", "mixtral", "gemma2", "gpt_oss", "modernbert", "albert", "opt", "gpt_neox")


def encoder_decoder() -> PreTrainedModel:
    torch.manual_seed(0)
    one = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 4, "initializer_range": 0.3}  # fmt: skip
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**one), BertConfig(**one))
    return EncoderDecoderModel(config=config).eval()


def double(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float64; grouped matrix products of experts have none."""
    copied = copy.deepcopy(model).double()
    for config in known.part_configs(copied):
        config._experts_implementation_internal = "eager"
    return copied


def make(model_type: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model, and inputs with a padded row."""
    if model_type == "encoder-decoder":
        ids = torch.arange(3, 19).view(2, 8)
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        return encoder_decoder(), {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :5] + 9}
    model = small_model(model_type)
    with torch.no_grad():  # models at their start are nearly linear; attention is to matter
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    inputs = dict(known.known(model).discovery.inputs)
    if model_type == "gemma2":  # in float64 its eager softmax is NaN at queries that see no key
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    return model, inputs


@torch.no_grad()
def run(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    def cast(value: Any) -> Any:
        return value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    output = model(**{name: cast(value) for name, value in inputs.items()})
    names = ("logits", "logits_per_image", "last_hidden_state")
    found = next(output[name] for name in names if output.get(name) is not None)
    mask = inputs.get("attention_mask")
    if mask is not None and found.dim() == 3 and found.shape[:2] == mask.shape:
        found = found[mask.bool()]
    return found.double()


def assert_close(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Ours is off from float64 by at most twice what Transformers' own is, and a rounding of the result."""
    eps = torch.finfo(torch.float32).eps
    assert torch.isfinite(exact).all()
    allowed = 2 * (plain - exact).abs().max() + 16 * eps * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed


@pytest.mark.parametrize("model_type", [*TYPES, "encoder-decoder"])
def test_exact_kinds(model_type: str) -> None:
    model, inputs = make(model_type)
    plain, exact = run(model, inputs), run(double(model), inputs)
    with unchanged(model):
        for kind in ("flash", "gqa"):
            swap_attention(model, kind)
            assert_close(run(model, inputs), plain, exact)
        restore_attention(model)
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("model_type", [*TYPES, "encoder-decoder"])
def test_windows(model_type: str) -> None:
    model, inputs = make(model_type)
    with windows(model, 2):
        plain = run(model, inputs)
    precise = double(model)
    with windows(precise, 2):
        exact = run(precise, inputs)
    whole = run(model, inputs)
    swap_attention(model, "sliding_window", window=2)
    assert_close(run(model, inputs), plain, exact)
    assert (plain - whole).abs().max() > 1e-4 * whole.abs().max()


@pytest.mark.parametrize("model_type", [*TYPES, "encoder-decoder"])
def test_saved_and_loaded(model_type: str, tmp_path: Path) -> None:
    model, inputs = make(model_type)
    swap_attention(model, "sliding_window", window=2)
    want = run(model, inputs)
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, type(model)).eval()
    assert torch.equal(run(again, inputs), want)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(run(load_pretrained(tmp_path / "again", type(model)).eval(), inputs), want)
    with pytest.raises(ValueError, match="hf_attnkit"):  # Transformers alone does not run it without the swap
        run(type(model).from_pretrained(tmp_path).eval(), inputs)
    restore_attention(again)
    assert not any(hasattr(config, "hf_attnkit") for config in known.part_configs(again))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_that_is_swapped_alone(part: str, tmp_path: Path) -> None:
    model, inputs = make("encoder-decoder")
    stock = run(model, inputs)
    swap_attention(getattr(model, part), "sliding_window", window=2)
    want = run(model, inputs)
    assert (want - stock).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(run(load_pretrained(tmp_path).eval(), inputs), want)
    with pytest.raises(ValueError, match="hf_attnkit"):
        run(EncoderDecoderModel.from_pretrained(tmp_path).eval(), inputs)
    restore_attention(getattr(model, part))
    assert torch.equal(run(model, inputs), stock)
    model.save_pretrained(tmp_path / "restored")
    assert torch.equal(run(EncoderDecoderModel.from_pretrained(tmp_path / "restored").eval(), inputs), stock)


def test_a_tower_that_is_saved_alone(tmp_path: Path) -> None:
    model, _ = make("clip")
    swap_attention(model, "sliding_window", window=2)
    tower = model.vision_model
    inputs = {"pixel_values": known.known(model).discovery.inputs["pixel_values"]}
    want = tower(**inputs).last_hidden_state
    tower.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, type(tower)).eval()
    assert torch.equal(again(**inputs).last_hidden_state, want)


def test_paths_and_numbers() -> None:
    model, inputs = make("mixtral")
    path = "model.layers.1.self_attn"
    by_path, by_number = copy.deepcopy(model), copy.deepcopy(model)
    swap_attention(by_path, {path: ("sliding_window", {"window": 2})})
    swap_attention(by_number, "sliding_window", window=2, layers=[1])
    assert torch.equal(run(by_path, inputs), run(by_number, inputs))
    assert by_path.config.hf_attnkit == by_number.config.hf_attnkit == {
        "version": 2, "base": "sdpa", "layers": {path: ["sliding_window", {"window": 2}]}
    }  # fmt: skip
    swap_attention(by_path, "flash", layers=[path])
    assert by_path.config.hf_attnkit["layers"] == {path: ["flash", {}]}
    with unchanged(model), pytest.raises(ValueError, match=r"layer 'model\.layers\.1' is no attention"):
        swap_attention(model, {"model.layers.1": "flash"})
    found = attention_backends(by_path, **inputs)
    assert found[0] == ("sdpa", "not swapped") and found[1][0] != "flash"


def test_a_whole_some_of_whose_implementations_differ() -> None:
    model, inputs = make("llava")
    model.model.vision_tower.set_attn_implementation("eager")
    stock = run(model, inputs)
    with unchanged(model):
        swap_attention(model, "flash")
        restore_attention(model)
    assert torch.equal(run(model, inputs), stock)


@pytest.mark.parametrize("model_type", ["mixtral", "modernbert", "albert", "opt", "whisper", "clip", "encoder-decoder"])
def test_scores(model_type: str) -> None:
    model, inputs = make(model_type)
    shape = len(attention_layers(model)), max(layer.num_heads for layer in attention_layers(model))
    with unchanged(model):
        for method in ("entropy", "confidence", "contribution", "magnitude", "random"):
            scores = head_importance(model, [inputs], method=method)
            assert scores.shape == shape and scores[~scores.isnan()].isfinite().all()
        assert head_statistics(model, [inputs]).entropy.shape == shape


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "starcoder2", "bloom", "falcon", "gptj"])
def test_scores_of_the_loss(model_type: str) -> None:
    """The gradient by a gate is the derivative of the loss, in float32, by a factor of the head's output."""
    model = double(small_model(model_type))
    inputs = {k: v for k, v in known.known(model).discovery.inputs.items() if k != "use_cache"}
    inputs |= {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    one = {name: value[1:] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    found = head_importance(model, [one], method="gradient")
    layer, step = attention_layers(model)[0], 0.03
    for head in range(layer.num_heads):
        losses = []
        for factor in (1 - step, 1 + step):

            def scale(module: nn.Module, args: Any, head: int = head, factor: float = factor) -> Any:
                heads = args[0].unflatten(-1, (layer.num_heads, -1)).clone()
                heads[..., head, :] *= factor
                return heads.flatten(-2), *args[1:]

            handle = layer.output.register_forward_pre_hook(scale)
            with torch.no_grad():
                losses.append(float(model(**one).loss))
            handle.remove()
        expected = abs(losses[1] - losses[0]) / (2 * step)
        assert found[0, head].item() == pytest.approx(expected, rel=1e-2, abs=2e-5)


class NovelConfig(PreTrainedConfig):
    model_type = "novel_words"

    def __init__(self, width: int = 24, crowd: int = 3, **kwargs: Any) -> None:
        self.width, self.crowd, self.vocab_size = width, crowd, 50
        super().__init__(**kwargs)


class NovelAttention(nn.Module):
    def __init__(self, config: NovelConfig) -> None:
        super().__init__()
        self.config, self.is_causal = config, False
        self.mix, self.back = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (self.config.crowd, 3, -1)).permute(3, 0, 2, 1, 4)
        attend = AttentionInterface().get_interface(self.config._attn_implementation, None)
        return self.back(attend(self, q, k, v, None, scaling=0.5, dropout=0.0)[0].flatten(2))


class NovelModel(PreTrainedModel):
    config_class = NovelConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: NovelConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(NovelAttention(config) for _ in range(2))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = self.words(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return {"last_hidden_state": x}


def novel() -> NovelModel:
    torch.manual_seed(0)
    model = NovelModel(NovelConfig(attn_implementation="sdpa")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def test_a_class_that_was_never_seen(tmp_path: Path) -> None:
    model, inputs = novel(), {"input_ids": torch.arange(14).view(2, 7)}
    plain, exact = run(model, inputs), run(copy.deepcopy(model).double(), inputs)
    swap_attention(model, "flash")
    assert_close(run(model, inputs), plain, exact)
    swap_attention(model, "sliding_window", window=2)
    want = run(model, inputs)
    assert (want - plain).abs().max() > 1e-3
    assert head_importance(model, [inputs], method="entropy_contribution").shape == (2, 3)


def test_inputs_that_cannot_be_made() -> None:
    class Picky(NovelModel):
        def forward(self, notes: Tensor, input_ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return super().forward(input_ids + notes)

    torch.manual_seed(0)
    model = Picky(NovelConfig(attn_implementation="sdpa")).eval()
    with unchanged(model), pytest.raises(ValueError, match=r"takes notes, input_ids.*set_probe"):
        swap_attention(model, "flash")
    hf_attnkit.set_probe(model, {"notes": torch.zeros(1, 3, dtype=torch.long), "input_ids": torch.ones(1, 3).long()})
    swap_attention(model, "flash")
    assert "hf_attnkit" in model.config.to_dict()


def test_the_proof_finds_another_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that computes something else than the pattern that it says."""
    model, _ = make("mixtral")
    real = SlidingWindowAttention.attention

    def wider(self: Any, *args: Any, **kwargs: Any) -> Any:
        return real(SlidingWindowAttention(self.window + 1), *args, **kwargs)

    monkeypatch.setattr(SlidingWindowAttention, "attention", wider)
    message = r"layer 0 \(model.layers.0.self_attn\) runs 'sliding_window' and differs from plain softmax under its"
    with unchanged(model), pytest.raises(ValueError, match=message):
        swap_attention(model, "sliding_window", window=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_proof_sees_in_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rounding of 16 bits is larger than the fault; the comparison in float32 sees it."""
    model = make("mixtral")[0].to(dtype)
    swap_attention(copy.deepcopy(model), "sliding_window", window=2)
    real = SlidingWindowAttention.attention

    def off(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = real(self, *args, **kwargs)
        return output * (1 + 1e-3), weights

    monkeypatch.setattr(SlidingWindowAttention, "attention", off)
    with unchanged(model), pytest.raises(ValueError, match=r"more than the .* that rounding explains"):
        swap_attention(model, "sliding_window", window=2)


def test_the_bound_follows_from_the_dtype() -> None:
    query = torch.ones(1, 1, 2, 4)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        call = Call(nn.Linear(1, 1), *(query.to(dtype),) * 3, None, {"scaling": 0.5}, lambda: None)
        assert proof.rounding_bound(call) == pytest.approx(16 * torch.finfo(dtype).eps * (1 + 2) * 1)
