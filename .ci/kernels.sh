#!/usr/bin/env bash
# The C kernels: no warning from any compiler that is installed, the same bits in every form, ASan and UBSan.
#
#     .ci/kernels.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}

flags=$("$python" -c 'from dsv4.model.kernels import cpu; print(*(f for f in cpu.FLAGS if f != "-shared"))')
for compiler in gcc clang; do
    command -v "$compiler" >/dev/null || { echo "skipped: no $compiler"; continue; }
    for march in $(case $(uname -m) in x86_64) echo native x86-64 haswell skylake-avx512 ;; *) echo native ;; esac); do
        for source in model/kernels/*.c; do
            # shellcheck disable=SC2086
            "$compiler" $flags -march="$march" -fopenmp -Wall -Wextra -Werror -c "$source" -o /dev/null
        done
        echo "no warning: $compiler -march=$march"
    done
done

# The same bits in every form; the suite itself runs the best form of this machine.
forms=plain
grep -qw avx2 /proc/cpuinfo 2>/dev/null && forms="avx2 plain"
for form in $forms; do
    echo "kernels in the form $form"
    DSV4_KERNELS=$form "$python" -m pytest -q tests/model/kernels tests/model/test_model_transformers.py
done

# The library is built with other flags, and so under another name. Leaks are Python's business.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" "$python" - <<'PYTHON'
import sys
import tempfile
from pathlib import Path

import pytest

from dsv4.model.kernels import cpu

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-fno-omit-frame-pointer")

with tempfile.TemporaryDirectory() as folder:
    cpu.FLAGS = (*cpu.FLAGS, *SANITIZE)
    cpu.cache_folder = lambda: Path(folder)
    assert cpu.library() is not None, "the sanitized library was not built"
    # --capture=sys: the sanitizers write to the file descriptor itself.
    sys.exit(pytest.main(["-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/model/kernels"]))
PYTHON
