"""The words of the demo data's grammar, and their forms."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Lexicon:
    """The content words of one split, lemmas separated by spaces.

    The transitive verbs cannot stand without an object, the intransitive ones not with one. A
    person verb also takes a reflexive object.
    """

    people: str
    males: str
    females: str
    male_names: str
    female_names: str
    things: str
    places: str
    person_adjectives: str
    thing_adjectives: str
    adverbs: str
    degrees: str
    person_verbs: str
    thing_verbs: str
    intransitive_verbs: str
    saying_verbs: str
    linking_verbs: str

    def forms(self) -> set[str]:
        """Every form of every word, lower-case, whether a sentence uses it or not."""
        found = set()
        for field in fields(self):
            for word in getattr(self, field.name).lower().split():
                found.add(word)
                if field.name in ("people", "males", "females", "things", "places"):
                    found.add(_plural(word))
                if field.name.endswith("_verbs"):
                    found |= {_third_person(word), _past(word)}
        return found


# The two share no content word: a score on validation is about grammar, not vocabulary.
LEXICONS = {
    "train": Lexicon(
        people="nurse pilot teacher farmer lawyer doctor singer painter soldier sailor banker "
        "student guard waiter tourist plumber reporter judge barber clerk",
        males="king boy uncle brother prince monk",
        females="queen girl aunt sister princess nun",
        male_names="Peter Oscar Martin Hugo Victor Samuel",
        female_names="Greta Alice Nora Clara Julia Sophie",
        things="lamp table mirror bottle basket letter clock blanket hammer carpet pillow bucket "
        "jacket ladder wagon helmet",
        places="kitchen garden station market forest village church hotel",
        person_adjectives="tired clever famous polite hungry nervous cheerful loyal wealthy lonely",
        thing_adjectives="dusty wooden heavy broken expensive rusty cheap narrow red fragile",
        adverbs="quietly quickly often suddenly gladly rarely",
        degrees="very truly",
        person_verbs="distrust blame admire describe comfort rescue insult despise embarrass "
        "convince reassure injure mention amuse humiliate flatter pamper accuse",
        thing_verbs="fix fetch discard demolish confiscate remove destroy bring clutch replace",
        intransitive_verbs="sleep sneeze vanish arrive laugh yawn tremble hesitate cough faint "
        "shiver snore wait kneel linger",
        saying_verbs="say believe",
        linking_verbs="seem look",
    ),
    "validation": Lexicon(
        people="tailor chemist editor dancer butcher carpenter manager poet senator wizard hunter "
        "engineer librarian driver",
        males="father son husband nephew duke groom",
        females="mother daughter wife niece duchess bride",
        male_names="David Leon Felix Simon Arthur",
        female_names="Laura Emma Rosa Helen Martha",
        things="chair vase kettle candle curtain suitcase guitar umbrella wallet barrel statue",
        places="office museum harbor castle cellar meadow theater tavern",
        person_adjectives="brave patient stubborn gentle curious jealous anxious proud",
        thing_adjectives="shiny dirty modern sturdy costly crooked yellow antique enormous",
        adverbs="secretly seldom finally eagerly openly calmly",
        degrees="rather fairly",
        person_verbs="resent soothe congratulate introduce portray deceive underestimate adore "
        "astonish console irritate discredit",
        thing_verbs="acquire damage conceal abandon dismantle construct retrieve transport mislay",
        intransitive_verbs="giggle disappear nap smile doze frown shudder emerge loiter crouch",
        saying_verbs="claim assume",
        linking_verbs="appear remain",
    ),
}


_IRREGULAR = {
    "wife": "wives",
    "bring": "brought",
    "kneel": "knelt",
    "mislay": "mislaid",
    "nap": "napped",
    "say": "said",
    "sleep": "slept",
}


def _third_person(verb: str) -> str:
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "z")) else "s")


def _plural(noun: str) -> str:
    # A regular plural is spelled like a regular third person.
    return _IRREGULAR.get(noun) or _third_person(noun)


def _past(verb: str) -> str:
    """Past tense, which is also the participle of every verb here."""
    return _IRREGULAR.get(verb) or verb + ("d" if verb.endswith("e") else "ed")
