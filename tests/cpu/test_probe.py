"""The probe: its table against assemblers, its page against its answers, its answers against other ways to ask."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mxfp4_moe.probe import kernel, matrix, run, variants
from mxfp4_moe.probe.assemblers import Answer, Assembler, AssemblerError, assemble, examine, find
from mxfp4_moe.probe.matrix import Matrix
from mxfp4_moe.probe.run import TARGETS, Status, Verdict, ask, probe, probe_all
from mxfp4_moe.probe.variants import Variant
from wheelbuild import ROOT, kernel_ptx
from wheelbuild.docs import architectures
from wheelbuild.tile_model import tiles as model

SM12X_WITH_SUFFIX = ["sm_120a", "sm_120f", "sm_121a", "sm_121f"]
SM10X = ["sm_100a", "sm_100f", "sm_103a"]


@pytest.fixture(scope="session")
def live(assemblers: dict[str, Assembler]) -> Matrix:
    """The whole table asked of every assembler, now."""
    table = variants.load()
    return matrix.from_results(probe_all(list(assemblers.values()), dict.fromkeys(TARGETS, table)), TARGETS, table)


@pytest.fixture(scope="session")
def newest(assemblers: dict[str, Assembler]) -> Assembler:
    return list(assemblers.values())[-1]


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_is_large_and_names_are_unique() -> None:
    names = [variant.name for variant in variants.load()]
    assert len(set(names)) == len(names) >= 120
    for variant in variants.load():
        assert re.fullmatch(r"[a-z0-9]+([.:]+\w+)*", variant.name), variant.name
        assert variant.ptx.endswith(";")
        assert "\n" not in variant.ptx
        assert variant.section
    assert variants.categories() == (
        *("ldmatrix", "stmatrix", "tma", "mbarrier", "cluster", "mma", "wgmma", "tcgen05"),
        *("setmaxnreg", "griddepcontrol", "cvt"),
    )


def test_every_variant_is_accepted_somewhere_or_says_why_not(live: Matrix) -> None:
    """A refusal everywhere would mean a typo in the table."""
    for variant in live.variants:
        accepting = {target for toolkit in live.toolkits for target in live.accepted(toolkit, variant.name)}
        assert bool(accepting) != bool(variant.nowhere), variant


def test_the_newest_assembler_reads_all_of_the_table(live: Matrix) -> None:
    last = live.verdicts[live.toolkits[-1]]
    assert {verdict.status for by_name in last.values() for verdict in by_name.values()} == {
        Status.ACCEPTED,
        Status.REFUSED,
    }


def test_the_tables_ptx_isa_versions_are_the_first_that_accept(newest: Assembler) -> None:
    """The same ptxas reading the file as each older PTX ISA version, on targets from before and after SM90."""
    ladder = [(6, 4), (6, 5), *((7, minor) for minor in range(9)), *((8, minor) for minor in range(9))]
    ladder += [(9, minor) for minor in range(newest.isa[1] + 1)]
    first: dict[Variant, variants.Isa] = {}
    for isa in ladder:
        older = dataclasses.replace(newest, isa=isa)
        for target in ("sm_75", "sm_80", "sm_90", "sm_90a", "sm_100a", "sm_120a"):
            left = [variant for variant in variants.load() if variant not in first]
            for variant, verdict in zip(left, ask(older, target, [each.ptx for each in left]), strict=True):
                if verdict.accepted:
                    first[variant] = isa
    assert {each.name: first[each] for each in first} == {each.name: each.isa for each in first}
    assert {each.name for each in variants.load()} - {each.name for each in first} == {
        each.name for each in variants.load() if each.nowhere
    }


# ---- rows that the kernel and the docs stand on ----------------------------------------------------------------------

ROWS: list[tuple[str, Callable[[Variant], bool], list[str]]] = [
    (
        "block-scaled mxf8f6f4 MMA",
        lambda v: v.name.startswith("mma.sync") and "kind::mxf8f6f4.block_scale" in v.name,
        SM12X_WITH_SUFFIX,
    ),
    (
        "ldmatrix that unpacks FP4",
        lambda v: v.category == "ldmatrix" and v.name.endswith("b4x16_p64"),
        [*SM10X, *SM12X_WITH_SUFFIX],
    ),
    (
        "FP8 MMA without a kind",
        lambda v: v.name.startswith("mma.sync.aligned.m16n8k32.row.col.f32.e"),
        list(TARGETS),
    ),
    ("wgmma", lambda v: v.category == "wgmma", ["sm_90a"]),
]


@pytest.mark.parametrize(("row", "chosen", "targets"), ROWS, ids=[row[0] for row in ROWS])
def test_where_it_is_accepted(row: str, chosen: Callable[[Variant], bool], targets: list[str], live: Matrix) -> None:
    found = [variant for variant in live.variants if chosen(variant)]
    assert len(found) >= 3
    for toolkit in live.toolkits:
        known = {
            target for target in TARGETS if live.verdict(toolkit, target, found[0]).status is not Status.NOT_APPLICABLE
        }
        for variant in found:
            assert live.accepted(toolkit, variant.name) == [target for target in targets if target in known]
    assert known == set(TARGETS)


def test_tcgen05_is_nowhere_in_the_12x(live: Matrix) -> None:
    found = [variant for variant in live.variants if variant.category == "tcgen05"]
    assert len(found) > 30
    for toolkit in live.toolkits:
        for variant in found:
            accepted = live.accepted(toolkit, variant.name)
            assert not any(target.startswith("sm_12") for target in accepted)
            assert "sm_100a" in accepted or variant.isa > toolkit.isa


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_made_of_the_record() -> None:
    record = json.loads((ROOT / architectures.RECORD).read_text(encoding="utf-8"))
    written = (ROOT / architectures.DOCUMENT).read_text(encoding="utf-8")
    assert written == architectures.document(record), f"run {architectures.COMMAND}"


def test_the_record_is_what_assemblers_say_now(live: Matrix, assemblers: dict[str, Assembler]) -> None:
    record = json.loads((ROOT / architectures.RECORD).read_text(encoding="utf-8"))
    recorded = matrix.from_json(record)
    assert [toolkit.version for toolkit in recorded.toolkits] == [
        release for release, assembler in assemblers.items() if assembler.version >= (12, 9)
    ]
    assert (recorded.targets, recorded.variants) == (live.targets, live.variants), f"run {architectures.COMMAND}"
    for toolkit in recorded.toolkits:
        assert recorded.verdicts[toolkit] == live.verdicts[toolkit], f"run {architectures.COMMAND}"
    for verdict in kernel.judge(list(assemblers.values()), TARGETS):
        said = "n/a" if verdict.status is Status.NOT_APPLICABLE else verdict.first
        assert record["kernel"][verdict.assembler.label][verdict.target] == said, f"run {architectures.COMMAND}"


def test_the_page_corrects_what_is_often_said() -> None:
    page = " ".join((ROOT / architectures.DOCUMENT).read_text(encoding="utf-8").split())
    assert "`sm_120a`, `sm_120f`, `sm_121a` and `sm_121f`, and for no other target" in page
    assert "Instruction 'mma with block scale' not supported on .target 'sm_120'" in page


# ---- asking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_90a", "sm_120f"])
def test_many_in_one_call_are_answered_as_each_alone(target: str, live: Matrix, newest: Assembler) -> None:
    together = live.verdicts[live.toolkits[-1]][target]
    # One of each kind of refusal, and all that is accepted in the categories with the most intricate operands.
    kinds = {verdict.words: name for name, verdict in together.items() if not verdict.accepted}
    chosen = set(kinds.values()) | {each.name for each in live.variants if each.category in ("mma", "setmaxnreg")}
    for variant in live.variants:
        if variant.name in chosen:
            assert probe(newest, target, [variant]) == {variant.name: together[variant.name]}


def test_a_complaint_about_no_line_in_particular_is_traced_to_its_statement(
    newest: Assembler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vague(path: Path, target: str, source: str) -> Answer:
        answer = assemble(path, target, source)
        return dataclasses.replace(answer, complaints=tuple((None, words) for _, words in answer.complaints))

    statements = ["bar.sync 0;", "wgmma.fence.sync.aligned;", "elect.sync %r0|%p0, %r1;"]
    exact = ask(newest, "sm_120f", statements)
    monkeypatch.setattr(run, "assemble", vague)
    assert ask(newest, "sm_120f", statements) == exact
    assert [verdict.accepted for verdict in exact] == [True, False, True]
    assert exact[1].words.startswith("Instruction 'wgmma.fence' not supported on .target 'sm_120f'")


def test_a_statement_that_is_not_ptx_spoils_no_other(newest: Assembler) -> None:
    verdicts = ask(newest, "sm_120f", ["bar.sync 0;", "no such { instruction", "bar.sync 1;"])
    assert [verdict.accepted for verdict in verdicts] == [True, False, True]


def test_what_a_toolkit_is_too_old_for_is_not_applicable(assemblers: dict[str, Assembler]) -> None:
    oldest = next(iter(assemblers.values()))
    wanted = next(variant for variant in variants.load() if variant.isa > oldest.isa)
    verdict = probe(oldest, "sm_120a", [wanted])[wanted.name]
    needs = variants.isa_text(wanted.isa)
    assert verdict == Verdict(Status.NOT_APPLICABLE, f"needs PTX ISA {needs}, CUDA 12.8 reads 8.7")
    verdict = ask(oldest, "sm_120f", ["bar.sync 0;"])[0]
    assert verdict.status is Status.NOT_APPLICABLE
    assert verdict.words == "CUDA 12.8 has no sm_120f: Value 'sm_120f' is not defined for option 'gpu-name'"


def test_no_place_for_a_temporary_file_is_said(newest: Assembler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(AssemblerError, match="^no place for a temporary file: .*; set TMPDIR to a folder that has$"):
        assemble(newest.path, "sm_120f", "")


# ---- finding assemblers ----------------------------------------------------------------------------------------------


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_every_place_is_looked_at_and_each_version_is_there_once(
    tmp_path: Path, assemblers: dict[str, Assembler]
) -> None:
    paths = [assembler.path for assembler in assemblers.values()]
    places = ["path/ptxas", "home/bin/ptxas", "site/nvidia/cuda_nvcc/bin/ptxas", "site/nvidia/cu13/bin/ptxas"]
    for place, original in zip(places, paths, strict=True):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(original)
    wrapper = script(tmp_path / "wrapped" / "ptxas", f'exec {paths[0]} "$@"')
    env = {"PATH": f"{tmp_path}/path:{wrapper.parent}:{tmp_path}/nothing:", "CUDA_HOME": f"{tmp_path}/home"}
    found, faults = find(env, [tmp_path / "site", tmp_path / "nowhere"])
    assert faults == []
    assert [assembler.label for assembler in found] == list(assemblers)
    assert [assembler.path for assembler in found] == [tmp_path / place for place in places]
    assert [assembler.origin for assembler in found] == ["PATH", "CUDA_HOME", "packages", "packages"]
    assert [assembler.isa for assembler in found] == [assembler.isa for assembler in assemblers.values()]
    assert find({}, [])[0] == []
    assert [one.origin for one in find({"CUDA_PATH": f"{tmp_path}/home"}, [], named=paths[:1])[0]] == [
        "--ptxas",
        "CUDA_PATH",
    ]
    for named in (tmp_path / "home", tmp_path / "home" / "bin"):
        assert find({}, [], named=[named])[0][0].path == tmp_path / "home" / "bin" / "ptxas"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exit 1", r"is no ptxas: --version says ''"),
        ("echo Cuda compilation tools, release 13.0, V13.0.88", r"is no ptxas: --version says 'Cuda compilation tools"),
        ("echo ptxas, release 13.0, V13.0.88", r"\(CUDA 13.0\) does not say which PTX ISA it reads"),
        (
            "[ $1 = --version ] && echo ptxas, release 13.0, V13.0.88 && exit; exit 3",
            "ended with status 3 for its own",
        ),
    ],
)
def test_what_calls_itself_ptxas_and_is_none(text: str, words: str, tmp_path: Path) -> None:
    path = script(tmp_path / "ptxas", text)
    with pytest.raises(AssemblerError, match=words):
        find({}, [], named=[path])
    found, faults = find({"PATH": str(tmp_path)}, [])
    assert found == []
    assert len(faults) == 1
    assert re.search(words, faults[0])


def test_a_ptxas_of_another_name(tmp_path: Path, assemblers: dict[str, Assembler]) -> None:
    """Its complaints begin with that name; triton brings one that is called ptxas-blackwell."""
    known = list(assemblers.values())[-1]
    other = tmp_path / "ptxas-blackwell"
    other.symlink_to(known.path)
    assert (examine(other, "packages").version, examine(other, "packages").isa) == (known.version, known.isa)


def test_a_named_ptxas_must_be_there_and_run(tmp_path: Path) -> None:
    with pytest.raises(AssemblerError, match=r"^--ptxas: there is no .*/nothing$"):
        find({}, [], named=[tmp_path / "nothing"])
    (tmp_path / "ptxas.txt").write_text("text")
    with pytest.raises(AssemblerError, match="cannot be run: Permission denied"):
        examine(tmp_path / "ptxas.txt", "--ptxas")


# ---- the matrix ------------------------------------------------------------------------------------------------------


def test_json_and_back(live: Matrix) -> None:
    assert matrix.from_json(json.loads(json.dumps(matrix.to_json(live)))) == live


def test_toolkits_by_the_beginning_of_their_version(live: Matrix) -> None:
    versions = [toolkit.version for toolkit in live.toolkits]
    for text, place in (("12.9", 1), ("12", 1), ("13.0", 2), ("13", 3), (versions[0], 0)):
        toolkit = live.toolkit(text)
        assert toolkit is not None
        assert toolkit.version == versions[place]
    assert live.toolkit("1") is None
    assert live.toolkit("13.00") is None


def test_rows_of_toolkits_that_differ_are_apart(live: Matrix) -> None:
    young = next(variant for variant in live.variants if variant.isa > (9, 0))
    releases = [toolkit.cuda for toolkit in live.toolkits]
    found = list(matrix.rows(live, [young, live.variants[0]]))
    assert (
        [row.label(live) for row in found]
        == [
            f"{young.name} (CUDA {', '.join(releases[:-1])})",  # which cannot read it
            f"{young.name} (CUDA {releases[-1]})",
            f"{live.variants[0].name} (CUDA 12.8)",  # which has fewer targets
            f"{live.variants[0].name} (CUDA {', '.join(releases[1:])})",
        ]
    )
    assert {verdict.status for verdict in found[0].verdicts} == {Status.NOT_APPLICABLE}
    assert all(verdict.accepted for verdict in found[3].verdicts)


def test_what_is_refused_by_all_says_why(live: Matrix) -> None:
    (refused,) = (variant.name for variant in live.variants if variant.nowhere)
    assert refused == "mma.sync.aligned.kind::mxf8f6f4.m16n8k32.row.col.f32.e4m3.e2m1.f32"
    for page in (matrix.text(live), matrix.markdown(live)):
        assert "refused: this kind is always scaled; the unscaled form of the same types is kind::f8f6f4." in page


def test_differences_of_targets(live: Matrix) -> None:
    found = matrix.diff_targets(live, "sm_120a", "sm_120f")
    assert {each.variant.name for each in found if each.where != "CUDA 12.8"} == {
        variant.name for variant in live.variants if ".sp" in variant.name and "kind::mxf4" in variant.name
    }
    text = matrix.diff_text("sm_120a", "sm_120f", found)
    assert "  sm_120f: refused: Instruction 'Sparse mma with block scale' not supported" in text
    assert matrix.diff_text("a", "b", []) == "a and b: no difference"


def test_differences_of_toolkits(live: Matrix) -> None:
    twelve, *_, last = live.toolkits[1:]
    found = matrix.diff_toolkits(live, twelve, last)
    assert found
    assert all(each.first.status is Status.NOT_APPLICABLE and each.variant.isa > twelve.isa for each in found)


# ---- the kernel ------------------------------------------------------------------------------------------------------


def test_an_instruction_is_plain_only_with_plain_modifiers() -> None:
    for (
        name
    ) in "add.s32 cvt.rn.f32.s32 ld.global.v4.u32 st.shared.b32 fma.rn.ftz.f32 mov.b64 bra.uni setp.lt.and.s32".split():
        assert kernel_ptx.is_plain(name), name
    for name in (
        "add.rn.f32x2 cvt.rn.f16x2.e4m3x2 ld.global.L2::cache_hint.b32 ld.global.v8.b32 mma.sync shfl.sync.idx.b32 "
        "ld.shared::cluster.b32 griddepcontrol.wait min.xorsign.abs.f32"
    ).split():
        assert not kernel_ptx.is_plain(name), name


def test_instructions_are_read_from_ptx() -> None:
    ptx = """
.version 9.0
.extern .shared .align 1024 .b8 _ZN4smemE[];
.visible .entry _Z1k(
	.param .align 8 .b8 _Z1k_param_0[40]
)
.maxntid 384
{
	.reg .pred 	%p<3>;
	.reg .b16 	%rs<5>;
	.reg .b32 	%f<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	mov.u32 	%r1, %laneid; // stmatrix.sync in a comment
	@%p2 bra 	$L__BB0_2;
	{ .reg .pred P1; LAB_WAIT: mbarrier.try_wait.parity.shared::cta.b64 P1, [%r5+8], %r6; @P1 bra DONE; DONE: }
$L__BB0_2:
	@!%p1 griddepcontrol.wait;
	ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r8+16];
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %f1, %f2 },{ %r3,%r4 }, {%f1,%f2};
	st.async.b32 [_ZN4smemE+8], _, %rd7, 0x1F;
	ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];
	ret;
}
"""
    assert list(kernel_ptx.instructions(ptx).values()) == [
        "mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r0+8], %r1;",
        "griddepcontrol.wait;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r1+16];",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r0, %r1}, {%r2, %r3}, {%r0, %r1};",
        "st.async.b32 [smem+8], _, %d0, 0x1F;",
    ]


def test_what_nvcc_makes_of_tiles_is_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native and swapped tiles, with and without a producer warpgroup; kernel_ptx --check compiles them all."""
    monkeypatch.setenv("MXFP4_MOE_TOOLCHAIN", "pypi")  # the nvcc that the wheel is built with
    chosen = [model.Tile.from_mn(mn) for mn in ((128, 128), (64, 8), (16, 64))]
    for path, found in kernel_ptx.collect(dict.fromkeys(chosen, model.PAIRS)).items():
        listed = {variant.name for variant in kernel.load()[path].instructions}
        missing = [statement for name, statement in found.items() if name not in listed]
        assert not missing, f"{kernel_ptx.TABLE}, {path}: run {kernel_ptx.COMMAND}, it lacks {missing}"


def test_the_paths_multiply_as_the_kernel_does() -> None:
    paths = kernel.load()
    assert set(paths) == set(kernel_ptx.PATHS)
    multiplying = {
        name: [one.name for one in path.instructions if one.name.startswith("mma.")] for name, path in paths.items()
    }
    assert multiplying["SM90"] == [
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" for kind in ("bf16", "f16")
    ]
    assert any(re.fullmatch(r"wgmma\.mma_async\S*\.f32\.bf16\.bf16", one.name) for one in paths["SM90"].instructions)
    scaled = [name for name in multiplying["SM12x"] if "kind::mxf8f6f4.block_scale" in name]
    assert len(scaled) == 2
    packed = [name for name in multiplying["SM12x"] if ".m16n8k64." in name]
    assert sorted(re.findall(r"kind::\w+", " ".join(packed))) == ["kind::mxf4", "kind::mxf4nvf4"]
    others = [name for name in multiplying["SM12x"] if name not in (*scaled, *packed)]
    assert others == multiplying["SM90"], "of bf16 activations"
    assert kernel.path_for("sm_90a").name == "SM90"
    assert {kernel.path_for(target).name for target in TARGETS if target != "sm_90a"} == {"SM12x"}


def test_the_first_instruction_that_a_target_lacks_is_named(newest: Assembler) -> None:
    verdicts = {found.target: found for found in kernel.judge([newest], ["sm_120", "sm_120f", "sm_90a", "sm_57"])}
    scaled = next(one.name for one in kernel.load()["SM12x"].instructions if "block_scale" in one.name)
    assert verdicts["sm_120"].status is Status.REFUSED
    assert verdicts["sm_120"].first == scaled
    assert verdicts["sm_120"].sentence == (
        f"no: {scaled}, of the SM12x path: Instruction 'mma with block scale' not supported on .target 'sm_120'"
    )
    count = len(kernel.load()["SM12x"].instructions)
    assert verdicts["sm_120f"].sentence == f"yes: all {count} instructions of the SM12x path assemble"
    assert verdicts["sm_90a"].status is Status.ACCEPTED
    assert verdicts["sm_57"].sentence.startswith(f"not applicable: CUDA {newest.cuda} has no sm_57: ")
