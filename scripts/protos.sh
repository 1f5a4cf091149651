#!/usr/bin/env bash
# Generate tuner_core/proto from protos/, or check that what is committed is up to date.
#
#   scripts/protos.sh            write
#   scripts/protos.sh --check    compare only; exits 1 and shows the difference when something is stale
#
# The generator is older than the protobuf and grpcio that we install, on purpose: generated code refuses a runtime
# older than its generator, and images of GPU hosts bring runtimes of their own. It lives in an environment of its own,
# because it cannot be installed beside a newer protobuf.
set -euo pipefail
cd "$(dirname "$0")/.."
GENERATOR=grpcio-tools==1.74.0
PYTHON=${PYTHON:-.venv/bin/python}
tools=build/protos-tools

if [ "$(cat "$tools/.generator" 2>/dev/null)" != "$GENERATOR" ]; then
    rm -rf "$tools"
    "$PYTHON" -m venv "$tools"
    "$tools/bin/python" -m pip install -q --disable-pip-version-check "$GENERATOR" 'setuptools<81'
    echo "$GENERATOR" > "$tools/.generator"
fi

out=tuner_core/proto
if [ "${1:-}" = --check ]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
fi
"$tools/bin/python" -W ignore -m grpc_tools.protoc -Iprotos \
    --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" protos/tuner/v1/*.proto
# protoc names modules after the proto path; ours live inside a package.
sed -i -E 's/^from tuner\.v1 import/from tuner_core.proto.tuner.v1 import/' "$out"/tuner/v1/*.py "$out"/tuner/v1/*.pyi
for package in "$out" "$out/tuner" "$out/tuner/v1"; do
    [ -e "$package/__init__.py" ] || touch "$package/__init__.py"
done

if [ "${1:-}" = --check ]; then
    if ! diff -ru --exclude=__pycache__ "$out" tuner_core/proto; then
        echo "error: tuner_core/proto does not match protos/: run 'make protos' and commit the result" >&2
        exit 1
    fi
    echo "generated code is up to date"
fi
