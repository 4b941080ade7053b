"""Models cut by what running them told: saved and loaded bit for bit, the checkpoint telling the shapes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.any_model import TYPES, UnseenModel, any_model
from support.cutting import a_group
from support.every_type import small_model
from support.subprocesses import finished_python
from transformers import (
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CLIPTextModel,
    EncoderDecoderModel,
    PreTrainedModel,
)
from transformers.modeling_utils import LoadStateDictConfig

from hf_attnkit import convert_to_gqa, load_pretrained, prune_heads, restore_attention, swap_attention
from hf_attnkit.models.discovery import discover, run_outputs
from hf_attnkit.models.ownership import ownerships


def cut(model: PreTrainedModel, only: list[int] | None = None) -> PreTrainedModel:
    """A group of heads of each attention, or of some, removed."""
    found = discover(model)
    owned = ownerships(model, found.attentions)
    wanted = [each.index for each in found.attentions if each.num_heads > 1] if only is None else only
    return prune_heads(model, {i: a_group(found.attentions[i].num_heads, owned[i]) for i in wanted})


def assert_same(a: PreTrainedModel, b: PreTrainedModel) -> None:
    assert type(a) is type(b)
    inputs = discover(a).inputs
    with torch.no_grad():
        for x, y in zip(run_outputs(a, inputs), run_outputs(b, inputs), strict=True):
            assert torch.equal(x, y)
    assert {n: tuple(p.shape) for n, p in a.named_parameters()} == {n: tuple(p.shape) for n, p in b.named_parameters()}


def loaded(path: Path, like: PreTrainedModel) -> PreTrainedModel:
    model: PreTrainedModel = load_pretrained(path, type(like)).eval()
    return model


@pytest.mark.parametrize("model_type", TYPES)
def test_saved_and_loaded_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    """One attention cut, then, on what was loaded, all; and loaded again."""
    model = cut(any_model(model_type), [0])
    model.save_pretrained(tmp_path / "one")
    back = loaded(tmp_path / "one", model)
    assert_same(back, model)
    cut(back)
    back.save_pretrained(tmp_path / "all")
    assert_same(loaded(tmp_path / "all", model), back)


def test_the_record(tmp_path: Path) -> None:
    cut(small_model("gpt2"), [1]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attn_implementation"] == "hf_attnkit" and config["n_head"] == 4
    record = config["hf_attnkit"]
    assert record["version"] == 2 and list(record["heads"]["layers"]) == ["transformer.h.1.attn"]
    layer = record["heads"]["layers"]["transformer.h.1.attn"]
    assert layer["heads"] == [3, 3] and layer["numbers"]["num_heads"] == 3
    config["hf_attnkit"]["version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 99, and this hf_attnkit knows up to 2"):
        load_pretrained(tmp_path)


def test_in_shards_dtypes_and_on_a_device(tmp_path: Path) -> None:
    model = cut(small_model("opt"), [0])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(loaded(tmp_path, model), model)
    assert_same(load_pretrained(tmp_path, device_map="cpu").eval(), model)
    half = load_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(half.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b.to(torch.bfloat16)), name


def test_without_its_head(tmp_path: Path) -> None:
    model = cut(small_model("opt"), [0])
    model.save_pretrained(tmp_path)
    base = load_pretrained(tmp_path, AutoModel).eval()
    assert type(base) is type(model.model)
    ids = torch.arange(6)[None] + 3
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    cut(base).save_pretrained(tmp_path / "base")
    assert_same(loaded(tmp_path / "base", base), base)


def test_one_number_for_all_layers_needs_no_package(tmp_path: Path) -> None:
    """Where Transformers' own fields can say it, its own classes load it, and the record is not needed."""
    for change in (cut, lambda model: convert_to_gqa(model, 1)):
        model = change(small_model("mixtral"))
        assert model.config.hf_attnkit == {"version": 2, "heads": {}} and not hasattr(
            model.config, "attn_implementation"
        )
        model.save_pretrained(tmp_path, safe_serialization=True)
        assert_same(type(model).from_pretrained(tmp_path).eval(), model)


@pytest.mark.slow
def test_plain_transformers_refuses_it_by_our_name(tmp_path: Path) -> None:
    cut(small_model("gpt2"), [0]).save_pretrained(tmp_path)
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    run = finished_python(code, tmp_path)
    assert run.returncode and 'ValueError: Specified `attn_implementation="hf_attnkit"`' in run.stderr, run.stderr


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_a_part_cut_by_itself_comes_back_with_the_whole(tower: str, tmp_path: Path) -> None:
    model = small_model("clip")
    cut(getattr(model, tower), [0])
    model.save_pretrained(tmp_path / "whole")
    assert_same(loaded(tmp_path / "whole", model), model)
    getattr(model, tower).save_pretrained(tmp_path / "part")
    assert_same(loaded(tmp_path / "part", getattr(model, tower)), getattr(model, tower))


def test_a_part_of_a_cut_whole_comes_back_alone(tmp_path: Path) -> None:
    model = cut(small_model("clip"))
    model.text_model.save_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path, CLIPTextModel).eval(), model.text_model)


def test_llava_s_language_model(tmp_path: Path) -> None:
    model = small_model("llava")
    cut(model.model.language_model, [0])
    model.save_pretrained(tmp_path)
    assert_same(loaded(tmp_path, model), model)


def bert_to_bert() -> EncoderDecoderModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "initializer_range": 0.3}  # fmt: skip
    decoder = BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel(encoder=BertModel(BertConfig(**sizes)), decoder=BertLMHeadModel(decoder))
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model.eval()


def test_encoder_decoder(tmp_path: Path) -> None:
    model = cut(bert_to_bert())
    model.save_pretrained(tmp_path)
    assert_same(loaded(tmp_path, model), model)


def test_swapped_after_the_cut(tmp_path: Path) -> None:
    """The one key holds both, and each goes by itself."""
    model = cut(small_model("opt"), [0])
    assert "heads" in model.config.hf_attnkit
    stays = copy.deepcopy(model.config.hf_attnkit)
    try:
        swap_attention(model, "sliding_window", window=4)
    except ValueError:
        assert model.config.hf_attnkit == stays
        return
    model.save_pretrained(tmp_path)
    back = loaded(tmp_path, model)
    assert_same(back, model)
    restore_attention(back)
    assert back.config.hf_attnkit["heads"] == stays["heads"] and back.config.attn_implementation == "hf_attnkit"


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    cut(small_model("gpt2"), [0]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["n_embd"], config["n_head"] = 16, 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"in the checkpoint and .* in the model"):
        load_pretrained(tmp_path)


def test_a_class_of_the_user_s_own_saves_what_it_needs(tmp_path: Path) -> None:
    model = any_model("never seen")
    assert isinstance(model, UnseenModel)
    convert_to_gqa(model, 1)
    model.save_pretrained(tmp_path)
    assert_same(loaded(tmp_path, model), model)


@pytest.mark.parametrize("change", ["other arguments", "no conversions"])
def test_another_way_of_loading_is_refused_in_a_sentence(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is relied on of Transformers is not promised by it."""
    model = prune_heads(small_model("mixtral"), {0: [0, 1]})
    model.save_pretrained(tmp_path)
    real = PreTrainedModel._load_pretrained_model

    def load(model: PreTrainedModel, state_dict: Any, weights: Any, load_config: Any) -> Any:
        raise AssertionError("nothing may be loaded")

    def without(model: PreTrainedModel, state_dict: Any, checkpoint_files: Any, load_config: Any) -> Any:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(
        PreTrainedModel, "_load_pretrained_model", staticmethod(load if change == "other arguments" else without)
    )
    if change != "other arguments":
        monkeypatch.delattr(LoadStateDictConfig, "weight_mapping", raising=False)
        monkeypatch.setattr(LoadStateDictConfig, "__init__", lambda self, **options: None)
    with pytest.raises(RuntimeError, match=r"loads weights in another way .* install a later hf_attnkit"):
        load_pretrained(tmp_path)
    monkeypatch.undo()
    assert PreTrainedModel._load_pretrained_model is real
    load_pretrained(tmp_path)
