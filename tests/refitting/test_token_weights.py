"""What tokens count: gradients by hand, of encoders, decoders and modules called several times."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.any_model import any_model
from support.models import batch, build
from support.unchanged import unchanged
from torch import Tensor

from hf_attnkit import prune_heads
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.refitting.options import RefitOptions
from hf_attnkit.refitting.token_weights import gradient_norms, weights_of


def by_hand(model: Any, layers: Any, batches: list[dict[str, Tensor]]) -> dict[int, list[Tensor]]:
    """Gradients of a random combination of the logits of real tokens, all kept, parameters' too."""
    generator = torch.Generator().manual_seed(0)
    found: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}
    for inputs in batches:
        outputs: dict[int, Tensor] = {}
        handles = [
            layer.output.register_forward_hook(lambda _, args, out, i=layer.index, o=outputs: o.__setitem__(i, out))
            for layer in layers
        ]
        logits = model(**inputs).logits
        if logits.dim() == 3:
            logits = logits[inputs["attention_mask"].bool()]
        signs = 2 * torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8) - 1
        gradients = torch.autograd.grad((logits.float() * signs).sum(), list(outputs.values()))
        for index, gradient in zip(outputs, gradients, strict=True):
            found[index].append(gradient.float().square().sum(-1))
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("family, head", [("bert", "sequence"), ("llama", "causal"), ("gpt2", "causal")])
def test_gradients_are_those_by_hand(family: str, head: str) -> None:
    model = build(family, head)
    layers = attention_layers(model)
    batches = [batch(model, seed=seed) for seed in range(3)]
    expected = by_hand(model, layers, batches)
    with unchanged(model), torch.no_grad():
        found = gradient_norms(model, layers, batches)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    for layer in layers:
        for a, b in zip(found[layer.index], expected[layer.index], strict=True):
            # The same sums in float32, in another order where gradients of parameters are not asked for.
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.max()))
    if family == "bert":  # only the first token of the last layer is read
        last = found[layers[-1].index][0]
        assert bool((last[:, 0] > 0).all()) and not last[:, 1:].any()


def test_a_module_that_is_called_several_times_has_a_gradient_for_each_call() -> None:
    model = any_model("albert")
    (layer,) = attention_layers(model)
    found = gradient_norms(model, [layer], [{"input_ids": torch.arange(3, 13).view(2, 5)}])
    calls = layer.attention.calls
    assert calls > 1 and found[layer.index][0].shape == (2 * calls, 5)
    per_call = found[layer.index][0].view(calls, 2, 5)
    assert bool((per_call.sum((1, 2)) > 0).all()) and not torch.equal(per_call[0], per_call[1])


def test_weights_have_mean_one() -> None:
    norms = [torch.tensor([[4.0, 0.0, 9.0]]), torch.tensor([[1.0, 0.0]])]
    real = [torch.tensor([[True, True, False]]), torch.tensor([[True, True]])]
    first, second = weights_of(norms, real)
    mean = 5 / 4
    expected = [each / mean for each in (4.0, 0.0, 1.0, 0.0)]
    torch.testing.assert_close(first, torch.tensor([[*expected[:2], 0.0]]))
    torch.testing.assert_close(second, torch.tensor([expected[2:]]))
    assert float(first.sum() + second.sum()) == pytest.approx(4)
    for nothing in (0.0, torch.nan, torch.inf):
        for weight, mask in zip(weights_of([norm * 0 + nothing for norm in norms], real), real, strict=True):
            assert torch.equal(weight, mask.float())


def test_tokens_that_are_not_read_do_not_move_the_fit() -> None:
    """A classifier's last layer: what its other tokens are to put out hardly counts, with the weights."""
    model = build("bert", "sequence")
    batches = [batch(model, seed=seed) for seed in range(16)]
    fitted = {}
    for words in ("gradient", "uniform"):
        options = RefitOptions("output", ridge=0.1, token_weights=words, held_out=0.0)
        fitted[words] = prune_heads(copy.deepcopy(model), {1: [0, 1, 2]}, calibration=batches, refit=options)
    errors = {}
    for words, changed in fitted.items():
        with torch.no_grad():
            errors[words] = sum(float((changed(**b).logits - model(**b).logits).square().sum()) for b in batches)
    assert errors["gradient"] < 0.8 * errors["uniform"]
