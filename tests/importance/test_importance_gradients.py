"""Scores from the loss: against a loop over examples with explicit gates in float64, one text at a time, no padding."""

from __future__ import annotations

import copy
import functools
import math
import textwrap
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.every_type import small_config, small_model
from support.models import batch, build
from support.subprocesses import run_code, together
from support.unchanged import unchanged
from torch import Tensor
from transformers import PreTrainedModel, Wav2Vec2Config, Wav2Vec2ForCTC

from hf_attnkit import head_gradients, head_importance, prune_heads, swap_attention
from hf_attnkit.editing.proof import heads_changed
from hf_attnkit.importance.methods import l0
from hf_attnkit.models.discovery import discover
from hf_attnkit.models.layers import attention_layers, projected_layers

GRADIENTS = ("gradient", "taylor", "fisher")
CASES = {
    "bert sequence": ("bert", "sequence", None),
    "bert masked": ("bert", "masked", None),
    "llama causal": ("llama", "causal", 2),
    "mistral sequence": ("mistral", "sequence", 4),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def problem(family: str, head: str, kv_heads: int | None) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A padded batch in which no two examples count alike."""
    model = build(family, head, 8, kv_heads)
    inputs = batch(model)
    if head == "sequence":
        inputs["labels"] = torch.tensor([0, 1, 1])
    elif head == "masked":
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] % 3 > 0, -100)
    return model, inputs


@contextmanager
def explicit_gates(model: PreTrainedModel, per_token: bool) -> Any:
    """Multiply the heads of every layer of a model on one text by gates, `(1, T or 1, H)` each."""
    gates: list[Tensor] = []

    def multiply(layer: Any) -> Any:
        def hook(module: Any, args: tuple[Tensor]) -> Tensor:
            tokens = args[0].shape[1] if per_token else 1
            gates.append(torch.ones(1, tokens, layer.num_heads, dtype=torch.float64, requires_grad=True))
            return args[0] * gates[-1].repeat_interleave(layer.head_dim, dim=-1)

        return hook

    with ExitStack() as stack:
        for layer in attention_layers(model):
            stack.callback(layer.output.register_forward_pre_hook(multiply(layer)).remove)
        yield gates


def loop(model: PreTrainedModel, inputs: dict[str, Tensor], per_token: bool = False) -> list[Tensor]:
    """Per example `(layers, T or 1, heads)`: dL/dxi of the loss written out, in float64."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    found = []
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][row][mask][None]
        with explicit_gates(model, per_token) as gates:
            logits = model(ids).logits[0].log_softmax(-1)
        if logits.dim() == 1:
            loss = -logits[inputs["labels"][row]]
        elif "labels" in inputs:
            labels = inputs["labels"][row][mask]
            loss = -logits[labels != -100].gather(1, labels[labels != -100][:, None]).mean()
        else:
            loss = -logits[:-1].gather(1, ids[0, 1:, None]).mean()
        found.append(torch.stack([g[0] for g in torch.autograd.grad(loss, gates)]))
    return found


def definition(method: str, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    if method == "taylor":
        return torch.stack([g.abs().sum(1) for g in loop(model, inputs, per_token=True)]).mean(0)
    gradients = torch.stack([g.sum(1) for g in loop(model, inputs)])
    return gradients.abs().mean(0) if method == "gradient" else gradients.square().sum(0)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Float32 against float64 through two layers: sums of at most 96 terms forward and back, 4 * eps * 96 of the
    largest score. Counting one text as two, or padding, moves scores by tenths."""
    assert expected.max() > 2 * expected.min() > 0
    assert (actual - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * 96 * expected.max()


@pytest.mark.parametrize("implementation", ["sdpa", "flash"])
@every_case
@pytest.mark.parametrize("method", GRADIENTS)
def test_definition(method: str, case: tuple, implementation: str) -> None:
    """Frozen, one batch and several: the same, and no parameter has a gradient."""
    model, inputs = problem(*case)
    expected = definition(method, model, inputs)
    model.requires_grad_(False)
    if implementation == "flash":
        swap_attention(model, "flash")
    halves = [{name: tensor[rows] for name, tensor in inputs.items()} for rows in (slice(2), slice(2, 3))]
    with unchanged(model), torch.no_grad():
        assert_close(head_importance(model, [inputs], method=method), expected)
        assert_close(head_importance(model, halves, method=method), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_and_fisher_are_sums_of_head_gradients() -> None:
    """Also where batches are of several sizes and a layer has fewer heads, whose places hold NaN."""
    model, inputs = problem("bert", "sequence", None)
    prune_heads(model, {1: [0]})
    batches = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 2), slice(2, 3))]
    with unchanged(model):
        gradients = head_gradients(model, batches)
    assert gradients.shape == (3, *head_importance(model, method="random").shape)
    assert gradients[:, 1, -1].isnan().all() and gradients.isnan().sum() == 3
    for method, expected in (("gradient", gradients.abs().mean(0)), ("fisher", gradients.square().sum(0))):
        torch.testing.assert_close(head_importance(model, batches, method=method), expected, equal_nan=True)


def test_taylor_is_at_least_gradient() -> None:
    """And the same in the last layer, of which a classifier reads one token."""
    model, inputs = problem("bert", "sequence", None)
    gradient, taylor = (head_importance(model, [inputs], method=method) for method in ("gradient", "taylor"))
    assert (taylor[0] > gradient[0]).all()
    assert_close(taylor[1], gradient[1].double())


def test_padding_rows_and_ignored_labels_do_not_count() -> None:
    model, inputs = problem("bert", "sequence", None)
    more = {name: torch.cat([tensor, tensor[:2]]) for name, tensor in inputs.items()}
    more["attention_mask"][3] = 0
    more["labels"][4] = -100
    expected = definition("gradient", model, inputs)
    assert_close(head_importance(model, [more], method="gradient"), expected)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_predicted_labels(family: str) -> None:
    model, inputs = problem(family, "sequence", None)
    labels = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.argmax(-1)
    expected = head_importance(model, [inputs | {"labels": labels}], method="fisher")
    del inputs["labels"]
    assert torch.equal(head_importance(model, [inputs], method="fisher", labels="predicted"), expected)


@pytest.mark.parametrize("head", ["question", "choice", "token", "next"])
def test_heads_of_other_tasks(head: str) -> None:
    """Answers of the model itself, batch by batch and text by text."""
    model = build("bert", head)
    inputs = batch(model, (9, 9, 9))
    if head == "choice":
        inputs = {name: tensor[:, None].expand(-1, 2, -1).clone() for name, tensor in inputs.items()}
        inputs["input_ids"][:, 1] = inputs["input_ids"][:, 1].flip(-1)
    alone = [{name: tensor[row : row + 1] for name, tensor in inputs.items()} for row in range(3)]
    together, apart = (head_importance(model, b, method="gradient", labels="predicted") for b in ([inputs], alone))
    assert_close(together, apart.double())


def test_gradient_checkpointing_and_low_precision() -> None:
    """bfloat16 products of two layers: relative errors of its 2^-8, a few of them."""
    model, inputs = problem("llama", "causal", 2)
    expected = head_importance(model, [inputs], method="gradient")
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(head_importance(model, [inputs], method="gradient"), expected)
    low = head_importance(model.bfloat16(), [inputs], method="gradient")
    assert low.dtype == torch.float32
    assert (low - expected).abs().max() <= 2**-8 * 16 * expected.max()


@pytest.mark.parametrize("method", ["entropy", "confidence", "contribution", "gradient", "fisher", "taylor", "l0"])
def test_activations_that_are_not_finite(method: str) -> None:
    model, inputs = problem("bert", "sequence", None)
    projected_layers(model)[1].query.weight.data.fill_(torch.inf)
    before = copy.deepcopy(model.config.__dict__)
    with pytest.raises(ValueError, match="NaN or infinity"):
        head_importance(model, [inputs], method=method)
    assert model.config.__dict__ == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["entropy", "contribution", "gradient", "l0"])
def test_a_batch_of_padding(method: str) -> None:
    model, inputs = problem("bert", "sequence", None)
    empty = inputs | {"attention_mask": torch.zeros_like(inputs["attention_mask"])}
    with unchanged(model), pytest.raises(ValueError, match=r"a batch is all padding: .*\(3, 13\)"):
        head_importance(model, [inputs, empty], method=method)


@pytest.mark.parametrize("method", [*GRADIENTS, "l0"])
def test_labels_are_missing(method: str) -> None:
    model, inputs = problem("bert", "sequence", None)
    del inputs["labels"]
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"labels are missing.*BertForSequenceClassification.*'labels'"),
    ):
        head_importance(model, [inputs], method=method)
    for option in ({"labels": "none"}, {"label": "given"}):
        with pytest.raises(ValueError, match=r"labels='none'|no option label"):
            head_importance(model, [inputs], method=method, **option)
    base = build("llama")
    with unchanged(base), pytest.raises(ValueError, match="LlamaModel has no loss"):
        head_importance(base, [batch(base)], method=method)
    regression = build("bert", "sequence", num_labels=1)
    with unchanged(regression), pytest.raises(ValueError, match="does not choose one of several classes"):
        head_importance(regression, [inputs], method=method, labels="predicted")


def test_labels_that_are_all_ignored() -> None:
    model, inputs = problem("bert", "sequence", None)
    inputs["labels"] = torch.full((3,), -100)
    for score in (head_gradients, functools.partial(head_importance, method="gradient")):
        with unchanged(model), pytest.raises(ValueError, match="no example of the batches has a label"):
            score(model, [inputs])


def test_labels_that_are_no_class() -> None:
    model, inputs = problem("bert", "sequence", None)
    for wrong in (-1, model.config.num_labels):
        inputs["labels"] = torch.tensor([0, wrong, -100])
        with unchanged(model), pytest.raises(ValueError, match=f"label {wrong} is none of the"):
            head_importance(model, [inputs], method="gradient")


def test_hard_concrete_gates() -> None:
    """P(z != 0) by counting draws: 100,000 of them have a standard error of at most 0.0016."""
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for log_alpha in (-3.0, -0.5, 0.0, 2.0):
        value = torch.tensor(log_alpha, dtype=torch.float64)
        z = l0.sample(value, uniform)
        # Open: the stretched s = 1.2 sigmoid((logit u + log_alpha) / beta) - 0.1 is above 0.
        probability = 1 / (1 + math.exp(-(log_alpha - 2 / 3 * math.log(0.1 / 1.1))))
        assert torch.sigmoid(l0.log_odds(value)).item() == pytest.approx(probability, rel=1e-12)
        assert abs((z > 0).double().mean().item() - probability) <= 4 * 0.0016
        assert z.min() >= 0 and z.max() <= 1


def test_l0_closes_a_useless_head() -> None:
    """A head whose columns of the output projection are zero costs its price and saves nothing: each step pushes its
    gate down, while a head that the loss needs is pushed up."""
    model, inputs = problem("bert", "sequence", None)
    inputs["labels"] = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.argmax(-1)
    attention_layers(model)[1].output.weight.data[:, 8:16] = 0
    options: dict[str, Any] = {"method": "l0", "steps": 30, "learning_rate": 0.2, "penalty": 0.01}
    state = torch.random.get_rng_state()
    with unchanged(model):
        scores = head_importance(model, [inputs], **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    start = l0.log_odds(torch.tensor(l0.START))
    # Adam moves by about its rate a step where the gradient keeps its sign.
    assert scores[1, 1] < start - 0.5 * 30 * 0.2 and scores[1, 1] == scores.min()
    assert scores.max() > start
    assert torch.equal(head_importance(model, [inputs], **options), scores)
    assert not torch.equal(head_importance(model, [inputs], **options, seed=1), scores)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"penalty": 0}, "penalty=0"),
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_options_of_l0(option: dict, message: str) -> None:
    model, inputs = problem("bert", "sequence", None)
    with pytest.raises(ValueError, match=message):
        head_importance(model, [inputs], method="l0", **option)


# Two processes with a share each, and one with all: what is asked of both.
PROCESS = """
    import sys, torch, torch.distributed as dist
    from transformers import BertConfig, BertForSequenceClassification
    from hf_attnkit import head_gradients, head_importance
    from hf_attnkit.importance import METHODS

    rank, count, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2)).eval()
    rows = {"input_ids": torch.randint(1, 99, (6, 9)), "labels": torch.tensor([0, 1, 1, 0, 1, 0])}
    # One process sees the batch that each of two sees a third or two thirds of.
    shares = [slice(0, 6)] if count == 1 else [slice(0, 2), slice(2, 6)]
    batches = [{name: tensor[shares[rank]] for name, tensor in rows.items()}]
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    found = {method: head_importance(model, batches, method=method, **({"steps": 5} if method == "l0" else {}))
             for method in METHODS}
    # The same examples, each once, whatever their order.
    found["head_gradients"] = head_gradients(model, batches).sort(0).values
    torch.save(found, f"{folder}/{count}-{rank}.pt")
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path: Path) -> None:
    shares = [[str(rank), str(count), str(tmp_path)] for rank, count in ((0, 1), (0, 2), (1, 2))]
    for done in together([(run_code, (textwrap.dedent(PROCESS), share)) for share in shares]):
        assert done.returncode == 0, done.stderr
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for method, scores in one.items():
        assert torch.equal(two[0][method], two[1][method]), method
        # Another batch size rounds otherwise: float32 through two layers of 32.
        assert (two[0][method] - scores).abs().max() <= 4 * 1.2e-7 * 96 * scores.abs().max(), method


def test_a_loss_that_takes_no_labels() -> None:
    """CLIP matches the texts and images of a batch: against differences of its loss in float64."""
    model = small_model("clip").double()
    found = discover(model)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in found.inputs.items()}
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    for labels in ("given", "predicted"):
        gradients = head_gradients(model, [inputs], labels=labels).mean(0)  # of each example's own loss
        for layer, head in ((0, 1), (1, 3), (2, 0), (3, 2)):
            losses = []
            for change in (1e-5, -1e-5):
                factor = torch.ones(4, dtype=torch.float64)
                factor[head] += change
                with heads_changed(model, found.attentions, {layer: factor}, {}), torch.no_grad():
                    losses.append(model(**inputs, return_loss=True).loss)
            want = float((losses[0] - losses[1]) / 2e-5)
            assert abs(float(gradients[layer, head]) - want) <= 1e-5 * max(abs(want), 1e-2)


def test_labels_that_are_of_no_single_example() -> None:
    """Those of CTC are letters: what each example adds to the batch's loss is not known, so one at a time is asked."""
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(small_config(Wav2Vec2Config)).eval()
    inputs = {"input_values": torch.randn(2, 3200), "labels": torch.tensor([[3, 4, 5], [6, 7, -100]])}
    with unchanged(model), pytest.raises(ValueError, match=r"\(2, 3\) are neither .* give batches of one example"):
        head_importance(model, [inputs], method="gradient")
    alone = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(2)]
    assert head_importance(model, alone, method="gradient").min() > 0


def test_labels_of_other_types() -> None:
    model, inputs = problem("bert", "sequence", None)
    expected = head_importance(model, [inputs], method="gradient")
    short = inputs | {"labels": inputs["labels"].int(), "input_ids": inputs["input_ids"].int()}
    assert torch.equal(head_importance(model, [short], method="gradient"), expected)
    with unchanged(model), pytest.raises(ValueError, match="labels is a list; it must be a tensor"):
        head_importance(model, [inputs | {"labels": [0, 1, 1]}], method="gradient")


@pytest.mark.parametrize("wrong", [-1, 99])
def test_labels_that_are_no_token(wrong: int) -> None:
    model, inputs = problem("bert", "masked", None)
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, 1] = wrong
    with unchanged(model), pytest.raises(ValueError, match=rf"label {wrong} is none of the 99 tokens .*0 to 98"):
        head_importance(model, [inputs], method="gradient")


def test_the_loss_of_a_router_belongs_to_no_example() -> None:
    model = small_model("mixtral")
    ids = torch.arange(12).view(2, 6) % model.config.vocab_size
    inputs = {"input_ids": ids, "labels": ids.clone()}
    inputs["labels"][0, 3:] = -100
    scores = head_importance(model, [inputs], method="gradient")
    model.config.output_router_logits, model.router_aux_loss_coef = True, 10.0
    assert torch.equal(head_importance(model, [inputs], method="gradient"), scores)
