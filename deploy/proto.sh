#!/bin/sh
# Generates the gRPC stubs from proto/*.proto, in an environment of its own: this generator's stubs
# import on every protobuf runtime from 5.29 on, but it pins an old runtime for itself.
#
#   sh deploy/proto.sh PYTHON OUT    PYTHON makes the environment, OUT takes loraplex/proto/*
set -eu
cd "$(dirname "$0")/.."

python=$1
out=$2
venv=.venv-proto
stamp=$venv/.complete
pins='grpcio-tools==1.71.2 mypy-protobuf==3.6.0 setuptools==80.9.0'

if [ "$(cat $stamp 2>/dev/null)" != "$pins" ]; then
    "$python" -m venv --clear "$venv"
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input $pins
    echo "$pins" >"$stamp"
fi
PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I. \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
    loraplex/proto/shard.proto loraplex/proto/router.proto
