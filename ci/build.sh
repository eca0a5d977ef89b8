#!/usr/bin/env bash
# From a clean clone to a wheel that runs: builds dist/*.whl (ci/build-wheel.sh, which says what chooses its contents),
# installs it into an empty environment, and runs one MoE layer with it (ci/test-wheel.sh).
#
#   ci/build.sh
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

bash "$root/ci/build-wheel.sh"
bash "$root/ci/test-wheel.sh" "$(newest_wheel)" "$run_env"
