"""Resume after a kill at any moment: one file says what of a run is done.

`progress.json` in the output folder is replaced in one step, each time after what it names has been written. So a
stage, a changed model or a checkpoint counts if it is named there, and whatever else a kill left behind does not:

    run          the arguments that make the run what it is
    stages       the measured stages, as in results.json
    changes      what each change of the model returned; the model after change number n is in changed-<n>
    training     the number of the training that began last, from 1; 0 before
    checkpoints  the steps of its whole checkpoints
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_attnkit.experiment.files import write_json

logger = logging.getLogger(__name__)

FLAG = "--resume_from_checkpoint"
# What decides neither the numbers nor the weights: where and how often things are written, and what runs them.
_FREE_PREFIXES = ("log", "save_", "push_", "hub_", "report_", "ddp_", "trackio_")
_FREE = {"output_dir", "resume_from_checkpoint", "run_name", "project", "disable_tqdm", "use_cpu", "local_rank",
         "ignore_data_skip", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
         "dataloader_prefetch_factor", "per_device_eval_batch_size", "eval_accumulation_steps",
         "command", "seeds", "predict", "entropy_every_n_steps"}  # fmt: skip


def with_value(argv: Sequence[str]) -> list[str]:
    """The arguments with `true` after a flag without one; Transformers' parser wants a value."""
    given: list[str] = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=True):
        given += [word, "true"] if word == FLAG and following.startswith("--") else [word]
    return given


class Progress:
    """What is done of the run in an output folder; for every process to read and the main one to write.

    A run that does not train is done soon, and keeps none.

    Args:
        output: the folder.
        run: `identity` of the run.
        training: its `resume_from_checkpoint` is a folder, or `true` for the newest whole checkpoint of `output`,
            or for what is done without one; without it the folder must hold no run.

    Attributes:
        checkpoint: the folder that the next training resumes from, or `None` for its first step.

    Raises:
        ValueError: a folder that holds a finished run, another run, or one that was not to be resumed; or a checkpoint
            that is none or not whole.
    """

    def __init__(self, output: Path, run: Mapping[str, Any], training: TrainingArguments) -> None:
        self.output, self.file = output, output / "progress.json"
        self.run, self.trains = json.loads(json.dumps(run)), training.do_train
        self.is_main = training.process_index == 0
        self.stages: list[dict[str, Any]] = []
        self.changes: list[dict[str, Any]] = []
        self.training, self.checkpoints = 0, list[int]()
        asked = str(training.resume_from_checkpoint or "false")
        named = None if asked.lower() in ("true", "false") else Path(asked)
        if asked.lower() != "false" and not self.trains:
            raise ValueError(f"{FLAG} {asked} has no effect without training; add --do_train, or leave it out")
        if named is not None and not named.is_dir():
            raise ValueError(f"{FLAG} {named} is no folder; name one such as .../checkpoint-500, or none")
        if (output / "results.json").exists():
            raise ValueError(f"--output_dir {output} holds a finished run (results.json); name another folder")
        if self.file.exists():
            if asked.lower() == "false":
                raise ValueError(
                    f"--output_dir {output} holds a run that did not end (progress.json); resume it with {FLAG}, or "
                    "name another folder"
                )
            self._read()
        elif named is None and (found := self._folders()):
            raise ValueError(
                f"--output_dir {output} holds {found[-1].name} of another program (there is no progress.json); name "
                f"another folder, or a checkpoint to resume from with {FLAG} FOLDER"
            )
        self.checkpoint = self._named(named) if named is not None else self._newest()

    @property
    def changed(self) -> Path:
        """Where the model after the last change is."""
        return self.output / f"changed-{len(self.changes)}"

    def write(self) -> None:
        """Replace the file."""
        if self.is_main and self.trains:
            names = ("run", "stages", "changes", "training", "checkpoints")
            write_json(self.file, {name: getattr(self, name) for name in names})

    def add_change(self, facts: dict[str, Any], model: PreTrainedModel) -> None:
        """Save the changed model, and from then on take it over. The training before it is over."""
        self.changes.append(facts)
        if self.is_main:
            shutil.rmtree(self.changed, ignore_errors=True)  # of a run that was killed while it wrote it
            with writing(self.changed):
                model.save_pretrained(self.changed)
        self.checkpoints = []
        self.write()

    def earlier(self) -> list[Path]:
        """The models of the changes before the last, which are kept to be timed at the end."""
        return [self.output / f"changed-{number}" for number in range(1, len(self.changes))]

    def end(self, training: int) -> None:
        """Note that a training is over and measured, and that the next starts at its first step, from another model."""
        self.training, self.checkpoints = training + 1, []
        self.write()
        if self.is_main:
            self._remove_folders()

    def is_over(self, training: int, changes: int) -> bool:
        """Whether the training of this number, after so many changes, was followed by another or by a change."""
        return training < self.training or changes < len(self.changes)

    def begin(self, training: int, step: int) -> None:
        """Note that a training begins or resumes at a step. Later checkpoints will be written over: none is whole."""
        is_same = training == self.training
        self.training, self.checkpoints = training, [at for at in self.checkpoints if is_same and at <= step]
        self.write()
        if self.is_main and not step:  # folders of an earlier training, whose files would lie among those of this one
            self._remove_folders()

    def remove(self) -> None:
        """Remove what only a resumed run needs, after the run has ended."""
        if self.is_main:
            for folder in (*self.earlier(), self.changed):
                shutil.rmtree(folder, ignore_errors=True)
            self.file.unlink(missing_ok=True)

    def _read(self) -> None:
        held = json.loads(self.file.read_text())
        differences = [
            f"{name} was {held['run'].get(name)!r} and is {self.run.get(name)!r}"
            for name in sorted(held["run"].keys() | self.run.keys())
            if held["run"].get(name) != self.run.get(name)
        ]
        if differences:
            raise ValueError(
                f"--output_dir {self.output} holds another run: {'; '.join(differences)}. Give what it was, or another "
                "folder"
            )
        self.stages, self.changes = held["stages"], held["changes"]
        self.training, self.checkpoints = held["training"], held["checkpoints"]

    def _remove_folders(self) -> None:
        for path in self._folders():
            shutil.rmtree(path, ignore_errors=True)

    def _folders(self) -> list[Path]:
        found = [path for path in self.output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))

    def _newest(self) -> Path | None:
        noted = [self.output / f"checkpoint-{step}" for step in self.checkpoints]
        whole = [path for path in noted if path.is_dir() and _has_optimizer(path)]
        newest = max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
        for path in self._folders():
            if path not in whole and (newest is None or path.stat().st_mtime > newest.stat().st_mtime):
                instead = newest.name if newest else "the first step"
                reason = "is not whole, of an earlier training or without an optimizer"
                logger.warning("%s %s; resuming from %s", path, reason, instead)
        return newest

    def _named(self, folder: Path) -> Path:
        own = folder.resolve().parent == self.output.resolve() and self.file.exists()
        is_whole = folder.name in [f"checkpoint-{step}" for step in self.checkpoints] if own else _has_state(folder)
        if not is_whole:
            raise ValueError(
                f"{FLAG} {folder} is not a whole checkpoint: it lacks what is written last; name an earlier one, or "
                "none for the newest whole one of --output_dir"
            )
        if not _has_optimizer(folder):
            raise ValueError(
                f"{FLAG} {folder} holds no state of the optimizer, as --save_only_model leaves it out, so training "
                "could not resume as it was; name another, or give the folder as --model_name_or_path of a new run"
            )
        return folder


def _has_state(folder: Path) -> bool:
    """Whether a checkpoint has the file that `Trainer` writes last, to its end."""
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _has_optimizer(folder: Path) -> bool:
    """Whether training can resume as it was; without one `Trainer` begins a new one and says nothing."""
    return any(folder.glob("optimizer*")) or any(folder.glob("global_step*"))  # the latter is DeepSpeed's


def identity(training: TrainingArguments, *others: Any) -> dict[str, Any]:
    """The arguments that a run must be resumed with, by name: these dataclasses' and most of `training`'s."""
    kept = {name: value for name, value in training.to_dict().items() if not name.startswith(_FREE_PREFIXES)}
    named = {field.name: getattr(part, field.name) for part in others for field in fields(part)} | kept
    named = {name: value for name, value in named.items() if name not in _FREE}
    for name, value in named.items():
        if name.endswith(("_path", "_dir", "_file")) and isinstance(value, str) and Path(value).exists():
            named[name] = str(Path(value).resolve())
    return {"recipe": Path(sys.argv[0]).stem, "processes": training.world_size, **named}


class WholeCheckpoints(TrainerCallback):
    """Notes each checkpoint once all processes have written it, and only then removes old ones.

    `Trainer` removes them before other processes have written theirs, so it must be told of no limit.

    Args:
        training: its number in the run, from 1.
        limit: `save_total_limit`; the newest and the best stay in any case.
    """

    def __init__(self, progress: Progress, training: int, limit: int | None) -> None:
        self.progress, self.training, self.limit = progress, training, limit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the training."""
        self.progress.begin(self.training, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note it; then remove what is too many."""
        args.distributed_state.wait_for_everyone()
        noted = sorted({*self.progress.checkpoints, state.global_step})
        if self.limit and self.limit > 0:
            stay = {state.global_step} | ({state.best_global_step} & set(noted))
            others = [step for step in noted if step not in stay]
            noted = sorted(stay | set(others[len(others) - max(self.limit - len(stay), 0) :]))
        self.progress.checkpoints = noted
        self.progress.write()
        if self.limit and self.limit > 0 and self.progress.is_main:
            for path in self.progress._folders():
                if int(path.name.removeprefix("checkpoint-")) not in noted:
                    shutil.rmtree(path, ignore_errors=True)


def check_weights(checkpoint: Path, model: PreTrainedModel | PeftModel) -> None:
    """Raise `ValueError` unless a checkpoint's tensors are this model's, by name and shape; reads no weights.

    `Trainer` would load those whose names fit and warn of the others.
    """
    there: dict[str, tuple[int, ...]] = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            there |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    if not there:  # sharded by FSDP, or another format: loading checks those
        return
    here = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    shared = {here[name].data_ptr() for name in there if name in here}  # a tied tensor is saved once
    kept = {name: tensor for name, tensor in here.items() if name in there or tensor.data_ptr() not in shared}
    wanted = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    wrong = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
    if wrong:
        config = checkpoint / "config.json"
        architectures = json.loads(config.read_text()).get("architectures") if config.exists() else None
        name = wrong[0]
        raise ValueError(
            f"{FLAG} {checkpoint} is a checkpoint of another model ({(architectures or ['adapters'])[0]}, not "
            f"{type(model).__name__} as it trains here): {name} has the shape {there.get(name, 'of none')} there and "
            f"{wanted.get(name, 'of none')} here (as {len(wrong) - 1} others); name a checkpoint of the same run"
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the errors of a full disk into one that names the remedy.

    Raises:
        OSError: in place of what safetensors, PyTorch and Python each raise for it.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # torch.save has no error of its own: it names the source file of its writer.
        of_writer = isinstance(error, SafetensorError) or "inline_container" in str(error)
        if not (is_full or of_writer):
            raise
        raise OSError(
            f"{folder} could not be written to the end ({error}): free some space and resume with {FLAG}. What was "
            "written before is as it was, and what is not whole will not be used"
        ) from error
