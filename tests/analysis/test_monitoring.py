"""`AttentionEntropyCallback`: what it logs and when, its warnings, and that training does not notice it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import batch, build
from support.unchanged import unchanged
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_attnkit import AttentionEntropyCallback, head_importance, swap_attention
from hf_attnkit.analysis.entropy_callback import core_model
from hf_attnkit.attention import dispatch as registry
from hf_attnkit.attention.kind import ATTRIBUTE
from hf_attnkit.models.layers import attention_layers

FAMILIES = {"bert": "sequence", "llama": "causal", "t5": "causal"}
LENGTHS = (9, 5, 7, 9, 6, 9)  # a multiple of no batch size here


def examples(model: PreTrainedModel, number: int = 24) -> list[dict[str, Tensor]]:
    rows: list[dict[str, Tensor]] = []
    for seed in range(number // len(LENGTHS)):
        inputs = batch(model, LENGTHS, seed)
        if model.config.is_encoder_decoder:
            inputs["labels"] = inputs.pop("decoder_input_ids")
            inputs.pop("decoder_attention_mask")
        elif "ForSequence" in type(model).__name__:
            inputs["labels"] = torch.arange(len(LENGTHS)) % 2
        else:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        rows += [{name: tensor[i] for name, tensor in inputs.items()} for i in range(len(LENGTHS))]
    return rows


class Reporter(TrainerCallback):
    """What TensorBoard and the like do: take what is logged. Stands before our callback, as they do."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.seen.append((state.global_step, dict(logs)))


class Batches(TrainerCallback):
    """Keeps the first batch and the model after some steps, each by itself."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.models = steps, {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.models[state.global_step] = copy.deepcopy(core_model(model)).eval()


def trainer(
    model: Any, path: Path, callbacks: list[TrainerCallback], train: list[dict[str, Tensor]], **options: Any
) -> Trainer:
    arguments = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 3, "learning_rate": 1e-3,
                 "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 3}  # fmt: skip
    return Trainer(model, TrainingArguments(str(path), **(arguments | options)), train_dataset=train,
                   eval_dataset=train[:4], callbacks=callbacks)  # fmt: skip


def logged(history: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    return {
        int(row["step"]): {name: value for name, value in row.items() if name.startswith("attention_entropy/")}
        for row in history
        if any(name.startswith("attention_entropy/") for name in row)
    }


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_values_and_steps(family: str, tmp_path: Path) -> None:
    """In `log_history` and in every report, beside the losses, at step 1 and the multiples."""
    model = build(family, FAMILIES[family])
    rows, reporter, kept = examples(model), Reporter(), Batches(1, 2, 4, 6)
    callback = AttentionEntropyCallback(every_n_steps=2, max_examples=3)
    seen: list[dict[str, Tensor]] = []
    handle = model.register_forward_pre_hook(
        lambda m, a, k: seen.append(dict(k)) if m.training else None, with_kwargs=True
    )
    run = trainer(model, tmp_path, [reporter, callback, kept], rows)
    run.train()
    handle.remove()
    found = logged(run.state.log_history)
    assert list(found) == [1, 2, 4, 6]
    assert {int(row["step"]) for row in run.state.log_history if "loss" in row} == {3, 6}
    reported = {step: logs for step, logs in reporter.seen if "attention_entropy/layer_0/mean" in logs}
    assert {step: {n: v for n, v in logs.items() if n != "epoch"} for step, logs in reported.items()} == found
    probe = {name: tensor[:3] for name, tensor in seen[0].items() if isinstance(tensor, Tensor) and tensor.dim()}
    for step, values in found.items():
        assert list(values) == [f"attention_entropy/layer_{i}/{what}" for i in range(2) for what in ("mean", "min")]
        entropy = head_importance(kept.models[step], [probe], method="entropy", direction="diffuse").double()
        for layer in range(2):
            # The same sums over the same numbers; a float32 cast of the means between.
            for name, wanted in (("mean", entropy[layer].mean()), ("min", entropy[layer].min())):
                error = abs(values[f"attention_entropy/layer_{layer}/{name}"] - float(wanted))
                assert error <= 2 * torch.finfo(torch.float32).eps
    assert found[1] != found[2]  # the model learns


TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    "lora": {},
    "swapped": {},
    "eager": {},
    "grouped": {},
    "t5": {},
}


def trained(kind: str, path: Path, callbacks: list[TrainerCallback]) -> tuple[nn.Module, Trainer]:
    family = {"t5": "t5", "grouped": "llama", "compiled": "bert"}.get(kind, "bert")
    rate = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1} if family == "bert" else {}
    model = build(family, FAMILIES[family], 8, 2 if kind == "grouped" else None, **rate)
    rows = examples(model)
    if kind == "lora":
        targets = ["query", "value"]
        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, target_modules=targets, task_type="SEQ_CLS"))
    elif kind == "swapped":
        swap_attention(model, {0: "flash", 1: ("sliding_window", {"window": 3})})
    elif kind == "eager":
        model.set_attn_implementation("eager")
    run = trainer(model, path, callbacks, rows, **TRAININGS[kind])
    run.train()
    return model, run


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(TRAININGS))
def test_training_does_not_notice(kind: str, tmp_path: Path) -> None:
    """Weights, losses and the random state at the end, bit by bit; nothing of ours stays on the model."""
    plain, expected = trained(kind, tmp_path, [])
    random = torch.random.get_rng_state()
    callback = AttentionEntropyCallback(every_n_steps=2)
    model, run = trained(kind, tmp_path, [callback])
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    losses = [[row["loss"] for row in r.state.log_history if "loss" in row] for r in (run, expected)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    found = logged(run.state.log_history)
    assert list(found) == [1, 2, 4, 6]
    layers = len(attention_layers(core_model(model), adapters=True))
    assert all(len(values) == 2 * layers and all(0 < v < 1 for v in values.values()) for values in found.values())
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    inner = core_model(model)
    assert inner.config._attn_implementation == core_model(plain).config._attn_implementation
    hooks = [[len(m._forward_pre_hooks) for m in of.modules()] for of in (model, plain)]
    assert registry._observers == [] and hooks[0] == hooks[1]
    assert kind == "swapped" or not any(hasattr(m, ATTRIBUTE) for m in inner.modules())
    assert callback._probe is None and callback._trainer is None


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def warnings() -> Any:
    handler, logger = Warnings(), logging.getLogger("hf_attnkit.analysis.entropy_callback")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield handler.messages
    logger.removeHandler(handler)
    logger.setLevel(level)


class Plant(TrainerCallback):
    """Changes the query projection of one layer after a step."""

    def __init__(self, step: int, change: Callable[[nn.Linear], Any]) -> None:
        self.step, self.change = step, change

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                self.change(model.bert.encoder.layer[1].attention.self.query)


def one_key(query: nn.Linear) -> None:
    """Scores so far apart that every query has one key."""
    query.weight.mul_(1e4)


def uniform_head(query: nn.Linear) -> None:
    """Head 2 gives every key the same score."""
    query.weight[16:24] = 0
    query.bias[16:24] = 0


def test_a_collapsed_layer_is_warned_of_once(warnings: list[str], tmp_path: Path) -> None:
    model = build("bert", "sequence")
    run = trainer(model, tmp_path, [Plant(1, one_key), AttentionEntropyCallback(2)], examples(model), learning_rate=0.0)
    run.train()
    assert len(warnings) == 1, warnings
    assert "step 1, layer 1 (bert.encoder.layer.1.attention.self): attention entropy has collapsed" in warnings[0]
    assert "its mean is below collapse_threshold=0.05" in warnings[0] and "head 0 attends to one key" in warnings[0]
    found = logged(run.state.log_history)[6]
    assert found["attention_entropy/layer_1/mean"] < 0.05 < found["attention_entropy/layer_0/mean"]


def test_a_head_that_becomes_uniform_is_warned_of(warnings: list[str], tmp_path: Path) -> None:
    model = build("bert", "sequence")
    callbacks = [Plant(3, uniform_head), AttentionEntropyCallback(2)]
    trainer(model, tmp_path, callbacks, examples(model), learning_rate=0.0).train()
    assert len(warnings) == 1 and warnings[0].startswith("step 4, layer 1 (")
    assert "head 2 has become uniform" in warnings[0] and "below" not in warnings[0]


@pytest.mark.parametrize("threshold", [0.05, 1.0])
def test_the_threshold_alone_decides(threshold: float, warnings: list[str], tmp_path: Path) -> None:
    """A model that starts uniform, as a fresh one nearly does, is no collapse; its mean is below a threshold of 1
    in the other layer, which is the test that the threshold is looked at."""
    model = build("bert", "sequence")
    with torch.no_grad():
        uniform_head(model.bert.encoder.layer[1].attention.self.query)
    callback = AttentionEntropyCallback(2, collapse_threshold=threshold)
    trainer(model, tmp_path, [callback], examples(model), learning_rate=0.0).train()
    assert [w.split(" (")[0] for w in warnings] == ([] if threshold == 0.05 else ["step 1, layer 0", "step 1, layer 1"])


@pytest.mark.parametrize("every, steps", [(1, [1, 2, 3, 4, 5, 6]), (4, [1, 4]), (100, [1])])
def test_how_often(every: int, steps: list[int], tmp_path: Path) -> None:
    """The model runs once more at each logged step, on no more rows than asked for, and at no other."""
    model = build("bert", "sequence")
    sizes: list[tuple[bool, int]] = []
    handle = model.register_forward_pre_hook(
        lambda m, a, k: sizes.append((m.training, len(k["input_ids"]))), with_kwargs=True
    )
    run = trainer(model, tmp_path, [AttentionEntropyCallback(every, max_examples=3)], examples(model))
    run.train()
    handle.remove()
    assert list(logged(run.state.log_history)) == steps
    sizes = [size for size in sizes if size != (False, 2)]  # looked at before training, on two rows
    assert sizes.count((True, 4)) == 6 and sizes.count((False, 3)) == len(steps) == len(sizes) - 6


def test_training_twice(tmp_path: Path) -> None:
    """Each `train()` has a probe of its own."""
    model = build("bert", "sequence")
    run = trainer(model, tmp_path, [AttentionEntropyCallback()], examples(model))
    run.train()
    run.train()
    assert list(logged(run.state.log_history)) == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 must be an integer of at least 1"),
        ({"every_n_steps": 2.0}, r"every_n_steps=2\.0 must be an integer"),
        ({"max_examples": True}, "max_examples=True must be an integer"),
        ({"collapse_threshold": 1.5}, r"collapse_threshold=1\.5 must be a number from 0 to 1"),
        ({"collapse_threshold": "low"}, "collapse_threshold='low' must be a number from 0 to 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionEntropyCallback(**options)


def test_no_trainer() -> None:
    with pytest.raises(RuntimeError, match="none is calling it; give it to a trainer"):
        AttentionEntropyCallback().on_train_begin(None, None, None)


@pytest.mark.parametrize("change", ["linear", "bypassing"])
def test_models_without_attention_weights(change: str, tmp_path: Path) -> None:
    """Refused before the first step, the model unchanged."""
    model = build("bert", "sequence")
    rows = examples(model)
    if change == "linear":
        swap_attention(model, "linear")
    else:
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32}
        model = DebertaV2ForSequenceClassification(DebertaV2Config(vocab_size=model.config.vocab_size, **sizes))
    run = trainer(model, tmp_path, [AttentionEntropyCallback()], rows)
    message = "every layer .* runs linear attention" if change == "linear" else "it never calls Transformers' attention"
    with unchanged(model.base_model), pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 0


def test_the_model_inside() -> None:
    model = build("bert", "sequence")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
    assert core_model(nn.DataParallel(torch.compile(adapted))) is model
    with pytest.raises(TypeError, match=r"Linear is no transformers\.PreTrainedModel and wraps none"):
        core_model(nn.Linear(2, 2))
