#!/usr/bin/env bash
# Serve a converted folder with vLLM or SGLang: check it with dsv4 doctor, then start the engine.
#
#     examples/serve.sh vllm|sglang FOLDER RANKS [--dry-run]
#
# The engines are not part of dsv4 and are not started by its tests.
set -euo pipefail
source "$(dirname "$0")/step.sh"
needs 3 'examples/serve.sh vllm|sglang FOLDER RANKS [--dry-run]'
engine=${arguments[0]} folder=${arguments[1]} ranks=${arguments[2]}

step dsv4 doctor "$folder" --for "$engine" --tensor-parallel "$ranks"
if [[ $engine == vllm ]]; then
    step vllm serve "$folder" --tensor-parallel-size "$ranks"
else
    step python -m sglang.launch_server --model-path "$folder" --tp-size "$ranks"
fi
