#!/usr/bin/env bash
# A release without the world: the publishing job's steps on this machine. Makes the index from repaired wheels, serves
# it on 127.0.0.1, installs mxfp4-moe from there by name into an empty environment, runs the README's example on the CPU,
# and uninstalls, which must leave nothing.
#
#   ci/rehearse.sh FOLDER [LABEL...]    FOLDER: repaired wheels; LABEL: those to install, all that are there without one
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
folder=$(realpath "${1:?expected a folder of repaired wheels}")
shift
work=$(mktemp -d)
server=
trap '[[ -z $server ]] || kill "$server"; rm -rf "$work"' EXIT

say "Index"
bash "$root/ci/index.sh" "$folder" "$work/site"
"$(find_python)" "$root/ci/serve_index.py" "$work/site" "$work/address" &
server=$!
for _ in $(seq 100); do [[ -s $work/address ]] || sleep 0.1; done
address=$(<"$work/address")
labels=("$@")
if [[ ${#labels[@]} -eq 0 ]]; then mapfile -t labels < <(cd "$work/site" && ls -d cu*); fi

say "Empty environment with torch"
"$(find_python)" -m venv "$work/env"
python=$work/env/bin/python
"$python" -m pip install --quiet --progress-bar off "torch==$(versions_get "['torch_build']")" safetensors
"$python" -m pip freeze --all >"$work/before"
find "$work/env" -not -name '*.pyc' -not -name __pycache__ | sort >"$work/files-before"

for label in "${labels[@]}"; do
  say "pip install --index-url $address/$label/ mxfp4-moe"
  "$python" -m pip --isolated install --no-cache-dir --index-url "$address/$label/" mxfp4-moe
  installed=$("$work/env/bin/mxfp4-moe" --version)
  echo "$installed"
  if [[ $installed != *"+$label" ]]; then
    echo "error: expected the version for $label, got $installed" >&2
    exit 1
  fi
  say "README's example, on the CPU"
  (cd "$work" && "$python" "$root/ci/run_readme.py")
  say "Uninstall"
  "$python" -m pip uninstall --yes mxfp4-moe
  "$python" -m pip freeze --all | diff "$work/before" -
  find "$work/env" -not -name '*.pyc' -not -name __pycache__ | sort | diff "$work/files-before" -
  echo "nothing is left"
done
