#!/usr/bin/env bash
# From a clean clone to everything that a release publishes for this machine's platform: for every CUDA version whose
# compiler is on PyPI it builds, repairs, audits and tests the wheel, then makes the sdist and the checksums, and
# rehearses the publication. A table at the end says what came out.
#
#   ci/release.sh [LABEL...]    LABEL: of ci/cuda-versions.json; all that can be built without a container without one
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
labels=("$@")
if [[ ${#labels[@]} -eq 0 ]]; then
  mapfile -t labels < <(module "$(find_python)" wheelbuild.versions labels)
fi
release=$dist/release
rm -rf "$release"
rows=()

for label in "${labels[@]}"; do
  built=$dist/built-$label
  rm -rf "$built"
  begin=$SECONDS
  MXFP4_MOE_CUDA=$label MXFP4_MOE_DIST=$built bash "$root/ci/build-wheel.sh"
  seconds=$((SECONDS - begin))
  MXFP4_MOE_DIST=$built bash "$root/ci/repair.sh" "" "$built/repaired"
  wheel=$(echo "$built"/repaired/*.whl)
  bash "$root/ci/audit.sh" "$wheel"
  bash "$root/ci/test-wheel.sh" "$wheel"
  mkdir -p "$release"
  cp "$wheel" "$release/"
  rows+=("$release/$(basename "$wheel")" "$seconds" "$((SECONDS - begin))")
done

say "Source distribution and checksums"
bash "$root/ci/sdist.sh" "$release"
(cd "$release" && sha256sum -- *.whl *.tar.gz >SHA256SUMS && cat SHA256SUMS)

bash "$root/ci/rehearse.sh" "$release" "${labels[@]}"

say "Released into $release"
cd "$root"
tool python -m wheelbuild.release.table "${rows[@]}"
