#!/usr/bin/env bash
# Makes the package index, a folder of static files with one index per CUDA label, from a folder of repaired wheels.
#
#   ci/index.sh FOLDER OUTPUT
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [[ $# -ne 2 ]]; then
  echo "error: expected a folder of wheels and a folder to write, got $# arguments" >&2
  exit 1
fi

module "$(find_python)" wheelbuild.release.index "$(realpath "$1")" "$(realpath -m "$2")"
