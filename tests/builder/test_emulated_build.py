"""The development build that runs SM12x's kernels on SM90: what is compiled and checked, who tells, who refuses it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_wheel
import pytest
import torch
from machine_code_cases import code_of

from mxfp4_moe import cli, formats, problems
from mxfp4_moe._choice import choice, cost_model, tuned
from mxfp4_moe._choice.facts import Layer, from_properties
from mxfp4_moe._health.checks import check_gpus
from mxfp4_moe._install import wheel
from mxfp4_moe.arithmetic import SM12X_MXF8F6F4, SM90_BF16
from mxfp4_moe.formats import weight_layout
from mxfp4_moe.tiles import load_manifest
from wheelbuild import ROOT, BuildError, emulation
from wheelbuild.emulation import check_emulated_tile, refuse_emulated
from wheelbuild.machine_code import Code
from wheelbuild.plan import Plan, plan
from wheelbuild.release.audit import audit
from wheelbuild.release.index import read_file
from wheelbuild.release.repair import repair
from wheelbuild.report import make_report
from wheelbuild.settings import Settings, read_settings
from wheelbuild.thresholds import Thresholds
from wheelbuild.tile_model import tiles as build_tiles

EMULATING = {emulation.VARIABLE: "1"}
MINIMAL = {"MXFP4_MOE_BUILD_PROFILE": "mxfp4_minimal"}
TOOLS: Any = SimpleNamespace(
    cuda=SimpleNamespace(
        version=(13, 0, 88),
        nvcc=Path("/cuda/bin/nvcc"),
        include_dirs=(Path("/cuda/include"),),
        cudart=Path("/cuda/lib/libcudart.so.13"),
        cuobjdump=Path("/cuda/bin/cuobjdump"),
    ),
    cutlass=SimpleNamespace(version="4.2.0", include_dirs=(Path("/cutlass/include"),)),
    torch=SimpleNamespace(version="2.13.0", include_dirs=(Path("/torch/include"),), library_dir=Path("/torch/lib")),
    python=SimpleNamespace(version="3.11", include_dirs=(Path("/python/include"),)),
    cxx=Path("/usr/bin/g++"),
    cxx_version="g++ 12",
    target_python=(),
)
LIMITS = Thresholds(instructions_per_mma={}, peak_mb=2000, wheel_bytes={"full": 12_000_000})
WORDS = "development build, for tests alone: kernels of sm_120f, whose MMA is emulated on sm_90a"


def settings(**env: str) -> Settings:
    return read_settings(env, build_tiles.load_manifest(ROOT / build_tiles.MANIFEST_NAME))


def make_plan(chosen: Settings) -> Plan:
    return plan(
        chosen, TOOLS, LIMITS, [Path("csrc/moe/route.cu"), Path("csrc/moe/operators.cpp")], Path("build/x/ninja")
    )


# ---- what is built ---------------------------------------------------------------------------------------------------


def test_settings() -> None:
    chosen = settings(**EMULATING)
    assert chosen.archs == ("120f",)
    assert chosen.compiled_for("120f") == "90a"
    assert chosen.local("cu130") == "cu130.sm12x.emulated"
    assert chosen.build_folder("cu130") == "full-cu130-sm12x.emulated"
    some = settings(**EMULATING, MXFP4_MOE_TILES="m8n128_swap")
    assert some.local("cu130").startswith("cu130.dev")
    assert some.local("cu130").endswith(".sm12x.emulated")
    assert settings(**{emulation.VARIABLE: "0"}) == settings()
    assert not settings(MXFP4_MOE_ARCHS="120f").emulates


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({emulation.VARIABLE: "yes"}, "MXFP4_MOE_EMULATE_SM12X: expected 1 or nothing, got 'yes'"),
        (EMULATING | {"MXFP4_MOE_ARCHS": "90a"}, "MXFP4_MOE_ARCHS: expected nothing beside MXFP4_MOE_EMULATE_SM12X"),
        (EMULATING | {"MXFP4_MOE_LOCAL_VERSION": "cu130"}, "MXFP4_MOE_LOCAL_VERSION: expected nothing beside"),
        (EMULATING | {"MXFP4_MOE_NAME_SUFFIX": "cu13"}, "MXFP4_MOE_NAME_SUFFIX: expected nothing beside"),
    ],
)
def test_nothing_may_hide_it(env: dict[str, str], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        settings(**env)


def test_everything_is_compiled_for_sm90_and_told_that_it_emulates() -> None:
    jobs = {job.name: job for job in make_plan(settings(**EMULATING, **MINIMAL)).jobs}
    compiled = [job for job in jobs.values() if job.kind in ("nvcc", "cxx")]
    assert all(emulation.DEFINE in job.command for job in compiled)
    kernels = [job for job in compiled if job.kind == "nvcc"]
    assert {job.machine_archs for job in kernels} == {("90a",)}
    assert all("arch=compute_90a,code=sm_90a" in job.command for job in kernels)
    assert not [job.name for job in kernels if "sm_120f" in " ".join(job.command)]
    assert "-DMXFP4_MOE_ARCH=120f" in jobs["tile_m128n128.120f.mxfp4_mxfp8"].command
    assert "-DMXFP4_MOE_FOR_EACH_KERNEL(X)=X(120f, mxfp4_mxfp8)" in jobs["tile_m128n128.op"].command
    assert jobs["tile_m128n128.120f.mxfp4_mxfp8"].description.endswith("compile tile.cu for sm_90a, mxfp4_mxfp8")
    check = jobs["tile_m128n128.check"].command
    assert check[check.index("--archs") + 1] == "90a"
    expected = json.loads(check[check.index("--expect") + 1])
    one = {"function": "grouped_gemm", "mma_per_k_tile": 64, "moves_registers": True}
    assert expected["emulated"] == {"mxfp4_mxfp8": one}
    assert "main_loop" not in expected


def test_other_builds_know_nothing_of_it() -> None:
    for job in make_plan(settings()).jobs:
        assert "EMULAT" not in " ".join(job.command).upper(), job.name
        assert job.machine_archs == job.archs


# ---- what its machine code must be -----------------------------------------------------------------------------------

KERNEL = "_ZN9mxfp4_moe12grouped_gemmIN19sm_120f_mxfp4_mxfp84TileEEEvNS_10TensorMapsENS_10GemmParamsE"
CALL = "CALL.REL.NOINC {9}"  # of the emulated MMA, which ends the kernel; another one divides
GOOD = ("UTMALDG.2D [UR8], [UR6]", "LDSM.16.M88.4 R4, [R2]", *[CALL] * 4, "USETMAXREG 0xe8", "CALL.REL.NOINC {12}")
GOOD += ("EXIT", "IADD3 R4, R4, R5, RZ", "SHFL.IDX PT, R4, R5, R6, 0x1f", "RET.REL.NODEC R2 0x0", "MUFU.RCP R4, R4")
GOOD += ("RET.REL.NODEC R2 0x0",)
EXPECT = {"mxfp4_mxfp8": {"function": "grouped_gemm", "mma_per_k_tile": 4, "moves_registers": True}}


def test_a_good_tile_is_reported() -> None:
    assert check_emulated_tile("x.so", {"90a": code_of(*GOOD, kernel=KERNEL)}, EXPECT) == {
        "mxfp4_mxfp8": {"calls": 4, "instructions": len(GOOD)}
    }


def test_a_kernel_whose_mma_both_archs_have_uses_it() -> None:
    other = KERNEL.replace("12grouped_gemm", "21grouped_gemm_mma_sync").replace("mxfp4_mxfp8", "mxfp4_bf16")
    expect = EXPECT | {
        "mxfp4_bf16": {"function": "grouped_gemm_mma_sync", "mma_per_k_tile": 0, "moves_registers": False}
    }
    used = code_of("HMMA.16816.F32.BF16 R4, R8, R12, R4", "EXIT", kernel=other).kernels
    both = Code(kernels=code_of(*GOOD, kernel=KERNEL).kernels | used)
    assert check_emulated_tile("x.so", {"90a": both}, expect)["mxfp4_bf16"] == {"calls": 0, "instructions": 2}
    idle = Code(kernels=both.kernels | code_of("EXIT", kernel=other).kernels)
    with pytest.raises(BuildError, match="no HMMA in grouped_gemm_mma_sync, which both archs have"):
        check_emulated_tile("x.so", {"90a": idle}, expect)
    with pytest.raises(
        BuildError, match="expected grouped_gemm of mxfp4_mxfp8, grouped_gemm_mma_sync of mxfp4_bf16 alone"
    ):
        check_emulated_tile("x.so", {"90a": code_of(*GOOD, kernel=KERNEL)}, expect)


@pytest.mark.parametrize(
    ("lines", "kernel", "message"),
    [
        (
            GOOD,
            "_ZN9mxfp4_moe21grouped_gemm_mma_syncI",
            "expected grouped_gemm of mxfp4_mxfp8 alone, which sm_120f has, got _ZN9",
        ),
        ((*GOOD, "HMMA.16816.F32 R4, R8, R12, R4"), KERNEL, "1 HMMA, but the MMA is emulated and none allowed"),
        ((*GOOD, "QMMA.SF.16832.F32.E4M3.E2M1.E8 R4, R8"), KERNEL, "1 QMMA, but the MMA is emulated"),
        ((*GOOD, "HGMMA.64x8x16.F32.BF16 R24, R4"), KERNEL, "1 HGMMA, but the MMA is emulated"),
        ((*GOOD, CALL), KERNEL, "5 calls of the emulated MMA, expected a multiple of 4"),
        ([line for line in GOOD if "CALL" not in line], KERNEL, "0 calls of the emulated MMA"),
        (GOOD[1:], KERNEL, "no UTMALDG, which the kernel has on sm_120f"),
        ([line for line in GOOD if "LDSM" not in line], KERNEL, "no LDSM"),
        ([line for line in GOOD if "USETMAXREG" not in line], KERNEL, "no USETMAXREG"),
    ],
)
def test_another_tile_is_refused(lines: list[str], kernel: str, message: str) -> None:
    with pytest.raises(BuildError, match=rf"^x\.so on sm_90a(, mxfp4_mxfp8)?: {message}"):
        check_emulated_tile("x.so", {"90a": code_of(*lines, kernel=kernel)}, EXPECT)


@pytest.mark.parametrize("env", [EMULATING, {}], ids=["emulates", "does not"])
def test_the_report_says_so(env: dict[str, str], tmp_path: Path) -> None:
    chosen = settings(**env, **MINIMAL, MXFP4_MOE_TILES="m8n64_swap")
    made = make_plan(chosen)
    machine = [chosen.compiled_for(arch) for arch in chosen.archs]
    pairs = {"90a": "mxfp4_bf16", "120f": "mxfp4_mxfp8"}
    checked = {
        **{"file": "_ext/x.so", "bytes": 1, "sha256": "0" * 64},
        "instructions": {arch: {"total": 9} for arch in machine},
        **{"kernels": {}, "block_scaled": {}, "emulated": {"mxfp4_mxfp8": {"calls": 4, "instructions": 9}}},
        "kernel_instructions": {arch: {pair: {"total": 9}} for arch, pair in pairs.items()},
        "main_loop": {} if env else {arch: {pairs[arch]: {"mma": len(arch)}} for arch in chosen.archs},
    }
    facts = {
        arch: {pairs[arch]: {"tile_m": 8, "tile_n": 64, "swap_ab": 1, "stages": len(arch)}} for arch in chosen.archs
    }
    loaded = {"ops": [], "facts": facts}
    names = {KERNEL: 99, "_Z21grouped_gemm_mma_syncI5ShapeEv": 80}
    record = "".join(
        f"Compiling entry function '{name}' for 'sm_{arch}'\n  0 bytes stack frame, 0 bytes spill stores, 4 bytes "
        f"spill loads\nUsed {registers} registers\n"
        for arch in machine
        for name, registers in names.items()
    )
    for path, data in (
        *((made.check(module), checked) for module in made.modules),
        (made.load, dict.fromkeys(made.modules, loaded)),
        *((job.record, {"output": record}) for job in made.jobs if job.record),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(data))
    report = make_report(made, chosen, TOOLS, "0.1.0", tmp_path)
    assert report.get("emulates") == ({"arch": "120f", "on": "90a"} if env else None)
    of_archs = report["tiles"]["m8n64_swap"]["archs"]
    shared = {"stack_bytes": 0, "spill_store_bytes": 0, "spill_load_bytes": 4, "instructions": {"total": 9}}
    sm12x = {"function": "grouped_gemm", "stages": 4, "registers": 99, **shared}
    if env:
        assert of_archs == {"120f": {"mxfp4_mxfp8": {**sm12x, "emulated": {"calls": 4, "instructions": 9}}}}
    else:  # each arch with its own of everything
        sm90 = {"function": "grouped_gemm_mma_sync", "stages": 3, "registers": 80, **shared}
        assert of_archs == {
            "90a": {"mxfp4_bf16": {**sm90, "main_loop": {"mma": 3}}},
            "120f": {"mxfp4_mxfp8": {**sm12x, "main_loop": {"mma": 4}}},
        }


# ---- who refuses it --------------------------------------------------------------------------------------------------


def write_wheel(path: Path, emulates: bool) -> Path:
    report = {"schema": 1, "archs": ["120f"], **({"emulates": {"arch": "120f", "on": "90a"}} if emulates else {})}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mxfp4_moe/build_report.json", json.dumps(report))
        archive.writestr("mxfp4_moe-0.1.0.dist-info/METADATA", "Name: mxfp4-moe\nRequires-Python: >=3.10\n")
    return path


@pytest.mark.parametrize("version", ["0.1.0+cu130.sm12x.emulated", "0.1.0+cu130"])
def test_no_release_takes_it_under_any_name(version: str, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / f"mxfp4_moe-{version}-cp310-abi3-manylinux_2_28_x86_64.whl", emulates=True)
    for refuse in (refuse_emulated, audit, read_file, lambda path: repair(path, tmp_path / "repaired")):
        words = "emulates sm_120f on sm_90a .*: it is a development build|sm12x.emulated marks a build that is not for"
        with pytest.raises(BuildError, match=words):
            refuse(wheel)  # type: ignore[operator]
    assert not (tmp_path / "repaired").exists()


def test_other_wheels_are_not_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "mxfp4_moe-0.1.0+cu130-cp310-abi3-manylinux_2_28_x86_64.whl", emulates=False)
    refuse_emulated(wheel)
    assert read_file(wheel) is not None


def test_its_verb_keeps_away_from_dist(tmp_path: Path) -> None:
    environment = {**os.environ, "MXFP4_MOE_DIST": str(tmp_path)}
    verb = ["bash", str(ROOT / "ci" / "build-emulated.sh"), str(tmp_path)]
    result = subprocess.run(verb, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"error: {tmp_path} is where wheels for users go" in result.stderr


# ---- what it does where it is installed ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Nothing decided for one wheel counts for another."""
    caches = (weight_layout._order_of, choice.served_device, choice.loop_instructions, tuned.tables)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed wheel that emulates, and a GPU for it."""
    package = fake_wheel.install(tmp_path, monkeypatch, load_manifest().tiles)
    report = json.loads((package / "build_report.json").read_text())
    report |= {"archs": ["120f"], "emulates": {"arch": "120f", "on": "90a"}}
    (package / "build_report.json").write_text(json.dumps(report))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return package


@pytest.mark.usefixtures("package")
def test_an_sm90_gpu_is_served_as_sm12x() -> None:
    assert wheel.arch_for((9, 0)) == "120f"
    assert wheel.arch_for((12, 0)) is None, "it has no machine code for the GPUs whose kernels it has"
    assert wheel.arch_for((9, 0), ("90a", "120f")) == "90a"
    assert wheel.served_as((9, 0)) == (12, 0)
    assert wheel.served_as((8, 0)) == (8, 0)
    device = torch.device("cuda", 0)
    assert formats.word_order_of(device) is formats.WordOrder.CONTAINERS
    assert problems.arithmetic_here(device) == SM12X_MXF8F6F4


H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    multi_processor_count=132,
    major=9,
    minor=0,
    L2_cache_size=50 << 20,
    clock_rate=1980000,
)


@pytest.mark.usefixtures("package")
def test_tiles_are_chosen_as_on_sm12x() -> None:
    """Neither by the table that was measured with SM90's kernels nor by SM90's rule."""
    layer, device, tiles = (
        Layer(experts=128, top_k=4, hidden=2880, intermediate=2880),
        from_properties(H100),
        load_manifest().tiles,
    )
    assert (tuned.SHIPPED / tuned.file_name(device)).exists()
    assert tuned.look_up(device, layer, 64) is None
    served = choice.served_device(device)
    assert (served.capability, served.name, served.sms) == ((12, 0), device.name, 132)
    assert choice.choose_tile(64, layer, device, tiles) == cost_model.choose(64, layer, served, tiles, {})


def test_an_ordinary_wheel_is_chosen_for_by_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wheel.install(tmp_path, monkeypatch, load_manifest().tiles)
    assert wheel.emulated_on() is None
    assert wheel.served_as((9, 0)) == (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert problems.arithmetic_here(torch.device("cuda", 0)) == SM90_BF16
    layer = Layer(experts=128, top_k=4, hidden=2880, intermediate=2880)
    assert tuned.look_up(from_properties(H100), layer, 64) is not None


@pytest.mark.usefixtures("package")
def test_info_and_doctor_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert WORDS in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["emulates"] == {"arch": "120f", "on": "90a"}
    cli.main(["doctor"])
    wheel = [line for line in capsys.readouterr().out.splitlines() if WORDS in line]
    assert len(wheel) == 1


def test_the_doctor_knows_which_gpus_it_runs_on() -> None:
    def findings(capability: tuple[int, int], emulated_on: str) -> list[str]:
        gpu = SimpleNamespace(index=0, name="GPU", capability=capability)
        env = SimpleNamespace(
            driver=SimpleNamespace(cuda="13.0", error="", gpus=(gpu,)),
            wheel=SimpleNamespace(archs=("120f",), emulated_on=emulated_on),
            torch=None,
        )
        return [f"{f.level.name} {f.text} {f.next_step}" for f in check_gpus(env)]  # type: ignore[arg-type]

    (fits,), (other,) = findings((9, 0), "90a"), findings((12, 0), "90a")
    assert fits.startswith("OK cuda:0, GPU, compute capability 9.0: runs the cubin for sm_120f, emulated on sm_90a")
    assert "no cubin in the wheel is for it" in other
    assert "this wheel runs on sm_90a" in other
    assert findings((12, 0), "")[0].startswith("OK")


@pytest.mark.parametrize("emulates", [True, False])
def test_every_import_says_so(emulates: bool, tmp_path: Path) -> None:
    """In one line on stderr, which no filter of warnings keeps back."""
    target = tmp_path / "mxfp4_moe"
    shutil.copytree(wheel.PACKAGE, target, ignore=shutil.ignore_patterns("_ext", "__pycache__"))
    report = {"archs": ["120f"], "tiles": {}, **({"emulates": {"arch": "120f", "on": "90a"}} if emulates else {})}
    (target / "build_report.json").write_text(json.dumps(report))
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mxfp4_moe; print(mxfp4_moe.__file__)"
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.strip() == str(target / "__init__.py")
    assert result.stderr.count(WORDS) == emulates
    assert len(result.stderr.splitlines()) == emulates
