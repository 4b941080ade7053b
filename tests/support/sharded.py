"""Recipes on several CPU processes, sharded where they ask for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from support.kills import kill_at
from support.subprocesses import run_script
from transformers import Trainer


def run_recipes(commands: Sequence[tuple[str, list[str]]], step: int | None) -> None:
    """One after the other; the process dies before the training step of this number."""
    if "ACCELERATE_USE_FSDP" in os.environ or any("--fsdp" in arguments for _, arguments in commands):
        pass_off_as_gpus()
    if step is not None:
        kill_at(Trainer, "training_step", step, lambda *_: True)
    for script, arguments in commands:
        run_script(script, arguments)


def pass_off_as_gpus() -> None:
    """accelerate shards on accelerators alone, PyTorch on the CPU as well: say, after their devices have been chosen,
    that each process has a GPU."""
    start = AcceleratorState.__init__

    def passed_off(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        start(self, *arguments, **options)

    AcceleratorState.__init__ = passed_off
