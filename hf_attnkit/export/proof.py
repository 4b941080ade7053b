"""Proof of an export: the file must give what the PyTorch model gives, on inputs that were not traced.

Both add the same numbers up in another order. What such roundings come to is measured, on this model and these inputs:
the output of each module without parts of its own is moved up or down by the dtype's epsilon, and the model's outputs
move by so much. As in the proof of a change of heads (`editing.proof`):

    | file - model |  <=  c * (| rounded - model | + eps * | model |)      largest entries, of each output

with c = 64 in float32. A file in float16 is compared with the model in float32, with float16's epsilon and c = 4. What
stands where the mask hides a token is read by nobody and left out. An int8 file has no such bound: its weights are
others. It comes from a graph that was proven, and must run at the same inputs and put out finite numbers; how far off
it is, is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.models.discovery import quiet

FACTORS = {torch.float32: 64, torch.float16: 4}


@dataclass(frozen=True)
class Compared:
    """One comparison.

    Attributes:
        batch, length: of the inputs.
        off: largest difference of a logit, or another output, as a fraction of the largest.
        bound: what rounding explains, likewise; infinite for int8.
    """

    batch: int
    length: int
    off: float
    bound: float


def compare(
    model: PreTrainedModel,
    run: Callable[..., Mapping[str, Any]],
    batches: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype | None,
) -> list[Compared]:
    """Compare what `run` gives with what the model gives.

    Args:
        model: in float32.
        run: takes the inputs by name, returns the outputs by name.
        dtype: of the file; `None` for int8.

    Raises:
        ValueError: if it does not run, gives other outputs, or differs by more than rounding explains.
    """
    made = []
    for inputs in batches:
        batch, length = inputs["input_ids"].shape
        where = f"with {batch} rows of {length} tokens"
        with quiet(model):
            wanted = floats(model(**inputs))
            moved = {}
            if dtype is not None:
                with rounded(model, torch.finfo(dtype).eps):
                    moved = floats(model(**inputs))
        try:
            got = floats(run(**inputs))
        except Exception as error:  # of the runtime's own classes
            raise ValueError(f"{where} the file does not run: {first_line(error)}") from error
        if got.keys() != wanted.keys():
            raise ValueError(f"the file puts out {', '.join(got)}, the model {', '.join(wanted)}")
        made += [
            _compared(name, where, inputs["attention_mask"], got[name], wanted[name], moved.get(name), dtype)
            for name in wanted
        ]
    return made


def _compared(
    name: str,
    where: str,
    mask: Tensor,
    got: Tensor,
    wanted: Tensor,
    moved: Tensor | None,
    dtype: torch.dtype | None,
) -> Compared:
    if got.shape != wanted.shape:
        raise ValueError(f"{where} {name} has the shape {tuple(got.shape)} and not {tuple(wanted.shape)}")
    if wanted.shape[:2] == mask.shape and wanted.dim() > 1:
        real = mask.bool()
        got, wanted, moved = got[real], wanted[real], None if moved is None else moved[real]
    if not torch.isfinite(got).all():
        raise ValueError(f"{where} {name} of the file is not finite")
    size = largest(wanted)
    off, bound = largest(got.double() - wanted.double()), float("inf")
    if moved is not None and dtype is not None:
        bound = FACTORS[dtype] * (largest(moved - wanted) + torch.finfo(dtype).eps * size)
        if off > bound:
            raise ValueError(
                f"{where} {name} of the file differs from the model's by {off:.1e}, more than {bound:.1e}, which "
                "rounding explains"
            )
    batch, length = mask.shape
    return Compared(batch, length, off / size, bound / size)


def floats(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The outputs that are tensors of floating point, in float32, by name."""
    return {
        name: value.detach().float()
        for name, value in outputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


@contextmanager
def rounded(model: nn.Module, eps: float) -> Iterator[None]:
    """Move the outputs of modules without parts of their own by one rounding, up or down at random."""
    generator = torch.Generator().manual_seed(0)

    def move(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        return (output.double() * (1 + eps * signs.double())).to(output.dtype)

    with ExitStack() as stack:
        for module in model.modules():
            if not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(move).remove)
        yield


def first_line(error: BaseException) -> str:
    """What an error says first, in one line without colours; of a chain, the innermost."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def largest(x: Tensor) -> float:
    """The largest absolute entry, and never quite 0: it is divided by."""
    return max(float(x.abs().max()) if x.numel() else 0.0, torch.finfo(torch.float32).tiny)
