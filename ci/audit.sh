#!/usr/bin/env bash
# Looks a wheel over before it is published: Python's and torch's stable ABI, contents, metadata, bill of materials, size,
# and whether SM12x's machine code waits for what it reads. Nothing is installed and nothing of the wheel runs.
#
#   ci/audit.sh [WHEEL]
set -euo pipefail
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
wheel=$(the_wheel "${1:-}")
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT

say "abi3audit: only Python's stable ABI"
tool abi3audit --strict --summary "$wheel"
say "torch-abi-audit: only torch's stable ABI"
tool python -m zipfile --extract "$wheel" "$unpacked"
tool torch-abi-audit --check both "$unpacked/mxfp4_moe"
cd "$root" # whose pyproject.toml configures the next two
say "check-wheel-contents"
tool check-wheel-contents "$wheel"
say "pydistcheck"
tool pydistcheck "$wheel"
say "twine"
tool twine check --strict "$wheel"
say "Metadata, bill of materials, size"
tool python -m wheelbuild.release.audit "$wheel"
say "basalt-sass: hazards in the machine code for sm_120 (a minute and a half of one core)"
tool python -m wheelbuild.release.hazards "$wheel"
