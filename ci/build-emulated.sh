#!/usr/bin/env bash
# Builds a wheel for tests alone: SM12x's kernels, all but their one instruction, for an H100 or H200
# (wheelbuild/emulation.py; docs/sm12x-without-sm12x.md says what it shows). It never goes to dist/, and what repairs,
# audits or publishes wheels refuses it.
#
#   ci/build-emulated.sh [FOLDER]    FOLDER: where the wheel goes, build/emulated without one
#
# MXFP4_MOE_TILES builds some tiles only, and MAX_JOBS limits what runs at a time. Then, with a GPU:
#   pip install --force-reinstall --no-deps build/emulated/*.whl && pytest -m gpu
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
folder=$(realpath -m "${1:-$root/build/emulated}")
if [[ $folder == "$dist" ]]; then
  echo "error: $folder is where wheels for users go; expected another folder" >&2
  exit 1
fi

mkdir -p "$folder"
MXFP4_MOE_EMULATE_SM12X=1 MXFP4_MOE_DIST=$folder bash "$root/ci/build-wheel.sh"
