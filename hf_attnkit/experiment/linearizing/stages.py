"""Linearise and recover: what the linearising recipes do with their `Run`, stage by stage.

    baseline     the untouched model
    control      with --control, the untouched model trained as long as the stages that train all weights
    changed      linear attention with features as they start
    transferred  features learned, layer by layer, towards softmax attention's outputs (see `transfer`)
    chosen       with --softmax_layers, the costliest layers back on softmax attention (see `layer_costs`)
    refitted     output projections fitted in closed form, on the layers that stay linear
    distilled    all weights, or adapters, trained towards the untouched model
    recovered    trained on the task's own loss

A stage that is not asked for is left out. Each begins from a saved model, so a killed run resumes at its stage, within
a training at its last checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_attnkit
from hf_attnkit.attention.kind import ATTRIBUTE
from hf_attnkit.common.options import changed
from hf_attnkit.experiment.linearizing.arguments import LinearizeArguments
from hf_attnkit.experiment.linearizing.branches import branch_scores, linear_shares
from hf_attnkit.experiment.linearizing.layer_costs import costliest, layer_costs, uniform
from hf_attnkit.experiment.linearizing.running import swap_quietly
from hf_attnkit.experiment.linearizing.transfer import TransferTrainer
from hf_attnkit.experiment.run import Run
from hf_attnkit.experiment.swapping import running as attention_of
from hf_attnkit.experiment.training.distill import DistillationArguments
from hf_attnkit.experiment.training.lora import LoraArguments
from hf_attnkit.experiment.training.uptrain import recover
from hf_attnkit.models.layers import attention_layers

KIND = "linearization"
ADAM = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED, OptimizerNames.ADAMW_TORCH_XLA,
        OptimizerNames.ADAMW_TORCH_NPU_FUSED)  # fmt: skip
ORDER = ("changed", "transferred", "chosen", "refitted", "distilled", "recovered")


class Linearization:
    """The stages of one run; a recipe calls what it wants in this order, and any other raises `ValueError`.

    Args:
        calibration: what its size is called in results.json, and the size: data for KL, refit and branches.
        candidates: the layers that are linearised or chosen among.
    """

    def __init__(
        self, run: Run, arguments: LinearizeArguments, candidates: list[int], calibration: tuple[str, int]
    ) -> None:
        if run.sharded:
            raise ValueError("features are not learned on a sharded model; leave FSDP and DeepSpeed out")
        self.run, self.arguments, self.candidates = run, arguments, candidates
        self._called, self._size = calibration
        self.linear = list(candidates)
        self._before = attention_of(run.model)
        self.costs: dict[str, float] = {}
        self._settings: dict[str, Any] = {}  # of the trainings, for results.json
        self._begun: list[str] = []
        # Before anything prepares the model: under autocast accelerate gives it a forward that a copy would share.
        self.teacher: PreTrainedModel | None = None

    def keep_teacher(self) -> None:
        """Keep a copy of the untouched model for `distil`."""
        if self._begun:
            raise ValueError(f"the model is no longer untouched: call keep_teacher before stage {self._begun[0]!r}")
        self.teacher = copy.deepcopy(self.run.model)

    def swap(self) -> None:
        """Stage "changed"."""
        self._begin("changed")
        self._change(lambda: self._swap(self.candidates))
        self.run.evaluate("changed")

    def transfer(self) -> None:
        """Stage "transferred"; nothing without training, or without features to learn."""
        self._begin("transferred")
        arguments = self.arguments
        if not (self.run.training.do_train and arguments.transfer_epochs and arguments.learns):
            return
        training = of_features(self.run.training, arguments.transfer_epochs, arguments.transfer_learning_rate)
        self._settings |= {
            "transfer_epochs": arguments.transfer_epochs,
            "transfer_learning_rate": arguments.transfer_learning_rate,
        }
        facts = self.run.train(TransferTrainer, args=training, callbacks=[])
        self.run.evaluate("transferred", **facts)

    def choose(self) -> None:
        """Stage "chosen": which layers keep softmax attention."""
        self._begin("chosen")
        number = self.arguments.softmax_layers
        if not number:
            return
        made = self._change(self._choose)
        self.costs = made["costs"]
        self.run.evaluate("chosen")

    def refit(self) -> None:
        """Stage "refitted"."""
        self._begin("refitted")
        if self.arguments.refit == "none":
            return
        self._change(lambda: self._swap(self.linear, refit=True))
        self.run.evaluate("refitted")

    def distil(
        self, distillation: DistillationArguments, lora: LoraArguments, *, epochs: float, stage: str = "distilled"
    ) -> None:
        """Train all weights, or adapters, towards the untouched model, or without distillation on the task alone."""
        self._begin("distilled")
        if distillation.distill and self.teacher is None:
            raise ValueError("there is no untouched model to distil towards: call keep_teacher before swap")
        self._save()
        self._settings |= vars(distillation) if distillation.distill else {}
        self._settings |= vars(lora) if lora.lora else {}
        training = longer(self.run.training, epochs - self.run.training.num_train_epochs)
        self.run.evaluate(stage, **recover(self.run, self.teacher, distillation, lora, args=training))

    def train(self, lora: LoraArguments) -> None:
        """Stage "recovered": the task's own loss."""
        self._begin("recovered")
        self._save()
        self._settings |= vars(lora) if lora.lora else {}
        self.run.evaluate("recovered", **recover(self.run, None, DistillationArguments(), lora))

    def finish(self, **facts: Any) -> None:
        """Measure the branches, and finish the run.

        Args:
            facts: the recipe's own settings.
        """
        run, arguments = self.run, self.arguments
        looked = arguments.calibrated or (arguments.has_branches and run.stages)
        facts = {
            "linear_layers": self.linear,
            "choose": arguments.choose if arguments.softmax_layers else None,
            "layer_costs": self.costs,
            "branches": self._branches(),
            "refit": arguments.refit,
            **({self._called: self._size} if looked else {}),
            **self._settings,
            **facts,
        }
        run.finish(**facts)

    def _begin(self, stage: str) -> None:
        """Note a stage; an order that would undo what an earlier stage did is refused."""
        last = self._begun[-1] if self._begun else None
        if last is None and stage != "changed":
            raise ValueError(f"stage {stage!r} changes linear attention, and no layer runs it yet: call swap first")
        if last is not None and ORDER.index(stage) <= ORDER.index(last):
            raise ValueError(f"stage {stage!r} comes before {last!r}, which is done: the order is {', '.join(ORDER)}")
        self._begun.append(stage)

    def _branches(self) -> dict[str, Any]:
        run = self.run
        if not (run.stages and self.arguments.has_branches):
            return {}
        metric = next(iter(run.stages[0]["metrics"]))
        scores = branch_scores(run.model, lambda: float(run.measure(run.trainer())["metrics"][metric]))
        shares = linear_shares(run.model, run.calibration_batches(self._size)) if self._size else {}
        return {"metric": metric, **scores, "linear_shares": {str(index): each for index, each in shares.items()}}

    def _change(self, make: Callable[[], Any]) -> dict[str, Any]:
        made = self.run.change(make, kind=KIND, title="")
        self.linear = made.get("linear", self.linear)
        name, count = self.arguments.kind.name, len(self._before)
        assert self.run.done is not None
        which = "" if len(self.linear) == count else f" in {len(self.linear)} of {count} layers"
        self.run.done.title = f"{name} attention{which}"
        self.run.done.facts = {
            "attention": [name if index in self.linear else before for index, before in enumerate(self._before)],
            "attention_options": dict(changed(self.arguments.kind)),
        }
        return made

    def _save(self) -> None:
        """Keep the model between two trainings: a resumed run begins the second from here."""
        self._change(lambda: None)

    def _choose(self) -> dict[str, Any]:
        arguments, run = self.arguments, self.run
        costs: dict[int, float] = {}
        if arguments.choose == "kl":
            layers = [each for each in attention_layers(run.model) if each.index in self.candidates]
            costs = layer_costs(run.model, layers, run.calibration_batches(self._size))
            kept = costliest(costs, arguments.softmax_layers)
        else:
            kept = uniform(self.candidates, arguments.softmax_layers)
        linear = [index for index in self.candidates if index not in kept]
        self._swap(linear)
        return {"linear": linear, "costs": {str(index): cost for index, cost in costs.items()}}

    def _swap(self, layers: list[int], *, refit: bool = False) -> None:
        """These layers linear, with the features that they have, and all others as they were."""
        model = self.run.model
        if any(hasattr(layer.module, ATTRIBUTE) for layer in attention_layers(model)):
            hf_attnkit.restore_attention(model)
        fitting: dict[str, Any] = {}
        if refit:
            fitting = {"calibration": list(self.run.calibration_batches(self._size)), "refit": self.arguments.refit}
        swap_quietly(model, self.arguments.kind, layers, **fitting)


def of_features(training: TrainingArguments, epochs: float, learning_rate: float) -> TrainingArguments:
    """The model's arguments with what trains features: Adam at this rate from the first step, without decay."""
    made = copy.copy(training)
    made.learning_rate, made.num_train_epochs = learning_rate, epochs
    made.max_steps, made.max_grad_norm = -1, 0.0  # a common bound would tie layers to one another
    made.weight_decay, made.warmup_steps = 0.0, 0
    if made.optim not in ADAM:
        made.optim, made.optim_args = TrainingArguments.optim, None
    made.gradient_checkpointing = False
    return made


def longer(training: TrainingArguments, epochs: float, *, trainings: int = 1) -> TrainingArguments:
    """The same arguments with so many more epochs.

    Args:
        trainings: how many it is as long as; `max_steps`, where it is given, bounds each of them alike.
    """
    made = copy.copy(training)
    made.num_train_epochs += epochs
    if made.max_steps > 0:
        made.max_steps *= trainings
    return made
