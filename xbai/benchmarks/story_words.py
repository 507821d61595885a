"""The words that stories are made of, in their right forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Person:
    """A name, and the pronouns that stand for it: `she` gives, one gives `her`, and it is `her` box."""

    name: str
    subject: str
    object: str
    possessive: str


WOMEN = tuple(
    Person(name, "she", "her", "her") for name in ("Mia", "Ava", "Lena", "Ruth", "Nina", "Sara", "Emma", "Anna", "Zoe")
)
MEN = tuple(
    Person(name, "he", "him", "his") for name in ("Tom", "Noah", "Omar", "Ivan", "Paul", "Luis", "Jack", "Ben", "Max")
)
PEOPLE = WOMEN + MEN

THINGS = (
    *("apple", "marble", "sticker", "book", "coin", "pencil", "shell", "card", "cookie"),
    *("balloon", "stamp", "toy car", "button", "flower", "peach", "postcard", "bead", "candle"),
)
PLACES = (
    *("at the market", "in the park", "at school", "in the garden"),
    *("at the beach", "in the attic", "at the fair", "on the way home"),
)
GOODS = (
    *("pen", "notebook", "sandwich", "ticket", "lemon", "mug", "ball"),
    *("ruler", "muffin", "kite", "plant", "comic", "hat", "key ring"),
)
ACTIVITIES = (
    *("reads", "walks the dog", "practises the piano", "cleans the kitchen", "paints"),
    *("does homework", "waters the garden", "plays football", "cooks dinner", "builds a model"),
)
STOPS = ("school", "market", "library", "museum", "harbour", "hospital", "theatre")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
LEGS = {"hen": 2, "duck": 2, "cow": 4, "goat": 4, "horse": 4, "ant": 6, "beetle": 6, "spider": 8, "crab": 10}
FLOWERS = ("tulip", "rose", "lily", "daisy", "sunflower", "pansy")
MULTIPLES = {2: "twice", 3: "three times"}
ORDINALS = ("first", "second", "third")


def woman_and_man(rng: Random) -> tuple[Person, Person]:
    """Two people, in either order, whom their pronouns tell apart."""
    pair = [rng.choice(WOMEN), rng.choice(MEN)]
    rng.shuffle(pair)
    return pair[0], pair[1]


def plural(noun: str) -> str:
    """Of a noun that forms it by a rule."""
    if noun.endswith(("ch", "sh", "s", "x")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def counted(count: int, noun: str) -> str:
    """Such as `1 apple`, `3 apples`."""
    return f"{count} {noun if count == 1 else plural(noun)}"


def with_article(noun: str) -> str:
    """Such as `a pen`, `an ant`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(parts: Sequence[str]) -> str:
    """Such as `one, two and three`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def capitalised(text: str) -> str:
    """With a capital letter at its beginning, and no other change."""
    return text[:1].upper() + text[1:]
