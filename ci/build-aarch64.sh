#!/usr/bin/env bash
# The wheel for aarch64 (DGX Spark), made on an x86-64 machine from a clean clone: builds it, gives it its manylinux tag,
# audits it, and checks it against the x86-64 wheel and under emulation (docs/aarch64.md). A table at the end.
#
#   ci/build-aarch64.sh
#
# Needs what ci/build-wheel.sh needs, and Debian's or Ubuntu's g++-aarch64-linux-gnu, qemu-user and apt-get (no root).
# The wheel goes to dist/aarch64/repaired/; what it is built against stays in .cross/aarch64. What chooses the contents of
# a wheel (MXFP4_MOE_CUDA, MXFP4_MOE_TILES, ...) is as for ci/build-wheel.sh.
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
platform=linux_aarch64
folder=$dist/aarch64

module "$(find_python)" wheelbuild.make_target "$platform" --check # now, not after minutes
rm -rf "$folder"

say "The x86-64 wheel of this tree"
MXFP4_MOE_DIST=$folder/x86_64 bash "$root/ci/build-wheel.sh"

say "Python, torch and CUDA of aarch64"
module "$build_env/bin/python" wheelbuild.make_target "$platform"

say "The aarch64 wheel"
start=$SECONDS
MXFP4_MOE_PLATFORM=$platform MXFP4_MOE_DIST=$folder/built bash "$root/ci/build-wheel.sh"
seconds=$((SECONDS - start))
MXFP4_MOE_DIST=$folder/built bash "$root/ci/repair.sh" "" "$folder/repaired"
wheel=$(echo "$folder"/repaired/*.whl)
bash "$root/ci/audit.sh" "$wheel"

say "Checks"
toolchain=$(module "$build_env/bin/python" wheelbuild.versions toolchain)
MXFP4_MOE_TOOLCHAIN=${MXFP4_MOE_TOOLCHAIN-$toolchain} \
  module "$build_env/bin/python" wheelbuild.release.cross_check --seconds "$seconds" "$wheel" "$folder"/x86_64/*.whl
