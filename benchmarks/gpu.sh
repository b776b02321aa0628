#!/usr/bin/env bash
# The GPU figures in one command, under ten minutes on an H100: SmolLM2-135M and a Llama of a billion random weights,
# bfloat16, policy step and oracle step beside TRL, scoring beside one sequence a forward.
#
#   benchmarks/gpu.sh MODEL DATA [OUT]     MODEL: a folder, hub id, .gguf file or package:PKG/FILE; DATA: preference pairs
#
# Environment: PYTHON (default python), PAIRS (32), REPEATS (3), PEAK (nominal TFLOP/s of bfloat16; 989 is an H100 SXM).
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
model=$1 data=$2 out=${3:-runs/gpu} python=${PYTHON:-python}
pairs=${PAIRS:-32} repeats=${REPEATS:-3} peak=${PEAK:-989}
mkdir -p "$out"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())'
[ -f "$out/llama-1b/config.json" ] || "$python" benchmarks/random_llama.py --tokenizer "$model" --out "$out/llama-1b"

failed=0
for name in smollm2 llama-1b; do
  folder=$model
  [ "$name" = smollm2 ] || folder=$out/llama-1b
  for benchmark in policy-step oracle-step scoring; do
    echo "== $name $benchmark"
    # More steps a run than on a CPU: a step is short, and the first ones compile.
    timeout 120 "$python" benchmarks/run.py "$benchmark" --model "$folder" --data "$data" --as-chat --bf16 \
      --pairs "$pairs" --steps 5 --warm-up 3 --repeats "$repeats" --trl-batch 4,16 --peak-tflops "$peak" \
      --json "$out/$name-$benchmark.json" || { echo "$name $benchmark failed"; failed=1; }
  done
done
exit $failed
