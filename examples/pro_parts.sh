#!/usr/bin/env bash
# DeepSeek-V4-Pro on several machines without a launcher: each converts its share of the shards, in any order, any time.
#
#     examples/pro_parts.sh 1/4 [--dry-run]      # on the first machine; 2/4, 3/4 and 4/4 on the others
#     examples/pro_parts.sh finish [--dry-run]   # when all are done: checks all shards and publishes
#
# OUTPUT is on a file system that all of them see. Variables: SOURCE, OUTPUT.
set -euo pipefail
source "$(dirname "$0")/step.sh"
checkpoint=${SOURCE:-./DeepSeek-V4-Pro}
output=${OUTPUT:-./Pro-FP8}
needs 1 'examples/pro_parts.sh 1/4|2/4|…|finish [--dry-run]'
what=${arguments[0]}

if [[ $what != finish ]]; then
    step dsv4 convert "$checkpoint" "$output" --target vllm --part "$what"
else
    step dsv4 convert "$checkpoint" "$output" --target vllm --finish
    step dsv4 verify "$checkpoint" "$output" --report proof.html
fi
