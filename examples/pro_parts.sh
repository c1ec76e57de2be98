#!/usr/bin/env bash
# DeepSeek-V4-Pro on several machines without a launcher: one share of the shards each, in any order, at any time.
#
#     examples/pro_parts.sh 1/4 [--dry-run]      # on the first machine; 2/4, 3/4 and 4/4 on the others
#     examples/pro_parts.sh finish [--dry-run]   # when all are done: checks that all is there, and publishes it
#
# OUTPUT is on a file system that all of them see. Variables: SOURCE, OUTPUT.
set -euo pipefail
source "$(dirname "$0")/step.sh"
checkpoint=${SOURCE:-./DeepSeek-V4-Pro}
output=${OUTPUT:-./Pro-FP8}
what=${arguments[0]:?which part: 1/4, 2/4, … or finish}

if [[ $what != finish ]]; then
    step dsv4 convert "$checkpoint" "$output" --target vllm --part "$what"
else
    step dsv4 convert "$checkpoint" "$output" --target vllm --finish
    step dsv4 verify "$checkpoint" "$output" --report proof.html
fi
