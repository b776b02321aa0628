#!/usr/bin/env bash
# Methods compared on the embedded model on one GPU, in under four minutes: many seeds with an oracle each, dealt out to
# several processes, since a model this small leaves the GPU idle most of the time (results/gpu.md).
#
#   benchmarks/gpu_grids.sh [OUT [GRID [KEY=VALUE ...]]]     OUT: runs/gpu-grids; GRID: gpu-methods.yaml
#
# The time ends it, at a point where everything that was measured is kept: OUT/TASK/compare.md, frontier.png, compare.json
# are of the runs that are done, one method after the other; OUT/TASK/part-N.log says what each process did. The same
# command goes on where it stopped. On one H200 with twelve processes of one seed each, some 85 s went by before the first
# policy was begun, the model's conversion included, and a method took 38 s, measured four times (it is twice now): 3.7 minutes
# are one task's, and not all its methods.
#
# Environment: PYTHON (default .venv/bin/python or python), MINUTES (3.7 for all tasks), PARTS (12 processes at a time),
# TASKS (default sentiment; "sentiment plain": embedded tasks, each with its gold reward, one after the other), DEVICE (cuda;
# cpu tries it).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-runs/gpu-grids} grid=${2:-$root/recipes/experiments/gpu-methods.yaml}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
tasks=${TASKS:-sentiment} parts=${PARTS:-12} device=${DEVICE:-cuda}
if [ "$device" = cuda ]; then
  "$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device: DEVICE=cpu only tries the script out"'
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
seconds=$(awk "BEGIN {print int(60 * ${MINUTES:-3.7})}")
left=$(wc -w <<< "$tasks") failed=0
for task in $tasks; do
  until=$((SECONDS + (seconds - SECONDS) / left))  # an equal share of what is left
  left=$((left - 1))
  gold=$([ "$task" = sentiment ] && echo vader || echo "$task")
  settings=("data.source=embedded:$task" "eval.gold=$gold" "device=$device" "$@")
  "$python" "$root/benchmarks/grid_parts.py" split "$grid" "$out/$task" "$parts" "${settings[@]}" > "$out.files"
  processes=()
  while read -r file; do
    # SIGTERM, since processes in the background of a script do not hear SIGINT. 25 s: to finish a step and join.
    timeout --signal=TERM --kill-after=15 $((until - SECONDS > 26 ? until - SECONDS - 25 : 1)) \
      "$python" -m sepo compare "$file" > "${file%.yaml}.log" 2>&1 &
    processes+=($!)
  done < "$out.files"
  rm "$out.files"
  for process in "${processes[@]}"; do
    code=0
    wait "$process" || code=$?
    # 124: stopped by the time; 143: stopped, and it said what it keeps.
    case $code in 0 | 124 | 137 | 143) ;; *) echo "a process of $task failed ($code): see $out/$task/part-*.log" >&2 ;; esac
  done
  if "$python" "$root/benchmarks/grid_parts.py" join "$out/$task"; then
    echo "$out/$task/compare.md, $SECONDS s"
  else
    failed=1  # the other tasks have their turn all the same
  fi
done
exit "$failed"
