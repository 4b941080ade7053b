"""The recipes that linearise: every stage, what is saved and reported, a killed run, and what is refused first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finetune_glue
import linearize_glue
import linearize_lm
import pytest
import torch
from huggingface_hub import ModelCard
from support import text_runs
from support.fakes import never
from support.kills import Killed, assert_same, dies
from support.models import build
from support.recipe_runs import flags, run
from support.swapping import swapped
from transformers import AutoModelForCausalLM, Trainer

import hf_attnkit
from hf_attnkit.attention.kind import PARAMETERS
from hf_attnkit.experiment.linearizing.arguments import LinearizeArguments, candidates
from hf_attnkit.experiment.run import Run
from hf_attnkit.experiment.training.train import LOSS

only_bert = pytest.mark.parametrize("checkpoint", ["bert"], indirect=True)
SHORT = ("--calibration_samples", "24", "--disable_tqdm", "true", "--learning_rate", "1e-3")
# 64 sentences in batches of 16: eight steps of transfer, and four of each of the others.
EVERYTHING = (*SHORT, "--control", "--softmax_layers", "1", "--window", "4", "--gate", "--logging_steps", "1",
              "--save_strategy", "steps", "--save_steps", "2")  # fmt: skip
STAGES = ["baseline", "control", "changed", "transferred", "chosen", "refitted", "distilled", "recovered"]


def stages(results: dict[str, Any]) -> list[str]:
    return [stage["stage"] for stage in results["stages"]]


@pytest.fixture(scope="module", params=["bert"])
def whole(checkpoint: Path, tmp_path_factory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A run with everything, and its results."""
    output = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield output, run(linearize_glue, monkeypatch, flags(checkpoint, output, *EVERYTHING))


@only_bert
def test_every_stage_is_measured(whole) -> None:
    output, results = whole
    assert stages(results) == STAGES
    costs = results["layer_costs"]
    kept = max(costs, key=costs.get)
    assert set(costs) == {"0", "1"} and all(cost > 0 for cost in costs.values())
    assert results["linear_layers"] == [layer for layer in (0, 1) if str(layer) != kept]
    attention = ["sdpa" if str(layer) == kept else "linear" for layer in (0, 1)]
    found = {stage["stage"]: stage["attention"] for stage in results["stages"]}
    assert found["baseline"] == found["control"] == ["sdpa"] * 2
    assert found["changed"] == found["transferred"] == ["linear"] * 2
    assert all(found[name] == attention for name in STAGES[4:])
    title = "linear attention in 1 of 2 layers"
    assert results["change"] == {
        "kind": "linearization", "title": title,
        "facts": {"attention": attention, "attention_options": {"feature_map": "exponential", "window": 4,
                                                                "gate": "learned"}},
    }  # fmt: skip
    assert results["distill_weight"] == 0.5 and results["distill_epochs"] == 1 and results["choose"] == "kl"
    assert (results["transfer_epochs"], results["transfer_learning_rate"]) == (2, 0.02)
    steps = [json.loads((output / f"trainer_state_{n}.json").read_text())["global_step"] for n in (1, 2, 3)]
    assert steps == [8, 4, 4]
    assert json.loads((output / "control_state.json").read_text())["global_step"] == 8  # as distilled and recovered


@only_bert
def test_what_is_saved_scores_what_was_reported(whole, tmp_path, monkeypatch) -> None:
    output, results = whole
    again = run(finetune_glue, monkeypatch, flags(output, tmp_path / "again", "--do_eval"))
    assert again["stages"][0]["metrics"] == pytest.approx(results["stages"][-1]["metrics"])
    assert again["stages"][0]["attention"] == results["stages"][-1]["attention"]
    model = hf_attnkit.load_pretrained(output)
    learned = {name: tensor for name, tensor in model.state_dict().items() if PARAMETERS in name}
    assert any(name.endswith("gate.weight") and tensor.any() for name, tensor in learned.items())
    metrics = {name: value for name, value in results["branches"].items() if name not in ("metric", "linear_shares")}
    assert metrics["both"] == pytest.approx(results["stages"][-1]["metrics"][results["branches"]["metric"]])
    assert set(metrics) == {"both", "window", "linear"}
    (share,) = results["branches"]["linear_shares"].values()
    assert 0 < share < 1


@only_bert
def test_report_and_card_tell_layers_and_branches(whole) -> None:
    output, results = whole
    (linear,) = results["linear_layers"]
    card, page = ModelCard.load(output / "README.md"), (output / "report.html").read_text(encoding="utf-8")
    assert {"linear-attention", "linear", "hf_attnkit"} <= set(card.data.tags)
    costs = {int(layer): f"{cost:.3g}" for layer, cost in results["layer_costs"].items()}
    assert f"- layer {1 - linear}: {costs[1 - linear]}, keeps softmax" in card.text
    assert f"- layer {linear}: {costs[linear]}\n" in card.text
    score = results["branches"]
    for name, text in (("both", "both branches"), ("window", "the window alone"), ("linear", "linear attention alone")):
        assert f"- {text}: {score['metric']} {score[name]:.4f}" in card.text
    share = f"{score['linear_shares'][str(linear)]:.1%}"
    assert f"- layer {linear}, linear share of the output's energy: {share}" in card.text
    for text in (
        "Which layers cost most",
        "Branches",
        "Error of each layer",
        "keeps softmax",
        "the window alone",
        share,
    ):
        assert text in page, text


@pytest.mark.slow
@only_bert
@pytest.mark.parametrize("number", [14, 22], ids=["transfer", "recovery"])
def test_a_killed_run_ends_as_one_that_was_not(number, whole, checkpoint, tmp_path, monkeypatch) -> None:
    """In one of the trainings, which are 8, 8, 4 and 4 steps."""
    arguments = flags(checkpoint, tmp_path / "out", *EVERYTHING)
    with monkeypatch.context() as patched:
        dies(patched, Trainer, "training_step", number)
        with pytest.raises(Killed):
            run(linearize_glue, monkeypatch, arguments)
    done: list[int] = []
    step = Trainer.training_step

    def counting(*given: Any, **options: Any) -> Any:
        done.append(1)
        return step(*given, **options)

    monkeypatch.setattr(Trainer, "training_step", counting)
    again = run(linearize_glue, monkeypatch, [*arguments, "--resume_from_checkpoint"])
    assert len(done) == 24 - (number - 1) // 2 * 2  # from the last checkpoint, of two steps each
    assert_same(tmp_path / "out", whole[0])
    for name in ("layer_costs", "branches", "linear_layers", "change"):
        assert again[name] == whole[1][name], name


@only_bert
def test_a_killed_run_with_adapters_ends_as_one_that_was_not(checkpoint, tmp_path, monkeypatch) -> None:
    """In the second training of adapters, after four steps of the features and four of the first."""
    more = (*SHORT, "--lora", "--transfer_epochs", "1", "--layers", "1", "--refit", "none", "--save_strategy", "steps",
            "--save_steps", "2", "--calibration_samples", "0")  # fmt: skip
    whole = run(linearize_glue, monkeypatch, flags(checkpoint, tmp_path / "whole", *more))
    arguments = flags(checkpoint, tmp_path / "out", *more)
    with monkeypatch.context() as patched:
        dies(patched, Trainer, "training_step", 11)
        with pytest.raises(Killed):
            run(linearize_glue, monkeypatch, arguments)
    again = run(linearize_glue, monkeypatch, [*arguments, "--resume_from_checkpoint"])
    assert [stage["metrics"] for stage in again["stages"]] == [stage["metrics"] for stage in whole["stages"]]
    assert_same(tmp_path / "out", tmp_path / "whole")


@only_bert
@pytest.mark.parametrize(
    ("more", "wanted", "layers"),
    [
        (("--lora", "--lora_r", "4"), ["baseline", *STAGES[2:4], *STAGES[5:]], [0, 1]),
        (("--no_distill", "--refit", "scale", "--layers", "1"),
         ["baseline", "changed", "transferred", "refitted", "recovered"], [1]),
        (("--softmax_layers", "1", "--choose", "uniform", "--refit", "none", "--calibration_samples", "0", "--decay",
          "--transfer_epochs", "0", "--num_train_epochs", "0"), ["baseline", "changed", "chosen", "distilled"], [0]),
        (("--do_eval",), ["baseline", "changed", "refitted"], [0, 1]),
    ],
    ids=["adapters", "no teacher", "uniform", "nothing trained"],
)  # fmt: skip
def test_stages_that_are_not_asked_for_are_left_out(more, wanted, layers, checkpoint, tmp_path, monkeypatch) -> None:
    results = run(linearize_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *SHORT, *more))
    assert stages(results) == wanted and results["linear_layers"] == layers
    assert results["branches"] == {} and results["layer_costs"] == {}
    recovered = results["stages"][-1]
    if "--lora" in more:
        assert recovered["trained_parameters"] < recovered["parameters"] and results["lora_r"] == 4
        assert not list((tmp_path / "out").glob("adapter*"))
    assert ("calibration_samples" in results) == ("refitted" in wanted)
    has_learned = "transferred" in wanted
    assert has_learned == ("transfer_epochs" in results) == ("transfer_learning_rate" in results)
    assert ("distill_weight" in results) == ("--no_distill" not in more and "--do_eval" not in more)
    model = hf_attnkit.load_pretrained(tmp_path / "out")
    assert len(model.config.hf_attnkit["layers"]) == len(layers)


@only_bert
@pytest.mark.parametrize(("more", "trainings"), [((), 2), (("--no_distill",), 1), (("--num_train_epochs", "0"), 1)])
def test_a_control_of_few_steps_is_trained_as_long(more, trainings, checkpoint, tmp_path, monkeypatch) -> None:
    """`--max_steps` bounds each training, and the control is as long as all that are trained on all weights."""
    given = (*SHORT, "--max_steps", "3", "--control", "--feature_map", "elu", "--refit", "none",
             "--calibration_samples", "0", *more)  # fmt: skip
    run(linearize_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *given))
    states = sorted((tmp_path / "out").glob("trainer_state_*.json"))
    steps = [json.loads(state.read_text())["global_step"] for state in states]
    assert steps == [3] * trainings
    assert json.loads((tmp_path / "out" / "control_state.json").read_text())["global_step"] == sum(steps)


@only_bert
def test_the_window_alone_is_trained_for_comparison(checkpoint, tmp_path, monkeypatch) -> None:
    results = run(linearize_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *SHORT, "--window_alone",
                                                     "--window", "3", "--softmax_layers", "1"))  # fmt: skip
    assert stages(results) == ["baseline", "changed", "chosen", "refitted", "distilled", "recovered"]
    (linear,) = results["linear_layers"]
    assert results["stages"][-1]["attention"][linear] == "sliding_window"
    assert results["branches"] == {} and "transfer_epochs" not in results and len(results["layer_costs"]) == 2
    assert results["change"]["title"] == "sliding_window attention in 1 of 2 layers"


# Language models.


def text_flags(checkpoint: Path, output: Path, text: tuple[Path, Path], *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(checkpoint), "--output_dir", str(output), "--train_file", str(text[0])),
        *("--validation_file", str(text[1]), "--block_size", "32", "--calibration_tokens", "500"),
        *("--max_train_samples", "32", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"),
        *("--num_train_epochs", "1", "--learning_rate", "1e-3", "--report_to", "none", "--save_strategy", "no"),
        *("--use_cpu", "--disable_tqdm", "true", *more),
    ]


def run_text(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> dict[str, Any]:
    return run(linearize_lm, monkeypatch, arguments)


text_checkpoint, byte_tokenizer, text = text_runs.text_checkpoint, text_runs.byte_tokenizer, text_runs.text


def test_a_language_model(text_checkpoint, text, tmp_path, monkeypatch, caplog) -> None:
    more = ("--control", "--softmax_layers", "1", "--window", "4", "--gate", "--decay", "--logging_steps", "1")
    results = run_text(monkeypatch, text_flags(text_checkpoint, tmp_path / "out", text, *more))
    assert stages(results) == [name for name in STAGES if name != "distilled"]
    measured = {stage["stage"]: stage["metrics"]["perplexity"] for stage in results["stages"]}
    # Each stage changes the model, but for a refit that the guard takes back, which then leaves it exactly as it was.
    taken_back = "so none is kept" in caplog.text
    assert (measured["refitted"] == measured["chosen"]) == taken_back
    assert len(set(measured.values())) == len(measured) - taken_back
    assert results["calibration_tokens"] == 512  # 500 asked for are 16 blocks of 32
    branches = results["branches"]
    assert branches["metric"] == "perplexity" and branches["both"] == pytest.approx(measured["recovered"], rel=1e-5)
    assert branches["window"] != branches["both"] != branches["linear"]
    history = json.loads((tmp_path / "out" / "trainer_state_1.json").read_text())["log_history"]
    for key in (f"{LOSS}/layer_0", f"{LOSS}/layer_1"):
        losses = [entry[key] for entry in history if key in entry]
        assert len(losses) == 16 and sum(losses[-4:]) < 0.9 * sum(losses[:4])
    model = hf_attnkit.load_pretrained(tmp_path / "out", AutoModelForCausalLM).eval()
    ids = torch.arange(40, 60)[None]
    more_tokens = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **more_tokens), model.generate(ids, **more_tokens, use_cache=False))


# What is refused, before anything is measured.

BAD = [
    (("--gate",), "gate='learned' needs a window"),
    (("--softmax_layers", "2"), "--softmax_layers 2 leaves none of 2 layers linear; give at most 1"),
    (("--softmax_layers", "1", "--layers", "1"), "--softmax_layers 1 leaves none of 1 layers linear; give at most 0"),
    (("--softmax_layers", "-1"), "--softmax_layers -1 must be at least 0"),
    (("--choose", "uniform"), "--choose uniform has no effect without --softmax_layers"),
    (("--transfer_learning_rate", "0"), "--transfer_learning_rate 0.0 must be a finite number above 0"),
    (("--transfer_learning_rate", "nan"), "--transfer_learning_rate nan must be a finite number above 0"),
    (("--transfer_learning_rate", "0.1", "--transfer_epochs", "0"), "--transfer_learning_rate has no effect with"),
    (("--lora", "--distill_epochs", "0", "--num_train_epochs", "0"), "--lora has no effect: with 0 epochs"),
    (("--lora", "--do_eval"), "--lora has no effect without training"),
    (("--layers", "9"), "9"),
    (("--window", "0"), "window=0"),
    (("--window", "24"), "--window 24 covers every row of --max_length 24, .* give at most 23"),
    (("--transfer_epochs", "-1"), "--transfer_epochs -1.0 must be at least 0"),
    (("--transfer_epochs", "nan"), "--transfer_epochs nan must be at least 0 and finite"),
    (("--distill_epochs", "inf"), "--distill_epochs inf must be at least 0 and finite"),
    (("--num_train_epochs", "nan"), "--num_train_epochs nan must be at least 0 and finite"),
    (("--distill_epochs", "-1"), "--distill_epochs -1.0 must be at least 0"),
    (("--calibration_samples", "-1"), "--calibration_samples -1 must be at least 0"),
    (("--calibration_samples", "9", "--refit", "none"), "--calibration_samples has no effect without a refit"),
    (("--calibration_samples", "0"), "--refit output look at training data"),
    (("--calibration_samples", "0", "--refit", "none", "--softmax_layers", "1"), "--choose kl look at training data"),
    (("--window_alone",), "--window_alone needs --window"),
    (("--window_alone", "--window", "3", "--decay"), "--decay has no effect with --window_alone"),
    (("--window_alone", "--window", "3", "--gate"), "--gate has no effect with --window_alone"),
    (("--window_alone", "--window", "3", "--feature_map", "elu"), "--feature_map has no effect with --window_alone"),
    (("--feature_map", "elu", "--transfer_epochs", "3"), "--transfer_epochs has no effect with --feature_map elu"),
    (
        ("--window_alone", "--window", "3", "--transfer_learning_rate", "1"),
        "--transfer_learning_rate has no effect with --window_alone",
    ),
    (("--no_distill", "--distill_epochs", "2"), "--distill_epochs 2.0 has no effect with --no_distill"),
    (("--no_distill", "--distill_weight", "0.5"), "--distill_weight 0.5 has no effect without --distill"),
    (("--distill_epochs", "0", "--distill_weight", "0.4"), "options have no effect with --distill_epochs 0"),
    (("--lora_r", "4"), "--lora_r 4 has no effect without --lora"),
    (("--control", "--do_eval"), "--control trains and measures"),
    (("--control", "--distill_epochs", "0", "--num_train_epochs", "0"), "--control has no effect: with 0 epochs"),
    (("--do_eval", "--transfer_epochs", "1"), "--transfer_epochs has no effect without training"),
    (("--do_eval", "--transfer_learning_rate", "1"), "--transfer_learning_rate has no effect without training"),
    (("--do_eval", "--distill_epochs", "2"), "--distill_epochs has no effect without training"),
    (("--do_eval", "--distill_weight", "1"), "--distill_weight has no effect: nothing is trained"),
    (("--fsdp", "full_shard"), "features are not learned on a sharded model; leave FSDP and DeepSpeed out"),
]  # fmt: skip


@only_bert
@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input_is_named_before_anything_is_measured(wrong, message, checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Run, "evaluate", never(Run.evaluate, "measured before"))
    with pytest.raises(ValueError, match=message):
        run(linearize_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *wrong))
    assert not (tmp_path / "out").exists()


BAD_TEXT = [
    (("--num_train_epochs", "0", "--distill_weight", "1"), "--distill_weight has no effect: with 0 epochs the"),
    (("--num_train_epochs", "0", "--max_steps", "3"), "--max_steps has no effect: with 0 epochs the features alone"),
    (("--num_train_epochs", "0", "--control"), "--control has no effect: with 0 epochs"),
    (("--window", "32"), "--window 32 covers every row of --block_size 32, .* give at most 31"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_TEXT)
def test_bad_input_of_text_is_named_before_anything_is_measured(
    wrong, message, text_checkpoint, text, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(Run, "evaluate", never(Run.evaluate, "measured before"))
    with pytest.raises(ValueError, match=message):
        run_text(monkeypatch, text_flags(text_checkpoint, tmp_path / "out", text, *wrong))
    assert not (tmp_path / "out").exists()


@only_bert
@pytest.mark.parametrize("wrong", [("--feature_map", "relu"), ("--choose", "cost"), ("--refit", "full")])
def test_choices_are_named(wrong, checkpoint, tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run(linearize_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *wrong))
    assert f"invalid choice: '{wrong[1]}' (choose from" in capsys.readouterr().err


def linear(**options: Any) -> LinearizeArguments:
    return LinearizeArguments(**options)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("mistral", {"sliding_window": 4}, "window"),
        ("t5", {}, "bias"),
    ],
)
def test_models_whose_scores_or_masks_it_cannot_take(family, options, message) -> None:
    """Refused while nothing has been measured, and as they were afterwards."""
    model = build(family, **options)
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        candidates(model, linear())
    assert model.config._attn_implementation == implementation
    assert not any(PARAMETERS in name for name, _ in model.named_parameters())


def test_a_model_that_runs_swapped_attention_is_refused() -> None:
    for name, options in (("linear", {}), ("flash", {}), ("linear", {"layers": [1]})):
        with pytest.raises(ValueError, match=r"runs swapped attention already.*restore_attention and save it"):
            candidates(swapped(build("bert"), name, **options), linear())


def test_candidates_leave_the_model_as_it_was() -> None:
    model = build("llama", num_hidden_layers=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert candidates(model, linear()) == [0, 1, 2]
    assert candidates(model, linear(layers=[2, 0], softmax_layers=1)) == [0, 2]
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys() and not hasattr(model.config, "hf_attnkit")
