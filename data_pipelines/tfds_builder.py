"""The corpus as a TensorFlow Datasets builder, one example per dialogue, readable without TensorFlow:

    import data_pipelines.tfds_builder  # registers it
    tfds.data_source("parley", split="train", data_dir=…)

Audio is int16 at 24 kHz. (``tfds.features.Audio`` would need TensorFlow to decode, a plain tensor does not.)
"""

import numpy as np
import tensorflow_datasets as tfds

from chroma_jax.audio import load as audio
from data_pipelines.dialogues import SPLITS, read_corpus

WAVE = tfds.features.Tensor(shape=(None,), dtype=np.int16)


class Parley(tfds.core.GeneratorBasedBuilder):
    """Spoken questions and answers."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # noqa: RUF012  nothing is downloaded; looking for checksums would need a package that TFDS does not declare
    CORPUS = "embedded"  # a subclass may name another corpus folder

    def __init__(self, *, file_format="array_record", **kwargs):
        super().__init__(file_format=file_format, **kwargs)  # the base class's own arguments

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return self.dataset_info_from_configs(
            description="Short spoken questions and answers in 28 synthetic English voices.",
            license="Apache-2.0; speech synthesised with Kokoro-82M (Apache-2.0)",
            features=tfds.features.FeaturesDict(
                {
                    "id": text,
                    "question": text,
                    "answer": text,
                    "user_voice": text,
                    "assistant_voice": text,
                    "question_audio": WAVE,
                    "answer_audio": WAVE,
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str):
        corpus = read_corpus(self.CORPUS)

        def samples(path):
            return audio.to_int16(audio.load(path, audio.CODEC_RATE))

        for d in corpus.dialogues:
            if d.split == split:
                yield (
                    d.id,
                    {
                        "id": d.id,
                        "question": d.question,
                        "answer": d.answer,
                        "user_voice": d.user_voice,
                        "assistant_voice": d.assistant_voice,
                        "question_audio": samples(d.question_audio),
                        "answer_audio": samples(d.answer_audio),
                    },
                )
