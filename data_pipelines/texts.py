"""Texts to be spoken: questions with answers, and general sentences, as JSON lines for ``chroma-jax synthesize``.

A dialogue line has the fields ``id``, ``split``, ``kind``, ``question`` and ``answer``. An utterance line has ``id``, ``split``,
``kind`` ("sentence") and ``text``.

The splits valid and test hold two sorts of dialogues, which the id names. A held-out fact ("fact") has an answer new to train.
Facts are held out only for kinds that follow a rule, such as sums. A held-out wording ("wording") asks for an answer that train
has, in words that train lacks. Valid and test have at most `MOST_PER_KIND` dialogues per kind and sort.
"""

import collections
import dataclasses
import json
import random
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from chroma_jax.utils.atomic_io import write_whole
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.fields import Checked, HoldoutFraction, NonNegativeInt, Seed
from data_pipelines.dialogues import EMBEDDED, SPLITS, read_lines
from data_pipelines.facts import Exchange, everything, normalised, of_share
from data_pipelines.sentences import sentences

HELD_OUT = ("valid", "test")
RULES = frozenset({"sum", "difference", "product", "double", "comparison", "next", "letter", "ordinal", "calendar", "clock"})
MOST_PER_KIND = 6  # dialogues of a kind and sort in valid, and in test
WORDINGS_LEFT = 2  # wordings of a fact that train keeps when another one is held out


@dataclasses.dataclass(frozen=True)
class TextsConfig(Checked):
    """What the generator writes.

    Attributes:
        dialogues: number of train dialogues; kinds with more facts get more of them, by the square root.
        sentences: number of train sentences.
        held_out_sentences: number of sentences in valid, and in test.
        holdout_fraction: share of the answers, drawn by their words, that is held out for kinds that follow a rule.
        seed: of every random choice except that share.
        voice: of every reply and sentence, in all splits; empty lets ``synthesize`` draw voices.
    """

    dialogues: NonNegativeInt = 3100
    sentences: NonNegativeInt = 8000
    held_out_sentences: NonNegativeInt = 120
    holdout_fraction: HoldoutFraction = 0.08
    seed: Seed = 0
    voice: str = ""


def texts(config: TextsConfig, held_out: Iterable[Exchange] | None = None) -> list[dict[str, str]]:
    """Generates all lines: dialogues of every split, then sentences.

    Args:
        config: sizes, share and seed.
        held_out: dialogues whose questions and answers no line may have; the embedded corpus's test split by default.

    Returns:
        One dictionary per line, in the order of the file; equal for equal arguments.

    Raises:
        InputError: when more dialogues or sentences are asked for than the generator has.
    """
    held_out = embedded_test_split() if held_out is None else list(held_out)
    found = dialogues(config, held_out)
    lines = []
    for split, pairs in found.items():
        for i, (kind, sort, e) in enumerate(pairs):
            name = f"{split}-{kind}-{sort}-{i:05d}" if sort else f"{split}-{kind}-{i:05d}"
            lines.append({"id": name, "split": split, "kind": kind, "question": e.question, "answer": e.answer})
    wanted = {"train": config.sentences} | dict.fromkeys(HELD_OUT, config.held_out_sentences if config.sentences else 0)
    excluded = {normalised(text) for e in held_out for text in e} | {
        normalised(e[f]) for e in lines for f in ("question", "answer")
    }
    spoken = iter(sentences(sum(wanted.values()), config.seed, excluded))
    for split, count in wanted.items():
        for i in range(count):
            lines.append({"id": f"{split}-sentence-{i:05d}", "split": split, "kind": "sentence", "text": next(spoken)})
    if config.voice:
        lines = [line | {"voice" if "text" in line else "assistant_voice": config.voice} for line in lines]
    return lines


def embedded_test_split() -> list[Exchange]:
    """Questions and answers of the embedded corpus's test split, read without its recordings."""
    entries, _ = read_lines(EMBEDDED / "dialogues.jsonl", ("split", "question", "answer"))
    return [Exchange(e["question"], e["answer"]) for _, e in entries if e["split"] == "test"]


def dialogues(config: TextsConfig, held_out: Iterable[Exchange]) -> dict[str, list[tuple[str, str, Exchange]]]:
    """Divides all exchanges into splits.

    Args:
        config: sizes, share and seed.
        held_out: exchanges whose questions and answers are left out everywhere.

    Returns:
        For each split, (kind, sort, exchange), where sort is "fact", "wording" or, in train, empty.
    """
    train: dict[str, list[Exchange]] = {}
    others: dict[str, list[tuple[str, str, Exchange]]] = {split: [] for split in HELD_OUT}
    for kind, known in everything(held_out).items():
        facts = [e for e in known if kind in RULES and of_share(e, config.holdout_fraction)]
        rest = [e for e in known if kind not in RULES or not of_share(e, config.holdout_fraction)]
        wordings = held_out_wordings(rest) if config.holdout_fraction else []
        for sort, candidates in (("fact", facts), ("wording", wordings)):
            for split in HELD_OUT:
                ranked = turns(sorted((e for e in candidates if split_of(e) == split), key=rank))
                others[split] += [(kind, sort, e) for e in ranked[:MOST_PER_KIND]]
        train[kind] = rest
    asked = {normalised(e.question) for pairs in others.values() for _, _, e in pairs}
    train = {kind: [e for e in rest if normalised(e.question) not in asked] for kind, rest in train.items()}
    needed = {e.answer for pairs in others.values() for _, sort, e in pairs if sort == "wording"}
    return {"train": drawn(train, config.dialogues, config.seed, needed), **others}


def held_out_wordings(known: list[Exchange]) -> list[Exchange]:
    """One wording of each fact that train can spare, chosen by the words of its questions alone."""
    of_answer = collections.defaultdict(list)
    for e in known:
        of_answer[e.answer].append(e)
    return [min(found, key=rank) for found in of_answer.values() if len(found) > WORDINGS_LEFT]


def split_of(exchange: Exchange) -> str:
    """Valid or test, by the answer, so that the two have different facts."""
    return HELD_OUT[zlib.crc32(b"split " + normalised(exchange.answer).encode()) & 1]


def write_texts(config: TextsConfig, out: Path) -> dict[str, dict[str, int]]:
    """Writes the lines to a file, whole or not at all.

    Args:
        config: sizes, share and seed.
        out: JSON-lines file to write.

    Returns:
        Number of lines by kind and split.

    Raises:
        InputError: when ``out`` exists, or as `texts` does.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; choose another file")
    lines = texts(config)
    write_whole(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    counts: dict[str, dict[str, int]] = {}
    for line in lines:
        of_kind = counts.setdefault(line["kind"], dict.fromkeys(SPLITS, 0))
        of_kind[line["split"]] += 1
    return dict(sorted(counts.items()))


def rank(exchange: Exchange) -> int:
    return zlib.crc32(b"rank " + normalised(exchange.question).encode())


def drawn(known: Mapping[str, list[Exchange]], count: int, seed: int, needed: Collection[str]) -> list[tuple[str, str, Exchange]]:
    """Draws exchanges without repetition, in random order.

    Args:
        known: exchanges by kind; a kind's share is proportional to the square root of its size.
        count: number of exchanges to draw.
        seed: of the order of a kind's exchanges, within `turns`, and of the result.
        needed: answers that each kind draws first.

    Returns:
        (kind, "", exchange) per draw.
    """
    total = sum(map(len, known.values()))
    if count > total:
        raise InputError(f"--dialogues {count}: the generator has {total} for train; ask for fewer")
    rng = random.Random(f"dialogues {seed}")
    orders = {kind: turns(rng.sample(found, len(found)), needed) for kind, found in known.items()}
    taken = dict.fromkeys(orders, 0)
    for _ in range(count):  # the kind that is furthest behind its share is next
        open_kinds = [kind for kind in orders if taken[kind] < len(orders[kind])]
        kind = min(open_kinds, key=lambda k: (taken[k] + 1) / len(orders[k]) ** 0.5)
        taken[kind] += 1
    pairs = [(kind, "", e) for kind, order in orders.items() for e in order[: taken[kind]]]
    return rng.sample(pairs, len(pairs))


def turns(found: list[Exchange], needed: Collection[str] = ()) -> list[Exchange]:
    """Reorders exchanges so that facts come before wordings.

    The order is a first wording of the needed answers, a first one of the others, a second one of each, and so on. An answer that
    has one wording only restates a fact, so it counts as a second wording.
    """
    wordings = collections.Counter(e.answer for e in found)
    taken = {answer: -1 if answer in needed else int(count == 1) for answer, count in wordings.items()}
    turn = []
    for e in found:
        turn.append(taken[e.answer])
        taken[e.answer] = max(taken[e.answer], 0) + 1
    return [found[i] for i in sorted(range(len(found)), key=turn.__getitem__)]
