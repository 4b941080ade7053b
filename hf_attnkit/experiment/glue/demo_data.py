"""Acceptability minimal pairs from a small grammar of this project: demo data, NOT GLUE.

They replace CoLA where neither data nor network is at hand. The form is BLiMP's (Warstadt et
al. 2020): two sentences that differ in one place, one acceptable and one not. Grammar and
vocabulary are this project's own.

No bag of words tells the labels apart: pairs come as twins whose change runs in opposite
directions ("the nurse that the pilots blamed is/*are tired" and "the nurses that the pilot blamed
are/*is tired"), so every token is exactly as frequent in acceptable as in unacceptable sentences.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import datasets

from hf_attnkit.experiment.glue.demo_lexicon import LEXICONS, Lexicon, _past, _plural, _third_person

DESCRIPTION = (
    "Demo data of hf_attnkit, made by hf_attnkit/experiment/glue/demo_data.py: grammatical-acceptability minimal "
    "pairs from a small grammar. This is NOT GLUE and not CoLA; scores on it compare with neither."
)


# 2,000 and 500 sentences: five phenomena, two sentences a pair.
_PAIRS_PER_PHENOMENON = {"train": 200, "validation": 50}


@dataclass(frozen=True)
class Pair:
    """One minimal pair: two sentences of equally many words, and the phenomenon they differ in."""

    phenomenon: str
    acceptable: str
    unacceptable: str


# "the" more often, as in English.
_DETERMINERS = ("the", "the", "the", "our", "my", "your", "their")


_PREPOSITIONS = ("near", "behind", "beside")


_NUMBER_DETERMINERS = (
    ("this", "these"),
    ("that", "those"),
    ("every", "several"),
    ("each", "many"),
    ("one", "two"),
    ("another", "three"),
    ("every", "few"),
    ("each", "both"),
)


_REFLEXIVES = {
    "I": "myself",
    "you": "yourself",
    "he": "himself",
    "she": "herself",
    "we": "ourselves",
    "they": "themselves",
}


def make_demo_data(seed: int = 0) -> datasets.DatasetDict:
    """Make the demo data: minimal pairs by this project's own grammar, NOT GLUE.

    Args:
        seed: The same seed gives the same sentences in the same order, in every process.

    Returns:
        `train` (2,000 rows) and `validation` (500 rows), which share no content word. Columns:
        `sentence` (str), `label` (1 acceptable, 0 not; half each) and `phenomenon` (str, one of
        five, a fifth each). No sentence occurs twice. Rows are shuffled, so that the two sentences
        of a pair are not next to each other; `make_pairs` gives them as pairs.
    """
    # Copies, since a format can be set on a dataset.
    return datasets.DatasetDict({split: copy.copy(made) for split, made in _made(seed).items()})


@functools.cache
def _made(seed: int) -> dict[str, datasets.Dataset]:
    """Made once for all runs of a process."""
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["unacceptable", "acceptable"]),
            "phenomenon": datasets.Value("string"),
        }
    )
    splits = {}
    for split in LEXICONS:
        rows = []
        for pair in make_pairs(split, seed):
            rows.append({"sentence": pair.acceptable, "label": 1, "phenomenon": pair.phenomenon})
            rows.append({"sentence": pair.unacceptable, "label": 0, "phenomenon": pair.phenomenon})
        random.Random(f"{split} order {seed}").shuffle(rows)
        info = datasets.DatasetInfo(description=DESCRIPTION, features=features)
        splits[split] = datasets.Dataset.from_list(rows, info=info, split=split)
    return splits


def make_pairs(split: str, seed: int = 0) -> list[Pair]:
    """The pairs of one split, phenomenon by phenomenon, twins side by side.

    Args:
        split: `"train"` (1,000 pairs) or `"validation"` (250 pairs).
        seed: See `make_demo_data`.

    Raises:
        ValueError: Another split.
    """
    if split not in LEXICONS:
        raise ValueError(f"Unknown split {split!r}: use one of {', '.join(LEXICONS)}.")
    # A text seed is hashed by random itself, without PYTHONHASHSEED.
    draw = _Draw(LEXICONS[split], random.Random(f"{split} {seed}"))
    pairs: list[Pair] = []
    seen: set[str] = set()
    for phenomenon, make in _PHENOMENA.items():
        end = len(pairs) + _PAIRS_PER_PHENOMENON[split]
        turn = 0
        while len(pairs) < end:
            twins = [(_finish(good), _finish(bad)) for good, bad in make(draw, turn)]
            sentences = {sentence for twin in twins for sentence in twin}
            # A unit is taken or left whole: half of one would unbalance its tokens.
            if len(sentences) == 2 * len(twins) and seen.isdisjoint(sentences):
                pairs += [Pair(phenomenon, good, bad) for good, bad in twins]
                seen |= sentences
                turn += 1
    return pairs


class _Draw:
    """Random words and phrases of one lexicon."""

    def __init__(self, lexicon: Lexicon, rng: random.Random) -> None:
        self.lexicon = lexicon
        self.rng = rng

    def word(self, kind: str) -> str:
        return str(self.rng.choice(getattr(self.lexicon, kind).split()))

    def two(self, kind: str) -> list[str]:
        return self.rng.sample(getattr(self.lexicon, kind).split(), 2)

    def determiner(self) -> str:
        return self.rng.choice(_DETERMINERS)

    def phrase(self, kind: str) -> str:
        return f"{self.determiner()} {self.word(kind)}"

    def preposition(self) -> str:
        return self.rng.choice(_PREPOSITIONS)

    def place(self) -> str:
        return f"{self.rng.choice(('in', 'near', 'behind'))} {self.phrase('places')}"

    def maybe(self, phrase: str) -> str:
        return self.rng.choice((phrase, ""))


# An acceptable sentence and its unacceptable partner, before _finish.
_Twin = tuple[str, str]


def _agreement(draw: _Draw, turn: int) -> list[_Twin]:
    """Verb and subject, across a noun of the other number: the nurse that pilots met is/*are."""
    of_things = turn % 4 == 0
    first, second = draw.two("things" if of_things else "people")
    head, attractor = (first, _plural(first)), (second, _plural(second))
    outer, inner = draw.determiner(), draw.determiner()
    verb = _past(draw.word("person_verbs"))
    # A phrase or verb parts distractor and verb: side by side, "doors is" would always be right.
    before, after = (
        (f"{draw.preposition()} {inner}", draw.place()),
        (f"{draw.preposition()} {inner}", draw.place()),
        (f"that {inner}", verb),
        (f"that {verb} {inner}", draw.place()),
    )[turn % 4]
    forms, rest = _predicate(draw, of_things)
    twins = []
    for number in (0, 1):
        start = f"{outer} {head[number]} {before} {attractor[1 - number]} {after}"
        good, bad = forms[number], forms[1 - number]
        twins.append((f"{start} {good} {rest}", f"{start} {bad} {rest}"))
    return twins


def _predicate(draw: _Draw, of_things: bool) -> tuple[tuple[str, str], str]:
    """A finite verb as (singular, plural), and what follows it."""
    adjective = draw.word("thing_adjectives" if of_things else "person_adjectives")
    link, verb = draw.word("linking_verbs"), draw.word("intransitive_verbs")
    choices = [
        (("is", "are"), adjective),
        (("was", "were"), adjective),
        ((_third_person(link), link), adjective),
        (("does", "do"), f"not {link} {adjective}"),
    ]
    if not of_things:
        choices += [
            (("has", "have"), _past(verb)),
            ((_third_person(verb), verb), ""),
        ]
    return draw.rng.choice(choices)


def _reflexive(draw: _Draw, turn: int) -> list[_Twin]:
    """A reflexive and its subject: the king near the queen blamed himself/*herself."""
    verb = f"{draw.maybe(draw.word('adverbs'))} {_past(draw.word('person_verbs'))}"
    kinds = (_reflexive_gender, _reflexive_number, _reflexive_name, _reflexive_pronoun)
    return kinds[turn % 4](draw, verb)


def _reflexive_gender(draw: _Draw, verb: str) -> list[_Twin]:
    nouns = (draw.word("males"), draw.word("females"))
    pronouns = ("himself", "herself")
    outer, inner = draw.determiner(), draw.determiner()
    other = _past(draw.word("person_verbs"))
    before, after = draw.rng.choice(
        (
            (f"{draw.preposition()} {inner}", ""),
            (f"that {inner}", other),
            (f"that {other} {inner}", ""),
        )
    )
    twins = []
    for i in (0, 1):
        start = f"{outer} {nouns[i]} {before} {nouns[1 - i]} {after} {verb}"
        twins.append((f"{start} {pronouns[i]}", f"{start} {pronouns[1 - i]}"))
    return twins


def _reflexive_number(draw: _Draw, verb: str) -> list[_Twin]:
    males = draw.rng.random() < 0.5
    singular = draw.word("males" if males else "females")
    other = draw.word("females" if males else "males")
    head, attractor = (singular, _plural(singular)), (other, _plural(other))
    pronouns = ("himself" if males else "herself", "themselves")
    outer, inner = draw.determiner(), draw.determiner()
    preposition = draw.preposition()
    twins = []
    for i in (0, 1):
        start = f"{outer} {head[i]} {preposition} {inner} {attractor[1 - i]} {verb}"
        twins.append((f"{start} {pronouns[i]}", f"{start} {pronouns[1 - i]}"))
    return twins


def _reflexive_name(draw: _Draw, verb: str) -> list[_Twin]:
    names = (draw.word("male_names"), draw.word("female_names"))
    pronouns = ("himself", "herself")
    saying = _past(draw.word("saying_verbs"))
    twins = []
    for i in (0, 1):
        start = f"{names[1 - i]} {saying} that {names[i]} {verb}"
        twins.append((f"{start} {pronouns[i]}", f"{start} {pronouns[1 - i]}"))
    return twins


def _reflexive_pronoun(draw: _Draw, verb: str) -> list[_Twin]:
    subjects = draw.rng.sample(list(_REFLEXIVES), 2)
    pronouns = [_REFLEXIVES[subject] for subject in subjects]
    opening = f"{draw.phrase('people')} {_past(draw.word('saying_verbs'))} that"
    return [
        (f"{opening} {subjects[i]} {verb} {pronouns[i]}", f"{opening} {subjects[i]} {verb} {wrong}")
        for i, wrong in enumerate(reversed(pronouns))
    ]


def _determiner(draw: _Draw, turn: int) -> list[_Twin]:
    """A determiner and its noun: this lamp/*lamps, or this/*these lamp."""
    pair = draw.rng.choice(_NUMBER_DETERMINERS)
    as_subject = turn % 2 == 0
    kind = "person" if as_subject else "thing"
    noun = draw.word("people" if as_subject else "things")
    nouns = (noun, _plural(noun))
    adjective = draw.maybe(draw.word(f"{kind}_adjectives"))
    if as_subject:
        before, after = "", f"{_past(draw.word('intransitive_verbs'))} {draw.place()}"
    else:
        before = f"{draw.phrase('people')} {_past(draw.word('thing_verbs'))}"
        after = draw.place()

    def sentence(which_determiner: int, which_noun: int) -> str:
        return f"{before} {pair[which_determiner]} {adjective} {nouns[which_noun]} {after}"

    if turn // 2 % 2 == 0:
        return [(sentence(i, i), sentence(i, 1 - i)) for i in (0, 1)]
    return [(sentence(i, i), sentence(1 - i, i)) for i in (0, 1)]


def _argument_structure(draw: _Draw, turn: int) -> list[_Twin]:
    """Transitive and intransitive verbs: the nurse fixed/*slept the lamp."""
    of_things = turn % 2 == 0
    transitive = draw.word("thing_verbs" if of_things else "person_verbs")
    intransitive = draw.word("intransitive_verbs")
    person, patient = draw.two("people")
    object_ = draw.phrase("things") if of_things else f"{draw.determiner()} {patient}"
    auxiliary, inflect = draw.rng.choice(
        (
            (draw.maybe(draw.word("adverbs")), _past),
            ("has", _past),
            ("will", str),
            ("did not", str),
        )
    )
    good, bad = inflect(transitive), inflect(intransitive)
    start = f"{draw.determiner()} {person} {auxiliary}"
    # No place after an object: with one, "sneezed the lamp behind the church" becomes possible.
    with_object = (f"{start} {good} {object_}", f"{start} {bad} {object_}")
    start = f"{draw.phrase('people')} {auxiliary}"
    place = draw.place()
    return [with_object, (f"{start} {bad} {place}", f"{start} {good} {place}")]


def _word_order(draw: _Draw, turn: int) -> list[_Twin]:
    """Two neighbouring words swapped: the clever nurse/*nurse clever fixed the lamp."""
    determiner, person = draw.determiner(), draw.word("people")
    adjective = draw.word("person_adjectives")
    verb = draw.word("thing_verbs")
    rest = f"{draw.phrase('things')} {draw.place()}"
    before, first, second, after = (
        ("", determiner, person, f"{_past(verb)} {rest}"),
        (
            f"{determiner} {adjective} {person} {_past(verb)}",
            *draw.phrase("things").split(),
            draw.place(),
        ),
        (determiner, adjective, person, f"{_past(verb)} {rest}"),
        (f"{determiner} {person}", "has", _past(verb), rest),
        (f"{determiner} {person}", "will", verb, rest),
        (
            f"{determiner} {adjective} {person} {_past(draw.word('intransitive_verbs'))}",
            draw.preposition(),
            draw.phrase("places"),
            "",
        ),
        (determiner, person, draw.word("adverbs"), f"{_past(verb)} {rest}"),
        (determiner, draw.word("degrees"), adjective, f"{person} {_past(verb)} {rest}"),
        (f"{determiner} {person}", "did", "not", f"{verb} {rest}"),
    )[turn % 9]
    # Both sentences hold the same words, so no twin is needed.
    return [(f"{before} {first} {second} {after}", f"{before} {second} {first} {after}")]


_PHENOMENA: dict[str, Callable[[_Draw, int], list[_Twin]]] = {
    "subject_verb_agreement": _agreement,
    "reflexive": _reflexive,
    "determiner_noun_agreement": _determiner,
    "argument_structure": _argument_structure,
    "word_order": _word_order,
}


def _finish(words: str) -> str:
    sentence = " ".join(words.split())
    return f"{sentence[0].upper()}{sentence[1:]}."
