#!/usr/bin/env bash
# Makes the data of the next nano. See --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/nano_data.sh FOLDER [PYTHON]

Generates texts, synthesizes speech, and packs it for training. Needs the extra "tts" and no downloads. Run again, it resumes.

  FOLDER   receives the texts, a corpus and a prepared dataset for each stage:
             corpus_one     about 8 hours, every reply in one voice
             corpus_many    about 20 hours in 240 voices
             corpus_pairs   about 5 hours in 240 voices, with twins in canonical phase, to train a Codec
             one, many      packed sequences for nano2_text, nano2_one and nano2_many
             waves          recordings for codec_nano2
  PYTHON   of an environment that has chroma-jax (default: python3)
TEXT
}

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    usage
    exit 0
fi
FOLDER=$1
chroma() { "${PYTHON:-python3}" -m chroma_jax "$@"; }
PYTHON=${2:-python3}
mkdir -p -- "$FOLDER"

# corpus NAME FLAGS …: a corpus of the texts, or of those in one voice
corpus() {
    local texts=$FOLDER/texts.jsonl
    local -a voice=()
    if [[ $1 == one ]]; then
        texts=$FOLDER/texts_one.jsonl
        voice=(--voice v0000)
    fi
    [[ -f $texts ]] || chroma texts "$texts" ${voice[@]+"${voice[@]}"}
    chroma synthesize "$texts" "$FOLDER/corpus_$1" --check 0 "${@:2}"
}

corpus one
chroma prepare nano2_text "$FOLDER/one" --codec codec_nano --data.corpus "$FOLDER/corpus_one"
corpus many --hours 20 --voices 240
corpus pairs --phase both --hours 5 --voices 240
