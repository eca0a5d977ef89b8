#!/usr/bin/env bash
# What only a GPU can show of the installed wheel: its tests, compute-sanitizer over every tile, and many random calls.
#
#   ci/gpu.sh FOLDER [tests] [memcheck] [racecheck] [synccheck] [initcheck] [fuzz]
#
# Writes logs into FOLDER, prints a line for each part, and ends with status 1 where one failed. Without names, all of
# them. PYTHON is one that imports the wheel, torch and the extra `test`, by default the environment of ci/build.sh;
# MXFP4_MOE_FUZZ_CALLS how many calls (10,000), MXFP4_MOE_TEST_JOBS how many processes share the GPU (one for each core:
# what takes time is the oracle).
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

out=$(realpath -m "${1:?usage: ci/gpu.sh FOLDER [part] ...}")
shift
parts=("$@")
((${#parts[@]})) || parts=(tests memcheck racecheck synccheck initcheck fuzz)
python=${PYTHON:-$run_env/bin/python}
jobs=${MXFP4_MOE_TEST_JOBS:-$(nproc)}
calls=${MXFP4_MOE_FUZZ_CALLS:-10000}
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
mkdir -p "$out"
cd "$root"

# in_shares NAME COMMAND...: the command once for each of `jobs` shares, told which it has by the variable SHARE, such as
# 3/16. All must end well.
in_shares() {
  local name=$1 pids=() share failed=0
  shift
  for ((share = 0; share < jobs; share++)); do
    SHARE=$share/$jobs "$@" >"$out/$name.$share.log" 2>&1 &
    pids+=($!)
  done
  for share in "${!pids[@]}"; do
    wait "${pids[share]}" || { failed=1 && echo "  $name, share $share of $jobs: see $out/$name.log"; }
  done
  cat "$out/$name".*.log >"$out/$name.log"
  rm "$out/$name".*.log
  return "$failed"
}

# Only our kernels are instrumented, by their namespace: torch's are many and slow to instrument. But initcheck asks who
# has written what a kernel reads, so it sees all of them. A port for each share: they start at the same time.
# shellcheck disable=SC2153,SC2329 # in_shares calls it, and says SHARE
sanitize() {
  local ours=(--kernel-name kernel_substring=mxfp4_moe)
  [[ $1 != initcheck ]] || ours=()
  PYTHONPATH=tests/helpers${PYTHONPATH:+:$PYTHONPATH} "$sanitizer" --tool "$1" "${ours[@]}" --error-exitcode 9 \
    --port $((49152 + 64 * ${SHARE%/*})) "$python" tests/gpu/sanitizer.py "$SHARE"
}

# shellcheck disable=SC2329 # in_shares calls it
fuzz() {
  MXFP4_MOE_FUZZ_SEED=${SHARE%/*} MXFP4_MOE_FUZZ_CALLS=$(((calls + jobs - 1) / jobs)) \
    "$python" -m pytest -q -p no:benchmark -m gpu tests/gpu/test_fuzz.py
}

run_part() {
  case $1 in
    tests) "$python" -m pytest -q -p no:benchmark -m gpu -n "$jobs" tests >"$out/tests.log" 2>&1 ;;
    memcheck | racecheck | synccheck | initcheck) in_shares "$1" sanitize "$1" ;;
    fuzz) in_shares fuzz fuzz ;;
    *) echo "error: no part $1; there are tests, memcheck, racecheck, synccheck, initcheck, fuzz" >&2 && return 2 ;;
  esac
}

status=0
for part in "${parts[@]}"; do
  begin=$SECONDS
  if run_part "$part"; then result=ok; else result=FAILED && status=1; fi
  # What each of its processes ended with.
  words=$(grep -hE '^=+ .*(passed|failed|error)|[0-9]+ (passed|failed)|ERROR SUMMARY|RACECHECK SUMMARY|as expected' \
    "$out/$part.log" 2>/dev/null | sort | uniq -c | sed 's/^ *//' | paste -sd ';')
  printf '%-10s %-6s %5d s  %s\n' "$part" "$result" $((SECONDS - begin)) "$words"
done
exit "$status"
