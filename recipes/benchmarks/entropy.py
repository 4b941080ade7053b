"""Cost of entropy scores: a model's scoring pass against its plain forward pass, timed alternately in one process.

    python recipes/benchmarks/entropy.py --length 4096
    python recipes/benchmarks/entropy.py --length 32768 --layers 1 --heads 32 --kv_heads 8 --repeats 0

prints the ratio of times (median, and the quartiles of the rounds' ratios) and of peak memory. The model is a random
Llama without a head over the vocabulary, which would cost both sides the same. Without repeats only the scoring pass
runs, once: its peak memory next to the bytes of one layer's attention matrices.
"""

from __future__ import annotations

import argparse
import json

import torch
from transformers import LlamaConfig, LlamaModel

import hf_attnkit
from hf_attnkit.experiment.benchmarking.measure import peak_bytes, quartiles, time_alternately


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="Tokens.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=None, help="Key/value heads; default: as many as heads.")
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--padding", type=int, default=0, help="Tokens of padding on the left.")
    parser.add_argument("--repeats", type=int, default=5, help="Counted rounds; 0: peak memory of one scoring pass.")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    width = options.heads * options.head_dim
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, num_key_value_heads=options.kv_heads or options.heads,
        max_position_embeddings=options.length, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    device = torch.device(options.device)
    model = LlamaModel(config).to(device).eval()
    mask = torch.ones(1, options.length, dtype=torch.long)
    mask[:, : options.padding] = 0
    batch = {"input_ids": torch.randint(512, (1, options.length)), "attention_mask": mask}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}

    @torch.no_grad()
    def plain() -> object:
        return model(**batch)

    def scored() -> object:
        return hf_attnkit.head_importance(model, [batch], method="entropy")

    if not options.repeats:
        matrices = 4 * options.heads * options.length**2
        print(
            json.dumps(vars(options) | {"peak_mib": peak_bytes(scored, device) >> 20, "matrices_mib": matrices >> 20})
        )
        return
    calls = {"forward": plain, "entropy": scored}
    memory = {label: peak_bytes(call, device) for label, call in calls.items()}
    times = time_alternately(calls, options.repeats, device)
    ratios = [entropy / forward for entropy, forward in zip(times["entropy"], times["forward"], strict=True)]
    low, _, high = quartiles(ratios)
    medians = {label: quartiles(found)[1] for label, found in times.items()}
    print(
        json.dumps(
            vars(options)
            | {
                "time_ratio": round(medians["entropy"] / medians["forward"], 3),
                "time_ratio_quartiles": [round(low, 3), round(high, 3)],
                "memory_ratio": round(memory["entropy"] / memory["forward"], 3),
                "seconds": {label: round(seconds, 3) for label, seconds in medians.items()},
                "peak_mib": {label: round(size / 2**20, 1) for label, size in memory.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
