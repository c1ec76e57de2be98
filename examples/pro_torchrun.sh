#!/usr/bin/env bash
# DeepSeek-V4-Pro on several machines under torchrun. Start it on each of them; SOURCE and OUTPUT are on a file system
# that all of them see (SOURCE may be a repository: then each machine fetches only what its share needs).
#
#     NODES=4 HEAD=node0 examples/pro_torchrun.sh [--dry-run]
#
# A rank that dies ends the run with its name and reason; the same command, also with other numbers, continues.
# Variables: SOURCE, OUTPUT, NODES (2), RANKS per machine (4), HEAD (the first machine's address).
set -euo pipefail
source "$(dirname "$0")/step.sh"
checkpoint=${SOURCE:-./DeepSeek-V4-Pro}
output=${OUTPUT:-./Pro-FP8}

launch=(torchrun --nnodes "${NODES:-2}" --nproc-per-node "${RANKS:-4}"
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:29400" -m dsv4)

step "${launch[@]}" convert "$checkpoint" "$output" --target vllm
step "${launch[@]}" verify "$checkpoint" "$output" --report proof.html
