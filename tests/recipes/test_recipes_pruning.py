"""The pruning recipes end to end on a tiny model: rounds, targets, refits, comparisons and their pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import create_autospec

import prune_heads_glue
import pytest
import torch
import uptrain_gqa_glue
from compare import plot_pruning
from compare import pruning_glue as compare_pruning_glue
from compare.pruning_glue import GluePruningComparisonArguments
from support.recipe_runs import flags, run
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

import hf_attnkit
from hf_attnkit.experiment import pruning_rounds
from hf_attnkit.experiment.comparing.prunings import parse_variant
from hf_attnkit.experiment.glue.demo_data import make_demo_data
from hf_attnkit.experiment.pruning import parse_options
from hf_attnkit.experiment.pruning_rounds import Pruner, PruningArguments
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.pruning import select_for_target

only_bert = pytest.mark.parametrize("checkpoint", ["bert"], indirect=True)


def heads_left(folder: Path) -> list[int]:
    return [len(layer.heads) for layer in attention_layers(hf_attnkit.load_pretrained(folder))]


def first_sentences(folder: Path, tokenizer, count: int) -> dict[str, torch.Tensor]:
    rows = make_demo_data()["train"].select(range(count))
    inputs = dict(tokenizer(rows["sentence"][:], padding=True, return_tensors="pt"))
    if "llama" in str(folder):
        inputs.pop("token_type_ids", None)
    return inputs | {"labels": torch.tensor(rows["label"][:])}


def test_prune_writes_scores_picture_and_a_smaller_model(checkpoint, tmp_path, monkeypatch) -> None:
    output = tmp_path / "out"
    more = ("--prune_fraction", "0.5", "--importance", "random", "--importance_options", "seed=3", "--refit", "none")
    results = run(prune_heads_glue, monkeypatch, flags(checkpoint, output, *more))
    stages = {stage["stage"]: stage for stage in results["stages"]}
    assert sum(stages["recovered"]["num_heads"]) == sum(stages["changed"]["num_heads"]) == 4
    (saved,) = json.loads((output / "head_importance.json").read_text())["rounds"]
    expected = hf_attnkit.head_importance(hf_attnkit.load_pretrained(checkpoint), method="random", seed=3)
    assert torch.equal(torch.tensor(saved["scores"]), expected)
    assert {int(layer): heads for layer, heads in saved["removed"].items()} == hf_attnkit.select_heads(
        expected, fraction=0.5
    )
    assert (output / "head_importance.png").read_bytes().startswith(b"\x89PNG")
    assert heads_left(output) == stages["changed"]["num_heads"]


@only_bert
def test_rounds_reach_the_fraction_together(checkpoint, tmp_path, monkeypatch) -> None:
    more = ("--prune_fraction", "0.75", "--prune_steps", "2", "--importance", "gradient")
    results = run(prune_heads_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *more))
    stages = [(stage["stage"], stage.get("round"), sum(stage["num_heads"])) for stage in results["stages"]]
    assert stages == [
        ("baseline", None, 8), ("changed", 1, 5), ("recovered", 1, 5), ("changed", 2, 2), ("recovered", 2, 2),
    ]  # fmt: skip
    saved = json.loads((tmp_path / "out" / "head_importance.json").read_text())["rounds"]
    # The second round scores the model as the first left it.
    assert [sum(score is not None for row in entry["scores"] for score in row) for entry in saved] == [8, 5]
    assert sum(heads_left(tmp_path / "out")) == 2


@only_bert
def test_what_remains_is_the_models_that_the_library_prunes(checkpoint, tokenizer, tmp_path, monkeypatch) -> None:
    """Scores by Fisher, rearranged, outputs refitted: the saved weights are those of the calls one by one."""
    more = (
        "--prune_fraction",
        "0.5",
        "--importance",
        "fisher",
        "--rearrange",
        "--score_samples",
        "16",
        "--refit_samples",
        "16",
        "--do_eval",
    )
    results = run(prune_heads_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *more, "--refit", "scale"))
    model = hf_attnkit.load_pretrained(checkpoint).eval()
    inputs = first_sentences(checkpoint, tokenizer, 16)
    gradients = hf_attnkit.head_gradients(model, [inputs])
    removed = hf_attnkit.select_heads(gradients.square().sum(0), fraction=0.5)
    removed = hf_attnkit.rearrange_heads(gradients, removed)
    assert {int(layer): heads for layer, heads in results["stages"][1]["removed"].items()} == removed
    hf_attnkit.prune_heads(model, removed, calibration=[inputs], refit="scale")
    saved = hf_attnkit.load_pretrained(tmp_path / "out").state_dict()
    for name, value in model.state_dict().items():
        # Batches of another length sum in another order: float32, solved against a ridge of a tenth.
        torch.testing.assert_close(saved[name], value, rtol=1e-3, atol=1e-5)


@only_bert
def test_latency_target_chooses_as_few_heads_as_it_takes(checkpoint, tmp_path, monkeypatch) -> None:
    """With a clock that counts heads instead of seconds."""

    def share(untouched, model, inputs, repeats, clock=None):
        left, total = (sum(len(layer.heads) for layer in attention_layers(m)) for m in (model, untouched))
        return 0.5 + 0.5 * left / total

    fake = create_autospec(select_for_target.forward_share, side_effect=share)
    for module in (select_for_target, pruning_rounds):
        monkeypatch.setattr(module, "forward_share", fake)
    more = ("--latency_target", "0.7", "--prune_steps", "2", "--importance", "magnitude", "--refit", "none")
    results = run(prune_heads_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *more, "--do_eval"))
    rounds = results["stages"][1:]
    # 0.85 of the time is 5.6 of 8 heads; then 0.7 / (0.5 + 0.5 * 5 / 8) of what is left, by the same clock.
    assert [sum(stage["num_heads"]) for stage in rounds] == [5, 3]
    assert [stage["latency"] for stage in rounds] == [0.812, 0.688]
    assert results["latency_target"] == 0.7 and results["prune_fraction"] is None


def test_a_converted_checkpoint_can_be_pruned(checkpoint, tmp_path, monkeypatch) -> None:
    converting = ("--num_key_value_heads", "2", "--do_eval")
    run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, tmp_path / "gqa", *converting))
    for groups, left, groups_left in (("whole", 4, 2), ("across", 4, 4))["llama" in checkpoint.parent.name :]:
        arguments = flags(tmp_path / "gqa", tmp_path / groups, "--prune_fraction", "0.5", "--do_eval")
        results = run(prune_heads_glue, monkeypatch, [*arguments, "--groups", groups, "--importance", "entropy"])
        assert [stage["stage"] for stage in results["stages"]] == ["baseline", "changed"]  # --do_eval: no training
        assert sum(results["stages"][1]["num_heads"]) == left
        assert sum(results["stages"][1]["num_key_value_heads"]) == groups_left


@pytest.mark.parametrize(
    ("groups", "fraction", "more", "left"),
    [
        (2, "0.4", (), [3, 3]),  # 3.2 of 8 heads in groups of 2
        (2, "0.7", ("--prune_steps", "2"), [2, 2]),  # 2.8, then 5.6 of 8
        (4, "0.25", ("--per_layer",), [3, 3]),
        (2, "0.5", ("--per_layer", "--groups", "across"), [2, 2]),
    ],
)
def test_a_share_that_is_no_whole_number_of_groups_rounds_down(groups, fraction, more, left) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=groups)  # fmt: skip
    model = LlamaForCausalLM(config)
    [pruning] = HfArgumentParser(PruningArguments).parse_args_into_dataclasses(["--prune_fraction", fraction, *more])
    pruner = Pruner(model, pruning, [])
    for step in range(1, pruning.prune_steps + 1):
        scores = hf_attnkit.head_importance(model, method="magnitude")
        hf_attnkit.prune_heads(model, pruner.choose(model, scores, None, step))
    kept = [len(layer.heads) for layer in attention_layers(model)]
    assert (sorted(kept) if "--per_layer" in more else [sum(kept) // 2] * 2) == left


@only_bert
def test_random_pruning_follows_the_seed(checkpoint, tmp_path, monkeypatch) -> None:
    more = ("--prune_fraction", "0.5", "--importance", "random", "--do_eval", "--seed")
    runs = [run(prune_heads_glue, monkeypatch, flags(checkpoint, tmp_path / s, *more, s)) for s in ("1", "2")]
    assert runs[0]["stages"][1]["removed"] != runs[1]["stages"][1]["removed"]
    assert [result["importance_options"] for result in runs] == [{"seed": 1}, {"seed": 2}]


@only_bert
def test_several_seeds_draw_other_heads_and_are_averaged(checkpoint, tmp_path, monkeypatch) -> None:
    more = ("--prune_fraction", "0.5", "--importance", "random", "--refit", "none", "--do_eval", "--seeds", "1", "2")
    results = run(prune_heads_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *more))
    each = [json.loads((tmp_path / "out" / "demo" / f"seed-{n}" / "results.json").read_text()) for n in (1, 2)]
    assert each[0]["stages"][1]["removed"] != each[1]["stages"][1]["removed"]
    found = [result["stages"][1]["metrics"]["accuracy"] for result in each]
    changed = results["stages"][1]
    assert (changed["task"], changed["stage"], changed["round"]) == ("demo", "changed", 1)
    assert changed["metrics"]["accuracy"]["mean"] == pytest.approx(sum(found) / 2)


HALF = ["--prune_fraction", "0.5"]
BAD = [
    ([], "one of --prune_fraction and --latency_target"),
    ([*HALF, "--latency_target", "0.5"], "one of --prune_fraction and --latency_target"),
    (["--prune_fraction", "1.5"], "prune_fraction 1.5"),
    (["--latency_target", "0"], "latency_target 0"),
    (["--prune_fraction", "0.9"], "cannot be removed"),
    (["--prune_fraction", "0.05"], "prune_fraction 0.05 removes no head"),
    ([*HALF, "--prune_steps", "9"], "first of 9 rounds"),
    ([*HALF, "--prune_steps", "0"], "prune_steps 0"),
    ([*HALF, "--score_samples", "0"], "score_samples 0"),
    ([*HALF, "--refit_samples", "0"], "refit_samples 0"),
    ([*HALF, "--refit", "none", "--refit_samples", "8"], "refit_samples 8 has no effect with --refit none"),
    ([*HALF, "--importance_options", "seed"], "name=value"),
    ([*HALF, "--importance_options", "speed=1"], "no option speed"),
    ([*HALF, "--importance", "entropy", "--rearrange"], "rearranging belongs to the scores of 'fisher'"),
    ([*HALF, "--min_heads", "-1"], "min_heads=-1"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input_is_named_and_leaves_nothing_that_looks_finished(
    wrong,
    message,
    checkpoint,
    tmp_path,
    monkeypatch,
) -> None:
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        run(prune_heads_glue, monkeypatch, flags(checkpoint, output, "--do_eval", *wrong))
    assert not output.exists() or not any(output.iterdir())


def test_options_are_read() -> None:
    assert parse_options(["seed=-1", "direction=focused", "normalize=false", "alpha=0.5"], "--x") == {
        "seed": -1, "direction": "focused", "normalize": False, "alpha": 0.5,
    }  # fmt: skip


def compared(checkpoint: Path, output: Path, monkeypatch, *more: str) -> dict:
    arguments = ("--prune_fractions", "0.25", "0.5", "--refits", "none", "output", "--score_samples", "16", *more)
    return run(compare_pruning_glue, monkeypatch, flags(checkpoint, output, *arguments))


@only_bert
def test_prunings_compared(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    """Every pruning starts from the same model; the same as a run of its own gives; the untouched one trains too."""
    variants = ("random", "random:seed=9", "entropy:direction=diffuse", "fisher+rearrange", "l0:steps=2")
    results = compared(checkpoint, tmp_path / "compared", monkeypatch, "--variants", *variants, "--seed", "3")
    kinds = [stage["stage"] for stage in results["stages"]]
    assert kinds == ["baseline", "recovered"] + ["changed", "recovered"] * len(variants) * 2 * 2
    changed = [stage for stage in results["stages"] if stage["stage"] == "changed"]
    assert [stage["variant"] for stage in changed[::4]] == list(variants)
    assert {sum(stage["num_heads"]) for stage in changed} == {6, 4}
    assert list(results["scores"]) == list(variants)
    trainings = [f"trainer_state_{number}.json" for number in range(1, kinds.count("recovered") + 1)]
    assert sorted(path.name for path in (tmp_path / "compared").iterdir()) == sorted(["results.json", *trainings])
    more = (*HALF, "--importance", "entropy", "--importance_options", "direction=diffuse", "--score_samples", "16",
            "--refit_samples", "16")  # fmt: skip
    alone = run(prune_heads_glue, monkeypatch, flags(checkpoint, tmp_path / "alone", *more, "--seed", "3"))
    [same] = [stage for stage in changed if stage["variant"] == variants[2] and stage["prune_fraction"] == 0.5
              and stage["refit"] == "output"]  # fmt: skip
    assert same["removed"] == alone["stages"][1]["removed"]
    assert same["metrics"] == pytest.approx(alone["stages"][1]["metrics"])

    capsys.readouterr()
    picture = tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "compared" / "results.json"), "--output", str(picture)])
    plot_pruning.main()
    printed = capsys.readouterr().out
    # Two draws of random heads are one row, with a spread.
    assert printed.count("| `random` |") == 4 and printed.count("±") >= 8 and "25% | 50%" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "alone" / "results.json")])
        plot_pruning.main()
    assert "is not of compare/pruning" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variant", "message"),
    [("entropie", "entropie"), ("entropy+rearrange", "rearranging belongs"), ("fisher+data", "only .rearrange"),
     ("entropy:speed=1", "no option speed"), ("entropy:speed", "name=value")],
)  # fmt: skip
def test_unknown_variants_are_refused(variant: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_variant(variant)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"prune_fractions": [0.5, 1.0]}, "prune_fractions 1.0"), ({"refits": ["both"]}, "refits 'both'"),
     ({"refits": ["output:rigde=1"]}, "option 'rigde' must be one of ridge, "),
     ({"refits": ["full"]}, "must be one of none"), ({"refits": ["output:"]}, "options may follow"),
     ({"refits": ["output:ridge=-1"]}, "ridge=-1"),
     ({"variants": ["random", "random"]}, "more than once"), ({"score_samples": 0}, "score_samples 0"),
     ({"refits": ["none"], "refit_samples": 8}, "no effect with --refits none")],
)  # fmt: skip
def test_bad_comparisons_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GluePruningComparisonArguments(**wrong)


def test_a_comparison_measures(tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run(compare_pruning_glue, monkeypatch, flags(tmp_path / "model", tmp_path / "out", "--do_train"))
    assert "compares what it measures" in capsys.readouterr().err
