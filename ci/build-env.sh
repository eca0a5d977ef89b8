#!/usr/bin/env bash
# Installs what a build needs into one Python: pyproject.toml's build requirements, with the CUDA toolkit that
# MXFP4_MOE_CUDA names (a label of ci/cuda-versions.json; none for a label whose compiler comes with the container).
#
#   ci/build-env.sh [PYTHON]
#
# ci/build.sh calls it for its own environment, cibuildwheel in its container, before it builds without isolation.
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python=${1:-python}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  "$python" -m pip install --quiet tomli # requirements.py reads TOML, which Python 3.10 cannot
fi
record=$("$python" -c 'import sys; print(sys.prefix)')/mxfp4-moe-requirements.txt
requirements=$(module "$python" wheelbuild.requirements)
if [[ ! -f $record || $(<"$record") != "$requirements" ]]; then
  # torch's own wheels pin the toolkit that they were made with. The one that compiles may be newer, so it comes after
  # torch, in a step that does not look back; pip then says that torch wants another, and the newer one serves it too.
  toolkit=$(module "$python" wheelbuild.requirements --toolkit)
  { grep -vxF -- "${toolkit:-none}" <<<"$requirements" && echo build; } >"$record.new"
  "$python" -m pip install --progress-bar off -r "$record.new"
  [[ -z $toolkit ]] || "$python" -m pip install --progress-bar off "$toolkit"
  printf '%s\n' "$requirements" >"$record" # only once everything is installed
  rm "$record.new"
fi
