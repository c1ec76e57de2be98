#!/usr/bin/env bash
# Makes docs/report.png, the README's picture: the page that `dsv4 verify --report` writes for the demo's checkpoint.
# Needs dsv4 and Chromium on PATH.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
dsv4 demo demo
dsv4 verify demo/source demo/fp8 --report proof.html
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$scratch/profile" \
    --window-size=900,730 --screenshot="$here/report.png" "file://$scratch/proof.html"
