#!/usr/bin/env bash
# Make the base of the CPU image from Debian packages, for machines that reach no image registry:
#
#   sudo scripts/containers/base_image.sh [TAG]
#
# The image is Debian's own Python in a minimal root. It trusts the certificates that this machine
# trusts, so that builds in it reach what this machine reaches. The root is kept in the user's cache
# folder and made anew when it is not there. Needs mmdebstrap and a running docker.
#   DEBIAN_MIRROR   where packages come from (default: mmdebstrap's)
set -euo pipefail

tag=${1:-npu-qat-base:bookworm}
certificates=/etc/ssl/certs/ca-certificates.crt
packages=ca-certificates,python3,python3-venv
cache=${XDG_CACHE_HOME:-${HOME:?}/.cache}/npu-qat-containers
root=$cache/base-$(sha256sum "$0" "$certificates" 2>/dev/null | sha256sum | cut -c1-16).tar

if ! command -v mmdebstrap >/dev/null; then
    echo "base_image.sh: mmdebstrap is not installed: apt-get install -y mmdebstrap" >&2
    exit 1
fi
if [[ ! -s $root ]]; then
    mkdir -p "$cache"
    options=(--variant=apt "--include=$packages")
    [[ ! -r $certificates ]] || options+=(--customize-hook="upload $certificates $certificates")
    partial=${root%.tar}.partial.tar # mmdebstrap goes by the suffix
    mmdebstrap "${options[@]}" bookworm "$partial" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
    mv "$partial" "$root"
fi
docker import \
    --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
    "$root" "$tag" >/dev/null
echo "$tag"
