#!/usr/bin/env bash
# Compare methods on the embedded model on one GPU, in under four minutes: many seeds with an oracle each, split over several
# processes, because a model this small leaves the GPU idle most of the time (results/gpu.md).
#
#   benchmarks/gpu_grids.sh [OUT [GRID [KEY=VALUE ...]]]     OUT: runs/gpu-grids; GRID: gpu-methods.yaml
#
# A time limit ends it; everything measured so far is kept. OUT/TASK/compare.md, frontier.png and compare.json hold the finished
# runs, one method after the other; OUT/TASK/part-N.log is the log of a process. The same command continues. On one H200
# with twelve processes of one seed each, some 85 s passed before the first policy (including the model's conversion), and a
# method took 38 s with four measurements (now two): 3.7 minutes are not enough for all methods of one task.
#
# Environment: PYTHON (default .venv/bin/python or python), MINUTES (3.7 for all tasks), PARTS (12 processes at a time),
# TASKS (default sentiment; "sentiment plain": embedded tasks, each with its gold reward, one after the other), DEVICE (cuda;
# cpu only tests the script).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-runs/gpu-grids} grid=${2:-$root/recipes/experiments/gpu-methods.yaml}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
tasks=${TASKS:-sentiment} parts=${PARTS:-12} device=${DEVICE:-cuda}
if [ "$device" = cuda ]; then
  "$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device: DEVICE=cpu only tests this script"'
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
seconds=$(awk "BEGIN {print int(60 * ${MINUTES:-3.7})}")
left=$(wc -w <<< "$tasks") failed=0
for task in $tasks; do
  until=$((SECONDS + (seconds - SECONDS) / left))  # an equal share of the remaining time
  left=$((left - 1))
  gold=$([ "$task" = sentiment ] && echo vader || echo "$task")
  settings=("data.source=embedded:$task" "eval.gold=$gold" "device=$device" "$@")
  "$python" "$root/benchmarks/grid_parts.py" split "$grid" "$out/$task" "$parts" "${settings[@]}" > "$out.files"
  processes=()
  while read -r file; do
    # SIGTERM, because background processes of a script ignore SIGINT. 25 s are for finishing a step and joining.
    timeout --signal=TERM --kill-after=15 $((until - SECONDS > 26 ? until - SECONDS - 25 : 1)) \
      "$python" -m sepo compare "$file" > "${file%.yaml}.log" 2>&1 &
    processes+=($!)
  done < "$out.files"
  rm "$out.files"
  for process in "${processes[@]}"; do
    code=0
    wait "$process" || code=$?
    # 124: ended by the time limit; 143: stopped by the signal, with a message about what it keeps.
    case $code in 0 | 124 | 137 | 143) ;; *) echo "a process of $task failed ($code): see $out/$task/part-*.log" >&2 ;; esac
  done
  if "$python" "$root/benchmarks/grid_parts.py" join "$out/$task"; then
    echo "$out/$task/compare.md, $SECONDS s"
  else
    failed=1  # continue with the other tasks
  fi
done
exit "$failed"
