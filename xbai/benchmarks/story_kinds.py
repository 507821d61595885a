"""How a story is told, and the kinds of stories: those that training sees, and those held out.

The latter need the same arithmetic in steps of the same form, in situations that training does not know. Numbers are
small: a child answers all of them, and a small language model after a quarter of an hour of training about half.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from xbai.benchmarks import story_words as words

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "x": operator.mul,
    "/": operator.floordiv,
}
ASIDE_RATE = 0.3
BANKNOTES = (20, 30, 50, 70, 100, 150)
LARGEST_TO_MULTIPLY = 15


@dataclass(frozen=True)
class Story:
    """A question in words."""

    question: str
    """The whole text, with what is asked at its end."""
    steps: tuple[str, ...]
    """Of the worked solution, one an operation, without full stops."""
    answer: int
    """The result of the last one."""


class Tale:
    """Tells one story, for which `rng` chooses among wordings."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self._sentences: list[str] = []
        self._steps: list[str] = []

    def tell(self, *wordings: str) -> None:
        """One more sentence, in one of several wordings."""
        self._sentences.append(f"{words.capitalised(self.rng.choice(wordings))}.")

    def aside(self, *wordings: str) -> None:
        """Sometimes a sentence whose number the answer does not need."""
        if self.rng.random() < ASIDE_RATE:
            self.tell(*wordings)

    def note(self, step: str) -> None:
        """A step that only takes a number from the text."""
        self._steps.append(words.capitalised(step))

    def work(self, lead: str, left: int, sign: str, right: int, unit: str = "", end: str = "") -> int:
        """A step with one operation, such as `LEAD 3 + 4 = 7 pens END`; returns its result."""
        result = OPERATIONS[sign](left, right)
        named = words.counted(result, unit) if unit else str(result)
        self.note(f"{lead} {left} {sign} {right} = {named}{end}")
        return result

    def ask(self, answer: int, *wordings: str) -> Story:
        """End with a question in one of several wordings."""
        return Story(" ".join([*self._sentences, self.rng.choice(wordings)]), tuple(self._steps), answer)


StoryKind = Callable[[Random], Story]


# Seen in training


def running_total(rng: Random) -> Story:
    """Somebody gains and loses things, two or three times."""
    owner, friend = words.woman_and_man(rng)
    thing, other = rng.sample(words.THINGS, 2)
    tale, held = Tale(rng), rng.randint(4, 20)
    things = words.counted(held, thing)
    tale.tell(
        f"{owner.name} has {things}",
        f"there are {things} in {owner.name}'s box",
        f"{owner.name} starts the day with {things}",
        f"at first {owner.name} owns {things}",
    )
    tale.note(f"{owner.name} starts with {things}")
    for number in range(rng.randint(2, 3)):
        when = f"{rng.choice(('then', 'later', 'after that', 'in the evening', 'next'))} " if number else ""
        held = rng.choice(_possible_changes(held))(tale, held, owner, friend, when)
    tale.aside(
        f"{owner.subject} also has {words.counted(rng.randint(2, 12), other)}",
        f"{friend.name} has {words.counted(rng.randint(2, 12), other)}",
        f"it is {rng.randint(2, 9)} degrees outside",
    )
    return tale.ask(
        held,
        f"How many {words.plural(thing)} does {owner.name} have now?",
        f"How many {words.plural(thing)} does {owner.name} have in the end?",
        f"With how many {words.plural(thing)} does {owner.name} end up?",
    )


Change = Callable[[Tale, int, words.Person, words.Person, str], int]
"""What happens to the things held: tells it, works it out, and returns how many are held then."""


def _possible_changes(held: int) -> list[Change]:
    possible: list[Change] = [_gain, _gain_groups]
    if held >= 4:
        possible.append(_lose)
    if held >= 6 and held % 2 == 0:
        possible.append(_halve)
    if held <= LARGEST_TO_MULTIPLY:
        possible.append(_double)
    return possible


def _gain(tale: Tale, held: int, owner: words.Person, friend: words.Person, when: str) -> int:
    more, she = tale.rng.randint(2, 15), owner.subject
    tale.tell(
        f"{when}{she} buys {more} more",
        f"{when}{she} finds {more} more {tale.rng.choice(words.PLACES)}",
        f"{when}{friend.name} gives {owner.object} {more} more",
        f"{when}{she} wins {more} in a game",
    )
    return tale.work(f"{she} gets {more} more, so {she} has", held, "+", more)


def _lose(tale: Tale, held: int, owner: words.Person, friend: words.Person, when: str) -> int:
    fewer, she = tale.rng.randint(2, min(held - 1, 14)), owner.subject
    tale.tell(
        f"{when}{she} gives {fewer} to {friend.name}",
        f"{when}{she} loses {fewer} {tale.rng.choice(words.PLACES)}",
        f"{when}{she} sells {fewer} of them",
        f"{when}{friend.name} borrows {fewer} of them",
    )
    return tale.work(f"{she} gives up {fewer}, so {she} has", held, "-", fewer)


def _gain_groups(tale: Tale, held: int, owner: words.Person, friend: words.Person, when: str) -> int:
    groups, size, she = tale.rng.randint(2, 5), tale.rng.randint(2, 6), owner.subject
    tale.tell(
        f"{when}{she} buys {groups} bags with {size} in each",
        f"{when}{she} opens {groups} boxes of {size}",
        f"{when}{she} gets {size} from each of {groups} friends",
    )
    more = tale.work("that is", groups, "x", size, end=" more")
    return tale.work(f"so {she} has", held, "+", more)


def _halve(tale: Tale, held: int, owner: words.Person, friend: words.Person, when: str) -> int:
    tale.tell(
        f"{when}{owner.subject} gives half of them to {friend.name}",
        f"{when}{owner.subject} sells half of them",
        f"{when}half of them get lost",
    )
    return tale.work(f"half of them are left, so {owner.subject} has", held, "/", 2)


def _double(tale: Tale, held: int, owner: words.Person, friend: words.Person, when: str) -> int:
    tale.tell(
        f"{when}{owner.possessive} grandmother doubles what {owner.subject} has",
        f"{when}{owner.subject} doubles the collection",
    )
    return tale.work(f"doubling gives {owner.object}", 2, "x", held)


def shopping(rng: Random) -> Story:
    """Somebody buys several of one to three goods, and may ask for the change."""
    buyer, tale = rng.choice(words.PEOPLE), Tale(rng)
    goods = rng.sample(words.GOODS, rng.randint(1, 3))
    counts = [rng.randint(2, 6), rng.randint(1, 6), rng.randint(1, 6)]
    # As many counts are drawn whatever is bought.
    bought = [(good, count, rng.randint(2, 8)) for good, count in zip(goods, counts, strict=False)]
    tale.tell(f"{buyer.name} buys {words.listed([_priced(*purchase) for purchase in bought])}")
    total = _total_price(tale, bought)
    tale.aside(f"{buyer.subject} is {rng.randint(7, 15)} years old")
    if len(goods) > 1 and rng.random() < 0.5:
        return tale.ask(total, f"How much does {buyer.subject} pay?", "What is the total price in dollars?")
    paid = next(note for note in BANKNOTES if note > total)
    tale.tell(f"{buyer.subject} pays with {paid} dollars")
    lead = f"{buyer.subject} pays with {paid}, so {buyer.subject} gets"
    change = tale.work(lead, paid, "-", total, "dollar", " back")
    return tale.ask(change, f"How much change does {buyer.subject} get?")


def _priced(good: str, count: int, price: int) -> str:
    if count == 1:
        return f"{words.with_article(good)} for {price} dollars"
    return f"{words.counted(count, good)} at {price} dollars each"


def _total_price(tale: Tale, bought: list[tuple[str, int, int]]) -> int:
    total = 0
    for number, (good, count, price) in enumerate(bought):
        if count == 1:
            cost = price
            tale.note(f"the {good} costs {price} dollars")
        else:
            cost = tale.work(f"the {words.plural(good)} cost", count, "x", price, "dollar")
        total = tale.work("that makes", total, "+", cost, "dollar") if number else cost
    return total


def comparison(rng: Random) -> Story:
    """Each of three or four people has more, fewer or several times as many things as the one before."""
    people, thing, tale = rng.sample(words.PEOPLE, rng.randint(3, 4)), rng.choice(words.THINGS), Tale(rng)
    counts = [rng.randint(3, 14)]
    tale.tell(f"{people[0].name} has {words.counted(counts[0], thing)}")
    tale.note(f"{people[0].name} has {counts[0]}")
    for before, person in pairwise(people):
        counts.append(_compared(tale, f"{person.name} has", counts[-1], f"{before.name}"))
    tale.aside(f"{people[-1].name} is {rng.randint(7, 15)} years old")
    if rng.random() < 0.4:
        return tale.ask(counts[-1], f"How many {words.plural(thing)} does {people[-1].name} have?")
    total = counts[0]
    for count in counts[1:]:
        total = tale.work("together", total, "+", count)
    return tale.ask(
        total,
        f"How many {words.plural(thing)} do they have together?",
        f"How many {words.plural(thing)} do they have in all?",
    )


def _compared(tale: Tale, lead: str, count: int, other: str, what: str = "") -> int:
    """Tell how many there are by a comparison with `count`, those of `other`; returns how many."""
    rng, ways = tale.rng, ["more"]
    if count >= 5:
        ways.append("fewer")
    if count <= 12:
        ways.append("times")
    way = rng.choice(ways)
    if way == "times":
        multiple = rng.choice(tuple(words.MULTIPLES))
        tale.tell(f"{lead} {words.MULTIPLES[multiple]} as many{what} as {other}")
        return tale.work(lead, multiple, "x", count)
    difference = rng.randint(2, 9 if way == "more" else min(9, count - 1))
    tale.tell(f"{lead} {difference} {way}{what} than {other}")
    return tale.work(lead, count, "+" if way == "more" else "-", difference)


def time_spent(rng: Random) -> Story:
    """Somebody is busy with two or three activities, one after the other; some take twice as long."""
    person, tale = rng.choice(words.PEOPLE), Tale(rng)
    activities = rng.sample(words.ACTIVITIES, rng.choice((2, 3, 3)))
    total = last = 5 * rng.randint(1, 8)
    tale.tell(f"{person.name} {activities[0]} for {last} minutes", f"for {last} minutes {person.name} {activities[0]}")
    tale.note(f"the first part takes {last} minutes")
    for activity in activities[1:]:
        if len(activities) == 2 or (last <= 40 and rng.random() < 0.35):
            tale.tell(f"then {person.subject} {activity} for twice as long")
            last = tale.work("the next part takes", 2, "x", last, "minute")
        else:
            last = 5 * rng.randint(1, 9)
            tale.tell(f"then {person.subject} {activity} for {last} minutes")
        total = tale.work("that makes", total, "+", last, "minute")
    tale.aside(f"{person.subject} is {rng.randint(7, 15)} years old")
    return tale.ask(
        total, "How many minutes is that in total?", f"For how many minutes is {person.name} busy in total?"
    )


# Held out


def passengers(rng: Random) -> Story:
    """People get on and off a bus at two or three stops."""
    tale, riding = Tale(rng), rng.randint(8, 20)
    tale.tell(f"a bus leaves the station with {riding} passengers", f"there are {riding} passengers on a bus")
    tale.note(f"the bus starts with {riding} passengers")
    for stop in rng.sample(words.STOPS, rng.randint(2, 3)):
        at, way = f"at the {stop}", rng.choice(("on", "off", "groups"))
        if way == "groups":
            groups, size = rng.randint(2, 4), rng.randint(2, 5)
            tale.tell(f"{at} {groups} families of {size} get on")
            more = tale.work(f"{at} there are", groups, "x", size, end=" more")
            riding = tale.work("so there are", riding, "+", more)
        elif way == "off" and riding >= 6:
            fewer = rng.randint(2, min(12, riding - 3))
            tale.tell(f"{at} {fewer} passengers get off", f"{at} {fewer} of them leave")
            riding = tale.work(f"{at} {fewer} get off, so there are", riding, "-", fewer)
        else:
            more = rng.randint(2, 12)
            tale.tell(f"{at} {more} people get on", f"{at} {more} more get on")
            riding = tale.work(f"{at} {more} get on, so there are", riding, "+", more)
    tale.aside(f"a ticket costs {rng.randint(2, 9)} dollars", f"it is {rng.randint(2, 9)} degrees outside")
    return tale.ask(riding, "How many passengers are on the bus now?", "How many passengers are there in the end?")


def pages(rng: Random) -> Story:
    """Somebody reads a book over two or three days; what is read or left is asked."""
    reader, days, tale = rng.choice(words.PEOPLE), words.DAYS[: rng.randint(2, 3)], Tale(rng)
    read = total = rng.randint(5, 14)
    tale.tell(f"on {days[0]} {reader.name} reads {read} pages of a book")
    tale.note(f"on {days[0]} it is {read} pages")
    for before, day in pairwise(days):
        read = _compared(tale, f"on {day} {reader.subject} reads", read, f"on {before}", " pages")
        total = tale.work("that makes", total, "+", read)
    tale.aside(f"{reader.subject} is {rng.randint(7, 15)} years old")
    if len(days) == 3 and rng.random() < 0.5:
        return tale.ask(total, f"How many pages does {reader.subject} read in all?")
    size = total + rng.randint(5, 40)
    tale.tell(f"the book has {size} pages")
    left = tale.work("what is left is", size, "-", total, "page")
    return tale.ask(left, f"How many pages does {reader.subject} have left?", "How many pages are left?")


def legs(rng: Random) -> Story:
    """The legs of two or three kinds of animals."""
    animals, tale = rng.sample(sorted(words.LEGS), rng.randint(2, 3)), Tale(rng)
    counts = [rng.randint(2, 6) for _ in animals]
    tale.tell(words.listed([f"{words.with_article(animal)} has {words.LEGS[animal]} legs" for animal in animals]))
    found = words.listed([words.counted(count, animal) for animal, count in zip(animals, counts, strict=True)])
    tale.tell(f"on a farm there are {found}", f"{rng.choice(words.PEOPLE).name} counts {found}")
    total = 0
    for number, (animal, count) in enumerate(zip(animals, counts, strict=True)):
        more = tale.work(f"the {words.plural(animal)} have", count, "x", words.LEGS[animal], "leg")
        total = tale.work("that makes", total, "+", more, "leg") if number else more
    tale.aside(f"it is {rng.randint(2, 9)} degrees outside")
    return tale.ask(total, "How many legs is that in total?", "How many legs do the animals have in all?")


def garden(rng: Random) -> Story:
    """Rows of flowers, of which some are picked."""
    gardener, tale = rng.choice(words.PEOPLE), Tale(rng)
    flowers = rng.sample(words.FLOWERS, 2)
    rows = [(flower, rng.randint(2, 6), rng.randint(3, 8)) for flower in flowers]
    beds = words.listed([f"{count} rows of {words.counted(size, flower)}" for flower, count, size in rows])
    tale.tell(f"{gardener.name} plants {beds}", f"in {gardener.name}'s garden there are {beds}")
    first, second = (tale.work(f"the {words.plural(flower)} are", count, "x", size) for flower, count, size in rows)
    total = tale.work("that makes", first, "+", second, "flower")
    tale.aside(f"{gardener.subject} is {rng.randint(7, 15)} years old")
    if rng.random() < 0.5:
        return tale.ask(total, "How many flowers is that in total?")
    picked = rng.randint(2, 9)
    tale.tell(f"{gardener.subject} picks {picked} of the flowers", f"rabbits eat {picked} of the flowers")
    left = tale.work("so there are", total, "-", picked, end=" left")
    return tale.ask(left, "How many flowers are left?")


def game(rng: Random) -> Story:
    """The points of one player in three rounds, each compared with the one before."""
    player, tale = rng.choice(words.PEOPLE), Tale(rng)
    points = total = rng.randint(4, 14)
    tale.tell(f"in the first round of a game {player.name} scores {points} points")
    tale.note(f"in the first round it is {points}")
    scores = [points]
    for before, name in pairwise(words.ORDINALS):
        lead = f"in the {name} round {player.subject} scores"
        scores.append(_compared(tale, lead, scores[-1], f"in the {before}", " points"))
    tale.aside(f"{player.subject} is {rng.randint(7, 15)} years old")
    for points in scores[1:]:
        total = tale.work("together", total, "+", points)
    return tale.ask(
        total, f"How many points does {player.name} have in all?", f"How many points does {player.name} score in total?"
    )


SEEN = {"running": running_total, "shopping": shopping, "comparison": comparison, "time": time_spent}
HELD_OUT = {kind.__name__: kind for kind in (passengers, pages, legs, garden, game)}
