"""Head statistics against their definitions on whole attention matrices, and heads that are planted."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from support.models import DECODERS, batch, build, reads_both_ways
from support.unchanged import unchanged
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_attnkit import head_statistics, prune_heads, swap_attention
from hf_attnkit.attention import dispatch as registry
from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.table import make_kind
from hf_attnkit.models.layers import attention_layers

RECIPE = Path(__file__).parents[2] / "recipes" / "head_statistics.py"
LENGTHS = (13, 7, 10)
SEPARATORS = list(range(40, 60))  # of 99 random ids, so that every sequence has some
NAMES = ("entropy", "confidence", "distance", "previous", "next", "first", "separator", "redundancy")


def tolerance(scale: float = 1.0) -> float:
    """Two runs of the model, one in float32: sums of at most 96 terms in each of two layers, scores up to about 20
    (see test_importance), times the largest value that is averaged."""
    return 4 * torch.finfo(torch.float32).eps * 96**0.5 * 20 * scale


def scale(name: str) -> float:
    return {"entropy": math.log(max(LENGTHS)), "distance": float(max(LENGTHS))}.get(name, 1.0)


def definition(p: Tensor, ids: Tensor) -> list[dict[str, list[Tensor]]]:
    """Per head, the values of one sequence's queries. `p` `(heads, n, n)`, float64, of tokens `ids` `(n,)`.

    A key is seen if some head attends to it at all: no float64 weight here underflows.
    """
    n = len(ids)
    found: list[dict[str, list[Tensor]]] = [{name: [] for name in NAMES} for _ in p]
    for head, matrix in enumerate(p):
        for i in range(n):
            seen = [j for j in range(n) if matrix[i, j] > 0]
            if len(seen) < 2:
                continue
            row = matrix[i]
            add = found[head]
            add["entropy"].append(-sum(row[j] * row[j].log() for j in seen))
            add["confidence"].append(row.max())
            add["distance"].append(sum(row[j] * abs(i - j) for j in seen))
            for name, j in (("previous", i - 1), ("next", i + 1), ("first", 0)):
                if j in seen:
                    add[name].append(row[j])
            marked = [j for j in seen if int(ids[j]) in SEPARATORS]
            if marked:
                add["separator"].append(sum(row[j] for j in marked))
            add["redundancy"].append(torch.minimum(p[:, i], row).sum(-1))  # with every head
    return found


def expected(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the matrices of a float64 run of each sequence by itself, `(layers, heads)` each."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    heads = attention_layers(model)[0].num_heads
    values: list[list[dict[str, list[Tensor]]]] = [
        [{name: [] for name in NAMES} for _ in range(heads)] for _ in attention_layers(model)
    ]
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][row][mask]
        with torch.no_grad():
            matrices = model(ids[None], output_attentions=True).attentions
        for layer, matrix in enumerate(matrices):
            # Some families' eager attention takes the softmax in float32: its rounding is normalised away.
            p = matrix[0].double()
            for head, own in enumerate(definition(p / p.sum(-1, keepdim=True), ids)):
                for name in NAMES:
                    values[layer][head][name] += own[name]
    result = {}
    for name in NAMES[:-1]:
        means = [[torch.stack(h[name]).mean() if h[name] else torch.tensor(math.nan) for h in row] for row in values]
        result[name] = torch.tensor([[float(mean) for mean in row] for row in means])
    overlap = torch.stack([torch.stack([torch.stack(h["redundancy"]).mean(0) for h in row]) for row in values])
    overlap.diagonal(dim1=1, dim2=2).fill_(-1)
    result["redundancy"], result["nearest_head"] = overlap.max(-1)
    return result


def close(actual: object, wanted: dict[str, Tensor]) -> None:
    for name in NAMES:
        found = getattr(actual, name).double()
        assert torch.equal(found.isnan(), wanted[name].isnan()), name
        error = (found - wanted[name]).abs().nan_to_num().max()
        assert error <= tolerance(scale(name)), (name, float(error))
    assert torch.equal(actual.nearest_head, wanted["nearest_head"])


@pytest.mark.parametrize("family", ["bert", *DECODERS, "grouped", "gpt2"])
def test_definition(family: str) -> None:
    """Right padding in encoders, left padding in decoders."""
    model = build("llama", "causal", 8, 2) if family == "grouped" else build(family)
    inputs = batch(model, LENGTHS)
    statistics = head_statistics(model, [inputs], separator_ids=SEPARATORS)
    assert statistics.entropy.shape == (2, 8) and statistics.entropy.dtype == torch.float32
    wanted = expected(model, inputs)
    assert wanted["next"].isnan().all() == (not reads_both_ways(model))
    for name in NAMES:  # heads differ, so that a mixed-up order shows
        if not wanted[name].isnan().all():
            assert wanted[name].max() - wanted[name].min() > 0.05, name
    close(statistics, wanted)


@pytest.mark.parametrize("other", ["eager", "mha", "flash", "one layer swapped"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_implementation_does_not_matter(family: str, other: str) -> None:
    model = build(family)
    inputs = batch(model, LENGTHS)
    expected = head_statistics(model, [inputs], separator_ids=SEPARATORS)
    if other == "eager":
        model.set_attn_implementation("eager")
    elif other == "one layer swapped":
        swap_attention(model, "flash", layers=[1])
    else:
        swap_attention(model, other)
    with unchanged(model):
        close(
            head_statistics(model, [inputs], separator_ids=SEPARATORS),
            {name: getattr(expected, name).double() for name in (*NAMES, "nearest_head")},
        )


@pytest.mark.parametrize("options", [("sliding_window", {"window": 3}),
                                     ("flash", {"window": 3}),
                                     ("sliding_window", {"window": 2, "num_sink_tokens": 2}),
                                     ("local_global", {"window": 2, "num_global_tokens": 1}),
                                     ("local_global", {"window": 2, "num_random_blocks": 1, "block_size": 2})],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_window_is_seen(family: str, options: tuple[str, dict[str, int]]) -> None:
    """The weights that the layer's own output is made of: with the key's index as value, it puts out that mean."""
    model = swap_attention(build(family), options[0], **options[1])
    inputs = batch(model, (13,))
    calls = {}

    def note(module: object, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> None:
        calls[id(module)] = (query, key, mask, scaling)

    with registry.observe(note):
        model(**inputs, **({} if family == "bert" else {"use_cache": False}))
    for layer in attention_layers(model):
        query, key, mask, scaling = calls[id(layer.module)]
        plain = Mask.aligned(13, 13, is_causal=not reads_both_ways(model))
        eye = torch.eye(13).expand(1, key.shape[1], -1, -1)
        p = make_kind(*options).attention(query, key, eye, plain, scaling=scaling)[0]
        assert (p > 0).float().mean() < (0.95 if reads_both_ways(model) else 0.5)
        assert ((p > 0) == mask.visible()).all()


def test_mistral_window() -> None:
    """A window of 2 shows the own and the previous token: nothing is further away than one token."""
    statistics = head_statistics(build("mistral", sliding_window=2), [batch(build("mistral"), LENGTHS)])
    assert statistics.distance.max() <= 1 and statistics.entropy.max() <= math.log(2) + tolerance()
    # What is not on the token itself is one away: the previous one.
    assert (statistics.distance - statistics.previous).abs().max() <= tolerance()


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart", "vit"])
def test_padding_and_blocks_do_not_count(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One padded batch, and one sequence at a time in blocks of few queries; decoders and cross-attention too."""
    model = build(family)
    inputs = batch(model, LENGTHS)
    together = head_statistics(model, [inputs])
    monkeypatch.setattr(sys.modules["hf_attnkit.analysis.head_statistics"], "BLOCK_NUMBERS", 250)
    alone = [{name: tensor[row : row + 1] for name, tensor in inputs.items()} for row in range(len(LENGTHS))]
    if family in ("bert", "llama"):
        cut = [mask.bool() for mask in inputs["attention_mask"]]
        alone = [{"input_ids": inputs["input_ids"][row][mask][None]} for row, mask in enumerate(cut)]
    apart = head_statistics(model, alone)
    for name in NAMES:
        one, other = getattr(together, name), getattr(apart, name)
        assert torch.equal(one.isnan(), other.isnan())
        assert (one - other).abs().nan_to_num().max() <= tolerance(scale(name)), name
    if family in ("t5", "bart"):
        cross = [layer.index for layer in attention_layers(model) if layer.is_cross]
        assert together.distance[cross].isnan().all() and together.first[cross][:, :4].isfinite().all()


def planted(offset: int) -> PreTrainedModel:
    """A BERT whose head 1 of layer 0 looks `offset` tokens on, by construction, and whose head 2 looks nowhere:
    positions are one-hot in the embedding, queries and keys of head 1 read them, and the query shifts them."""
    model = build("bert", heads=4)
    size, number = model.config.hidden_size, 16
    attention = model.encoder.layer[0].attention.self
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[:, :number] = 0
        model.embeddings.token_type_embeddings.weight.zero_()
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.position_embeddings.weight[:number, :number] = 1000 * torch.eye(number)
        model.embeddings.LayerNorm.weight.fill_(1)
        model.embeddings.LayerNorm.bias.zero_()
        for linear in (attention.query, attention.key):
            linear.weight[16:48] = 0
            linear.bias[16:48] = 0
        attention.key.weight[16:32, :number] = torch.eye(number)
        attention.query.weight[16:32, :number] = 20 * torch.eye(number).roll(offset, 0)
    assert size == 64 and attention.attention_head_size == number
    return model


@pytest.mark.parametrize(("offset", "name"), [(-1, "previous"), (1, "next")])
def test_planted_heads(offset: int, name: str) -> None:
    """A positional head has all its attention on its token; a head of equal scores has 1 / n on each of n."""
    model, length = planted(offset), 9
    statistics = head_statistics(model, [batch(model, (length,))])
    # The own position stands out of the normalised embedding by about sqrt(64), so scores by 20 * 64 / 4 at least.
    assert getattr(statistics, name)[0, 1] >= 1 - 1e-6
    others = torch.cat([getattr(statistics, name)[0, :1], getattr(statistics, name)[0, 2:]])
    assert others.max() < 0.5
    mean_distance = sum(abs(i - j) for i in range(length) for j in range(length)) / length**2
    uniform = dict.fromkeys(("confidence", "previous", "next", "first"), 1 / length)
    uniform |= {"entropy": math.log(length), "distance": mean_distance}
    for statistic, value in uniform.items():
        assert abs(float(getattr(statistics, statistic)[0, 2]) - value) <= tolerance(scale(statistic)), statistic


def test_a_copied_head_is_redundant() -> None:
    model = build("bert")
    attention = model.encoder.layer[0].attention.self
    with torch.no_grad():
        for linear in (attention.query, attention.key):
            linear.weight[40:48] = linear.weight[8:16]
            linear.bias[40:48] = linear.bias[8:16]
    statistics = head_statistics(model, [batch(model, LENGTHS)])
    assert statistics.nearest_head[0, 1] == 5 and statistics.nearest_head[0, 5] == 1
    assert (1 - statistics.redundancy[0, [1, 5]]).abs().max() <= tolerance()
    assert statistics.redundancy[0, [0, 2, 3, 4, 6, 7]].max() < 0.95


def test_layers_with_different_heads_and_export() -> None:
    model = prune_heads(build("bert"), {0: list(range(7)), 1: [6, 7]})
    statistics = head_statistics(model, [batch(model, LENGTHS)])
    assert statistics.entropy.shape == (2, 6) and statistics.entropy[0, 1:].isnan().all()
    assert statistics.redundancy[0].isnan().all() and (statistics.nearest_head[0] == -1).all()
    assert statistics.separator.isnan().all()  # the config names no separator
    rows = json.loads(json.dumps(statistics.rows()))
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), *((1, head) for head in range(6))]
    assert rows[0]["redundancy"] is rows[0]["nearest_head"] is rows[0]["separator"] is None
    assert rows[3]["entropy"] == float(statistics.entropy[1, 2])
    lines = str(statistics).splitlines()
    assert len(lines) == 8 and len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["layer", "head", *NAMES, "nearest_head"] and lines[1].split()[-3:] == ["-", "-", "-"]


def test_separators_of_the_config() -> None:
    model = build("bert")
    inputs = batch(model, LENGTHS)
    expected = head_statistics(model, [inputs], separator_ids=SEPARATORS).separator
    for field in ("eos_token_id", "sep_token_id"):
        model.config.eos_token_id = None
        setattr(model.config, field, SEPARATORS)
        assert torch.equal(head_statistics(model, [inputs]).separator, expected)


def test_linear_layers_are_left_out() -> None:
    with pytest.warns(UserWarning, match="linear attention"):
        model = swap_attention(build("bert"), {1: "linear"})
    statistics = head_statistics(model, [batch(model, LENGTHS)])
    assert statistics.entropy[0].isfinite().all() and statistics.entropy[1].isnan().all()
    with pytest.warns(UserWarning, match="linear attention"):
        swap_attention(model, "linear")
    with pytest.raises(ValueError, match="every layer of BertModel runs linear attention"):
        head_statistics(model, [batch(model, LENGTHS)])


def test_bad_input() -> None:
    model = build("bert")
    inputs = batch(model, LENGTHS)
    with unchanged(model):
        with pytest.raises(ValueError, match="separator_ids='a' must be an integer: a token id"):
            head_statistics(model, [inputs], separator_ids=["a"])
        with pytest.raises(ValueError, match="batches is empty"):
            head_statistics(model, [])
        with pytest.raises(ValueError, match="a batch must be a mapping"):
            head_statistics(model, [[1]])
        with pytest.raises(ValueError, match=r"layer 0 .*: no query of the batches sees two keys"):
            head_statistics(model, [{"input_ids": torch.tensor([[5]])}])
        with pytest.raises(ValueError, match=r"separator_ids=7 need batches with input_ids; got \['inputs_embeds'\]"):
            head_statistics(model, [{"inputs_embeds": torch.zeros(1, 3, 64)}], separator_ids=7)
        with pytest.raises(ValueError, match=r"layer 0 .*: attention scores contain NaN"):
            head_statistics(model, [{"inputs_embeds": torch.full((1, 3, 64), math.nan)}])
    with pytest.raises(TypeError, match=r"expected a transformers\.PreTrainedModel"):
        head_statistics(torch.nn.Linear(2, 2), [inputs])


def test_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, JSON and picture of a model on disk; a message and no file for a text file without text."""
    spec = importlib.util.spec_from_file_location("head_statistics_recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]")
    model = build("bert", "sequence")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("a b c\n\nb a\nc c c c a\n")
    (tmp_path / "empty.txt").write_text("\n")
    command = [
        "head_statistics.py",
        str(tmp_path / "model"),
        "--output_dir",
        str(tmp_path / "out"),
        "--batch_size",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--text_file", str(tmp_path / "empty.txt")])
    with pytest.raises(SystemExit) as stopped:
        recipe.main()
    assert stopped.value.code == 1 and "holds no text" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", [*command, "--text_file", str(tmp_path / "texts.txt")])
    recipe.main()
    texts = ["a b c", "b a", "c c c c a"]
    inputs = [dict(tokenizer([text], return_tensors="pt")) for text in texts]
    expected = head_statistics(model, inputs, separator_ids=3).rows()
    rows = json.loads((tmp_path / "out" / "head_statistics.json").read_text())
    assert len(rows) == 16 and len(capsys.readouterr().out.splitlines()) == 17
    for row, wanted in zip(rows, expected, strict=True):
        for name in NAMES:
            assert abs(row[name] - wanted[name]) <= tolerance(scale(name))
    assert (tmp_path / "out" / "head_statistics.png").read_bytes().startswith(b"\x89PNG")
