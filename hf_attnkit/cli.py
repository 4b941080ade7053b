"""`hf-attnkit`: what can be done with a checkpoint, its conversion to grouped-query attention, its export to ONNX.

    hf-attnkit inspect MODEL
    hf-attnkit convert IN OUT --num_key_value_heads 4 --method pca --statistics statistics.safetensors
    hf-attnkit export MODEL OUT --int8
    hf-attnkit lm_eval --model hf_attnkit --model_args pretrained=MODEL --tasks demo_pairs

Exit codes: 0 done, 1 refused (one line on standard error says why), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from hf_attnkit.analysis.trials import silent
from hf_attnkit.analysis.weightless import inspect_checkpoint
from hf_attnkit.common.version import __version__
from hf_attnkit.conversion import METHODS, convert_checkpoint
from hf_attnkit.export import LOWEST_OPSET, export_onnx
from hf_attnkit.export.folder import require_free
from hf_attnkit.export.packages import require_packages
from hf_attnkit.loading import load_pretrained


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` are those of the process by default."""
    parser = argparse.ArgumentParser(prog="hf-attnkit", description="Attention surgery for Transformers models.")
    parser.add_argument("--version", action="version", version=f"hf_attnkit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_lm_eval(commands)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["lm_eval"]:  # the rest is that command's own
        given: dict[str, Any] = {"command": lm_eval, "arguments": words[1:]}
    else:
        given = vars(parser.parse_args(words))
    command: Callable[..., str] = given.pop("command")
    try:
        if printed := command(**given):
            print(printed)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: {' '.join(str(error).split())}\n")


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "inspect", help="show the attention layers of a model and what can be done with them",
        description="Show the attention layers of a model and what can be done with them: tried on a model of this "
        "config with random weights and few layers, so no weights are read.",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="folder, or name on the hub")
    parser.set_defaults(command=inspect)


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "convert", help="convert a checkpoint to grouped-query attention, shard by shard",
        description="Convert a folder of safetensors to grouped-query attention without loading the model. An "
        "interrupted conversion is completed by the same command.",
        argument_default=argparse.SUPPRESS,  # what is not given is the library's default
    )  # fmt: skip
    # "random" could not be completed after an interruption.
    methods = [name for name in METHODS if name != "random"]
    parser.add_argument("source", metavar="IN", help="folder of the checkpoint")
    parser.add_argument("target", metavar="OUT", help="folder for the converted checkpoint")
    parser.add_argument(
        "--num_key_value_heads", type=int, nargs="+", metavar="N",
        help="key/value heads of every layer, or one number for each layer "
        "(default: at most a quarter of the query heads)",
    )  # fmt: skip
    parser.add_argument("--method", choices=methods, help="how heads are merged")
    parser.add_argument("--key_method", choices=methods, help="another method for the keys")
    parser.add_argument("--statistics", metavar="FILE", help="second moments for pca: recipes/collect_statistics.py")
    parser.set_defaults(command=convert)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "export", help="write a model as an ONNX file that was compared with it",
        description="Write a model as an ONNX file. The file is compared with the model in ONNX Runtime, at lengths "
        "and batches that were not traced, before it gets its name; what cannot be exported right is refused.",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="folder, or name on the hub; any that load_pretrained reads")
    parser.add_argument("target", metavar="OUT", help="folder for model.onnx, config and tokenizer; must not exist")
    smaller = parser.add_mutually_exclusive_group()
    smaller.add_argument(
        "--int8", action="store_const", dest="precision", const="int8", default="float32",
        help="weights of 8 bits, activations quantized as they come",
    )  # fmt: skip
    smaller.add_argument("--fp16", action="store_const", dest="precision", const="float16", help="float16 instead")
    parser.add_argument(
        "--int8_skip_modules", nargs="+", default=(), metavar="PATTERN",
        help="with --int8: modules of which the products stay in float32, such as '*[0-9].output.dense'",
    )  # fmt: skip
    parser.add_argument("--opset", type=int, help=f"of ONNX, at least {LOWEST_OPSET} (default: the exporter's)")
    parser.set_defaults(command=export)


def _add_lm_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    commands.add_parser(
        "lm_eval", add_help=False, help="lm-evaluation-harness with the model class hf_attnkit"
    )  # fmt: skip


def lm_eval(arguments: Sequence[str]) -> str:
    """Run lm-evaluation-harness, which prints by itself."""
    from hf_attnkit.experiment.harness.model import main as run

    run(arguments)
    return ""


def export(model: str, target: str, precision: str, int8_skip_modules: Sequence[str], opset: int | None) -> str:
    """What `export_onnx` did, as it prints."""
    require_packages()
    require_free(Path(target))
    with silent():
        loaded = load_pretrained(model, dtype="float32")
        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError):  # the folder has none
            tokenizer = None
    options: dict[str, Any] = {"precision": precision, "int8_skip_modules": int8_skip_modules, "opset": opset}
    return str(export_onnx(loaded, target, tokenizer=tokenizer, **options))


def convert(source: str, target: str, num_key_value_heads: list[int] | None = None, **options: str) -> str:
    """What `convert_checkpoint` did, as it prints."""
    numbers = num_key_value_heads
    if numbers is not None and len(numbers) == 1:
        return str(convert_checkpoint(source, target, numbers[0], **options))
    return str(convert_checkpoint(source, target, numbers, **options))


def inspect(model: str) -> str:
    """A table of a model's attention layers, its cache, and what can be done with it: see `describe_attention`.

    Args:
        model: a folder, or a name on the hub. Its weights are read only where its config records heads by module path.

    Raises:
        OSError: if there is no such model.
        ValueError: if it cannot be run or has no attention; the message says why.
    """
    with silent():  # the model is not used, so what Transformers says about it does not matter
        return _report(model)


def _report(name: str) -> str:
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(f"the config of {name!r} cannot be read; give a model's folder or hub name: {error}") from error
    return str(inspect_checkpoint(name, config))


if __name__ == "__main__":
    main()
