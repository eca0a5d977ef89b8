"""archs.py: the rule for every GPU and CUDA release, and the rule against real assemblers."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest

from mxfp4_moe import archs
from mxfp4_moe.archs import ArchError, ArchRule, build_rule
from mxfp4_moe.probe import kernel
from mxfp4_moe.probe.assemblers import Assembler
from mxfp4_moe.probe.run import TARGETS, Status, ask, probe
from mxfp4_moe.tiles import load_manifest

GPUS = [(9, 0), (12, 0), (12, 1)]
RELEASES = [(11, 8), (12, 0), (12, 6), (12, 8), (12, 9), (13, 0), (13, 5), (14, 0)]


# ---- the rule --------------------------------------------------------------------------------------------------------


def expected(capability: tuple[int, int], cuda: tuple[int, int]) -> tuple[str, ...]:
    """Flag and other cubins, written out once more by hand."""
    if cuda < (12, 8):
        return ()
    if capability == (9, 0):
        return ("90a",)
    if cuda < (12, 9):
        return ("120a",) if capability == (12, 0) else ()
    return ("120f", "120a") if capability == (12, 0) else ("120f", "121f", "121a")


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("cuda", RELEASES)
def test_every_gpu_with_every_release(capability: tuple[int, int], cuda: tuple[int, int]) -> None:
    cubins = expected(capability, cuda)
    if cubins:
        assert build_rule(capability, cuda) == ArchRule(flag=cubins[0], cubins=cubins)
        return
    needs = "12.9" if capability == (12, 1) else "12.8"
    with pytest.raises(ArchError) as error:
        build_rule(capability, cuda)
    assert str(error.value) == (
        f"CUDA {cuda[0]}.{cuda[1]} is too old to build for compute capability {capability[0]}.{capability[1]}, which "
        f"needs CUDA {needs} or newer"
    )


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (10, 0), (10, 3), (11, 0), (12, 2), (13, 0)])
def test_other_gpus_are_refused_in_a_sentence(capability: tuple[int, int]) -> None:
    with pytest.raises(ArchError, match=r"compute capability \d+\.\d: the kernel has code for 9\.0, 12\.0 and 12\.1$"):
        build_rule(capability, (13, 0))


def test_machine_code_and_the_gpus_that_run_it() -> None:
    pairs = product(archs.ARCHS, [*GPUS, (8, 9), (10, 0)])
    runs = {(arch, gpu) for arch, gpu in pairs if archs.arch_runs_on(arch, gpu)}
    assert runs == {
        ("90a", (9, 0)),
        *(("120f", gpu) for gpu in [(12, 0), (12, 1)]),
        ("121f", (12, 1)),
        ("120a", (12, 0)),
        ("121a", (12, 1)),
    }


def test_what_an_arch_needs() -> None:
    assert {arch: archs.oldest_cuda(arch) for arch in archs.ARCHS} == {
        "90a": (12, 8),
        "120f": (12, 9),
        "121f": (12, 9),
        "120a": (12, 8),
        "121a": (12, 9),
    }


@pytest.mark.parametrize("arch", ["90", "120", "100a", "100f", "122a", "sm_120f", "120F", "", "f"])
def test_what_is_no_arch_of_the_kernel(arch: str) -> None:
    for question in (archs.oldest_cuda, archs.check_arch, lambda a: archs.arch_runs_on(a, (12, 0))):
        with pytest.raises(ArchError, match=f"^arch '{arch}': "):
            question(arch)


def test_the_wheel_is_built_with_the_flags_of_the_rule() -> None:
    flags = dict.fromkeys(build_rule(gpu, (13, 0)).flag for gpu in GPUS)
    assert load_manifest().archs == tuple(flags)


# ---- the rule against assemblers -------------------------------------------------------------------------------------


def test_the_assemblers_are_of_the_releases_at_which_the_rule_changes(assemblers: dict[str, Assembler]) -> None:
    assert {"12.8", "12.9", "13.0"} < {assembler.cuda for assembler in assemblers.values()}


def test_the_kernel_assembles_exactly_where_the_rule_says(assemblers: dict[str, Assembler]) -> None:
    targets = [*TARGETS, "sm_90", "sm_100", "sm_101a", "sm_103f", "sm_110a"]
    for verdict in kernel.judge(list(assemblers.values()), targets):
        arch, (major, minor, _) = verdict.target.removeprefix("sm_"), verdict.assembler.version
        served = any(arch in build_rule(gpu, (major, minor)).cubins for gpu in GPUS if expected(gpu, (major, minor)))
        assert (verdict.status is Status.ACCEPTED) == served, f"{verdict.assembler.label} {verdict.target}: {verdict}"


def test_sm90_needs_the_ptx_isa_that_came_after_cuda_12_6(assemblers: dict[str, Assembler]) -> None:
    """CUDA 12.6 reads PTX ISA 8.5 and 12.8 reads 8.7: there is no release between them to ask."""
    path, newest = kernel.path_for("sm_90a"), list(assemblers.values())[-1]
    before = ask(dataclasses.replace(newest, isa=(8, 5)), "sm_90a", [one.ptx for one in path.instructions])
    refused = [one.name for one, verdict in zip(path.instructions, before, strict=True) if not verdict.accepted]
    assert len(refused) == 1
    assert all(name.startswith("cp.async.bulk.tensor.2d") and ".shared::cta.global" in name for name in refused)
    oldest = next(iter(assemblers.values()))
    assert (oldest.cuda, oldest.isa) == ("12.8", (8, 7))
    assert all(verdict.accepted for verdict in probe(oldest, "sm_90a", path.instructions).values())
