"""An implementation that is not in the test matrix fails here."""

from support.matrix import COVERED

from hf_attnkit import available_attentions


def test_every_implementation_is_in_the_matrix() -> None:
    assert available_attentions() == COVERED
