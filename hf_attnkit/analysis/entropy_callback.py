"""Attention entropy while training (Zhai et al. 2023, arXiv 2303.06296: entropy collapses before training diverges).

The first batch that the trainer gives the model, or a part of it, is kept as a probe. Every so many steps it runs
through the model again, in evaluation mode and without gradients, and what the heads then attend to is measured. The
same tokens each time, so that a change is a change of the model.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from hf_attnkit.attention.dispatch import observe
from hf_attnkit.common.checks import fraction, integer
from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.importance.methods.entropy import entropy_sums
from hf_attnkit.models.layers import AttentionLayer, attention_layers
from hf_attnkit.observing.attention_calls import has_softmax, require_visible, visible_attention
from hf_attnkit.observing.batches import LABELS, spare_options

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

logger = logging.get_logger(__name__)

EDGE = 1e-3  # a head whose mean is as near as this to 0 or 1 does the same for every query
PREFIX = "attention_entropy"


class AttentionEntropyCallback(TrainerCallback):
    """Logs the attention entropy of every layer while a `Trainer` trains.

        trainer = Trainer(..., callbacks=[AttentionEntropyCallback()])

    After the first step of `train()` and at each multiple of `every_n_steps` it gives `Trainer.log` for each layer
    `attention_entropy/layer_0/mean` and `attention_entropy/layer_0/min`: mean and minimum over the heads of their mean
    entropy, as a fraction of ln(number of visible keys), in [0, 1]; 1 is uniform, 0 is one key. So they are in
    `state.log_history` and in every report that the trainer writes. Layers of linear attention, which have no attention
    weights, are left out.

    A layer is warned of, once, when its mean is below `collapse_threshold`; when a head attends to one key at every
    query (within 0.001); or when a head's attention has become uniform, which it was not at first.

    Training is what it would be without: weights, random state, modes and the order of the data are left alone. A
    measurement costs a forward pass of at most the batch and about one more attention, which is at most about a
    training step: at the default interval, below 2 %.

    Args:
        every_n_steps: interval in optimizer steps.
        max_examples: how many rows of the batch are the probe.
        collapse_threshold: fraction in [0, 1] below which a layer's mean entropy is warned of; 0 for never.

    Raises:
        ValueError: for an argument out of range; when training begins, for a model that is not supported.
    """

    def __init__(self, every_n_steps: int = 100, max_examples: int = 8, collapse_threshold: float = 0.05) -> None:
        self.every_n_steps = integer(every_n_steps, "every_n_steps", minimum=1)
        self.max_examples = integer(max_examples, "max_examples", minimum=1)
        self.collapse_threshold = fraction(
            collapse_threshold, "collapse_threshold", why="a fraction of the entropy of uniform attention"
        )
        self._trainer: Trainer | None = None
        self._layers: list[AttentionLayer] = []
        self._hook: Any = None
        self._probe: dict[str, Any] | None = None
        self._uniform_at_first: list[Tensor] | None = None
        self._warned: set[int] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the trainer, and keep the first training batch when it comes."""
        self._end()
        trainer = _calling_trainer()
        wrapped = trainer.model_wrapped
        model = core_model(wrapped)
        layers = attention_layers(model, adapters=True)
        require_visible(model, layers)
        self._layers = [layer for layer in layers if has_softmax(layer.module)]
        if not self._layers:
            raise ValueError(
                f"every layer of {type(model).__name__} runs linear attention, which has no attention weights and so "
                "no entropy; leave AttentionEntropyCallback out"
            )
        self._trainer = trainer
        # On the outermost module, so that a compiled one is not compiled again for the hook's sake.
        self._hook = wrapped.register_forward_pre_hook(self._keep, with_kwargs=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and log, if it is time."""
        if self._trainer is None or self._probe is None:
            return
        is_first = self._uniform_at_first is None
        if not is_first and state.global_step % self.every_n_steps:
            return
        means = self._measure(self._trainer.model_wrapped, self._probe)
        if self._uniform_at_first is None:
            self._uniform_at_first = [mean > 1 - EDGE for mean in means]
        self._warn(means, self._uniform_at_first, state.global_step)
        values = {}
        for layer, mean in zip(self._layers, means, strict=True):
            values[f"{PREFIX}/layer_{layer.index}/mean"] = float(mean.mean())
            values[f"{PREFIX}/layer_{layer.index}/min"] = float(mean.min())
        # `Trainer.log` clears the request to log this step's loss.
        should_log = control.should_log
        self._trainer.log(values)
        control.should_log = should_log

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the trainer, the model and the probe."""
        self._end()

    def _end(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._trainer = self._hook = self._probe = self._uniform_at_first = None
        self._layers, self._warned = [], set()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        self._hook.remove()
        self._hook = None
        model = core_model(module)
        inputs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        rows = len(inputs[model.main_input_name])
        self._probe = {
            name: value[: self.max_examples].detach().clone()
            if isinstance(value, Tensor) and value.dim() and len(value) == rows
            else value
            for name, value in inputs.items()
        }

    def _measure(self, wrapped: nn.Module, probe: dict[str, Any]) -> list[Tensor]:
        """Mean normalised entropy of every head, `(num_heads,)` per layer."""
        model = core_model(wrapped)
        if not model.config.is_encoder_decoder:  # which may make its decoder's inputs of the labels
            probe = {name: value for name, value in probe.items() if name not in LABELS} | spare_options(model)
        # A forward pass does not need what only splits batches or averages gradients; it needs what shards weights.
        is_copy = isinstance(wrapped, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        runs: Any = wrapped.module if is_copy else wrapped
        sums = entropy_sums(self._layers, True, probe)
        with (
            torch.no_grad(),
            evaluation_mode(wrapped),
            _eager(wrapped),
            visible_attention(model, adapters=True),
            observe(sums),
        ):
            runs(**probe)
        return sums.means()

    def _warn(self, means: list[Tensor], uniform_at_first: list[Tensor], step: int) -> None:
        for layer, mean, uniform in zip(self._layers, means, uniform_at_first, strict=True):
            stuck = (mean < EDGE) | ((mean > 1 - EDGE) & ~uniform)
            reasons = []
            if float(mean.mean()) < self.collapse_threshold:
                reasons.append(f"its mean is below collapse_threshold={self.collapse_threshold}")
            for head in stuck.nonzero()[:, 0].tolist():
                what = "attends to one key at every query" if mean[head] < EDGE else "has become uniform"
                reasons.append(f"head {head} {what}")
            if reasons and layer.index not in self._warned:
                self._warned.add(layer.index)
                logger.warning(
                    f"step {step}, {layer.name}: attention entropy has collapsed: {', '.join(reasons)} (mean "
                    f"{float(mean.mean()):.3f}, min {float(mean.min()):.3f} of 1 = uniform). A lower learning rate, a "
                    "longer warm-up or smaller weights may help"
                )


def core_model(module: nn.Module) -> PreTrainedModel:
    """The Transformers model inside what wraps it for training: PEFT, torch.compile, data parallelism, sharding.

    Raises:
        TypeError: if there is none.
    """
    inner: Any = module
    while not isinstance(inner, PreTrainedModel):
        if hasattr(type(inner), "get_base_model"):
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod") or hasattr(inner, "module"):
            inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
        else:
            raise TypeError(f"{type(module).__name__} is no transformers.PreTrainedModel and wraps none")
    return inner


def _eager(module: nn.Module) -> AbstractContextManager[Any]:
    """Run what is compiled as it was before: looking at attention is not worth compiling the model for."""
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _calling_trainer() -> Trainer:
    """The trainer that is calling: it passes callbacks neither itself nor its loggers, but is in the call stack.

    Raises:
        RuntimeError: if none is.
    """
    from transformers import Trainer

    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    raise RuntimeError(
        "AttentionEntropyCallback logs through transformers.Trainer, and none is calling it; give it to a trainer: "
        "Trainer(..., callbacks=[AttentionEntropyCallback()])"
    )
