"""Models of many kinds, one that nobody has seen among them, and the same with heads zeroed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from support.every_type import small_model
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_attnkit.models.discovery import Discovery
from hf_attnkit.models.owners import Ownership

TYPES = ("mixtral", "gemma2", "gpt_oss", "modernbert", "albert", "opt", "gpt2", "gpt_neox", "deberta-v2", "falcon",
         "clip", "whisper", "llava", "never seen")  # fmt: skip


class UnseenConfig(PreTrainedConfig):
    model_type = "a_type_that_nobody_has_seen"

    def __init__(self, width: int = 32, heads: int = 4, groups: int = 2, depth: int = 2, **others: Any) -> None:
        self.width, self.heads, self.groups, self.depth = width, heads, groups, depth
        super().__init__(**others)


class UnseenAttention(nn.Module):
    """Key and value in one matrix, value first; a gate for each head; a norm of the keys."""

    is_causal = False

    def __init__(self, config: UnseenConfig) -> None:
        super().__init__()
        self.config, size = config, config.width // config.heads
        self.size, self.n, self.num_key_value_groups = size, config.heads, config.heads // config.groups
        self.ask = nn.Linear(config.width, config.width)
        self.tell = nn.Linear(config.width, 2 * config.groups * size)
        self.gate = nn.Parameter(torch.rand(config.heads) + 0.5)
        self.scale = nn.Parameter(torch.rand(size) + 0.5)
        self.back = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.ask(x).view(batch, length, self.n, self.size).transpose(1, 2)
        told = self.tell(x).view(batch, length, 2, self.n // self.num_key_value_groups, self.size)
        value, key = told.permute(2, 0, 3, 1, 4)
        attend = AttentionInterface().get_interface(self.config._attn_implementation, sdpa_attention_forward)
        out, _ = attend(self, query, key * self.scale, value, None, scaling=self.size**-0.5)
        return self.back((out * self.gate[:, None]).reshape(batch, length, self.n * self.size))


class UnseenModel(PreTrainedModel):
    config_class = UnseenConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: UnseenConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(50, config.width)
        self.parts = nn.ModuleList(UnseenAttention(config) for _ in range(config.depth))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0, 0.3)
        if isinstance(module, UnseenAttention):
            module.gate.data.uniform_(0.5, 1.5)
            module.scale.data.uniform_(0.5, 1.5)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        x = self.embed(input_ids)
        for part in self.parts:
            x = x + part(x)
        return (x,)


def any_model(model_type: str) -> PreTrainedModel:
    """A small model of this type, in evaluation mode."""
    if model_type != "never seen":
        return small_model(model_type)
    torch.manual_seed(0)
    return UnseenModel(UnseenConfig()).eval()


@contextmanager
def zeroed(
    model: PreTrainedModel, discovery: Discovery, owned: Sequence[Ownership], heads: Mapping[int, Sequence[int]]
) -> Iterator[None]:
    """Slices of what the output projections take are zero for a while."""
    with ExitStack() as stack:
        for index, gone in heads.items():
            attention, path = discovery.attentions[index], owned[index].output
            assert path is not None
            keep = torch.ones(attention.num_heads, attention.value_head_dim)
            keep[list(gone)] = 0

            def zero(_: nn.Module, args: Any, keep: Tensor = keep) -> Any:
                return args[0] * keep.flatten().to(args[0]), *args[1:]

            stack.callback(model.get_submodule(path).register_forward_pre_hook(zero).remove)
        yield
