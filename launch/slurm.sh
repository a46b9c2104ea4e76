#!/usr/bin/env bash
# Trains on a GPU cluster under Slurm: one process per node, with all its GPUs. See launch/cloud.py, or by hand:
#
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh chroma_4b RUN --dataset_dir DATA --mesh.fsdp 16
#
# The arguments are those of `chroma-jax train`; RUN and DATA lie where all nodes see them. CHROMA_PYTHON: the Python of the environment
# in which chroma-jax is installed. Two minutes before its time is over, or when Slurm takes the nodes away, the training saves itself;
# the job goes back into the queue, and on from there. So it does when a process is lost, but no more once it has been back
# CHROMA_RESTARTS times (default: 20).
#SBATCH --job-name=chroma
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

die() {
    printf 'slurm.sh: error: %s\n' "$*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || die "this is for sbatch: sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh CONFIG RUN --dataset_dir DATA …"
(($# >= 2)) || die "expected the arguments of chroma-jax train: CONFIG RUN --dataset_dir DATA …"

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export CHROMA_PYTHON=${CHROMA_PYTHON:-python3}
export CHROMA_COORDINATOR=${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000)) # another port for another job on the same node

# Processes that saved themselves do not end at the same moment: the first is no reason to kill the others at once, but after a while,
# as others that wait for a lost one never end. JAX takes a process with SLURM_LOCALID to be for one GPU; here it has all of its node.
# shellcheck disable=SC2016 # the variables are the process's own
srun --kill-on-bad-exit=0 --wait=300 --label bash -c '
    unset SLURM_LOCALID
    exec "$CHROMA_PYTHON" -m chroma_jax train "$@" --distributed.coordinator "$CHROMA_COORDINATOR" \
        --distributed.processes "$SLURM_NTASKS" --distributed.process "$SLURM_PROCID"
' process "$@" &
step=$!
trap 'ended=no; echo "slurm.sh: asking the training to save itself" >&2; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
ended=no
until [[ $ended == yes ]]; do
    ended=yes code=0
    wait "$step" || code=$? # unless the trap interrupts it
done

again=no
if ((code == 75 || (code == 76 || code > 128) && ${SLURM_RESTART_COUNT:-0} < ${CHROMA_RESTARTS:-20})); then
    again=yes
fi
# a job that was cancelled, or that Slurm itself puts back, is no longer running
if [[ $again == yes && $(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID") == RUNNING ]]; then
    echo "slurm.sh: back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
