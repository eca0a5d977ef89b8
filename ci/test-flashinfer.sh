#!/usr/bin/env bash
# Holds the drop-in's signatures against the published FlashInfer whose version tests/helpers/flashinfer_signatures.json
# names. The package is fetched without its dependencies and is not imported; no CUDA, no GPU.
#
#   ci/test-flashinfer.sh [VERSION]    another version: says what changed, as a failing test does
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

table=$root/tests/helpers/flashinfer_signatures.json
version=${1:-$("$(find_python)" -c "import json; print(json.load(open('$table'))['version'])")}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

say "FlashInfer $version"
"$run_env/bin/python" -m pip install --quiet --progress-bar off --no-deps --only-binary :all: --target "$folder" \
  "flashinfer-python==$version"

say "Signatures"
cd "$root"
MXFP4_MOE_FLASHINFER=$folder "$run_env/bin/python" -m pytest -m flashinfer tests/cpu/test_flashinfer_signatures.py
