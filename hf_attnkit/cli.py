"""`hf-attnkit`: what can be done with a checkpoint, and its conversion to grouped-query attention.

    hf-attnkit inspect MODEL
    hf-attnkit convert IN OUT --num_key_value_heads 4 --method pca --statistics statistics.safetensors

Exit codes: 0 done, 1 refused (one line on standard error says why), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from hf_attnkit.attention.swap import check
from hf_attnkit.attention.table import available_attentions
from hf_attnkit.common.text_table import text_table
from hf_attnkit.common.version import __version__
from hf_attnkit.conversion import METHODS, convert_checkpoint
from hf_attnkit.loading import skeleton
from hf_attnkit.models.cache_size import cache_bytes
from hf_attnkit.models.families import family_of
from hf_attnkit.models.layers import AttentionLayer, attention_layers, editable_layers


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` are those of the process by default."""
    parser = argparse.ArgumentParser(prog="hf-attnkit", description="Attention surgery for Transformers models.")
    parser.add_argument("--version", action="version", version=f"hf_attnkit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_convert(commands)
    given = vars(parser.parse_args(arguments))
    command: Callable[..., str] = given.pop("command")
    try:
        print(command(**given))
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {' '.join(str(error).split())}\n")


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "inspect", help="show the attention layers of a model and what can be done with them",
        description="Show the attention layers of a model and what can be done with them. Reads the config alone: no "
        "weights are loaded, and nothing is run. A swap is proved only when it is made.",
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


def convert(source: str, target: str, num_key_value_heads: list[int] | None = None, **options: str) -> str:
    """What `convert_checkpoint` did, as it prints."""
    numbers = num_key_value_heads
    if numbers is not None and len(numbers) == 1:
        return str(convert_checkpoint(source, target, numbers[0], **options))
    return str(convert_checkpoint(source, target, numbers, **options))


def inspect(model: str) -> str:
    """A table of a model's attention layers, its cache, and what can be done with it.

    Args:
        model: a folder, or a name on the hub. Only its config is read.

    Raises:
        OSError: if there is no such model.
        ValueError: if its attention is not supported; the message says why.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the skeleton is not used, so what Transformers says about it does not matter
    try:
        return _report(model)
    finally:
        logging.set_verbosity(verbosity)


def _report(name: str) -> str:
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(f"the config of {name!r} cannot be read; give a model's folder or hub name: {error}") from error
    saved = {"base": None, "layers": {}} | (getattr(config, "hf_attnkit", None) or {})
    for field in ("hf_attnkit", "attn_implementation"):  # the stock modules have the same heads
        config.__dict__.pop(field, None)
    model = skeleton(config)
    stock = model.config._attn_implementation
    family_of(model)  # of other models a config alone does not tell the heads
    layers = attention_layers(model)
    paths = {id(module): path for path, module in model.named_modules()}
    rows = [
        (
            str(layer.index), paths[id(layer.module)], str(len(layer.heads)), str(layer.num_key_value_heads),
            str(layer.head_dim), _attention(saved["layers"].get(layer.saved_as)) or saved["base"] or stock,
        )
        for layer in layers
    ]  # fmt: skip
    header = ("layer", "module", "query heads", "key/value heads", "head size", "attention")
    dtype = config.dtype or torch.float32
    bytes_per_token = cache_bytes([(layer.num_key_value_heads, layer.head_dim) for layer in layers], dtype)
    has_cache = any(getattr(layer.module, "is_causal", False) for layer in layers)
    abilities = [
        ("swap", f"yes: {', '.join(_kinds(model))}"),
        ("score", _ability(model)),
        ("convert", _ability(model, _conversions)),
        ("prune", _ability(model)),
    ]
    return "\n\n".join(
        [
            f"{type(model).__name__}, {str(dtype).removeprefix('torch.')}",
            text_table([header, *rows]),
            f"{'cache' if has_cache else 'keys and values (no cache: an encoder)'}: "
            f"{bytes_per_token:,} bytes per token in all layers",
            text_table(abilities),
        ]
    )


def _attention(saved: tuple[str, Mapping[str, Any]] | None) -> str:
    """A kind and its options as config.json has them; empty where it has none."""
    if saved is None:
        return ""
    name, options = saved
    return " ".join([name, *(f"{option}={value}" for option, value in options.items())])


def _kinds(model: PreTrainedModel) -> list[str]:
    """The kinds of attention that can be swapped into all layers, with the options that they need."""

    def fits(name: str, options: dict[str, Any]) -> bool:
        try:
            check(model, (name, options))
        except ValueError:
            return False
        return True

    return [name for name in available_attentions() if fits(name, {}) or fits(name, {"window": 64})]


def _ability(model: PreTrainedModel, describe: Callable[[list[AttentionLayer]], str] = lambda _: "yes") -> str:
    """ "yes", or why the heads can be neither scored, merged nor removed."""
    if getattr(model.config, "quantization_config", None):
        return "no: the weights are quantized; load the model without quantization"
    try:
        return describe(editable_layers(model, skeleton=True))
    except ValueError as error:
        return f"no: {error}"


def _conversions(layers: list[AttentionLayer]) -> str:
    if any(layer.is_empty for layer in layers):
        return "no: a layer has no heads left; convert first, and remove all heads of a layer after"
    numbers = [layer.num_key_value_heads for layer in layers]
    common = math.gcd(*numbers)
    possible = [n for n in range(common, 0, -1) if common % n == 0 and n < max(numbers)]
    if not possible:
        return "no: every layer has one key/value head already"
    return f"yes: to {', '.join(map(str, possible))} key/value heads"


if __name__ == "__main__":
    main()
