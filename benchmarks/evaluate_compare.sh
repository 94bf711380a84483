#!/usr/bin/env bash
# Writes the comparison of all methods (docs/methods.md), each model's as JSON, a Markdown table and, where matplotlib is
# installed, a plot (elsewhere later, by `hf-quest eval report FILE`). SmolLM2 and Gemma come from PyPI, see `hf-quest eval
# models`. What was interrupted goes on, and what is new is added: delete a file to begin anew.
#
#   benchmarks/evaluate_compare.sh [FOLDER]         results go to FOLDER, benchmarks/results by default
#   MODELS="tiny smollm2" benchmarks/evaluate_compare.sh
#
# MACHINE is what the tables call this machine. HF_QUEST_MODELS is where the models are kept (build/models).
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/results}
models=${HF_QUEST_MODELS:-build/models}
machine=${MACHINE:-CPU, 2 shared cores}
tiny=(--length 2048 --budget 64 --budget 256 --windows 8 --samples 8 --batch-size 8)
smollm2=(--length 1024 --budget 128 --windows 4 --samples 4)
gemma3=(--length 1024 --budget 128 --windows 4 --samples 4)
tasks_tiny=(text passkey facts niah_single_1 niah_multikey_2 vt cwe fwe speed)
tasks_smollm2=(text passkey niah_single_1 niah_multikey_2 vt cwe fwe speed)
tasks_gemma3=(text passkey speed)

for name in ${MODELS:-tiny smollm2 gemma3}; do
  declare -n options=$name tasks=tasks_$name
  from=()
  if [ "$name" != tiny ]; then
    python3 -m hf_quest.cli eval models "$models" "$name"
    from=(--model "$models/$name")
  fi
  python3 -m hf_quest.cli eval compare "${from[@]}" "${options[@]}" "${tasks[@]/#/--task=}" --steps 32 --rounds 1 \
    --max-new-tokens 16 --machine "$machine" --output "$folder/compare_$name.json"
done
