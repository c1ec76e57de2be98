#!/usr/bin/env bash
# The compiled library: no warning from any compiler that is installed, the same bits in every form, ASan and UBSan.
#
#     .ci/kernels.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A copy of the package with a library of its own: build COMPILER [OPTION...] prints the folder.
build() {
    local copy="$work/$#-$1"
    rm -rf "$copy" && mkdir -p "$copy"
    cp -r quant convert model src setup.py pyproject.toml README.md LICENSE "$copy"
    find "$copy" -name '*.so' -delete
    (cd "$copy" && CC="$1" CFLAGS="${*:2}" LDFLAGS="${*:2}" "$python" setup.py -q build_ext --inplace) >&2
    test -e "$copy/quant/_compiled.so" || { echo "$1 did not build the library" >&2; return 1; }
    echo "$copy"
}
case $python in /*) ;; *) python=$PWD/$python ;; esac

builds=() # at the same time
for compiler in gcc clang; do
    command -v "$compiler" >/dev/null || { echo "skipped: no $compiler"; continue; }
    { build "$compiler" -Wall -Wextra -Werror -Wno-unknown-warning-option >/dev/null && echo "no warning: $compiler"; } &
    builds+=($!)
done
for one in ${builds[@]+"${builds[@]}"}; do wait "$one"; done

# The same bits in every form; the suite itself runs the best form of this machine.
for form in $("$python" -c 'from dsv4.model.kernels import binding; print(*binding.forms()[1:])'); do
    echo "kernels in the form $form"
    DSV4_KERNELS=$form "$python" -m pytest -q -n auto tests/model/kernels tests/model/test_model_transformers.py
done

# NEON against plain C in one program, for which no ARM machine is needed, and the same checksum as on this machine.
compare() { # COMPILER FORM RUNNER OPTION...
    local c=model/kernels/c out="$work/compare-$2" objects=() source
    local options=(-O3 -std=gnu11 -ffp-contract=off -fno-math-errno -Wno-psabi -Wall -Wextra -Werror "-I$c" "${@:4}")
    local plain=(-DFORM=plain -DNO_VECTORS)
    for source in $(grep -l OF_FORM "$c"/*.c); do
        source=$(basename "$source" .c)
        "$1" "${options[@]}" "${plain[@]}" -c "$c/$source.c" -o "$out-$source-plain.o"
        "$1" "${options[@]}" -DFORM="$2" -c "$c/$source.c" -o "$out-$source.o"
        objects+=("$out-$source-plain.o" "$out-$source.o")
    done
    "$1" "${options[@]}" "${plain[@]}" -DA=plain -DB="$2" .ci/compare_forms.c "$c/threads.c" "${objects[@]}" -static \
        -o "$out" -lm -pthread
    ${3:+"$3"} "$out"
}
if command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64 >/dev/null; then
    neon=$(compare aarch64-linux-gnu-gcc neon qemu-aarch64) || { echo "NEON: $neon"; exit 1; }
    here=$(compare gcc "$(uname -m)" "")
    echo "NEON: $neon; here: $here"
    test "$neon" = "$here"
else
    echo "skipped: no aarch64-linux-gnu-gcc or no qemu-aarch64 (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)"
fi

# Leaks are Python's business. --capture=sys: the sanitizers write to the file descriptor itself.
sanitized=$(build gcc -fsanitize=address,undefined -fno-sanitize-recover=undefined -g -fno-omit-frame-pointer)
PYTHONPATH="$sanitized/src" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
    "$python" -m pytest -q --capture=sys -p no:cacheprovider -p no:xdist tests/model/kernels tests/quant/test_compiled.py \
    tests/convert/proof/test_verify_values.py
