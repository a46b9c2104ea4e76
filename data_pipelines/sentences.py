"""General English sentences for speech synthesis, drawn from patterns and a vocabulary (``sentences.toml``).

Most sentences have a subject and an action of one domain, such as the kitchen or the farm, so that they make sense. Others name
numbers, places, dates, things and opinions. A share of them are short, as replies are.
"""

import dataclasses
import random
import re
import tomllib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from chroma_jax.utils.errors import InputError
from data_pipelines.facts import DAYS, MONTHS, ORDINALS, TABLES, normalised, number

GRAMMAR = Path(__file__).with_name("sentences.toml")
LONG = (5, 16)  # words of a sentence
SHORT = (2, 5)  # words of a reply
SHARES = {"actions": 0.45, "commands": 0.10, "general": 0.30, "replies": 0.15}
TRIES = 40  # draws per sentence before the generator counts as exhausted
SLOT = re.compile(r"\{(\w+?)(\d*)\}")
VOWEL_SOUND = re.compile(r"\b([Aa]) (?=(?:[aeiou]|hour|honest)(?!ne\b))(?!uni[cfvq]|use|usu|one\b|euro)", re.IGNORECASE)
INTENT = re.compile(r"base_|like to|wanted|promised|forgot|going to|must|Should|Could|can |had to|used to|\{how\}")
DOUBLED = frozenset({"forget"})  # verbs of more than one syllable that double their last letter


@dataclasses.dataclass(frozen=True)
class Subject:
    """A subject of a sentence.

    Attributes:
        words: such as "my brother".
        possessive: such as "his".
        singular: whether its verbs take an s in the present.
    """

    words: str
    possessive: str
    singular: bool


@dataclasses.dataclass(frozen=True)
class Action:
    """The five forms of a verb, and one of its objects.

    Attributes:
        object: what follows the verb; a tilde stands for the subject's possessive.
        accidental: whether nobody intends the action, such as losing a key.
    """

    base: str
    present: str
    past: str
    participle: str
    gerund: str
    object: str
    accidental: bool


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The parsed tables.

    Attributes:
        domains: for each domain, its places and its actions (one list of alternatives per verb).
        subjects: all subjects, names included.
        words: lists of words by the name of their slot.
        patterns: for each group, the patterns and their weights.
    """

    domains: tuple[tuple[tuple[str, ...], tuple[tuple[Action, ...], ...]], ...]
    subjects: tuple[Subject, ...]
    words: dict[str, Sequence[str]]
    patterns: dict[str, tuple[tuple[str, ...], tuple[int, ...]]]


def read_grammar() -> Grammar:
    """Reads ``sentences.toml``, and country and city names, months and numbers from the tables of facts."""
    tables = tomllib.loads(GRAMMAR.read_text(encoding="utf-8"))
    facts = tomllib.loads(TABLES.read_text(encoding="utf-8"))
    subjects = [Subject(w, p, s == "s") for w, p, s in (line.split("|") for line in tables["subjects"]["list"])]
    subjects += [Subject(name, "his", True) for name in tables["subjects"]["male"]]
    subjects += [Subject(name, "her", True) for name in tables["subjects"]["female"]]
    words = dict(tables["words"])
    words |= {"day": DAYS, "month": MONTHS, "ordinal": ORDINALS, "country": list(facts["capitals"])}
    words |= {"city": list(facts["capitals"].values()), "color": list(facts["colors"])}
    words |= {"small": [number(n) for n in range(2, 21)], "old": [number(n) for n in range(60, 100)]}
    words |= {"hour": [number(n) for n in range(1, 13)], "woman": tables["subjects"]["female"]}
    words["name"] = [*tables["subjects"]["male"], *tables["subjects"]["female"]]
    domains = tuple((tuple(d["places"]), tuple(actions(line) for line in d["actions"])) for d in tables["domains"])
    patterns = {group: tuple(zip(*((p, w) for w, p in found))) for group, found in tables["patterns"].items()}
    return Grammar(domains, tuple(subjects), words, patterns)


def actions(line: str) -> tuple[Action, ...]:
    """Parses "take/took/taken: a photograph; a nap": the irregular forms of a verb as far as needed, then its objects."""
    verb, objects = line.split(":")
    base, *irregular = verb.removeprefix("!").split("/")
    past, participle = irregular or [inflected(base, "ed")] * 2
    forms = (base, inflected(base, "s"), past, participle, inflected(base, "ing"))
    return tuple(Action(*forms, o.strip(), verb.startswith("!")) for o in objects.split(";"))


def inflected(verb: str, ending: str) -> str:
    """A regular form of a verb: "s", "ed" or "ing"."""
    consonant_y = verb.endswith("y") and verb[-2] not in "aeiou"
    if ending == "s":
        if consonant_y:
            return verb[:-1] + "ies"
        return verb + ("es" if verb.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")
    if ending == "ed" and consonant_y:
        return verb[:-1] + "ied"
    if ending == "ing" and verb.endswith("ie"):
        return verb[:-2] + "ying"
    if verb.endswith("e") and not (ending == "ing" and verb.endswith("ee")):
        return verb[:-1] + ending
    one_syllable = re.fullmatch(r"(?:qu|[^aeiou])*[aeiouy][^aeiouwxy]", verb)
    return verb + (verb[-1] if one_syllable or verb in DOUBLED else "") + ending


class Sentence:
    """Fills the slots of one pattern.

    A slot is looked up among the subject and action of the sentence, then among the word lists. The same slot with another
    digit gets another word. A slot with a capital letter gets its words capitalized.
    """

    def __init__(self, grammar: Grammar, rng: random.Random, numbers: Callable[[], str]):
        self.grammar, self.rng, self.numbers = grammar, rng, numbers
        places, verbs = rng.choice(grammar.domains)
        self.places = rng.sample(places, 2)
        self.subjects = rng.sample(grammar.subjects, 2)
        self.actions = [rng.choice(found) for found in rng.sample(verbs, 2)]
        self.used: dict[str, list[str]] = {}

    def fill(self, pattern: str) -> str:
        """Returns the sentence, with its first letter capitalized and "an" before vowels."""
        text = SLOT.sub(self.slot, pattern)
        text = VOWEL_SOUND.sub(r"\1n ", text)
        return text[:1].upper() + text[1:]

    def slot(self, match: re.Match) -> str:
        name, digit = match.groups()
        lower = name[0].lower() + name[1:]
        second = int(digit == "2")
        found = self.of_action(name, second)
        if found is None:
            found = self.of_action(lower, second)
        if found is None:
            found = self.word(lower)
        return found[0].upper() + found[1:] if name != lower and name != "S" else found

    def of_action(self, name: str, second: int) -> str | None:
        subject, action = self.subjects[second], self.actions[second]
        verb, _, owner = name.partition("_")
        first, plural = subject.words == "I", not subject.singular
        forms = {
            "base": action.base,
            "pres": action.present if subject.singular else action.base,
            "past": action.past,
            "part": action.participle,
            "ing": action.gerund,
        }
        if verb in forms:
            possessive = {"you": "your", "we": "our"}.get(owner, subject.possessive)
            return f"{forms[verb]} {action.object}".replace("~", possessive)
        agreeing = {
            "S": subject.words,
            "s": subject.words,
            "who": subject.words,
            "place": self.places[second],
            "be": "am" if first else "are" if plural else "is",
            "was": "were" if plural and not first else "was",
            "have": "have" if plural else "has",
            "do": "do" if plural else "does",
        }
        return agreeing.get(name)

    def word(self, name: str) -> str:
        """A word of a list that the sentence does not have yet."""
        if name == "number":
            return self.numbers()
        used = self.used.setdefault(name, [])
        choice = self.rng.choice([w for w in self.grammar.words[name] if w not in used])
        used.append(choice)
        return choice


def sentences(count: int, seed: int, excluded: Collection[str] = ()) -> list[str]:
    """Draws different sentences, in random order.

    Args:
        count: number of sentences.
        seed: of every random choice.
        excluded: normalized texts that must not occur.

    Returns:
        Sentences of 5 to 16 words, and replies of 2 to 5 words, none equal to another one when normalized.

    Raises:
        InputError: when the grammar has fewer sentences.
    """
    grammar, rng = read_grammar(), random.Random(f"sentences {seed}")
    order = iter(())

    def numbers() -> str:
        nonlocal order
        n = next(order, None)
        if n is None:
            order = iter(rng.sample(range(1000), 1000))
            n = next(order)
        return number(n)

    seen, found = set(excluded), []
    groups = rng.choices(list(SHARES), list(SHARES.values()), k=count)
    for group in groups:
        patterns, weights = grammar.patterns[group]
        low, high = SHORT if group == "replies" else LONG
        for _ in range(TRIES):
            pattern, sentence = rng.choices(patterns, weights)[0], Sentence(grammar, rng, numbers)
            if INTENT.search(pattern) and any(action.accidental for action in sentence.actions):
                continue
            text = sentence.fill(pattern)
            key = normalised(text)
            if key not in seen and low <= len(text.split()) <= high:
                break
        else:
            raise InputError(f"--sentences: the grammar has no more than about {len(found)} different sentences; ask for fewer")
        seen.add(key)
        found.append(text)
    return found
