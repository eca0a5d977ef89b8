"""The command line on a machine without a GPU: its tables, its proofs, and what it does not import; not the doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_wheel
import pytest

import mxfp4_moe
from mxfp4_moe import cli
from mxfp4_moe._install import wheel
from mxfp4_moe.tiles import PAIRS, Tile, TileProof, kernel_pairs, load_manifest, max_smem_per_block, prove

NATIVE, SWAPPED = Tile(m=128, n=128, swap_ab=False), Tile(m=8, n=128, swap_ab=True)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of two tiles: one with all that a report can say, one from before reports had main loops."""
    archs = {
        NATIVE.name: {
            "90a": fake_wheel.arch_entry(NATIVE, "90a", 200, 27.63),
            "120f": fake_wheel.arch_entry(NATIVE, "120f", 162, 3.25),
        },
        SWAPPED.name: {arch: fake_wheel.arch_entry(SWAPPED, arch, 89, None) for arch in fake_wheel.ARCHS},
    }
    return fake_wheel.install(tmp_path, monkeypatch, [NATIVE, SWAPPED], archs)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(arguments)
    return status, capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    status, out = run(capsys, *arguments, "--json")
    return status, json.loads(out)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mxfp4-moe {mxfp4_moe.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["tiles", "--nonsense"]])
def test_arguments_that_make_no_sense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: mxfp4-moe" in capsys.readouterr().err


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, with the same package."""
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )


def test_tiles_does_not_import_torch() -> None:
    program = "import sys; from mxfp4_moe.cli import main; main(['tiles']); print('torch' in sys.modules)"
    result = python("-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "False"


def test_importing_the_package_costs_next_to_nothing() -> None:
    """Beside torch nothing is imported but what finds the installed wheel: 15 ms of a second and a half."""
    program = (
        "import sys, torch; before = set(sys.modules); import mxfp4_moe\n"
        "print(*sorted(name for name in set(sys.modules) - before if name.startswith('mxfp4_moe')))"
    )
    result = python("-c", program)
    names = (
        "",
        "._floors",
        "._install",
        "._install.elf",
        "._install.importing",
        "._install.troubles",
        "._install.wheel",
        ".archs",
        ".tiles",
        ".tiles.bf16",
        ".tiles.kernels",
        ".tiles.manifest",
        ".tiles.pairs",
        ".tiles.proof",
        ".tiles.selection",
        ".tiles.stages",
        ".tiles.tile",
    )
    assert result.stdout.split() == [f"mxfp4_moe{name}" for name in names]


def test_as_a_module_and_into_a_closed_pipe() -> None:
    whole = python("-m", "mxfp4_moe.cli", "tiles", "--json")
    assert json.loads(whole.stdout)["schema"] == 4
    command = f"{sys.executable} -m mxfp4_moe.cli tiles --json | true"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    closed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=env)
    assert closed.stderr == ""


def test_the_public_names_come_when_asked_for() -> None:
    program = (
        "import sys, mxfp4_moe\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(mxfp4_moe.__all__) <= set(dir(mxfp4_moe))\n"
        "import mxfp4_moe._call.fused_moe\n"
        "assert callable(mxfp4_moe.fused_moe), 'the function, whatever module was imported first'\n"
        "from mxfp4_moe import *\n"
        "for name in mxfp4_moe.__all__: assert eval(name) is getattr(mxfp4_moe, name), name\n"
        "try: mxfp4_moe.nonsense\n"
        "except AttributeError as error: print(error)\n"
    )
    result = python("-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "module 'mxfp4_moe' has no attribute 'nonsense'\n"


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, data = run_json(capsys, "info")
    assert status == 0
    assert data == {
        "schema": 1,
        "version": mxfp4_moe.__version__,
        "path": str(package),
        "profile": "mxfp4_minimal",
        "pairs": ["mxfp4_mxfp8"],
        "archs": list(fake_wheel.ARCHS),
        "tiles": 2,
        "built_with": {"cuda": "13.0.88", "torch": "2.13.0"},
    }
    _, out = run(capsys, "info")
    lines = [line.split(maxsplit=1) for line in out.splitlines()[1:5]]
    assert lines == [
        ["version", data["version"]],
        ["path", str(package)],
        ["profile", "mxfp4_minimal"],
        ["archs", "sm_90a, sm_120f"],
    ]
    assert out.splitlines()[6].split() == ["computes", "mxfp4_mxfp8"]
    assert out.splitlines()[-1].split() == ["built", "with", "torch", "2.13.0"]
    (package / "build_report.json").unlink()
    status, out = run(capsys, "info")
    assert status == 0
    assert "unknown: no build report" in out


# ---- tiles -----------------------------------------------------------------------------------------------------------


def test_the_table(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / "_ext" / f"{SWAPPED.module}.abi3.so").unlink()
    status, out = run(capsys, "tiles")
    head, *rows, _, tail = out.splitlines()
    assert status == 0
    assert head.split() == "tile mode arch reads kernel stages shared memory registers instr/MMA size".split()
    # Stages and shared memory are worked out by hand in tests of the proofs; a library's size stands once.
    proofs = [prove(tile, arch) for tile in (NATIVE, SWAPPED) for arch in fake_wheel.ARCHS]
    native90, native120, swapped90, swapped120 = [f"{proof.stages} {proof.smem_bytes:,}" for proof in proofs]
    assert [row.split() for row in rows] == [
        f"m128n128 native 90a mxfp4_bf16 grouped_gemm_wgmma {native90} 200 27.63 4,096".split(),
        f"m128n128 native 120f mxfp4_mxfp8 grouped_gemm {native120} 162 3.25".split(),
        f"m8n128_swap swapped 90a mxfp4_bf16 grouped_gemm_mma_sync {swapped90} 89 - missing".split(),
        f"m8n128_swap swapped 120f mxfp4_mxfp8 grouped_gemm {swapped120} 89 -".split(),
    ]
    assert tail.startswith(f"mxfp4-moe {mxfp4_moe.__version__}: 2 tiles, 4,096 bytes, profile mxfp4_minimal")


def test_the_table_for_machines(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, data = run_json(capsys, "tiles")
    assert status == 0
    assert set(data) == {"schema", "version", "profile", "built_with", "archs", "tiles"}
    assert data["archs"] == list(fake_wheel.ARCHS)
    native, swapped = data["tiles"]
    assert set(native) == {"name", "m", "n", "mode", "library", "archs"}
    assert native["library"] == {"file": f"_ext/{NATIVE.module}.abi3.so", "bytes": 4096, "sha256": "0" * 64}
    for arch, registers, instructions_per_mma in (("120f", 162, 3.25), ("90a", 200, 27.63)):
        proof = prove(NATIVE, arch)
        assert native["archs"][arch] == {
            proof.pair: {
                "function": proof.function,
                "stages": proof.stages,
                "smem_bytes": proof.smem_bytes,
                "threads": proof.threads,
                "blocks_per_sm": proof.blocks_per_sm,
                "accumulator_registers": proof.accumulator_registers,
                "registers": registers,
                "instructions_per_mma": instructions_per_mma,
            }
        }
    assert swapped["archs"]["90a"]["mxfp4_bf16"]["instructions_per_mma"] is None


def test_a_full_wheel_has_a_row_for_each_kernel(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = package / "build_report.json"
    report.write_text(report.read_text().replace("mxfp4_minimal", "full"))
    _, out = run(capsys, "tiles")
    rows = [line.split() for line in out.splitlines()[1:-2]]
    of_sm90 = ("mxfp4_bf16", "nvfp4_bf16", "mxfp4_fp16", "nvfp4_fp16")
    kernels = [*(("90a", pair) for pair in of_sm90), *(("120f", pair) for pair in PAIRS)]
    assert [(row[0], row[2], row[3]) for row in rows] == [
        (name, *kernel) for name in (NATIVE.name, SWAPPED.name) for kernel in kernels
    ]
    _, out = run(capsys, "tiles", "--explain", "256,64")
    flat = " ".join(out.split())
    assert "m256n64 on sm_120f, mxfp4_bf16: grouped_gemm_mma_sync" in flat
    assert "two pipeline stages need 2 x 69,904 = 139,808 bytes" in flat
    assert "m256n64 on sm_120f, mxfp4_mxfp4: grouped_gemm" in flat


def test_without_a_report_the_table_has_what_can_be_proved(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / "build_report.json").write_text("{")
    status, out = run(capsys, "tiles")
    assert status == 0
    lines = out.splitlines()
    manifest = load_manifest()
    pairs = [manifest.pairs_of(manifest.default_profile, tile) for tile in manifest.tiles]
    assert len(lines) == sum(len(kernel_pairs(arch, of)) for of in pairs for arch in fake_wheel.ARCHS) + 3
    assert lines[-1].endswith("no build report, so only what can be proved")


@pytest.mark.parametrize("swap", [False, True])
def test_the_proof_of_a_legal_tile(swap: bool, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tile = SWAPPED if swap else NATIVE
    status, out = run(capsys, "tiles", "--explain", f"{tile.m},{tile.n}" + (",swap" if swap else ""))
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    proofs = [prove(tile, arch) for arch in fake_wheel.ARCHS]
    assert [line for line in lines if line.startswith(tile.name)] == [
        f"{tile.name} on sm_{proof.arch}, {proof.pair}: {proof.function}" for proof in proofs
    ]
    for section, proof in zip("\n".join(lines).split("\n\n"), proofs, strict=True):
        check_proof(section.splitlines(), proof)
    roles = [line.split(";")[0] for line in lines if "A = " in line]
    weights_first, mode = "A = weights, B = activations", "swapped" if swap else "native"
    on_sm12x = weights_first if swap else "A = activations, B = weights"
    assert roles == [f"{mode}: {weights_first}, both bf16", f"{mode}: {on_sm12x}"]


def check_proof(lines: list[str], proof: TileProof) -> None:
    """One arch's proof of a legal tile of the wheel, as printed."""
    for name, size in (
        ("activations", proof.act_bytes),
        ("weights and scales", proof.weight_bytes),
        ("activation scales", proof.act_scale_bytes),
        ("barriers", proof.barrier_bytes),
        ("one stage", proof.stage_bytes + proof.barrier_bytes),
        ("activation table", proof.amax_bytes),
        ("tiles of warps", proof.kept_bytes),
        (f"{proof.stages} stages", proof.smem_bytes),
        ("a block may have", max_smem_per_block(proof.arch)),
    ):
        assert f"{name} {size:,}" in lines
    assert f"accumulators: {proof.accumulator_registers} fp32 registers per thread, of at most 128" in lines
    assert any(
        f"{proof.threads} threads" in line and f"{proof.warps_m} x {proof.warps_n} MMA" in line for line in lines
    )
    blocks = f"{proof.blocks_per_sm} block" + ("s" if proof.blocks_per_sm > 1 else "")
    assert f"stages: {proof.stages}, with {blocks} per SM" in lines
    assert lines[-1] == "verdict: legal, in this wheel"


def test_one_proof_where_the_archs_have_the_same_numbers(
    package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel, "built_archs", lambda: ("120f", "90a", "121a"))
    _, out = run(capsys, "tiles", "--explain", "128,128")
    titles = [line for line in out.splitlines() if line.startswith("m128n128")]
    assert titles == [
        "m128n128 on sm_120f, sm_121a, mxfp4_mxfp8: grouped_gemm",
        "m128n128 on sm_90a, mxfp4_bf16: grouped_gemm_wgmma",
    ]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("256,256", ["shared memory: two pipeline stages need 2 x 51,", "a block has 101,376", "stages: 1,"]),
        ("256,256", ["accumulators: 256 fp32 registers per thread, of at most 128", "registers: 256 accumulators"]),
        ("100,128", ["a native tile has m divisible by 64, not 100"]),
        ("128,96", ["n must divide 64, the rows of a weight block, or be a multiple: 96"]),
        ("12,32,swap", ["a swapped tile has m in 8, 16, 32, not 12", "a swapped tile has n of at least 64, not 32"]),
        ("8,128", ["m divisible by 64, not 8", "the swapped tile of this shape is legal: --explain 8,128,swap"]),
        ("512,512", ["m must be at most 256", "n must be from 8 to 256"]),
    ],
)
def test_the_proof_of_an_impossible_tile(
    shape: str, words: list[str], package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = run(capsys, "tiles", "--explain", shape)
    flat = " ".join(out.split())
    assert status == 0, "explaining succeeds, whatever the verdict"
    assert "verdict: refused" in flat
    for word in words:
        assert word in flat
    _, data = run_json(capsys, "tiles", "--explain", shape)
    for arch in fake_wheel.ARCHS:
        (verdict,) = data["archs"][arch].values()
        assert not verdict["legal"]
        assert all(refusal in flat for refusal in verdict["refusals"]), "every refusal is printed"


def test_the_proof_for_machines(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, data = run_json(capsys, "tiles", "--explain", "64,128")
    assert {key: data[key] for key in ("name", "m", "n", "mode", "in_wheel")} == {
        "name": "m64n128",
        "m": 64,
        "n": 128,
        "mode": "native",
        "in_wheel": False,
    }
    verdict = data["archs"]["120f"]["mxfp4_mxfp8"]
    assert verdict["legal"]
    assert verdict["refusals"] == []
    assert (verdict["max_smem_bytes"], verdict["max_accumulator_registers"]) == (101_376, 128)
    assert data["archs"]["90a"]["mxfp4_bf16"]["max_smem_bytes"] == 232_448
    for arch, of_pairs in data["archs"].items():
        (of,) = of_pairs.values()
        proof = of["proof"]
        assert proof["function"] == {"90a": "grouped_gemm_wgmma", "120f": "grouped_gemm"}[arch]
        stages = proof["stages"] * (proof["stage_bytes"] + proof["barrier_bytes"])
        assert proof["smem_bytes"] == stages + proof["amax_bytes"] + proof["kept_bytes"]
        parts = ("act_bytes", "weight_bytes", "act_scale_bytes")
        assert proof["stage_bytes"] == sum(proof[part] for part in parts)


@pytest.mark.parametrize(
    "shape", ["128", "128,128,128", "0,128", "-8,128", "a,b", "8,128,swapped", "8.0,128", "1,2,swap,"]
)
def test_a_shape_that_is_none(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tiles", f"--explain={shape}"])
    assert caught.value.code == 2
    assert f"expected M,N or M,N,swap, such as 128,128 or 8,128,swap, got '{shape}'" in capsys.readouterr().err
