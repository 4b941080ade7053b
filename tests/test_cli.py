"""`hf-attnkit`: what the commands print, write and refuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.every_type import small_model
from support.models import build
from transformers import LlamaForCausalLM
from transformers.utils import logging

from hf_attnkit import (
    cache_bytes_per_token,
    convert_to_gqa,
    describe_attention,
    load_pretrained,
    prune_heads,
    swap_attention,
)
from hf_attnkit.analysis import weightless
from hf_attnkit.cli import main
from hf_attnkit.common.version import __version__
from hf_attnkit.editing.head_record import record_of
from hf_attnkit.models.layers import attention_layers

OLD = Path(__file__).parent / "data" / "old_checkpoints"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what saving a model printed
        code: Any = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        return (code, *capsys.readouterr())

    return run


def saved(path: Path, family: str, head: str, **options: Any) -> Path:
    build(family, head, **options).save_pretrained(path)
    return path


CHANGES = {"swap": "yes", "score": "yes", "prune": "yes", "convert": "yes"}


def cells(printed: str) -> list[dict[str, str]]:
    """The rows of the table of layers, by column."""
    header, *rows = printed.split("\n\n")[1].splitlines()
    starts = [match.start() for match in re.finditer(r"(?<=  )\S|^\S", header)]
    parts = list(zip(starts, [*starts[1:], None], strict=True))
    return [{header[a:b].strip(): row[a:b].strip() for a, b in parts} for row in rows]


def test_inspect_says_what_every_layer_has_and_runs(tmp_path: Path, run: Any) -> None:
    model = build("llama", "causal", heads=8, kv_heads=4).bfloat16()
    prune_heads(model, {1: [0, 1]})
    swap_attention(model, {1: ("sliding_window", {"window": 7})})
    model.save_pretrained(tmp_path)
    code, printed, errors = run("inspect", tmp_path)
    assert (code, errors) == (0, "")
    assert printed.startswith("LlamaForCausalLM, bfloat16\n")
    first, second = cells(printed)
    assert first == CHANGES | {
        "layer": "0", "module": "model.layers.0.self_attn", "query heads": "8", "key/value heads": "4",
        "head size": "8", "sees": "past", "rotary": "half 8/8", "attention": "sdpa",
    }  # fmt: skip
    assert [second[name] for name in ("query heads", "key/value heads")] == ["6", "3"]
    assert second["attention"].startswith("sliding_window window=7")
    assert f"cache: {cache_bytes_per_token(model):,} bytes per token" in printed
    assert printed.endswith("key/value heads to convert to: 1\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (lambda: build("bert", "sequence"), 2),
        (lambda: build("gpt2", "causal"), 2),
        (lambda: build("bart", "causal"), 8),
        (lambda: small_model("clip"), 4),
        (lambda: small_model("mixtral").half(), 2),
        (lambda: prune_heads(small_model("opt"), {0: [1]}), 2),
        (lambda: prune_heads(build("bert", "sequence"), {0: range(8)}), 2),
    ],
    ids=["bert", "gpt2", "bart", "clip", "mixtral", "pruned, numbers recorded", "a layer without heads"],
)
def test_inspect_says_of_the_config_what_the_model_says(make: Any, layers: int, tmp_path: Path, run: Any) -> None:
    """The same table as of the model itself, though no weights are read."""
    model = make()
    model.save_pretrained(tmp_path)
    code, printed, errors = run("inspect", tmp_path)
    assert (code, errors) == (0, "")
    loaded = load_pretrained(tmp_path)
    assert printed == f"{describe_attention(loaded)}\n"
    assert len(cells(printed)) == layers
    assert f"{cache_bytes_per_token(loaded):,} bytes per token" in printed
    if not record_of(model.config):  # else the shapes are those of the weights
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
        assert run("inspect", tmp_path)[1] == printed


def test_inspect_runs_few_layers_and_shows_all(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each list the first layers, up to the first of its last sort: windows and full attention alternate."""
    config = small_model("gemma2").config
    config.num_hidden_layers, config.layer_types = 7, ["sliding_attention", "full_attention"] * 3 + ["full_attention"]
    config.architectures = ["Gemma2ForCausalLM"]
    config.save_pretrained(tmp_path / "gemma2")
    seen = []

    def counted(model: Any) -> Any:
        seen.append(sum(1 for name, _ in model.named_modules() if name.endswith("self_attn")))
        return describe_attention(model)

    monkeypatch.setattr(weightless, "describe_attention", counted)
    rows = cells(run("inspect", tmp_path / "gemma2")[1])
    assert seen == [2]
    assert [row["sees"] for row in rows] == ["past, 16", "past"] * 3 + ["past"]
    assert [row["module"] for row in rows] == [f"model.layers.{i}.self_attn" for i in range(7)]

    bart = build("bart").config
    bart.encoder_layers, bart.decoder_layers, bart.architectures = 4, 3, ["BartForConditionalGeneration"]
    bart.save_pretrained(tmp_path / "bart")
    rows = cells(run("inspect", tmp_path / "bart")[1])
    assert seen[1:] == [2]
    assert [row["module"] for row in rows] == [
        *(f"model.encoder.layers.{i}.self_attn" for i in range(4)),
        *(f"model.decoder.layers.{i}.self_attn" for i in range(3)),
        *(f"model.decoder.layers.{i}.encoder_attn" for i in range(3)),
    ]


@pytest.mark.parametrize("path", sorted(path for path in OLD.iterdir() if path.is_dir()), ids=lambda path: path.name)
def test_inspect_of_yesterday_s_checkpoints(path: Path, run: Any) -> None:
    code, printed, errors = run("inspect", path)
    assert (code, errors) == (0, "")
    model = load_pretrained(path)
    rows = cells(printed)
    assert [(int(row["query heads"]), row["module"]) for row in rows] == [
        (len(layer.heads), next(name for name, module in model.named_modules() if module is layer.module))
        for layer in attention_layers(model)
    ]


def test_inspect_of_an_encoder_speaks_of_no_cache(tmp_path: Path, run: Any) -> None:
    _, printed, _ = run("inspect", saved(tmp_path, "bert", "sequence"))
    assert "no cache: an encoder" in printed and "\ncache" not in printed
    assert "key/value heads to convert to: 4, 2, 1\n" in printed


def test_inspect_says_why_not(tmp_path: Path, run: Any) -> None:
    single = run("inspect", saved(tmp_path / "mqa", "llama", "causal", kv_heads=1))[1]
    assert "[1] it has one key/value head" in single and "mha, gqa, mqa" in single

    emptied = build("bert", "sequence")
    prune_heads(emptied, {0: range(8)})
    emptied.save_pretrained(tmp_path / "emptied")
    printed = run("inspect", tmp_path / "emptied")[1]
    assert cells(printed)[0]["query heads"] == "0" and "no heads left" in printed

    quantized = build("llama", "causal")
    quantized.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    quantized.config.architectures = ["LlamaForCausalLM"]
    quantized.config.save_pretrained(tmp_path / "quantized")
    printed = run("inspect", tmp_path / "quantized")[1]
    assert "[1] its weights are quantized; load the model without quantization" in printed
    row = cells(printed)[0]
    assert [row[name] for name in CHANGES] == ["yes", "no [1]", "no [1]", "no [1]"]


def test_refusals_are_one_line(tmp_path: Path, run: Any) -> None:
    small_model("fnet").save_pretrained(tmp_path / "fnet")
    small = tmp_path / "small"
    small_model("llama").save_pretrained(small)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    verbosity = logging.get_verbosity()
    for arguments, word in [
        (("inspect", tmp_path / "fnet"), "has no attention"),
        (("inspect", tmp_path / "foreign"), "the config names no class"),
        (("inspect", tmp_path / "none"), "none"),
        (("convert", tmp_path / "none", tmp_path / "out"), "none"),
        (
            ("convert", small, tmp_path / "out", "--method", "pca", "--statistics", tmp_path / "nofile"),
            "no file of calibration statistics at",
        ),
    ]:
        code, printed, errors = run(*arguments)
        assert (code, printed) == (1, "") and word in errors
        assert errors.startswith("hf-attnkit: ") and errors.count("\n") == 1 and errors.endswith("\n")
    assert logging.get_verbosity() == verbosity


@pytest.mark.parametrize("line", [[], ["inspect"], ["convert", "in"], ["convert", "in", "out", "--method", "random"]])
def test_wrong_usage(line: list[str], run: Any) -> None:
    code, printed, errors = run(*line)
    assert (code, printed) == (2, "") and "usage: hf-attnkit" in errors


def test_convert_is_convert_checkpoint(tmp_path: Path, run: Any) -> None:
    source = saved(tmp_path / "in", "llama", "causal", heads=8, kv_heads=4)
    code, printed, _ = run("convert", source, tmp_path / "out", "--num_key_value_heads", 2, "--method", "mean")
    assert code == 0 and printed.startswith("key/value heads 4 -> 2 in each of 2 layers")
    expected = convert_to_gqa(LlamaForCausalLM.from_pretrained(source), 2, method="mean").state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found and all(expected[name].equal(tensor) for name, tensor in found.items())

    code, _, errors = run("convert", source, tmp_path / "out", "--num_key_value_heads", 2)
    assert code == 1 and "not empty" in errors


def test_convert_takes_a_number_for_each_layer(tmp_path: Path, run: Any) -> None:
    source = saved(tmp_path / "in", "llama", "causal", heads=8, kv_heads=4)
    code, printed, _ = run("convert", source, tmp_path / "out", "--num_key_value_heads", 4, 1)
    assert code == 0 and "layer 1: 4 -> 1" in printed


def test_the_version_is_that_of_the_package(run: Any) -> None:
    assert run("--version") == (0, f"hf_attnkit {__version__}\n", "")
