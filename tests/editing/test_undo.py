"""Undo for good and for a while."""

from __future__ import annotations

import torch
from torch import nn

from hf_attnkit.editing.undo import Undo


def test_undone_for_a_while_and_back_with_what_others_replaced() -> None:
    module = nn.Linear(4, 3)
    module.number, old = 1, module.weight
    undo = Undo()
    undo.set(module, "weight", nn.Parameter(torch.ones(2, 4)))
    undo.set(module, "number", 2)
    undo.set(module, "number", 3)
    undo.set(module, "another", 5)
    undo.keep(module)
    assert undo.covers(module) and not undo.covers(nn.Linear(1, 1))
    module.weight = nn.Parameter(torch.zeros(2, 4))  # a refit
    fitted, bias = module.weight, module.bias
    with undo.undone():
        assert module.weight is old and module.number == 1 and not hasattr(module, "another")
        assert list(module._parameters) == ["weight", "bias"]
    assert module.weight is fitted and module.bias is bias and (module.number, module.another) == (3, 5)
    undo.back_to()
    assert module.weight is old and module.number == 1 and not hasattr(module, "another") and not len(undo)


def test_an_error_while_undone_brings_the_change_back() -> None:
    module = nn.Linear(4, 3)
    undo = Undo()
    new = nn.Parameter(torch.ones(3, 4))
    undo.set(module, "weight", new)
    try:
        with undo.undone():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert module.weight is new
