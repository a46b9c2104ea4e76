#!/usr/bin/env bash
# Runs the demo or the tests on this machine, in a virtual environment of their own. See --help.
set -euo pipefail

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=${CHROMA_VENV:-$ROOT/.venv}
MARKER=.made_by_local_sh # lies in every folder that the demo made: nothing else is ever removed

usage() {
    cat <<'TEXT'
usage: launch/local.sh COMMAND …

  demo [OUT]       lets a small trained Chroma answer a spoken question, trains it further, and exports it
  train CONFIG …   trains, with --processes N in several processes as on several hosts
  test [ARGS …]    runs the tests on the CPU

COMMAND --help tells more. Each first installs this package into a virtual environment, unless that is done already.

environment variables:
  CHROMA_VENV      the virtual environment (default: .venv in the repository)
  CHROMA_EXTRAS    further extras to install: tpu, cuda, cuda12, qwen, serve, eval (several with commas)
  PYTHON           the Python to make it from, 3.11 or newer (default: python3 on PATH; if that is older than 3.12, for which there
                   is no recent JAX, a newer one on PATH or of pyenv, if there is one)
  JAX_COMPILATION_CACHE_DIR   where compiled programs are kept (default: ~/.cache/chroma_jax/jax)
TEXT
}

usage_demo() {
    cat <<'TEXT'
usage: launch/local.sh demo [OUT] [--steps N] [--scratch] [--fresh]

The weights that come with the code answer a question that they know, asked in a voice that they never heard, to be answered in
another such voice. Then the demo prepares the embedded corpus, trains the configuration "nano" on it in two pieces (the second
resumes from the checkpoint of the first), and exports what came out. Takes some minutes on two CPU cores, plus one or two for the
installation. Uses a GPU or TPU if the environment has JAX for it (CHROMA_EXTRAS=cuda). Run again, it goes on where it stopped; once
all is trained, only the reply and the export are redone.

  OUT          results (default: runs/demo in the repository)
                 OUT/reply    reply.wav, reply.txt, reply.png, summary.json
                 OUT/data     the packed corpus       OUT/run      checkpoints, metrics
                 OUT/export   weights in the released model's layout
  --steps N    training steps (default: 100)
  --scratch    trains from random weights instead of those that come with the code
  --fresh      starts over: removes OUT first, if the demo made it
TEXT
}

usage_train() {
    cat <<'TEXT'
usage: launch/local.sh train CONFIG RUN --dataset_dir DATA [--processes N] [FLAGS …]

Runs "chroma-jax train" in this script's environment; FLAGS are its own (chroma-jax train CONFIG --help). With --processes N, so many
processes train together on virtual CPU devices, as so many hosts of a cluster would: what works so, works there. The mesh must have
a device for each, such as --mesh.data 2 for two. Every line of output has its process's number before it.

Ctrl-C and SIGTERM are passed on, so that the training saves itself. When a process fails, the others are ended too; the exit code is
that of the first that failed.
TEXT
}

usage_test() {
    cat <<'TEXT'
usage: launch/local.sh test [--tier TIER] [ARGS …]

Installs the package with its "test" extra, then runs pytest in the repository, with JAX on the CPU. The installation takes one or
two minutes. Results are printed; nothing is kept.

  --tier unit      tests of single parts, with types, shapes and promotions checked strictly; under two minutes on two cores
  --tier default   all tests but the slow ones (the default); about nine minutes on two cores
  --tier slow      the slow ones, one at a time because they need much memory; also installs the "dev" extra (PyTorch, transformers)
  ARGS             for pytest, such as -k NAME or paths relative to the repository
TEXT
}

die() {
    printf 'local.sh: error: %s\n' "$*" >&2
    exit 2
}

elapsed() { printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)); }

begin() { printf '\n[%s] %s\n' "$(elapsed)" "$*"; }

# is_recent PYTHON [MINOR]: whether it is Python 3.MINOR (11) or newer, and complete enough to install something.
is_recent() { "$1" -c "import ssl, sys; sys.exit(sys.version_info < (3, ${2:-11}))" 2>/dev/null; }

find_python() {
    local candidate minor
    if [[ -n ${PYTHON:-} ]]; then
        is_recent "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or newer, with ssl"
        printf '%s\n' "$PYTHON"
        return
    fi
    for minor in 12 11; do # JAX for 3.11 ended with 0.10
        for candidate in python3 python3.13 python3.12 python3.11 "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.*/bin/python3; do
            if is_recent "$candidate" "$minor"; then
                command -v "$candidate"
                return
            fi
        done
    done
    die "needs Python 3.11 or newer, and $(python3 --version 2>/dev/null || echo 'no python3') is what PATH has; set PYTHON"
}

put_in() {
    if command -v uv >/dev/null; then
        uv pip install --quiet --python "$VENV/bin/python" "$@"
    else
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >/dev/null
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    fi
}

# environment core|test|dev: makes the virtual environment and installs the package, if what it depends on has changed.
environment() {
    local extras=${CHROMA_EXTRAS:-} state python
    if [[ $1 != core ]]; then
        extras=$1${extras:+,$extras}
    fi
    state="$(cat "$ROOT/requirements.txt" "$ROOT/pyproject.toml" | cksum) $ROOT ${CHROMA_EXTRAS:-}"
    if [[ -x $VENV/bin/python && $(cat "$VENV/.chroma_jax.$1" 2>/dev/null) == "$state" ]]; then
        return
    fi
    if [[ -e $VENV && ! -f $VENV/pyvenv.cfg ]]; then
        die "$VENV is there and is not a virtual environment; set CHROMA_VENV to another folder"
    fi
    if [[ ! -x $VENV/bin/python ]]; then
        python=$(find_python)
        begin "making the virtual environment $VENV with $("$python" --version)"
        "$python" -m venv --clear --without-pip "$VENV"
    fi
    is_recent "$VENV/bin/python" || die "$VENV has a Python older than 3.11; remove it, or set CHROMA_VENV to another folder"
    begin "installing chroma-jax${extras:+[$extras]} into $VENV"
    put_in --editable ".${extras:+[$extras]}"
    if [[ ,$extras, == *,dev,* || ,$extras, == *,eval,* ]]; then
        put_in --no-deps "resemblyzer>=0.1.4,<0.2" # its own list asks for what it does not need
    fi
    printf '%s\n' "$state" >"$VENV/.chroma_jax.$1"
    printf '%s\n' "$state" >"$VENV/.chroma_jax.core" # the core is part of test, and test of dev
    if [[ $1 == dev ]]; then
        printf '%s\n' "$state" >"$VENV/.chroma_jax.test"
    fi
}

# quick and quiet: a second run finds its programs compiled
settings() {
    export PYTHONUTF8=1
    export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/chroma_jax/jax}
    export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}
    if [[ ! -e /dev/accel0 && ! -e /dev/vfio/0 ]]; then # its compiler, if installed, is not to look for a TPU
        export TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-1 TPU_WORKER_HOSTNAMES=localhost TPU_STDERR_LOG_LEVEL=3
    fi
}

chroma() { "$VENV/bin/python" -m chroma_jax "$@"; }

# Prints four lines: a valid question's recording, its assistant's reference recording and what is said there, the question.
held_out() {
    "$VENV/bin/python" - "$ROOT/data_pipelines/corpus" <<'PY'
import json
import sys
from pathlib import Path

corpus = Path(sys.argv[1])
dialogues, references = (
    [json.loads(line) for line in (corpus / name).read_text().splitlines()] for name in ("dialogues.jsonl", "references.jsonl")
)
asked = next(d for d in dialogues if d["split"] == "valid")
voice = next(r for r in references if r["voice"] == asked["assistant_voice"] and r["index"] == 0)
print(corpus / asked["question_audio"], corpus / voice["audio"], voice["text"], asked["question"], sep="\n")
PY
}

demo() {
    local out='' steps=100 fresh=no scratch=no picked recording voice transcript question
    while (($#)); do
        case $1 in
        -h | --help)
            usage_demo
            return
            ;;
        --fresh) fresh=yes ;;
        --scratch) scratch=yes ;;
        --steps)
            [[ ${2-} =~ ^[1-9][0-9]*$ ]] || die "demo: --steps wants a positive number, got '${2-}'"
            steps=$2
            shift
            ;;
        -*) die "demo: unknown option '$1'; see demo --help" ;;
        *)
            [[ -z $out ]] || die "demo: one folder for the results, got '$out' and '$1'"
            out=$1
            ;;
        esac
        shift
    done
    out=${out:-$ROOT/runs/demo}
    [[ $out == /* ]] || out=$PWD/$out
    if [[ -e $out && ! -f $out/$MARKER ]]; then
        [[ -d $out && -z $(ls -A -- "$out") ]] || die "demo: $out was not made by the demo; name another folder"
    elif [[ $fresh == yes ]]; then
        rm -rf -- "$out"
    fi

    cd -- "$ROOT"
    environment core
    settings
    mkdir -p -- "$out"
    : >"$out/$MARKER"
    picked=$(held_out)
    {
        read -r recording
        read -r voice
        read -r transcript
        read -r question
    } <<<"$picked"
    begin "1/5 answering \"$question\" in the voice of $(basename "$voice") → $out/reply"
    chroma generate nano --question "$recording" --reference "$voice" --transcript "$transcript" --out "$out/reply"

    local -a less=(--data.prompts_per_dialogue 1 --data.curriculum.speeds 1.0) # one pass, each voice at its own speed
    local -a how=(--optimizer.decay_steps "$steps" --training.eval_interval_steps 50 --checkpoint.save_interval_steps 50)
    if [[ $scratch == yes ]]; then
        how+=(--loss.text_weight 1 --optimizer.freeze) # nothing: the Reasoner too, which the configuration expects to be trained
    else
        less+=(--data.tokenizer "$ROOT/chroma_jax/pretrained/nano/tokenizer.json")
        [[ -d $out/start ]] || chroma convert import nano "$out/start" --onto nano
        how+=(--init-from "$out/start" --optimizer.learning_rate 2e-4)
    fi
    begin "2/5 preparing the corpus → $out/data"
    chroma prepare nano "$out/data" --codec nano "${less[@]}"
    set -- --dataset_dir "$out/data" "${less[@]}" "${how[@]}"
    begin "3/5 training to step $(((steps + 1) / 2)) → $out/run"
    chroma train nano "$out/run" "$@" --training.steps $(((steps + 1) / 2))
    begin "4/5 resuming, to step $steps"
    chroma train nano "$out/run" "$@" --training.steps "$steps"
    begin "5/5 exporting the weights → $out/export"
    rm -rf -- "$out/export" # of an earlier run
    chroma export "$out/run" "$out/export"

    begin "done; everything is in $out"
    cat <<'TEXT'
  reply/     reply.wav, reply.txt, reply.png, summary.json
  data/      the packed corpus
  run/       config.txt, metrics.jsonl, tensorboard/, checkpoints/
  export/    the weights in the released model's layout
TEXT
}

free_port() { "$VENV/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# prefixed TEXT: its input with TEXT before every line, of a progress bar its last state; ends with its input, whatever is signalled
prefixed() {
    local line
    while IFS= read -r line || [[ -n $line ]]; do
        printf '%s%s\n' "$1" "${line##*$'\r'}"
    done
}

train() {
    local processes=1 address i pid ended code=0 deadline='' signalled=no
    local -a given=() running=() left
    while (($#)); do
        case $1 in
        -h | --help)
            usage_train
            return
            ;;
        --processes)
            [[ ${2-} =~ ^[1-9][0-9]*$ ]] || die "train: --processes wants a positive number, got '${2-}'"
            processes=$2
            shift
            ;;
        --) ;; # may set the flags apart
        --distributed.*) die "train: '$1' is for clusters; here there is --processes N" ;;
        *) given+=("$1") ;;
        esac
        shift
    done
    ((${#given[@]})) || die "train: expected CONFIG RUN --dataset_dir DATA; see train --help"
    (cd -- "$ROOT" && environment core)
    settings
    if ((processes == 1)); then
        exec "$VENV/bin/python" -m chroma_jax train "${given[@]}"
    fi
    export JAX_PLATFORMS=cpu
    address=127.0.0.1:$(free_port)
    set -- "${given[@]}" --distributed.coordinator "$address" --distributed.processes "$processes"
    for ((i = 0; i < processes; i++)); do
        trap '' INT TERM # for what prefixes lines, from its beginning
        exec 3> >(prefixed "[$i] ") 4> >(prefixed "[$i] " >&2)
        trap 'signalled=yes; kill -TERM "${running[@]}" 2>/dev/null || true' INT TERM
        "$VENV/bin/python" -m chroma_jax train "$@" --distributed.process "$i" >&3 2>&4 3>&- 4>&- &
        running+=("$!")
        exec 3>&- 4>&-
    done
    while ((${#running[@]})); do
        sleep 0.2 || true # Ctrl-C reaches it too
        left=()
        for pid in "${running[@]}"; do
            if kill -0 "$pid" 2>/dev/null; then
                left+=("$pid")
                continue
            fi
            ended=0
            wait "$pid" 2>/dev/null || ended=$?
            if ((ended && !code)); then
                code=$ended
                printf 'local.sh: a process ended with exit code %s\n' "$code" >&2
            fi
        done
        running=(${left[@]+"${left[@]}"})
        if ((code && ${#running[@]})); then
            # 75: they have saved themselves together, and are ending; in another case they may wait for the lost one for ever
            if [[ -z $deadline ]]; then
                deadline=$((SECONDS + 30))
                ((code == 75)) || [[ $signalled == yes ]] || kill -TERM "${running[@]}" 2>/dev/null || true
            elif ((SECONDS > deadline)); then
                kill -KILL "${running[@]}" 2>/dev/null || true
            fi
        fi
    done
    return "$code"
}

run_tests() {
    if [[ ${1-} == -h || ${1-} == --help ]]; then
        usage_test
        return
    fi
    cd -- "$ROOT"
    local extra=test processes=2 tier=default chosen=(-m "not slow")
    if [[ ${1-} == --tier ]]; then
        tier=${2-}
        shift $(($# > 1 ? 2 : 1))
    fi
    case $tier in
    unit) chosen+=(tests/unit) ;;
    default) ;;
    slow) extra=dev processes=0 chosen=(-m slow) ;;
    *) die "test: --tier must be unit, default or slow, got '$tier'" ;;
    esac
    environment "$extra"
    settings
    begin "testing"
    export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
    exec "$VENV/bin/python" -m pytest -n "$processes" --dist loadscope --no-loadscope-reorder "${chosen[@]}" "$@" # in place of the shell: whoever stops this stops the tests
}

[[ $VENV == /* ]] || VENV=$PWD/$VENV
case ${1-} in
demo) demo "${@:2}" ;;
train) train "${@:2}" ;;
test) run_tests "${@:2}" ;;
-h | --help | help) usage ;;
'') die "which command? train, demo or test; see --help" ;;
*) die "unknown command '$1'; commands: demo, train, test" ;;
esac
