#!/usr/bin/env bash
# Makes the source distribution, and compares its files with those that git knows: everything is in it that a build
# needs, and nothing else.
#
#   ci/sdist.sh [FOLDER]    FOLDER: where it goes, dist without one
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
folder=$(realpath -m "${1:-$dist}")

cd "$root"
tool python -m wheelbuild.release.sdist "$folder"
