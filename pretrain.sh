#!/usr/bin/env bash
# Launch training through torchrun. Every setting is an environment variable; further arguments go to main.py.
#
#   bash pretrain.sh                                                                   the quickstart
#   DATA=/path/imagenet CONFIG=configs/pola_swin_t.yaml NPROC=8 bash pretrain.sh       one node
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 DATA=… CONFIG=… bash pretrain.sh            on each of two nodes
#
# CONFIG       YAML file                            configs/quickstart.yaml
# DATA         data set folder (--data-path)        none
# OUTPUT, TAG  run folder OUTPUT/NAME/TAG           those of the configuration
# NPROC        processes on this node               its GPUs; 2 on a CPU
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT       1, 0, 127.0.0.1, 29500 (one node picks a free port)
# MAX_RESTARTS restarts after a process died         3 (each continues from the newest checkpoint)
# JOIN_TIMEOUT  seconds that a node waits for the others    1800
# SHUTDOWN_TIMEOUT  seconds that processes have to save and end when the run is told to stop    120
# PYTHON       interpreter                          .venv/bin/python if it exists, else python3
#
# SIGTERM, SIGUSR1, SIGHUP (save, then end) and SIGINT (end) reach every process; SIGHUP is ignored where it was started
# with nohup. Exit codes: 0 finished; 75 told to stop and saved, the same command continues; anything else is a failure.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x "$here/.venv/bin/python" ]] && PYTHON="$here/.venv/bin/python"
fi
NNODES="${NNODES:-1}"
CONFIG="${CONFIG:-configs/quickstart.yaml}"
[[ -e "$CONFIG" || ! -e "$here/$CONFIG" ]] || CONFIG="$here/$CONFIG"  # from another folder, the project's configs

arguments=(--cfg "$CONFIG")
[[ -n "${DATA:-}" ]] && arguments+=(--data-path "$DATA")
[[ -n "${OUTPUT:-}" ]] && arguments+=(--output "$OUTPUT")
[[ -n "${TAG:-}" ]] && arguments+=(--tag "$TAG")
arguments+=("$@")
# A mistake in the configuration is answered here, once, before any process starts.
answer=$("$PYTHON" -c 'import sys
sys.path.insert(0, sys.argv.pop(1))
from config import ConfigError, make_plan, parse_command_line
config = parse_command_line()
import torch
from main import check
from utils.devices import device_type
from utils.environment import cores
try:
    check(config)
except ConfigError as problem:
    print(f"main.py: error: {problem}", file=sys.stderr)
    sys.exit(2)
gpus = 0 if device_type(config.DEVICE) == "cpu" else torch.accelerator.device_count()
print(gpus, cores(), make_plan(config).folder)' "$here" "${arguments[@]}")
gpus="${answer%% *}" answer="${answer#* }"
cores="${answer%% *}" folder="${answer#* }"

if (( gpus > 0 )); then
  arguments+=(--amp)
  NPROC="${NPROC:-$gpus}"
else
  NPROC="${NPROC:-2}"
  # each process gets its share of the cores
  threads=$(( cores / NPROC ))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( threads > 0 ? threads : 1 ))}"
fi

if (( NNODES > 1 )); then
  node="${NODE_RANK:-0}" port="${MASTER_PORT:-29500}"
  : "${MASTER_ADDR:?MASTER_ADDR names the first node when NNODES > 1}"
  is_first=$(( node == 0 ))
  rendezvous=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_id polaformer --rdzv_endpoint "$MASTER_ADDR:$port"
    --rdzv_conf "is_host=$is_first,join_timeout=${JOIN_TIMEOUT:-1800}")
else
  rendezvous=(--standalone)
fi

# torchrun's own options, by environment, so that a version without them starts all the same
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1,SIGQUIT
[[ -n "$(trap -p HUP)" ]] || PET_SIGNALS_TO_HANDLE+=,SIGHUP  # started with nohup, it stays ignored by all
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_TIMEOUT:-120}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a new store after every restart: the old one's addresses are stale
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"  # else a process writes pages once a second while rank 0 is gone
export POLAFORMER_LAUNCHER=$$  # processes that lose this script save and end
rm -f "$folder/PREEMPTED"
echo "starting $NPROC process$( (( NPROC == 1 )) || echo es) on this node: $CONFIG, run folder $folder"
set -m  # torchrun in a process group of its own: Ctrl-C reaches it once, through the trap below
"$PYTHON" "$here/utils/faults/launch.py" "${rendezvous[@]}" --max_restarts "${MAX_RESTARTS:-3}" --nproc_per_node "$NPROC" \
  "$here/main.py" "${arguments[@]}" &
launcher=$!
told=
stop() {  # once: torchrun does not survive a third signal
  trap '' TERM USR1 HUP
  told=1
  kill "-$1" "$launcher" 2> /dev/null || true
}
trap 'stop TERM' TERM
trap 'stop USR1' USR1
trap 'stop HUP' HUP  # without effect where it is ignored
trap 'kill -INT "$launcher" 2> /dev/null || true' INT
watcher=
if (( NNODES > 1 )); then
  TORCH_CPP_LOG_LEVEL=ERROR "$PYTHON" "$here/utils/faults/rendezvous.py" "$MASTER_ADDR" "$port" "$node" "$NNODES" &
  watcher=$!
fi

status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2> /dev/null; do  # a trap ends a wait early
  status=0
  wait "$launcher" || status=$?
done
[[ -z "$watcher" ]] || kill "$watcher" 2> /dev/null || true
# told to stop: it has saved, or it was still starting and had nothing to save
if [[ -e "$folder/PREEMPTED" || ( -n "$told" && "$status" != 0 ) ]]; then
  exit 75
fi
exit "$status"
