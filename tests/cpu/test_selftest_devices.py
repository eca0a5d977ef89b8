"""The self-test's questions, asked by the real worker of pretended tiles that compute under one rule or another.

A tile is pretended by what its GEMM and its layer give on the CPU; everything else is the code that runs on a GPU:
processes, problems, expected values, bounds, the search for a rule, the majority. GPU: tests/gpu/test_selftest.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import fake_wheel
import pytest
import torch

from mxfp4_moe import accuracy, arithmetic, cli, formats, problems, reference
from mxfp4_moe._health import remembered, selftest
from mxfp4_moe._health.selftest import Report, Status, checks
from mxfp4_moe._install import blocklist
from mxfp4_moe.arithmetic import SM12X_MXF8F6F4, SM90_BF16
from mxfp4_moe.tiles import Tile

TILES = [Tile.from_mn((m, 128)) for m in (8, 32, 64, 128)]
FIRST, LAST = TILES[0].name, TILES[-1].name
DEVICE, CAPABILITY = "NVIDIA GeForce RTX 5090", (12, 0)
CPU = torch.device("cpu")
REPORTS: dict[str, Report] = {}

# Tiles by name do what the first argument says, "" all others.
WORKER = """
import json, sys
import torch
from dataclasses import replace
from mxfp4_moe import arithmetic, formats, problems, reference
from mxfp4_moe._install import loading
from mxfp4_moe._health import selftest
from mxfp4_moe.arithmetic import SM12X_MXF8F6F4, SM90_BF16
from mxfp4_moe._health.selftest import checks

torch.set_num_threads(1)
behaviour = json.loads(sys.argv[1])
RULES = {
    "published": SM12X_MXF8F6F4,
    "24 bits": replace(SM12X_MXF8F6F4, bits=24),
    "nearest": replace(SM12X_MXF8F6F4, rounding="nearest"),
    "outside": next(rule for rule in arithmetic.family(SM12X_MXF8F6F4) if rule.words().endswith("outside, nearest")),
    "bf16 steps": SM90_BF16,
}
cache = {}


def gemm(problem, act):
    if act in RULES:
        return reference.grouped_gemm(*problem.operands, arithmetic=RULES[act])
    codes, row_scales, packed, scales, offsets = problem.operands
    if act == "swapped fragment":  # k 8..11 and 12..15 of every block
        swapped = packed.unflatten(-1, (-1, 16))
        swapped = swapped[..., [0, 1, 2, 3, 6, 7, 4, 5, *range(8, 16)]].flatten(-2).contiguous()
        return reference.grouped_gemm(codes, row_scales, swapped, scales, offsets, arithmetic=SM12X_MXF8F6F4)
    if act == "sums at bf16":
        out = torch.zeros_like(problem.expected)
        nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        for e, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
            rows = slice(begin, end)
            for i in range(codes.shape[1] // 32):
                block = slice(32 * i, 32 * i + 32)
                operands = codes[rows, block], nibbles[e][:, block], row_scales[rows, i], scales[e][:, i]
                out[rows] = arithmetic.block_scaled_mma(*operands, out[rows], a_format="e4m3", b_format="e2m1")
                out[rows] = out[rows].bfloat16().float()
        return out
    if act == "two rules":
        out = gemm(problem, "published")
        out[::2] = gemm(problem, "24 bits")[::2]
        return out
    if act == "a lost row":  # of an expert, and one that was not asked for
        out = gemm(problem, "published")
        out[3] = float("nan")
        return out
    return gemm(problem, "published")


def run(problem, tile, dtype=torch.float32):
    act = behaviour.get(tile.name, behaviour[""])
    key = id(problem), act
    if key not in cache:
        cache[key] = gemm(problem, act)
    out = torch.full_like(problem.expected, float("nan"), dtype=dtype)
    rows = problem.valid + (act == "a row too many")
    out[:rows] = cache[key][:rows].to(dtype)
    if act == "cut halves" and dtype is torch.bfloat16:
        out[:rows] = (cache[key][:rows].view(torch.int32) & -65536).view(torch.float32).bfloat16()
    return out


def layer(hidden_states, topk_weights, topk_ids, weights, *, tile_mn, output):
    act = next((act for name, act in behaviour.items() if name and tile_of(name).mn == tile_mn), behaviour[""])
    rule = RULES.get(act, SM12X_MXF8F6F4)
    output.copy_(reference.fused_moe(hidden_states, topk_weights, topk_ids, weights, arithmetic=rule))
    if act == "a layer's last bit":
        output.view(torch.int16)[:, 0] ^= 1
    if act == "batches differ" and len(output) > 1:
        output.view(torch.int16)[-1, 5] ^= 1
        output.view(torch.int16)[0, 5] ^= 1
    if act == "layers of zeros":
        output.zero_()


def tile_of(name):
    return next(tile for tile in selftest.worker.load_manifest().tiles if tile.name == name)


problems.GemmProblem.run = run
checks.fused_moe = layer
loading.load_tile = lambda tile: None
checks.RANDOM = ((32, 16, False), (160, 48, True), (640, 16, False))
checks.SPARSE, checks.INTEGERS = ((96, 80),), ((640, 32),)


def prepare(device):
    published = arithmetic.of_arch("120f")
    facts = {"name": "NVIDIA GeForce RTX 5090", "capability": [12, 0], "multiprocessors": 170, "arch": "120f"}
    facts |= {"driver": "580.82.07", "driver_cuda": "13.0", "torch": "2.13.0", "torch_cuda": "13.0", "python": "3.12.1"}
    facts |= {"arithmetic": f"{published.name} ({published.words()})"}
    return facts, checks.tile_runner(torch.device("cpu"), published)


sys.exit(selftest.main(sys.argv[2:], prepare))
"""


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Runs the self-test: what all tiles do, then exceptions by name."""
    fake_wheel.install(tmp_path, monkeypatch, TILES)
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def run(all_tiles: str, **others: str) -> Report:
        behaviour = json.dumps({"": all_tiles, **others})
        if behaviour not in REPORTS:
            REPORTS[behaviour] = selftest.run(TILES, [sys.executable, str(script), behaviour], progress=lambda _: None)
        report = REPORTS[behaviour]
        assert not report.fault
        assert len(report.results) == len(TILES)
        return report

    return run


def failures(report: Report) -> dict[str, str]:
    return {result.tile.name: result.reason for result in report.having(Status.FAILED)}


def wrong(report: Report, name: str) -> list[str]:
    """The questions that a tile got wrong."""
    (result,) = (result for result in report.results if result.tile.name == name)
    return [question for question, why in result.answers.items() if why]


def test_the_published_rule_passes(device: Callable[..., Report]) -> None:
    report = device("published")
    assert report.passed
    assert report.arithmetic() == ""
    for result in report.results:
        assert result.answers == {"layout": "", "accuracy": "", "agreement": ""}
        assert (result.arithmetic.differ, result.arithmetic.rules) == (0, ())
        assert result.arithmetic.values == 662 * (16 + 48 + 16)
        assert result.checks == 2 * 3 + 2 + 3 * (2 + 2 * 2) + 3 + 2 * 4 + 3  # the last: of arithmetic
    assert len({json.dumps(dict(result.digests)) for result in report.results}) == 1
    text = report.text()
    assert "sums     as published: SM12x mxf8f6f4 (32 products and the accumulator, 25 bits, cut)" in text
    assert "answers  of 4 tiles that ran, right in layout 4, accuracy 4, agreement 4" in text
    assert selftest.record(report) is None


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("24 bits", "32 products and the accumulator, 24 bits, cut"),
        ("nearest", "32 products and the accumulator, 25 bits, nearest"),
        ("outside", "32 products exactly, accumulator outside, nearest"),
        ("bf16 steps", "16 bfloat16 products and the accumulator, 25 bits, cut"),
    ],
)
def test_another_rule_passes_and_is_named(rule: str, words: str, device: Callable[..., Report]) -> None:
    report = device(rule)
    assert report.passed, failures(report)
    assert report.explained
    assert all(result.arithmetic.rules == (words,) for result in report.results)
    line = report.arithmetic()
    assert "\n" not in line
    for part in (
        "mxfp4-moe 0.1.0+cu130, NVIDIA GeForce RTX 5090 (12.0), driver 580.82.07, sm_120f: ",
        f"4 of 4 tiles compute {words}; ",
        "published is SM12x mxf8f6f4 (32 products and the accumulator, 25 bits, cut)",
    ):
        assert part in line
    assert line in report.text()
    assert selftest.record(report) is None, "nothing is blocked"
    memory = remembered.read(DEVICE, CAPABILITY)
    assert memory is not None
    assert (memory.passed, memory.tiles, memory.arithmetic, memory.explained) == (4, 4, line, True)


def test_a_rule_that_nobody_knows_passes_and_says_so(device: Callable[..., Report]) -> None:
    report = device("two rules")
    assert report.passed
    assert not report.explained
    assert "4 of 4 tiles compute by no rule that is known" in report.arithmetic()


def test_one_tile_with_other_last_bits_is_blocked(device: Callable[..., Report]) -> None:
    report = device("published", **{LAST: "24 bits"})
    assert list(failures(report)) == [LAST]
    assert wrong(report, LAST) == ["agreement"]
    assert failures(report)[LAST].startswith("agreement: GEMM, K=160, N=48 has other bits than from 3 other tiles")
    assert report.arithmetic() == "", "of the tiles that passed"
    path = selftest.record(report)
    assert path is not None
    assert blocklist.read(DEVICE, CAPABILITY) == failures(report)


def test_the_majority_is_believed_whatever_it_computes(device: Callable[..., Report]) -> None:
    report = device("24 bits", **{FIRST: "published"})
    assert list(failures(report)) == [FIRST]
    assert wrong(report, FIRST) == ["agreement"]
    assert "3 of 4 tiles compute 32 products and the accumulator, 24 bits, cut" in report.arithmetic()


def test_two_against_two_the_published_rule_is_believed(device: Callable[..., Report]) -> None:
    report = device("24 bits", **{TILES[2].name: "published", LAST: "published"})
    assert list(failures(report)) == [TILES[0].name, TILES[1].name]


@pytest.mark.parametrize(
    ("act", "reason", "questions"),
    [
        ("swapped fragment", "layout: GEMM, one-hot rows, float32: ", ["layout", "accuracy"]),
        ("a lost row", "layout: GEMM, one-hot rows, float32: 144 of ", ["layout", "accuracy"]),
        ("a row too many", "layout: GEMM, one-hot rows, float32: 144 of ", ["layout"]),
        ("sums at bf16", "accuracy: GEMM, integers, K=640, N=32: ", ["accuracy"]),
        ("cut halves", "agreement: GEMM, K=32, N=16, bfloat16 against its float32 output rounded: ", ["agreement"]),
        ("a layer's last bit", "agreement: the layers' output has other bits than from 3 other", ["agreement"]),
        ("batches differ", "agreement: layer of 33 tokens: token 0 alone has other bits", ["agreement"]),
        ("layers of zeros", "accuracy: layer of 1 tokens: relative error 1.0e+00", ["accuracy"]),
    ],
)
def test_a_sick_tile_is_blocked(act: str, reason: str, questions: list[str], device: Callable[..., Report]) -> None:
    report = device("published", **{TILES[1].name: act})
    assert list(failures(report)) == [TILES[1].name]
    assert failures(report)[TILES[1].name].startswith(reason)
    assert wrong(report, TILES[1].name) == questions
    assert selftest.record(report) is not None


def test_a_device_whose_sums_are_too_coarse_is_blocked_as_a_whole(device: Callable[..., Report]) -> None:
    report = device("sums at bf16")
    assert len(failures(report)) == 4
    assert all(reason.startswith("accuracy: ") for reason in failures(report).values())
    assert not report.arithmetic()


# ---- the doctor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("all_tiles", "status", "level"), [("published", 0, None), ("24 bits", 0, "ok"), ("two rules", 1, "warning")]
)
def test_the_exit_status_says_whether_it_is_a_note(
    all_tiles: str,
    status: int,
    level: str | None,
    device: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = device(all_tiles)
    monkeypatch.setattr("mxfp4_moe.cli.doctor.gather", lambda verify: SimpleNamespace(driver=None))
    monkeypatch.setattr("mxfp4_moe.cli.doctor.examine", lambda env: [])
    monkeypatch.setattr(selftest, "run", lambda *_, **__: report)
    assert cli.main(["doctor", "--selftest", "--json"]) == status
    data = json.loads(capsys.readouterr().out)
    found = {finding["subject"]: finding for finding in data["findings"]}
    assert found["self-test"]["level"] == "ok"
    assert found.get("arithmetic", {}).get("level") == level
    if level:
        assert found["arithmetic"]["text"] == report.arithmetic() == data["selftest"]["arithmetic"]
        assert "open an issue with this line" in found["arithmetic"]["next_step"]
    else:
        assert found["self-test"]["text"] == "all 4 tiles passed, with sums as published"


# ---- the problems ----------------------------------------------------------------------------------------------------


EXACT = [
    problems.layout_problem(CPU),
    *(problems.sparse_problem(k, n, CPU) for k, n in ((32, 16), (96, 80), (2880, 16))),
    *(problems.integer_problem(k, n, CPU) for k, n in ((32, 16), (640, 32), (2880, 16))),
]


@pytest.mark.parametrize("given", EXACT, ids=lambda given: f"{given.rows.shape[1]}, {given.packed.shape[1]}")
def test_exact_problems_are_exact_under_every_rule(given: problems.GemmProblem) -> None:
    for rule in arithmetic.family(SM12X_MXF8F6F4):
        if given.rows.shape[1] == 2880 and rule.bits not in (20, 25, None):
            continue  # the long ones under the coarsest and the named rules
        out = reference.grouped_gemm(*given.operands, arithmetic=rule)
        out[given.valid :] = float("nan")
        assert given.mismatch(out) == "", rule.words()
        out[3, 5] += 1
        assert given.mismatch(out).startswith("1 of ")


def test_layout_problems_are_exact_at_eight_bits() -> None:
    """Then no arithmetic can be taken for a layout fault, nor hide one."""
    for given in EXACT[:4]:
        magnitudes = dataclasses.replace(
            given,
            rows=given.rows & 0x7F,
            packed=given.packed & 0x77,
        )
        sums = reference.grouped_gemm(*magnitudes.operands)
        assert torch.equal(given.expected.bfloat16().float(), given.expected)
        hot = (given.rows & 0x7F).count_nonzero(1)
        if int(hot.max()) > 1:
            assert float(sums.max()) <= 128, "all are multiples of a half"


def test_sparse_rows_reach_every_k() -> None:
    for k, n in checks.SPARSE:
        codes = problems.sparse_problem(k, n, CPU).rows
        assert bool((codes != 0).any(0).all())


def test_the_problems_have_tails_of_every_kind() -> None:
    assert 0 in problems.ROWS_PER_EXPERT
    shapes = [*checks.SPARSE, *checks.INTEGERS, *((k, n) for k, n, _ in checks.RANDOM)]
    assert all(k % 32 == 0 and n % 16 == 0 for k, n in shapes)
    assert any(k % 128 for k, _ in shapes)
    assert any(n % 128 for _, n in shapes)
    assert max(shapes)[0] == 2880
    assert any(wide for _, _, wide in checks.RANDOM)


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n", "wide"), [(96, 80, False), (160, 48, True), (640, 32, False), (2880, 16, False)])
def test_no_rule_goes_beyond_its_bound_and_some_come_near(k: int, n: int, wide: bool) -> None:
    given = problems.random_problem(k, n, CPU, wide_scales=wide)
    rows = slice(given.valid)
    for rule in (SM12X_MXF8F6F4, SM90_BF16, *arithmetic.family(SM12X_MXF8F6F4)[2::4]):
        sums, bound = accuracy.sums_and_bound(*given.operands, arithmetic=rule)
        out = reference.grouped_gemm(*given.operands, arithmetic=rule)[rows]
        share = (out.double() - sums[rows]).abs() / bound[rows].clamp(min=1e-300)
        assert float(share.max()) <= 1
        assert float(share.max()) >= 0.15, f"{rule.words()}: no use"


def test_the_coarsest_rules_bound_the_family() -> None:
    given = problems.random_problem(640, 32, CPU)
    random = checks.RandomSums.make(given, SM12X_MXF8F6F4)
    for rule in arithmetic.family(SM12X_MXF8F6F4):
        assert random.too_far(reference.grouped_gemm(*given.operands, arithmetic=rule)) == "", rule.words()
    for bits in (19, 16, 13):
        rule = dataclasses.replace(SM12X_MXF8F6F4, bits=bits)
        assert "beyond the bound" in random.too_far(reference.grouped_gemm(*given.operands, arithmetic=rule))
    for bad in (float("nan"), float("inf")):
        out = given.expected.clone()
        out[5, 7] = bad
        assert random.too_far(out).startswith("beyond the bound of the exact sum, 1 of ")


def test_infinity_is_right_where_float32_ends() -> None:
    given = problems.random_problem(32, 16, CPU)
    random = checks.RandomSums.make(given, SM12X_MXF8F6F4)
    for exact, out, is_right in (
        (9e38, float("inf"), True),
        (-9e38, -float("inf"), True),
        (9e38, -float("inf"), False),
        (9e38, float("nan"), False),
        (9e38, 3.4e38, False),
        (3e38, float("inf"), False),
    ):
        sums, found = random.sums.clone(), given.expected.clone()
        sums[5, 7], found[5, 7] = exact, out
        beyond = dataclasses.replace(random, sums=sums).too_far(found)
        assert (beyond == "") is is_right, (exact, out, beyond)


def test_exact_sums_are_exact() -> None:
    given = problems.random_problem(96, 16, CPU)
    sums, _ = accuracy.sums_and_bound(*given.operands, arithmetic=SM12X_MXF8F6F4)
    a_scale, b_scale = formats.decode_e8m0(given.row_scales).double(), formats.decode_e8m0(given.scales).double()
    a = formats.decode_e4m3(given.rows) * a_scale.repeat_interleave(32, 1)
    b = formats.decode_e2m1(given.packed) * b_scale.repeat_interleave(32, 2)
    for e, (begin, end) in enumerate(pairwise(given.offsets.tolist())):
        expected = a[begin:end] @ b[e].T
        size = a[begin:end].abs() @ b[e].abs().T
        assert bool(((sums[begin:end] - expected).abs() <= 1e-14 * size).all())


@pytest.mark.parametrize("rule", [SM12X_MXF8F6F4, SM90_BF16], ids=lambda rule: rule.name)
def test_a_tile_is_given_rows_as_it_reads_them(monkeypatch: pytest.MonkeyPatch, rule: arithmetic.Arithmetic) -> None:
    """MXFP8 with even k first and its scales; or bfloat16 in plain order, without any."""
    given = problems.random_problem(96, 80, CPU, arithmetic=rule)
    calls: list[tuple[torch.Tensor | None, ...]] = []
    monkeypatch.setattr(problems, "arithmetic_here", lambda device: rule)
    monkeypatch.setattr(problems.loading, "load_tile", lambda tile: lambda *arguments: calls.append(arguments))
    out = given.run(TILES[1], torch.float16)
    ((act, act_scale, weight, m_tiles, num_m_tiles, written),) = calls
    assert written is out
    assert out.dtype is torch.float16
    assert out.isnan().all()
    assert weight is given.weight
    assert len(m_tiles) > num_m_tiles.item() > 0
    if rule is SM12X_MXF8F6F4:
        assert torch.equal(act, formats.interleave_k(given.rows))
        assert torch.equal(act_scale, formats.pack_row_scales(given.row_scales))
    else:
        assert torch.equal(act, formats.mxfp8_to_bf16(given.rows, given.row_scales))
        assert act_scale is None
        own = problems.GemmProblem.with_oracle(act, None, *given.operands[2:], SM90_BF16)
        own.run(TILES[1])
        assert calls[1][0] is act, "bfloat16 rows as they are"
        assert calls[1][1] is None
        assert torch.equal(problems.bits(own.expected), problems.bits(given.expected))
