#!/usr/bin/env bash
# From a clean clone to a wheel that runs: builds dist/*.whl, installs it into an empty environment, and runs one MoE
# layer with it. Needs Python 3.10 or newer with its headers, and g++; no CUDA, no GPU.
#
#   ci/build.sh
#
# The build environment is kept (.venv-build), so a second build compiles only what changed. MXFP4_MOE_CUDA (a label of
# ci/cuda-versions.json), MXFP4_MOE_BUILD_PROFILE, MXFP4_MOE_TILES, MXFP4_MOE_ARCHS, MXFP4_MOE_NAME_SUFFIX and MAX_JOBS
# choose what is built and how (ci/wheelbuild/settings.py).
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python=$(find_python)

say "Build environment: $build_env"
[[ -x $build_env/bin/python ]] || "$python" -m venv "$build_env"
bash "$root/ci/build-env.sh" "$build_env/bin/python"

say "Wheel"
# Without isolation, in the environment made above: the compiler stays at its path, so what is up to date stays so.
toolchain=$(PYTHONPATH=$root/ci "$build_env/bin/python" -m wheelbuild.versions toolchain)
(cd / && MXFP4_MOE_TOOLCHAIN=${MXFP4_MOE_TOOLCHAIN-$toolchain} \
  "$build_env/bin/python" -m build --wheel --no-isolation --outdir "$dist" "$root")
wheel=$(newest_wheel)
ls -l "$wheel"

bash "$root/ci/test-wheel.sh" "$wheel" "$run_env"
