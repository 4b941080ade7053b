"""Memory and time of an attention view: collecting a page's numbers against a model's plain forward pass.

    python recipes/benchmarks/view.py --length 4096

prints the ratio of peak memory, the seconds of each side and the size of the page. The model is a random Llama without
a head over the vocabulary, which would cost both sides the same.
"""

from __future__ import annotations

import argparse
import json

import torch
from transformers import LlamaConfig, LlamaModel

from hf_attnkit import attention_view
from hf_attnkit.experiment.benchmarking.measure import peak_bytes, quartiles, time_alternately


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="Tokens.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=None, help="Key/value heads; default: as many as heads.")
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="Timed rounds.")
    options = parser.parse_args()

    torch.manual_seed(0)
    width = options.heads * options.head_dim
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, num_key_value_heads=options.kv_heads or options.heads,
        max_position_embeddings=options.length, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaModel(config).eval()
    batch = {"input_ids": torch.randint(512, (1, options.length))}

    @torch.no_grad()
    def plain() -> object:
        return model(**batch)

    def viewed() -> object:
        return attention_view(model, batch)

    page = attention_view(model, batch).html  # and what is found of a model once
    calls, device = {"forward": plain, "view": viewed}, torch.device("cpu")
    memory = {label: peak_bytes(call, device) for label, call in calls.items()}
    times = time_alternately(calls, options.repeats, device)
    print(
        json.dumps(
            vars(options)
            | {
                "memory_ratio": round(memory["view"] / memory["forward"], 3),
                "peak_mib": {label: round(size / 2**20, 1) for label, size in memory.items()},
                "seconds": {label: round(quartiles(found)[1], 3) for label, found in times.items()},
                "page_mib": round(len(page) / 2**20, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
