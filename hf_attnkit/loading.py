"""`load_pretrained`: load what plain `from_pretrained` cannot rebuild.

Transformers builds a model from its config and then fills in the weights. Where its classes cannot
express the numbers of heads (by layer, grouped or fewer heads on BERT), a subclass made on the fly
builds the stock model and then gives its still empty parameters the checkpoint's shapes, so that
`from_pretrained` itself does everything else: dtype, device_map, shards, quantization.
"""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_attnkit.attention.consistency import require_grouping
from hf_attnkit.attention.kind import NAME, PARAMETERS
from hf_attnkit.attention.paged import refuse_paged_cache
from hf_attnkit.attention.saved_kinds import is_saved, restore_names
from hf_attnkit.attention.swap import add_saved_parameters, install_saved
from hf_attnkit.editing.head_record import build_as_recorded, build_by_stock, is_marked, recorded_heads
from hf_attnkit.editing.heads_before import record_heads_before, require_heads_before, take_heads_before
from hf_attnkit.models.checkpoint_shapes import loading_arguments, renamed, resize, stored_shapes
from hf_attnkit.models.global_reads import expect_global_reads
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.models.model_class import model_class as class_of

# On a model that is being loaded: modules whose parameters get the checkpoint's shapes.
_SIZED = "_hf_attnkit_sized"

# Arguments of from_pretrained that say where the files are; the config is looked up with them first.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder",
                  "trust_remote_code", "gguf_file")  # fmt: skip


def load_pretrained(
    pretrained_model_name_or_path: str | os.PathLike[str], auto_class: Any = None, **kwargs: Any
) -> Any:
    """Load any checkpoint, also one whose heads or attention hf_attnkit changed, or Transformers 4 pruned.

    Args:
        pretrained_model_name_or_path: a folder or a name on the hub.
        auto_class: an auto class (`AutoModelForCausalLM`) or a model class; by default the one that
            the config's `architectures` names.
        kwargs: those of `from_pretrained`: `dtype`, `device_map`, `quantization_config`, ... Weights of a
            `gguf_file` are dequantized unless `quantization_config` says otherwise.

    Returns:
        The model, an instance of Transformers' own class; with `output_loading_info=True`, the
        model and that information, as `from_pretrained` does.

    Raises:
        ValueError: if no class can be found, the checkpoint's attention was swapped and another
            `attn_implementation` is asked for, or weights and config disagree.
        OSError: if there is no such checkpoint.
    """
    expect_global_reads()
    located = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        is_model = isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel)
        kind: Any = getattr(auto_class, "config_class", None) if is_model else None
        config = (kind or AutoConfig).from_pretrained(config or pretrained_model_name_or_path, **located)
    config = copy.deepcopy(config)  # a caller's stays as it is
    before = take_heads_before(config)  # refuses what is wrong before weights are read
    swapped = is_saved(config)
    if swapped and kwargs.get("attn_implementation") not in (None, NAME):
        raise ValueError(
            f"this checkpoint's attention was swapped, so attn_implementation={kwargs['attn_implementation']!r} "
            "contradicts it; leave it out, and call hf_attnkit.restore_attention(model) after loading"
        )
    model_class = class_of(config, auto_class, pretrained_model_name_or_path, located)
    if "gguf_file" in kwargs and hasattr(transformers, "GgufConfig"):
        # Newer versions may keep the weights quantized, and refuse to save the model even where they do not.
        kwargs.setdefault("quantization_config", transformers.GgufConfig(dequantize=True))
    try:
        model, info = _sized(model_class).from_pretrained(
            pretrained_model_name_or_path, **(kwargs | {"output_loading_info": True})
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"the weights in {str(pretrained_model_name_or_path)!r} do not have the sizes that the config asks for; "
            "Transformers' report above lists them. Where it lists attention projections, the config's numbers of "
            f"heads are wrong ({_describe(config)}): correct them. Where it lists the classifier, pass "
            "ignore_mismatched_sizes=True to start it again at random"
        ) from error
    model.__class__ = model_class
    _require_attention_weights(model, info)
    if before:
        require_heads_before(model)
    if is_marked(model):
        _align(model)
    if config._attn_implementation == NAME:
        model.config.attn_implementation = NAME  # building consumed it; saving again needs it
    if swapped:
        restore_names(model.config)
        install_saved(model)
    else:
        modules, heads = recorded_heads(model)
        running = [getattr(module, "config", model.config)._attn_implementation for module in modules]
        require_grouping(model, modules, heads, running)
    if before or is_marked(model):
        refuse_paged_cache(model)
    return (model, info) if kwargs.get("output_loading_info") else model


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that `load_pretrained` would build, on the meta device: modules and sizes without weights.

    Raises:
        ValueError: if the config names no class.
    """
    with torch.device("meta"):
        return _sized(class_of(config))(config)


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that the config names, with random weights; the random state stays.

    Raises:
        ValueError: if the config names no class.
    """
    with torch.random.fork_rng(devices=[]):
        return class_of(config)(config)


def _align(model: PreTrainedModel) -> None:
    """Give weights that are read in place from a file an address of their own.

    There they lie wherever smaller tensors before them end, and matrix products of weights at odd addresses round
    otherwise than the same ones that the model was saved from.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _require_attention_weights(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise `ValueError` if attention projections, or what a swapped attention learned, would be random."""
    absent = sorted(key for key in info["missing_keys"] if f".{PARAMETERS}." in key)
    if absent:
        raise ValueError(
            f"the checkpoint lacks {len(absent)} tensors that its swapped attention learned, {absent[0]!r} among them; "
            "it was not saved completely"
        )
    lost = sorted(entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"])
    lost = [key for key in lost if key.startswith(_attention_paths(model))] if lost else []
    if lost:
        raise ValueError(
            f"{len(lost)} attention projections, {lost[0]!r} among them, do not have the sizes that the config asks "
            f"for ({_describe(model.config)}) and would be random; correct the config's numbers of heads"
        )


def _attention_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """How the names of parameters of attention begin; of nothing in a model whose attention cannot be found."""
    with suppress(ValueError):
        parts = {id(each) for layer in attention_layers(model) for each in (layer.module, layer.output)}
        return tuple(f"{path}." for path, module in model.named_modules() if id(module) in parts)
    return ()


def _describe(config: PreTrainedConfig) -> str:
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):  # other fields say it
        return str(config.model_type)
    return f"{heads} query and {getattr(config, 'num_key_value_heads', None) or heads} key/value heads"


def _sized(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass that has the numbers of heads of its config also where the stock class does not."""

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        before = take_heads_before(config)
        build_by_stock(config)
        model_class.__init__(self, config, *args, **kwargs)
        record_heads_before(self, before)
        if sized := build_as_recorded(self):
            self.__dict__[_SIZED] = sized
        add_saved_parameters(self)

    def _load_pretrained_model(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        sized = model.__dict__.pop(_SIZED, ())
        if sized:
            files, state_dict, mapping = loading_arguments(model_class, model, args, kwargs)
            resize(model, sized, renamed(stored_shapes(files, state_dict), model, mapping, sized))
        return model_class._load_pretrained_model(model, *args, **kwargs)

    # The same name and module, because Transformers looks up sources and architectures by them.
    names = {
        "__init__": __init__,
        "_load_pretrained_model": staticmethod(_load_pretrained_model),
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    return type(model_class.__name__, (model_class,), names)
