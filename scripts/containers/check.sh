#!/usr/bin/env bash
# Try the containers with a real engine ("make containers"):
#
#   sudo scripts/containers/check.sh [PYTHON [OPTIONS OF PYTEST...]]
#
# For a bare Debian or Ubuntu, as root: installs Debian's docker.io and mmdebstrap when they are not
# there, compose and the linters as Python packages; starts a docker daemon of its own in a scratch
# folder, which leaves the network of this machine as it is; makes the base image from Debian
# packages; and runs tests/containers with PYTHON, an interpreter that has pytest. At the end all of
# it is gone but the Debian packages and, in the user's cache folder, what took long to fetch.
#
# Where no engine can run it says SKIPPED and why, and fails: exit code 75, or 0 with
# CONTAINERS_OPTIONAL=1. On a machine with an engine of its own the tests run without this script:
#   python -m pytest -m container tests/containers
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${1:-python3}
shift || true
cache=${XDG_CACHE_HOME:-${HOME:?}/.cache}/npu-qat-containers
scratch=$(mktemp -d)
began=$SECONDS

skip() { # WHY: there can be no engine here
    printf '\n*** SKIPPED: the containers were not tried. %s\n\n' "$1" >&2
    [[ ${CONTAINERS_OPTIONAL:-} == 1 ]] && exit 0
    exit 75
}

say() {
    printf -- '--- containers: %s (%d s)\n' "$1" $((SECONDS - began))
}

clean_up() {
    local status=$?
    trap - EXIT INT TERM
    if [[ -s $scratch/docker.pid ]]; then
        local daemon
        daemon=$(<"$scratch/docker.pid")
        docker ps --quiet --all | xargs --no-run-if-empty docker rm --force >/dev/null 2>&1 || true
        kill "$daemon" 2>/dev/null || true
        tail --pid="$daemon" --sleep-interval=0.2 -f /dev/null 2>/dev/null || true
    fi
    umount "$scratch"/exec/netns/* 2>/dev/null || true
    rm -rf "$scratch" || echo "check.sh: could not remove $scratch" >&2
    exit "$status"
}
trap clean_up EXIT INT TERM

install_engine() {
    local missing=()
    [[ -x /usr/sbin/dockerd ]] || missing+=(docker.io)
    command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null || skip "No docker daemon, and no apt-get to install one with."
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends "${missing[@]}" >"$scratch/apt.log" 2>&1 ||
        { tail -20 "$scratch/apt.log" >&2; skip "The packages ${missing[*]} could not be installed."; }
}

install_tools() { # into the cache: compose and the linters, at the versions of tools.txt
    tools=$cache/tools-$(cat "$root/scripts/containers/tools.txt" <("$python" -VV) | sha256sum | cut -c1-16)
    if [[ ! -e $tools/complete ]]; then
        say "installing compose and linters"
        rm -rf "$tools"
        "$python" -m venv "$tools"
        "$tools/bin/python" -m pip install --quiet --disable-pip-version-check \
            --requirement "$root/scripts/containers/tools.txt"
        touch "$tools/complete"
    fi
    DOCKER_CONFIG=$scratch/config "$root/scripts/containers/install_compose.sh" "$tools"
}

start_daemon() {
    # Without a bridge and rules of its own; "host" and "none" are the networks of the tests.
    dockerd --data-root "$scratch/data" --exec-root "$scratch/exec" --pidfile "$scratch/docker.pid" \
        --host "unix://$scratch/docker.sock" --bridge=none --iptables=false --ip6tables=false \
        --ip-forward=false --ip-masq=false >"$scratch/dockerd.log" 2>&1 &
    for _ in {1..100}; do
        docker version >/dev/null 2>&1 && return
        kill -0 $! 2>/dev/null || break
        sleep 0.2
    done
    tail -5 "$scratch/dockerd.log" >&2
    skip "The docker daemon does not start here; its last lines are above."
}

fetch_torch() { # where this machine's pip finds it, so that the build need not reach it
    local version wheels=$cache/wheels
    version=$(sed -n 's/^torch==//p' "$root/constraints.txt")
    mkdir -p "$wheels"
    compgen -G "$wheels/torch-$version+cpu-*.whl" >/dev/null && return
    say "fetching torch $version"
    python3 -m venv "$scratch/pip"
    "$scratch/pip/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps \
        --dest "$wheels" --extra-index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu"
}

[[ $(uname -s) == Linux ]] || skip "A docker daemon needs Linux."
[[ $(uname -m) == x86_64 ]] || # with Docker's own package: see "On a machine with an engine" above
    skip "install_compose.sh knows docker compose for x86_64 only, and this is $(uname -m)."
[[ $(id -u) == 0 ]] || skip "Starting a docker daemon needs root: sudo make containers."
mkdir -p "$cache"
export PATH=/usr/sbin:/usr/bin:$PATH # Debian's docker goes before others: it builds without buildx
install_engine
install_tools
export DOCKER_HOST=unix://$scratch/docker.sock DOCKER_CONFIG=$scratch/config DOCKER_BUILDKIT=1
start_daemon
say "$(docker version --format 'docker {{.Server.Version}}'), $(docker compose version)"
CPU_BASE=$("$root/scripts/containers/base_image.sh")
fetch_torch
say "base image and wheels are there"
export CPU_BASE BUILD_NETWORK=host NETWORK=none NPU_QAT_WHEELS=$cache/wheels PATH=$tools/bin:$PATH
cd "$root"
"$python" -m pytest -m container tests/containers --basetemp "$scratch/pytest" \
    --durations=0 --durations-min=2 "$@"
say "done"
