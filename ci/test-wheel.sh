#!/usr/bin/env bash
# Tests a wheel as a user gets it: installs it into an empty environment and, from outside the source tree, compares the
# files installed with the wheel's, imports it, runs its command, and runs one MoE layer on the CPU against float64.
#
#   ci/test-wheel.sh [WHEEL [ENVIRONMENT]]      makes ENVIRONMENT anew (without one: a temporary folder)
#   ci/test-wheel.sh WHEEL --installed PYTHON   the wheel is installed there already, as cibuildwheel does it
#
# MXFP4_MOE_TORCH: the torch to install (that of ci/cuda-versions.json); it may be any that a requirement can name.
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
wheel=$(the_wheel "${1:-}")

if [[ ${2:-} == --installed ]]; then
  python=$(command -v "${3:-python}")
else
  environment=${2:-$(mktemp -d)}
  [[ -n ${2:-} ]] || trap 'rm -rf "$environment"' EXIT
  say "Empty environment: $environment"
  rm -rf "$environment"
  "$(find_python)" -m venv "$environment"
  python=$environment/bin/python
  "$python" -m pip install --progress-bar off "torch${MXFP4_MOE_TORCH:-==$(versions_get "['torch_build']")}" "$wheel"
fi

# From another folder, so that the wheel is what gets imported.
say "What was installed"
(cd / && "$python" -W ignore::UserWarning "$root/ci/check_install.py" "$wheel")
say "One MoE layer"
(cd / && "$python" "$root/ci/run_layer.py")
