"""The numbers of `attention_view` against float64 attention matrices, and pooled ones against pooled matrices."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from support.every_type import small_model
from support.matrix import MATRIX, visible
from support.models import batch, build
from support.swapping import build_for, swapped
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from hf_attnkit import AttentionView, attention_view, head_statistics, prune_heads
from hf_attnkit.analysis.view import blockwise, collect
from hf_attnkit.attention.mask import Mask

LENGTHS = (13, 7, 10)
SOFTMAX = [name for name, case in MATRIX.items() if case.features is None and name != "mqa"]
# As in test_head_statistics: two runs of the model, one in float32, and weights that are at most 1.
TOLERANCE = 4 * torch.finfo(torch.float32).eps * 96**0.5 * 20


def real(mask: Tensor, row: int) -> Tensor:
    return mask[row].bool()


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row without its padding."""
    own = real(inputs["attention_mask"], row)
    found = {name: inputs[name][row][own][None] for name in ("input_ids", "position_ids") if name in inputs}
    if "decoder_input_ids" in inputs:
        found["decoder_input_ids"] = inputs["decoder_input_ids"][row][real(inputs["decoder_attention_mask"], row)][None]
    return found


def eager(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True)


def close(found: Tensor | None, wanted: Tensor, attentions: int = 2) -> None:
    """`attentions`: how many rounded ones after another."""
    assert found is not None and found.shape == wanted.shape
    # Some families' eager attention takes the softmax in float32: its rounding is within the same bound.
    assert (found.double() - wanted.double()).abs().max() <= TOLERANCE * attentions / 2


@pytest.mark.parametrize("family", ["bert", "llama", "grouped", "gpt2", "pruned"])
def test_equals_the_stock_models_eager_weights(family: str) -> None:
    """Right padding in encoders, left padding in decoders."""
    model = build("llama", "causal", 8, 2) if family == "grouped" else build("bert" if family == "pruned" else family)
    heads = [8, 8]
    if family == "pruned":
        prune_heads(model, {0: [1, 3], 1: [0]})
        heads = [6, 7]
        model.set_attn_implementation("eager")
    inputs = batch(model, LENGTHS)
    view = attention_view(model, inputs)
    statistics = head_statistics(model, [inputs])
    for row, length in enumerate(LENGTHS):
        example = view.examples[row]
        assert example.is_exact and [len(each.labels) for each in example.sequences] == [length]
        for layer, wanted in enumerate(eager(model, alone(inputs, row)).attentions):
            found = example.maps[layer]
            assert (found.layer, found.num_heads, found.sink, found.links) == (layer, heads[layer], None, None)
            close(found.weights, wanted[0])
            assert found.visible is not None and torch.equal(found.visible[0], wanted[0, 0] > 0)
    # A mean over all queries of the batch that have a choice: in a causal model, all but the first of a row.
    counts = torch.tensor([length - (family not in ("bert", "pruned")) for length in LENGTHS]).double()
    for name in ("entropy", "distance", "confidence"):
        for layer in range(2):
            each = torch.stack([getattr(example.maps[layer], name).double() for example in view.examples])
            mean = (each * (counts / counts.sum())[:, None]).sum(0)
            torch.testing.assert_close(
                mean, getattr(statistics, name)[layer, : heads[layer]].double(), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_with_cross_attention(family: str) -> None:
    model = build(family, "causal")
    inputs = batch(model, LENGTHS)
    view = attention_view(model, inputs)
    for row in range(len(LENGTHS)):
        example, wanted = view.examples[row], eager(model, alone(inputs, row))
        names = [example.sequences[each.queries].name for each in example.maps]
        encoder = [each for each, name in zip(example.maps, names, strict=True) if "encoder" in name.split(".")]
        cross = [each for each in example.maps if each.is_cross]
        decoder = [each for each in example.maps if each not in encoder and not each.is_cross]
        for own, theirs in (
            (encoder, wanted.encoder_attentions),
            (decoder, wanted.decoder_attentions),
            (cross, wanted.cross_attentions),
        ):
            for found, matrix in zip(own, theirs, strict=True):
                close(found.weights, matrix[0], attentions=2 + 2 * 3)
        assert {(each.queries, each.keys) for each in cross} == {(decoder[0].queries, encoder[0].queries)}
        assert cross[0].distance is not None and cross[0].distance.isnan().all()
        # Cross-attention comes where it runs: after the decoder's own.
        assert example.maps.index(cross[0]) == example.maps.index(decoder[0]) + 1


def recording(name: str, weights: list[Tensor]) -> str:
    """Plain softmax in the model's dtype under the pattern of a case, which keeps the weights."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        given = Mask.receive(mask, query.shape[2], key.shape[2], is_causal=not mask.triu(1).any(), device=mask.device)
        seen = visible(name, given, query.shape[1], key.shape[1])
        groups = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = (query @ keys.mT * scaling).masked_fill(~seen, -torch.inf)
        weights.append(scores.softmax(-1).nan_to_num())
        return (weights[-1] @ values).transpose(1, 2).contiguous(), None

    stock = f"recording_{list(MATRIX).index(name)}"
    AttentionInterface.register(stock, forward)
    arguments = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    AttentionMaskInterface.register(stock, lambda **given: sdpa_mask(**(given | arguments)))
    return stock


@pytest.mark.parametrize("name", SOFTMAX)
def test_every_kinds_own_weights(name: str) -> None:
    """And what it hides is marked: no query sees a key outside of the kind's pattern."""
    family = "llama" if name.startswith("streaming") else "bert"
    model = build_for(name, family)
    inputs = batch(model, (13,))
    recorded: list[Tensor] = []
    plain = copy.deepcopy(model).double()
    plain.set_attn_implementation(recording(name, recorded))
    with torch.no_grad():
        plain(**inputs)
    changed = swapped(model, name, **MATRIX[name].options)
    for found, wanted in zip(attention_view(changed, inputs).examples[0].maps, recorded, strict=True):
        close(found.weights, wanted[0])
        assert found.visible is not None
        assert torch.equal(found.visible.expand_as(wanted[0]), wanted[0] > 0)
        assert MATRIX[name].kind.name in found.kind
        streams = [4, 5, 6, 7] if name == "streaming_heads" else []  # key/value head 1 of 2
        assert list(found.streaming) == streams


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_capped_scores_and_sinks(model_type: str) -> None:
    """A sink's weight and those of the keys sum to one."""
    model = small_model(model_type)
    model.config._experts_implementation_internal = "eager"
    ids = torch.arange(3, 16)[None]
    example = attention_view(model, {"input_ids": ids}).examples[0]
    for found, wanted in zip(example.maps, eager(model, {"input_ids": ids}).attentions, strict=True):
        close(found.weights, wanted[0])
        assert (found.sink is not None) == (model_type == "gpt_oss")
        torch.testing.assert_close(found.distributions.sum(-1).double(), torch.ones(wanted.shape[1:3]).double())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_pooled_maps_are_pooled_matrices(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the queries come in several blocks; the strongest links are those of the matrix."""
    monkeypatch.setattr(collect, "POOLED_UNITS", 4)
    monkeypatch.setattr(collect, "LINKS_OF_A_QUERY", 3)
    monkeypatch.setattr(collect, "LONGEST_LINKED", 5)
    monkeypatch.setattr(blockwise, "BLOCK_NUMBERS", 8 * 13 * 3)
    model = build(family)
    inputs = batch(model, LENGTHS)
    exact, pooled = attention_view(model, inputs), attention_view(model, inputs, exact_tokens=6)
    for row, length in enumerate(LENGTHS):
        size = -(-length // 4)
        stride = -(-length // 5)
        assert not pooled.examples[row].is_exact
        for whole, found in zip(exact.examples[row].maps, pooled.examples[row].maps, strict=True):
            assert whole.weights is not None and found.weights is not None and found.links is not None
            columns = torch.stack([part.sum(-1) for part in whole.weights.split(size, -1)], -1)
            rows = torch.stack([part.mean(1) for part in columns.split(size, 1)], 1)
            torch.testing.assert_close(found.weights, rows, rtol=0, atol=1e-6)
            top = whole.weights[:, ::stride].topk(3, -1)
            torch.testing.assert_close(found.links.weights, top.values, rtol=0, atol=1e-6)
            at = whole.weights[:, ::stride].gather(-1, found.links.keys.long())
            torch.testing.assert_close(at, top.values, rtol=0, atol=1e-6)
            assert found.links.stride == stride
            for name in ("entropy", "distance", "confidence"):
                torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_a_module_that_is_called_for_each_layer() -> None:
    model = small_model("albert")
    ids = torch.arange(3, 16)[None]
    maps = attention_view(model, {"input_ids": ids}).examples[0].maps
    wanted = eager(model, {"input_ids": ids}).attentions
    assert [(each.layer, each.call) for each in maps] == [(0, call) for call in range(len(wanted))] and len(maps) > 1
    for found, matrix in zip(maps, wanted, strict=True):
        close(found.weights, matrix[0])


def test_layers_without_weights_or_heads_say_so() -> None:
    model = build("llama", "base", 8, 2)
    changed = swapped(model, "linear", layers=[0])
    view = attention_view(changed, batch(model, (13,)))
    first, second = view.examples[0].maps
    assert first.weights is None and "linear attention" in first.missing
    assert second.weights is not None and not second.missing
    emptied = prune_heads(copy.deepcopy(model), {1: range(8)})
    maps = attention_view(emptied, batch(model, (13,))).examples[0].maps
    assert maps[1].weights is None and maps[1].missing == "no head is left" and maps[1].num_heads == 0


def test_images_have_patches() -> None:
    model = build("vit")
    pixels = torch.randn(2, 3, 12, 16)
    view = attention_view(model, {"pixel_values": pixels})
    wanted = eager(model, {"pixel_values": pixels.double()}).attentions
    for row, example in enumerate(view.examples):
        (sequence,) = example.sequences
        assert sequence.grid is not None and sequence.pixels is not None
        assert (sequence.grid.rows, sequence.grid.columns, sequence.grid.first) == (3, 4, 1)
        assert sequence.labels[:2] == ("[class]", "0,0") and sequence.labels[-1] == "2,3"
        assert sequence.pixels.shape == (12, 16, 3)
        close(example.maps[0].weights, wanted[0][row])
    picture = torch.randint(0, 256, (24, 32, 3), dtype=torch.uint8)
    shown = attention_view(model, {"pixel_values": pixels[:1]}, image=picture).examples[0].sequences[0].pixels
    assert shown is not None and torch.equal(shown, picture)


def test_both_towers_of_clip() -> None:
    model = small_model("clip")
    size = model.config.vision_config.image_size
    ids = torch.arange(3, 12).repeat(2, 1)
    view = attention_view(model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, size, size)})
    assert len(view.examples) == 2
    for example in view.examples:
        text, image = sorted(example.sequences, key=lambda each: each.grid is not None)
        assert text.is_text and text.grid is None and len(text.labels) == 9
        assert image.grid is not None and not image.is_text


def test_nothing_changes() -> None:
    model = build("llama", "causal", 8, 2)
    inputs = batch(model, LENGTHS)
    before, state = copy.deepcopy(model.config.to_dict()), {n: p.clone() for n, p in model.state_dict().items()}
    model.train()
    view = attention_view(model, inputs, names=("mine",))
    assert isinstance(view, AttentionView) and view.names == ("mine",)
    assert model.training and model.config.to_dict() == before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_bad_input(tmp_path: Any) -> None:
    model = build("bert")
    inputs = batch(model, (13,))
    with pytest.raises(ValueError, match=r"inputs is a Tensor; give a mapping"):
        attention_view(model, inputs["input_ids"])  # type: ignore[arg-type]
    long = {"input_ids": torch.ones(1, 129, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"inputs have 129 tokens and BertModel has 128 positions; cut them"):
        attention_view(model, long)
    many = {"input_ids": torch.ones(17, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"inputs hold 17 examples; a page shows 1 to 16"):
        attention_view(model, many)
    with pytest.raises(ValueError, match=r"has shape \(4,\); it must be \(batch, tokens\)"):
        attention_view(model, {"input_ids": many["input_ids"][0, :4]})
    with pytest.raises(ValueError, match=r"is a folder; give the name of a file"):
        attention_view(model, inputs, path=tmp_path)
    with pytest.raises(ValueError, match=r"cannot be written: .*nowhere is no folder; make it first"):
        attention_view(model, inputs, path=tmp_path / "nowhere" / "page.html")
    with pytest.raises(ValueError, match=r"no pixel_values"):
        attention_view(model, inputs, image=torch.zeros(4, 4, 3))
    with pytest.raises(ValueError, match=r"importance is \(3, 8\); it must be .* \(2, 8\)"):
        attention_view(model, inputs, importance=torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"compare has 3 attentions and model has 2"):
        attention_view(model, inputs, compare=build("bert", num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"exact_tokens=0 must be an integer of at least 1"):
        attention_view(model, inputs, exact_tokens=0)
    vit, pixels = build("vit"), {"pixel_values": torch.randn(1, 3, 12, 16)}
    for image, message in (
        (torch.zeros(16, 16, 3), r"image is 16 x 16 and the model saw 16 x 12"),
        ([torch.zeros(12, 16, 3)] * 2, r"image holds 2 picture\(s\) and the inputs 1"),
        (torch.zeros(12, 16), None),
        (torch.full((12, 16, 3), 300.0), r"holds numbers from 300 to 300"),
        (torch.zeros(12, 16, 2), r"image has shape \(12, 16, 2\); it must be \(height, width, 3\)"),
    ):  # fmt: skip
        if message is None:
            assert attention_view(vit, pixels, image=image).examples
            continue
        with pytest.raises(ValueError, match=message):
            attention_view(vit, pixels, image=image)
    with pytest.raises(TypeError, match="image is a str; give a picture"):
        attention_view(vit, pixels, image="cat.png")


def test_models_that_have_nothing_to_see() -> None:
    deberta = small_model("deberta")
    with pytest.raises(ValueError, match=r"layer 0 .* does not attend through .* method='contribution'"):
        attention_view(deberta, {"input_ids": torch.arange(3, 16)[None]})
    linear = swapped(build("llama"), "linear")
    with pytest.raises(ValueError, match=r"no attention of LlamaModel has weights .*restore_attention"):
        attention_view(linear, batch(linear, (13,)))


def test_the_function_is_not_hidden_by_its_module() -> None:
    assert importlib.import_module("hf_attnkit.analysis.attention_view").attention_view is attention_view
