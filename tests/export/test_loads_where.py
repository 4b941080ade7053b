"""What loads where: each row is true of the model, and stands in the card and the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.glue_files import tiny_tokenizer
from support.models import build
from support.results import made
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_attnkit import convert_to_gqa, load_pretrained, prune_heads, swap_attention
from hf_attnkit.experiment.report.card import write_card
from hf_attnkit.experiment.report.page import report_page
from hf_attnkit.export.loads_where import loads_where


def changed(change: Callable[[PreTrainedModel], Any], family: str = "llama", head: str = "causal") -> PreTrainedModel:
    model = build(family, head)
    change(model)
    return model


CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, str]]] = {
    "ordinary": (
        lambda: changed(lambda model: convert_to_gqa(model, 2)),
        {"Transformers, from_pretrained": "yes", "load_pretrained": "yes", "ONNX file": "not tried",
         "pipeline text-classification": "no", "pipeline text-generation": "yes",
         "continuous batching, generate_batch": "yes", "PEFT on top": "yes", "GGUF": "not tried", "vLLM": "not tried"},
    ),
    "per layer": (
        lambda: changed(lambda model: convert_to_gqa(model, [4, 2])),
        {"Transformers, from_pretrained": "no", "load_pretrained": "yes", "pipeline text-generation": "yes",
         "continuous batching, generate_batch": "no", "PEFT on top": "yes", "GGUF": "no", "vLLM": "no"},
    ),
    "recorded": (
        lambda: changed(lambda model: prune_heads(model, {0: [1]}), "gpt2"),
        {"load_pretrained": "yes", "continuous batching, generate_batch": "no", "vLLM": "no"},
    ),
    "swapped": (
        lambda: changed(lambda model: swap_attention(model, "flash")),
        {"Transformers, from_pretrained": "no", "load_pretrained": "yes", "continuous batching, generate_batch": "no"},
    ),
    "random blocks": (
        lambda: changed(
            lambda model: swap_attention(model, "local_global", window=4, num_random_blocks=1), "bert", "sequence"
        ),
        {"ONNX file": "no", "pipeline text-classification": "yes", "pipeline text-generation": "no"},
    ),
    "encoder and decoder": (lambda: build("t5"), {"ONNX file": "no", "load_pretrained": "yes"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("in_memory", [True, False])
def test_the_table(name: str, in_memory: bool, tmp_path: Path) -> None:
    make, wanted = CASES[name]
    model = make()
    model.save_pretrained(tmp_path)
    if not in_memory:
        wanted = {where: "not tried" if "pipeline" in where and v == "yes" else v for where, v in wanted.items()}
    answers = loads_where(tmp_path, model if in_memory else None, tiny_tokenizer() if in_memory else None)
    found = {answer.where: answer.verdict for answer in answers}
    assert found | wanted == found
    assert all(answer.why for answer in answers)
    assert not model.training


def test_what_is_said_of_plain_transformers_is_so(tmp_path: Path) -> None:
    for name in ("ordinary", "per layer"):
        CASES[name][0]().save_pretrained(tmp_path / name)
    AutoModelForCausalLM.from_pretrained(tmp_path / "ordinary")
    with pytest.raises((ValueError, RuntimeError)):  # this process knows the name
        AutoModelForCausalLM.from_pretrained(tmp_path / "per layer")
    load_pretrained(tmp_path / "per layer")


def test_a_config_that_does_not_fit_its_weights_is_seen(tmp_path: Path) -> None:
    model = build("llama", "causal")
    model.save_pretrained(tmp_path)
    model.config.num_key_value_heads = 2
    model.config.save_pretrained(tmp_path)
    (answer,) = [one for one in loads_where(tmp_path) if one.where == "load_pretrained"]
    assert answer.verdict == "no" and "the config asks for" in answer.why


def test_an_export_says_what_reads_it(tmp_path: Path) -> None:
    build("bert", "sequence").config.save_pretrained(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    found = {answer.where: answer.verdict for answer in loads_where(tmp_path)}
    assert found["ONNX file"] == "yes" and found["load_pretrained"] == "no"


def test_adapters_alone_have_no_table(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert loads_where(tmp_path) == []


def test_card_and_report_have_the_table(tmp_path: Path) -> None:
    model = CASES["random blocks"][0]()
    model.save_pretrained(tmp_path)
    loads = [vars(answer) for answer in loads_where(tmp_path, model, tiny_tokenizer())]
    write_card(tmp_path, made(loads=loads), "a name")
    card = (tmp_path / "README.md").read_text()
    assert "## What loads it\n\n| where | | why |\n| --- | --- | --- |\n| Transformers, from_pretrained | no |" in card
    page = report_page(made(loads=loads))
    assert "What loads it" in page and "no: tried" in page
    assert "What loads it" not in report_page(made())  # of an earlier version
