#!/usr/bin/env bash
# Gives a wheel its manylinux tag, and says what the verdict rests on. libtorch, libc10 and the CUDA libraries stay out:
# they come with the user's torch.
#
#   ci/repair.sh [WHEEL [FOLDER]]    FOLDER: where the repaired wheel goes, dist/repaired without one
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
wheel=$(the_wheel "${1:-}")
folder=$(realpath -m "${2:-$dist/repaired}")

cd "$root"
tool python -m wheelbuild.release.repair "$wheel" "$folder"
