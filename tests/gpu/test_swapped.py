"""Every kind in real models on a GPU, against the same model on the CPU in float64; with caches, packed, compiled."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support import plain_attention
from support.accuracy import assert_as_accurate
from support.gpu import ON_GPU, back, needs_gpu, there
from support.matrix import EXACT, MATRIX, WITH_FAMILY
from support.models import batch, build
from support.swapping import TERMS, build_for, layer_of, results, swapped
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from hf_attnkit import swap_attention

pytestmark = needs_gpu

ON_BOTH = [(name, family) for name, family in WITH_FAMILY if family != "mistral"]
# The models' own cosines and norms are in float32 on both devices; a wrong key moves logits by 1.
CLOSE = {"rtol": 0, "atol": 1e-4}
CACHED: dict[str, tuple[str, dict[str, Any]]] = {
    "flash": ("flash", {}),
    "gqa": ("gqa", {}),
    "sliding_window": ("sliding_window", {"window": 5, "num_sink_tokens": 3}),
    "renumbered": ("sliding_window", {"window": 5, "num_sink_tokens": 3, "renumber": True}),
    "streaming_heads": ("streaming_heads", {"heads": [1], "window": 5, "num_sink_tokens": 3}),
    "local_global": ("local_global", {"window": 4, "num_global_tokens": 2}),
    "linear": ("linear", {"window": 4}),
    "int8": ("flash", {"cache_dtype": "int8"}),
    "float8": ("flash", {"cache_dtype": "float8_e4m3fn"}),
    "window in int8": ("sliding_window", {"window": 5, "cache_dtype": "int8"}),
    "streaming_heads in float8": ("streaming_heads", {"heads": [1], "window": 5, "cache_dtype": "float8_e4m3fn"}),
}


def swap(model: PreTrainedModel, kind: str, options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="linear attention is another function")
        return swap_attention(copy.deepcopy(model), kind, **options)


@pytest.mark.parametrize(("name", "family"), ON_BOTH)
def test_outputs_and_gradients(name: str, family: str) -> None:
    model = build_for(name, family, "sequence" if family == "bert" else "causal")
    inputs = batch(model)
    ours = back(results(swapped(there(model), name, **MATRIX[name].options), there(inputs)))
    model.set_attn_implementation("sdpa" if name in EXACT else plain_attention.register(name))
    plain, exact = results(model, inputs), results(copy.deepcopy(model).double(), inputs)
    assert ours.keys() == plain.keys()
    largest: dict[str, float] = {}
    for at, value in exact.items():
        largest[layer_of(at)] = max(largest.get(layer_of(at), 0.0), value.abs().max().item())
    for at in ours:
        assert_as_accurate(ours[at], plain[at], exact[at], terms=TERMS, magnitude=largest[layer_of(at)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(MATRIX))
@torch.no_grad()
def test_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    model = build_for(name, "llama", "causal").to(dtype)
    inputs, real = batch(model), batch(model)["attention_mask"].bool()
    ours = back(swapped(there(model), name, **MATRIX[name].options)(**there(inputs)).logits)
    model.set_attn_implementation("sdpa" if name in EXACT else plain_attention.register(name))
    plain, exact = model(**inputs).logits, copy.deepcopy(model).double()(**inputs).logits
    assert_as_accurate(ours[real], plain[real], exact[real], terms=TERMS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", CACHED)
@torch.no_grad()
def test_generates_what_the_cpu_does(case: str, cache: str) -> None:
    """In float64, where no two tokens are as probable but for rounding."""
    kind, options = CACHED[case]
    model = swap(build("llama", "causal", heads=4, kv_heads=2).double(), kind, options)
    inputs = batch(model, (13, 7, 10))
    given = {"max_new_tokens": 16, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    want = model.generate(**inputs, **given)
    moved = there(model).generate(**there(inputs), **given)
    assert torch.equal(back(moved), want)
    fresh = swap(there(build("llama", "causal", heads=4, kv_heads=2).double()), kind, options)
    assert torch.equal(back(fresh.generate(**there(inputs), **given)), want)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["flash", "sliding_window"])
@torch.no_grad()
def test_generates_compiled_behind_a_static_cache(case: str) -> None:
    """On a GPU Transformers compiles it by itself, with CUDA graphs."""
    kind, options = CACHED[case]
    model = swap(build("llama", "causal", heads=4, kv_heads=2), kind, options)
    inputs, given = batch(model, (13, 7, 10)), {"max_new_tokens": 8, "do_sample": False}
    want = model.generate(**inputs, **given)
    config = None if ON_GPU else CompileConfig(backend="eager", mode=None, fullgraph=False)
    if config is not None:
        config._compile_all_devices = True
    found = there(model).generate(**there(inputs), cache_implementation="static", compile_config=config, **given)
    assert torch.equal(back(found), want)


@pytest.mark.parametrize("name", MATRIX)
@torch.no_grad()
def test_packed_rows(name: str) -> None:
    model = build_for(name, "llama", "causal").double()
    ids = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(0))
    position = torch.tensor([[*range(9), *range(21)], [*range(25), *range(5)]])
    want = swapped(model, name, **MATRIX[name].options)(ids, position_ids=position, use_cache=False).logits
    moved = swapped(there(model), name, **MATRIX[name].options)
    torch.testing.assert_close(
        back(moved(there(ids), position_ids=there(position), use_cache=False).logits), want, **CLOSE
    )


@pytest.mark.parametrize("name", ["flash, window", "local_global, random blocks", "linear, hedgehog"])
@torch.no_grad()
def test_a_swapped_model_that_is_moved(name: str) -> None:
    """What a kind keeps on a module goes with it."""
    model = swapped(build_for(name, "llama", "causal").double(), name, **MATRIX[name].options)
    inputs = batch(model)
    want, real = model(**inputs).logits, inputs["attention_mask"].bool()
    torch.testing.assert_close(back(there(model)(**there(inputs)).logits)[real], want[real], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", "sliding_window", "linear", "local_global"])
def test_compiled(name: str) -> None:
    model = build_for(name, "llama", "causal")
    inputs, real = batch(model), batch(model)["attention_mask"].bool()
    ours = swapped(there(model), name, **MATRIX[name].options)
    compiled: Any = torch.compile(ours, backend="inductor" if ON_GPU else "eager")

    def run(call: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ours.zero_grad()
        logits = call(**given, use_cache=False).logits
        logits[real.to(logits.device)].square().mean().backward()
        return back(logits)[real], back(ours.lm_head.weight.grad).clone()

    for actual, expected in zip(run(compiled, there(inputs)), run(ours, there(inputs)), strict=True):
        # Other kernels round in another order: sums of up to 96 terms in two layers.
        bound = 64 * TERMS * torch.finfo(torch.float32).eps * float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["flash", "sliding_window", "linear, window, gate"])
def test_under_autocast(name: str) -> None:
    """As accurate as Transformers' own attention under the same autocast."""
    model = build_for(name, "llama", "causal")
    inputs, real = batch(model), batch(model)["attention_mask"].bool()
    moved = there(model)
    ours = swapped(moved, name, **MATRIX[name].options)
    model.set_attn_implementation("sdpa" if name in EXACT else plain_attention.register(name))
    logits = []
    for each, given in ((ours, there(inputs)), (model, inputs)):
        device = next(iter(given.values())).device.type
        with torch.autocast(device, torch.bfloat16):
            output = each(**given).logits
        (output.float().square().mean()).backward()
        logits.append(back(output)[real])
    exact = copy.deepcopy(model).double()(**inputs).logits.detach()[real]
    assert_as_accurate(logits[0].bfloat16(), logits[1].bfloat16(), exact, terms=TERMS)
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)
