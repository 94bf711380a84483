#!/usr/bin/env bash
# Writes all that the README's accuracy section shows: the evaluations of the tiny model, each as JSON, a Markdown table
# and, where matplotlib is installed, plots (elsewhere later, by `hf-quest eval report FILE`). The evaluations run side by
# side, since each waits for Python more than for the GPU. What was interrupted goes on, what was finished begins anew.
#
#   benchmarks/evaluate_tiny.sh [FOLDER]         results go to FOLDER, benchmarks/results by default
#   QUICK=1 benchmarks/evaluate_tiny.sh FOLDER   the same at small sizes, for a CPU
set -euo pipefail
folder=${1:-benchmarks/results}
mkdir -p "$folder"
if [ -n "${QUICK:-}" ]; then
  long=1000 longer=2000 recall=1024 lengths=(1024 2048) document=2048
  few=(--fraction 0.05) budgets=(--budget 64 --budget 256) scored=8
else  # by passkey's count of four characters to a token, of which this model makes half as many again
  long=10000 longer=22000 recall=10240 lengths=(1024 2048 4096 8192 16384 32768) document=16384
  few=() budgets=(--budget 64 --budget 128 --budget 256 --budget 512 --budget 1024) scored=128
fi

names=(passkey_10k passkey_32k recall_all_methods perplexity top10 calibration prefill)
for name in "${names[@]}"; do
  grep -sq '"is_complete": false' "$folder/$name.json" || rm -f "$folder/$name.json"
done

run() {  # NAME COMMAND OPTIONS
  local name=$1
  shift
  python3 -m hf_quest.cli "$@" >"$folder/$name.log" 2>&1 || { cat "$folder/$name.log" && return 1; }
}

evaluate() {  # NAME EVALUATION OPTIONS
  local name=$1
  shift
  run "$name" eval "$@" --output "$folder/$name.json"
}

evaluate passkey_10k passkey --length $long --iterations 100 --batch-size 50 "${budgets[@]}" "${few[@]}" &
evaluate passkey_32k passkey --length $longer --iterations 50 --batch-size 25 \
  --budget 64 --budget 256 "${few[@]}" &
evaluate recall_all_methods recall --length $recall --job facts --job digest --batch-size 100 \
  "${budgets[@]}" "${few[@]}" &
evaluate perplexity perplexity "${lengths[@]/#/--length=}" --rows 16 --scored $scored --batch-size 16 "${few[@]}" &
evaluate top10 top10 --length $recall --job passkey --job facts --documents 20 --batch-size 20 \
  "${budgets[@]}" "${few[@]}" &
run calibration calibrate --text hf_quest/evaluation/heldout.txt --max-tokens $document "${budgets[@]}" \
  --output "$folder/calibration.html" &
if [ -z "${QUICK:-}" ]; then  # reads all of the held-out text
  evaluate prefill prefill --length 16384 --length 32768 --documents 100 --batch-size 10 --prefill-budget 1024 &
fi

status=0
for job in $(jobs -p); do wait "$job" || status=1; done
for name in "${names[@]}"; do
  [ $status != 0 ] || rm -f "$folder/$name.log"
done
exit $status
