#!/usr/bin/env bash
# DeepSeek-V4-Pro on one machine: FP8 for vLLM, and the rank files of the reference engine.
#
#     examples/pro_one_machine.sh [--dry-run]
#
# Disk: 865 GB for the source and 1.6 TB for each result. Memory: 1 GB.
# Variables: SOURCE, OUTPUT, RANKS (8).
set -euo pipefail
source "$(dirname "$0")/step.sh"
source_folder=${SOURCE:-./DeepSeek-V4-Pro}
output=${OUTPUT:-./Pro-FP8}
ranks=${RANKS:-8}

if [[ -z ${SOURCE:-} ]]; then
    step dsv4 download deepseek-ai/DeepSeek-V4-Pro "$source_folder" --fallback
fi
step dsv4 convert "$source_folder" "$output" --target vllm
step dsv4 verify "$source_folder" "$output" --report proof.html
step dsv4 doctor "$output" --for vllm

step dsv4 convert "$source_folder" "$output-mp$ranks" --layout mp --model-parallel "$ranks"
step dsv4 verify "$source_folder" "$output-mp$ranks"
step dsv4 doctor "$output-mp$ranks" --for reference
