#!/usr/bin/env bash
# Runs one stage of the GPU measurements: bench/gpu.sh [--dry-run] STAGE, which is one of
# build|golden|tests|sanitizer|kernels|layers|convert|step|capture
#
# Each stage takes at most 8 minutes and leaves one file of rows, $OUT/gpu-<stage>.jsonl; without OUT the rows go where
# bench/harness.py says. `build` comes first on a fresh machine: it installs pyzo into PYZO_SITE for the others.
# Nothing is fetched: python3 has torch, ninja, pybind11, setuptools, pytest and transformers, and nvcc is there.
# --dry-run runs the same scripts on the CPU with tiny sizes and the pyzo of $PYTHON's environment; its rows prove nothing.
# Where the tree travels without .git, PYZO_COMMIT names the commit for the rows.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
limit_s=480

arguments=()
if [[ ${1:-} == --dry-run ]]; then
  arguments+=(--dry-run)
  shift
else
  export PYZO_SITE=${PYZO_SITE:-/tmp/pyzo-site}
  export PYTHONPATH=$PYZO_SITE${PYTHONPATH:+:$PYTHONPATH}
fi
stage=${1:-}
case $stage in
  build | golden | tests | sanitizer | kernels | layers | convert | step | capture) ;;
  *)
    echo "STAGE: expected build, golden, tests, sanitizer, kernels, layers, convert, step or capture, got '$stage'" >&2
    exit 2
    ;;
esac
if [[ -n ${OUT:-} ]]; then
  arguments+=(--out "$(realpath "$OUT")/gpu-$stage.jsonl")
fi

# Run beside the tree, not in it: the tree's own pyzo/ has no libraries and would hide the installed one.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ln -s "$root/bench" "$work/bench"
cd "$work"
PYTHONUNBUFFERED=1 timeout "$limit_s" "$python" -m "bench.gpu_$stage" "${arguments[@]}"
