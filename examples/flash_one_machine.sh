#!/usr/bin/env bash
# DeepSeek-V4-Flash on one machine: download, convert for vLLM, verify, compare, check before serving.
#
#     examples/flash_one_machine.sh [--dry-run]
#
# Disk: 160 GB for the source and 293 GB for the result; flash_streamed.sh needs no copy of the source. Memory: 1 GB,
# except for the comparison, which takes what is free and reads the rest from disk when it is needed.
# Variables: SOURCE (a folder instead of the hub: nothing is downloaded), OUTPUT, PROMPT.
set -euo pipefail
source "$(dirname "$0")/step.sh"
source_folder=${SOURCE:-./DeepSeek-V4-Flash}
output=${OUTPUT:-./Flash-FP8}

if [[ -z ${SOURCE:-} ]]; then
    step dsv4 download deepseek-ai/DeepSeek-V4-Flash "$source_folder" --fallback
fi
step dsv4 convert "$source_folder" "$output" --target vllm
step dsv4 verify "$source_folder" "$output" --report proof.html
step dsv4 run "$source_folder" -p "${PROMPT:-Why is the sky blue?}" --compare "$output"
step dsv4 doctor "$output" --for vllm
