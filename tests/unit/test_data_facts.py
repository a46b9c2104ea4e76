"""Exchanges in text alone: they are right, agree with the corpus, hold nothing of what is held out, and are laid out as asked."""

import collections
import re

import numpy as np
import pytest
from tiny_corpus import MODEL

from data_pipelines import curriculum
from data_pipelines.curriculum import CurriculumConfig
from data_pipelines.dialogues import read_corpus
from data_pipelines.facts import Exchange, exchanges, normalised, number, withheld
from data_pipelines.pack import conversation, pack_config, spread
from data_pipelines.prepare import feature_config

EVERYTHING = exchanges()


@pytest.fixture(scope="module")
def corpus():
    return read_corpus("embedded")


@pytest.fixture(scope="module")
def held_out(corpus):
    return [Exchange(d.question, d.answer) for d in corpus.dialogues if d.split == "test"]


def test_no_question_or_answer_of_the_test_split_is_taught(corpus, held_out):
    config = CurriculumConfig(dialogue=0.0, facts=4000, pseudo_speech=0.5)
    examples = curriculum.sample_examples(corpus, "train", config, 3, 0, {})
    assert len(examples) == 3 * 4000
    asked = {normalised(e.said or e.pseudo_speech) for e in examples}
    answered = {normalised(e.answer) for e in examples}
    texts = {normalised(text) for text in curriculum.written(corpus, config)}
    for e in held_out:
        assert normalised(e.question) not in asked | texts and normalised(e.answer) not in answered | texts
    # nothing is left out but that, and it would have been there
    kept = {e for of in exchanges(held_out).values() for e in of}
    gone = {e for of in EVERYTHING.values() for e in of} - kept
    assert len(gone) > 20 and asked <= {normalised(e.question) for e in kept}
    ours = {normalised(e.question) for e in held_out} | {normalised(e.answer) for e in held_out}
    assert all({normalised(e.question), normalised(e.answer)} & ours for e in gone)


def test_case_and_punctuation_do_not_hide_what_is_held_out():
    odd = Exchange("what is  FORTY-TWO", "nothing"), Exchange("nothing", "seven plus  one, is eight")
    found = exchanges([*odd, Exchange("what number comes after -- forty-five", "x")])
    questions = {e.question for of in found.values() for e in of}
    assert "What number comes after forty-five?" not in questions and "What is seven plus one?" not in questions
    assert "What is one plus seven?" in questions and "What number comes after forty-six?" in questions


def test_what_is_withheld_is_not_taught_and_is_the_same_whatever_is_held_out(corpus, held_out):
    config = CurriculumConfig(dialogue=0.0, facts=4000, pseudo_speech=0.5, holdout_fraction=0.1)
    kept = withheld(0.1, held_out)
    asked = {normalised(e.question) for of in kept.values() for e in of}
    answered = {normalised(e.answer) for of in kept.values() for e in of}
    examples = curriculum.sample_examples(corpus, "train", config, 3, 0, {})
    assert not {normalised(e.said or e.pseudo_speech) for e in examples} & asked
    assert not ({normalised(e.answer) for e in examples} | {normalised(t) for t in curriculum.written(corpus, config)}) & answered
    everything, taught = ({k: set(v) for k, v in exchanges(held_out, share).items()} for share in (0.0, 0.1))
    assert all(everything[kind] == taught[kind] | set(kept[kind]) for kind in everything)
    assert 0.05 < sum(map(len, kept.values())) / sum(map(len, everything.values())) < 0.2
    # it does not depend on what is held out, grows with the share, and can be without what the corpus has
    flat = lambda found: {e for of in found.values() for e in of}
    assert flat(kept) <= flat(withheld(0.1)) <= flat(withheld(0.3)) and not flat(withheld(0.0))
    said = {normalised(text) for d in corpus.dialogues for text in (d.question, d.answer)}
    unknown = flat(withheld(0.1, held_out, [Exchange(d.question, d.answer) for d in corpus.dialogues]))
    assert unknown < flat(kept) and not {normalised(text) for e in unknown for text in e} & said


def test_they_answer_as_the_corpus_does(corpus):
    known = {normalised(e.question): e.answer for of in EVERYTHING.values() for e in of}
    same = [d for d in corpus.dialogues if normalised(d.question) in known]
    assert len({d.question for d in same}) > 380
    for d in same:
        assert known[normalised(d.question)] == d.answer


def test_a_question_has_one_answer():
    answers = collections.defaultdict(set)
    for of in EVERYTHING.values():
        for e in of:
            answers[normalised(e.question)].add(e.answer)
    assert not [q for q, found in answers.items() if len(found) > 1]


def test_sums_differences_and_successors_are_right():
    value = {number(n): n for n in range(1000)}
    assert len(value) == 1000 and number(26) == "twenty-six" and number(365) == "three hundred sixty-five"
    checked = 0
    for e in EVERYTHING["sum"] + EVERYTHING["difference"] + EVERYTHING["next"]:
        if found := re.fullmatch(r"What is (\S+) (plus|minus) (\S+)\?", e.question):
            a, sign, b = found.groups()
            result = value[a] + value[b] * (1 if sign == "plus" else -1)
            assert e.answer.lower() == f"{a} {sign} {b} is {number(result)}."
        elif found := re.fullmatch(r"What number comes (after|before) (\S+)\?", e.question):
            side, a = found.groups()
            assert e.answer.lower() == f"{number(value[a] + (1 if side == 'after' else -1))} comes {side} {a}."
        else:
            continue
        checked += 1
    assert checked > 500


def test_every_kind_is_drawn_and_small_ones_more_often_than_their_size(corpus):
    config = CurriculumConfig(dialogue=0.0, facts=5000)
    drawn = collections.Counter(e.id.split()[1] for e in curriculum.sample_examples(corpus, "train", config, 1, 0, {}))
    sizes = {kind: len(found) for kind, found in EVERYTHING.items()}
    assert drawn.keys() == sizes.keys()
    small, large = min(sizes, key=sizes.get), max(sizes, key=sizes.get)
    assert drawn[small] / sizes[small] > 1.5 * drawn[large] / sizes[large]


def test_imagined_speech_is_spelled_as_the_encoder_would():
    rng = np.random.default_rng(0)
    tokens, blank = [5, 6, 6, 9], 0
    seen = [spread(tokens, blank, rng) for _ in range(200)]
    assert {len(s) for s in seen} >= {6, 12, 20}
    for s in seen:
        assert [t for t, before in zip(s, [blank, *s]) if t not in (blank, before)] in ([5, 6, 9], tokens)
        assert set(s) <= {*tokens, blank}
    c, packing = MODEL.tokens, pack_config(MODEL, feature_config(MODEL))
    encode = lambda text: list(text.encode())
    given = {"answer_text": "Four.", "answer_codes": None, "encode": encode, "config": packing}
    pseudo_speech = conversation("i", wave=None, pseudo_speech=[7, 7, 0, 8], **given)
    start = list(pseudo_speech.text).index(c.audio_start)
    assert list(pseudo_speech.text[start : start + 6]) == [c.audio_start, 7, 7, 0, 8, c.audio_end]
    assert not len(pseudo_speech.wave) and (pseudo_speech.audio_index < 0).all() and not len(pseudo_speech.ctc_target)
    assert list(pseudo_speech.answer_token) == [*encode("Four."), c.im_end]
