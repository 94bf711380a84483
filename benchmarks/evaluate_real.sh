#!/usr/bin/env bash
# Writes what choosing pages and tokens costs two pretrained models: KL, perplexity, attention mass and RULER's tasks, by
# method and budget, each as JSON, a Markdown table and, where matplotlib is installed, plots (elsewhere later, by
# `hf-quest eval report FILE`). The models come from PyPI, see `hf-quest eval models`. The evaluations run side by side.
# What was interrupted goes on, what was finished begins anew.
#
#   benchmarks/evaluate_real.sh [FOLDER]         results go to FOLDER, benchmarks/results by default
#   QUICK=1 benchmarks/evaluate_real.sh FOLDER   small sizes and one model, for a CPU
#
# HF_QUEST_MODELS is where the models are kept (build/models), HF_QUEST_WHEELS a folder with their packages' wheels, for a
# machine without network, HF_QUEST_COMMIT what is measured, where the files are without their repository.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/results}
models=${HF_QUEST_MODELS:-build/models}
mkdir -p "$folder"

# Pages in two ways and of three sizes, and the best there is; tokens by codes as a QuestCache does it, and with each of
# its settings changed: candidates, what finds them, stripes, pages, bounds of 16 pages together, bits, values in 8 bits,
# and as many tokens as hold a share of the mass.
more=codes-tokens,candidates=16
methods=(
  published published,keeps_first=1 default default,keeps_first=0 default,width=0.25 default,page_size=8 default,page_size=32
  half half,group=share best-pages best-tokens
  codes-tokens,candidates=4 codes-tokens $more codes-tokens,candidates=32 codes-tokens,candidates=0 codes-tokens,share=0.25
  codes-tokens,width=0.25 codes-tokens,group=sum
  codes-tokens,stripes=0 codes-tokens,stripes=0,candidates=0
  codes-tokens,page_size=32 $more,page_size=32
  $more,fold=16 $more,bits=1.6 $more,bits=3 $more,value_bits=8
  $more,mass=0.9 $more,mass=0.95 $more,mass=0.98
)
names=(smollm2 gemma3)
smollm2=(--length 2048 --length 4096 --length 8192 --windows 20 --steps 128 --batch-size 10)
gemma3=(--length 2048 --length 4096 --length 8192 --length 16384 --length 30720 --windows 10 --steps 64 --batch-size 5)
answers=(--method quest-published --method quest --method quest-codes)  # dense attention comes first
ruler_smollm2=(--dtype bfloat16 --length 2048 --length 4096 --length 8192 --samples 20 --batch-size 20 --budget 128 --budget 512 "${answers[@]}")
ruler_gemma3=(--dtype bfloat16 --length 4096 --length 16384 --samples 20 --batch-size 20 --budget 128 --budget 512 "${answers[@]}")
budgets=(--budget 128 --budget 256 --budget 512 --budget 1024 --budget 2048)
if [ -n "${QUICK:-}" ]; then
  names=(smollm2) methods=(published default codes-tokens codes-tokens,mass=0.95 best-pages best-tokens)
  smollm2=(--length 384 --windows 2 --steps 4 --batch-size 2) budgets=(--budget 128)
  ruler_smollm2=(--length 512 --samples 2 --task niah_single_1 --max-new-tokens 12 --budget 128)
fi

python3 -m hf_quest.cli eval models "$models" "${names[@]}" ${HF_QUEST_WHEELS:+--find-links "$HF_QUEST_WHEELS"}

run() {  # NAME MODEL EVALUATION OPTIONS
  local name=$1 model=$2
  shift 2
  grep -sq '"is_complete": false' "$folder/$name.json" || rm -f "$folder/$name.json"
  python3 -m hf_quest.cli eval "$@" --model "$models/$model" --output "$folder/$name.json" >"$folder/$name.log" 2>&1 ||
    { cat "$folder/$name.log" && return 1; }
  rm -f "$folder/$name.log"
}

for name in "${names[@]}"; do
  declare -n windows=$name samples=ruler_$name
  run "selection_$name" "$name" selection "${windows[@]}" "${budgets[@]}" "${methods[@]/#/--method=}" --dtype float32 &
  run "ruler_$name" "$name" ruler "${samples[@]}" &
done

status=0
for job in $(jobs -p); do wait "$job" || status=1; done
exit $status
