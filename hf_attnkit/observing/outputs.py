"""What a model puts out in the end, and how far two models are apart there."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.models.tensors import tensors_in
from hf_attnkit.observing.batches import known_options
from hf_attnkit.observing.rows import num_rows

# Numbers of the untouched model's outputs that are kept: 64 MiB in float32.
KEPT = 2**24
# Of fewer sequences stretches are compared, about so many in all.
FEW, STRETCHES = 8, 16
# Outputs `(batch, tokens)` that have no features.
BY_TOKEN = ("start_logits", "end_logits")


def final_outputs(output: Any) -> dict[str, Tensor]:
    """The logits of a model's output, by name; its last hidden state where it has none, else all that it gives.

    Of a tuple that is its first tensor, where a model puts them.
    """
    if not isinstance(output, Mapping):
        return {str(number): tensor for number, tensor in enumerate(tensors_in(output)[:1])}
    named = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}
    logits = {name: value for name, value in named.items() if "logits" in name}
    if logits:
        return logits
    if "last_hidden_state" in named:
        return {"last_hidden_state": named["last_hidden_state"]}
    return named or {str(number): tensor for number, tensor in enumerate(tensors_in(output))}


def run_whole(model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
    """`final_outputs` of a batch, by name also where the batch or the config asks for tuples.

    Args:
        options: of the model's forward, where it has them.
    """
    config: Any = getattr(model, "config", None)
    gives_tuples = getattr(config, "return_dict", None) is False
    inputs = {name: value for name, value in batch.items() if name != "return_dict"}
    try:
        if gives_tuples:
            config.return_dict = True
        return final_outputs(model(**(inputs | known_options(model, options))))
    finally:
        if gives_tuples:
            config.return_dict = False


def batch_generator(batch: Mapping[str, Any]) -> torch.Generator:
    """Random numbers that depend on the batch's numbers alone: the same in whichever process and order it is run."""
    digest = 0
    for name in sorted(batch):
        if isinstance(value := batch[name], Tensor):
            digest = zlib.crc32(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), digest)
    return torch.Generator().manual_seed(digest)


def real_outputs(name: str, output: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The same `(positions, features)` without those of padding, where there is one position for each token."""
    names = ["decoder_attention_mask"]
    if not any(inputs.get(given) is not None for given in ("decoder_input_ids", "decoder_inputs_embeds")):
        names.append("attention_mask")  # otherwise that of another text
    masks = [inputs.get(mask) for mask in names]
    is_each = output.dim() > 2 or name in BY_TOKEN
    found = output if output.dim() > 2 or not is_each else output[..., None]
    for mask in masks if is_each else ():
        if isinstance(mask, Tensor) and mask.shape == found.shape[:2]:
            return found[mask.to(found.device).bool()].flatten(1)
    return found.flatten(0, -2) if found.dim() > 1 else found[:, None]


def mixed(
    outputs: Mapping[str, Tensor], inputs: Mapping[str, Any], generator: torch.Generator, vocabulary: int | None = None
) -> Tensor:
    """A scalar on the CPU whose gradient by anything that each sequence has its own of is J^T r, J = dz / dx.

    It tells J without a pass for each output, z all real ones: E (r . J v)^2 = v^T J^T M J v with M = E r r^T. r are
    random signs, and M is the identity. Logits over a vocabulary are answered by a word drawn from their own
    distribution p, so that r is its indicator less p, and M = diag(p) - p p^T: to second order twice the
    Kullback-Leibler divergence (Fisher's information).

    Args:
        vocabulary: how many words there are; `None` to take signs for all.
    """
    total = torch.zeros(())
    for name, output in outputs.items():
        real = real_outputs(name, output, inputs).float()
        if vocabulary is not None and real.shape[-1] == vocabulary:
            logarithms = real.log_softmax(-1)
            drawn = torch.rand(len(real), 1, generator=generator).to(real.device)
            words = (logarithms.detach().exp().cumsum(-1) < drawn).sum(-1, keepdim=True).clamp(max=vocabulary - 1)
            total = total + logarithms.gather(-1, words).sum().cpu()
        else:
            signs = torch.randint(0, 2, real.shape, generator=generator, dtype=torch.int8).to(real.device)
            total = total + (real * (2 * signs - 1)).sum().cpu()
    return total


def vocabulary_of(model: PreTrainedModel) -> int | None:
    """How many words a language model's logits are over; `None` for other models."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def sequences_of(name: str, output: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """`(positions,)`, the sequence of the batch that each of `real_outputs` belongs to."""
    width = output.shape[-1:] if output.dim() == 1 or name in BY_TOKEN else (1,)
    numbers = torch.arange(len(output)) * num_rows(inputs) // max(len(output), 1)
    numbers = numbers.view(-1, *(1,) * (output.dim() - 1)).expand(*output.shape[:-1], *width)
    return real_outputs(name, numbers, inputs)[:, 0]


def _stretches(numbers: Tensor, pieces: int) -> Tensor:
    """Of positions in order, which of so many stretches of its sequence each is in; `numbers` are the sequences'."""
    counts = numbers.bincount()
    place = torch.arange(len(numbers)) - (counts.cumsum(0) - counts)[numbers]
    return place * pieces // counts[numbers]


class OutputDistance:
    """How far a model's outputs on some batches are from what they were when this was made.

    Logits over a vocabulary are compared by the Kullback-Leibler divergence of the words from what they were, in nats:
    a shift of all logits, which no probability sees, is most of their squared distance (see docs/conversion.md). Other
    outputs are compared by squared differences, relative to the mean variance of the outputs as they were.

    Of long outputs (logits over a vocabulary) every n-th position counts, so that memory stays bounded.

    A part is a sequence. Of fewer than `FEW` sequences with an output for each token it is a stretch of one, so that
    there are some differences to tell a spread from.

    Attributes:
        num_sequences: how many there are.
        counts: `(parts,)`, how many positions of each count, float64.
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> None:
        self._model, self._batches, self._vocabulary = model, list(batches), vocabulary_of(model)
        self._wanted: list[list[Tensor]] = []
        self._sequences: list[Tensor] = []  # which of all sequences each position is of
        self._stride, sequences = 1, 0
        for batch in self._batches:
            found, numbers = self._run(batch)
            if not self._wanted:
                size = sum(tensor.numel() for tensor in found) * len(self._batches)
                self._stride = max(-(-size // KEPT), 1)
            self._wanted.append([tensor[:: self._stride].clone() for tensor in found])
            self._sequences.append(torch.cat([number[:: self._stride] for number in numbers]) + sequences)
            sequences += num_rows(batch)
        self.num_sequences = sequences
        if 0 < sequences < FEW:
            pieces = -(-STRETCHES // sequences)
            self._sequences = [number * pieces + _stretches(number, pieces) for number in self._sequences]
            parts = torch.cat(self._sequences).unique(return_inverse=True)[1]
            self._sequences = list(parts.split([len(number) for number in self._sequences]))
            sequences = int(parts.max()) + 1
        self.counts = torch.bincount(torch.cat(self._sequences), minlength=sequences).double()
        squared = [torch.cat(parts) for parts in zip(*self._wanted, strict=True) if not self._is_words(parts[0])]
        energy = sum(float((each - each.mean(0)).square().sum()) for each in squared)
        self._unit = energy / sum(map(len, squared)) if energy > 0 else 1.0

    @property
    def is_divergence(self) -> bool:
        """Whether all outputs are compared by their divergence."""
        return bool(self._wanted) and all(map(self._is_words, self._wanted[0]))

    def now(self, model: PreTrainedModel | None = None) -> Tensor:
        """`(parts,)` differences, summed over each one's positions, float64 on the CPU; 0 is equal.

        Their sum over that of `counts` is the distance.

        Args:
            model: another one of the same outputs; by default the same, as it is now.
        """
        parts = []
        for batch, wanted in zip(self._batches, self._wanted, strict=True):
            found = zip(self._run(batch, model)[0], wanted, strict=True)
            parts += [self._lost(now[:: self._stride], was) for now, was in found]
        lost = torch.cat(parts).double().cpu()
        return torch.zeros_like(self.counts).index_add(0, torch.cat(self._sequences), lost)

    def _is_words(self, output: Tensor) -> bool:
        return self._vocabulary is not None and output.shape[-1] == self._vocabulary

    def _lost(self, now: Tensor, was: Tensor) -> Tensor:
        """How far each position is, `(positions,)`: in nats, or relative to the mean variance; 0 is equal."""
        if not self._is_words(was):
            return (now - was).square().sum(-1) / self._unit
        before = was.log_softmax(-1)
        shares = before.exp()
        # A word that never comes has a logit of -inf, in both.
        return torch.where(shares > 0, shares * (before - now.log_softmax(-1)), 0).sum(-1)

    def _run(self, batch: Mapping[str, Any], model: PreTrainedModel | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Of each output the real positions, and which sequence of the batch each is of."""
        model = self._model if model is None else model
        with torch.no_grad(), evaluation_mode(model):
            outputs = run_whole(model, batch)
        return (
            [real_outputs(name, value, batch).float() for name, value in outputs.items()],
            [sequences_of(name, value, batch) for name, value in outputs.items()],
        )
