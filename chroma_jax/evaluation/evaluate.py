"""MetricModels a run on a suite: its Codec alone, and, of a speaking model, its answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax

from chroma_jax.config import CodecRun, Config
from chroma_jax.convert.codec import load_trained_codec, with_codec
from chroma_jax.evaluation import report
from chroma_jax.evaluation.codec import evaluate_codec
from chroma_jax.evaluation.knowledge import evaluate_knowledge
from chroma_jax.evaluation.reading import chosen, evaluate_reading
from chroma_jax.evaluation.speaking import ABLATIONS, MAIN, Speaker, evaluate_speaking
from chroma_jax.evaluation.suite import SUITES, Suite, read_suite, recordings
from chroma_jax.metric_models.speech import MetricModels, load_metric_models
from chroma_jax.runs.load import load_run
from chroma_jax.utils.atomic_io import check_new, written_aside
from chroma_jax.utils.errors import InputError
from data_pipelines.curriculum import held_out
from data_pipelines.dialogues import Corpus, read_corpus
from data_pipelines.facts import Exchange, withheld

Part = Literal["codec", "answers", "ablations", "knowledge", "reading"]


def evaluate(
    run: Path,
    config: Config | CodecRun,
    out: Path,
    *,
    suite: str = "parley",
    split: Literal["test", "valid"] = "test",
    corpus: str | None = None,
    limit: int | None = None,
    parts: Sequence[Part] = ("codec", "answers"),
    metric_models: MetricModels | None = None,
) -> dict:
    """Writes report.json, report.txt and index.html, with the sounds that it plays, into ``out``, all or none; returns the
    report.

    run: of a Codec or of a speaking model, or what was exported of one. corpus: a folder of the suite's layout, instead of the
    suite's own. limit: maximum number of dialogues, and of utterances. parts: "ablations" are answers under other voice prompts;
    "reading" reads the corpus's utterances aloud. metric_models: None appoints those that are installed.
    Raises: InputError for what is missing or does not fit.
    """
    out = Path(out)
    check_new(out)
    asked = read_suite(suite, split, corpus, limit)
    metric_models = metric_models or load_metric_models()
    speaker = None
    if isinstance(config, CodecRun):
        codec, books = load_trained_codec(run, with_codec(config.model)), config.model.num_codebooks
        parts = ("codec",)
    else:
        model, codec, tokenizer = load_run(run, config)
        books = model.config.num_codebooks
        speaker = Speaker(model, codec, tokenizer, config.generation, config.data.system)
    rate = codec.config.sampling_rate
    found: dict = {
        "run": Path(run).name,
        "suite": {"name": suite, "split": split, "dialogues": len(asked.dialogues), "voices": len(asked.voices)},
        "metric_models": metric_models.origins,
        "device": jax.devices()[0].device_kind,
    }
    if speaker is not None and "knowledge" in parts:
        assert isinstance(config, Config)
        given = asked_in_text(config, asked, read_corpus(corpus or SUITES[suite]))
        found["knowledge"] = evaluate_knowledge(speaker.model, speaker.tokenizer, given, speaker.system)
    sounds = report.Sounds(rate)
    if "codec" in parts:
        spoken = recordings(asked, rate)
        found["codec"], made = evaluate_codec(codec, spoken, metric_models, books)
        sounds.add_codec(spoken, made)
    if speaker is not None and "reading" in parts:
        assert isinstance(config, Config)
        spoken_in = read_corpus(corpus or SUITES[suite])
        utterances = chosen(spoken_in, split, limit)
        if not utterances:
            raise InputError(f"{spoken_in.folder}: no utterance in the {split} split, which --parts reading reads aloud")
        prompted = config.data.curriculum.no_prompt < 1
        found["reading"], made = evaluate_reading(speaker, spoken_in, utterances, metric_models, prompted=prompted)
        sounds.add_readings(found["reading"]["readings"], made)
    conditions = [*([MAIN] if "answers" in parts else []), *(ABLATIONS if "ablations" in parts else ())]
    if speaker is not None and conditions:
        settings = {name: getattr(speaker.config, name) for name in ("temperature", "top_k", "top_p", "seed")}
        found["sampling"] = settings | {name: getattr(speaker.config, name) for name in ("dtype", "weights", "cache")}
        part, replies = evaluate_speaking(speaker, asked, conditions, metric_models)
        found |= part
        sounds.add_replies(replies)
    with written_aside(out, last="report.json") as folder:
        report.write(folder, found, sounds)
    return found


def asked_in_text(config: Config, suite: Suite, corpus: Corpus) -> dict[str, list[Exchange]]:
    """The suite's questions, and of general knowledge what the run's training had not, in all and by kind."""
    found = {f"{suite.split} split": [Exchange(d.question, d.answer) for d in suite.dialogues]}
    known = [Exchange(d.question, d.answer) for d in corpus.dialogues]
    facts = withheld(config.data.curriculum.holdout_fraction, held_out(corpus, "train"), known)
    found["withheld"] = [e for of in facts.values() for e in of]
    return found | {f"withheld: {kind}": of for kind, of in facts.items()}
