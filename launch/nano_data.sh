#!/usr/bin/env bash
# Makes the data of the next nano, and the Reasoner that its speech is trained behind. See --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/nano_data.sh FOLDER [--stages "one many codec"] [--python PYTHON] [--from EXPORT]

Generates texts, synthesizes speech, and prepares it for training. Needs the extra "tts" and no downloads. Run again, it resumes.

  FOLDER      receives
                corpus_one, one      10 hours of speech, every reply in one voice; packed sequences for nano2_text and nano2_one
                text                 a run of nano2_text: the Reasoner whose hidden states nano2_one and nano2_many are trained on
                corpus_many, many    20 hours in 240 voices; packed sequences for nano2_many
                corpus_pairs, waves  5 hours in 240 voices, each recording with a twin in canonical phase; data of codec_nano2
  --stages    which of one, many and codec to make (default: all); many needs one
  --python    Python of an environment that has chroma-jax (default: python3)
  --from      export whose tokenizer and Reasoner are used, instead of new ones
TEXT
}

die() {
    printf 'nano_data.sh: error: %s\n' "$*" >&2
    exit 2
}

folder='' python=python3 export='' stages='one many codec'
while (($#)); do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --stages | --python | --from)
        [[ -n ${2-} ]] || die "$1 expects a value; see --help"
        case $1 in
        --stages) stages=$2 ;;
        --python) python=$2 ;;
        --from) export=$2 ;;
        esac
        shift
        ;;
    -*) die "unknown option '$1'; see --help" ;;
    *)
        [[ -z $folder ]] || die "expected one folder, got '$folder' and '$1'"
        folder=$1
        ;;
    esac
    shift
done
[[ -n $folder ]] || die "expected a folder; see --help"
for stage in $stages; do
    [[ $stage == one || $stage == many || $stage == codec ]] || die "--stages: '$stage' is none of one, many, codec"
done

chroma() { "$python" -m chroma_jax "$@"; }

# synthesized NAME FLAGS …: FOLDER/corpus_NAME
synthesized() {
    local texts=$folder/texts.jsonl
    local -a voice=()
    if [[ $1 == one ]]; then
        texts=$folder/texts_one.jsonl voice=(--voice v0000)
    fi
    [[ -f $texts ]] || chroma texts "$texts" ${voice[@]+"${voice[@]}"}
    chroma synthesize "$texts" "$folder/corpus_$1" --check 0 "${@:2}"
}

# packed CONFIG NAME TOKENIZER FLAGS …: FOLDER/NAME from FOLDER/corpus_NAME
packed() {
    chroma prepare "$1" "$folder/$2" --codec codec_nano --data.corpus "$folder/corpus_$2" --data.tokenizer "$3" "${@:4}"
}

one() {
    local tokenizer=train
    [[ -z $export ]] || tokenizer=$export/tokenizer.json
    synthesized one
    packed nano2_text one "$tokenizer"
    if [[ -z $export ]]; then
        chroma train nano2_text "$folder/text" --dataset_dir "$folder/one"
    elif [[ ! -d $folder/text ]]; then
        chroma convert import "$export" "$folder/text" --onto nano2_text
    fi
    packed nano2_text one "$tokenizer" --cache_reasoner "$folder/text"
}

many() {
    [[ -d $folder/text ]] || die "$folder/text: not there; make stage one first"
    synthesized many --hours 20 --voices 240
    packed nano2_many many "$folder/one/tokenizer.json" --cache_reasoner "$folder/text"
}

codec() {
    synthesized pairs --phase both --hours 5 --voices 240
    chroma prepare codec_nano2 "$folder/waves" --data.corpora "$folder/corpus_pairs" embedded
}

mkdir -p -- "$folder"
for stage in $stages; do
    "$stage"
done
