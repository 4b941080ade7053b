"""An implementation that is not in the test matrix fails here."""

from matrix import MATRIX

from hf_attnkit import available_attentions


def test_every_implementation_is_in_the_matrix() -> None:
    assert available_attentions() == list(MATRIX)
