"""Recovery after a conversion: the distillation loss by its definition, and adapters that are merged."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.any_model import any_model
from support.models import batch, build, outputs
from support.unchanged import unchanged
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainingArguments, default_data_collator

from hf_attnkit import convert_to_gqa, load_pretrained, prune_heads
from hf_attnkit.experiment.training import distill as distill_module
from hf_attnkit.experiment.training.distill import (
    DistillationArguments,
    DistillationTrainer,
    divergence,
    relative_error,
)
from hf_attnkit.experiment.training.lora import LoraArguments, add_adapters, merge_adapters
from hf_attnkit.models.layers import attention_layers

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Two orders of the same sums in float64, over a few thousand terms of at most 1e3.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
# Transformers takes a causal model's loss in float32 whatever the model's dtype: a few of its units.
FLOAT32_TASK = {"rtol": 4 * torch.finfo(torch.float32).eps, "atol": 0.0}


def pair(family: str, head: str, **options: Any) -> tuple[Any, Any]:
    """Teacher and student: a model, and what mean-pooling made of it; float64, no dropout."""
    teacher = build(family, head, **(NO_DROPOUT if family == "bert" else {}), **options).double()
    return teacher, convert_to_gqa(copy.deepcopy(teacher), 2)


def labelled(model: Any, *, seed: int = 0, lengths: tuple[int, ...] = (13, 7, 10)) -> dict[str, torch.Tensor]:
    inputs = batch(model, lengths, seed=seed)
    if "Causal" in type(model).__name__:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[0, 3:6] = -100  # not to be predicted, and no padding
    elif model.config.num_labels == 1:
        labels = torch.linspace(0, 5, len(lengths), dtype=torch.float64)
    else:
        labels = torch.arange(len(lengths)) % model.config.num_labels
    return inputs | {"labels": labels}


def trainer(student: Any, teacher: Any, folder: Any, *, weight=0.3, temperature=3.0, attention_weight=0.7, data=None,
            **arguments: Any) -> DistillationTrainer:  # fmt: skip
    training = TrainingArguments(str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
                                 **arguments)  # fmt: skip
    return DistillationTrainer(
        model=student, args=training, train_dataset=data, data_collator=default_data_collator,
        teacher=teacher, weight=weight, temperature=temperature, attention_weight=attention_weight,
    )  # fmt: skip


def attention_outputs(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and each layer's attention output, of a model in evaluation mode."""
    seen: list[torch.Tensor] = []
    handles = [layer.output.register_forward_hook(lambda m, a, y: seen.append(y)) for layer in attention_layers(model)]
    logits = model.eval()(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def by_hand(teacher: Any, student: Any, inputs: dict[str, torch.Tensor], temperature: float) -> tuple[float, float]:
    """The teacher's term and the attention outputs' error, token by token."""
    (target, targets), (logits, found) = (attention_outputs(model, inputs) for model in (teacher, student))
    labels = inputs["labels"]
    if logits.dim() == 3:
        places = [(b, i) for b in range(len(labels)) for i in range(labels.shape[1] - 1) if labels[b, i + 1] != -100]
    else:
        places = [(b,) for b in range(len(labels))]
    terms = []
    for place in places:
        if logits.shape[-1] == 1:
            terms.append(float((logits[place] - target[place]) ** 2))
            continue
        p, q = (torch.softmax(x[place] / temperature, -1) for x in (target, logits))
        terms.append(float(temperature**2 * (p * (p / q).log()).sum()))
    errors = []
    for s, t in zip(found, targets, strict=True):
        real = [(b, i) for b, i in torch.cartesian_prod(*map(torch.arange, s.shape[:2])).tolist()
                if inputs["attention_mask"][b, i]]  # fmt: skip
        lost = sum(float((s[place] - t[place]).square().sum()) for place in real)
        errors.append(lost / sum(float(t[place].square().sum()) for place in real))
    return sum(terms) / len(terms), sum(errors) / len(errors)


CASES = [("bert", "sequence", {"num_labels": 3}), ("bert", "sequence", {"num_labels": 1}), ("llama", "causal", {}),
         ("phi3", "causal", {})]  # fmt: skip


@pytest.mark.parametrize(("family", "head", "options"), CASES)
def test_loss_is_the_definition_and_reaches_only_the_student(family, head, options, tmp_path) -> None:
    teacher, student = pair(family, head, **options)
    inputs = labelled(student)
    task = student.eval()(**inputs).loss.item()
    term, error = by_hand(teacher, student, inputs, temperature=3.0)
    assert term > 0.01 and error > 0.01
    made = trainer(student, teacher, tmp_path)
    with unchanged(teacher):
        loss = made.compute_loss(student.train(), inputs)
        loss.backward()
    expected = torch.tensor(0.7 * task + 0.3 * term + 0.7 * error, dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected, **(FLOAT32_TASK if head == "causal" else EXACT))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(layer.output.weight.grad.any() for layer in attention_layers(student))
    # Evaluating is not distilling.
    assert made.compute_loss(student.eval(), inputs).item() == task


@pytest.mark.parametrize(("family", "head", "options"), CASES)
def test_equal_models_lose_nothing(family, head, options, tmp_path) -> None:
    teacher, _ = pair(family, head, **options)
    student = copy.deepcopy(teacher)
    made = trainer(student, teacher, tmp_path, weight=1.0)
    assert float(made.compute_loss(student.train(), labelled(student))) == 0


def test_divergence_in_chunks_is_the_divergence_and_so_are_its_gradients(monkeypatch) -> None:
    student = torch.randn(2, 9, 31, dtype=torch.float64, requires_grad=True)
    teacher, labels = torch.randn(2, 9, 31, dtype=torch.float64), torch.randint(31, (2, 9))
    labels[:, 4] = -100
    whole, count = divergence(student, teacher, labels, 2.0)
    (gradient,) = torch.autograd.grad(whole, student)
    assert count == 14
    monkeypatch.setattr(distill_module, "CHUNK", 3 * 31)
    parts, count = divergence(student, teacher, labels, 2.0)
    assert count == 14
    torch.testing.assert_close(parts, whole, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(parts, student)[0], gradient, **EXACT)
    assert not gradient[:, 3].any() and not gradient[:, -1].any() and gradient[:, 4].any()


def test_sixteen_bit_logits_are_compared_in_float32() -> None:
    student, teacher = torch.randn(2, 5, 11).bfloat16(), torch.randn(2, 5, 11).bfloat16()
    labels = torch.zeros(2, 5, dtype=torch.long)
    low, _ = divergence(student, teacher, labels, 2.0)
    high, _ = divergence(student.double(), teacher.double(), labels, 2.0)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=1e-6)
    assert relative_error(student, teacher, {}).dtype == torch.float32


def test_a_layer_that_adds_nothing_is_nothing_to_distil(tmp_path) -> None:
    """As one without heads: its error is 0, and not 0 / 0 for the whole model."""
    teacher = prune_heads(build("llama", "causal"), {0: range(8)})
    before = copy.deepcopy(teacher.state_dict())
    student, data = copy.deepcopy(teacher), labelled(teacher)
    trained = trainer(student, teacher, tmp_path, data=rows(student, data), max_steps=2, learning_rate=0.1)
    assert math.isfinite(trained.train().training_loss)
    after = trained.model.state_dict()
    assert all(weights.isfinite().all() for weights in after.values())
    assert any(not torch.equal(weights, before[name]) for name, weights in after.items())
    nothing, something = torch.zeros(1, 3, 4), torch.full((1, 3, 4), 3.0)
    assert relative_error(nothing, nothing, {}) == 0 and relative_error(something, nothing, {}) == 9


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("family", "head", "options"), CASES[1:3])
def test_gradient_checkpointing_gives_the_same_gradients(family, head, options, tmp_path) -> None:
    teacher, student = pair(family, head, **options)
    again, inputs = copy.deepcopy(student), labelled(student)
    trainer(student, teacher, tmp_path).compute_loss(student.train(), inputs).backward()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    trainer(again, copy.deepcopy(teacher), tmp_path).compute_loss(again.train(), inputs).backward()
    expected = gradients(student)
    assert gradients(again).keys() == expected.keys()
    for name, gradient in gradients(again).items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)


def rows(model: Any, *batches: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: value[i] for name, value in each.items()} for each in batches for i in range(len(each["labels"]))]


def trained(student: Any, teacher: Any, folder: Any, data: list, size: int, accumulate: int, **options: Any) -> Any:
    made = trainer(
        copy.deepcopy(student), copy.deepcopy(teacher), folder, data=data, per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate, max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    made.train()
    return made.model


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head", "options"), CASES[:3])
def test_accumulated_batches_train_as_one(family, head, options, tmp_path) -> None:
    teacher, student = pair(family, head, **options)
    if head == "sequence":
        teacher.accepts_loss_kwargs = student.accepts_loss_kwargs = False  # as GlueRun: losses are means
    data = rows(student, labelled(student), labelled(student, seed=1, lengths=(13, 4, 13)))
    # Errors of attention outputs are ratios, so only equal batches add up with them.
    one = trained(student, teacher, tmp_path, data, 6, 1, attention_weight=0.0)
    two = trained(student, teacher, tmp_path, data, 3, 2, attention_weight=0.0)
    same = trained(student, teacher, tmp_path, data[:1], 1, 1)
    twice = trained(student, teacher, tmp_path, data[:1] * 2, 1, 2)
    for left, right in ((one, two), (same, twice)):
        moved = 0.0
        for (name, a), b, start in zip(left.named_parameters(), right.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(a, b, **EXACT, msg=name)
            moved = max(moved, float((a - start).abs().max()))
        assert moved > 1e-4


def test_label_smoothing_smooths_the_tasks_share(tmp_path) -> None:
    teacher, student = pair("llama", "causal")
    inputs = labelled(student)
    term, _ = by_hand(teacher, student, inputs, temperature=3.0)
    logits, labels = student.eval()(**inputs).logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.2)
    made = trainer(student, teacher, tmp_path, attention_weight=0.0, label_smoothing_factor=0.2)
    loss = made.compute_loss(student.train(), inputs)
    # Transformers sums the smoothed part in float32.
    torch.testing.assert_close(loss, 0.7 * smoothed + 0.3 * term, rtol=1e-5, atol=1e-6)
    assert "labels" in inputs


# Adapters.


def adapted(family: str, head: str, **options: Any) -> Any:
    """A converted model with adapters that do something."""
    wrapped = add_adapters(convert_to_gqa(build(family, head, **options), 2), LoraArguments(lora=True, lora_r=4))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    return wrapped.eval()


@pytest.mark.parametrize("number", [2, 1])
def test_every_attention_projection_has_adapters(number: int) -> None:
    wrapped = add_adapters(convert_to_gqa(build("llama", "causal"), number), LoraArguments(lora=True))
    adapted_projections = {name.split(".")[-4] for name, _ in wrapped.named_parameters() if ".lora_A." in name}
    assert adapted_projections == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_projections_without_adapters_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """OLMo 2 has a norm over all query heads together, and one over all key heads."""
    add_adapters(any_model("olmo2"), LoraArguments(lora=True))
    (warning,) = caplog.messages
    assert "no adapters" in warning and "query (" in warning and "key (" in warning and "k_norm.weight" in warning
    caplog.clear()
    add_adapters(build("llama", "causal"), LoraArguments(lora=True))
    assert not caplog.messages


LORA_CASES = [("bert", "sequence", {}), ("llama", "sequence", {}), ("llama", "causal", {}), ("phi3", "causal", {})]


@pytest.mark.parametrize(("family", "head", "options"), LORA_CASES)
def test_merged_adapters_compute_the_same_and_leave_a_plain_checkpoint(family, head, options, tmp_path) -> None:
    plain = convert_to_gqa(build(family, head, **options), 2)
    wrapped = adapted(family, head, **options)
    inputs = batch(plain)
    before = outputs(wrapped, inputs)
    assert (before - outputs(plain, inputs)).abs().max() > 0.1
    merged = merge_adapters(wrapped)
    assert type(merged) is type(plain)
    # The weights' sum is rounded once: a few units in the last place of logits of about 10, through two layers.
    torch.testing.assert_close(outputs(merged, inputs), before, rtol=1e-4, atol=1e-4)
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == shapes
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert {layer.num_key_value_heads for layer in attention_layers(merged)} == {2}
    merged.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    loaded = load_pretrained(tmp_path).eval()
    assert torch.equal(outputs(loaded, inputs), outputs(merged, inputs))
    if head == "causal":
        stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(outputs(stock, inputs), outputs(merged, inputs))


@pytest.mark.parametrize(("family", "head", "options"), LORA_CASES)
def test_adapters_and_head_train_and_nothing_else(family, head, options) -> None:
    wrapped = adapted(family, head, **options)
    trainable = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    heads = {name for name in trainable if ".modules_to_save." in name}
    assert all(".lora_" in name for name in trainable - heads)
    assert bool(heads) == (head == "sequence")
    per_layer = 2 * (2 if family == "phi3" else 4)  # A and B of each projection; phi3's q, k and v are one
    assert len(trainable - heads) == per_layer * wrapped.config.num_hidden_layers


def test_adapters_that_did_nothing_are_refused() -> None:
    wrapped = add_adapters(build("llama", "causal"), LoraArguments(lora=True))
    with pytest.raises(RuntimeError, match=r"--lora had no effect.*learning_rate"):
        merge_adapters(wrapped)


@pytest.mark.parametrize(("family", "head", "options"), LORA_CASES)
def test_adapters_learn_from_a_teacher(family, head, options, tmp_path) -> None:
    teacher = build(family, head, **options)
    student = add_adapters(convert_to_gqa(copy.deepcopy(teacher), 2), LoraArguments(lora=True, lora_r=4))
    made = trainer(student, teacher, tmp_path, weight=0.0, attention_weight=1e6)  # the task's share is rounding
    made.compute_loss(student.train(), labelled(teacher)).backward()
    moved = {name: p.grad for name, p in student.named_parameters() if ".lora_B." in name}
    assert all(gradient is not None and gradient.abs().max() > 1 for gradient in moved.values())


# What is refused.

DISTILLATION = [
    ({"distill_weight": 0.3}, "distill_weight 0.3 has no effect without --distill"),
    ({"distill_attention_weight": 0.0}, "distill_attention_weight 0.0 has no effect without --distill"),
    ({"distill": True, "distill_weight": 1.1}, "distill_weight 1.1"),
    ({"distill": True, "distill_weight": float("nan")}, "distill_weight nan"),
    ({"distill": True, "distill_temperature": 0.0}, "distill_temperature 0.0"),
    ({"distill": True, "distill_temperature": float("inf")}, "distill_temperature inf"),
    ({"distill": True, "distill_attention_weight": -1.0}, "distill_attention_weight -1.0"),
    ({"distill": True, "distill_weight": 0.0, "distill_attention_weight": 0.0}, "leaves nothing of --distill"),
]
LORA = [
    ({"lora_r": 8}, "lora_r 8 has no effect without --lora"),
    ({"lora_dropout": 0.0}, "lora_dropout 0.0 has no effect without --lora"),
    ({"lora": True, "lora_r": 0}, "lora_r 0"),
    ({"lora": True, "lora_alpha": 0.0}, "lora_alpha 0.0"),
    ({"lora": True, "lora_dropout": 1.0}, "lora_dropout 1.0"),
]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [(DistillationArguments, *case) for case in DISTILLATION] + [(LoraArguments, *case) for case in LORA],
)
def test_values_that_cannot_be_honoured_are_named(kind, values, message) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    ("kind", "values", "training", "message"),
    [
        (DistillationArguments, {"distill": True}, {"do_train": False}, "no effect without training"),
        (LoraArguments, {"lora": True}, {"do_train": False}, "no effect without training"),
        (DistillationArguments, {"distill": True, "distill_weight": 1.0}, {"label_smoothing_factor": 0.1}, "label_sm"),
        (DistillationArguments, {"distill": True}, {"torch_compile": True}, "torch_compile"),
        (
            DistillationArguments,
            {"distill": True},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "reentrant",
        ),
    ],
)
def test_training_under_which_they_would_not_be_what_they_say_is_refused(
    kind, values, training, message, tmp_path
) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, **({"do_train": True} | training))
    with pytest.raises(ValueError, match=message):
        kind(**values).check(arguments)
