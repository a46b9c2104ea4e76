"""The corpus as a TensorFlow Datasets data source, without TensorFlow."""

import subprocess
import sys

import pytest
from tiny_corpus import write_corpus

SCRIPT = """
import sys
import numpy as np
import tensorflow_datasets as tfds
from chroma_jax.audio import load as audio
from data_pipelines import tfds_builder
from data_pipelines.dialogues import read_corpus

tfds_builder.Parley.CORPUS = sys.argv[1]
source = tfds.data_source("parley", split="train", data_dir=sys.argv[2])
dialogues = {d.id: d for d in read_corpus(sys.argv[1]).dialogues if d.split == "train"}
assert len(source) == len(dialogues) == 9
for i in range(len(source)):
    example = source[i]
    d = dialogues[example["id"].decode()]
    assert example["question"].decode() == d.question and example["assistant_voice"].decode() == d.assistant_voice
    expected = audio.to_int16(audio.load(d.answer_audio, audio.CODEC_RATE))
    assert example["answer_audio"].dtype == np.int16 and np.array_equal(example["answer_audio"], expected)
assert "tensorflow" not in sys.modules
"""


def test_dialogues_are_read_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    folder = write_corpus(tmp_path / "corpus")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "tfds")]  # a fresh process: nothing imported yet
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
