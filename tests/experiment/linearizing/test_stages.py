"""Stages come in one order, and a teacher is the same model."""

from __future__ import annotations

from unittest.mock import create_autospec

import pytest
from support.models import build
from transformers import TrainingArguments

from hf_attnkit.experiment.glue.run import GlueRun
from hf_attnkit.experiment.linearizing.arguments import LinearizeArguments
from hf_attnkit.experiment.linearizing.stages import Linearization, of_features
from hf_attnkit.experiment.record import Change
from hf_attnkit.experiment.training.distill import DistillationArguments, DistillationTrainer
from hf_attnkit.experiment.training.lora import LoraArguments


def stages() -> Linearization:
    run = create_autospec(GlueRun, instance=True)
    run.model, run.sharded, run.training = build("bert", "sequence"), False, TrainingArguments(use_cpu=True)
    run.training.do_train, run.done = False, Change("linearization", "", {})
    run.change.return_value = {}
    return Linearization(run, LinearizeArguments(refit="none"), [0, 1], ("calibration_samples", 0))


def test_a_stage_before_the_swap_is_refused() -> None:
    for call in (lambda: stages().transfer(), lambda: stages().refit(), lambda: stages().train(LoraArguments())):
        with pytest.raises(ValueError, match="no layer runs it yet: call swap first"):
            call()


def test_a_stage_after_a_later_one_is_refused() -> None:
    run = stages()
    run.swap()
    run.refit()
    with pytest.raises(ValueError, match="stage 'chosen' comes before 'refitted', which is done: the order is changed"):
        run.choose()
    with pytest.raises(ValueError, match="no longer untouched: call keep_teacher before stage 'changed'"):
        run.keep_teacher()
    with pytest.raises(ValueError, match="call keep_teacher before swap"):
        run.distil(DistillationArguments(distill=True), LoraArguments(), epochs=1.0)


def test_features_are_trained_by_adam_whatever_trains_the_model() -> None:
    own = {"weight_decay": 0.1, "warmup_steps": 7, "max_steps": 5, "learning_rate": 1e-5, "num_train_epochs": 3.0}
    of_model = TrainingArguments(use_cpu=True, optim="adafactor", optim_args="scale_parameter=False", **own)
    made = of_features(of_model, 2.0, 1e-2)
    plain = of_features(TrainingArguments(use_cpu=True), 2.0, 1e-2)
    for name in (*own, "optim", "optim_args"):
        assert getattr(made, name) == getattr(plain, name), name
    assert (made.learning_rate, made.num_train_epochs, made.max_steps) == (1e-2, 2.0, -1)
    assert (made.weight_decay, made.warmup_steps, of_model.weight_decay) == (0, 0, 0.1)
    for name in ("adamw_torch", "adamw_torch_fused"):
        assert of_features(TrainingArguments(use_cpu=True, optim=name), 2.0, 1e-2).optim == name


def test_a_teacher_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="the teacher has num_hidden_layers 3 and the model that trains 2"):
        DistillationTrainer(
            model=build("bert", "sequence"), args=TrainingArguments(use_cpu=True), weight=1.0, temperature=2.0,
            attention_weight=1.0, teacher=build("bert", "sequence", num_hidden_layers=3),
        )  # fmt: skip
