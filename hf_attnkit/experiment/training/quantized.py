"""Train adapters over a base model in 8 or 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

The base stays as it is, so what is saved are the adapters and the classification head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig, TrainingArguments
from transformers.utils import is_bitsandbytes_available

from hf_attnkit.experiment.sharding import is_asked_for
from hf_attnkit.experiment.training.lora import LoraArguments

# What Transformers calls classification heads, which train as a whole and so are not quantized.
_HEADS = ["classifier", "pre_classifier", "classification_head", "score"]


@dataclass
class QuantizationArguments:
    load_in_8bit: bool = field(default=False, metadata={"help": "Keep the base model in 8 bits; with --lora."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Keep the base model in 4 bits (NF4); with --lora."})

    @property
    def is_asked_for(self) -> bool:
        """Whether the base is quantized."""
        return self.load_in_8bit or self.load_in_4bit

    def check(self, lora: LoraArguments, training: TrainingArguments) -> None:
        """Refuse what cannot be done, before anything is loaded.

        Raises:
            ValueError: both flags, no adapters to train, or FSDP.
            ImportError: no bitsandbytes.
        """
        if not self.is_asked_for:
            return
        flag = "--load_in_8bit" if self.load_in_8bit else "--load_in_4bit"
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("--load_in_8bit and --load_in_4bit exclude each other; leave one out")
        if not lora.lora:
            raise ValueError(f"{flag}: quantized weights cannot be trained themselves; add --lora, or leave it out")
        if is_asked_for(training):
            raise ValueError(f"{flag}: the base model is kept whole by each process and not sharded; leave --fsdp out")
        if not is_bitsandbytes_available():
            raise ImportError(f"{flag} needs bitsandbytes, which is not installed: pip install 'hf_attnkit[quantized]'")

    def load_options(self) -> dict[str, Any]:
        """What `load_pretrained` gets; nothing without quantization."""
        if not self.is_asked_for:
            return {}
        # 4 bits: NF4 with constants quantized again, as published.
        config = BitsAndBytesConfig(
            load_in_8bit=self.load_in_8bit, load_in_4bit=self.load_in_4bit, llm_int8_skip_modules=_HEADS,
            bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        )  # fmt: skip
        return {"quantization_config": config}


def keep_trainable(model: nn.Module) -> None:
    """On a CPU, bitsandbytes lays 4-bit weights out for inference when they are first evaluated, as the entropies while
    training do; from then on they could not train. This keeps them as they are."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # a plain attribute, not a submodule
