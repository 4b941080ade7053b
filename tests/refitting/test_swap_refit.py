"""The refit after a swap: towards what the model put out before, layer by layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import batch, build
from support.unchanged import unchanged
from torch import Tensor

from hf_attnkit import RefitOptions, last_change, load_pretrained, swap_attention
from hf_attnkit.attention.swap import is_swapped
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.refitting.swap_attention import SwapReport

STREAM = {"heads": [1], "window": 3, "num_sink_tokens": 1}


def texts(model: Any, *seeds: int) -> list[dict[str, Tensor]]:
    return [batch(model, (20, 20, 17), seed=seed) for seed in seeds]


def outputs_of(model: Any, inputs: dict[str, Tensor], index: int) -> tuple[Tensor, Tensor]:
    """What the output projection of a layer takes and gives, real tokens only."""
    found: list[tuple[Tensor, Tensor]] = []
    output = attention_layers(model)[index].output
    handle = output.register_forward_hook(lambda module, args, out: found.append((args[0], out)))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    real = inputs["attention_mask"].bool()
    return found[0][0][real], found[0][1][real]


def test_the_first_layer_is_fitted_by_least_squares() -> None:
    model = build("llama", "causal", 4, 2).double()
    batches = texts(model, 1, 2, 3, 4)
    before = copy.deepcopy(model)
    swap_attention(model, "streaming_heads", **STREAM, calibration=batches,
                   refit=RefitOptions("output", ridge=0.0, token_weights="uniform", held_out=0))  # fmt: skip
    taken = torch.cat([outputs_of(model, each, 0)[0] for each in batches])
    wanted = torch.cat([outputs_of(before, each, 0)[1] for each in batches])
    assert len(taken) > 2 * taken.shape[1]
    expected = torch.linalg.lstsq(torch.cat([taken, torch.ones(len(taken), 1)], 1), wanted).solution.T
    output = attention_layers(model)[0].output
    found = torch.cat([output.weight, output.bias[:, None]], 1).detach()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_the_model_is_nearer_to_what_it_was() -> None:
    """On text that was not fitted to; and it says so."""
    model = build("bert").double()
    inputs = texts(model, 99)[0]

    def put_out(each: Any) -> Tensor:
        with torch.no_grad():
            return each(**inputs).last_hidden_state[inputs["attention_mask"].bool()]

    wanted = put_out(model)
    plain = swap_attention(copy.deepcopy(model), "sliding_window", window=3, num_sink_tokens=1)
    swap_attention(model, "sliding_window", window=3, num_sink_tokens=1, calibration=texts(model, *range(12)))
    assert (put_out(model) - wanted).square().sum() < 0.9 * (put_out(plain) - wanted).square().sum()
    report = last_change(model)
    assert isinstance(report, SwapReport) and report.refit.held_out is not None
    assert report.refit.held_out.kept == "output" and len(report.refit.layers) == 2
    assert str(report).count("sliding_window") == 2


def test_a_refit_that_harms_is_not_kept() -> None:
    """Random weights tell nothing of what a window hides: the weights stay, bit for bit."""
    model = build("llama", "causal").double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    swap_attention(model, "sliding_window", window=9, num_sink_tokens=1, calibration=texts(model, *range(12)))
    report = last_change(model)
    assert isinstance(report, SwapReport) and report.refit.held_out is not None
    held = report.refit.held_out
    assert held.kept == "none" and held.errors["none"] < held.errors["output"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_after_an_earlier_swap_towards_what_ran_then(tmp_path: Any) -> None:
    """Not towards the stock model; what was fitted is saved."""
    model = build("llama", "causal").double()
    batches = texts(model, 1, 2, 3, 4)
    swap_attention(model, "sliding_window", window=2)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    swap_attention(model, "sliding_window", window=2, backend="tiled", calibration=batches)
    # The same attention from another kernel: nothing to make up for.
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, kept[name], rtol=1e-9, atol=1e-9)
    swap_attention(model, "sliding_window", window=1, calibration=batches)
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_an_error_in_the_refit_puts_the_swap_back() -> None:
    model = build("llama", "causal")
    batches = [*texts(model, 1), {"input_ids": torch.full((1, 9), 10**6)}]
    with unchanged(model), pytest.raises(ValueError, match="1000000"):
        swap_attention(model, "streaming_heads", **STREAM, calibration=batches)
    assert not is_swapped(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refit": "output"}, "needs calibration batches"),
        ({"refit": "full", "calibration": True}, "fits queries, which see no key that a kind hides"),
        ({"refit": "none", "calibration": True}, "looks at no data, so calibration would have no effect"),
        ({"calibration": []}, "needs calibration batches, and got none"),
        ({"refit": "outputs", "calibration": True}, "refit='outputs' must be one of"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    model = build("llama", "causal")
    if options.get("calibration") is True:
        options = options | {"calibration": texts(model, 1)}
    with unchanged(model), pytest.raises(ValueError, match=message):
        swap_attention(model, "streaming_heads", **STREAM, **options)
