"""Questions and answers in text alone, made of general knowledge and of arithmetic, for a text model to learn the corpus's
domain by its rules: sums in both orders, capitals and opposites both ways, days and months before and after, in several wordings.
Most wordings of a fact share one answer, in the form that the corpus uses. A few have a form of their own, so that a fact whose
usual answer is held out can still be read in other words.

What is held out stays so: `exchanges` leaves out whatever has the words of a held-out question or of its answer. The fact itself
may be there in other words, as it would be in what a language model has read; so a right answer shows that a question that was
never seen is understood and answered in the form that was learnt, not that its fact was found out.

To choose a recipe by, a share of them can be withheld from training in just that way: see `withheld`.
"""

import itertools
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
LETTERS = "BCDEFGHIJKLMNOPQRSTUVWXYZ"  # without A, which a speech synthesizer reads as the article
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"),
    *("thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth", "twentieth"),
)
SEASONS = ("Spring", "Summer", "Fall", "Winter")
LARGEST = 12  # of the numbers that are added and taken away


class Exchange(NamedTuple):
    question: str
    answer: str


def normalised(text: str) -> str:
    """Lower case, letters and digits alone, one space between words: what makes two texts the same."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def exchanges(held_out: Iterable[Exchange] = (), holdout_fraction: float = 0.0) -> dict[str, list[Exchange]]:
    """Every exchange by its kind, without those whose question or answer is one of ``held_out``, and without the share
    ``holdout_fraction`` of all answers, the same ones whatever is held out."""
    return {kind: [e for e in found if not of_share(e, holdout_fraction)] for kind, found in everything(held_out).items()}


def withheld(share: float, held_out: Iterable[Exchange] = (), known: Iterable[Exchange] = ()) -> dict[str, list[Exchange]]:
    """What ``exchanges`` leaves out for ``holdout_fraction = share``, by kind, without what has the words of one of ``known``."""
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
        "product": products(),
        "double": doubles(),
        "comparison": comparisons(),
        "next": successors(),
        "ordinal": ordinals(),
        "letter": letters(),
        "calendar": calendar(),
        "clock": clock(),
        "capital": capitals(tables["capitals"]),
        "country": countries(tables["capitals"]),
        "continent": continents(tables["continents"]),
        "language": languages(tables["languages"]),
        "opposite": opposites(tables["opposites"]["pairs"]),
        "color": colors(tables["colors"]),
        "count": counts(tables["counts"]),
        "sound": sounds(tables["sounds"]),
        "young": young(tables["young"]),
        "home": homes(tables["homes"]),
        "group": groups(tables["groups"]),
        "work": work(tables["work"]),
        "plural": plurals(tables["plurals"]["pairs"]),
        "past": pasts(tables["pasts"]["pairs"]),
        "talk": talk(tables["talk"]["turns"]),
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


def asked(answer: str, *questions: str) -> Iterable[Exchange]:
    """One answer to several wordings of a question."""
    return (Exchange(question, answer) for question in questions)


def sums() -> Iterable[Exchange]:
    for x in range(LARGEST + 1):
        for y in range(LARGEST + 1):
            a, b, c = number(x), number(y), number(x + y)
            yield from asked(f"{a} plus {b} is {c}.", f"What is {a} plus {b}?", f"How much is {a} plus {b}?")
            yield from asked(f"{a} plus {b} is {c}.", f"Can you tell me what {a} plus {b} is?", f"Please add {a} and {b}.")
            yield Exchange(f"Add {b} to {a}.", f"{a} and {b} make {c}.")


def differences() -> Iterable[Exchange]:
    for x in range(2 * LARGEST + 1):
        for y in range(max(0, x - LARGEST), min(x, LARGEST) + 1):
            a, b, c = number(x), number(y), number(x - y)
            yield from asked(f"{a} minus {b} is {c}.", f"What is {a} minus {b}?", f"How much is {a} minus {b}?")
            yield from asked(f"{a} minus {b} is {c}.", f"What is left when you take {b} away from {a}?")
            yield Exchange(f"Take {b} from {a}.", f"{b} from {a} leaves {c}.")


def products() -> Iterable[Exchange]:
    for x in range(LARGEST + 1):
        for y in range(11):
            a, b, c = number(x), number(y), number(x * y)
            yield from asked(f"{a} times {b} is {c}.", f"What is {a} times {b}?", f"How much is {a} times {b}?")
            yield from asked(f"{a} times {b} is {c}.", f"Multiply {a} by {b}.")


def doubles() -> Iterable[Exchange]:
    for n in range(1, 51):
        a, b = number(n), number(2 * n)
        yield from asked(f"Twice {a} is {b}.", f"What is twice {a}?", f"What is the double of {a}?", f"Double {a}.")
        yield from asked(f"Half of {b} is {a}.", f"What is half of {b}?", f"How much is half of {b}?", f"Divide {b} by two.")


def comparisons() -> Iterable[Exchange]:
    """Each number up to fifty compared with three others, asked in either order."""
    for x in range(50):
        for y in (x + 1, x + 2 + x % 3, x + 6 + x % 7):
            a, b = number(x), number(y)
            first, second = (a, b) if (x + y) % 2 else (b, a)
            yield from asked(f"{b} is larger than {a}.", f"Which is larger, {first} or {second}?")
            yield from asked(f"{b} is larger than {a}.", f"Which number is bigger, {second} or {first}?")
            yield from asked(f"{b} is larger than {a}.", f"Is {second} or {first} the larger number?")
            yield from asked(f"{a} is smaller than {b}.", f"Which is smaller, {second} or {first}?")
            yield from asked(f"{a} is smaller than {b}.", f"Which number is less, {first} or {second}?")
            yield from asked(f"{a} is smaller than {b}.", f"Is {first} or {second} the smaller number?")


def successors() -> Iterable[Exchange]:
    for n in range(100):
        a, b, c = number(n), number(n + 1), number(n + 2)
        after, before = f"{b} comes after {a}.", f"{a} comes before {b}."
        yield from asked(after, f"What number comes after {a}?", f"Which number follows {a}?", f"What comes right after {a}?")
        yield from asked(before, f"What number comes before {b}?", f"Which number is just before {b}?")
        yield from asked(before, f"What comes right before {b}?")
        yield Exchange(f"Count from {a} to {c}.", f"{a}, {b}, {c}.")


def ordinals() -> Iterable[Exchange]:
    for a, b in itertools.pairwise(ORDINALS):
        yield from asked(f"The {b} comes after the {a}.", f"What comes after the {a}?", f"Which one follows the {a}?")
        yield from asked(f"The {b} comes after the {a}.", f"Who is next after the {a}?")
    for n, month in enumerate(MONTHS):
        answer = f"{month} is the {ORDINALS[n]} month."
        yield from asked(answer, f"Which is the {ORDINALS[n]} month of the year?", f"What is the {ORDINALS[n]} month?")
        yield from asked(answer, f"Name the {ORDINALS[n]} month of the year.")


def letters() -> Iterable[Exchange]:
    for a, b in itertools.pairwise(LETTERS):
        after, before = f"{b} comes after {a}.", f"{a} comes before {b}."
        yield from asked(after, f"What letter comes after {a}?", f"Which letter follows {a}?", f"Name the letter after {a}.")
        yield from asked(before, f"What letter comes before {b}?", f"Which letter is just before {b}?")
        yield from asked(before, f"Name the letter before {b}.")


def calendar() -> Iterable[Exchange]:
    for what, names in (("day", DAYS), ("month", MONTHS), ("season", SEASONS)):
        for i, a in enumerate(names):
            b, c = names[(i + 1) % len(names)], names[(i + 2) % len(names)]
            spoken = (a, b, c) if what != "season" else (a.lower(), b.lower(), c.lower())
            x, y, z = spoken
            after, before = f"{b} comes after {x}.", f"{a} comes before {y}."
            yield from asked(
                after, f"What {what} comes after {x}?", f"Tell me the {what} after {x}.", f"Name the {what} after {x}."
            )
            yield from asked(before, f"What {what} comes before {y}?", f"Tell me the {what} before {y}.")
            yield from asked(before, f"Which {what} is just before {y}?", f"Name the {what} before {y}.")
            yield Exchange(f"Which {what} follows {x}?", f"{b} follows {x}.")
            yield Exchange(f"Which {what} is between {x} and {z}?", f"{b} is between {x} and {z}.")
            yield Exchange(f"Count the {what}s from {x} to {z}.", f"{a}, {y}, {z}.")
    for i, a in enumerate(DAYS):
        b, c = DAYS[(i + 1) % 7], DAYS[(i + 2) % 7]
        yield from asked(f"Tomorrow is {b}.", f"Today is {a}. What day is tomorrow?", f"If today is {a}, what is tomorrow?")
        yield from asked(f"Yesterday was {a}.", f"Today is {b}. What day was yesterday?", f"If today is {b}, what was yesterday?")
        yield from asked(f"Two days after {a} is {c}.", f"What day is two days after {a}?", f"Which day is two days after {a}?")


def clock() -> Iterable[Exchange]:
    for hour in range(12):
        for ahead in (1, 2, 3):
            a, b, hours = (
                number(hour + 1),
                number((hour + ahead) % 12 + 1),
                "one hour" if ahead == 1 else f"{number(ahead)} hours",
            )
            after, before = f"{hours} after {a} o'clock is {b} o'clock.", f"{hours} before {b} o'clock is {a} o'clock."
            yield from asked(after, f"What time is it {hours} after {a} o'clock?")
            yield from asked(after, f"It is {a} o'clock. What time is it in {hours}?")
            yield from asked(after, f"Tell me the time {hours} after {a} o'clock.")
            yield from asked(before, f"What time is it {hours} before {b} o'clock?")
            yield from asked(before, f"It is {b} o'clock. What time was it {hours} ago?")
            yield from asked(before, f"Tell me the time {hours} before {b} o'clock.")


def capitals(table: dict[str, str]) -> Iterable[Exchange]:
    for country, city in table.items():
        answer = f"The capital of {country} is {city}."
        yield from asked(answer, f"What is the capital of {country}?", f"What is the capital city of {country}?")
        yield from asked(answer, f"Which city is the capital of {country}?", f"Can you tell me the capital of {country}?")
        yield Exchange(f"Name the capital of {country}.", f"{country} has {city} as its capital.")


def countries(table: dict[str, str]) -> Iterable[Exchange]:
    for country, city in table.items():
        answer = f"{city} is the capital of {country}."
        yield from asked(answer, f"Which country has {city} as its capital?", f"What country is {city} the capital of?")
        yield from asked(answer, f"{city} is the capital of which country?")
        yield Exchange(f"In which country is {city}?", f"{city} is in {country}.")


def continents(table: dict[str, list[str]]) -> Iterable[Exchange]:
    for continent, found in table.items():
        for country in found:
            answer = f"{country} is in {continent}."
            yield from asked(answer, f"On which continent is {country}?", f"What continent is {country} in?")
            yield from asked(answer, f"Which continent does {country} belong to?")


def languages(table: dict[str, list[str]]) -> Iterable[Exchange]:
    for language, found in table.items():
        for country in found:
            answer = f"People speak {language} in {country}."
            yield from asked(answer, f"What language do people speak in {country}?", f"Which language is spoken in {country}?")
            yield from asked(answer, f"What do the people of {country} speak?")


def opposites(pairs: list[list[str]]) -> Iterable[Exchange]:
    """A word with several opposites has its first one for an answer."""
    of: dict[str, str] = {}
    for a, b in [*pairs, *((b, a) for a, b in pairs)]:
        of.setdefault(a, b)
    for a, b in of.items():
        answer = f"The opposite of {a} is {b}."
        yield from asked(answer, f"What is the opposite of {a}?", f"Which word is the opposite of {a}?")
        yield from asked(answer, f"Tell me the opposite of {a}.")
        yield Exchange(f"Name the opposite of {a}.", f"{a} and {b} are opposites.")


def colors(table: dict[str, list[str]]) -> Iterable[Exchange]:
    for color, things in table.items():
        for thing in things:
            yield from asked(f"{thing} is {color}.", f"What color is {thing}?", f"Tell me the color of {thing}.")
            yield from asked(f"{thing} is {color}.", f"What is the color of {thing}?")
            yield Exchange(f"Which color does {thing} have?", f"The color of {thing} is {color}.")


def counts(table: dict[str, list]) -> Iterable[Exchange]:
    for what, n, whose in table["are"]:
        verb = "is" if n == 1 else "are"
        answer = f"There {verb} {number(n)} {what} in {whose}."
        yield from asked(answer, f"How many {what} are in {whose}?", f"How many {what} are there in {whose}?")
        yield from asked(answer, f"Tell me how many {what} are in {whose}.")
        yield Exchange(f"How many {what} make {whose}?", f"{number(n)} {what} make {whose}.")
    for what, n, whose in table["has"]:
        things = what.removesuffix("s") if n == 1 else what
        answer = f"{whose} has {number(n)} {things}."
        yield from asked(answer, f"How many {what} does {whose} have?", f"Tell me how many {what} {whose} has.")
        yield from asked(answer, f"What number of {what} does {whose} have?")
        yield Exchange(f"Count the {what} of {whose}.", f"{number(n)} {things}.")


def sounds(table: dict[str, str]) -> Iterable[Exchange]:
    for animal, sound in table.items():
        answer = f"{animal} says {sound}."
        yield from asked(
            answer, f"What sound does {animal} make?", f"What does {animal} say?", f"Which sound does {animal} make?"
        )
        yield Exchange(f"Who says {sound}?", f"{sound} is what {animal} says.")


def young(table: dict[str, str]) -> Iterable[Exchange]:
    for animal, child in table.items():
        answer = f"A young {animal} is {'an' if child[0] in 'aeio' else 'a'} {child}."
        yield from asked(answer, f"What is a young {animal} called?", f"What do you call a young {animal}?")
        yield from asked(answer, f"What is the name for a young {animal}?")


def homes(table: dict[str, str]) -> Iterable[Exchange]:
    for animal, home in table.items():
        yield from asked(f"{animal} lives {home}.", f"Where does {animal} live?", f"Tell me where {animal} lives.")
        yield from asked(f"{animal} lives {home}.", f"Where is the home of {animal}?")


def groups(table: dict[str, list[str]]) -> Iterable[Exchange]:
    for group, things in table.items():
        for thing in things:
            yield from asked(f"{thing} is {group}.", f"What is {thing}?", f"What kind of thing is {thing}?")
            yield from asked(f"{thing} is {group}.", f"Tell me what {thing} is.")


def work(table: dict[str, str]) -> Iterable[Exchange]:
    for person, does in table.items():
        verb, rest = does.split(" ", 1)
        base = "fly" if verb == "flies" else verb[: -2 if verb.endswith(("ches", "xes")) else -1]
        yield from asked(f"{person} {does}.", f"Who {does}?", f"What does {person} do?", f"Who is it that {does}?")
        yield from asked(f"Yes, {person} {does}.", f"Does {person} {base} {rest}?", f"Is it true that {person} {does}?")


def plurals(pairs: list[list[str]]) -> Iterable[Exchange]:
    for one, many in pairs:
        answer = f"The plural of {one} is {many}."
        yield from asked(answer, f"What is the plural of {one}?", f"Tell me the plural of {one}.")
        yield from asked(answer, f"How do you say {one} in the plural?")
        yield Exchange(f"What do you call more than one {one}?", f"One {one}, two {many}.")


def pasts(pairs: list[list[str]]) -> Iterable[Exchange]:
    for now, past in pairs:
        answer = f"The past of {now} is {past}."
        yield from asked(answer, f"What is the past of {now}?", f"What is the past tense of {now}?")
        yield from asked(answer, f"How do you say {now} in the past?")


def talk(turns: list[list[str]]) -> Iterable[Exchange]:
    """Turns of small talk: an answer, then what it answers."""
    for answer, *questions in turns:
        yield from asked(answer, *questions)
