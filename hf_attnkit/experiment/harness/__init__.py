"""lm-evaluation-harness on every folder that `load_pretrained` reads: heads per layer and swapped kinds included.

    hf-attnkit lm_eval --model hf_attnkit --model_args pretrained=outputs/smaller --tasks demo_pairs

The rest of the command line is `lm_eval`'s own. The harness (0.4.13) finds no models of other packages by itself, so
the command registers this one first; in Python, importing `hf_attnkit.experiment.harness.model` does.
"""
