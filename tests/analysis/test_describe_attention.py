"""The report on a model's attention, and a model of a class that Transformers has never seen."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.every_type import small_model
from support.unchanged import unchanged
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

import hf_attnkit
from hf_attnkit import convert_to_gqa, head_importance, prune_heads, swap_attention
from hf_attnkit.analysis.describe_attention import AttentionReport, AttentionRow, describe_attention
from hf_attnkit.editing.cut_heads import cut_heads
from hf_attnkit.models.discovery import discover
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.models.ownership import ownerships


class OwnConfig(PreTrainedConfig):
    model_type = "seen_nowhere"


class OwnAttention(nn.Module):
    """Values before keys before queries, interleaved by component: no layout that a table would know."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.config, self.crowd, self.width = config, 4, 8
        self.everything = nn.Linear(32, 96)
        self.back = nn.Linear(32, 32)

    def forward(self, states: Tensor) -> Tensor:
        mixed = self.everything(states).view(*states.shape[:2], 3, self.width, self.crowd).permute(2, 0, 4, 1, 3)
        value, key, query = mixed
        attend = AttentionInterface().get_interface(self.config._attn_implementation, None)
        output, _ = attend(self, query, key, value, None, dropout=0.0, scaling=0.3, is_causal=True)
        return self.back(output.flatten(2))


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    _supports_sdpa = True

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(OwnAttention(config) for _ in range(2))
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor]:
        states = self.embed(input_ids)
        for block in self.blocks:
            states = states + block(states)
        return (states,)


def test_a_class_that_transformers_has_never_seen() -> None:
    model = OwnModel(OwnConfig(vocab_size=50)).eval()
    report = describe_attention(model)
    assert [row.path for row in report.rows] == ["blocks.0", "blocks.1"]
    assert all(not row.prune and not row.swap and not row.score for row in report.rows)
    assert all("does not run with fewer heads" in row.convert for row in report.rows)  # one `crowd` for all three
    discovery = discover(model)
    owned = ownerships(model, discovery.attentions)
    assert owned[0].owned["everything.weight"].of("value", 1).tolist() == list(range(1, 32, 4))
    cut = cut_heads(model, {0: [1], 1: [0, 3]}, discovery, owned)
    assert [(block.crowd, block.width, block.everything.out_features) for block in model.blocks] == [
        (3, 8, 72),
        (2, 8, 48),
    ]
    assert cut.numbers == {"blocks.0": {"crowd": 3}, "blocks.1": {"crowd": 2}}


TYPES = ("llama", "gpt_oss", "olmo2", "gptj", "deepseek_v3", "phi3", "gpt2", "bart", "t5", "clip", "albert",
         "mpnet")  # fmt: skip


def group(row: AttentionRow) -> list[int]:
    """The query heads of the first key/value head; the first one where that would be all."""
    size = row.num_heads // row.num_key_value_heads
    return list(range(size)) if size < row.num_heads else [0]


def prune(rows: list[AttentionRow], model: PreTrainedModel) -> None:
    prune_heads(model, {row.path: group(row) for row in rows})


def convert(report: AttentionReport, rows: list[AttentionRow], model: PreTrainedModel) -> None:
    numbers = [
        row.num_key_value_heads if row not in rows else next(
            (n for n in range(row.num_key_value_heads - 1, 0, -1) if row.num_key_value_heads % n == 0), 1
        )
        for row in report.rows
    ]  # fmt: skip
    convert_to_gqa(model, numbers)


def works(model: PreTrainedModel, change: Callable[[PreTrainedModel], object]) -> bool:
    try:
        change(copy.deepcopy(model))
    except ValueError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_it_says_what_the_functions_do(model_type: str) -> None:
    """Each change of each attention, by the public functions, to a real copy: what is "yes" works, else it raises."""
    model = small_model(model_type)
    inputs = discover(model).inputs  # Transformers hooks some models when they run first
    with unchanged(model):
        report = hf_attnkit.describe_attention(model)
    layers = attention_layers(model)
    assert [model.get_submodule(row.path) for row in report.rows] == [layer.module for layer in layers]

    @functools.cache  # layers that are alike have one answer
    def tried(name: str, paths: tuple[str, ...]) -> bool:
        rows = [row for row in report.rows if row.path in paths]
        change = functools.partial(convert, report) if name == "convert" else prune
        return works(model, functools.partial(change, rows))

    for row, layer in zip(report.rows, layers, strict=True):
        assert (row.num_heads, row.head_dim) == (layer.num_heads, layer.head_dim)
        alone, alike = [row], [each for each in report.rows if layers_alike(model, each, row)]
        assert works(model, lambda each, row=row: swap_attention(each, "flash", layers=[row.path])) == (not row.swap)
        for name in ("prune", "convert"):
            single, whole = (tried(name, tuple(each.path for each in rows)) for rows in (alone, alike))
            assert single == (not getattr(row, name) and name not in row.alike), name
            assert whole or name not in row.alike, name
            assert not (whole and getattr(row, name)), name
    scores = {
        name: works(model, lambda each, name=name: head_importance(each, [inputs | {"use_cache": False}], method=name))
        for name in ("entropy", "contribution", "magnitude")
    }
    for row in report.rows:
        assert all(scores.values()) == (not row.score)
        for name, possible in scores.items():
            assert possible or name in row.score.partition(":")[0] or not any(scores.values())
    if report.key_value_heads:
        convert_to_gqa(copy.deepcopy(model), report.key_value_heads[0])
    for kind in report.kinds if model_type in ("gpt_oss", "phi3") else ():
        options = {"window": 2} if kind in ("sliding_window", "local_global") else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # linear attention is another function
            swap_attention(copy.deepcopy(model), kind, **options)


def layers_alike(model: PreTrainedModel, a: AttentionRow, b: AttentionRow) -> bool:
    return type(model.get_submodule(a.path)) is type(model.get_submodule(b.path))


@pytest.mark.parametrize(
    ("model_type", "what", "reason"),
    [
        ("olmo2", "prune", "q_norm.weight"),
        ("olmo2", "convert", "q_norm.weight"),
        ("bloom", "swap", "never calls"),
        ("bloom", "score", "not by entropy"),
        ("deepseek_v3", "convert", "latent attention"),
    ],
)
def test_the_reason(model_type: str, what: str, reason: str) -> None:
    rows = describe_attention(small_model(model_type)).rows
    assert all(reason in getattr(row, what) for row in rows)


def test_numbers_that_all_layers_share() -> None:
    """Phi-3's forward reads the number of query heads from one config."""
    report = describe_attention(small_model("phi3"))
    assert all(row.alike == ("prune",) and not row.prune and not row.convert for row in report.rows)
    assert "alike: with the same numbers of heads in all layers like it" in str(report)


def test_the_table() -> None:
    text = str(describe_attention(small_model("deepseek_v3")))
    head, table, notes, lines = text.split("\n\n")
    assert head == "DeepseekV3ForCausalLM, float32"
    rows = [" ".join(line.split()) for line in table.splitlines()]
    assert rows == [
        "layer module query heads key/value heads head size sees rotary attention swap score prune convert",
        "0 model.layers.0.self_attn 4 4 16, 8 past other 8/16 sdpa yes yes yes no [1]",
        "1 model.layers.1.self_attn 4 4 16, 8 past other 8/16 sdpa yes yes yes no [1]",
    ]
    assert notes.startswith("[1] its key heads cannot be merged: kv_b_proj.weight")
    assert lines.splitlines()[0] == f"cache: {2 * 4 * (16 + 8) * 4:,} bytes per token in all layers"


def test_what_a_swapped_model_runs() -> None:
    model = swap_attention(small_model("mixtral"), {1: ("sliding_window", {"window": 3})})
    with unchanged(model):
        report = describe_attention(model)
    runs = [row.runs for row in report.rows]
    assert runs[0] == "sdpa" and runs[1].startswith("sliding_window window=3")
    assert all(not row.swap and not row.prune and not row.convert for row in report.rows), str(report)


def test_a_layer_without_heads() -> None:
    model = prune_heads(small_model("bert"), {1: range(4)})
    report = describe_attention(model)
    assert [(row.num_heads, row.num_key_value_heads) for row in report.rows] == [(4, 4), (0, 0)]
    assert "no heads left" in report.rows[1].convert and report.rows[1].prune


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "expected a transformers.PreTrainedModel, got Linear"),
        (lambda: small_model("fnet"), ValueError, "has no attention"),
        (lambda: small_model("llama").to("meta"), ValueError, "is on the meta device"),
        (lambda: quantized(small_model("llama")), ValueError, "is quantized .*load the model without quantization"),
        (lambda: small_model("vit_mae"), ValueError, "gives other outputs when it runs again"),
    ],
)
def test_what_cannot_be_looked_at(model: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        describe_attention(model())


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    weight = torch.zeros(32, 32, dtype=torch.uint8)
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(weight, requires_grad=False)
    return model


def test_hybrids() -> None:
    """Layers of state space or convolution are no attention and are left out."""
    for model_type, path in (("lfm2", "model.layers.2.self_attn"), ("granitemoehybrid", "model.layers.1.self_attn")):
        assert path in [row.path for row in describe_attention(small_model(model_type)).rows]


def test_inputs_of_the_users_own() -> None:
    model = small_model("llava")
    report = describe_attention(model, probe={"input_ids": torch.tensor([[3, 4, 5]])})
    assert "\nnot reached by the inputs: model.vision_tower\n" in str(report)
    with pytest.raises(ValueError, match="does not run on the probe"):
        describe_attention(model, probe={"input_ids": "text"})
