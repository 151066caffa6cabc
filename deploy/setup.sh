#!/bin/sh
# Makes .venv with the server and its test tools. An interrupted run is simply repeated: without the
# stamp of a finished one the environment is made afresh.
#
#   sh deploy/setup.sh           the CPU build of torch
#   CUDA=1 sh deploy/setup.sh    the default build, and the CUDA extra
set -eu
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.complete
python=$venv/bin/python
torch=$(grep '^torch==' constraints.txt)

say() {
    echo "setup: $*" >&2
}

fail() {
    say "$*"
    exit 1
}

find_python() {
    for name in python3 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

pip() {
    "$python" -m pip --disable-pip-version-check --no-input "$@"
}

has_local_cpu_torch() {
    pip install --dry-run --no-index --no-deps "$torch" 2>/dev/null | grep -q '+cpu'
}

install_torch_with_uv() {
    pip install --quiet --no-warn-conflicts -c constraints.txt uv &&
        "$python" -m uv pip install --python "$python" --torch-backend cpu --no-deps "$torch"
}

install_torch() {
    if [ "$build" = cuda ]; then
        say "installing the default build of $torch"
        pip install --no-deps "$torch"
    elif has_local_cpu_torch; then
        say "installing a local CPU build of $torch"
        pip install --no-index --no-deps "$torch"
    elif say "looking for the CPU build of $torch" && install_torch_with_uv; then
        say "installed the CPU build of $torch"
    else
        say "no CPU build of $torch within reach: pip will download its default build, about 2.7 GB"
        pip install "$torch"
    fi
}

build=cpu
if [ "${CUDA:-}" = 1 ] || [ "$(cat $stamp 2>/dev/null)" = cuda ]; then
    build=cuda
fi
extras=dev
if [ "$build" = cuda ]; then
    extras=dev,cuda
fi

if [ "$(cat $stamp 2>/dev/null)" != "$build" ]; then
    base=$(find_python) || fail \
        "no Python 3.11 or later that can make a virtual environment; on Debian: apt install python3-venv"
    say "making $venv with $base"
    "$base" -m venv --clear "$venv"
fi
rm -f "$stamp"
install_torch
say "installing the rest"
pip install --quiet --no-warn-conflicts -c constraints.txt setuptools
pip install --quiet -c constraints.txt --no-build-isolation -e ".[$extras]"
echo "$build" >"$stamp"
say "done: $venv/bin/loraplex"
