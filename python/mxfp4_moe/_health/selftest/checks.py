"""What a tile is asked: problems with what must come out of them, made once, and the answers of one tile.

The GEMMs have tails in K and N, fewer and more pipeline steps than stages, and rows with tails of every kind and
experts without rows (problems.ROWS_PER_EXPERT).
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ... import accuracy, arithmetic, pair_problems, problems, reference
from ..._call.fused_moe import fused_moe
from ..._call.launch import layer_operator_for
from ..._install import loading
from ..._install.troubles import words
from ...formats import WeightFormat
from ...pair_problems import PairProblem
from ...problems import Call, GemmProblem, bits
from ...tiles import MXFP4_BF16, MXFP4_MXFP8, Tile
from ...weights import MoEWeights
from .outcome import NotRunError, Outcome, RunTile
from .report import BLOCKING, Arithmetic

SPARSE = ((96, 80), (2880, 512))  # (K, N): every k and every column of weights
INTEGERS = ((2880, 272),)
RANDOM = ((32, 16, False), (96, 80, False), (160, 144, True), (640, 272, False), (2880, 512, False))  # wide scales?
LAYERS = ((1, 2), (33, 3), (200, 4))  # tokens, top_k
LAYER_SIZE = (8, 160, 96)  # experts, hidden size, intermediate size
LAYER_TOLERANCE = 5e-3  # both sides quantize the same values twice; what is left is the last bits of exp and of sums
FP4_LAYER_TOLERANCE = 2e-2  # there the last bits of exp, where they matter at all, make another of eight magnitudes
FP4 = ("mxfp4", "nvfp4")
_ALONE = 4  # tokens of a layer that are also run alone
_HALVES = (torch.bfloat16, torch.float16)
_ROUNDED_TO_INFINITY = 2.0**128 - 2.0**103  # from here on, in float32


class Answers:
    """One tile's, by question: the first thing that is wrong."""

    def __init__(self) -> None:
        self.wrong = dict.fromkeys(BLOCKING, "")
        self.checks = 0
        self.what = ""  # before each place, in words

    def note(self, question: str, where: str, wrong: str) -> None:
        """One comparison; `wrong` is empty when it came out right."""
        self.checks += 1
        if wrong and not self.wrong[question]:
            self.wrong[question] = f"{self.what}{where}: {wrong}"


@dataclass(frozen=True, kw_only=True)
class RandomSums:
    """A problem of random bits, its exact sums, and how far from them any plausible arithmetic can be."""

    problem: GemmProblem  # expects the published rule's bits
    sums: Tensor  # float64 [R, N]
    bound: Tensor  # float64 [R, N]

    @classmethod
    def make(cls, problem: GemmProblem, published: arithmetic.Arithmetic) -> RandomSums:
        rules = accuracy.coarsest(published)
        pair, given = MXFP4_MXFP8, None
        if isinstance(problem, PairProblem):
            pair, given = problem.pair, problem.column_factors()
        options: dict[str, Any] = {"pair": pair, "weight_factors": given}
        both = [accuracy.sums_and_bound(*problem.operands, arithmetic=rule, **options) for rule in rules]
        sums, bound = both[0][0], torch.stack([bound for _, bound in both]).amax(0)
        factors = problem.factors() if isinstance(problem, PairProblem) else None
        if factors is not None:  # one more rounding of the product with the sum
            sums, bound = sums * factors, bound * factors
            bound = bound + 2.0**-23 * (sums.abs() + bound) + 2.0**-149
        return cls(problem=problem, sums=sums, bound=bound)

    def too_far(self, out: Tensor) -> str:
        rows = slice(self.problem.valid)
        given, sums, bound = out[rows].double(), self.sums[rows], self.bound[rows]
        outside = ~((given - sums).abs() <= bound)  # NaN is outside too
        # Of what may be beyond float32's numbers, infinity is the nearest.
        outside &= ~(given.isinf() & (given.sign() == sums.sign()) & (sums.abs() + bound >= _ROUNDED_TO_INFINITY))
        found = problems.places(outside, sums, out[rows])
        return found and f"beyond the bound of the exact sum, {found}"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Which rules give what a tile gave. Asked once for all tiles that gave the same."""

    published: arithmetic.Arithmetic
    randoms: Mapping[str, RandomSums]
    known: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    columns: int = 32  # looked at first

    def explain(self, outs: Mapping[str, Tensor], digests: Mapping[str, str]) -> tuple[str, ...]:
        """In words, the rules of the family under which every output comes out bit by bit."""
        key = tuple(digests[name] for name in outs)
        if key not in self.known:
            rules: Sequence[arithmetic.Arithmetic] = arithmetic.family(self.published)
            for columns in (self.columns, None):
                for name, out in outs.items():
                    rules = [rule for rule in rules if self._gives(rule, self.randoms[name].problem, out, columns)]
            self.known[key] = tuple(rule.words() for rule in rules)
        return self.known[key]

    def _gives(self, rule: arithmetic.Arithmetic, problem: GemmProblem, out: Tensor, columns: int | None) -> bool:
        others = problem.row_scales is None or isinstance(problem, PairProblem)
        if others and rule.operands != self.published.operands:
            return False  # a rule of the family that cannot be this MMA's
        given, rows = problem.sums(rule, columns), slice(problem.valid)
        return torch.equal(bits(given[rows]), bits(out[rows, :columns].contiguous()))


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Layer calls of several sizes, and what the reference makes of them."""

    weights: MoEWeights
    calls: Sequence[Call]
    expected: Sequence[Tensor]
    options: Mapping[str, Any]  # of the calls

    @classmethod
    def make(cls, device: torch.device, rule: arithmetic.Arithmetic, pair: str) -> tuple[Layers, ...]:
        """One; of NVFP4 rows two, whose scales the checkpoint has, or each row."""
        kind, activation_format = pair.split("_")
        if kind == "mxfp4":
            each = [problems.random_weights(*LAYER_SIZE, device)]
        else:
            ways = (True, False) if activation_format == "nvfp4" else (False,)
            each = [pair_problems.random_nvfp4_weights(*LAYER_SIZE, device, inputs=inputs) for inputs in ways]
        return tuple(cls._of(device, rule, activation_format, weights) for weights in each)

    @classmethod
    def _of(
        cls, device: torch.device, rule: arithmetic.Arithmetic, activation_format: str, weights: MoEWeights
    ) -> Layers:
        options: dict[str, Any] = {} if activation_format == "mxfp8" else {"activation_format": activation_format}
        dtype = torch.float16 if activation_format == "fp16" else torch.bfloat16
        calls = [problems.random_call(tokens, top_k, weights, dtype=dtype) for tokens, top_k in LAYERS]
        calls[1].topk_ids[::5, 1] = -1  # slots of no expert
        expected = [reference.fused_moe(*call.args(), weights, arithmetic=rule, **options) for call in calls]
        return cls(
            weights=weights.to(device, activation_format) if options else weights,
            calls=calls,
            expected=expected,
            options=options,
        )

    def ask(self, tile: Tile, answers: Answers) -> str:
        """The outputs' digest."""
        digest = hashlib.sha256()
        for call, wanted in zip(self.calls, self.expected, strict=True):
            output = self._run(tile, call)
            where = f"layer of {len(output)} tokens"
            off = problems.relative_error(output, wanted)
            wrong = "" if off <= self.tolerance else f"relative error {off:.1e}"  # NaN is off too
            answers.note("accuracy", where, wrong)
            digest.update(raw(output))
            for t in range(0, len(output), -(-len(output) // _ALONE)) if len(output) > 1 else ():
                same = torch.equal(bits(self._run(tile, call.token(t))[0]), bits(output[t]))
                answers.note("agreement", where, "" if same else f"token {t} alone has other bits")
        return digest.hexdigest()

    @property
    def tolerance(self) -> float:
        return FP4_LAYER_TOLERANCE if self.options.get("activation_format") in FP4 else LAYER_TOLERANCE

    def _run(self, tile: Tile, call: Call) -> Tensor:
        output = torch.full_like(call.hidden_states, float("nan"))
        fused_moe(*call.args(), self.weights, tile_mn=tile.mn, output=output, **self.options)
        return output


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What a tile's kernel for a pair of formats is asked: problems and what must come out of them."""

    pair: str
    published: arithmetic.Arithmetic
    exact: Mapping[str, GemmProblem]
    integers: Mapping[str, GemmProblem]
    randoms: Mapping[str, RandomSums]
    family: Family
    layers: tuple[Layers, ...]

    @classmethod
    def make(cls, device: torch.device, published: arithmetic.Arithmetic, pair: str) -> Questions:
        made = _problems if pair in (MXFP4_MXFP8, MXFP4_BF16) else _pair_problems
        exact, integers, random = made(device, published, pair)
        randoms = {name: RandomSums.make(problem, published) for name, problem in random.items()}
        return cls(
            pair=pair,
            published=published,
            exact=exact,
            integers=integers,
            randoms=randoms,
            family=Family(published=published, randoms=randoms),
            layers=Layers.make(device, published, pair),
        )

    @property
    def what(self) -> str:
        """Before each place, in words; nothing of what every wheel has."""
        return {MXFP4_MXFP8: "", MXFP4_BF16: "bf16 activations, "}.get(self.pair, f"{self.pair}, ")

    def ask(self, tile: Tile, device: torch.device, answers: Answers) -> tuple[dict[str, str], dict[str, Tensor]]:
        """The digests of what the tile gave, and its sums of the random problems."""
        answers.what = self.what
        ask_layout(tile, self.exact, answers)
        ask_integers(tile, self.integers, answers)
        outs = {name: ask_random(tile, name, given, answers) for name, given in self.randoms.items()}
        digests = {f"GEMM, {name}": digest_of(out[: self.randoms[name].problem.valid]) for name, out in outs.items()}
        kind, activation_format = self.pair.split("_")
        if device.type == "cuda":
            _, takes_it = layer_operator_for(activation_format, device.index, tile, WeightFormat(kind))
            if takes_it != tile:
                raise NotRunError("another tile takes its place in the layer")
        for number, layers in enumerate(self.layers):
            digests[f"the layers' output{', of rows with their own scales' if number else ''}"] = layers.ask(
                tile, answers
            )
        return digests, outs

    def compare(self, outs: Mapping[str, Tensor], digests: Mapping[str, str], answers: Answers) -> Arithmetic:
        return compare(outs, self.family, {name: digests[f"GEMM, {name}"] for name in outs}, answers)


_Problems = dict[str, GemmProblem]


def _problems(
    device: torch.device, published: arithmetic.Arithmetic, pair: str
) -> tuple[_Problems, _Problems, _Problems]:
    """Exact ones, those of integers, and random ones, of MXFP4 weights and MXFP8 or bf16 rows."""
    exact = {"one-hot rows": problems.layout_problem(device)}
    exact |= {f"sparse rows, K={k}, N={n}": problems.sparse_problem(k, n, device) for k, n in SPARSE}
    integers = {f"integers, K={k}, N={n}": problems.integer_problem(k, n, device) for k, n in INTEGERS}
    randoms = {}
    for k, n, wide in RANDOM:
        problem = problems.random_problem(k, n, device, wide_scales=wide, arithmetic=published)
        randoms[f"K={k}, N={n}"] = problem.in_bf16(published) if pair == MXFP4_BF16 else problem
    if pair == MXFP4_BF16:
        exact, integers = ({name: p.in_bf16(None) for name, p in given.items()} for given in (exact, integers))
    return exact, integers, randoms


def _pair_problems(
    device: torch.device, published: arithmetic.Arithmetic, pair: str
) -> tuple[_Problems, _Problems, _Problems]:
    """The same of another pair."""
    exact: _Problems = {"one-hot rows": pair_problems.exact_problem(pair, "one-hot", 160, 144, device)}
    integers: _Problems = {}
    randoms: _Problems = {}
    for what, sizes, where in (("sparse", SPARSE, exact), ("integers", INTEGERS, integers)):
        name = "sparse rows" if what == "sparse" else what
        for k, n in sizes:
            where[f"{name}, K={k}, N={n}"] = pair_problems.exact_problem(pair, what, k, n, device)
    for k, n, wide in RANDOM:
        problem = pair_problems.random_problem(pair, k, n, device, published, wide_scales=wide)
        randoms[f"K={k}, N={n}"] = problem
    return exact, integers, randoms


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel that tiles have beside that for MXFP8 activations: what it computes, and which tiles have it."""

    pair: str
    published: arithmetic.Arithmetic
    having: Sequence[Tile]


def tile_runner(device: torch.device, published: arithmetic.Arithmetic, kernels: Sequence[Kernel] = ()) -> RunTile:
    """Makes the problems and what must come out of them, once; the function returned asks a tile.

    Args:
        device: where the tiles run.
        published: the rule of their architecture, for MXFP8 activations.
        kernels: those beside them.
    """
    always = Questions.make(device, published, MXFP4_MXFP8)
    others = [(Questions.make(device, kernel.published, kernel.pair), kernel.having) for kernel in kernels]

    def run_tile(tile: Tile) -> Outcome:
        answers = Answers()
        asked = [always, *(questions for questions, having in others if tile in having)]
        try:
            loading.load_tile(tile)
            given = [questions.ask(tile, device, answers) for questions in asked]
        except loading.LoadError as error:
            raise NotRunError(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise NotRunError(words(error)) from error
        found, said = Arithmetic(), dict[str, str]()
        for questions, (digests, outs) in zip(asked, given, strict=True):
            answers.what = questions.what
            one = questions.compare(outs, digests, answers)
            found = Arithmetic(
                values=found.values + one.values,
                differ=found.differ + one.differ,
                rules=(*found.rules, *(rule for rule in one.rules if rule not in found.rules)),
            )
            said |= {f"{questions.what}{name}": digest for name, digest in digests.items()}
        return Outcome(checks=answers.checks, answers=answers.wrong, arithmetic=found, digests=said)

    return run_tile


def ask_layout(tile: Tile, given: Mapping[str, GemmProblem], answers: Answers) -> None:
    """Bits must be equal, in every output type."""
    for name, problem in given.items():
        for dtype in (torch.float32, *_HALVES):
            answers.note("layout", f"GEMM, {name}, {_short(dtype)}", problem.check(tile, dtype))


def ask_integers(tile: Tile, given: Mapping[str, GemmProblem], answers: Answers) -> None:
    """Sums that any arithmetic with 20 bits or more gets right: here the bound is 0."""
    for name, problem in given.items():
        out = problem.run(tile)
        answers.note("layout", f"GEMM, {name}", problem.stray(out))
        answers.note("accuracy", f"GEMM, {name}", problem.wrong_sums(out, problem.expected))


def ask_random(tile: Tile, name: str, given: RandomSums, answers: Answers) -> Tensor:
    """The tile's float32 output, with which its 16-bit ones must agree."""
    problem, where = given.problem, f"GEMM, {name}"
    out = problem.run(tile)
    answers.note("layout", where, problem.stray(out))
    answers.note("accuracy", where, given.too_far(out))
    for dtype in _HALVES:
        half = problem.run(tile, dtype)
        wrong = problem.wrong_sums(half, out)
        answers.note("layout", f"{where}, {_short(dtype)}", problem.stray(half))
        answers.note("agreement", f"{where}, {_short(dtype)} against its float32 output rounded", wrong)
    return out


def compare(outs: Mapping[str, Tensor], family: Family, digests: Mapping[str, str], answers: Answers) -> Arithmetic:
    """How many values are not the published rule's, and which rules give them all. Asked of tiles without a fault."""
    values = differ = 0
    for name, out in outs.items():
        problem = family.randoms[name].problem
        rows = slice(problem.valid)
        values += out[rows].numel()
        differ += int((bits(out[rows]) != bits(problem.expected[rows])).sum())
    answers.checks += len(outs)
    healthy = not any(answers.wrong.values())
    return Arithmetic(values=values, differ=differ, rules=family.explain(outs, digests) if differ and healthy else ())


def digest_of(x: Tensor) -> str:
    return hashlib.sha256(raw(x)).hexdigest()


def raw(x: Tensor) -> bytes:
    """A tensor's bytes; without numpy, which torch need not have."""
    here = x.detach().cpu().contiguous()
    return ctypes.string_at(here.data_ptr(), here.numel() * here.element_size())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
