#!/usr/bin/env bash
# Makes the data of the next nano, and the Reasoner that its speech is trained behind. See --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/nano_data.sh FOLDER [--python PYTHON] [--from EXPORT]

Generates texts, synthesizes speech, and prepares it for training. Needs the extra "tts" and no downloads. Run again, it resumes.

  FOLDER      receives
                texts_one.jsonl, corpus_one   texts, and about 10 hours of speech: every reply in one voice
                one                           packed sequences of it, with the Reasoner's hidden states
                text                          a run of nano2_text: the Reasoner
  --python    Python of an environment that has chroma-jax (default: python3)
  --from      export whose tokenizer and Reasoner are used, instead of new ones
TEXT
}

die() {
    printf 'nano_data.sh: error: %s\n' "$*" >&2
    exit 2
}

folder='' python=python3 export=''
while (($#)); do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --python | --from)
        [[ -n ${2-} ]] || die "$1 expects a value"
        if [[ $1 == --python ]]; then python=$2; else export=$2; fi
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

chroma() { "$python" -m chroma_jax "$@"; }

mkdir -p -- "$folder"
tokenizer=()
if [[ -n $export ]]; then
    tokenizer=(--data.tokenizer "$export/tokenizer.json")
fi
[[ -f $folder/texts_one.jsonl ]] || chroma texts "$folder/texts_one.jsonl" --voice v0000
chroma synthesize "$folder/texts_one.jsonl" "$folder/corpus_one" --check 0
chroma prepare nano2_text "$folder/one" --codec codec_nano --data.corpus "$folder/corpus_one" ${tokenizer[@]+"${tokenizer[@]}"}
if [[ -n $export ]]; then
    [[ -d $folder/text ]] || chroma convert import "$export" "$folder/text" --onto nano2_text
else
    chroma train nano2_text "$folder/text" --prepared "$folder/one"
fi
chroma prepare nano2_text "$folder/one" --codec codec_nano --data.corpus "$folder/corpus_one" \
    ${tokenizer[@]+"${tokenizer[@]}"} --cache_reasoner "$folder/text"
