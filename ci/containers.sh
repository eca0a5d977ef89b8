#!/usr/bin/env bash
# Builds this machine's wheel in its manylinux container, by cibuildwheel (pyproject.toml's [tool.cibuildwheel]), which
# calls the other scripts of this folder inside of it. Needs Docker. MXFP4_MOE_CUDA and CIBW_MANYLINUX_*_IMAGE choose
# the CUDA version and the image, as the release workflow sets them from ci/cuda-versions.json.
#
#   ci/containers.sh [FOLDER]    FOLDER: where the wheel goes, dist without one
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$root"
# Not in the source tree, which is copied into the container as it is.
tools_env=${MXFP4_MOE_TOOLS_ENV:-${RUNNER_TEMP:-${TMPDIR:-/tmp}}/mxfp4-moe-tools}
export MXFP4_MOE_TOOLS_ENV=$tools_env

tool cibuildwheel --platform linux --output-dir "${1:-$dist}"
