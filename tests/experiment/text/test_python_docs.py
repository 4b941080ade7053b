"""Text that is always there: the standard library's language reference."""

from __future__ import annotations

from typing import Any

import pytest

from hf_attnkit.experiment.text.data import TextArguments, load_text


def test_the_language_reference_is_long_and_part_of_it_is_held_out() -> None:
    text = load_text(TextArguments(text="python_docs"))
    assert text.name == "python_docs" and text.split == "the last 5% of the documents"
    assert sum(map(len, text.train)) > 300_000 and len(text.validation) >= 1
    assert not set(text.train) & set(text.validation)
    assert "The standard type hierarchy" in "".join(text.train)


@pytest.mark.parametrize("other", [{"train_file": "a.txt"}, {"dataset_name": "a/b"}])
def test_one_text_only(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give --text python_docs, --train_file or a dataset"):
        TextArguments(text="python_docs", **other)
