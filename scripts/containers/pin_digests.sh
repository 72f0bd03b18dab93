#!/usr/bin/env bash
# Print the base images of the services with their digests, as lines for .env:
#
#   scripts/containers/pin_digests.sh cpu-train npu-train >> .env
#
# A tag can be moved by whoever owns it, a digest cannot: with these lines a build next year starts
# from the same bytes. A digest names the image of all architectures together. Needs docker compose,
# python3, and a way to the registry; without buildx the image is pulled, which the build needs anyway.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
services=("$@")
((${#services[@]})) || services=(cpu-train npu-train npu-parity)
declare -A variable=([cpu-train]=CPU_BASE [npu-train]=NPU_BASE [npu-parity]=PARITY_BASE)

base_of() { # SERVICE: the base image that compose would build it from
    docker compose --project-directory "$root" config --format json | python3 -c '
import json, sys
print(json.load(sys.stdin)["services"][sys.argv[1]]["build"]["args"]["BASE_IMAGE"])' "$1"
}

digest_of() { # IMAGE
    if docker buildx version >/dev/null 2>&1; then
        docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$1"
    else
        docker pull --quiet "$1" >/dev/null
        docker image inspect --format '{{index .RepoDigests 0}}' "$1" | sed 's/.*@//'
    fi
}

for service in "${services[@]}"; do
    if [[ -z ${variable[$service]:-} ]]; then
        echo "pin_digests.sh: $service: choose of ${!variable[*]}" >&2
        exit 1
    fi
    image=$(base_of "$service")
    image=${image%@*}
    digest=$(digest_of "$image")
    if [[ $digest != sha256:* ]]; then
        echo "pin_digests.sh: $image: the registry gave no digest: $digest" >&2
        exit 1
    fi
    echo "${variable[$service]}=$image@$digest"
done
