"""Which conversations are made of a corpus, in which voices, and how often: the training examples before they are laid out.

The corpus's dialogues are what a speaking model is for. What else can be made of the same recordings teaches it the parts of
that: hearing (write down what is said), knowing (answer in text alone), speaking (read a text aloud), and keeping a voice (go on
speaking without a text, which needs no transcript). What is to be known beyond the dialogues is in `data_pipelines.facts`.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from chroma_jax.audio.load import Clip
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.fields import Checked, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, Speed
from data_pipelines.dialogues import SPLITS, Corpus
from data_pipelines.facts import Exchange, exchanges, normalised
from data_pipelines.recordings import SOUNDS

WRITE_DOWN = "Write down what I say."
READ_ALOUD = "Say: "


@dataclasses.dataclass(frozen=True)
class CurriculumConfig(Checked):
    """Which examples a pass over the train split has. The valid and test splits have each dialogue once, and each utterance read
    aloud.

    Attributes:
        dialogue: How often a pass has each dialogue; below 1, the fraction of them that is drawn.
        speech_qa: The same for dialogues whose spoken question is answered in text alone.
        asr: The same for recordings that are transcribed.
        text_qa: The same for dialogues in text alone.
        tts: The same for recordings whose text is read aloud.
        continuation: The same for recordings that are continued from somewhere within.
        unwritten: Folders of recordings without transcripts, each of which is continued once per pass.
        facts: Number of text-only exchanges of `data_pipelines.facts` per pass; none has the words of a held-out question or
            answer.
        holdout_fraction: Fraction of the facts' answers that is held out to choose a recipe by, see
            `chroma_jax.evaluation.knowledge`.
        pseudo_speech: Fraction of the text-only questions laid out as speech is, with tokens in place of the audio encoder's
            outputs.
        prompts: "references" for the voice's own references; "any" for one or more recordings of the voice.
        prompt_seconds: Maximum length of a prompt of any recordings in seconds.
        no_prompt: Fraction of spoken replies without a voice prompt.
        speeds: Playback speeds, drawn per example for the user, and for a reply together with its prompt.
        piece_seconds: Maximum length of a continued stretch in seconds.
        max_voices: Number of voices, in alphabetical order, that speak replies; 0 for all.
    """

    dialogue: NonNegativeFloat = 1.0
    speech_qa: NonNegativeFloat = 0.0
    asr: NonNegativeFloat = 0.0
    text_qa: NonNegativeFloat = 0.0
    tts: NonNegativeFloat = 0.0
    continuation: NonNegativeFloat = 0.0
    unwritten: tuple[str, ...] = ()
    facts: NonNegativeInt = 0
    holdout_fraction: Fraction = 0.0
    pseudo_speech: Fraction = 0.0
    prompts: Literal["references", "any"] = "references"
    prompt_seconds: PositiveFloat = 8.0
    no_prompt: NonNegativeFloat = 0.0
    speeds: tuple[Speed, ...] = (1.0,)
    piece_seconds: PositiveFloat = 9.0
    max_voices: NonNegativeInt = 0

    def __post_init__(self):
        super().__post_init__()
        if not self.speeds:
            raise ValueError("speeds is empty, expected at least one")


class SpokenText(NamedTuple):
    """A recording and what is said in it."""

    path: Path
    text: str
    seconds: float = 0.0


class Example(NamedTuple):
    """A conversation to be laid out.

    heard, transcription: the user's recording, and what is said in it. pseudo_speech: what the user is to have said, without a
    recording. said: what the user writes. answer: the text of the reply,
    None where only sound is wanted. prompt, transcript: recordings of the voice prompt, and what is said in them. reply:
    recording of the reply, None where only text is wanted. piece: for a recording that is continued, where (of its length) its
    prompt begins and ends and its reply ends.
    """

    id: str
    heard: Clip | None = None
    transcription: str = ""
    pseudo_speech: str = ""
    said: str = ""
    answer: str | None = None
    prompt: tuple[Clip, ...] = ()
    transcript: str = ""
    reply: Clip | None = None
    piece: tuple[float, float, float] | None = None

    @property
    def spoken(self) -> tuple[Clip, ...]:
        """Recordings whose codes are needed."""
        return self.prompt + (() if self.reply is None else (self.reply,))


def sample_examples(
    corpus: Corpus, split: str, config: CurriculumConfig, passes: int, seed: int, seconds: Mapping[Path, float]
) -> list[Example]:
    """The examples of a split, pass by pass, each pass in a random order of its own.

    seconds: length of every usable recording; what is not in it takes no part.
    """
    drawing = ExampleSampler(corpus, split, config, np.random.default_rng((seed, SPLITS.index(split))), seconds)
    found = []
    for _ in range(passes):
        examples = list(drawing.examples())
        found += [examples[i] for i in drawing.rng.permutation(len(examples))]
    return found


def held_out_examples(
    corpus: Corpus, split: str, config: CurriculumConfig, seed: int, seconds: Mapping[Path, float]
) -> list[Example]:
    """The examples of the valid or test split: each dialogue once, then each utterance once, to be read aloud.

    Args:
        corpus: The corpus.
        split: "valid" or "test".
        config: Curriculum of the train split. It decides whether utterances have voice prompts, and of which kind; dialogues
            always have references.
        seed: Seed of the choice of prompts.
        seconds: Length of every usable recording; others take no part.
    """
    dialogues = sample_examples(corpus, split, CurriculumConfig(), 1, seed, seconds)
    prompts = CurriculumConfig(prompts=config.prompts, prompt_seconds=config.prompt_seconds, no_prompt=config.no_prompt)
    drawing = ExampleSampler(corpus, split, prompts, np.random.default_rng((seed, SPLITS.index(split), 1)), seconds)
    utterances = [u for u in corpus.utterances if u.split == split and u.audio in seconds]
    return dialogues + [drawing.read_aloud(u.voice, SpokenText(u.audio, u.text, seconds[u.audio])) for u in utterances]


class ExampleSampler:
    """Draws the examples of a pass. From pass to pass, a reply goes through the references of its voice."""

    def __init__(
        self, corpus: Corpus, split: str, config: CurriculumConfig, rng: np.random.Generator, seconds: Mapping[Path, float]
    ):
        self.config, self.rng, self.seconds = config, rng, seconds
        of_split = [d for d in corpus.dialogues if d.split == split]
        self.exchanges = exchanges(held_out(corpus, split), config.holdout_fraction) if config.facts else {}
        self.dialogues = [d for d in of_split if {d.question_audio, d.answer_audio} <= seconds.keys()]
        said = {d.question_audio: (d.user_voice, d.question) for d in of_split}
        said |= {d.answer_audio: (d.assistant_voice, d.answer) for d in of_split}
        said |= {u.audio: (u.voice, u.text) for u in corpus.utterances if u.split == split}
        voices = {voice for voice, _ in said.values()}
        self.speaking = set(sorted(voices)[: config.max_voices or None])
        references = {r.audio for r in corpus.references if r.voice in voices}
        said |= {r.audio: (r.voice, r.text) for r in corpus.references if r.voice in voices}
        self.of_voice: dict[str, list[SpokenText]] = collections.defaultdict(list)
        self.references_of: dict[str, list[SpokenText]] = collections.defaultdict(list)
        self.place: dict[tuple[str, Path], int] = {}  # of a recording in `of_voice`
        for path, (voice, text) in said.items():
            if path in seconds:
                spoken = SpokenText(path, text, seconds[path])
                self.place[voice, path] = len(self.of_voice[voice])
                self.of_voice[voice].append(spoken)
                if path in references:
                    self.references_of[voice].append(spoken)
        self.turn: dict[Path, int] = collections.defaultdict(lambda: int(rng.integers(1 << 30)))  # of each reply's references

    def examples(self) -> Iterator[Example]:
        c = self.config
        recordings = [(voice, spoken) for voice, of in self.of_voice.items() for spoken in of]
        speaking = [(voice, spoken) for voice, spoken in recordings if voice in self.speaking]
        for d in self.some([d for d in self.dialogues if d.assistant_voice in self.speaking], c.dialogue):
            speed = self.speed()
            prompt, transcript = self.prompt(d.assistant_voice, d.answer_audio, speed)
            heard, reply = Clip(d.question_audio, self.speed()), Clip(d.answer_audio, speed)
            said = {"transcription": d.question, "answer": d.answer}
            yield Example(d.id, heard, **said, prompt=prompt, transcript=transcript, reply=reply)
        for d in self.some(self.dialogues, c.speech_qa):
            yield Example(f"speech_qa {d.id}", Clip(d.question_audio, self.speed()), d.question, answer=d.answer)
        for _, s in self.some(recordings, c.asr):
            yield Example(f"asr {s.path.stem}", Clip(s.path, self.speed()), s.text, said=WRITE_DOWN, answer=s.text)
        for d in self.some(self.dialogues, c.text_qa):
            yield Example(f"text_qa {d.id}", **self.asked(d.question), answer=d.answer)
        for kind, i in self.facts(c.facts):
            e = self.exchanges[kind][i]
            yield Example(f"fact {kind} {i}", **self.asked(e.question), answer=e.answer)
        for voice, s in self.some(speaking, c.tts):
            yield self.read_aloud(voice, s)
        proceeding = [s.path for _, s in self.some(speaking, c.continuation)]
        proceeding += [path for path in unwritten(c) if path in self.seconds]
        for path in proceeding:
            yield Example(f"continuation {path.stem}", reply=Clip(path, self.speed()), piece=self.piece(path))

    def read_aloud(self, voice: str, spoken: SpokenText) -> Example:
        """A recording as the reply to a request to read its text aloud."""
        speed = self.speed()
        prompt, transcript = self.prompt(voice, spoken.path, speed)
        said = {"said": READ_ALOUD + spoken.text, "answer": spoken.text}
        return Example(f"tts {spoken.path.stem}", **said, prompt=prompt, transcript=transcript, reply=Clip(spoken.path, speed))

    def facts(self, count: int) -> Iterator[tuple[str, int]]:
        """Kinds of exchanges and which of the kind. A kind is drawn the more often the more there are of it, by their root."""
        if not count:
            return
        size = {kind: len(found) for kind, found in self.exchanges.items()}
        share = np.sqrt(list(size.values()))
        for kind in self.rng.choice(list(size), count, p=share / share.sum()):
            yield str(kind), int(self.rng.integers(size[kind]))

    def asked(self, question: str) -> dict[str, str]:
        """A question without a recording: as text, or as pseudo-speech."""
        return {"pseudo_speech" if self.rng.random() < self.config.pseudo_speech else "said": question}

    def some(self, things: list, share: float) -> list:
        """All of them ``share`` times over, the fraction drawn at random."""
        rest = self.rng.permutation(len(things))[: round((share - int(share)) * len(things))]
        return things * int(share) + [things[i] for i in rest]

    def speed(self) -> float:
        return float(self.rng.choice(self.config.speeds))

    def prompt(self, voice: str, but: Path, speed: float) -> tuple[tuple[Clip, ...], str]:
        """Recordings of a voice, and what is said in them."""
        if self.rng.random() < self.config.no_prompt:
            return (), ""
        if self.config.prompts == "references":
            choices = [s for s in self.references_of[voice] if s.path != but]
            chosen = choices and [choices[self.turn[but] % len(choices)]]
            self.turn[but] += 1
        else:
            # drawn among the others without copying them, since a voice may have many recordings
            every, skipped = self.of_voice[voice], self.place.get((voice, but))
            count = len(every) - (skipped is not None)
            wanted, chosen, total = self.rng.uniform(1.0, self.config.prompt_seconds), [], 0.0
            for i in self.rng.permutation(count):
                choice = every[i if skipped is None or i < skipped else i + 1]
                length = choice.seconds / speed
                if total >= wanted:
                    break
                if total + length <= self.config.prompt_seconds:
                    chosen, total = [*chosen, choice], total + length
        return tuple(Clip(s.path, speed) for s in chosen), " ".join(s.text for s in chosen)

    def piece(self, path: Path) -> tuple[float, float, float]:
        """A quarter to three quarters of a piece are its prompt."""
        share = min(1.0, self.config.piece_seconds / self.seconds[path])
        start = self.rng.uniform(0, 1 - share)
        return start, start + share * self.rng.uniform(0.25, 0.75), start + share


def held_out(corpus: Corpus, split: str) -> list[Exchange]:
    """What the other splits ask and this one does not."""
    known = {normalised(d.question) for d in corpus.dialogues if d.split == split}
    return [Exchange(d.question, d.answer) for d in corpus.dialogues if normalised(d.question) not in known]


def unwritten(config: CurriculumConfig) -> list[Path]:
    """Recordings without a transcript. Raises InputError for a folder that is not there or holds none."""
    found = []
    for folder in map(Path, config.unwritten):
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SOUNDS) if folder.is_dir() else []
        if not paths:
            raise InputError(f"{folder}: no recording there (data.curriculum.unwritten)")
        found += paths
    return found


def written(corpus: Corpus, config: CurriculumConfig) -> list[str]:
    """What the tokenizer learns in addition to dialogues and references: utterances and texts without recordings."""
    facts = exchanges(held_out(corpus, "train"), config.holdout_fraction) if config.facts else {}
    said = ([WRITE_DOWN] if config.asr else []) + ([READ_ALOUD] if config.tts else [])
    utterances = [u.text for u in corpus.utterances if u.split == "train"]
    return utterances + said + [text for of in facts.values() for e in of for text in e]
