#!/usr/bin/env bash
# What every host of a queued resource runs when it boots, as root: mounts the bucket, pulls the image and trains, again and again
# until the training is done. `python -m launch.cloud queued-resource` puts the values of these variables above, and in $@ the end of
# docker's command line: options, image, arguments of chroma-jax.
set -euo pipefail

: "${BUCKET:?}" "${IMAGE:?}" "${RESTARTS:?}" "${GRACE_SECONDS:?}" "${1:?}"
: "${GCSFUSE:=3.4.0}" # a release of github.com/GoogleCloudPlatform/gcsfuse
export HOME=${HOME:-/root} # where docker keeps its credentials

say() { printf 'chroma: %s\n' "$*"; } # to the machine's log: journalctl --unit google-startup-scripts

mount_bucket() {
    local package=/tmp/gcsfuse.deb from=https://github.com/GoogleCloudPlatform/gcsfuse/releases/download
    if mountpoint --quiet /bucket; then
        return
    fi
    if ! command -v gcsfuse >/dev/null; then
        say "installing gcsfuse $GCSFUSE"
        curl --fail --silent --show-error --location --retry 9 --output "$package" "$from/v$GCSFUSE/gcsfuse_${GCSFUSE}_amd64.deb"
        apt-get --option DPkg::Lock::Timeout=600 install --yes "$package" # other installations may be going on at boot
    fi
    mkdir -p /bucket
    # a checkpoint gets its name once it is complete; a host sees at once what another has written
    gcsfuse -o allow_other --implicit-dirs --rename-dir-limit 1000000 --metadata-cache-ttl-secs 0 \
        --metadata-cache-negative-ttl-secs 0 "$BUCKET" /bucket
}

pull_image() {
    local registry=${IMAGE%%/*} try
    if [[ $registry == *.* ]]; then
        gcloud auth configure-docker "$registry" --quiet || say "gcloud knows no credentials for $registry"
    fi
    for try in 1 2 3 4 5 6; do
        if docker pull --quiet "$IMAGE"; then
            return
        fi
        say "pulling the image failed, try $try of 6"
        sleep $((10 * try))
    done
    return 1
}

stopping=no
trap 'stopping=yes' TERM # the machine goes down; docker stops the container, and the next boot goes on

mount_bucket
pull_image
failures=0
while [[ $stopping == no ]]; do
    docker rm --force chroma >/dev/null 2>&1 || true # of before a sudden end
    code=0
    # as root, to whom the TPU's device files and the bucket belong; in the host's network, by which JAX finds the others
    docker run --name chroma --privileged --user 0 --network host --ipc host --volume /bucket:/bucket \
        --stop-timeout "$GRACE_SECONDS" "$@" || code=$?
    case $code in
    0)
        say "the training is done; the machine goes on costing until it is deleted"
        exit 0
        ;;
    75) say "the training wants to be started again" ;;
    2 | 77 | 125 | 126 | 127) # bad input, diverged, no image or program
        say "exit code $code: the next time would be the same; see: docker logs chroma"
        exit "$code"
        ;;
    *)
        failures=$((failures + 1))
        if ((failures > RESTARTS)); then
            say "exit code $code, and $RESTARTS restarts are used up; see: docker logs chroma"
            exit "$code"
        fi
        say "exit code $code; restart $failures of $RESTARTS"
        sleep 10
        ;;
    esac
done
