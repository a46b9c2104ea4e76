"""Questions and answers in text alone, made of general knowledge and of arithmetic, for a text model to learn the corpus's
domain by its rules: sums in both orders, capitals and opposites both ways, days and months before and after, in several wordings.

What is held out stays so: `exchanges` leaves out whatever has the words of a held-out question or of its answer. The fact itself
may be there in other words, as it would be in what a language model has read; so a right answer shows that a question that was
never seen is understood and answered in the form that was learnt, not that its fact was found out.

To choose a recipe by, a share of them can be withheld from training in just that way: see `withheld`.
"""

import re
import tomllib
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

TABLES = Path(__file__).with_name("facts.toml")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
LARGEST = 12  # of the numbers that are added and taken away


class Exchange(NamedTuple):
    question: str
    answer: str


def normalised(text: str) -> str:
    """Lower case, letters and digits alone, one space between words: what makes two texts the same."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def exchanges(held_out: Iterable[Exchange] = (), withhold: float = 0.0) -> dict[str, list[Exchange]]:
    """Every exchange by its kind, without those whose question or answer is one of ``held_out``, and without the share
    ``withhold`` of all answers, the same ones whatever is held out."""
    return {kind: [e for e in found if not of_share(e, withhold)] for kind, found in everything(held_out).items()}


def withheld(share: float, held_out: Iterable[Exchange] = (), known: Iterable[Exchange] = ()) -> dict[str, list[Exchange]]:
    """What ``exchanges`` leaves out for ``withhold = share``, by kind, without what has the words of one of ``known``."""
    known = list(known)
    questions, answers = ({normalised(e[i]) for e in known} for i in (0, 1))
    kinds = everything(held_out).items()
    return {kind: without((e for e in found if of_share(e, share)), questions, answers) for kind, found in kinds}


def of_share(exchange: Exchange, share: float) -> bool:
    """Whether an exchange's answer is one of a share of all answers that is drawn by their words alone."""
    return zlib.crc32(normalised(exchange.answer).encode()) < share * 2**32


def everything(held_out: Iterable[Exchange]) -> dict[str, list[Exchange]]:
    """Every exchange by its kind, without those whose question or answer is one of ``held_out``."""
    held_out = list(held_out)
    questions, answers = ({normalised(e[i]) for e in held_out} for i in (0, 1))
    tables = tomllib.loads(TABLES.read_text(encoding="utf-8"))
    kinds = {
        "sum": sums(),
        "difference": differences(),
        "next": successors(),
        "calendar": calendar(),
        "capital": capitals(tables["capitals"]),
        "opposite": opposites(tables["opposites"]["pairs"]),
        "color": colors(tables["colors"]),
        "count": counts(tables["counts"]),
        "sound": sounds(tables["sounds"]),
    }
    return {kind: without(found, questions, answers) for kind, found in kinds.items()}


def without(found: Iterable[Exchange], questions: Collection[str], answers: Collection[str]) -> list[Exchange]:
    kept = dict.fromkeys(Exchange(capital(e.question), capital(e.answer)) for e in found)
    return [e for e in kept if normalised(e.question) not in questions and normalised(e.answer) not in answers]


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def number(n: int) -> str:
    """0 … 999 in words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" {number(n % 100)}" if n % 100 else "")


def sums() -> Iterable[Exchange]:
    for x in range(LARGEST + 1):
        for y in range(LARGEST + 1):
            a, b, c = number(x), number(y), number(x + y)
            yield Exchange(f"What is {a} plus {b}?", f"{a} plus {b} is {c}.")
            yield Exchange(f"Add {b} to {a}.", f"{a} and {b} make {c}.")


def differences() -> Iterable[Exchange]:
    for x in range(2 * LARGEST + 1):
        for y in range(max(0, x - LARGEST), min(x, LARGEST) + 1):
            a, b, c = number(x), number(y), number(x - y)
            yield Exchange(f"What is {a} minus {b}?", f"{a} minus {b} is {c}.")
            yield Exchange(f"Take {b} from {a}.", f"{b} from {a} leaves {c}.")


def successors() -> Iterable[Exchange]:
    for n in range(100):
        a, b, c = number(n), number(n + 1), number(n + 2)
        yield Exchange(f"What number comes after {a}?", f"{b} comes after {a}.")
        yield Exchange(f"What number comes before {b}?", f"{a} comes before {b}.")
        yield Exchange(f"Count from {a} to {c}.", f"{a}, {b}, {c}.")


def calendar() -> Iterable[Exchange]:
    for what, names in (("day", DAYS), ("month", MONTHS)):
        for i, a in enumerate(names):
            b, c = names[(i + 1) % len(names)], names[(i + 2) % len(names)]
            yield Exchange(f"What {what} comes after {a}?", f"{b} comes after {a}.")
            yield Exchange(f"What {what} comes before {b}?", f"{a} comes before {b}.")
            yield Exchange(f"Which {what} follows {a}?", f"{b} follows {a}.")
            yield Exchange(f"Which {what} is between {a} and {c}?", f"{b} is between {a} and {c}.")
            yield Exchange(f"Count the {what}s from {a} to {c}.", f"{a}, {b}, {c}.")


def capitals(table: dict[str, str]) -> Iterable[Exchange]:
    for country, city in table.items():
        yield Exchange(f"What is the capital of {country}?", f"The capital of {country} is {city}.")
        yield Exchange(f"Which country has {city} as its capital?", f"{city} is the capital of {country}.")
        yield Exchange(f"Name the capital of {country}.", f"{country} has {city} as its capital.")
        yield Exchange(f"In which country is {city}?", f"{city} is in {country}.")


def opposites(pairs: list[list[str]]) -> Iterable[Exchange]:
    """A word with several opposites has its first one for an answer."""
    of: dict[str, str] = {}
    for a, b in [*pairs, *((b, a) for a, b in pairs)]:
        of.setdefault(a, b)
    for a, b in of.items():
        yield Exchange(f"What is the opposite of {a}?", f"The opposite of {a} is {b}.")
        yield Exchange(f"Name the opposite of {a}.", f"{a} and {b} are opposites.")


def colors(table: dict[str, list[str]]) -> Iterable[Exchange]:
    for color, things in table.items():
        for thing in things:
            yield Exchange(f"What color is {thing}?", f"{thing} is {color}.")
            yield Exchange(f"Which color does {thing} have?", f"The color of {thing} is {color}.")


def counts(table: dict[str, list]) -> Iterable[Exchange]:
    for what, n, whose in table["are"]:
        verb = "is" if n == 1 else "are"
        yield Exchange(f"How many {what} are in {whose}?", f"There {verb} {number(n)} {what} in {whose}.")
        yield Exchange(f"How many {what} make {whose}?", f"{number(n)} {what} make {whose}.")
    for what, n, whose in table["has"]:
        things = what.removesuffix("s") if n == 1 else what
        yield Exchange(f"How many {what} does {whose} have?", f"{whose} has {number(n)} {things}.")
        yield Exchange(f"Count the {what} of {whose}.", f"{number(n)} {things}.")


def sounds(table: dict[str, str]) -> Iterable[Exchange]:
    for animal, sound in table.items():
        yield Exchange(f"What sound does {animal} make?", f"{animal} says {sound}.")
        yield Exchange(f"Who says {sound}?", f"{sound} is what {animal} says.")
