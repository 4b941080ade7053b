"""Something random hidden in a long text, and whether a language model finds it again.

    passkey      ... text ...  The pass key is 48213. Remember it.  ... text ...  The pass key is |  48213
    induction    ... text ...  r_0 r_1 ... r_23                     ... text ...  r_0 ... r_7     |  r_8 ... r_23

A passkey (Mohtashami and Jaggi 2023, arXiv 2305.16300) is five random digits. What induction repeats are 24 random
tokens, drawn from those of the text: it asks for no understanding of the words around them, so that small models can
do it too. Found is what the model would write by itself, greedily: each token of the answer is the likeliest one after
those before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.models.sample_inputs import input_device

FORMS = ("passkey", "induction")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the text, where it is hidden
STRING, SHOWN = 24, 8  # random tokens, and how many of them the question repeats
DIGITS = 5


def shares_found(
    model: PreTrainedModel, tokenizer: Any, text: Tensor, form: str, lengths: list[int], draws: int
) -> dict[str, float]:
    """By the length in tokens, how many of the hidden strings are found whole: `draws` at each of `DEPTHS`.

    Args:
        text: token ids `(T,)` of ordinary text, which the string is hidden in.
        form: one of `FORMS`.

    Raises:
        ValueError: for a text too short for a length, or a length too short to hide anything.
    """
    found = {}
    for length in lengths:
        hits = [_is_found(model, *probe) for probe in probes(tokenizer, text, form, length, draws)]
        found[str(length)] = sum(hits) / len(hits)
    return found


def probes(tokenizer: Any, text: Tensor, form: str, length: int, draws: int) -> Iterator[tuple[Tensor, int]]:
    """Token ids `(length,)` that end with the answer, and how many tokens that is; for all models the same."""
    generator = torch.Generator().manual_seed(length)
    ordinary = text.unique()
    for draw in range(draws):
        for depth in DEPTHS:
            hidden, question, answer = _parts(tokenizer, form, ordinary, generator)
            room = length - sum(len(part) for part in (hidden, question, answer))
            if room < 2 or room > len(text):
                raise ValueError(
                    f"{form} in {length} tokens needs {room} tokens of text around it, and the held-out text has "
                    f"{len(text)}; give a length from {length - room + 2} to {length - room + len(text)}"
                )
            start = draw * 997 % (len(text) - room + 1)
            around = text[start : start + room]
            before = round(depth * room)
            yield torch.cat([around[:before], hidden, around[before:], question, answer]), len(answer)


def _parts(tokenizer: Any, form: str, ordinary: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What is hidden, the question, and the answer."""
    if form == "induction":
        string = ordinary[torch.randint(len(ordinary), (STRING,), generator=generator)]
        return string, string[:SHOWN], string[SHOWN:]
    key = "".join(str(int(digit)) for digit in torch.randint(10, (DIGITS,), generator=generator))

    def tokens(words: str) -> Tensor:
        return torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"], dtype=torch.long)

    question = tokens("\n\nThe pass key is")
    whole = tokens(f"\n\nThe pass key is {key}")  # digits behind a space may be tokens of their own
    return tokens(f"\n\nThe pass key is {key}. Remember it.\n\n"), question, whole[len(question) :]


@torch.no_grad()
def _is_found(model: PreTrainedModel, ids: Tensor, answer: int) -> bool:
    inputs = {"input_ids": ids[None].to(input_device(model))}
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": answer + 1} if "logits_to_keep" in known else {}
    if "use_cache" in known:
        options["use_cache"] = False
    with evaluation_mode(model):
        logits = model(**inputs, **options).logits[0, -answer - 1 : -1]
    return torch.equal(logits.argmax(-1).cpu(), ids[-answer:])
