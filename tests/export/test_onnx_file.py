"""Models, stock and changed, as ONNX files: loaded as documented they give what the model gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.glue_files import tiny_tokenizer
from support.models import build
from support.unchanged import unchanged
from transformers import PreTrainedModel

from hf_attnkit import convert_to_gqa, load_pretrained, prune_heads, swap_attention
from hf_attnkit.cli import main
from hf_attnkit.export import Exported, export_onnx
from hf_attnkit.export.generation import generate
from hf_attnkit.export.inputs import make_inputs
from hf_attnkit.export.proof import FACTORS

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


def pruned(family: str, head: str) -> PreTrainedModel:
    """Other numbers of heads in each layer, and none in the last."""
    model = build(family, head)
    prune_heads(model, {0: [0, 3, 5], 1: list(range(8))})
    return model


def of_every_kind(family: str, head: str) -> PreTrainedModel:
    """A layer of each kind that has a form of its own, and one that keeps Transformers' attention."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("flash", {}),
        ("sliding_window", {"window": 5, "num_sink_tokens": 2}),
        ("local_global", {"window": 5}),
        ("linear", {"window": 4, "feature_map": "hedgehog", "decay": "learned", "gate": "learned"}),
        ("linear", {}),
    ]
    model = build(family, head, num_hidden_layers=len(kinds) + 1)
    for layer, (kind, options) in enumerate(kinds):
        swap_attention(model, kind, layers=[layer], **options)
    return model


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A BERT with other numbers of heads in each layer, exported by the command."""
    folder = tmp_path_factory.mktemp("export")
    model = pruned("bert", "sequence")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    main(["export", str(folder / "model"), str(folder / "out")])
    return load_pretrained(folder / "model"), folder


def test_a_pruned_model_runs_in_onnx_runtime(smallest: tuple[PreTrainedModel, Path]) -> None:
    """As docs/serving.md shows it."""
    from transformers import AutoTokenizer
    from transformers.exporters import ExportedModel

    model, folder = smallest
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    exported = ExportedModel.from_pretrained(folder / "out", device="cpu")
    given = tokenizer(["a b c", "d"], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**given).logits
    bound = FACTORS[torch.float32] * torch.finfo(torch.float32).eps * wanted.abs().max() * 10
    assert (exported(**given).logits - wanted).abs().max() <= bound


def test_onnx_runtime_alone_runs_it(smallest: tuple[PreTrainedModel, Path]) -> None:
    import onnxruntime

    model, folder = smallest
    session = onnxruntime.InferenceSession(folder / "out" / "model.onnx")
    given = make_inputs(model, ["token_type_ids"] * ("token_type_ids" in {i.name for i in session.get_inputs()}), 2, 9)
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})
    with torch.no_grad():
        wanted = model(**given).logits
    torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=0, atol=float(1e-4 * wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:linear attention is another function")
def test_every_kind(tmp_path: Path) -> None:
    """The export compares: it either is right or raises."""
    model = of_every_kind("bert", "token").train()
    with unchanged(model):
        found = export_onnx(model, tmp_path / "out")
    assert not found.decodes and len(found.compared) == 6 and found.off <= found.bound < 1e-3
    assert {"model.onnx", "config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_half_precision_of_grouped_heads(tmp_path: Path) -> None:
    import onnx

    model = build("bert", "token", num_hidden_layers=1)
    convert_to_gqa(model, 4)
    small: Exported = export_onnx(model, tmp_path / "out", precision="float16")
    weights = onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    kinds = {each.data_type for each in weights if len(each.dims) == 2} - {onnx.TensorProto.INT64}  # shapes
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert 1e-5 < small.off < small.bound < 0.2 and next(model.parameters()).dtype == torch.float32
    assert str(small).startswith(f"{tmp_path / 'out' / 'model.onnx'}, float16, ")


def changed_decoder() -> PreTrainedModel:
    """Fewer key/value heads, behind a window with sinks, and a layer without heads."""
    model = build("llama", "causal")
    convert_to_gqa(model, [4, 8])
    prune_heads(model, {1: list(range(8))})
    return swap_attention(model, "sliding_window", layers=[0], window=5, num_sink_tokens=2)


DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "heads per layer": changed_decoder,
    "its own window": lambda: build("mistral", "causal", sliding_window=6, num_hidden_layers=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_put_out_the_same_tokens(name: str, tmp_path: Path) -> None:
    from transformers.exporters import ExportedModel

    model = DECODERS[name]()
    with unchanged(model):
        found = export_onnx(model, tmp_path / "out")
    assert found.decodes and found.off <= found.bound < 1e-3
    prompt = {name: tensor.flip(1) for name, tensor in make_inputs(model, [], 2, 11).items()}  # padded on the left
    wanted = model.generate(**prompt, max_new_tokens=7, min_new_tokens=7, do_sample=False)[:, 11:]
    exported = ExportedModel.from_pretrained(tmp_path / "out", device="cpu")
    assert generate(exported, prompt["input_ids"], prompt["attention_mask"], 7).equal(wanted)
