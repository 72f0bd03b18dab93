#!/usr/bin/env bash
# Load CANN's environment where the image has CANN, then become the command, which so gets the
# signals of "docker stop". An image with an entry point of its own replaces that of CANN's image,
# hence this.
set -e

load() { # FILE [ARGUMENT...]: source it if it is there
    # shellcheck source=/dev/null
    [[ ! -r $1 ]] || source "$@"
}

load /usr/local/Ascend/ascend-toolkit/set_env.sh
for compiler in /usr/local/Ascend/cann-*/share/info/ascendnpu-ir/bin/set_env.sh; do
    load "$compiler"
done
load /usr/local/Ascend/nnal/atb/set_env.sh --cxx_abi="${ATB_CXX_ABI:-1}"

exec "$@"
