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
# PYTHON       interpreter                          .venv/bin/python if it exists, else python3
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
"$PYTHON" "$here/config.py" "${arguments[@]}" > /dev/null

gpus=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")
if (( gpus > 0 )); then
  arguments+=(--amp)
  NPROC="${NPROC:-$gpus}"
else
  NPROC="${NPROC:-2}"
  # each process gets its share of the cores
  threads=$(( $(nproc) / NPROC ))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( threads > 0 ? threads : 1 ))}"
fi

if (( NNODES > 1 )); then
  rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:-0}"
    --master_addr "${MASTER_ADDR:?MASTER_ADDR names the first node when NNODES > 1}" --master_port "${MASTER_PORT:-29500}")
else
  rendezvous=(--standalone)
fi
exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$NPROC" "$here/main.py" "${arguments[@]}"
