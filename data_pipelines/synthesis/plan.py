"""Which text is spoken in which voice, and how often: a function of the texts and the settings alone."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

from chroma_jax.utils.errors import InputError
from chroma_jax.utils.fields import Checked, NumVoices, PositiveFloat, Seed
from data_pipelines.dialogues import SPLITS
from data_pipelines.synthesis.engine import Phase
from data_pipelines.synthesis.texts import VOICE_FIELDS, Text

CHARACTERS_PER_SECOND = 14.0  # of English speech at rate 1, for estimates

# What voice prompts say: neutral sentences of about five seconds.
PROMPTS = (
    "The old lighthouse keeper walked slowly along the beach and looked at the quiet water.",
    "On a warm evening in June, my neighbors played music in the garden until it was dark.",
    "She put the blue cup on the wooden table, opened the window, and listened to the rain.",
    "If the weather is good tomorrow, we could take the early train and visit the mountains.",
    "A small gray bird sat on the fence and watched us while we had our breakfast outside.",
    "The teacher wrote five short words on the board, and the children read them together.",
    "Please leave the keys under the green box near the door before you go to the office.",
    "We found a narrow path through the forest that led us straight down to the river.",
    "He bought fresh bread, some cheese, and a bag of apples at the market this morning.",
    "My grandmother told us a long story about a ship that sailed around the whole world.",
    "The library opens at nine, but the reading room upstairs is usually empty until noon.",
    "They painted the kitchen yellow last year, and now every visitor wants to know why.",
    "After the long meeting everybody was tired, so we walked home slowly without talking.",
    "The young doctor closed her notebook, thanked the nurse, and hurried to the next room.",
    "In winter the lake is covered with thick ice, and people come from far away to skate.",
    "Our dog likes to sleep in the sun, but he wakes up at once when somebody says his name.",
)


@dataclasses.dataclass(frozen=True)
class SynthesisConfig(Checked):
    """What the corpus depends on apart from the texts.

    Attributes:
        engine: A built-in engine or "module:function"; see `data_pipelines.synthesis.engine`.
        phase: "free", "canonical", or "both" for free recordings with canonical twins.
        voices: Number of voices of the train split, v0000 onwards.
        held_out_voices: Number of voices of the valid and test splits, h0000 onwards.
        hours: Hours of the train split; None speaks every text once.
        seed: Seed of the choice of voices and of noise.
    """

    engine: str = "hibari"
    phase: Phase = "free"
    voices: NumVoices = 64
    held_out_voices: NumVoices = 16
    hours: PositiveFloat | None = None
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class PlannedRecording:
    """A text in a voice, made once for all entries that use it.

    Attributes:
        key: Hash of everything that the samples depend on; names the file.
    """

    key: str
    text: str
    voice: str

    @property
    def path(self) -> str:
        """Path below the folder of a phase (``audio`` or ``canonical``)."""
        return f"{self.key[:2]}/{self.key}.flac"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A text of the input in its voices.

    Attributes:
        id: Of the text; with a suffix when it is repeated in other voices.
        recordings: One for each part of the text, in the same order.
    """

    id: str
    text: Text
    recordings: tuple[PlannedRecording, ...]


@dataclasses.dataclass(frozen=True)
class SynthesisPlan:
    """Everything that is to be recorded."""

    entries: tuple[Entry, ...]
    references: tuple[PlannedRecording, ...]

    def recordings(self) -> list[PlannedRecording]:
        """Each recording once, in order."""
        every = [r for entry in self.entries for r in entry.recordings] + list(self.references)
        return list(dict.fromkeys(every))


def make_plan(texts: Sequence[Text], config: SynthesisConfig, identity: str) -> SynthesisPlan:
    """Assigns voices to texts, and repeats or cuts the train split to ``config.hours``.

    Args:
        texts: Texts that can be spoken, in file order.
        config: Number of voices, hours and seed.
        identity: Engine, version and whatever else the samples of a recording depend on.

    Raises:
        InputError: If a text of the train split has a held-out voice.
    """
    voices = {split: names("v", config.voices) if split == "train" else names("h", config.held_out_voices) for split in SPLITS}
    held_out = set(voices["valid"])
    for text in texts:
        for role, voice in text.voices:
            if text.split == "train" and voice in held_out:
                raise InputError(f"{text.where}: {VOICE_FIELDS[role]} {voice!r} is a held-out voice, but the split is train")

    def recording(text: str, voice: str) -> PlannedRecording:
        return PlannedRecording(digest(identity, config.seed, voice, text)[:24], text, voice)

    def entry(text: Text, repetition: int) -> Entry:
        drawn = draw_voices(text, voices[text.split], config.seed, repetition)
        name = f"{text.id}~{repetition}" if repetition else text.id
        return Entry(name, text, tuple(recording(words, voice) for (_, words), voice in zip(text.parts, drawn, strict=True)))

    train = [text for text in texts if text.split == "train"]
    repetitions = dict.fromkeys((text.id for text in train), 1)
    if config.hours is not None:
        repetitions = repetitions_for(train, config.hours, config.voices, config.seed)
    counts = {text.id: repetitions.get(text.id, 0) if text.split == "train" else 1 for text in texts}
    entries = tuple(entry(text, k) for k in range(max(counts.values(), default=0)) for text in texts if k < counts[text.id])
    used = sorted({r.voice for e in entries for r in e.recordings})
    references = tuple(recording(words, voice) for voice in used for words in prompts_of(voice, config.seed))
    return SynthesisPlan(entries, references)


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{i:04d}" for i in range(count)]


def digest(*parts: object) -> str:
    """Hexadecimal SHA-256 of several values."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def draw(limit: int, *parts: object) -> int:
    """A number below ``limit`` that depends on ``parts`` alone."""
    return int(digest(*parts)[:16], 16) % limit


def draw_voices(text: Text, voices: Sequence[str], seed: int, repetition: int) -> list[str]:
    """A voice for each part of a text: the fixed ones, and others by text and seed.

    The voices of a dialogue differ if there are two. Each repetition has another voice for the first part.
    """
    fixed, count = dict(text.voices), len(voices)
    step = draw(max(1, count - 1), "step", seed, text.id) + repetition
    first = (draw(count, "voice", seed, text.id) + repetition) % count
    second = (first + 1 + step % max(1, count - 1)) % count
    indices = [first, second][: len(text.parts)]
    drawn = [fixed.get(role, voices[i]) for (role, _), i in zip(text.parts, indices, strict=True)]
    if len(set(drawn)) < len(drawn) and len(fixed) == 1:  # the drawn voice happens to be the fixed one
        other = next(i for i, (role, _) in enumerate(text.parts) if role not in fixed)
        drawn[other] = voices[(indices[other] + 1) % count]
    return drawn


def repetitions_for(texts: Sequence[Text], hours: float, voices: int, seed: int) -> dict[str, int]:
    """How often each text is spoken for about ``hours`` of speech, estimated by characters; 0 for those cut.

    Texts are taken in an order that is drawn, all once before one twice, at most once in each voice. Texts with fixed voices
    are not repeated.
    """
    order = sorted(texts, key=lambda text: digest("order", seed, text.id))
    remaining, counts = hours * 3600, dict.fromkeys((text.id for text in texts), 0)
    for repetition in range(voices):
        spoken = [text for text in order if not (repetition and text.voices)]
        for text in spoken:
            if remaining <= 0:
                return counts
            counts[text.id] += 1
            remaining -= estimated_seconds(words for _, words in text.parts)
        if not spoken:
            break
    return counts


def estimated_seconds(texts: Iterable[str]) -> float:
    """Seconds of speech by the number of characters, with the pauses around each recording."""
    return sum(len(text) / CHARACTERS_PER_SECOND + 0.3 for text in texts)


def prompts_of(voice: str, seed: int) -> list[str]:
    """The two sentences of a voice's prompts."""
    first = draw(len(PROMPTS), "prompt", seed, voice)
    other = 1 + draw(len(PROMPTS) - 1, "other prompt", seed, voice)
    return [PROMPTS[first], PROMPTS[(first + other) % len(PROMPTS)]]
