"""The recipe for causal language models on a tiny Llama: perplexity, data, calibration, processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
import uptrain_gqa_lm
from support.fakes import never
from support.subprocesses import launched, run_script
from support.text_runs import HELD_OUT, LINES, flags, run
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import hf_attnkit
from hf_attnkit.experiment.run import Run
from hf_attnkit.experiment.text import data as lm_data
from hf_attnkit.experiment.text.data import Blocks, TextArguments, load_text
from hf_attnkit.experiment.training import uptrain

RECIPE = Path(__file__).parents[2] / "recipes" / "uptrain_gqa_lm.py"


def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, lines: list[str], block: int) -> float:
    """Token by token, in float64."""
    ids = [number for line in lines for number in tokenizer(f"{line}\n")["input_ids"]]
    blocks = [ids[start : start + block] for start in range(0, len(ids) - block + 1, block)]
    total = 0.0
    with torch.no_grad():
        for tokens in blocks:
            chances = torch.softmax(model.double()(torch.tensor([tokens])).logits[0], dim=-1)
            total -= sum(math.log(chances[i, tokens[i + 1]]) for i in range(block - 1))
    return math.exp(total / (len(blocks) * (block - 1)))


RECOVERIES = {
    "plain": (),
    "distilled": ("--distill",),
    "adapters from a teacher": ("--lora", "--lora_r", "4", "--distill", "--distill_weight", "1"),
    "smoothed labels, 16 bits, accumulated": (
        *("--distill", "--label_smoothing_factor", "0.1", "--bf16", "--gradient_accumulation_steps", "2"),
        "--gradient_checkpointing",
    ),
}


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_stages_and_a_plain_checkpoint_whose_perplexity_is_the_reported_one(
    recovery, text_checkpoint, text, byte_tokenizer, tmp_path, monkeypatch
) -> None:
    more = RECOVERIES[recovery]
    results = run(monkeypatch, flags(text_checkpoint, tmp_path, text, "--validation_file", str(text[1]), *more))
    stages = {stage["stage"]: stage for stage in results["stages"]}
    assert list(stages) == ["baseline", "changed", "recovered"]
    assert [stage["num_key_value_heads"] for stage in stages.values()] == [[4, 4], [2, 2], [2, 2]]
    assert results["data"]["splits"] == {"train": "train", "evaluation": "dev.txt"}
    assert (results["data"]["hub_path"], results["data"]["task_type"]) == ("local", "text-generation")
    assert results["change"]["kind"] == "conversion"
    assert results["change"]["title"] == "4 key/value heads merged into 2"
    measured = {name: stage["metrics"]["perplexity"] for name, stage in stages.items()}
    # Logits in float32; in 16 bits a relative error of 2^-8 of logits below 16 moves each of them by up to 0.06.
    tolerance = 0.06 if "--bf16" in more else 1e-5
    before = AutoModelForCausalLM.from_pretrained(text_checkpoint)
    assert measured["baseline"] == pytest.approx(perplexity(before, byte_tokenizer, HELD_OUT, 32), rel=tolerance)
    after = AutoModelForCausalLM.from_pretrained(tmp_path)  # plain Transformers
    assert after.config.num_key_value_heads == 2
    assert measured["recovered"] == pytest.approx(perplexity(after, byte_tokenizer, HELD_OUT, 32), rel=tolerance)
    assert measured["recovered"] != measured["changed"]
    assert not list(tmp_path.glob("adapter*"))
    if "--distill" in more:
        assert results["distill"] and results["distill_temperature"] == 2.0
    if "--lora" in more:  # A and B of rank 4 for q, o (32 x 32) and k, v (16 x 32), two layers
        assert stages["recovered"]["trained_parameters"] == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16))


def test_calibration_and_training_never_see_held_out_text(
    text_checkpoint, text, byte_tokenizer, tmp_path, monkeypatch
) -> None:
    both = tmp_path / "both.txt"
    both.write_text("\n".join([*LINES, *HELD_OUT]) + "\n", encoding="utf-8")
    seen: dict[str, list] = {"calibration": [], "training": []}
    convert, compute = hf_attnkit.convert_to_gqa, uptrain.DistillationTrainer.compute_loss

    def spy(model, number, *, calibration, **options):
        seen["calibration"] += [batch["input_ids"] for batch in calibration]
        return convert(model, number, calibration=calibration, **options)

    def compute_and_see(self, model, inputs, *others, **options):
        seen["training"] += [inputs["input_ids"]] if model.training else []
        return compute(self, model, inputs, *others, **options)

    monkeypatch.setattr(hf_attnkit, "convert_to_gqa", spy)
    monkeypatch.setattr(uptrain.DistillationTrainer, "compute_loss", compute_and_see)
    percentage = str(math.ceil(100 * len(HELD_OUT) / (len(LINES) + len(HELD_OUT))))
    more = ("--validation_split_percentage", percentage, "--distill", "--calibration_tokens", "1000000")
    results = run(monkeypatch, flags(text_checkpoint, tmp_path / "out", (both, both), *more))
    for batches in seen.values():
        assert batches and not any("Q" in byte_tokenizer.decode(row) for batch in batches for row in batch)
    assert results["calibration_tokens"] == sum(batch.numel() for batch in seen["calibration"])
    assert results["calibration_tokens"] == 32 * results["train_samples"]
    assert results["data"]["name"] == "both.txt"
    assert results["data"]["splits"]["evaluation"] == f"the last {percentage}% of the documents"


def test_blocks_are_the_text_in_order_and_the_rest_is_dropped(byte_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(lm_data, "BATCH", 2)
    blocks = Blocks(["abc", "defg", "hij", "kl", "m"], byte_tokenizer, 4, None, "training")
    assert [byte_tokenizer.decode(block["input_ids"]) for block in blocks] == ["abcd", "efgh", "ijkl"]
    assert all(torch.equal(block["input_ids"], block["labels"]) for block in blocks)
    few = Blocks(["abc", "defg", "hij", "kl", "m"], byte_tokenizer, 4, 1, "training")
    assert [byte_tokenizer.decode(block["input_ids"]) for block in few] == ["abcd"]
    with pytest.raises(ValueError, match=r"held-out text has 3 tokens.*block_size 4"):
        Blocks(["abc"], byte_tokenizer, 4, None, "held-out")


def test_only_a_line_break_ends_a_line(tmp_path) -> None:
    file = tmp_path / "odd.txt"
    file.write_bytes("\ufeffone\u2028still one\x0b and\r\n\n  \ntwo \nthree".encode())
    read = load_text(TextArguments(train_file=str(file), validation_split_percentage=50))
    assert [*read.train, *read.validation] == ["one\u2028still one\x0b and\n", "two\n", "three\n"]
    assert len(read.validation) == 1


def hub(monkeypatch: pytest.MonkeyPatch, **splits: dict) -> list:
    asked: list = []

    def load(*names):
        asked.append(names)
        return datasets.DatasetDict({split: datasets.Dataset.from_dict(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_wikitext_is_the_default_and_its_validation_split_is_held_out(monkeypatch) -> None:
    rows = {split: {"text": [f"{split} {i}" for i in range(40)], "id": ["x"] * 40} for split in ("train", "validation")}
    asked = hub(monkeypatch, **rows)
    read = load_text(TextArguments())
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]
    assert list(read.train) == rows["train"]["text"] and list(read.validation) == rows["validation"]["text"]
    assert (read.name, read.split) == ("wikitext", "validation")
    with pytest.raises(ValueError, match="validation_split_percentage 10 has no effect"):
        load_text(TextArguments(validation_split_percentage=10))


def test_without_a_validation_split_the_end_is_held_out(monkeypatch) -> None:
    asked = hub(monkeypatch, train={"content": [str(i) for i in range(40)], "stars": list(range(40))})
    read = load_text(TextArguments(dataset_name="some/data", validation_split_percentage=10))
    assert asked == [("some/data", None)]
    assert list(read.validation) == ["36", "37", "38", "39"] and len(read.train) == 36


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": {"text": ["a"]}}, "no split 'train'"),
        ({"train": {"a": ["x"], "b": ["y"]}}, "no column 'text'"),
        ({"train": {"text": ["alone"]}}, "one document"),
    ],
)
def test_datasets_without_usable_text_are_named(splits, message, monkeypatch) -> None:
    hub(monkeypatch, **splits)
    with pytest.raises(ValueError, match=rf"some/data.*{message}"):
        load_text(TextArguments(dataset_name="some/data"))


def test_hub_out_of_reach_points_to_train_file(monkeypatch) -> None:
    def load(*names):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FileNotFoundError, match=r"no network.*--train_file"):
        load_text(TextArguments())


BAD = [
    (("--dataset_name", "some/data"), "not both"),
    (("--validation_split_percentage", "0"), "validation_split_percentage 0"),
    (("--validation_file", "DEV", "--validation_split_percentage", "5"), "no effect with --validation_file"),
    (("--validation_file", "/no/such/file"), "/no/such/file"),
    (("--block_size", "1"), "block_size 1"),
    (("--block_size", "65"), "block_size 65 is longer than the model's 64"),
    (("--max_train_samples", "0"), "max_train_samples 0"),
    (("--calibration_tokens", "-1"), "calibration_tokens -1"),
    (("--num_key_value_heads", "3"), "num_key_value_heads=3"),
    (("--distill_weight", "0.5"), "without --distill"),
    (("--lora_r", "8"), "without --lora"),
    (("--distill", "--do_eval"), "--distill has no effect without training"),
    (("--lora", "--do_eval"), "--lora has no effect without training"),
    (("--grouping", "best", "--method", "random"), "grouping='best'"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input_is_named_before_anything_is_measured(
    wrong, message, text_checkpoint, text, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(uptrain_gqa_lm.LanguageModelRun, "evaluate", never(Run.evaluate, "measured before"))
    wrong = [str(text[1]) if word == "DEV" else word for word in wrong]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(monkeypatch, flags(text_checkpoint, tmp_path / "out", text, *wrong))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("content", "message"), [(b"\n \n", "is empty"), (b"a\xff", "not UTF-8")])
def test_unusable_files_are_named(content, message, tmp_path) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad.txt.*{message}"):
        load_text(TextArguments(train_file=str(tmp_path / "bad.txt")))
    with pytest.raises(ValueError, match="needs --train_file"):
        TextArguments(validation_file="x")


def test_an_encoder_is_refused(text, byte_tokenizer, tmp_path, monkeypatch) -> None:
    config = BertConfig(vocab_size=len(byte_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                        num_attention_heads=4)  # fmt: skip
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="encoder"):
        run(monkeypatch, flags(tmp_path / "bert", tmp_path / "out", text))


def launch(processes: int, arguments: list[str]) -> None:
    for done in launched(processes, run_script, str(RECIPE), arguments):
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("more", [("--distill",), ("--distill", "--lora")])
def test_two_processes_are_one_that_accumulates_two_batches(more, text_checkpoint, text, tmp_path, monkeypatch) -> None:
    """Two blocks, one a batch, so that every step sees both in whatever order; plain gradient descent, since Adam
    would turn rounding of small gradients into steps of full size."""
    data = ("--validation_file", str(text[1]), "--max_train_samples", "2", "--per_device_train_batch_size", "1")
    # The mean is the same in every process to the last bit; so few tokens leave directions of "pca" to rounding.
    mean = ("--method", "mean", "--refit", "false", "--calibration_tokens", "0")
    more = (*more, *data, *mean, "--optim", "sgd", "--max_grad_norm", "0")
    launch(2, flags(text_checkpoint, tmp_path / "two", text, *more))
    one = run(monkeypatch, flags(text_checkpoint, tmp_path / "one", text, *more, "--gradient_accumulation_steps", "2"))
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    pairs = list(zip(two["stages"], one["stages"], strict=True))
    assert [left["metrics"]["perplexity"] for left, _ in pairs] == pytest.approx(
        [right["metrics"]["perplexity"] for _, right in pairs], rel=1e-5
    )
    assert one["stages"][2]["metrics"]["perplexity"] != pytest.approx(
        one["stages"][1]["metrics"]["perplexity"], rel=1e-3
    )
    left, right = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("two", "one"))
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_the_control_is_the_untouched_model_trained_as_long(text_checkpoint, text, tmp_path, monkeypatch) -> None:
    data = ("--validation_file", str(text[1]))
    with_control = run(monkeypatch, flags(text_checkpoint, tmp_path / "with", text, *data, "--control"))
    without = run(monkeypatch, flags(text_checkpoint, tmp_path / "without", text, *data))
    stages = with_control["stages"]
    assert [stage["stage"] for stage in stages] == ["baseline", "control", "changed", "recovered"]
    assert with_control["control"] == 1 and without["control"] is None
    assert stages[1]["num_key_value_heads"] == [4, 4]
    assert stages[1]["metrics"]["perplexity"] < stages[0]["metrics"]["perplexity"]
    kept = [stages[place]["metrics"] for place in (0, 2, 3)]
    assert kept == [stage["metrics"] for stage in without["stages"]]
    # A decoder keeps keys and values, half as many after the conversion.
    sizes = [stage["key_value_bytes_per_token"] for stage in stages]
    assert sizes[0] == sizes[1] == 2 * sizes[2] == 2 * sizes[3] > 0
    assert json.loads((tmp_path / "with" / "control_state.json").read_text())["global_step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "more"), [("gpt2", ()), ("gpt2", ("--lora", "--lora_r", "4")), ("granite", ())], ids=str
)
def test_a_model_found_by_running(model_type, more, text, byte_tokenizer, tmp_path, monkeypatch) -> None:
    """GPT-2's projections are rows of one Conv1D; Granite is no family of the table."""
    torch.manual_seed(0)
    ends = {"vocab_size": len(byte_tokenizer), "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **ends))
    if model_type == "granite":
        model = GraniteForCausalLM(
            GraniteConfig(
                hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, max_position_embeddings=64, **ends,
            )
        )  # fmt: skip
    for each in (model, byte_tokenizer):
        each.save_pretrained(tmp_path / "model")
    arguments = flags(tmp_path / "model", tmp_path / "out", text, "--validation_file", str(text[1]), *more)
    stages = {stage["stage"]: stage for stage in run(monkeypatch, arguments)["stages"]}
    assert [stage["num_key_value_heads"] for stage in stages.values()] == [[4, 4], [2, 2], [2, 2]]
    assert stages["recovered"]["metrics"]["perplexity"] < stages["changed"]["metrics"]["perplexity"]
    again = hf_attnkit.load_pretrained(tmp_path / "out").eval()
    assert stages["recovered"]["metrics"]["perplexity"] == pytest.approx(
        perplexity(again, byte_tokenizer, HELD_OUT, 32), rel=1e-4
    )
