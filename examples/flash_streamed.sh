#!/usr/bin/env bash
# DeepSeek-V4-Flash from the hub, shard by shard: the source is never on disk as a whole, and the result is verified.
#
#     examples/flash_streamed.sh [--dry-run]
#
# Disk: 293 GB for the result and two source shards (7 GB). Traffic: the source once for each of the two commands.
# Variables: SOURCE (another repository, or a folder), OUTPUT.
set -euo pipefail
source "$(dirname "$0")/step.sh"
checkpoint=${SOURCE:-hf:deepseek-ai/DeepSeek-V4-Flash}
output=${OUTPUT:-./Flash-FP8}

step dsv4 convert "$checkpoint" "$output" --target sglang
step dsv4 verify "$checkpoint" "$output" --report proof.html
step dsv4 doctor "$output" --for sglang
