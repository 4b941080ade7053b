"""The table of models in docs/attention.md: what `describe_attention` says of small ones, in words.

PYTHONPATH=tests python -m support.model_table        prints the table
"""

from __future__ import annotations

from support.every_type import small_model

from hf_attnkit.analysis.describe_attention import AttentionReport, describe_attention

CHANGES = ("swap", "score", "prune", "convert")
_TYPES = """
    bert roberta xlm-roberta electra distilbert albert modernbert mpnet deberta deberta-v2 vit clip siglip
    llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gpt_oss granite smollm3 stablelm phi phi3 cohere glm olmo olmo2
    deepseek_v3 mixtral qwen3_moe lfm2 granitemoehybrid gpt2 gpt_neox opt bloom falcon gptj
    t5 bart whisper llava
"""
TYPES = tuple(_TYPES.split())


def in_words(report: AttentionReport) -> tuple[str, ...]:
    """A cell for each of `CHANGES`: yes, alike, no, or some where attentions differ; scores say what is missing."""
    cells = []
    for name in CHANGES:
        words = {_word(getattr(row, name), name, row.alike) for row in report.rows}
        cells.append(words.pop() if len(words) == 1 else "some")
    return tuple(cells)


def _word(reason: str, name: str, alike: tuple[str, ...]) -> str:
    if not reason:
        return "alike" if name in alike else "yes"
    return "not entropy" if reason.startswith("not by entropy:") else "no"


def table() -> list[str]:
    """The rows, types that allow the same in one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for model_type in TYPES:
        rows.setdefault(in_words(describe_attention(small_model(model_type))), []).append(f"`{model_type}`")
    return [f"| {', '.join(types)} | {' | '.join(words)} |" for words, types in rows.items()]


if __name__ == "__main__":
    print("\n".join(table()))
