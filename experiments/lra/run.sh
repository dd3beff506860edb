#!/usr/bin/env bash
# Train and evaluate Long Range Arena: tasks × attentions × forms × seeds, then write the table.
#
#   DATA=/data/lra bash experiments/lra/run.sh --amp         everything that is prepared there, as the protocol says
#   DATA=/data/lra TASKS=listops STEPS=1000 SEEDS=0 bash experiments/lra/run.sh --opts TRAIN.WARMUP_STEPS 20
#
# DATA holds a folder for each task, as `python tools/prepare_lra.py TASK --out $DATA/TASK` leaves it; tasks without one
# are named and left out. The same command again continues what was interrupted and repeats nothing that is finished.
# A run that fails is named, and the others go on; the table has what is finished.
#
# Exit codes: 0 all finished; 1 a run failed; 2 a mistake in the settings; 75 told to stop: the same command continues;
# 128 and more: a run was ended by a signal.
#
#   TASKS    which tasks                                  listops text retrieval pathfinder image
#   ALPHAS   polarity attention: ranges of its exponent   3 5 7
#   OTHERS   what it is compared with                     polarity_pp norm_aware nala_cosine softmax relu elu
#   FORMS    of every attention: gated (gate and, where   gated plain
#            the kernel has one, scale), open (the same,
#            its gate's bias begins at 1), plain (neither)
#   KERNELS  polarity: widths of its depthwise branch     0           (0: without; "0 5" runs both)
#   SEEDS                                                 0 1 2
#   PRESET   skyformer or clean                           skyformer
#   STEPS    optimizer steps; empty: the protocol's       (empty)
#   OUTPUT   root of the run folders                      output/lra
#   DOCS     where the table goes                         docs/lra.md
#   NPROC    processes of a run                           1
#   PYTHON   interpreter                                  .venv/bin/python, else python3
# Further arguments are passed to every run, for example: --amp
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

[[ -x .venv/bin/python ]] && default_python=.venv/bin/python || default_python=python3
PYTHON="${PYTHON:-$default_python}"
if [[ -z "${DATA:-}" ]]; then
  echo "DATA is not set: it names the folder that holds a folder for each prepared task, for example DATA=/data/lra" >&2
  exit 2
fi
TASKS="${TASKS:-listops text retrieval pathfinder image}"
ALPHAS="${ALPHAS-3 5 7}"
OTHERS="${OTHERS-polarity_pp norm_aware nala_cosine softmax relu elu}"
FORMS="${FORMS:-gated plain}"
KERNELS="${KERNELS:-0}"
SEEDS="${SEEDS:-0 1 2}"
PRESET="${PRESET:-skyformer}"
STEPS="${STEPS:-}"
OUTPUT="${OUTPUT:-output/lra}"
DOCS="${DOCS:-docs/lra.md}"
NPROC="${NPROC:-1}"

case "$PRESET" in
  skyformer) suffix="" ;;
  clean) suffix="_clean" ;;
  *) echo "PRESET is '$PRESET', expected skyformer or clean" >&2; exit 2 ;;
esac
for task in $TASKS; do
  case "$task" in
    listops | text | retrieval | pathfinder | image) ;;
    *) echo "TASKS names '$task', expected some of listops, text, retrieval, pathfinder, image" >&2; exit 2 ;;
  esac
done
for form in $FORMS; do
  case "$form" in
    gated | open | plain) ;;
    *) echo "FORMS names '$form', expected some of gated, open, plain" >&2; exit 2 ;;
  esac
done
launch=("$PYTHON")
[[ "$NPROC" == 1 ]] || launch+=(-m torch.distributed.run --standalone "--nproc_per_node=$NPROC")

# one TASK TAG [--opts of main.py]: train, then evaluate the best checkpoint on the test split, once
one() {
  local task="$1" tag="$2${STEPS:+-steps$STEPS}" state status=0
  local folder="$OUTPUT/lra_$1$suffix/$tag"
  shift 2
  local options=("$@")
  [[ -z "$STEPS" ]] || options+=(TRAIN.STEPS "$STEPS")
  local arguments=(--cfg "configs/lra/$task$suffix.yaml" --data-path "$DATA/$task" --output "$OUTPUT" --tag "$tag")
  arguments+=("${extra[@]}" --opts "${options[@]}")
  state="$("$PYTHON" -m experiments.lra.runs "${arguments[@]}")" || return
  echo "== $folder: $state"
  if [[ "$state" == untrained ]]; then
    rm -f "$folder/PREEMPTED"
    "${launch[@]}" main.py "${arguments[@]}" || status=$?
    [[ ! -e "$folder/PREEMPTED" ]] || return 75
    (( status == 0 )) || return "$status"
  fi
  if [[ "$state" != finished ]]; then
    "${launch[@]}" main.py "${arguments[@]}" --eval --resume "$folder/max_acc.pth" || return
  fi
}

failed=()
# run TASK TAG [--opts of main.py]: one of the sweep
run() {
  local status=0
  one "$@" || status=$?
  (( status != 75 && status < 128 )) || exit "$status"
  (( status == 0 )) || failed+=("$1 $2 (exit code $status)")
}

extra=("$@")
prepared=0
for task in $TASKS; do
  if [[ ! -f "$DATA/$task/manifest.json" ]]; then
    echo "== $task: $DATA/$task holds no prepared data; $PYTHON tools/prepare_lra.py $task --out $DATA/$task makes it" >&2
    continue
  fi
  prepared=1
  for seed in $SEEDS; do
    for form in $FORMS; do
      around=(MODEL.LA.GATE True MODEL.LRA.LEARN_SCALE True)
      [[ "$form" != plain ]] || around=(MODEL.LA.GATE False MODEL.LRA.LEARN_SCALE False)
      [[ "$form" != open ]] || around+=(MODEL.LA.GATE_BIAS 1.0)
      for alpha in $ALPHAS; do
        for kernel in $KERNELS; do
          [[ "$kernel" == 0 ]] && name="polarity-$alpha" || name="polarity-$alpha-conv$kernel"
          run "$task" "$name-$form-seed$seed" SEED "$seed" MODEL.LA.ALPHA "$alpha" MODEL.LRA.KERNEL_SIZE "$kernel" \
            "${around[@]}"
        done
      done
      for kind in $OTHERS; do
        run "$task" "$kind-$form-seed$seed" SEED "$seed" MODEL.LA.ATTENTION "$kind" "${around[@]}"
      done
    done
  done
done
if (( ! prepared )); then
  echo "nothing to run, and $DOCS stays as it is: $DATA holds none of $TASKS" >&2
  exit 2
fi
"$PYTHON" -m experiments.lra.table --runs "$OUTPUT" --docs "$DOCS"
if (( ${#failed[@]} )); then
  printf '== failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
