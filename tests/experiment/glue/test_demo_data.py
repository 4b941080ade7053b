"""The demo data: balanced, without a repeated sentence, and not solved by a bag of words."""

from __future__ import annotations

import re
from collections import Counter

import datasets
import pytest

from hf_attnkit.experiment.glue import data as glue_data
from hf_attnkit.experiment.glue import demo_data
from hf_attnkit.experiment.glue.data import load_glue
from hf_attnkit.experiment.glue.demo_data import make_demo_data, make_pairs
from hf_attnkit.experiment.glue.demo_lexicon import LEXICONS, _plural
from hf_attnkit.experiment.glue.tasks import TASKS

GLUE = [name for name in TASKS if name not in ("ax", "demo")]

PHENOMENA = list(demo_data._PHENOMENA)
# Closed classes, written out so that a content word cannot pass for a function word.
_CLOSED = (
    "the this these that those every each several many few both another one two three "
    "our my your their is are was were has have do does did will not in near behind beside "
    "i you he she we they myself yourself himself herself ourselves themselves"
)
FUNCTION_WORDS = set(_CLOSED.split())


def words(sentence: str) -> list[str]:
    return sentence.lower().removesuffix(".").split()


@pytest.fixture(scope="module")
def demo() -> datasets.DatasetDict:
    return make_demo_data()


def test_demo_sizes_balance_and_shares(demo):
    for split, per_phenomenon in (("train", 200), ("validation", 50)):
        counts = Counter(zip(demo[split]["phenomenon"], demo[split]["label"], strict=True))
        assert counts == {(name, label): per_phenomenon for name in PHENOMENA for label in (0, 1)}
        assert demo[split].column_names == ["sentence", "label", "phenomenon"]
    assert (demo["train"].num_rows, demo["validation"].num_rows, len(PHENOMENA)) == (2000, 500, 5)


def test_demo_says_that_it_is_not_glue(demo):
    for split in (*demo.values(), *load_glue("demo").values()):
        assert "NOT GLUE" in split.info.description
    assert "NOT GLUE" in make_demo_data.__doc__


# Seeds 6 and 12 would repeat sentences if repeats were not left out.
@pytest.mark.parametrize("seed", [0, 6, 12])
def test_no_sentence_occurs_twice(seed):
    pairs = [pair for split in LEXICONS for pair in make_pairs(split, seed)]
    sentences = [" ".join(words(s)) for p in pairs for s in (p.acceptable, p.unacceptable)]
    assert len(set(sentences)) == len(sentences) == 2500


def test_sentences_are_written_alike(demo):
    for split in demo.values():
        bad = [s for s in split["sentence"] if not re.fullmatch(r"[A-Z][a-z]*( [A-Za-z]+)+\.", s)]
        assert bad == []


def test_rows_are_the_pairs_shuffled(demo):
    for split in demo:
        pairs = make_pairs(split)
        rows = {(p.acceptable, 1, p.phenomenon) for p in pairs}
        rows |= {(p.unacceptable, 0, p.phenomenon) for p in pairs}
        columns = (demo[split][name] for name in ("sentence", "label", "phenomenon"))
        assert set(zip(*columns, strict=True)) == rows
        assert len(set(demo[split]["label"][:20])) == 2
        assert len(set(demo[split]["phenomenon"][:50])) == 5


@pytest.mark.parametrize("split", LEXICONS)
def test_pairs_differ_in_one_place(split):
    for pair in make_pairs(split):
        good, bad = words(pair.acceptable), words(pair.unacceptable)
        assert len(good) == len(bad), pair
        changed = [i for i, (a, b) in enumerate(zip(good, bad, strict=True)) if a != b]
        if pair.phenomenon == "word_order":
            assert sorted(good) == sorted(bad), pair
            assert 2 <= len(changed) <= 3, pair
            assert changed[-1] - changed[0] == len(changed) - 1, pair
        else:
            assert len(changed) == 1, pair


@pytest.mark.parametrize("split", LEXICONS)
def test_agreement_crosses_a_noun_of_the_other_number(split):
    nouns = f"{LEXICONS[split].people} {LEXICONS[split].things}".split()
    plurals = [_plural(noun) for noun in nouns]
    links = Counter()
    for pair in make_pairs(split):
        if pair.phenomenon == "subject_verb_agreement":
            sentence = words(pair.acceptable)
            found = [word in plurals for word in sentence if word in nouns or word in plurals]
            assert sorted(found) == [False, True], pair
            bad = words(pair.unacceptable)
            verb = next(i for i, word in enumerate(sentence) if word != bad[i])
            between = sentence[2:verb]
            links["relative" if "that" in between else "prepositional"] += 1
            # The verb is written in the singular exactly where the subject, the first noun, is.
            singular = sentence[verb] in ("is", "was", "has", "does") or sentence[verb][-1] == "s"
            assert singular != found[0], pair
    assert links["relative"] == pytest.approx(links["prepositional"], abs=4)


def test_train_and_validation_share_no_content_word(demo):
    used = {}
    for split in demo:
        used[split] = {word for s in demo[split]["sentence"] for word in words(s)} - FUNCTION_WORDS
    assert used["train"] & used["validation"] == set()
    forms = {split: LEXICONS[split].forms() for split in LEXICONS}
    assert forms["train"] & forms["validation"] == set()
    for split in demo:
        assert used[split] <= forms[split]
        assert forms[split] & FUNCTION_WORDS == set()
        assert len(used[split]) > 150


@pytest.mark.parametrize("split", LEXICONS)
@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_every_token_is_as_frequent_in_both_labels(split, phenomenon):
    pairs = [pair for pair in make_pairs(split) if pair.phenomenon == phenomenon]
    good = Counter(word for pair in pairs for word in words(pair.acceptable))
    bad = Counter(word for pair in pairs for word in words(pair.unacceptable))
    assert good == bad


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_bag_of_words_stays_near_chance(demo, lowercase):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    # The default pattern would skip "I".
    vectorizer = CountVectorizer(lowercase=lowercase, token_pattern=r"\w+")
    train = vectorizer.fit_transform(demo["train"]["sentence"])
    model = LogisticRegression(max_iter=1000).fit(train, demo["train"]["label"])
    validation = vectorizer.transform(demo["validation"]["sentence"])
    accuracy = model.score(validation, demo["validation"]["label"])
    assert 0.40 < accuracy < 0.60


def test_what_stands_beside_the_verb_does_not_tell_agreement(demo):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    # With the distractor right before the verb, "s is" alone reached 0.80 here.
    agreement = demo.filter(lambda row: row["phenomenon"] == "subject_verb_agreement")
    vectorizer = CountVectorizer(analyzer="char", ngram_range=(1, 5))
    train = vectorizer.fit_transform(agreement["train"]["sentence"])
    model = LogisticRegression(max_iter=1000).fit(train, agreement["train"]["label"])
    validation = vectorizer.transform(agreement["validation"]["sentence"])
    assert model.score(validation, agreement["validation"]["label"]) < 0.60


def test_the_seed_decides():
    assert make_pairs("train", 1) == make_pairs("train", 1) != make_pairs("train", 0)


def test_unknown_split():
    with pytest.raises(ValueError, match=r"'test'.*train, validation"):
        make_pairs("test")


def test_load_glue_uses_the_demo_grammar(monkeypatch):
    other = make_demo_data(seed=3)
    monkeypatch.setattr(glue_data, "make_demo_data", lambda: other)
    loaded = load_glue("demo")
    for split in other:
        assert list(loaded[split]["sentence"]) == list(other[split]["sentence"])
