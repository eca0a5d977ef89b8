# What build.sh and test.sh share. Sourced, not run.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build_env=${MXFP4_MOE_BUILD_ENV:-$root/.venv-build} # compilers and headers
run_env=$root/.venv                                 # what a user has: Python, torch, the wheel
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\n== %s\n' "$*"; }

# The Python that environments are made from.
find_python() {
  local python=${PYTHON:-python3}
  if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: $python is not Python 3.10 or newer with venv; install python3-venv or set PYTHON" >&2
    return 1
  fi
  printf '%s\n' "$python"
}

# The wheel built last; nothing when there is none.
newest_wheel() {
  local wheels=("$root"/dist/*.whl)
  if [[ -e ${wheels[0]} ]]; then ls -t "${wheels[@]}" | head -n 1; fi
}

# versions_get EXPRESSION: a value of ci/cuda-versions.json, e.g. versions_get "['torch_build']".
versions_get() {
  "$(find_python)" -c "import json; print(json.load(open('$root/ci/cuda-versions.json'))$1)"
}
