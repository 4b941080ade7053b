"""Features that learn, layer by layer, what softmax attention gives: the loss, what moves, and what stays."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import batch, build
from support.swapping import swapped
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification, PreTrainedModel, TrainingArguments

from hf_attnkit.attention.kind import PARAMETERS
from hf_attnkit.attention.mask import Mask
from hf_attnkit.experiment.linearizing import transfer
from hf_attnkit.experiment.linearizing.transfer import TransferTrainer, relative_error
from hf_attnkit.experiment.training.train import LOSS
from hf_attnkit.models.layers import attention_layers

LEARNED = {"feature_map": "taylor_exponential", "window": 3, "gate": "learned"}


def trainer(model: PreTrainedModel, folder: Path, rows: list[dict[str, Tensor]], **options: Any) -> TransferTrainer:
    given = {"per_device_train_batch_size": len(rows), "learning_rate": 0.02, "logging_steps": 1, "max_grad_norm": 0.0,
             "num_train_epochs": 8.0, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
             "lr_scheduler_type": "constant"}  # fmt: skip
    return TransferTrainer(model, TrainingArguments(str(folder), **(given | options)), train_dataset=rows)


def rows(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: tensor[row] for name, tensor in inputs.items()} for row in range(len(inputs["input_ids"]))]


def is_learned(name: str) -> bool:
    return PARAMETERS in name


# The loss of a layer.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_error_is_of_what_attention_adds(dtype: torch.dtype) -> None:
    """Through the output projection, without its bias, over real tokens alone; 0 for equal and 1 for nothing."""
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(2, 4, 7, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    projection = nn.Linear(12, 5).to(dtype)
    seen = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]]).bool()
    mask = Mask.aligned(7, 7, is_causal=True, key_visible=seen)
    error = energy = 0.0
    for row in range(2):
        for token in range(7):
            if seen[row, token]:
                found, wanted = (x[row, :, token].flatten().double() for x in (output, target))
                weight = projection.weight.detach().double()
                error += float((weight @ (found - wanted)).square().sum())
                energy += float((weight @ wanted).square().sum())
    loss = relative_error(output, target, mask, projection)
    # In bfloat16 the difference is rounded once, to 2^-9 of it; the rest is float32.
    assert float(loss) == pytest.approx(error / energy, rel=1e-12 if dtype == torch.float64 else 0.01)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert float(relative_error(target, target, mask, projection)) == 0
    assert float(relative_error(torch.zeros_like(target), target, mask, None)) == pytest.approx(1)
    nothing = torch.zeros_like(target)
    assert float(relative_error(nothing, nothing, mask, None)) == 0  # not 0 / 0


def test_a_cached_key_is_not_counted_as_a_query() -> None:
    """The padding of the queries is the end of that of the keys."""
    output, target = torch.ones(1, 1, 2, 1), torch.full((1, 1, 2, 1), 2.0)
    target[0, 0, 0] = 5.0
    mask = Mask.aligned(2, 4, is_causal=True, key_visible=torch.tensor([[True, True, False, True]]))
    assert float(relative_error(output, target, mask, None)) == 1 / 4


def by_hand(model: PreTrainedModel, alone: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> float:
    """The loss of a transfer from sequences that are run one by one, without padding."""
    sums: dict[int, Tensor] = {}

    def noting(output: Tensor, target: Tensor, mask: Mask, projection: nn.Linear) -> Tensor:
        parts = [projection.weight.detach() @ x[0].transpose(0, 1).flatten(1).T for x in (output - target, target)]
        added = torch.stack([part.square().sum() for part in parts])
        sums[id(projection)] = sums.get(id(projection), 0) + added.detach()
        return output.sum()

    with monkeypatch.context() as patched:
        patched.setattr(transfer, "relative_error", noting)
        made = trainer(model, Path("nowhere"), alone)
        for inputs in alone:
            made.compute_loss(model.train(), {name: tensor[None] for name, tensor in inputs.items()})
    assert len(sums) == len(attention_layers(model))
    return float(torch.stack([error / energy for error, energy in sums.values()]).mean())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_is_left_out(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the right of an encoder's sequences, on the left of a decoder's, whose features know the position."""
    model = swapped(build(family, "base"), "linear", **LEARNED).double()
    inputs = batch(model, (13, 7, 10))
    assert (inputs["attention_mask"][1, 0] == 0) == (family == "llama")
    if family == "llama":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    alone = [{"input_ids": row["input_ids"][row["attention_mask"].bool()]} for row in rows(inputs)]
    loss = trainer(model, tmp_path, rows(inputs)).compute_loss(model.train(), inputs).detach()
    assert float(loss) == pytest.approx(by_hand(model, alone, monkeypatch), rel=1e-9)


def test_every_call_of_a_layer_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ALBERT's layers are one, called once for each."""
    sizes = {"embedding_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    torch.manual_seed(0)
    config = AlbertConfig(**sizes, num_attention_heads=2, vocab_size=90, initializer_range=0.5, pad_token_id=0)
    model = swapped(AlbertForSequenceClassification(config).eval(), "linear", **LEARNED)
    errors: list[Tensor] = []
    monkeypatch.setattr(transfer, "relative_error", lambda *given: errors.append(relative_error(*given)) or errors[-1])
    inputs = {"input_ids": torch.arange(3, 19).view(2, 8)}
    made = trainer(model, tmp_path, rows(inputs))
    loss = made.compute_loss(model.train(), inputs)
    assert len(errors) == 3 and len(attention_layers(model)) == 1
    assert float(loss) == pytest.approx(float(sum(errors)) / 3)
    assert [float(each) for each in made._losses[0]] == [float(loss)]


def test_documents_of_a_packed_row_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped(build("llama", "causal"), "linear", **LEARNED).double()
    ids = torch.randint(3, 90, (1, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in (8, 1, 11)])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "labels": ids}
    alone = [{"input_ids": part} for part in ids[0].split((8, 1, 11))]
    loss = trainer(model, tmp_path, rows(inputs)).compute_loss(model.train(), inputs).detach()
    assert float(loss) == pytest.approx(by_hand(model, alone, monkeypatch), rel=1e-9)


def test_targets_are_what_the_untouched_model_attends_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer, dropout left out, whatever the layers before would give with their features."""
    untouched = build("bert", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.5).double()
    model = swapped(untouched, "linear", **LEARNED)
    inputs, wanted, found = batch(model), [], []
    for layer in attention_layers(untouched):
        layer.output.register_forward_pre_hook(lambda _, args: wanted.append(args[0].detach()))
    untouched(**inputs)

    def noting(output: Tensor, target: Tensor, mask: Mask, projection: nn.Linear) -> Tensor:
        found.append(target.transpose(1, 2).flatten(2))
        return relative_error(output, target, mask, projection)

    monkeypatch.setattr(transfer, "relative_error", noting)
    trainer(model, tmp_path, rows(inputs)).compute_loss(model.train(), inputs)
    real = inputs["attention_mask"].bool()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one[real], other[real], rtol=1e-9, atol=1e-9)
    assert model.training


# A training.


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[PreTrainedModel, dict[str, Tensor], list[dict[str, float]]]:
    """A Llama with grouped heads that learned on one batch, what it was before, and what was logged."""
    model = swapped(build("llama", "causal", kv_heads=2), "linear", **LEARNED)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = batch(model, (12, 9, 12, 5))
    made = trainer(model, tmp_path_factory.mktemp("trained"), rows(inputs | {"labels": inputs["input_ids"]}))
    made.train()
    return model, before, made.state.log_history


def test_features_alone_move(trained) -> None:
    model, before, _ = trained
    after = model.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in after if is_learned(name)}
    assert {name.rpartition("parameters.")[2].split(".")[0] for name in moved} == {"query", "key", "gate"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_loss_of_each_layer_is_logged_and_falls(trained) -> None:
    _, _, history = trained
    totals = [entry["loss"] for entry in history if "loss" in entry]
    layers = [[entry[key] for entry in history if key in entry] for key in (f"{LOSS}/layer_0", f"{LOSS}/layer_1")]
    assert len(totals) == 8
    for total, *each in zip(totals, *layers, strict=True):
        assert total == pytest.approx(sum(each) / 2, rel=1e-5)
    for losses in layers:
        assert losses[-1] < 0.8 * losses[0]


def test_layers_on_softmax_are_left_out(tmp_path: Path) -> None:
    model = swapped(build("bert"), "linear", **LEARNED, layers=[1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = trainer(model, tmp_path, rows(batch(model)), num_train_epochs=1.0)
    made.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if is_learned(name)} and all(".1." in name for name in moved)
    assert not any(f"{LOSS}/layer_0" in entry for entry in made.state.log_history)


def test_accumulated_batches_count_alike(tmp_path: Path) -> None:
    """A loss that is logged is the mean, also of a model whose own loss is a sum over all accumulated tokens."""
    model = swapped(build("llama", "causal"), "linear", **LEARNED)
    inputs = batch(model, (12, 4, 9, 11))
    given = rows(inputs | {"labels": inputs["input_ids"]})
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1.0}
    made = trainer(copy.deepcopy(model), tmp_path, given, **more)
    made.train()
    logged, *layers = (entry for entry in made.state.log_history if "loss" in entry or f"{LOSS}/layer_0" in entry)
    assert logged["loss"] == pytest.approx((layers[0][f"{LOSS}/layer_0"] + layers[0][f"{LOSS}/layer_1"]) / 2, rel=1e-5)


def test_evaluation_measures_the_model_as_it_runs(tmp_path: Path) -> None:
    """Not the transfer: its own loss, with linear attention."""
    model = swapped(build("llama", "causal"), "linear", **LEARNED)
    inputs = batch(model, (9, 9))
    inputs["labels"] = inputs["input_ids"]
    made = trainer(model, tmp_path, rows(inputs))
    with torch.no_grad():
        assert float(made.compute_loss(model.eval(), dict(inputs))) == float(model(**inputs).loss)


@pytest.mark.parametrize("options", [None, {"feature_map": "elu"}])
def test_nothing_to_learn_is_refused_and_leaves_the_model_trainable(options: Any, tmp_path: Path) -> None:
    model = build("bert") if options is None else swapped(build("bert"), "linear", **options)
    with pytest.raises(ValueError, match="no layer runs linear attention with features to learn: swap some"):
        trainer(model, tmp_path, rows(batch(model)))
    assert all(parameter.requires_grad for parameter in model.parameters())
