#!/usr/bin/env bash
# Lint, types, and the tests against the installed wheel; arguments go to pytest.
#
#   ci/test.sh [-k expression] [-m gpu] ...
#
# MXFP4_MOE_TEST_JOBS processes share the test files, as many as there are cores if it is not set; 0 is this one alone.
# Uses the newest wheel in dist/ and the environments that ci/build.sh made; runs that first if there is no wheel.
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ -z $(newest_wheel) || ! -x $build_env/bin/python ]]; then
  bash "$root/ci/build.sh"
fi
MXFP4_MOE_WHEEL=$(newest_wheel)
# What tests compile is compiled with what compiled the wheel.
toolchain=$(module "$build_env/bin/python" wheelbuild.versions toolchain)
export MXFP4_MOE_WHEEL MXFP4_MOE_BUILD_ENV=$build_env MXFP4_MOE_TOOLCHAIN=${MXFP4_MOE_TOOLCHAIN-$toolchain}

say "Test environment: $run_env with $(basename "$MXFP4_MOE_WHEEL")"
[[ -x $run_env/bin/python ]] || "$(find_python)" -m venv "$run_env"
installed=$(sha256sum "$MXFP4_MOE_WHEEL")
if [[ ! -f $run_env/tested-wheel || $(<"$run_env/tested-wheel") != "$installed" ]]; then
  # The version may be that of a wheel installed before, so the wheel itself is always put in place anew.
  "$run_env/bin/python" -m pip install --quiet --progress-bar off "torch==$(versions_get "['torch_build']")" \
    "${MXFP4_MOE_WHEEL}[test,dev]"
  "$run_env/bin/python" -m pip install --quiet --no-deps --force-reinstall "$MXFP4_MOE_WHEEL"
  printf '%s\n' "$installed" >"$run_env/tested-wheel"
fi

cd "$root"
say "Lint"
"$run_env/bin/python" -m ruff check .
"$run_env/bin/python" -m ruff format --check .
find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp' | sort |
  xargs "$run_env/bin/clang-format" --dry-run -Werror

say "Types"
"$run_env/bin/python" -m mypy --strict python wheelbuild

say "Assemblers"
module "$run_env/bin/python" wheelbuild.assemblers

say "Tests"
"$run_env/bin/python" -m pytest -n "${MXFP4_MOE_TEST_JOBS-auto}" --dist loadfile "$@"
