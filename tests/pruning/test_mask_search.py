"""The mask search and rescaling of Kwon et al. 2022, by definition and against all possibilities."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from support.models import EDITABLE, batch, build
from support.refits import plain as plain_refit
from torch import Tensor

from hf_attnkit import prune_heads, rearrange_heads, select_heads
from hf_attnkit.models.layers import attention_layers

NAN = float("nan")


def rise(gradients: Tensor, removed: dict[int, list[int]]) -> Tensor:
    """Per layer, the mean over examples of (sum of the removed heads' gradients)^2: the form, multiplied out."""
    zero = gradients.new_zeros(())
    return torch.stack(
        [
            gradients[:, layer, removed[layer]].sum(1).square().mean() if layer in removed else zero
            for layer in range(gradients.shape[1])
        ]
    )


def test_two_heads_that_do_the_same_work() -> None:
    """Heads 0 and 1 are each worth little, but together more than 0 and 2, which cancel."""
    g = torch.tensor([[1.0, 1.0, -1.1, 3.0], [-1.0, -1.0, 1.1, 3.0]])[:, None]
    selection = select_heads(g.square().sum(0), num_heads=2)
    assert selection == {0: [0, 1]}
    assert rearrange_heads(g, selection) in ({0: [0, 2]}, {0: [1, 2]})


@pytest.mark.parametrize("groups", [None, 4, 2], ids=["no groups", "groups of 2", "groups of 4"])
@pytest.mark.parametrize("kind", ["whole", "across"])
def test_never_worse_and_no_exchange_helps(kind: str, groups: int | None) -> None:
    if groups is None and kind == "across":
        pytest.skip("without groups there is nothing to take across")
    generator = torch.Generator().manual_seed(0)
    mixed, lowered = torch.randn(8, 8, generator=generator), 0
    for _ in range(20):
        gradients = (torch.randn(30, 3, 8, generator=generator) @ mixed).double()
        selection = select_heads(gradients.square().sum(0), num_heads=8, num_key_value_heads=groups, groups=kind)
        found = rearrange_heads(gradients, selection, num_key_value_heads=groups)
        size = 8 // groups if groups else 1
        before, after = rise(gradients, selection), rise(gradients, found)
        assert (after <= before * (1 + 1e-12)).all()
        lowered += int((after < before * (1 - 1e-9)).any())
        assert {layer: len(heads) for layer, heads in found.items()} == {k: len(v) for k, v in selection.items()}
        for layer, heads in found.items():
            counts = [sum(head // size == group for head in heads) for group in range(8 // size)]
            assert set(counts) <= ({0, size} if kind == "whole" else {counts[0]})
            kept = [head for head in range(8) if head not in heads]
            for out, back in itertools.product(heads, kept):
                if size > 1 and (kind == "whole" or out // size != back // size):
                    continue
                other = [head for head in heads if head != out] + [back]
                assert rise(gradients, {layer: other})[layer] >= after[layer] * (1 - 1e-9)
    assert lowered > 5


def test_small_layers_end_at_the_least_of_all_selections_mostly() -> None:
    """Exchanges of two find a local least; for two of six heads it is the least of all 15 in most cases."""
    gradients = torch.randn(50, 40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.double).cumsum(2)
    selection = select_heads(gradients.square().sum(0), num_heads=2, per_layer=True)
    found = rearrange_heads(gradients, selection)
    least = torch.stack(
        [rise(gradients, {layer: list(pair) for layer in range(40)}) for pair in itertools.combinations(range(6), 2)]
    ).amin(0)
    hits = [((rise(gradients, s) - least) <= 1e-9 * least).sum() for s in (selection, found)]
    assert hits[1] > 30 and hits[1] > hits[0]


def test_missing_heads_and_layers_left_alone() -> None:
    gradients = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(2))
    gradients[:, 0, 2:] = NAN
    gradients[:, 2] = NAN
    selection = select_heads(gradients.square().sum(0), num_heads=3, num_key_value_heads=[2, 4, 1])
    found = rearrange_heads(gradients, selection, num_key_value_heads=[2, 4, 1])
    assert {layer: len(heads) for layer, heads in found.items()} == {k: len(v) for k, v in selection.items()}
    assert rearrange_heads(gradients, {0: {0, 1}}) == {0: [0, 1]} and rearrange_heads(gradients, {1: []}) == {}


BAD = {
    "a list": (lambda g: rearrange_heads(g.tolist(), {0: [0]}), TypeError, "gradients is a list"),
    "summed": (lambda g: rearrange_heads(g.sum(0), {0: [0]}), ValueError, r"shape \(2, 4\); .*not their sum"),
    "no example": (lambda g: rearrange_heads(g[:0], {0: [0]}), ValueError, "at least one example"),
    "infinite": (lambda g: rearrange_heads(g / 0, {0: [0]}), ValueError, "infinity"),
    "nan": (lambda g: rearrange_heads(g.index_fill(2, torch.tensor(1), NAN), {0: [0]}), ValueError, "NaN before"),
    "nan somewhere": (
        lambda g: rearrange_heads(torch.cat([g, g.index_fill(2, torch.tensor(3), NAN)]), {0: [0]}),
        ValueError,
        "layer 0: gradients has NaN in other places",
    ),
    "head": (lambda g: rearrange_heads(g, {0: [4]}), ValueError, "layer 0: head 4 .*heads 0 to 3"),
    "layer": (lambda g: rearrange_heads(g, {2: [0]}), ValueError, "layer 2 .*layers 0 to 1"),
    "heads no mapping": (lambda g: rearrange_heads(g, [[0]]), TypeError, "must be a mapping"),
    "groups": (lambda g: rearrange_heads(g, {0: [0]}, num_key_value_heads=3), ValueError, "=3 groups"),
    "entries": (lambda g: rearrange_heads(g, {0: [0]}, num_key_value_heads=[4]), ValueError, "1 entries for 2 layers"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(call, error, message) -> None:
    gradients = torch.ones(3, 2, 4)
    with pytest.raises(error, match=message):
        call(gradients)


@pytest.mark.parametrize("family", EDITABLE)
def test_scales_by_definition(family: str) -> None:
    """Per layer, the least squares factors of the heads for the residual stream behind the untouched attention."""

    def stream(args: tuple[Tensor, ...], out: Tensor, attended: list[Tensor]) -> Tensor:
        """What the attention's output is added to; next to a feed-forward part, that is in it too."""
        return out.detach() - attended[-1] if family in ("phi", "cohere") else args[0].detach()

    original = build(family).double()
    batches = [batch(original, seed=seed) for seed in range(6)]
    selection = {0: [1, 2, 5], 1: [0, 4, 7]}
    plain = prune_heads(copy.deepcopy(original), selection)
    fitted = prune_heads(copy.deepcopy(original), selection, calibration=iter(batches), refit=plain_refit("scale"))
    for layer, old, cut in zip(*map(attention_layers, (fitted, original, plain)), strict=True):
        seen: dict[str, list[Tensor]] = {"a": [], "x": [], "y": [], "x'": [], "b": []}
        hooks = [
            layer.output.register_forward_hook(lambda _, args, out, s=seen: s["a"].append(args[0].detach())),
            layer.output.register_forward_hook(lambda _, args, out, s=seen: s["b"].append(out.detach())),
            layer.block.register_forward_hook(lambda _, args, out, s=seen: s["x"].append(stream(args, out, s["b"]))),
            old.output.register_forward_hook(lambda _, args, out, s=seen: s["y"].append(out.detach())),
            old.block.register_forward_hook(lambda _, args, out, s=seen: s["x'"].append(stream(args, out, s["y"]))),
        ]
        for inputs in batches:
            fitted(**inputs)
            original(**inputs)
        for hook in hooks:
            hook.remove()
        masks = [i["attention_mask"].bool() for i in batches]
        a, x, y, x_old, _ = (torch.cat([t[m] for t, m in zip(seen[name], masks, strict=True)]) for name in seen)
        target = x_old + y - x - (0 if layer.output.bias is None else cut.output.bias)
        before = cut.output.weight.detach().unflatten(1, (5, -1))
        parts = torch.einsum("mhd,thd->tmh", before, a.unflatten(1, (5, -1))).flatten(0, 1)
        strength = (0.1 * parts.square().sum(0).mean()).sqrt()
        rows = torch.cat([parts, strength * torch.eye(5, dtype=a.dtype)])
        factors = torch.linalg.lstsq(rows, torch.cat([target.flatten(), strength.expand(5)])[:, None]).solution
        expected = (before * factors).flatten(1)
        # Normal equations square the condition number, which the ridge keeps below 1e2 or so.
        assert (layer.output.weight - expected).abs().max() <= 1e-10 * expected.abs().max()
        assert (factors - 1).abs().max() > 1e-3
        if layer.output.bias is not None:
            assert torch.equal(layer.output.bias, cut.output.bias)


def test_scales_fit_better_than_none() -> None:
    original = build("bert").double()
    batches = [batch(original, seed=seed) for seed in range(8)]
    selection = {0: [0, 1, 2, 3]}
    errors = []
    for options in ({}, {"calibration": batches, "refit": "scale"}, {"calibration": batches}):
        model = prune_heads(copy.deepcopy(original), selection, **options)
        found = []
        for m in (model, original):
            m.encoder.layer[0].attention.output.dense.register_forward_hook(lambda _, a, out, f=found: f.append(out))
            m(**batches[0])
        errors.append((found[0] - found[1]).square().mean().item())
        original.encoder.layer[0].attention.output.dense._forward_hooks.clear()
    assert errors[0] > errors[1] > errors[2]
