"""The plan: a pure function of settings, toolchain and limits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from build_cases import MANIFEST, MINIMAL, MOE_SOURCES, THRESHOLDS, TOOLCHAIN, make_plan, settings

from wheelbuild import ROOT
from wheelbuild.graph import graph_text
from wheelbuild.plan import CompileJob, Plan, plan
from wheelbuild.tile_model import tiles


def by_name(made: Plan) -> dict[str, CompileJob]:
    return {job.name: job for job in made.jobs}


def test_the_plan_has_every_tile_for_every_arch() -> None:
    made = make_plan()
    jobs = by_name(made)
    assert len(jobs) == len(made.jobs), "names are unique"
    assert len({job.output for job in made.jobs}) == len(made.jobs), "no two jobs write one file"
    assert made.modules == (*(tile.module for tile in MANIFEST.tiles), "moe")
    for tile in MANIFEST.tiles:
        nvcc = made.jobs_of(tile.module, "nvcc")
        assert [(job.archs, job.pair) for job in nvcc] == [(("90a",), "mxfp4_bf16"), (("120f",), "mxfp4_mxfp8")]
        for job in nvcc:
            assert f"-DLOGICAL_TILE_M={tile.m}" in job.command
            assert f"-DLOGICAL_TILE_N={tile.n}" in job.command
            assert f"-DSWAP_AB={int(tile.swap_ab)}" in job.command
            assert f"-DMXFP4_MOE_ARCH={job.archs[0]}" in job.command
            assert f"-DMXFP4_MOE_PAIR={job.pair}" in job.command
        (op,) = made.jobs_of(tile.module, "cxx")
        assert f"-DTILE_NAME={tile.name}" in op.command
        assert "-DMXFP4_MOE_FOR_EACH_KERNEL(X)=X(90a, mxfp4_bf16) X(120f, mxfp4_mxfp8)" in op.command
        (link,) = made.jobs_of(tile.module, "link")
        assert link.output == made.library(tile.module)
        assert set(link.inputs) == {job.output for job in (*nvcc, op)}
        (check,) = made.jobs_of(tile.module, "check")
        assert check.inputs == (link.output,)
    (load,) = made.jobs_of("extensions", "load")
    assert load.inputs == tuple(made.library(module) for module in made.modules)
    assert len(made.jobs) == len(MANIFEST.tiles) * (len(MANIFEST.archs) + 3) + len(MOE_SOURCES) + 3


def test_full_has_more_kernels_where_a_tile_can() -> None:
    """SM90's bf16 kernels serve all activations but fp16. Everything of mxfp4_minimal is compiled as it is there."""
    full = make_plan(settings())
    minimal = by_name(make_plan())
    assert len({job.output for job in full.jobs}) == len(full.jobs), "no two jobs write one file"
    more = {job.name: job for job in full.jobs if job.name not in minimal}
    counts = {"mxfp4_bf16": 21, "mxfp4_mxfp4": 26, "nvfp4_nvfp4": 26, "nvfp4_bf16": 20}
    counts |= {"mxfp4_fp16": 21, "nvfp4_fp16": 20}
    names = {
        f"{tile.module}.{arch}.{pair}"
        for tile in MANIFEST.tiles
        for pair in MANIFEST.pairs_of("full", tile)
        for arch in ("120f", "90a") * (pair != "mxfp4_mxfp8")
        if arch == "120f" or pair in ("nvfp4_bf16", "mxfp4_fp16", "nvfp4_fp16")
    }
    names |= {f"{tile.module}.90a.nvfp4_bf16" for tile in MANIFEST.tiles}
    assert more.keys() == names
    for pair, count in counts.items():
        assert sum(name.endswith(f"120f.{pair}") for name in more) == count
    for tile in MANIFEST.tiles:
        (op,) = full.jobs_of(tile.module, "cxx")
        kernels = [(job.archs[0], job.pair) for job in full.jobs_of(tile.module, "nvcc")]
        each = " ".join(f"X({arch}, {pair})" for arch, pair in kernels)
        assert f"-DMXFP4_MOE_FOR_EACH_KERNEL(X)={each}" in op.command
        (link,) = full.jobs_of(tile.module, "link")
        assert {job.output for job in full.jobs_of(tile.module, "nvcc")} < set(link.inputs)
    for name, job in by_name(full).items():
        if job.kind == "nvcc" and name in minimal:
            assert job == minimal[name]


def test_machine_code_only_and_each_arch_once() -> None:
    for job in make_plan().jobs:
        if job.kind == "nvcc":
            generated = [word for word in job.command if word.startswith("arch=")]
            assert generated == [f"arch=compute_{arch},code=sm_{arch}" for arch in job.archs]
            assert not [word for word in job.command if "code=compute" in word]


def test_jobs_come_after_what_they_need() -> None:
    made = make_plan()
    outputs = {job.output for job in made.jobs}
    done: set[Path] = set()
    for job in made.jobs:
        assert all(path in done for path in job.inputs if path in outputs)
        done.add(job.output)


def test_the_plan_is_a_pure_function_of_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = make_plan()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MXFP4_MOE_TILES", "m128n128")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert make_plan() == first
    assert graph_text(make_plan(), 2) == graph_text(first, 2)
    assert not list(tmp_path.iterdir())


def test_the_order_of_sources_does_not_matter() -> None:
    assert plan(settings(**MINIMAL), TOOLCHAIN, THRESHOLDS, MOE_SOURCES[::-1], Path("build/x/ninja")) == make_plan()


def test_a_filter_leaves_the_other_tiles_out_and_these_jobs_alike() -> None:
    everything = by_name(make_plan())
    filtered = make_plan(settings(**MINIMAL, MXFP4_MOE_TILES="m128n128"))
    assert filtered.modules == ("tile_m128n128", "moe")
    for job in filtered.jobs:
        assert job == everything[job.name] or job.kind == "load"
    one_arch = make_plan(settings(**MINIMAL, MXFP4_MOE_ARCHS="120f"))
    assert not [word for job in one_arch.jobs for word in job.command if "90a" in word]


def test_changing_one_tiles_row_changes_that_tiles_commands_and_the_common_load_only() -> None:
    removed, *rest = MANIFEST.tiles
    fewer = dataclasses.replace(settings(**MINIMAL), tiles=tuple(rest))
    before = {job.output: job.command for job in make_plan().jobs}
    after = {job.output: job.command for job in make_plan(fewer).jobs}
    differing = {path.name for path in before if before[path] != after.get(path)}
    assert after.keys() < before.keys()
    assert differing == {job.output.name for job in make_plan().jobs if job.module == removed.module} | {"load.json"}


def expected(made: Plan, module: str, kind: str) -> dict[str, Any]:
    (job,) = made.jobs_of(module, kind)
    data: dict[str, Any] = json.loads(job.command[job.command.index("--expect") + 1])
    return data


def test_loading_is_compared_with_the_proof() -> None:
    expect = expected(make_plan(), "extensions", "load")
    assert set(expect) == {*(tile.module for tile in MANIFEST.tiles), "moe"}
    for tile in MANIFEST.tiles:
        assert expect[tile.module]["ops"] == [f"mxfp4_moe::grouped_gemm_{tile.name}"]
        assert expect[tile.module]["facts"] == {
            "90a": {"mxfp4_bf16": tiles.facts(tile, "90a")},
            "120f": {"mxfp4_mxfp8": tiles.facts(tile, "120f")},
        }
    assert expect["moe"] == {}


def test_the_check_knows_what_the_main_loop_must_hold() -> None:
    made = make_plan()
    check = expected(made, "tile_m128n128", "check")
    assert set(check) == {"compile", "main_loop", "block_scaled"}
    assert check["compile"] == {"peak_mb": 2000}
    assert "main_loop" not in expected(made, "moe", "check")

    def loop(name: str, arch: str) -> dict[str, Any]:
        found: dict[str, Any] = expected(made, name, "check")["main_loop"][arch]["mxfp4_mxfp8"]
        return found

    # SM12x. A warp's 64 x 32 of (128, 128): 4 x 4 MMAs of m16n8k32; 64 rows of 32 bytes of activations, in 8 x 16
    # bytes, and 32 rows of weights, of which a lane has a word of every eighth. Swapped (8, 128) has 8 rows of
    # activations and 64 of weights, in 4 x 1.
    sm12x = {"function": "grouped_gemm", "opcode": "QMMA.SF", "variants": False}
    loads = {"matrices_per_step": 16, "words_per_step": 4, "words_per_load": 4}
    assert loop("tile_m128n128", "120f") == {"mma_per_step": 16, "limit": 3.5, **loads, **sm12x}
    loads = {"matrices_per_step": 2, "words_per_step": 8, "words_per_load": 4}
    assert loop("tile_m8n128_swap", "120f") == {"mma_per_step": 4, "limit": None, **loads, **sm12x}
    # 16 rows of weights per warp of swapped (8, 64), 8 of (64, 8): two words side by side, and one.
    narrow = [loop(name, "120f") for name in ("tile_m8n64_swap", "tile_m64n8")]
    assert [(each["words_per_step"], each["words_per_load"]) for each in narrow] == [(2, 2), (1, 1)]


def test_the_check_knows_the_main_loops_of_both_kernels_of_sm90() -> None:
    made = make_plan()

    def loop(name: str) -> dict[str, Any]:
        found: dict[str, Any] = expected(made, name, "check")["main_loop"]["90a"]["mxfp4_bf16"]
        assert (found.pop("variants"), found.pop("limit")) == (True, None)
        return found

    # A warp of (8, 64) has 16 weight rows, 1 x 1 MMAs of two HMMA, and 8 rows of 64 bytes, of bf16; of (64, 16) it has
    # 16 rows of activations and as many of weights, of (8, 256) 64 of weights.
    mma_sync = {"function": "grouped_gemm_mma_sync", "opcode": "HMMA"}
    for name, mmas, matrices, words, at_once in (
        ("tile_m8n64_swap", 2, 4, 2, 2),
        ("tile_m64n16", 4, 8, 2, 2),
        ("tile_m8n256_swap", 8, 4, 8, 4),
    ):
        loads = {"matrices_per_step": matrices, "words_per_step": words, "words_per_load": at_once}
        assert loop(name) == {"mma_per_step": mmas, **loads, **mma_sync}
    # Hopper's own MMA takes all columns and reads activations itself; a warp has 16 weight rows, whatever the tile.
    wgmma = {"function": "grouped_gemm_wgmma", "opcode": "HGMMA", "matrices_per_step": 0}
    for name in ("tile_m128n64", "tile_m128n128"):
        assert loop(name) == {"mma_per_step": 2, "words_per_step": 2, "words_per_load": 2, **wgmma}


def test_the_check_knows_where_block_scaled_mmas_read() -> None:
    made = make_plan()
    # On sm_120f (128, 128) has three stages, each of 2 blocks of 64 weights' rows.
    stages = {"stages": 3, "act_bytes": 128 * 128, "weight_bytes": 2 * 4352, "act_scale_bytes": 640}
    memory = stages | {"block_bytes": 64 * (64 + 4), "block_scale_bytes": 64 * 4, "act_scale_set_bytes": 132 * 4}
    check = expected(made, "tile_m128n128", "check")
    scaled = {"mxfp4_mxfp8": {"pair": "mxfp4_mxfp8", "weights": "B", "shared_memory": memory}}
    assert check["block_scaled"] == {"120f": scaled}, "SM90 has no such MMA"
    full = make_plan(settings())
    # Rows of FP4 have half the bytes, and of NVFP4 two words of scales, as weights have.
    packed = {"stages": 5, "act_bytes": 128 * 64, "weight_bytes": 2 * 4352, "act_scale_bytes": 640}
    of_nvfp4 = {"weight_bytes": 2 * 4608, "act_scale_bytes": 1152, "block_bytes": 4608, "block_scale_bytes": 512}
    for pair, parts in (("mxfp4_mxfp4", {}), ("nvfp4_nvfp4", of_nvfp4)):
        scaled[pair] = {"pair": pair, "weights": "A", "shared_memory": memory | packed | parts}
    assert expected(full, "tile_m128n128", "check")["block_scaled"] == {"120f": scaled}, "bf16 operands have none"
    assert expected(made, "tile_m8n128_swap", "check")["block_scaled"]["120f"]["mxfp4_mxfp8"]["weights"] == "A"
    assert "block_scaled" not in expected(made, "moe", "check")


def test_the_check_knows_the_main_loop_of_bf16_on_sm12x() -> None:
    """A warp of (128, 128) has 16 weight rows, as A, and 128 of activations; of (64, 16) 16 of both, weights as B."""
    full = make_plan(settings())
    for name, mmas, matrices, words in (("tile_m128n128", 32, 64, 2), ("tile_m64n16", 4, 8, 2)):
        found: dict[str, Any] = expected(full, name, "check")["main_loop"]["120f"]
        assert found.keys() == set(tiles.PAIRS)
        for pair in ("mxfp4_bf16", "mxfp4_fp16"):
            assert found[pair] == {
                **{"function": "grouped_gemm_mma_sync", "opcode": "HMMA", "variants": True, "limit": None},
                **{"mma_per_step": mmas, "matrices_per_step": matrices},
                **{"words_per_step": words, "words_per_load": words},
            }


def test_the_check_knows_the_main_loop_of_fp4() -> None:
    """A step is K = 64. A warp of (128, 128) has 32 weight rows, as A, and 64 of activations: 2 x 8 MMAs, and of each
    weight row the words of two steps of 32, two rows' side by side; of (64, 16) 16 rows of both, weights as B."""
    full = make_plan(settings())
    for name, mmas, matrices, words, at_once in (("tile_m128n128", 16, 16, 8, 2), ("tile_m64n16", 2, 4, 4, 1)):
        for pair in ("mxfp4_mxfp4", "nvfp4_nvfp4"):
            found = expected(full, name, "check")["main_loop"]["120f"][pair]
            assert found == {
                **{"function": "grouped_gemm", "opcode": "OMMA.SF", "variants": False, "limit": None},
                **{"mma_per_step": mmas, "matrices_per_step": matrices},
                **{"words_per_step": words, "words_per_load": at_once},
            }


def test_a_threshold_of_one_tile_reruns_that_tiles_check_only() -> None:
    before = {job.output: job.command for job in make_plan().jobs}
    tighter = dataclasses.replace(THRESHOLDS, instructions_per_mma={"120f": {"mxfp4_mxfp8": {"m128n128": 3.0}}})
    after = plan(settings(**MINIMAL), TOOLCHAIN, tighter, MOE_SOURCES, Path("build/x/ninja"))
    assert [job.name for job in after.jobs if before[job.output] != job.command] == ["tile_m128n128.check"]


def test_no_folder_of_this_machine_reaches_the_libraries() -> None:
    for job in make_plan().jobs:
        if job.kind in ("nvcc", "cxx"):
            maps = [word for word in ",".join(job.command).split(",") if word.startswith("-ffile-prefix-map=")]
            assert "-ffile-prefix-map=/cutlass/include=cutlass" in maps
            assert not [word for word in job.command if str(ROOT) in word], "sources are named relative to the tree"
        if job.kind == "link":
            assert not [word for word in job.command if "rpath" in word]
