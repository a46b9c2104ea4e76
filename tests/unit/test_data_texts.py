"""Generated texts: sizes, held-out questions, one answer per question, and sentences that a synthesizer can speak."""

import collections
import json
import re

import pytest

from chroma_jax.cli import main as cli
from chroma_jax.utils.errors import InputError
from data_pipelines.dialogues import SPLITS
from data_pipelines.facts import Exchange, normalised, of_share
from data_pipelines.sentences import LONG, SHORT, inflected, sentences
from data_pipelines.texts import (
    HELD_OUT,
    MOST_PER_KIND,
    RULES,
    TextsConfig,
    embedded_test_split,
    split_of,
    texts,
    write_texts,
)

SPEAKABLE = re.compile(r"[A-Za-z][A-Za-z ,.?!'-]*[.?!]")
CONFIG = TextsConfig()


@pytest.fixture(scope="module")
def lines():
    return texts(CONFIG)


@pytest.fixture(scope="module")
def dialogues(lines):
    return {split: [e for e in lines if e["split"] == split and "question" in e] for split in SPLITS}


def words(lines, field):
    return {normalised(e[field]) for e in lines}


def test_every_line_follows_the_schema_and_can_be_spoken(lines):
    assert len({e["id"] for e in lines}) == len(lines)
    for e in lines:
        fields = ("text",) if e["kind"] == "sentence" else ("question", "answer")
        assert set(e) == {"id", "split", "kind", *fields} and e["split"] in SPLITS
        for field in fields:
            assert SPEAKABLE.fullmatch(e[field]) and "  " not in e[field] and not re.search(r"[ ,][.?!,]", e[field])


def test_dialogues_are_many_short_and_spread_over_the_kinds(dialogues):
    train = dialogues["train"]
    assert len({normalised(e["question"]) for e in train}) == len(train) == CONFIG.dialogues >= 3000
    assert max(len(e["answer"].split()) for of in dialogues.values() for e in of) <= 12
    kinds = collections.Counter(e["kind"] for e in train)
    assert len(kinds) >= 20 and min(kinds.values()) >= 30 and max(kinds.values()) < 0.1 * len(train)
    for kind in kinds:  # several wordings: the questions differ in more than the words of the fact
        starts = {" ".join(e["question"].split()[:2]) for e in train if e["kind"] == kind}
        assert len(starts) >= 2, kind
    assert len({e["answer"] for e in train if e["kind"] == "talk"}) >= 60


def test_a_question_has_one_answer_in_all_splits(dialogues):
    answers = collections.defaultdict(set)
    for e in (e for of in dialogues.values() for e in of):
        answers[normalised(e["question"])].add(e["answer"])
    assert [question for question, found in answers.items() if len(found) > 1] == []


def test_held_out_questions_are_new_and_held_out_facts_have_new_answers(dialogues):
    asked = {split: words(dialogues[split], "question") for split in SPLITS}
    assert not asked["train"] & asked["valid"] and not asked["train"] & asked["test"] and not asked["valid"] & asked["test"]
    answered = words(dialogues["train"], "answer")
    assert not words(dialogues["valid"], "answer") & words(dialogues["test"], "answer")
    for split in HELD_OUT:
        assert len(dialogues[split]) >= 150
        sorts = collections.Counter(e["id"].split("-")[2] for e in dialogues[split])
        assert set(sorts) == {"fact", "wording"} and min(sorts.values()) > 40
        by_kind = collections.Counter((e["kind"], e["id"].split("-")[2]) for e in dialogues[split])
        assert max(by_kind.values()) <= MOST_PER_KIND and len({kind for kind, _ in by_kind}) >= 20
        facts = [e["answer"] for e in dialogues[split] if e["id"].startswith(f"{split}-sum-fact")]
        assert len(facts) == MOST_PER_KIND and len(set(facts)) >= 4
        for e in dialogues[split]:
            assert split_of(Exchange(e["question"], e["answer"])) == split
            if "-fact-" in e["id"]:
                assert e["kind"] in RULES and normalised(e["answer"]) not in answered
            else:
                assert normalised(e["answer"]) in answered
    withheld = {e["answer"] for e in dialogues["train"] if e["kind"] in RULES and of_share(Exchange("", e["answer"]), 0.08)}
    assert not withheld


def test_nothing_has_the_words_of_the_corpus_test_split(lines):
    held_out = {normalised(text) for e in embedded_test_split() for text in e}
    assert len(held_out) > 80
    said = {normalised(e[field]) for e in lines for field in ("question", "answer", "text") if field in e}
    assert not said & held_out
    missing = Exchange(*next((e["question"], e["answer"]) for e in lines if "question" in e))
    without = texts(TextsConfig(sentences=0), [missing])
    assert not {normalised(missing.question), normalised(missing.answer)} & {
        normalised(e[field]) for e in without for field in ("question", "answer")
    }


def test_sentences_differ_and_have_few_words(lines):
    spoken = [e for e in lines if e["kind"] == "sentence"]
    counts = collections.Counter(e["split"] for e in spoken)
    assert counts["train"] == CONFIG.sentences and min(counts["valid"], counts["test"]) >= 100
    assert len({normalised(e["text"]) for e in spoken}) == len(spoken)
    lengths = [len(e["text"].split()) for e in spoken]
    assert min(lengths) >= SHORT[0] and max(lengths) <= LONG[1]
    assert 0.1 < sum(length < LONG[0] for length in lengths) / len(lengths) < 0.3
    vocabulary = {word for e in spoken for word in re.findall(r"[a-z']+", e["text"].lower())}
    assert len(vocabulary) >= 2500
    assert not [e["text"] for e in spoken if re.search(r"\ba (?:[aei]|o(?!ne))|\ban [^aeiouh]|~|[{}]", e["text"].lower())]


def test_there_are_twenty_thousand_sentences():
    found = sentences(20_000, seed=1)
    assert len({normalised(text) for text in found}) == 20_000


def test_the_seed_decides():
    small = TextsConfig(dialogues=50, sentences=50)
    assert texts(small) == texts(small) != texts(TextsConfig(dialogues=50, sentences=50, seed=1))


def test_verbs_are_inflected():
    forms = {
        "bake": "bakes baked baking",
        "fry": "fries fried frying",
        "chop": "chops chopped chopping",
        "see": "sees",
        "visit": "visits visited visiting",
    }
    forms |= {
        "mix": "mixes mixed mixing",
        "tie": "ties tied tying",
        "play": "plays played playing",
        "peel": "peels peeled peeling",
    }
    forms |= {"quit": "quits quitted quitting", "forget": "forgets forgetted forgetting", "swim": "swims swimmed swimming"}
    for verb, expected in forms.items():
        assert [inflected(verb, ending) for ending in ("s", "ed", "ing")][: len(expected.split())] == expected.split()


def test_nobody_is_asked_to_do_what_happens_by_accident(lines):
    text = " ".join(e["text"] for e in lines if e["kind"] == "sentence")
    assert re.search(r" lost | losing | lose ", text)
    assert not re.search(r"(?:Please|Remember to|Let us|Never|Do not|wanted to|promised to|like to) (?:lose|forget|drop) ", text)


@pytest.mark.slow
def test_sentences_have_every_english_phoneme():
    """Phonemes in the notation of hibari, where A, I, O, W and Y are the diphthongs of bay, buy, bow, now and boy."""
    hibari = pytest.importorskip("hibari")
    model, seen = hibari.Hibari(threads=1), set()
    for text in sentences(3000, seed=0):
        seen.update(*model.phonemize(text))
    assert seen >= set("pbtdkɡfvθðszʃʒhʧʤmnŋlɹwjiɪɛæɑɔʊuʌəɜAIOWY")


def test_subject_and_verb_agree(lines):
    text = " ".join(e["text"] for e in lines if e["kind"] == "sentence").replace("If I were", "If").lower()
    wrong = {"i": "is|are|has|does|were", "we|they|you": "is|am|was|has|does", "he|she": "am|are|have|were"}
    for subject, verbs in wrong.items():
        assert not re.search(rf"[.?!] (?:{subject}) (?:{verbs}) ", text)


def test_the_command_writes_lines_and_counts_them(tmp_path, capsys):
    out = tmp_path / "texts.jsonl"
    assert cli.main(["texts", str(out), "--dialogues", "40", "--sentences", "20"]) == 0
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert written == texts(TextsConfig(dialogues=40, sentences=20))
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert table["kind"] == list(SPLITS) and table["sentence"] == ["20", "120", "120"]
    assert cli.main(["texts", str(out)]) == 2 and "exists already" in capsys.readouterr().err


def test_impossible_requests_are_named(tmp_path):
    with pytest.raises(InputError, match=r"--dialogues 100000: the generator has \d+ for train"):
        write_texts(TextsConfig(dialogues=100_000), tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"holdout_fraction is 0.5, expected a number, at least 0, below 0.5"):
        TextsConfig(holdout_fraction=0.5)
    with pytest.raises(InputError, match="sentences is -1, expected a whole number, at least 0"):
        TextsConfig(sentences=-1)
    assert not (tmp_path / "a.jsonl").exists()


def test_a_given_voice_speaks_every_reply_and_sentence():
    lines = texts(TextsConfig(dialogues=200, sentences=20, held_out_sentences=5, voice="v0003"))
    assert all(e["voice" if "text" in e else "assistant_voice"] == "v0003" and "user_voice" not in e for e in lines)
