"""`hf-attnkit`: what the commands print, write and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.models import build
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM
from transformers.utils import logging

from hf_attnkit import cache_bytes_per_token, convert_to_gqa, prune_heads, swap_attention
from hf_attnkit.cli import main
from hf_attnkit.common.version import __version__


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


def layer_rows(printed: str) -> list[list[str]]:
    """The cells of the table of layers."""
    return [line.split(maxsplit=5) for line in printed.split("\n\n")[1].splitlines()[1:]]


def abilities(printed: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in printed.split("\n\n")[-1].splitlines())


def test_inspect_says_what_every_layer_has_and_runs(tmp_path: Path, run: Any) -> None:
    model = build("llama", "causal", heads=8, kv_heads=4).bfloat16()
    prune_heads(model, {1: [0, 1]})
    swap_attention(model, {1: ("sliding_window", {"window": 7})})
    model.save_pretrained(tmp_path)
    code, printed, errors = run("inspect", tmp_path)
    assert (code, errors) == (0, "")
    assert printed.startswith("LlamaForCausalLM, bfloat16\n")
    first, second = layer_rows(printed)
    assert first == ["0", "model.layers.0.self_attn", "8", "4", "8", "sdpa"]
    assert second[:5] == ["1", "model.layers.1.self_attn", "6", "3", "8"]
    assert second[5].startswith("sliding_window") and "window=7" in second[5]
    assert f"cache: {cache_bytes_per_token(model):,} bytes per token" in printed
    can = abilities(printed)
    assert can["score"] == can["prune"] == "yes" and can["convert"] == "yes: to 1 key/value heads"
    assert can["swap"] == "yes: mha, gqa, sliding_window, local_global, flash, linear"  # `mqa` needs one key/value head


def test_inspect_of_an_encoder_speaks_of_no_cache(tmp_path: Path, run: Any) -> None:
    _, printed, _ = run("inspect", saved(tmp_path, "bert", "sequence"))
    assert "no cache: an encoder" in printed and "\ncache" not in printed
    assert abilities(printed)["convert"] == "yes: to 4, 2, 1 key/value heads"


def test_inspect_says_why_not(tmp_path: Path, run: Any) -> None:
    can = abilities(run("inspect", saved(tmp_path / "gpt2", "gpt2", "causal"))[1])
    assert can["swap"].startswith("yes")
    assert all("one fused projection" in can[name] for name in ("score", "convert", "prune"))

    single = abilities(run("inspect", saved(tmp_path / "mqa", "llama", "causal", kv_heads=1))[1])
    assert single["convert"] == "no: every layer has one key/value head already" and "mqa" in single["swap"]

    emptied = build("bert", "sequence")
    prune_heads(emptied, {0: range(8)})
    emptied.save_pretrained(tmp_path / "emptied")
    printed = run("inspect", tmp_path / "emptied")[1]
    assert layer_rows(printed)[0][2] == "0" and abilities(printed)["convert"].startswith("no: a layer has no heads")

    quantized = build("llama", "causal")
    quantized.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    quantized.config.architectures = ["LlamaForCausalLM"]
    quantized.config.save_pretrained(tmp_path / "quantized")
    assert "quantized" in abilities(run("inspect", tmp_path / "quantized")[1])["prune"]


def test_refusals_are_one_line(tmp_path: Path, run: Any) -> None:
    BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=32, n_head=4, vocab_size=50)).save_pretrained(tmp_path / "b")
    verbosity = logging.get_verbosity()
    for arguments, word in [
        (("inspect", tmp_path / "b"), "never calls"),
        (("inspect", tmp_path / "none"), "none"),
        (("convert", tmp_path / "none", tmp_path / "out"), "none"),
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
