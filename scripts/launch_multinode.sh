#!/usr/bin/env bash
# Start one npu-qat command on several machines, by the launcher that fits. See --help.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: launch_multinode.sh [OPTIONS] -- COMMAND [ARGUMENTS]

Starts one npu-qat command on several machines, for example
    train my-run.yaml --output /shared/runs/mine      or      doctor --cluster my-run.yaml

Three ways (--via); without it the first that fits:
  hostfile    Run on ONE machine. The deepspeed launcher starts the others by pdsh and ssh.
              Needs --hostfile, passwordless ssh, pdsh, and the same paths on every machine.
  pods        Run on EVERY machine or pod, which knows its number; the deepspeed launcher starts
              its own processes, without ssh. Needs --master, --nodes and --node-rank, or the
              variables that an operator sets: MASTER_ADDR, MASTER_PORT, WORLD_SIZE /
              LOCAL_WORLD_SIZE and RANK (ascend-operator), or JOB_COMPLETION_INDEX (Indexed Job).
  rendezvous  Run on EVERY machine; torchrun hands out the numbers (c10d). Needs --master and
              --nodes. The machine that has the address of --master keeps the rendezvous.

Options:
  --via WAY            hostfile, pods or rendezvous
  --master HOST[:PORT] where all processes meet (default port 29500)
  --nodes N            number of machines
  --devices M          processes a machine (default: LOCAL_WORLD_SIZE, else as many as there are
                       NPUs or GPUs here, else 1)
  --node-rank R        number of this machine, from 0
  --hostfile FILE      lines "host slots=8", as DeepSpeed reads them
  --wait SECONDS       how long to wait for the machine of --master (default 300)
  --env NAME           hostfile: carry this variable to the other machines too; repeat for more.
                       Tokens, keys and passwords are never carried: log in on each machine
  --dry-run            print what would be started, and stop
  -h, --help           this text

The interface that leads to --master is found on every machine by the program itself; set
GLOO_SOCKET_IFNAME, HCCL_IF_IP or HCCL_SOCKET_IFNAME to decide otherwise. On a machine with NPUs,
HCCL_CONNECT_TIMEOUT is set to 600 unless it is set. PYTHON names another Python.

If a machine is lost, the others stop within NPU_QAT_PEER_TIMEOUT seconds (default 60) with exit
code 75 (1 under torchrun) and say which. Start the same again with --resume auto.
HELP
}

fail() {
  echo "launch_multinode.sh: $*" >&2
  exit 2
}

# By its name. What is carried stands in the arguments of ssh, where ps and logs show it.
is_secret() {
  [[ $1 == *_@(TOKEN|KEY|SECRET|PASSWORD) ]]
}

python=${PYTHON:-python}
via='' master='' nodes='' devices='' node_rank='' hostfile='' wait=300 dry_run=''
carried=()
given=("$0" "$@")
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=1 && shift && continue ;;
    --) shift && break ;;
    --*) ;;
    *) fail "'$1' is no option; the command of npu-qat goes behind --" ;;
  esac
  (($# > 1)) || fail "$1 needs a value (see --help)"
  case $1 in
    --via) via=$2 ;;
    --master) master=$2 ;;
    --nodes) nodes=$2 ;;
    --devices) devices=$2 ;;
    --node-rank) node_rank=$2 ;;
    --hostfile) hostfile=$2 ;;
    --wait) wait=$2 ;;
    --env)
      if is_secret "$2"; then fail "--env $2: it would be seen by all; log in on each machine"; fi
      carried+=("$2")
      ;;
    *) fail "unknown option '$1' (options of npu-qat go behind --)" ;;
  esac
  shift 2
done
(($#)) || fail "no command behind --, for example: -- train my-run.yaml --output runs/mine"
job=("$@")

# What an operator told this pod. RANK and WORLD_SIZE count pods and devices there, not processes, so
# they must not reach the launcher.
: "${node_rank:=${RANK:-${JOB_COMPLETION_INDEX:-}}}"
: "${devices:=${LOCAL_WORLD_SIZE:-}}"
if [[ -z $nodes && -n ${WORLD_SIZE:-} && -n $devices ]]; then nodes=$((WORLD_SIZE / devices)); fi
if [[ -z $master && -n ${MASTER_ADDR:-} ]]; then master=$MASTER_ADDR:${MASTER_PORT:-29500}; fi
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT

if [[ -z $via ]]; then
  if [[ -n $hostfile ]]; then
    via=hostfile
  elif [[ -n $node_rank ]]; then
    via=pods
  else
    via=rendezvous
  fi
fi

npus=$(find /dev -maxdepth 1 -name 'davinci[0-9]*' 2>/dev/null | wc -l)
if [[ -z $devices ]]; then
  devices=$npus
  if ((devices == 0)) && command -v nvidia-smi >/dev/null; then
    devices=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
  fi
  if ((devices == 0)); then devices=1; fi
fi
if ((npus > 0)); then export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-600}; fi

whole_number() {
  [[ $2 =~ ^[0-9]+$ ]] || fail "$1 is '$2': give a whole number"
}
whole_number --devices "$devices"
whole_number --wait "$wait"
host=${master%:*} port=29500
if [[ $master =~ :([0-9]+)$ ]]; then port=${BASH_REMATCH[1]}; fi

needs_master() {
  [[ -n $master ]] || fail "--via $via needs --master HOST[:PORT]: an address that every machine reaches"
  [[ -n $nodes ]] || fail "--via $via needs --nodes"
  whole_number --nodes "$nodes"
  ((nodes > 0)) || fail "--nodes is 0"
}

# The address that others reach this machine by, on the way to the rendezvous.
own_address() {
  "$python" -c 'import sys
from npu_qat.training.network import interface_to
try:
    print(interface_to(sys.argv[1], wait=float(sys.argv[2])).address)
except ValueError as error:
    sys.exit(f"launch_multinode.sh: {error}")' "$host" "$wait"
}

# Until the machine of the rendezvous is up; a launcher would end with a stack trace.
await_master() {
  "$python" -m npu_qat doctor --rendezvous "$host:$port" --wait "$wait" >&2 ||
    fail "this machine does not reach $host:$port; nothing was started"
}

export NPU_QAT_LAUNCH
NPU_QAT_LAUNCH=$(printf '%q ' "${given[@]}")
NPU_QAT_LAUNCH=${NPU_QAT_LAUNCH% }

case $via in
  hostfile)
    [[ -f $hostfile ]] || fail "--via hostfile needs --hostfile FILE; '$hostfile' is not there"
    # DeepSpeed carries a few variables by their prefix; these go by a file. Interfaces and addresses
    # differ from machine to machine, and stay here.
    environment=$(mktemp)
    trap 'rm -f "$environment"' EXIT
    while IFS='=' read -r -d '' name value; do
      if is_secret "$name"; then
        unset "$name" # DeepSpeed carries some of them by itself
        continue
      fi
      case $name in
        HCCL_IF_IP | *_SOCKET_IFNAME) continue ;;
        HCCL_* | NCCL_* | GLOO_* | ASCEND_* | NPU_QAT_* | OMP_* | MKL_* | HF_* | TORCH_* | DS_*) ;;
        PYTORCH_* | TOKENIZERS_* | TASK_QUEUE_ENABLE | CPU_AFFINITY_CONF | PYTHONPATH) ;;
        *) [[ " ${carried[*]-} " == *" $name "* ]] || continue ;;
      esac
      printf '%s=%q\n' "$name" "$value" >>"$environment"
    done < <(env -0)
    export DS_ENV_FILE=$environment
    command=("$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --force_multi)
    if [[ -n $host ]]; then command+=(--master_addr "$host"); fi
    command+=(--master_port "$port" --module npu_qat "${job[@]}")
    ;;
  pods)
    needs_master
    [[ -n $node_rank ]] || fail "--via pods needs --node-rank (or RANK or JOB_COMPLETION_INDEX)"
    whole_number --node-rank "$node_rank"
    ((node_rank < nodes)) || fail "--node-rank is $node_rank, but --nodes is $nodes: they count from 0"
    # What `deepspeed --no_ssh --hostfile` starts on each machine. Started directly, because its own
    # parent would swallow the signal by which a pod is asked to stop.
    world=$("$python" -c 'import base64, json, sys
nodes, devices = map(int, sys.argv[1:])
world = {f"node-{node}": list(range(devices)) for node in range(nodes)}
print(base64.urlsafe_b64encode(json.dumps(world).encode()).decode())' "$nodes" "$devices")
    command=("$python" -m deepspeed.launcher.launch --world_info "$world" --node_rank "$node_rank")
    command+=(--master_addr "$host" --master_port "$port" --module npu_qat "${job[@]}")
    ;;
  rendezvous)
    needs_master
    address=$(own_address)
    is_host=false
    if [[ $("$python" -c 'import socket, sys; print(socket.gethostbyname(sys.argv[1]))' "$host") == "$address" ]]; then
      is_host=true
    fi
    command=("$python" -m torch.distributed.run --nnodes "$nodes" --nproc_per_node "$devices")
    command+=(--rdzv_backend c10d --rdzv_endpoint "$host:$port" --rdzv_id npu-qat)
    command+=(--rdzv_conf "is_host=$is_host,join_timeout=$wait,read_timeout=20" --local_addr "$address")
    command+=(-m npu_qat "${job[@]}")
    ;;
  *) fail "--via is '$via': hostfile, pods or rendezvous" ;;
esac

if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
if [[ $via == hostfile ]]; then
  "${command[@]}" &
  child=$! asked=1 code=0
  trap 'asked=1; kill -TERM "$child" 2>/dev/null || true' INT TERM
  while [[ -n $asked ]]; do # a signal ends wait, not the child
    asked='' code=0
    wait "$child" || code=$?
  done
  exit "$code"
fi
if [[ $via == rendezvous && $is_host == false ]]; then await_master; fi
if [[ $via == pods && $node_rank != 0 ]]; then await_master; fi
exec "${command[@]}"
