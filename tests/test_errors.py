"""Bad input to every public function: the exception names the value and the remedy, and nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import batch, build
from support.unchanged import unchanged
from torch import nn

from hf_attnkit import (
    attention_entropy,
    convert_to_gqa,
    convert_to_mqa,
    head_importance,
    load_pretrained,
    prune_heads,
    restore_attention,
    select_heads,
    swap_attention,
)

NAMES = "mha, gqa, mqa, sliding_window, local_global, flash, linear"
Bad = tuple[Callable[[Any], Any], type[Exception], str]

# 8 query over 4 key/value heads, layers 0 and 1.
MODEL: dict[str, Bad] = {
    "swap: unknown": (lambda m: swap_attention(m, "fast"), ValueError, f"'fast'; available: {NAMES}"),
    "swap: empty name": (lambda m: swap_attention(m, ""), ValueError, f"''; available: {NAMES}"),
    "swap: no name": (lambda m: swap_attention(m, None), (TypeError, ValueError), "None"),
    "swap: number": (lambda m: swap_attention(m, 5), (TypeError, ValueError), "5"),
    "swap: short tuple": (lambda m: swap_attention(m, {0: ("flash",)}), (TypeError, ValueError), "flash"),
    "swap: options no mapping": (lambda m: swap_attention(m, {0: ("flash", 3)}), (TypeError, ValueError), "3"),
    "swap: unknown option": (
        lambda m: swap_attention(m, "sliding_window", window=4, size=3),
        ValueError,
        "no option size; it takes window",
    ),
    "swap: option of none": (
        lambda m: swap_attention(m, "gqa", window=4),
        ValueError,
        "no option window; it takes no options",
    ),
    "swap: missing option": (
        lambda m: swap_attention(m, "sliding_window"),
        ValueError,
        "needs the option window, for example window=64",
    ),
    "swap: window 0": (lambda m: swap_attention(m, "sliding_window", window=0), ValueError, "window=0 .*at least 1"),
    "swap: window float": (
        lambda m: swap_attention(m, "sliding_window", window=4.0),
        ValueError,
        r"window=4\.0 must be an integer",
    ),
    "swap: window bool": (
        lambda m: swap_attention(m, "sliding_window", window=True),
        ValueError,
        "window=True must be an integer",
    ),
    "swap: global tokens": (
        lambda m: swap_attention(m, "local_global", window=4, num_global_tokens=-1),
        ValueError,
        "num_global_tokens=-1 .*at least 0",
    ),
    "swap: random blocks": (
        lambda m: swap_attention(m, "local_global", window=4, num_random_blocks="2"),
        ValueError,
        "num_random_blocks='2' must be an integer",
    ),
    "swap: block size": (
        lambda m: swap_attention(m, "local_global", window=4, block_size=0),
        ValueError,
        "block_size=0 .*at least 1",
    ),
    "swap: seed": (lambda m: swap_attention(m, "local_global", window=4, seed=-3), ValueError, "seed=-3"),
    "swap: mqa on groups": (
        lambda m: swap_attention(m, "mqa"),
        ValueError,
        r"1 key/value head but the layer has 4; call convert_to_mqa\(model\) first, or use 'gqa'",
    ),
    "swap: layer 2": (lambda m: swap_attention(m, "flash", layers=[2]), ValueError, "layer 2 .*layers 0 to 1"),
    "swap: layer -1": (lambda m: swap_attention(m, "flash", layers=[-1]), ValueError, "layer -1 .*layers 0 to 1"),
    "swap: layer bool": (lambda m: swap_attention(m, "flash", layers=[True]), ValueError, "layer True .*layers 0 to 1"),
    "swap: layer name": (lambda m: swap_attention(m, {"0": "flash"}), ValueError, "layer '0' .*layers 0 to 1"),
    "swap: layers a number": (lambda m: swap_attention(m, "flash", layers=1), (TypeError, ValueError), "layers"),
    "swap: no layers": (lambda m: swap_attention(m, "flash", layers=[]), ValueError, "no layer to swap"),
    "swap: empty mapping": (lambda m: swap_attention(m, {}), ValueError, "no layer to swap"),
    "swap: mapping and layers": (
        lambda m: swap_attention(m, {0: "flash"}, layers=[1]),
        ValueError,
        r"layers cannot be given beside a mapping; write \{layer: \(name, options\)\}",
    ),
    "swap: mapping and option": (
        lambda m: swap_attention(m, {0: "flash"}, window=3),
        ValueError,
        "window cannot be given beside a mapping",
    ),
    "swap: options twice": (
        lambda m: swap_attention(m, ("sliding_window", {"window": 3}), window=3),
        ValueError,
        "options stand twice",
    ),
    "swap: second layer bad": (
        lambda m: swap_attention(m, {0: "flash", 1: ("sliding_window", {"window": 0})}),
        ValueError,
        "window=0",
    ),
    "restore: nothing": (restore_attention, ValueError, r"no swapped attention to restore \(it runs 'sdpa'\)"),
    "gqa: does not divide": (
        lambda m: convert_to_gqa(m, 3),
        ValueError,
        r"num_key_value_heads=3 is not possible.*8 query over 4 key/value.*possible: \[1, 2\]",
    ),
    "gqa: same": (lambda m: convert_to_gqa(m, 4), ValueError, r"num_key_value_heads=4.*be fewer.*possible: \[1, 2\]"),
    "gqa: more": (lambda m: convert_to_gqa(m, 8), ValueError, r"num_key_value_heads=8"),
    "gqa: zero": (lambda m: convert_to_gqa(m, 0), ValueError, "num_key_value_heads=0"),
    "gqa: negative": (lambda m: convert_to_gqa(m, -2), ValueError, "num_key_value_heads=-2"),
    "gqa: bool": (lambda m: convert_to_gqa(m, True), ValueError, "num_key_value_heads=True"),
    "gqa: float": (lambda m: convert_to_gqa(m, 2.0), ValueError, r"num_key_value_heads=2\.0"),
    "gqa: text": (lambda m: convert_to_gqa(m, "2"), ValueError, "num_key_value_heads='2'"),
    "gqa: method": (lambda m: convert_to_gqa(m, 2, method="median"), ValueError, "'median'; available: mean"),
    "gqa: calibration": (
        lambda m: convert_to_gqa(m, 2, calibration=[], refit=False),
        ValueError,
        "batches is empty",
    ),
    "gqa: empty calibration": (lambda m: convert_to_gqa(m, 2, calibration=[]), ValueError, "got none"),
    "gqa: refit": (lambda m: convert_to_gqa(m, 2, refit=True), ValueError, "refit=True needs calibration batches"),
    "gqa: key_method": (lambda m: convert_to_gqa(m, 2, key_method="pcs"), ValueError, "unknown key_method 'pcs'"),
    "gqa: grouping": (lambda m: convert_to_gqa(m, 2, grouping="near"), ValueError, "grouping='near' must be one of"),
    "gqa: random grouping": (
        lambda m: convert_to_gqa(m, 2, method="random", grouping="best"),
        ValueError,
        "does not aim at one",
    ),
    "gqa: budget and number": (lambda m: convert_to_gqa(m, 2, budget=0.5), ValueError, "or budget, not both"),
    "gqa: budget": (lambda m: convert_to_gqa(m, budget=1.5), ValueError, "budget=1.5 must be a number between 0 and 1"),
    "gqa: small budget": (lambda m: convert_to_gqa(m, budget=0.01), ValueError, "less than one for each of 2 layers"),
    "gqa: uniform": (lambda m: convert_to_gqa(m, 2, uniform=False), ValueError, "give budget, or a list"),
    "gqa: list": (lambda m: convert_to_gqa(m, [2]), ValueError, "lists 1 numbers, the model has 2 layers"),
    "gqa: list's number": (lambda m: convert_to_gqa(m, [2, 3]), ValueError, r"num_key_value_heads\[1\]=3"),
    "gqa: list of the present": (lambda m: convert_to_gqa(m, [4, 4]), ValueError, "nothing would change"),
    "gqa: few tokens": (
        lambda m: convert_to_gqa(m, 1, method="pca", calibration=[batch(m)]),
        ValueError,
        "30 calibration tokens are too few",
    ),
    "mqa: calibration": (
        lambda m: convert_to_mqa(m, calibration=[batch(m)], refit=False),
        ValueError,
        "30 calibration tokens are too few",
    ),
    "prune: layer 2": (lambda m: prune_heads(m, {2: [0]}), ValueError, "layer 2 .*layers 0 to 1"),
    "prune: layer -1": (lambda m: prune_heads(m, {-1: [0]}), ValueError, "layer -1 .*layers 0 to 1"),
    "prune: layer bool": (lambda m: prune_heads(m, {True: [0, 1]}), ValueError, "layer True"),
    "prune: head 8": (lambda m: prune_heads(m, {0: [0, 8]}), ValueError, "layer 0: head 8 .*heads 0 to 7"),
    "prune: head -1": (lambda m: prune_heads(m, {0: [-1]}), ValueError, "layer 0: head -1 .*heads 0 to 7"),
    "prune: head bool": (lambda m: prune_heads(m, {0: [False, 1]}), ValueError, "head False"),
    "prune: twice": (lambda m: prune_heads(m, {0: [0, 1, 1]}), ValueError, r"heads \[1\] are named more than once"),
    "prune: none": (lambda m: prune_heads(m, {0: [], 1: []}), ValueError, "no head to remove"),
    "prune: empty": (lambda m: prune_heads(m, {}), ValueError, "no head to remove"),
    "prune: no mapping": (lambda m: prune_heads(m, [0, 1]), (TypeError, ValueError), r"\[0, 1\]"),
    "prune: heads a number": (lambda m: prune_heads(m, {0: 1}), (TypeError, ValueError), "layer 0"),
    "prune: unequal groups": (
        lambda m: prune_heads(m, {0: [0]}),
        ValueError,
        r"layer 0: .* groups of 2 \(heads 0-1, 2-3, 4-5, 6-7\).*groups of \[1, 2, 2, 2\]; "
        "remove whole groups, or the same number",
    ),
    "prune: second layer bad": (lambda m: prune_heads(m, {0: [0, 1], 1: [2]}), ValueError, "layer 1: .*groups of"),
    "prune: refit": (
        lambda m: prune_heads(m, {0: [0, 1]}, calibration=[batch(m)], refit="all"),
        ValueError,
        "refit='all' must be one of 'none', 'output'",
    ),
    "prune: refit without data": (
        lambda m: prune_heads(m, {0: [0, 1]}, refit="scale"),
        ValueError,
        "refit='scale' needs calibration batches",
    ),
    "prune: calibration": (
        lambda m: prune_heads(m, {0: [0, 1]}, calibration=[]),
        ValueError,
        "refit needs calibration batches",
    ),
    "importance: method": (
        lambda m: head_importance(m, [], method="tailor"),
        ValueError,
        "'tailor'; available: entropy, .*, taylor, .*, magnitude, random",
    ),
    "importance: option": (
        lambda m: head_importance(m, [], method="entropy", seed=1),
        ValueError,
        "no option seed; it takes direction, normalize",
    ),
    "importance: option of none": (
        lambda m: head_importance(m, method="magnitude", norm=1),
        ValueError,
        "no option norm; it takes no options",
    ),
    "importance: no batches": (head_importance, ValueError, "give batches of model inputs"),
    "importance: empty batches": (
        lambda m: head_importance(m, []),
        ValueError,
        r"batches is empty; .*\(an iterator is spent",
    ),
    "importance: tensor": (
        lambda m: head_importance(m, [torch.ones(1, 3)]),
        ValueError,
        "must be a mapping .*got Tensor",
    ),
    "importance: batches a mapping": (
        lambda m: head_importance(m, batch(m)),
        ValueError,
        "must be a mapping .*got str",
    ),
    "importance: second batch bad": (
        lambda m: head_importance(m, [batch(m), (1, 2)]),
        ValueError,
        "must be a mapping .*got tuple",
    ),
    "importance: direction": (
        lambda m: head_importance(m, [batch(m)], method="entropy", direction="sharp"),
        ValueError,
        "direction='sharp' .*focused, diffuse",
    ),
}

SCORES = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
SELECT: dict[str, Bad] = {
    "one dimension": (lambda s: select_heads(s[0], fraction=0.5), ValueError, r"shape \(4,\); it must be"),
    "a list": (lambda s: select_heads(s.tolist(), fraction=0.5), (TypeError, ValueError), "importance"),
    "neither": (select_heads, ValueError, "exactly one of fraction and num_heads"),
    "both": (lambda s: select_heads(s, fraction=0.5, num_heads=1), ValueError, "exactly one of"),
    "fraction 1": (lambda s: select_heads(s, fraction=1.0), ValueError, r"fraction=1\.0 must be .*below 1"),
    "fraction -0.1": (lambda s: select_heads(s, fraction=-0.1), ValueError, r"fraction=-0\.1"),
    "fraction nan": (lambda s: select_heads(s, fraction=float("nan")), ValueError, "fraction=nan"),
    "fraction 50": (lambda s: select_heads(s, fraction=50), ValueError, "fraction=50 .*share"),
    "number -1": (lambda s: select_heads(s, num_heads=-1), ValueError, "num_heads=-1 .*at least 0"),
    "number 1.5": (lambda s: select_heads(s, num_heads=1.5), ValueError, r"num_heads=1\.5 must be an integer"),
    "number bool": (lambda s: select_heads(s, num_heads=True), ValueError, "num_heads=True"),
    "too many": (
        lambda s: select_heads(s, num_heads=7),
        ValueError,
        "7 heads cannot be removed.* 6 can; ask for fewer",
    ),
    "too many in a layer": (
        lambda s: select_heads(s, num_heads=4, per_layer=True),
        ValueError,
        "4 heads cannot be removed from layer 0.* 3 can",
    ),
    "min_heads stands in the way": (
        lambda s: select_heads(s, fraction=0.5, min_heads=3),
        ValueError,
        "4 heads .*at least 3 kept .* 2 can",
    ),
    "min_heads -1": (lambda s: select_heads(s, num_heads=1, min_heads=-1), ValueError, "min_heads=-1 .*at least 0"),
    "more than all": (lambda s: select_heads(s, num_heads=9, min_heads=0), ValueError, "9 heads .* 8 can"),
    "unknown groups": (
        lambda s: select_heads(s, num_heads=2, num_key_value_heads=2, groups="within"),
        ValueError,
        "groups='within' must be one of 'whole', 'across'",
    ),
    "across no groups": (
        lambda s: select_heads(s, num_heads=2, groups="across"),
        ValueError,
        "groups='across' .*give num_key_value_heads",
    ),
    "less than one from each": (
        lambda s: select_heads(s, num_heads=3, num_key_value_heads=2, groups="across"),
        ValueError,
        "3 heads cannot be removed.*equally many from each group.* 2 can",
    ),
    "groups bool": (
        lambda s: select_heads(s, num_heads=2, num_key_value_heads=[True, 2]),
        ValueError,
        "=True must be an integer",
    ),
    "min_heads bool": (lambda s: select_heads(s, num_heads=1, min_heads=True), ValueError, "min_heads=True"),
    "groups": (
        lambda s: select_heads(s, num_heads=1, num_key_value_heads=3),
        ValueError,
        "4 heads do not divide into num_key_value_heads=3",
    ),
    "groups 0": (lambda s: select_heads(s, num_heads=1, num_key_value_heads=0), ValueError, "num_key_value_heads=0"),
    "groups of other layers": (
        lambda s: select_heads(s, num_heads=1, num_key_value_heads=[2]),
        ValueError,
        "1 entries for 2 layers",
    ),
    "less than a group": (
        lambda s: select_heads(s, num_heads=1, num_key_value_heads=2),
        ValueError,
        "1 heads cannot be removed.*whole groups.* 0 can",
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", "causal", 8, 4)


@pytest.mark.parametrize(("call", "error", "message"), MODEL.values(), ids=MODEL)
def test_bad_argument(model: Any, call: Callable, error: type[Exception], message: str) -> None:
    with unchanged(model), pytest.raises(error, match=f"(?s){message}"):
        call(model)


@pytest.mark.parametrize(("call", "error", "message"), SELECT.values(), ids=SELECT)
def test_bad_selection(call: Callable, error: type[Exception], message: str) -> None:
    before = SCORES.clone()
    with pytest.raises(error, match=message):
        call(SCORES)
    assert torch.equal(SCORES, before)


def test_numbers_of_other_libraries_are_no_riddle() -> None:
    """Indices from NumPy or torch either work or are refused for what they are, not as out of range."""
    for index in (np.int64(1), torch.tensor(1)):
        try:
            pruned = prune_heads(build("bert"), {0: [index]})
        except (TypeError, ValueError) as error:
            assert "out of range" not in str(error)
        else:
            assert pruned.encoder.layer[0].attention.self.query.out_features == 56


# What changes a model, and what looks at its attention.
CHANGES = {
    "swap": lambda m: swap_attention(m, "gqa"),
    "gqa": lambda m: convert_to_gqa(m, 2),
    "mqa": convert_to_mqa,
    "prune": lambda m: prune_heads(m, {0: [0, 1]}),
    "importance": lambda m: head_importance(m, method="magnitude"),
    "entropy": lambda m: head_importance(m, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]),
}
EDITS = {name: change for name, change in CHANGES.items() if name != "swap"}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
every_edit = pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)


@every_change
def test_not_a_model(change: Callable) -> None:
    for thing, name in ((nn.Linear(2, 2), "Linear"), (None, "NoneType"), ("bert-base-uncased", "str")):
        with pytest.raises(TypeError, match=f"expected a transformers.PreTrainedModel, got {name}; pass the model"):
            change(thing)


@every_change
def test_compiled(change: Callable) -> None:
    inner = build("llama", "causal", 8, 4)
    compiled = torch.compile(inner)
    with unchanged(inner), pytest.raises(TypeError, match=r"got OptimizedModule; .* before torch.compile"):
        change(compiled)


@every_change
def test_with_adapters(change: Callable) -> None:
    model = get_peft_model(build("llama", "causal", 8, 4), LoraConfig(target_modules=["q_proj"]))
    with unchanged(model), pytest.raises(ValueError, match=r"PEFT adapters.*model.merge_and_unload\(\)"):
        change(model)
    inner = build("llama", "causal", 8, 4)
    inner.add_adapter(LoraConfig(target_modules=["v_proj"]))
    with unchanged(inner), pytest.raises(ValueError, match="PEFT adapters"):
        change(inner)


@every_change
def test_on_the_meta_device(change: Callable) -> None:
    with torch.device("meta"):
        model = build("llama", "causal", 8, 4)
    with unchanged(model), pytest.raises(ValueError, match=r"on the meta device.*load "):
        change(model)


class Linear4bit(nn.Linear):
    """As bitsandbytes' layers: a subclass whose weight is packed in another shape."""


@every_edit
@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_quantized(change: Callable, projection: str) -> None:
    model = build("llama", "causal", 8, 4)
    attention = model.model.layers[1].self_attn
    old = getattr(attention, projection)
    packed = Linear4bit(old.in_features, old.out_features)
    packed.weight = nn.Parameter(torch.zeros(old.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    setattr(attention, projection, packed)
    with unchanged(model), pytest.raises(ValueError, match=r"layer 1: the \w+ projection is a .*Linear4bit.*without q"):
        change(model)


@every_edit
def test_config_that_disagrees_with_the_weights(change: Callable) -> None:
    model = build("llama", "causal", 8, 4)
    model.config.num_key_value_heads = 8
    message = (
        r"layer 0: the config says 8 query and 8 key/value heads of size 8.* the weights have .*correct the config"
    )
    with unchanged(model), pytest.raises(ValueError, match=message):
        change(model)


@every_edit
def test_attributes_that_disagree_with_the_weights(change: Callable) -> None:
    model = build("llama", "causal", 8, 4)
    model.model.layers[1].self_attn.num_key_value_groups = 4
    with unchanged(model), pytest.raises(ValueError, match=r"layer 1: .*num_key_value_groups is 4 but .* say 2"):
        change(model)


@every_change
def test_cross_attention(change: Callable) -> None:
    model = build("bert", "causal", add_cross_attention=True)
    with unchanged(model), pytest.raises(ValueError, match=r"cross-attention .*load the model without it"):
        change(model)


@pytest.mark.parametrize("layers", [[], [0]], ids=["stock", "one layer swapped"])
@pytest.mark.parametrize("change", ["gqa", "mqa"])
def test_eager_bert_cannot_be_grouped(change: str, layers: list[int]) -> None:
    """Its eager attention does not group heads; with one key/value head it would even run."""
    model = build("bert")
    model.set_attn_implementation("eager")
    if layers:
        swap_attention(model, "mha", layers=layers)
    with unchanged(model), pytest.raises(ValueError, match=r"eager attention.*'bert'.*sdpa.*swap"):
        EDITS[change](model)


def test_a_grouped_bert_cannot_go_back_to_eager() -> None:
    model = build("bert")
    model.set_attn_implementation("eager")
    convert_to_gqa(swap_attention(model, "mha"), 2)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"eager attention.*'bert'.*set_attn_implementation\('sdpa'\)"),
    ):
        restore_attention(model)


def test_layers_beside_an_attention_without_tensor_masks() -> None:
    model = build("llama")
    model.set_attn_implementation("flex_attention")
    message = r"layers \[1\] would keep 'flex_attention'.*swap all layers, or load .*attn_implementation='sdpa'"
    with unchanged(model), pytest.raises(ValueError, match=message):
        swap_attention(model, "flash", layers=[0])


def test_entropy_of_tensors_that_do_not_fit() -> None:
    query, key = torch.ones(1, 6, 3, 4), torch.ones(1, 4, 5, 4)
    with pytest.raises(ValueError, match="6 query heads do not divide into 4"):
        attention_entropy(query, key)
    with pytest.raises(ValueError, match=r"shape \(1, 3\); it must be \(batch, key_length\) = \(1, 5\)"):
        attention_entropy(query, key[:, :3], attention_mask=torch.ones(1, 3))


def test_loading(tmp_path: Any) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_pretrained(tmp_path / "nowhere")
    model = build("bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither an auto class nor a model class"):
        load_pretrained(tmp_path, "AutoModel")
    with pytest.raises(ValueError, match="neither an auto class nor a model class"):
        load_pretrained(tmp_path, nn.Linear)
    config = copy.deepcopy(model.config)
    config.architectures = None
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"architectures=None\); give auto_class, for example"):
        load_pretrained(tmp_path)
