#!/usr/bin/env bash
# Builds a wheel into dist/. Needs Python 3.10 or newer with its headers, and g++; no CUDA, no GPU.
#
#   ci/build-wheel.sh
#
# The build environment is kept (.venv-build), so a second build compiles only what changed. MXFP4_MOE_CUDA (a label of
# ci/cuda-versions.json), MXFP4_MOE_BUILD_PROFILE, MXFP4_MOE_TILES, MXFP4_MOE_ARCHS, MXFP4_MOE_NAME_SUFFIX and MAX_JOBS
# choose what is built and how (wheelbuild/settings.py); MXFP4_MOE_DIST where the wheel goes.
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

say "Build environment: $build_env"
[[ -x $build_env/bin/python ]] || "$(find_python)" -m venv "$build_env"
bash "$root/ci/build-env.sh" "$build_env/bin/python"

say "Wheel"
# Without isolation, in the environment made above: the compiler stays at its path, so what is up to date stays so.
# Without the check of pyproject.toml's pins: they name the default toolkit, and this may be another.
toolchain=$(module "$build_env/bin/python" wheelbuild.versions toolchain)
(cd / && MXFP4_MOE_TOOLCHAIN=${MXFP4_MOE_TOOLCHAIN-$toolchain} \
  "$build_env/bin/python" -m build --wheel --no-isolation --skip-dependency-check --outdir "$dist" "$root")
ls -l "$(newest_wheel)"
