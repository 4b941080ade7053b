"""What works with what: fills the table in docs/attention.md, and fails where the docs say otherwise.

Each cell is tried on a tiny Llama and a tiny BERT: the result must equal that of the same model
without the feature.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from support.matrix import MATRIX
from support.models import batch, build, outputs
from torch import Tensor

from hf_attnkit import load_pretrained, swap_attention
from hf_attnkit.attention.table import KINDS

DOCS = Path(__file__).parents[1] / "docs" / "attention.md"


def model_for(row: str, family: str, layers: int = 2) -> Any:
    case = MATRIX[row]
    heads = {"kv_heads": 4 if case.grouped else 1} if family == "llama" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # linear needs transfer training
        model = build(family, "causal" if family == "llama" else "masked", num_hidden_layers=layers, **heads)
        return swap_attention(model, case.kind.name, **case.options)


def families(row: str) -> tuple[str, ...]:
    return ("llama", "bert") if MATRIX[row].grouped else ("llama",)


def results(model: Any, forward: Callable[..., Tensor]) -> list[Tensor]:
    """Outputs and all gradients."""
    model.zero_grad()
    output = forward(model, batch(model))
    output.square().mean().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def close(ours: list[Tensor], plain: list[Tensor], bound: float) -> None:
    """Relative to the largest entry of each tensor."""
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).abs().max() <= bound * b.abs().max() + 1e-12


def compiled(model: Any, tmp_path: Path) -> None:
    """One graph, forward and backward. The operations are the same, so the results differ by rounding."""
    torch._dynamo.reset()
    uncached = {"use_cache": False} if model.config.model_type == "llama" else {}
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(
        results(model, lambda m, b: graph(**b, **uncached).logits),
        results(model, lambda m, b: m(**b, **uncached).logits),
        1e-4,
    )


def checkpointed(model: Any, tmp_path: Path) -> None:
    """In training mode with dropout, which the second forward pass must repeat."""
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    model.train()
    torch.manual_seed(3)
    plain = results(model, lambda m, b: m(**b).logits)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    close(results(model, lambda m, b: m(**b).logits), plain, 1e-4)


def autocast(model: Any, tmp_path: Path) -> None:
    """bfloat16 has 8 bits: within a few of them of the float32 result, and the gradients exist."""
    model.eval()
    plain = results(model, lambda m, b: m(**b).logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = results(model, lambda m, b: m(**b).logits)
    assert len(mixed) == len(plain) and all(t.isfinite().all() for t in mixed)
    assert (mixed[0].float() - plain[0]).abs().mean() <= 2.0**-4 * plain[0].abs().mean()


def placed(model: Any, tmp_path: Path) -> None:
    """`load_pretrained(device_map=...)` with the last layer offloaded to disk."""
    expected = outputs(model.eval(), batch(model))
    model.save_pretrained(tmp_path)
    stem = "model.layers" if hasattr(model, "model") else "bert.encoder.layer"
    places = {name: "cpu" for name, _ in model.named_children()}
    root, rest = stem.split(".", 1)
    places.pop(root)
    for name, _ in getattr(model, root).named_children():
        if not rest.startswith(name):
            places[f"{root}.{name}"] = "cpu"
    places |= {f"{stem}.0": "cpu", f"{stem}.1": "disk"}
    loaded = load_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert loaded.hf_device_map[f"{stem}.1"] == "disk"
    with torch.no_grad():
        close([outputs(loaded.eval(), batch(loaded))], [expected.detach()], 1e-5)


COLUMNS = {
    "`torch.compile(fullgraph=True)`": compiled,
    "gradient checkpointing": checkpointed,
    "bfloat16 autocast": autocast,
    "`device_map` with offloading": placed,
}


def compiled_in(row: str) -> tuple[str, ...]:
    """Llama; BERT too, whose masks hide no future, with the last row of each kind and kernel."""
    last = {MATRIX[name].kind.name if MATRIX[name].kernel else "none of ours": name for name in MATRIX}
    return families(row) if row in last.values() else ("llama",)


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", MATRIX)
def test_cell(row: str, column: str, tmp_path: Path) -> None:
    for family in compiled_in(row) if COLUMNS[column] is compiled else families(row):
        layers = 1 if COLUMNS[column] is compiled else 2  # a second one compiles to the same code again
        COLUMNS[column](model_for(row, family, layers), tmp_path / family)
    assert table(["kind", *COLUMNS])[row][list(COLUMNS).index(column)] == "yes", "docs/attention.md has to say yes here"


def table(titles: list[str]) -> dict[str, list[str]]:
    """A table of docs/attention.md: first cell of a row, without backticks -> the others."""
    lines = DOCS.read_text().split("| " + " | ".join(titles) + " |\n")[1].split("\n\n")[0].splitlines()[1:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {first.strip("`"): others for first, *others in cells}


def test_rows_of_the_documented_table_are_the_cases_of_the_matrix() -> None:
    assert list(table(["kind", *COLUMNS])) == list(MATRIX)


def test_documented_options_are_those_of_the_kinds() -> None:
    """Names and defaults, as the table of kinds shows them."""
    documented = {name: cells[1] for name, cells in table(["name", "what it computes", "options", "cost"]).items()}
    expected = {}
    for name, kind in KINDS.items():
        shown = [
            f"`{field.name}`" if field.default is MISSING else f"`{field.name}={python(field.default)}`"
            for field in fields(kind)
        ]
        expected[name] = ", ".join(shown)
    assert documented == expected


def python(value: object) -> str:
    """As Python writes it, with double quotes."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


@pytest.mark.slow
def test_user_marked_global_tokens_do_not_compile_whole() -> None:
    """How many tokens are marked decides shapes, so the graph breaks: refused by fullgraph, right without it."""
    model = model_for("local_global", "bert", layers=1)
    inputs = batch(model)
    marked = torch.zeros_like(inputs["input_ids"])
    marked[:, 3] = 1
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.UserError):
        torch.compile(model, fullgraph=True, backend="eager")(**inputs, global_attention_mask=marked)
    torch._dynamo.reset()
    graph = torch.compile(model, backend="eager")(**inputs, global_attention_mask=marked).logits
    close([graph.detach()], [model(**inputs, global_attention_mask=marked).logits.detach()], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", "sliding_window"])
def test_static_decoding_in_one_graph_beside_a_window_of_the_model(name: str) -> None:
    """The mask is made inside the graph while training, and outside of it in `generate`."""
    options = {"window": 3} if name == "sliding_window" else {}
    model = swap_attention(
        build("mistral", "causal", heads=4, kv_heads=2, sliding_window=5, num_hidden_layers=1), name, **options
    )
    inputs = batch(model, (12, 7))
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs, use_cache=False, **settings)
    training = model(**inputs, use_cache=False).logits
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    real = inputs["attention_mask"].bool()
    close([model(**inputs, use_cache=False).logits[real]], [training[real]], 1e-4)
    generated = model.generate(**inputs, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(generated, expected)


@pytest.mark.slow
def test_inductor() -> None:
    """The default compiler on the tiled kernel and on a chunked sum, whose loops it must not get wrong."""
    model = model_for("sliding_window", "llama")
    swap_attention(model, {1: "linear"})
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True)
    close(results(model, lambda m, b: graph(**b, use_cache=False).logits),
          results(model, lambda m, b: m(**b, use_cache=False).logits), 1e-3)  # fmt: skip
