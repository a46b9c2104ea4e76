"""A conversation from the command line: turns from recordings or from a microphone, replies played and kept while they stream."""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile

from chroma_jax.audio import load as audio
from chroma_jax.config import Config
from chroma_jax.runs.load import load_run
from chroma_jax.serving.engine import Engine, EngineConfig
from chroma_jax.serving.session import Session
from chroma_jax.utils.atomic_io import replaced_files
from chroma_jax.utils.errors import InputError
from data_pipelines.tokenizer import encoder

PIECE = 1280  # samples of a recording that are fed at once, as a microphone would give them: 80 ms
VOICE = "the reply's"

Pace = Literal["live", "at once"]


def chat(
    run: Path,
    config: Config,
    *,
    voice: Path,
    transcript: str,
    questions: tuple[Path, ...],
    pace: Pace,
    play: bool,
    keep_voice: Path | None,
    out: Path | None,
) -> dict:
    """Talks until the recordings are used up, or without any until the user ends it. Returns what was measured.

    voice: a recording in which ``transcript`` is said, or a file that ``keep_voice`` was written to. out: folder for reply-N.wav,
    conversation.txt and measures.json. Raises: InputError for what is missing or does not fit.
    """
    if play or not questions:
        sound_devices()  # before the long work
    model, codec, tokenizer = load_run(run, config)
    rate = model.config.codec.sampling_rate
    asked = [audio.load(path, audio.REASONER_RATE) for path in questions]
    r = config.generation
    lead = 2.0 if play or not asked else None
    sizes = EngineConfig(
        slots=1,
        frames_per_call=2,  # a user waits for the compilation of each further decode step
        max_seconds=r.max_seconds,
        dtype=r.dtype,
        cache=r.cache,
        lead_seconds=lead,
    )
    engine = Engine(model, codec, encoder(tokenizer), tokenizer.decode, sizes)
    player = Player(rate) if play or not asked else None
    print("compiling …", flush=True)
    engine.warm_up()
    with engine:
        if voice.suffix == ".safetensors":
            engine.load_voice(VOICE, voice)
        else:
            engine.add_voice(VOICE, audio.load_reference(voice, rate), transcript)
        if keep_voice is not None:
            engine.save_voice(VOICE, keep_voice)
        with engine.open(VOICE, system=config.data.system, sampling=r) as session:
            lines, turns = None, recorded(session, questions, asked, pace)
            if player is not None and not asked:
                lines = Lines()
                turns = spoken(session, player, lines)
            replies = []
            try:
                for _ in turns:
                    replies.append(answered(session, player, lines))
            finally:  # a failure does not discard earlier replies
                if out is not None and replies:
                    keep(out, replies, rate, engine.measures())
        return engine.measures()


def keep(out: Path, replies: list[tuple[np.ndarray, str]], rate: int, measured: dict) -> None:
    """Writes the replies of a conversation as files.

    Args:
        out: Folder.
        replies: Samples, float32 [S], and text of each reply.
        rate: Sample rate in Hz.
        measured: Latencies, see `Engine.measures`.
    """
    with replaced_files(out) as folder:
        for number, (wave, _) in enumerate(replies, 1):
            soundfile.write(folder / f"reply-{number}.wav", audio.to_int16(wave), rate, subtype="PCM_16")
        (folder / "conversation.txt").write_text("".join(f"{text}\n" for _, text in replies), encoding="utf-8")
        (folder / "measures.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def recorded(session: Session, names: tuple[Path, ...], waves: list[np.ndarray], pace: Pace) -> Iterator[None]:
    """Feeds one recording after the other; each turn is over when this yields."""
    for name, wave in zip(names, waves, strict=True):
        print(f"you: {name} ({len(wave) / audio.REASONER_RATE:.1f} s)", flush=True)
        began = time.perf_counter()
        for start in range(0, len(wave), PIECE):
            if pace == "live":
                time.sleep(max(0.0, began + start / audio.REASONER_RATE - time.perf_counter()))
            session.feed(wave[start : start + PIECE])
        session.end_turn()
        yield


class Lines:
    """Lines of the terminal, read by a thread of its own, so that one can come at any time."""

    def __init__(self, read: Callable[[], str] = input):
        self._lines: queue.Queue[bool] = queue.Queue()
        threading.Thread(target=self._run, args=(read,), daemon=True).start()

    def _run(self, read: Callable[[], str]) -> None:
        with contextlib.suppress(EOFError):
            while True:
                read()
                self._lines.put(True)
        self._lines.put(False)

    def next(self) -> bool:
        """Waits for a line. False at the end of all."""
        return self._lines.get()

    def waiting(self) -> bool:
        return not self._lines.empty()


def spoken(session: Session, player: "Player", lines: Lines) -> Iterator[None]:
    """Feeds what the microphone hears, from Enter to Enter."""
    sounddevice = sound_devices()
    while True:
        print("Enter to speak, also during a reply; Ctrl-D to end: ", end="", flush=True)
        if not lines.next():
            return
        session.cancel(player.stop())
        heard = []
        hear = lambda data, *_, heard=heard: (heard.append(len(data)), session.feed(data[:, 0].copy()))
        with sounddevice.InputStream(samplerate=audio.REASONER_RATE, channels=1, dtype="float32", callback=hear):
            print("listening; Enter when you are done: ", end="", flush=True)
            goes_on = lines.next()
        if heard:
            session.end_turn()
            yield
        if not goes_on:
            return


def answered(session: Session, player: "Player | None", lines: Lines | None) -> tuple[np.ndarray, str]:
    """Prints and plays a reply as it comes, until it ends or a line comes. Returns what came of it: float32 [S], and its text."""
    samples, text = [], []
    print("reply: ", end="", flush=True)
    for chunk in session:
        print(chunk.text, end="", flush=True)
        samples.append(chunk.samples)
        text.append(chunk.text)
        if player is not None:
            player.add(chunk.samples)
        if lines is not None and lines.waiting():
            break
    print()
    return np.concatenate(samples) if samples else np.zeros(0, np.float32), "".join(text)


class Player:
    """Plays samples as they come, and knows how many were. rate: Hz. Raises: InputError where there is no sound device."""

    def __init__(self, rate: int):
        self._waiting, self._lock, self.played = np.zeros(0, np.float32), threading.Lock(), 0
        try:
            self._stream = sound_devices().OutputStream(samplerate=rate, channels=1, dtype="float32", callback=self._fill)
            self._stream.start()
        except InputError:
            raise
        except Exception as error:  # whatever the sound library has for it
            raise InputError(f"no sound can be played here ({error}); use --questions and --out without --play") from error

    def add(self, samples: np.ndarray) -> None:
        with self._lock:
            self._waiting = np.concatenate([self._waiting, samples])

    def stop(self) -> int:
        """Drops what was not played yet. Returns how many samples were since the last ``stop``."""
        with self._lock:
            played, self.played, self._waiting = self.played, 0, self._waiting[:0]
            return played

    def _fill(self, data: np.ndarray, frames: int, *_) -> None:
        with self._lock:
            now, self._waiting = self._waiting[:frames], self._waiting[frames:]
            self.played += len(now)
        data[: len(now), 0], data[len(now) :] = now, 0


def sound_devices():
    """The sounddevice package. Raises: InputError when it, or the PortAudio that it needs, is missing."""
    try:
        import sounddevice  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:
        raise InputError(
            f"sound devices need the extra 'chat' and PortAudio ({error}): pip install 'chroma-jax[chat]';"
            " recordings work without: --questions FILES --out FOLDER"
        ) from error
    return sounddevice
