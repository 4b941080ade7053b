"""Convert a checkpoint to grouped-query attention shard by shard, without loading the model.

    python recipes/convert_checkpoint.py IN OUT --num_key_value_heads 8 --method pca --statistics statistics.safetensors

IN is a folder of safetensors, one file or shards; OUT gets the same files, converted. Peak memory stays below
the largest tensor and 1 GiB, whatever the model's size. If it is interrupted, the same command completes it.
`recipes/collect_statistics.py` makes the statistics file, which only `pca` uses and can do without.
"""

from __future__ import annotations

import argparse

from hf_attnkit.conversion import METHODS, convert_checkpoint


def main() -> None:
    # "random" could not be completed after an interruption.
    methods = [name for name in METHODS if name != "random"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="folder of the checkpoint")
    parser.add_argument("target", metavar="OUT", help="folder for the converted checkpoint")
    parser.add_argument("--num_key_value_heads", type=int, required=True, help="key/value heads per layer")
    parser.add_argument(
        "--method", choices=methods, help="how heads are merged (default: pca with statistics, else mean)"
    )
    parser.add_argument("--key_method", choices=methods, help="another method for the keys")
    parser.add_argument("--statistics", metavar="FILE", help="second moments for pca")
    arguments = parser.parse_args()
    try:
        print(convert_checkpoint(**vars(arguments)))
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
