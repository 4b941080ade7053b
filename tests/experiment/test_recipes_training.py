"""Training a converted model as TrainingArguments has it; padding of decoders; adapters over a quantized base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finetune_glue
import pytest
import torch
from support.recipe_runs import flags, run
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from transformers.utils import is_bitsandbytes_available

import hf_attnkit
from hf_attnkit.experiment.arguments import parse_arguments
from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun, prepare_padding
from hf_attnkit.experiment.training import quantized
from hf_attnkit.experiment.training.lora import LoraArguments
from hf_attnkit.experiment.training.quantized import QuantizationArguments
from hf_attnkit.models.layers import attention_layers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
DECODERS = {
    "llama": (LlamaConfig, LlamaForSequenceClassification),
    "mistral": (MistralConfig, MistralForSequenceClassification),
}
SGD = ("--optim", "sgd", "--learning_rate", "0.1", "--max_grad_norm", "0")


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(tokenizer: PreTrainedTokenizerFast, tmp_path_factory) -> Path:
    """A BERT of two key/value heads, without dropout."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES)
    model = hf_attnkit.convert_to_gqa(BertForSequenceClassification(config), 2, method="mean")
    return save(model, tokenizer, tmp_path_factory.mktemp("converted") / "model")


# As TrainingArguments has it.


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = hf_attnkit.load_pretrained(folder)
    assert {layer.num_key_value_heads for layer in attention_layers(model)} == {2}
    return model.state_dict()


@pytest.fixture(scope="module")
def plainly(converted: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("plainly") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(finetune_glue, monkeypatch, flags(converted, output, *SGD))
    return output


# A gradient is a mean of 16 of about 1; 4 steps of 0.1 add up to 4 * 0.1 * 16 roundings of 2^-24, and what the layers
# make of them, 10 times as much at most. In 16 bits (2^-8) the same of one rounding.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        (("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"), 4 * 0.1 * 16 * 2**-24 * 10),
        (("--gradient_checkpointing",), 0.0),
        (("--bf16",), 4 * 0.1 * 2**-8 * 10),
        (("--torch_compile", "--torch_compile_backend", "aot_eager"), 4 * 0.1 * 16 * 2**-24 * 10),
    ],
    ids=["accumulation", "checkpointing", "bf16", "compiled"],
)
def test_a_converted_model_trains_to_the_same(more, tolerance, converted, plainly, tmp_path, monkeypatch) -> None:
    results = run(finetune_glue, monkeypatch, flags(converted, tmp_path, *SGD, *more))
    found, expected, start = weights(tmp_path), weights(plainly), weights(converted)
    torch.testing.assert_close(found, expected, rtol=1e-5 if tolerance else 0.0, atol=tolerance)
    assert (expected["classifier.weight"] - start["classifier.weight"]).abs().max() > 1e-2
    assert results["stages"][0]["num_key_value_heads"] == [2, 2]
    if "--bf16" in more:
        assert not torch.equal(found["classifier.weight"], expected["classifier.weight"])


def test_finetuning_adapters_leaves_a_plain_model(converted, tmp_path, monkeypatch) -> None:
    more = ("--lora", "--lora_r", "4", "--learning_rate", "1e-2")
    results = run(finetune_glue, monkeypatch, flags(converted, tmp_path, *more))
    found, start = weights(tmp_path), weights(converted)
    changed = {name for name in start if not torch.equal(found[name], start[name])}
    assert changed and all(".attention." in name or name.startswith("classifier.") for name in changed)
    assert not [name for name in changed if name.endswith("LayerNorm.weight")]
    # A and B of rank 4 for q, o (32 x 32) and k, v (16 x 32), two layers; the head of two classes.
    assert results["stages"][0]["trained_parameters"] == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16)) + 2 * 32 + 2
    assert results["lora_r"] == 4 and not list(tmp_path.glob("adapter*"))


# Decoders.


def decoder(kind: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    config, model = DECODERS[kind]
    torch.manual_seed(0)
    return model(config(vocab_size=len(tokenizer), num_key_value_heads=4, **SIZES, **options))


def without_padding(tokenizer: PreTrainedTokenizerFast, ends_in_eos: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with an end of text and no padding token; texts end in it or not."""
    inner = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if not ends_in_eos:
        inner.post_processor = None
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="[SEP]")


TOKENIZERS = {
    "as it is": lambda given: given,
    "eos pads": lambda given: without_padding(given, ends_in_eos=False),
    "unk pads": lambda given: without_padding(given, ends_in_eos=True),
}


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("pad_token_id", [None, 7, -1], ids=["none", "a word's", "none there is"])
def test_decoders_are_asked_at_their_last_real_token(
    kind, name, pad_token_id, tokenizer, tmp_path, monkeypatch
) -> None:  # fmt: skip
    """Batches of several lengths give what each text gives alone, whatever the config says of padding."""
    used = TOKENIZERS[name](tokenizer)
    model = decoder(kind, tokenizer)
    model.config.pad_token_id = pad_token_id
    used.padding_side = "left"
    folder = save(model, used, tmp_path / "model")
    argv = flags(folder, tmp_path / "out", "--do_eval", "--per_device_eval_batch_size", "5")
    arguments, training = parse_arguments(GlueArguments, argv=argv)
    glue = GlueRun(arguments, training)
    found = glue.trainer().predict(glue.eval_data).predictions
    lengths = [len(ids) for ids in glue.eval_data["input_ids"]]
    assert len(set(lengths[:5])) > 1
    classifier = decoder(kind, tokenizer)
    for ids, logits in zip(glue.eval_data["input_ids"], found, strict=True):
        hidden = classifier.model(torch.tensor([ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(torch.tensor(logits), classifier.score(hidden).detach(), rtol=1e-4, atol=1e-4)
    assert glue.tokenizer.pad_token_id == glue.model.config.pad_token_id is not None


def test_padding_is_no_token_that_texts_end_in(tokenizer) -> None:
    """Told to pad with the end of text, a decoder would be asked one token before it."""
    used = without_padding(tokenizer, ends_in_eos=True)
    used.pad_token = used.eos_token
    prepare_padding(used)
    assert used.pad_token == used.unk_token != used.eos_token
    endless = without_padding(tokenizer, ends_in_eos=False)
    endless.eos_token = None
    prepare_padding(endless)
    assert endless.pad_token == endless.unk_token


def test_a_tokenizer_that_cannot_pad_is_refused(tokenizer) -> None:
    used = without_padding(tokenizer, ends_in_eos=True)
    used.unk_token = None
    with pytest.raises(ValueError, match=r"no padding token.*give it one"):
        prepare_padding(used)


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tokenizer, tmp_path, monkeypatch) -> None:
    config = LlamaConfig(vocab_size=len(tokenizer) - 1, **SIZES)
    folder = save(LlamaForSequenceClassification(config), tokenizer, tmp_path / "model")
    tokens = len(tokenizer)
    with pytest.raises(ValueError, match=rf"has {tokens} tokens and the model {tokens - 1} embeddings"):
        run(finetune_glue, monkeypatch, flags(folder, tmp_path / "out"))


# Quantized bases.


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (("--load_in_8bit",), ValueError, r"--load_in_8bit.*add --lora"),
        (("--load_in_4bit",), ValueError, r"--load_in_4bit.*add --lora"),
        (("--lora", "--load_in_4bit", "--load_in_8bit"), ValueError, "exclude each other"),
        (("--lora", "--load_in_4bit"), ImportError, r"--load_in_4bit needs bitsandbytes"),
        (("--lora", "--load_in_8bit", "--do_eval"), ValueError, "--lora has no effect without training"),
    ],
)
def test_quantization_that_cannot_be_is_refused_before_loading(more, kind, message, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quantized, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(kind, match=message):
        run(finetune_glue, monkeypatch, flags(tmp_path / "no model", tmp_path / "out", *more))


def test_quantized_and_sharded_exclude_each_other(tmp_path) -> None:
    training = TrainingArguments(str(tmp_path), use_cpu=True)
    training.fsdp = True
    with pytest.raises(ValueError, match="leave --fsdp out"):
        QuantizationArguments(load_in_8bit=True).check(LoraArguments(lora=True), training)


def test_what_is_asked_for_is_what_is_loaded() -> None:
    assert QuantizationArguments().load_options() == {}
    for flag in ("load_in_8bit", "load_in_4bit"):
        config = QuantizationArguments(**{flag: True}).load_options()["quantization_config"]
        assert getattr(config, flag) and {"score", "classifier"} <= set(config.llm_int8_skip_modules)


def test_adapters_beside_a_kept_base_are_what_is_saved(converted, tokenizer, tmp_path, monkeypatch) -> None:
    """All of it but the quantization itself, which bitsandbytes does: the base stays plain here."""
    monkeypatch.setattr(quantized, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(QuantizationArguments, "load_options", lambda self: {})
    more = ("--lora", "--lora_r", "4", "--learning_rate", "1e-2", "--load_in_8bit")
    results = run(finetune_glue, monkeypatch, flags(converted, tmp_path, *more))
    assert results["load_in_8bit"] and not list(tmp_path.glob("model*"))
    base = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(converted)
    from peft import PeftModel

    model = PeftModel.from_pretrained(hf_attnkit.load_pretrained(base), tmp_path).eval()
    arguments, training = parse_arguments(GlueArguments, argv=flags(converted, tmp_path / "again", "--do_eval"))
    glue = GlueRun(arguments, training)
    glue.model = model
    glue.evaluate("baseline")
    assert glue.stages[0]["metrics"] == results["stages"][0]["metrics"]


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="pip install 'hf_attnkit[quantized]'")
@pytest.mark.parametrize("flag", ["--load_in_8bit", "--load_in_4bit"])
def test_adapters_train_over_a_quantized_base(flag, converted, tmp_path, monkeypatch) -> None:
    """Evaluated while training, too; a 4-bit weight counts as the numbers it holds."""
    evaluated = ("--entropy_every_n_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2")
    more = ("--lora", "--lora_r", "4", "--learning_rate", "1e-2", flag, *evaluated)
    results = run(finetune_glue, monkeypatch, flags(converted, tmp_path, *more))
    assert results[flag.removeprefix("--")] and (tmp_path / "adapter_model.safetensors").exists()
    plain = hf_attnkit.load_pretrained(converted).num_parameters()
    assert plain < results["stages"][0]["parameters"] < 1.5 * plain  # with the adapters and the original head
    history = json.loads((tmp_path / "trainer_state_1.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) > 1 and losses[0] != losses[-1]
