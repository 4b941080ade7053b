"""lm-evaluation-harness on changed models, offline, and its own numbers on plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from support.models import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_attnkit import convert_to_gqa, prune_heads, swap_attention
from hf_attnkit.cli import main
from hf_attnkit.experiment.glue.demo_data import make_pairs

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stock Llama that reads letters, and a changed one."""
    root = tmp_path_factory.mktemp("lm_eval")
    letters = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,'"]
    table = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=table, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", bos_token="</s>"
    )
    model = build("llama", "causal", num_hidden_layers=2)
    found = {}
    for name in ("plain", "changed"):
        found[name] = root / name
        if name == "changed":
            convert_to_gqa(model, [4, 2])
            prune_heads(model, {0: [0, 1]})
            swap_attention(model, "sliding_window", window=5)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def evaluated(model: str, folder: Path, tasks: Path | None = None) -> dict[str, Any]:
    """By the task `demo_pairs` of this package, or of another folder."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from hf_attnkit.experiment.harness.model import TASKS

    results = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder)},
        tasks=["demo_pairs"],
        task_manager=TaskManager(include_path=str(tasks or TASKS), include_defaults=False),
        device="cpu",
        batch_size=8,
        limit=12,
        bootstrap_iters=0,
    )
    rows = results["samples"]["demo_pairs"]
    return {"acc": results["results"]["demo_pairs"]["acc,none"], "logprobs": [row["filtered_resps"] for row in rows]}


@pytest.mark.slow  # the harness asks git for its version
def test_a_plain_checkpoint_has_the_numbers_of_the_harness_itself(folders: dict[str, Path]) -> None:
    ours, theirs = evaluated("hf_attnkit", folders["plain"]), evaluated("hf", folders["plain"])
    assert ours == theirs  # to the last digit
    assert len({str(row) for row in ours["logprobs"]}) == 12


@pytest.mark.slow
def test_a_changed_model_is_evaluated(folders: dict[str, Path]) -> None:
    changed = evaluated("hf_attnkit", folders["changed"])
    assert changed["logprobs"] != evaluated("hf_attnkit", folders["plain"])["logprobs"]
    with pytest.raises((ValueError, RuntimeError)):  # which plain Transformers refuses; this process knows the name
        evaluated("hf", folders["changed"])


@pytest.mark.slow
def test_a_task_of_ones_own_is_a_yaml_file_and_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same pairs as JSONL give the same numbers."""
    from hf_attnkit.experiment.harness.model import TASKS

    rows = "".join(f"{json.dumps(vars(pair))}\n" for pair in make_pairs("validation"))
    (tmp_path / "pairs.jsonl").write_text(rows)
    wording = (TASKS / "demo_pairs.yaml").read_text()
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    validation: {tmp_path / 'pairs.jsonl'}"
    (tmp_path / "demo_pairs.yaml").write_text(wording.replace("custom_dataset: !function demo_pairs.load", source))
    given = folders["changed"]
    assert evaluated("hf_attnkit", given, tmp_path) == evaluated("hf_attnkit", given)


def test_the_command_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import lm_eval.__main__ as theirs

    from hf_attnkit.experiment.harness.model import TASKS

    seen: list[list[str]] = []
    run = create_autospec(theirs.cli_evaluate, side_effect=lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr(theirs, "cli_evaluate", run)
    main(["lm_eval", "--model", "hf_attnkit", "--tasks", "demo_pairs"])
    main(["lm_eval", "--help"])
    assert seen == [["--model", "hf_attnkit", "--tasks", "demo_pairs", "--include_path", str(TASKS)], ["--help"]]
