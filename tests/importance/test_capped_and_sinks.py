"""Measures of attention with capped scores (Gemma 2) or sinks in its softmax (gpt-oss), against float64 matrices.

A sink is one more key: with its weight, those of the keys sum to one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.every_type import small_model
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, Trainer, TrainingArguments

from hf_attnkit import AttentionEntropyCallback, head_importance, head_statistics, swap_attention
from hf_attnkit.attention.dispatch import observe, stock_function
from hf_attnkit.attention.kernels import tiles
from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.score_changes import as_stock_applies
from hf_attnkit.importance import online
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.observing.attention_calls import visible_attention

CAPPED, SINKS = ("gemma2", "vaultgemma"), ("gpt_oss", "mimo_v2_flash", "openai_privacy_filter", "flint")
CAP = 1.5
LENGTHS = (13, 7, 10)


def build(model_type: str) -> PreTrainedModel:
    """Scores of several nats, so that a cap and sinks matter, and heads that differ."""
    model = small_model(model_type)
    model.config._experts_implementation_internal = "eager"  # grouped products have no float64
    generator = torch.Generator().manual_seed(1)
    for layer in attention_layers(model):
        module = layer.module
        query = next(part for name, part in module.named_modules() if name in ("q_proj", "qkv_proj"))
        with torch.no_grad():
            query.weight.normal_(0, 6.0 if model_type in CAPPED else 0.6, generator=generator)  # divided by 16, or 3
            if getattr(module, "sinks", None) is not None:
                module.sinks.normal_(0, 2, generator=generator)
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = CAP
    return model


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 90, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def with_sink(matrix: Tensor, has_sink: bool) -> Tensor:
    """`(heads, queries, keys)` or one key more: what is missing from one is the sink's."""
    p = matrix.double()
    if not has_sink:
        return p / p.sum(-1, keepdim=True)  # some take the softmax in float32 whatever they are given
    return torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)


def entropy_and_confidence(model: PreTrainedModel, normalize: bool) -> tuple[Tensor, Tensor]:
    """`(layers, heads)` each, from the matrices that Transformers' eager attention gives in float64, row by row."""
    sums: list[list[Tensor]] = [[], []]
    for layer in range(len(attention_layers(model))):
        entropies, tops = [], []
        for length in LENGTHS:
            row = batch()["input_ids"][LENGTHS.index(length)][-length:][None]
            exact = copy.deepcopy(model).double()
            with torch.no_grad():
                p = exact(row, output_attentions=True).attentions[layer][0]
            module = attention_layers(model)[layer].module
            has_sink = getattr(module, "sinks", None) is not None
            p = with_sink(p, has_sink)
            number = (p > 0).sum(-1)[0]  # no weight of a visible key underflows
            own = torch.special.entr(p).sum(-1)
            if normalize:
                own = own / number.clamp(min=2).log()
            entropies.append(own[:, number > 1] if normalize else own)
            tops.append(p.amax(-1))
        sums[0].append(torch.cat(entropies, 1).mean(1))
        sums[1].append(torch.cat(tops, 1).mean(1))
    return torch.stack(sums[0]), torch.stack(sums[1])


# Two float32 runs of the model, and scores up to about 20, as in `support.importances`.
TOLERANCE = 4 * torch.finfo(torch.float32).eps * 96**0.5 * 20


@pytest.mark.parametrize("kind", ["eager", "flash"])
@pytest.mark.parametrize("model_type", [*CAPPED, *SINKS])
def test_entropy_and_confidence(model_type: str, kind: str) -> None:
    model = build(model_type)
    expected = {normalize: entropy_and_confidence(model, normalize) for normalize in (True, False)}
    if kind != "eager":
        swap_attention(model, kind)
    for normalize, (entropy, top) in expected.items():
        found = head_importance(model, [batch()], method="entropy", direction="diffuse", normalize=normalize)
        assert found.max() - found.min() > 0.05
        assert (found - entropy).abs().max() <= TOLERANCE * (1 if normalize else math.log(14))
        found = head_importance(model, [batch()], method="confidence")
        assert (found - top).abs().max() <= TOLERANCE


def test_a_cap_and_sinks_matter() -> None:
    """Else the tests above would not see them."""
    for model_type, name in (("gemma2", "attn_logit_softcapping"), ("gpt_oss", "sinks")):
        model = build(model_type)
        before = head_importance(model, [batch()], method="entropy")
        for layer in attention_layers(model):
            value: Any = 50.0 if name != "sinks" else nn.Parameter(torch.full_like(layer.module.sinks, -50.0))
            setattr(layer.module, name, value)
        assert (head_importance(model, [batch()], method="entropy") - before).abs().min() > 100 * TOLERANCE


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_statistics(model_type: str) -> None:
    """Of one row without padding, from its matrices; a sink is no token, and the distance is that of the tokens."""
    model = build(model_type)
    row = batch()["input_ids"][:1]
    found = head_statistics(model, [{"input_ids": row}])
    with torch.no_grad():
        matrices = copy.deepcopy(model).double()(row, output_attentions=True).attentions
    place = torch.arange(13.0, dtype=torch.float64)
    for layer, matrix in enumerate(matrices):
        has_sink = model_type == "gpt_oss"
        # The first query sees one token, and so has a choice where there is a sink.
        every = with_sink(matrix[0], has_sink)[:, 0 if has_sink else 1 :]
        p = every[..., :13]
        distance = (place[13 - p.shape[1] :, None] - place).abs()
        wanted = {
            "entropy": torch.special.entr(every).sum(-1).mean(-1),
            "confidence": every.amax(-1).mean(-1),
            "distance": ((p * distance).sum(-1) / p.sum(-1)).mean(-1),
            "first": p[..., 0].mean(-1),
            "previous": p[:, -12:].diagonal(dim1=1, dim2=2).mean(-1),
        }
        for name, value in wanted.items():
            scale = {"entropy": math.log(14), "distance": 13.0}.get(name, 1.0)
            assert (getattr(found, name)[layer] - value).abs().max() <= TOLERANCE * scale, name
        overlap = torch.minimum(every[:, None], every).sum(-1).mean(-1).fill_diagonal_(-1)
        assert (found.redundancy[layer] - overlap.amax(-1)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("model_type", [*CAPPED, *SINKS, "granite_swa", "deepseek_v4"])
@pytest.mark.parametrize("kind", ["eager", "mha"])
def test_observers_are_told_what_is_attended_to(model_type: str, kind: str) -> None:
    """Softmax by the mask that an observer gets is what the next module gets, whatever the model's function does."""
    if (model_type, kind) == ("deepseek_v4", "mha"):
        pytest.skip("cannot be swapped")
    model = build(model_type) if model_type != "deepseek_v4" else small_model(model_type)
    if kind != "eager":
        swap_attention(model, kind)
    told: list[tuple[Tensor, Tensor]] = []
    stock = stock_function("eager", attention_layers(model)[0].module)

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> None:
        group = query.shape[1] // key.shape[1]
        keys, values = (x.double().repeat_interleave(group, 1) for x in (key, value))
        p = mask.softmax(query.double() @ keys.mT * scaling)
        sinks = getattr(module, "sinks", None)
        if sinks is not None:
            assert torch.equal(mask.sinks, sinks) and bool((p.sum(-1) < 1).all())
        dense = torch.zeros(p.shape[-2:]).masked_fill(~mask.visible()[0, 0], -torch.inf)[None, None]
        keywords = {"softcap": getattr(module, "attn_logit_softcapping", None), "s_aux": sinks}
        theirs = stock(module, query, key, value, dense, scaling=scaling, dropout=0.0, **keywords)[0]
        told.append(((p @ values).transpose(1, 2), theirs))

    with torch.no_grad(), visible_attention(model), observe(note):
        model(batch()["input_ids"][:1])
    assert len(told) == len(attention_layers(model))
    for ours, theirs in told:
        assert (ours - theirs).abs().max() <= 2**6 * torch.finfo(torch.float32).eps * theirs.abs().max()


def test_what_a_function_ignores_is_not_measured() -> None:
    """Transformers' SDPA takes sinks and does nothing with them; a function that does something else is refused."""
    module = attention_layers(build("gpt_oss"))[0].module
    mask = dataclasses.replace(Mask.aligned(5, 5, is_causal=True), sinks=module.sinks.detach())
    shapes = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    assert as_stock_applies(module, AttentionInterface()["sdpa"], mask, *shapes).sinks is None
    assert as_stock_applies(module, stock_function("eager", module), mask, *shapes) == mask

    def doubled(*args: Any, **keywords: Any) -> tuple[Tensor, None]:
        output, _ = stock_function("eager", module)(*args, **keywords)
        return 2 * output, None

    with pytest.raises(ValueError, match="passes s_aux, and what its attention function makes of that is neither"):
        as_stock_applies(module, doubled, mask, *shapes)


def test_the_callback(tmp_path: Path) -> None:
    """Its first values are those of `head_importance` after one step without learning."""
    model = build("gpt_oss").train()
    rows = [{"input_ids": row, "labels": row} for row in batch()["input_ids"]]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=3, learning_rate=0.0,
                                  report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[AttentionEntropyCallback()])
    trainer.train()
    inputs = [{"input_ids": batch()["input_ids"]}]
    expected = head_importance(model, inputs, method="entropy", direction="diffuse").double().mean(-1)
    log = next(row for row in trainer.state.log_history if "attention_entropy/layer_0/mean" in row)
    for layer, value in enumerate(expected):
        assert abs(log[f"attention_entropy/layer_{layer}/mean"] - float(value)) <= TOLERANCE


@pytest.mark.parametrize("form", ["padding", "window", "matrix", "bias"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_kernels(form: str, softcap: float | None, has_sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running sums over tiles against the matrix with one more column, in float64, keys far from zero."""
    monkeypatch.setattr(tiles, "QUERY_TILE", 7)
    monkeypatch.setattr(tiles, "WINDOW_QUERY_TILE", 7)
    monkeypatch.setattr(tiles, "KEY_TILE", 5)
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 40, 12).double(), torch.randn(2, 3, 40, 12).double() + 1
    sinks = 3 * torch.randn(6).double() if has_sinks else None
    visible = torch.arange(40) >= torch.tensor([[0], [9]])
    mask = Mask.aligned(40, 40, is_causal=True, key_visible=visible)
    window = 4 if form == "window" else None
    if form in ("matrix", "bias"):
        mask = mask.also(torch.rand(2, 6, 40, 40) < 0.7)
    if form == "bias":
        mask = dataclasses.replace(mask, bias=torch.randn(1, 6, 40, 40).double())
    mask = dataclasses.replace(mask, softcap=softcap, sinks=sinks)

    seen = mask.visible().expand(2, 6, 40, 40)
    if window:
        seen = seen & (mask.distance().abs() < window)
    scores = query @ key.repeat_interleave(2, 1).mT * 0.7
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = (scores if mask.bias is None else scores + mask.bias).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(2, 6, 40, 1)], -1)
    p = scores.softmax(-1).nan_to_num()
    none = ~seen.any(-1)  # such a query has no attention, sink or not
    numbers = (seen.sum(-1) + has_sinks).masked_fill(none, 0)
    assert torch.equal(online.visible_keys(mask, window).expand(2, 6, 40), numbers)
    entropy = torch.special.entr(p).sum(-1).masked_fill(none, 0.0)
    assert (online.masked_entropy(query, key, mask, 0.7, window) - entropy).abs().max() <= 1e-12
    top = p.amax(-1).masked_fill(none, 0.0)
    assert (online.largest_weight(query, key, mask, 0.7, window) - top).abs().max() <= 1e-12
