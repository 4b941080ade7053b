"""Every type that Transformers maps, built small: discovery, a group of heads cut out of every attention, and each
public function tried and compared with something simpler (`support/serving.py`).

A new release of Transformers shows here at once what changed: a type that fails names what it does now. With
`-s`, `test_counts` prints how many types do what.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import transformers
from support.cutting import KINDS, outcome
from support.every_type import CLASSES, small_model
from support.every_type_expected import EXPECTED
from support.every_type_served import SERVED
from support.model_table import CHANGES, TYPES, in_words
from support.serving import CAPABILITIES, served

from hf_attnkit.analysis.describe_attention import describe_attention

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "attention.md").read_text().partition("## Families")[2]
TRANSFORMERS = "5.23"  # of which the counts are

KIND = {model_type: kind for kind, names in EXPECTED.items() for model_type in names.split()}
# Outcomes of types whose attention is not looked at any further.
UNSEEN = ("no inputs", "no attention", "not deterministic", "not built", "needs a package")
EVERYTHING = "swap window entropy contribution prune convert"
CAN = {model_type: can for can, names in SERVED.items() for model_type in names.split()}
# Their forward passes take ten seconds, of which attention is nothing.
SLOW = ("fastspeech2_conformer", "seamless_m4t_v2", "vits")


@pytest.mark.parametrize("model_type", sorted(CLASSES.keys() - set(SLOW)))
def test_type(model_type: str) -> None:
    expected = KIND.get(model_type, "exact")
    if expected == "needs a package":
        pytest.skip(expected)
    try:
        model = small_model(model_type)
    except ImportError as error:
        pytest.skip(f"needs a package: {error}")
    except Exception:
        assert expected == "not built"
        return
    kind, looked = outcome(model)
    assert kind == expected
    if expected not in UNSEEN:
        assert looked is not None
        assert served(model, looked) == CAN.get(model_type, EVERYTHING)


of_this_transformers = pytest.mark.skipif(
    not transformers.__version__.startswith(f"{TRANSFORMERS}."), reason=f"the tables are of Transformers {TRANSFORMERS}"
)


@of_this_transformers
def test_the_table_is_of_types_that_exist() -> None:
    named = Counter(name for names in EXPECTED.values() for name in names.split())
    assert set(named.values()) == {1}
    assert named.keys() <= CLASSES.keys()
    assert EXPECTED.keys() <= KINDS.keys() | {"partly", "not built", "needs a package"}
    assert CAN.keys() <= {each for each in CLASSES if KIND.get(each, "exact") not in UNSEEN}
    assert all(set(can.split()) <= CAPABILITIES.keys() for can in SERVED)


def counts() -> tuple[Counter[str], Counter[str]]:
    """How many types do what when heads are cut, and how many can do what, of those that are run here."""
    types = CLASSES.keys() - set(SLOW)
    kinds = Counter(KIND.get(each, "exact") for each in types)
    can = [CAN.get(each, EVERYTHING).split() for each in types if KIND.get(each, "exact") not in UNSEEN]
    return kinds, Counter(name for names in can for name in names)


@of_this_transformers
def test_counts() -> None:
    """README's sentences have these numbers."""
    count, can = counts()
    built = count.total() - count["not built"] - count["needs a package"]
    seen = built - count["no attention"] - count["no inputs"] - count["not deterministic"]
    print(f"{len(CLASSES)} types: " + ", ".join(f"{kind} {number}" for kind, number in count.most_common()))
    print(f"{seen} with attention that was seen: " + ", ".join(f"{name} {can[name]}" for name in CAPABILITIES))
    sentences = (
        f"Of the {len(CLASSES)} model types that Transformers {TRANSFORMERS} maps, {built} could be built small and "
        f"run; {count['no attention']} have no attention, {count['no inputs']} need inputs that `set_probe` takes. Of "
        f"the other {seen}, {can['swap']} can be swapped ({can['window']} for a window), {can['contribution']} scored "
        f"({can['entropy']} by entropy), {can['prune']} pruned ({can['alike']} more in all layers alike) and "
        f"{can['convert']} converted"
    )
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert sentences in readme, f"README is to say: {sentences}"


def documented(model_type: str) -> tuple[str, ...]:
    rows = re.findall(r"^\| (.*`.*) \| (.*) \| (.*) \| (.*) \| (.*) \|$", DOCS, re.MULTILINE)
    [mine] = [tuple(words) for names, *words in rows if f"`{model_type}`" in names.split(", ")]
    return mine


@pytest.mark.parametrize("model_type", TYPES)
def test_the_table_of_the_docs(model_type: str) -> None:
    """It has what is known of every type."""
    can = CAN.get(model_type, EVERYTHING).split()
    allowed = {
        "swap": {"yes", "some"} if "swap" in can else {"no", "some"},
        "score": {"yes", "some"} if "entropy" in can else {"not entropy"},
        "prune": {"yes", "some"} if "prune" in can else {"alike"} if "alike" in can else {"no"},
        "convert": {"yes", "alike"} if "convert" in can else {"no", "some"},
    }
    words = dict(zip(CHANGES, documented(model_type), strict=True))
    assert all(words[name] in allowed[name] for name in CHANGES), "PYTHONPATH=tests python -m support.model_table"
    kind = KIND.get(model_type, "exact")
    assert kind != "partly" or words["prune"] == "some"


@pytest.mark.parametrize("model_type", TYPES[::5])
def test_the_report_says_the_same(model_type: str) -> None:
    assert documented(model_type) == in_words(describe_attention(small_model(model_type)))
