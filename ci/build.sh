#!/usr/bin/env bash
# From a clean clone to a wheel that runs: builds dist/*.whl, installs it into an empty environment, and runs one MoE
# layer with it. Needs Python 3.10 or newer with its headers, and g++; no CUDA, no GPU.
#
#   ci/build.sh
#
# The build environment is kept (.venv-build), so a second build compiles only what changed. MXFP4_MOE_BUILD_PROFILE,
# MXFP4_MOE_TILES, MXFP4_MOE_ARCHS and MAX_JOBS choose what is built and how (ci/wheelbuild/settings.py).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python=$(find_python)

say "Build environment: $build_env"
[[ -x $build_env/bin/python ]] || "$python" -m venv "$build_env"
if ! "$build_env/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  "$build_env/bin/python" -m pip install --quiet tomli # requirements.py reads TOML, which Python 3.10 cannot
fi
requirements=$(PYTHONPATH=$root/ci "$build_env/bin/python" -m wheelbuild.requirements && echo build)
if [[ ! -f $build_env/requirements.txt || $(<"$build_env/requirements.txt") != "$requirements" ]]; then
  printf '%s\n' "$requirements" >"$build_env/requirements.new"
  "$build_env/bin/python" -m pip install --progress-bar off -r "$build_env/requirements.new"
  mv "$build_env/requirements.new" "$build_env/requirements.txt" # only once everything is installed
fi

say "Wheel"
# Without isolation, in the environment made above: the compiler stays at its path, so what is up to date stays so.
(cd / && MXFP4_MOE_TOOLCHAIN=${MXFP4_MOE_TOOLCHAIN-pypi} \
  "$build_env/bin/python" -m build --wheel --no-isolation --outdir "$root/dist" "$root")
wheel=$(newest_wheel)
ls -l "$wheel"

say "Empty environment: $run_env"
rm -rf "$run_env"
"$python" -m venv "$run_env"
"$run_env/bin/python" -m pip install --progress-bar off "torch==$(versions_get "['torch_build']")" "$wheel"

say "One MoE layer"
# From another folder, so that the wheel is what gets imported.
(cd / && "$run_env/bin/python" "$root/ci/run_layer.py")
