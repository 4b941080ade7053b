"""Every type that Transformers maps, built small: discovery, and a group of heads cut out of every attention.

A new release of Transformers shows here at once what changed: a type that fails names what it does now. With
`-s`, `test_counts` prints how many types do what.
"""

from __future__ import annotations

from collections import Counter

import pytest
from support.cutting import KINDS, outcome
from support.every_type import CLASSES, small_model
from support.every_type_expected import EXPECTED

KIND = {model_type: kind for kind, names in EXPECTED.items() for model_type in names.split()}
# Their forward passes take ten seconds, of which attention is nothing.
SLOW = ("fastspeech2_conformer", "vits")


def now(model_type: str) -> str:
    try:
        model = small_model(model_type)
    except ImportError as error:
        pytest.skip(f"needs a package: {error}")
    except Exception:
        return "not built"
    return outcome(model)


@pytest.mark.parametrize("model_type", sorted(CLASSES.keys() - set(SLOW)))
def test_type(model_type: str) -> None:
    expected = KIND.get(model_type, "exact")
    if expected == "needs a package":
        pytest.skip(expected)
    assert now(model_type) == expected


def test_the_table_is_of_types_that_exist() -> None:
    named = Counter(name for names in EXPECTED.values() for name in names.split())
    assert set(named.values()) == {1}
    assert named.keys() <= CLASSES.keys()
    assert EXPECTED.keys() <= KINDS.keys() | {"partly", "not built", "needs a package"}


def test_counts() -> None:
    count = Counter(KIND.get(model_type, "exact") for model_type in CLASSES.keys() - set(SLOW))
    print(f"{len(CLASSES)} types: " + ", ".join(f"{kind} {number}" for kind, number in count.most_common()))
    assert count["exact"] >= 300
