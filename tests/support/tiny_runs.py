"""Shown commands made small enough to run: tiny models, a handful of rows, a step or two of training."""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import itertools
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import launch_command_parser
from support.glue_files import tiny_tokenizer, write_glue, write_test
from support.shown_commands import ROOT, Shown
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_attnkit.experiment.comparing.prunings import parse_variant
from hf_attnkit.experiment.glue.tasks import TASKS

# What a run gets where its recipe takes the flag; the last value given counts.
SMALLER: dict[str, tuple[str, ...]] = {
    "--max_train_samples": ("8",),
    "--max_eval_samples": ("6",),
    "--max_steps": ("2",),
    "--max_length": ("32",),
    "--block_size": ("16",),
    "--report_to": ("none",),
    "--disable_tqdm": ("true",),
    "--use_cpu": (),
    "--num_texts": ("4",),
    "--lengths": ("32",),
    "--length": ("24",),
    "--batch_size": ("2",),
    "--layers": ("1",),
    "--heads": ("4",),
    "--kv_heads": ("2",),
    "--rounds": ("1",),
    "--steps": ("101",),
    "--gib": ("0.001",),
    "--hidden_size": ("64",),
    "--vocab_size": ("300",),
}
# The same where the command gives the flag already.
SMALLER_IF_GIVEN: dict[str, tuple[str, ...]] = {
    "--repeats": ("1",),
    "--seeds": ("0",),
    "--softmax_layers": ("0",),  # the tiny models have one layer
    "--choose": ("kl",),  # of none
    "--methods": ("mean",),  # each in a process of its own
    "--find_lengths": ("96",),
    "--last_tokens": ("16",),
    "--window": ("4",),
    "--first_token_repeats": ("1",),
    "--prune_fractions": ("0.5",),
    "--prune_steps": ("2",),
    "--torch_compile": ("false",),  # test_recipes_training.py compiles
    "--save_steps": ("1",),
    "--distance_samples": ("2",),
    "--sides": ("pytorch", "onnx"),
    "--precision": ("float32",),  # tests of the export quantize
    "--tasks": ("demo_pairs", "--limit", "4"),
    "--batch_sizes": ("2",),
    "--new_tokens": ("2", "--sides", "pytorch"),  # tests of the export run decoders in ONNX Runtime
}
# Of recipes that try many ways: the others are tried by tests of their own.
SMALLER_OF: dict[str, tuple[str, ...]] = {
    "recipes/benchmarks/backends.py": ("--cases", "causal", "--parts", "backward"),  # the forward pass compiles
    "recipes/benchmarks/attention.py": ("--implementations", "sdpa", "flash", "linear"),
    "recipes/compare/conversions_glue.py": ("--variants", "mean", "pca+data+refit"),
    "recipes/compare/conversions_lm.py": ("--variants", "mean", "pca+data+refit"),
    "recipes/compare/long_context_lm.py": ("--variants", "reach+refit", "random", "window", "--shares", "0.5",
                                           "--random_draws", "1"),
    "recipes/linearize_glue.py": ("--layers", "0"),  # numbers of layers, not how many
    "recipes/linearize_lm.py": ("--layers", "0"),
}  # fmt: skip
# Without effect under the sizes that `--quantities` fixes.
FIXED = {"--quantities": ("--lengths", "--batch_size", "--implementations")}
# A GGUF file needs a real model; two models are served by tests of that benchmark, and one is exported here.
DROPPED = {"--gguf_file": 1}
DROPPED_OF = {"recipes/benchmarks/serving.py": {"--changed": 1}}
# In the place of several tasks.
TWO_TASKS = "cola,mrpc"
# What comes before a model's name, and what stands for one.
BEFORE_A_MODEL = ("--model_name_or_path", "--changed", "--compare_with", "inspect", "export", "--compare")
MODEL_WORDS = ("MODEL", "IN")
CLI = "hf_attnkit.cli"
TEXT = [f"the {'quick' if i % 2 else 'slow'} fox {i} jumps over {i * 7 % 13} dogs" for i in range(60)]


@dataclass(frozen=True)
class Command:
    """What runs: a script's path or a module's name, and its arguments."""

    target: str
    arguments: tuple[str, ...]
    launch: tuple[str, ...] = ()

    @property
    def parser(self) -> str:
        """What has a `--help` of its own: the target, of `hf-attnkit` with its subcommand."""
        return f"{self.target} {self.arguments[0]}" if self.target == CLI and self.arguments else self.target

    @property
    def flags(self) -> list[str]:
        return [word.split("=")[0] for word in self.arguments if word.startswith("--")]


def command_of(shown: Shown) -> Command:
    """A shown command, taken apart.

    Raises:
        SystemExit: for options that `accelerate launch` does not have.
    """
    program, *words = shown.words
    if program == "hf-attnkit":
        return Command(CLI, tuple(words))
    launch: list[str] = []
    if program == "accelerate":
        assert words.pop(0) == "launch", shown
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        launch, words = words[:place], words[place:]
        launch_command_parser().parse_args([*launch, words[0]])
    elif words[0] == "-m":
        words.pop(0)
    return Command(words[0], tuple(word for word in words[1:] if word != "..."), tuple(launch))


def run_main(command: Command, arguments: Sequence[str]) -> None:
    """Run it to its end in this process, as `python` would.

    Raises:
        AssertionError: for an exit with an error.
    """
    old = sys.argv
    sys.argv = [command.target, *arguments]
    try:
        if command.target.endswith(".py"):
            sys.argv[0] = str(ROOT / command.target)
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(command.target, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert end.code in (None, 0), f"{command.target} ended with {end.code}"
    finally:
        sys.argv = old


@functools.cache
def help_of(parser: str) -> str:
    """What `--help` prints."""
    target, *subcommand = parser.split()
    subcommand += ["run"] if subcommand == ["lm_eval"] else []  # the harness's own subcommand, which may be left out
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_main(Command(target, ()), [*subcommand, "--help"])
    return printed.getvalue()


def takes(parser: str, flag: str) -> bool:
    """Whether its `--help` lists the flag."""
    return re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", help_of(parser)) is not None


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def write_models(folder: Path) -> None:
    """A BERT, one of MNLI's classes and a Llama, of 24 heads, which divide by every number that is asked for."""
    torch.manual_seed(0)
    common = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 24,
              "max_position_embeddings": 128, "initializer_range": 0.2}  # fmt: skip
    tokenizer, of_bytes = tiny_tokenizer(), byte_tokenizer()
    names = TASKS["mnli"].label_names
    classes: Any = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(of_bytes), bos_token_id=None, eos_token_id=0, **common))
    for name, model, text in (
        ("bert", BertModel(BertConfig(vocab_size=len(tokenizer), **common)), tokenizer),
        ("mnli", BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **classes, **common)), tokenizer),
        ("llama", llama, of_bytes),
    ):
        model.save_pretrained(folder / name)
        text.save_pretrained(folder / name)


def of_list(words: list[str], flag: str) -> list[str]:
    """The values that the flag has."""
    after = words[words.index(flag) + 1 :] if flag in words else []
    return list(itertools.takewhile(lambda word: not word.startswith("-"), after))


def ends_of_list(words: list[str], flag: str) -> list[str]:
    """The words with the first and the last of the values that the flag has."""
    values = of_list(words, flag)
    if not values:
        return words
    start = words.index(flag) + 1
    return [*words[:start], *dict.fromkeys((values[0], values[-1])), *words[start + len(values) :]]


def one_or_two_tasks(names: str, several_seeds: bool) -> str:
    """Of several tasks two; the first where seeds make a series of runs already. All of them: `test_run.py`."""
    if names == "all" or ("," in names and not several_seeds):
        return TWO_TASKS
    return names.split(",")[0]


class Workplace:
    """A folder in which a shown command finds the models, data and files that it names, small ones.

    Args:
        shared: where models and data are; written once.
        folder: where the command runs.
    """

    def __init__(self, shared: Path, folder: Path) -> None:
        self.shared, self.folder = shared, folder
        (folder / "path/to").mkdir(parents=True)
        (folder / "path/to/glue").symlink_to(shared / "glue")
        for name in ("text.txt", "sentences.txt"):
            (folder / name).write_text("\n".join(TEXT) + "\n")
        (folder / "layers.json").write_text('{"0": "flash"}')

    def run(self, command: Command) -> None:
        """Make what it reads, and run it."""
        if command.target in READS:
            READS[command.target](self, command)
        run_main(command, self.smaller(command))

    def model(self, name: str) -> str:
        """The tiny model in the place of one that is named."""
        if "mnli" in name:
            return str(self.shared / "mnli")
        like_llama = re.search("llama|smol", name, re.IGNORECASE) or name in MODEL_WORDS
        return str(self.shared / ("llama" if like_llama else "bert"))

    def smaller(self, command: Command) -> list[str]:
        """Its arguments, with tiny models and data."""
        values: list[str] = []
        words, dropped = list(command.arguments), DROPPED | DROPPED_OF.get(command.target, {})
        while words:
            word, last = words.pop(0), values[-1] if values else ""
            if word in dropped:
                del words[: dropped[word]]
            elif last in BEFORE_A_MODEL or word in MODEL_WORDS:
                values.append(self.model(word))
            elif word.startswith("pretrained="):
                values.append(f"pretrained={self.model('MODEL')}")
            elif last.endswith("_file") and last != "--output_file":
                values.append("text.txt")
            elif last == "--task_name":
                values.append(one_or_two_tasks(word, "--seeds" in command.flags))
            elif "*" in word:  # as the shell does
                values += glob.glob(word, root_dir=self.folder)
            else:
                values.append(word)
        values = ends_of_list(values, "--num_key_value_heads")
        if command.target.startswith("recipes/compare/pruning"):
            for variant in of_list(values, "--variants"):
                parse_variant(variant)
            values = ends_of_list(values, "--variants")
        given = set(command.flags)
        fixed = {flag for name, flags in FIXED.items() if name in given for flag in flags}
        own = SMALLER_OF.get(command.target, ())
        values += () if set(own) & fixed else own
        for flag, value in SMALLER.items():
            if takes(command.parser, flag) and flag not in fixed and flag not in own:
                values += [flag, *value]
        for flag, value in SMALLER_IF_GIVEN.items():
            if flag in given:
                values += [flag, *value]
        for flag in ("--calibration_samples", "--score_samples"):  # leave rows for the distance
            if "--distance_samples" in given and takes(command.parser, flag):
                values += [flag, "6"]
        if takes(command.parser, "--data_dir") and "--data_dir" not in given and "demo" not in command.arguments:
            values += ["--data_dir", "path/to/glue"]
        if takes(command.parser, "--train_file") and not {"--train_file", "--text"} & given:
            values += ["--train_file", "text.txt", "--validation_file", "text.txt"]
        return values


def write_shared(folder: Path) -> Path:
    """Models and GLUE's files for `Workplace`."""
    write_models(folder)
    labelled = [name for name, task in TASKS.items() if task.tsv and task.is_labelled]
    write_glue(folder / "glue", *labelled)
    for name in set(TASKS) - {*labelled, "demo"}:
        write_test(folder / "glue" / TASKS[name].folder, name)
    return folder


def _statistics(place: Workplace, command: Command) -> None:
    if "--statistics" in command.flags:
        path = command.arguments[command.arguments.index("--statistics") + 1]
        place.run(Command("recipes/collect_statistics.py", ("MODEL", path, "--train_file", "text.txt")))


def _comparisons(place: Workplace, command: Command) -> None:
    """One untrained and one trained, in the folders that the command names by a pattern."""
    for pattern in (word for word in command.arguments if "*" in word):
        output = Path(pattern.replace("*", "made")).parent
        more = () if "recovered" in pattern else ("--do_eval",)
        place.run(Command("recipes/compare/pruning_glue.py", (
            *("--model_name_or_path", "outputs/cola", "--task_name", "cola", "--prune_fractions", "0.5", "--variants"),
            *("random", "magnitude", "--save_strategy", "no", "--output_dir", str(output), *more),
        )))  # fmt: skip


def _finished_run(place: Workplace, command: Command) -> None:
    place.run(Command("recipes/finetune_glue.py", (
        *("--model_name_or_path", "bert-base-uncased", "--task_name", "cola", "--output_dir", command.arguments[0]),
        *("--save_strategy", "no"),
    )))  # fmt: skip


# What a command reads that other commands make.
READS: dict[str, Callable[[Workplace, Command], None]] = {
    CLI: _statistics,
    "recipes/convert_checkpoint.py": _statistics,
    "recipes/compare/plot_pruning.py": _comparisons,
    "hf_attnkit.experiment.report.card": _finished_run,
    "hf_attnkit.experiment.report.page": _finished_run,
}
