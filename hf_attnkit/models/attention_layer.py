"""One attention layer of a model: where its projections are, how many heads it has, and what is between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_attnkit.models.attention import Attention
from hf_attnkit.models.rotary_pairs import Rope

# A mask `(batch, other positions)` as one of so many positions.
OfLength = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a model.

    Attributes:
        index: number of the layer, in calling order, cross-attention after all others.
        name: what messages call it: "layer 3 (model.layers.3.self_attn)".
        block: the model's layer that it is part of, whose output the next block takes first.
        module: the module whose forward calls the attention interface.
        query, key, value, output: the projections, `nn.Linear` or Conv1D in the layers of `projected_layers`; `None` in
            others, and where `problems` says why.
        num_heads, num_key_value_heads, head_dim: as its queries and keys arrive.
        is_empty: whether its one head is a stand-in; see `without_heads.py`.
        saved_as: what the config calls it, under `hf_attnkit`: the module's path.
        value_dim: size of a head of values, where it is not `head_dim`.
        attention: what discovery found.
        padding: the model's input that says which of its queries are tokens; empty where all are, or where no mask is
            of its positions.
        is_cross: whether queries and keys come from two sequences.
        position_bias: whether the module passes a bias of the scores.
        rope: how keys are rotated, or `None`.
        norm: what is between key projection and product and would not follow another basis of the keys (the name of a
            norm), or empty.
        row_numbers: by "query", "key", "value", their rows.
        problems: by the same, why a projection cannot be told.
        between_values: what is between values and the output projection that another basis would not follow.
        other_inputs: of "query" and "value", those whose projection takes another input than the keys'.
        takes_outputs: whether the output projection takes what the heads put out as it is.
        per_head: parameters next to the projections that have something for each head.
        key_padding: as `padding`, of its keys.
        of_length: how the model makes a mask of the layer's positions of one of its input's: of frames, of a sound
            wave's, or of whole windows; `None` where it does not, or that is not known.
    """

    index: int
    block: nn.Module
    module: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    attention: Attention
    name: str = ""
    is_cross: bool = False
    position_bias: bool = False
    rope: Rope | None = None
    norm: str = ""
    is_empty: bool = False
    saved_as: str = ""
    value_dim: int = 0
    padding: str = "attention_mask"
    row_numbers: dict[str, Tensor] = field(default_factory=dict, repr=False)
    problems: dict[str, str] = field(default_factory=dict)
    between_values: str = ""
    other_inputs: frozenset[str] = frozenset()
    takes_outputs: bool = True
    per_head: tuple[str, ...] = ()
    key_padding: str = "attention_mask"
    of_length: OfLength | None = field(default=None, repr=False, compare=False)

    @property
    def value_head_dim(self) -> int:
        """Size of a head of values, and of what each head gives to the output projection."""
        return self.value_dim or self.head_dim

    @property
    def refusal(self) -> str:
        """Why nothing can be swapped in, or empty."""
        return "" if self.attention.calls_interface else self.attention.reason

    @property
    def permuted_apart(self) -> str:
        """What has something for each head and is no projection, so that heads cannot change their order; or empty."""
        bias = "a bias of the scores, head by head," if self.position_bias else ""
        return ", ".join(self.per_head) or bias

    @property
    def passes_constants(self) -> bool:
        """Whether a constant in all values comes out of the heads as it is: weights that sum to 1, and nothing after.

        Learned keys without value (sinks) take a part of the weights.
        """
        return self.takes_outputs and not self.attention.has_sinks

    @property
    def shifts_cancel(self) -> bool:
        """Whether a constant in all scores of a query changes nothing: a softmax of the scores themselves."""
        return self.attention.softcap is None and not self.attention.has_sinks

    @property
    def output_weight(self) -> Tensor:
        """Of the output projection `(features, num_heads * value_head_dim)`; GPT-2's class has it transposed."""
        return weight_of(self.output)

    @property
    def heads(self) -> range:
        """Numbers of its query heads; none in a layer whose one head is a stand-in."""
        return range(0 if self.is_empty else self.num_heads)

    @property
    def is_opaque(self) -> bool:
        """Whether nothing shows its heads: PyTorch's own `nn.MultiheadAttention` (SigLIP's head)."""
        return bool(self.refusal) and self.output is None

    @property
    def scored_heads(self) -> range:
        """Numbers of the heads that scores have a place for; as `heads`, none where it is opaque."""
        return range(0) if self.is_opaque else self.heads

    def rows(self, name: str) -> slice | Tensor:
        """The rows of "query", "key" or "value" in its module, head by head, `(heads * size of a head,)`.

        Of "output" all rows, as a slice.
        """
        if name in self.row_numbers:
            return self.row_numbers[name]
        return slice(0, weight_of(getattr(self, name)).shape[0])

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_key_value_heads


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a matrix product as `(out, in)`; GPT-2's class has it transposed."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(module, Conv1D) else weight
