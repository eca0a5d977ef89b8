#!/usr/bin/env bash
# Runs an engine's tests in an environment of its own, which has the engine, its pinned requirements and the wheel.
#
#   ci/engines.sh vllm [-k expression] ...
#
# ci/engines/<engine>-requirements.txt names every distribution; the environment, .venv-<engine>, is made anew where that
# file changed, and gets the newest wheel of dist/. Arguments behind the engine go to pytest. Minutes, and gigabytes: the
# nightly workflow runs it, .ci/run does not.
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

engine=${1:?usage: ci/engines.sh ENGINE [pytest arguments]}
shift
requirements=$root/ci/engines/$engine-requirements.txt
env=${MXFP4_MOE_ENGINE_ENV:-$root/.venv-$engine}
if [[ ! -f $requirements ]]; then
  echo "error: no $requirements; there are: $(cd "$root/ci/engines" && echo ./*-requirements.txt)" >&2
  exit 1
fi
wheel=$(the_wheel "")

say "Environment: $env with $engine and $(basename "$wheel")"
[[ -x $env/bin/python ]] || "$(find_python)" -m venv "$env"
if [[ ! -f $env/requirements.txt ]] || ! cmp -s "$requirements" "$env/requirements.txt"; then
  "$env/bin/python" -m pip install --quiet --progress-bar off --no-deps -r "$requirements"
  cp "$requirements" "$env/requirements.txt" # only once everything is installed
fi
"$env/bin/python" -m pip install --quiet --no-deps --force-reinstall "$wheel"

cd "$root"
say "Tests of $engine"
"$env/bin/python" -m pytest -m engines --durations=0 "$@" "tests/engines/test_$engine.py"
