"""What importing does, and what the package offers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.models import batch, build
from support.subprocesses import run_python

import hf_attnkit

ROOT = Path(hf_attnkit.__file__).parent
PUBLIC = [
    "AttentionEntropyCallback",
    "AttentionView",
    "HeadStatistics",
    "RefitOptions",
    "attention_backends",
    "attention_entropy",
    "attention_view",
    "available_attentions",
    "cache_bytes_per_token",
    "convert_to_gqa",
    "convert_to_mqa",
    "describe_attention",
    "head_gradients",
    "head_importance",
    "head_statistics",
    "last_change",
    "load_pretrained",
    "plan_gqa",
    "prune_heads",
    "rearrange_heads",
    "restore_attention",
    "select_for_target",
    "select_heads",
    "set_probe",
    "streaming_kinds",
    "swap_attention",
]


@pytest.mark.slow
def test_importing_registers_one_name_and_changes_nothing_else() -> None:
    run_python(
        """
        import types
        import torch
        from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
        from transformers.models.bert import configuration_bert, modeling_bert
        from transformers.models.llama import configuration_llama, modeling_llama
        from transformers.models.mistral import modeling_mistral
        from transformers import cache_utils, masking_utils, modeling_utils
        from transformers.integrations import sdpa_attention

        watched = [modeling_bert, modeling_llama, modeling_mistral, configuration_bert, configuration_llama,
                   cache_utils, masking_utils, modeling_utils, sdpa_attention, torch.nn.functional]

        def state():
            found = {}
            for module in watched:
                for name, value in vars(module).items():
                    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
                        found[module.__name__, name] = id(value)
                    if isinstance(value, type) and value.__module__ == module.__name__:
                        for key, member in vars(value).items():
                            found[module.__name__, name, key] = id(member)
            for owner in (PreTrainedModel, PreTrainedConfig, AutoConfig):
                found |= {(owner.__name__, key): id(member) for key, member in vars(owner).items()}
            return found

        def mapping(interface):
            return {key: id(interface[key]) for key in interface}

        before = mapping(functions), mapping(masks), state()
        settings = torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state()
        import hf_attnkit
        after = mapping(functions), mapping(masks), state()
        for old, new in zip(before[:2], after[:2]):
            assert set(new) - set(old) == {"hf_attnkit"}, set(new) ^ set(old)
            assert all(new[key] == value for key, value in old.items())
        # Looking a class up by its lazy name adds entries, never replaces one.
        assert all(after[2][key] == value for key, value in before[2].items())
        assert settings[:2] == (torch.get_default_dtype(), torch.get_num_threads())
        assert torch.equal(settings[2], torch.random.get_rng_state())
        """
    )


def test_public_names() -> None:
    assert hf_attnkit.__all__ == PUBLIC
    for name in PUBLIC:
        assert callable(getattr(hf_attnkit, name)) and getattr(hf_attnkit, name).__doc__


def test_every_public_name_is_documented() -> None:
    """On its own, or as one of the members that the pages list; nothing else is called public there."""
    pages = "\n".join(path.read_text() for path in (ROOT.parent / "docs").rglob("api*/**/*.md"))
    pages += "\n".join(path.read_text() for path in (ROOT.parent / "docs").glob("api*.md"))
    shown = set(re.findall(r"^::: hf_attnkit\.(\w+)$", pages, re.MULTILINE))
    for members in re.findall(r"^::: hf_attnkit\n(?:    .*\n)*", pages, re.MULTILINE):
        shown |= set(re.findall(r"^ +- (\w+)$", members, re.MULTILINE))
    assert set(PUBLIC) <= shown
    assert not [
        name for name in shown - set(PUBLIC) if not (ROOT / name).is_dir() and not (ROOT / f"{name}.py").is_file()
    ]


def test_statistics_come_as_the_public_class() -> None:
    model = build("bert")
    assert isinstance(hf_attnkit.head_statistics(model, [batch(model)]), hf_attnkit.HeadStatistics)


def test_typed_and_versioned() -> None:
    assert (ROOT / "py.typed").is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+", hf_attnkit.__version__)


def test_one_file_registers() -> None:
    for path in ROOT.rglob("*.py"):
        if re.search(r"\b\w*Interface(\(\))?\.register\(", path.read_text()):
            assert path.relative_to(ROOT).as_posix() == "attention/dispatch.py"
