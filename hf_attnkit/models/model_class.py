"""The class of a checkpoint's model: Transformers' own, one that was registered, or the code that comes with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, cast

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

Class = type[PreTrainedModel]

# What `from_pretrained` takes and fetching code does not.
_NOT_OF_CODE = ("trust_remote_code", "gguf_file", "subfolder")


def model_class(
    config: PreTrainedConfig,
    auto_class: Any = None,
    source: str | os.PathLike[str] = "",
    options: Mapping[str, Any] | None = None,
) -> Class:
    """The class to build a model of this config with.

    Args:
        auto_class: an auto class, a model class, or `None`: the class that the config's `architectures` names.
        source: where the checkpoint is; code that comes with it is run only with `trust_remote_code=True`.
        options: of `from_pretrained`, that say where its files are.

    Raises:
        ValueError: if no class can be found.
    """
    if isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel):
        return auto_class
    mapping = getattr(auto_class, "_model_mapping", None)
    if auto_class is not None and mapping is None:
        raise ValueError(f"auto_class={auto_class!r} is neither an auto class nor a model class of Transformers")
    name = next(iter(config.architectures or []), None)
    if auto_class is None and name is not None and hasattr(transformers, name):
        return cast(Class, getattr(transformers, name))
    registered = [each for each in _registered(config) if each.__name__ == name] if mapping is None else []
    if mapping is not None and type(config) in mapping:
        found = mapping[type(config)]
        registered = [found[0] if isinstance(found, tuple) else found]
    if registered:
        return registered[0]
    code = getattr(config, "auto_map", None) or {}
    for auto, reference in code.items():
        is_it = auto == auto_class.__name__ if auto_class is not None else reference.rpartition(".")[2] == name
        if not is_it or not hasattr(transformers, auto) or auto == "AutoConfig":
            continue
        if not (options or {}).get("trust_remote_code"):
            raise ValueError(
                f"{reference} is code that comes with the checkpoint; read it, then pass trust_remote_code=True"
            )
        where = {key: value for key, value in (options or {}).items() if key not in _NOT_OF_CODE}
        own = cast(Class, get_class_from_dynamic_module(reference, source, **where))
        own.register_for_auto_class(auto)  # so that saving the model saves its code
        return own
    if auto_class is not None:
        raise ValueError(f"{auto_class.__name__} has no class for models of type {config.model_type!r}")
    raise ValueError(
        f"the config names no class of Transformers (architectures={config.architectures}); give auto_class, "
        "for example transformers.AutoModelForSequenceClassification, or the model's own class"
    )


def _registered(config: PreTrainedConfig) -> Iterator[Class]:
    """Classes that are registered for a type of config of one's own (`AutoModelForCausalLM.register`)."""
    if type(config).__module__.startswith("transformers.models."):
        return
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is not None and type(config) in mapping:
            found = mapping[type(config)]
            yield found[0] if isinstance(found, tuple) else found
