"""What csrc/moe's kernels must do for rows of MXFP4 and NVFP4, executed as PTX; as ptx_moe_checks.py for the others.

Bit for bit as formats.quantize_mxfp4_activations and formats.quantize_nvfp4, which test_fp4_quantizers.py holds against
oracles of its own. SM90's PTX is executed too: it converts to E2M1 without the instruction for that.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fp4_cases import GLOBAL_SCALES, Rows, hard_rows, hidden_of, in_bf16, in_words, quantized, row_format, same_bf16
from moe_cases import ids_of, layer_of
from ptx import launch
from ptx.fp4_problems import Fp4Problem
from ptx.gemm import Epilogue
from ptx.machine import Machine
from ptx.running import Run, array_of, execute
from torch import Tensor

from mxfp4_moe import formats, reference
from wheelbuild.kernel_ptx import compile_source_to_ptx

CPU = torch.device("cpu")
_EXPERTS = 5
_ROUNDINGS = (None, torch.bfloat16, torch.float16)


def execute_fp4(
    units: list[str],
    name: str,
    *args: Any,
    arch: str,
    factors: Tensor | None,
    change: Callable[[launch.Recording], None] | None = None,
    **inputs: Any,
) -> Run:
    """As ptx_moe_checks.operator, with row_factors among what it writes; `arch`: whose PTX is executed."""
    ptx = [launch.ptx_of_moe(unit, arch) for unit in units]
    options = {} if factors is None else {"row_factors": factors}
    given = {key: inputs[key] for key in ("global_scales",) if key in inputs}
    expert = {"row_expert": inputs["row_expert"]} if name == "quantize_permute" and "row_expert" in inputs else {}
    recording = launch.shared_recorder().operator(name, *args, **options, **given, **expert)
    if change is not None:
        change(recording)
    early = [key for key in inputs if key in ("slot_row", "gemm1", "row_expert", "offsets")]
    return execute(recording, ptx, inputs, outputs=options, early=early)


def check_rows(done: Run, expected: Rows, valid: int, factors: Tensor | None) -> None:
    """The first `valid` rows as expected, scale bytes past K zero, and nothing behind them."""
    rows, scales = done.results
    assert not done.written(rows)[valid:].any()
    assert done.written(rows)[:valid].all()
    if factors is not None:
        assert expected.factors is not None
        assert torch.equal(factors[:valid].view(torch.int32), expected.factors.view(torch.int32))
        assert not done.written(factors)[valid:].any()
    if rows.dtype is torch.bfloat16:
        assert same_bf16(rows[:valid], in_bf16(expected))
        assert scales.numel() == 0
        return
    assert torch.equal(rows[:valid], expected.packed)
    assert torch.equal(in_words(scales, valid), in_words(expected.scales, valid, like=scales))
    assert done.written(scales)[:, :valid].all()
    assert not done.written(scales)[:, valid:].any()


def _behind_route(recording: launch.Recording) -> None:
    """Makes QuantizePermuteArgs say that hidden_states are there while the kernel before may still run."""
    [one] = recording.launches
    [args] = one.params
    at = len(args) - 8  # the last member, a bool, padded
    assert args[at:] == bytes(8)
    recording.launches[0] = replace(one, params=(args[:at] + b"\1" + args[at + 1 :],))


def check_quantize_permute(
    width: int,
    dtype: torch.dtype,
    tokens: int,
    kind: str,
    arch: str = "120f",
    *,
    behind_route: bool = False,
    folded: bool = False,
) -> None:
    """folded: to the values in bfloat16."""
    x = hidden_of(width, dtype, tokens)
    top_k = 5 if tokens < 100 else 1
    ids = ids_of(tokens, top_k, _EXPERTS, torch.int32, CPU)
    offsets, row_slot, slot_row = reference.route(ids, _EXPERTS)
    valid = int(offsets[-1])
    expert = torch.arange(_EXPERTS, dtype=torch.int32).repeat_interleave(offsets.diff())
    inputs: dict[str, Tensor] = {"hidden_states": x, "slot_row": slot_row}
    if kind == "nvfp4 of experts":
        padding = torch.full((len(row_slot) - valid,), -1, dtype=torch.int32)
        inputs |= {"global_scales": GLOBAL_SCALES, "row_expert": torch.cat((expert, padding))}
    factors = torch.empty(len(row_slot)) if kind == "nvfp4 of rows" else None
    arguments = (x, slot_row, top_k, row_format(kind, folded=folded))
    unit = "quantize_permute" if kind == "mxfp4" else "nvfp4_permute"
    change = _behind_route if behind_route else None
    done = execute_fp4([unit], "quantize_permute", *arguments, arch=arch, factors=factors, change=change, **inputs)
    token = row_slot[:valid] // top_k
    check_rows(done, quantized(x[token.long()], kind, expert), valid, factors)


def check_activation(
    width: int,
    kind: str,
    *,
    activation: str = "identity",
    rounding: torch.dtype | None = None,
    bias: bool = False,
    arch: str = "120f",
    most: int = 3,
    folded: bool = False,
) -> None:
    """With an activation whose every bit is known; several rows behind the valid ones."""
    values = torch.from_numpy(hard_rows(width, 32 if kind == "mxfp4" else 16, most))
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(width))]
    weights = layer_of(_EXPERTS, width, activation, "one for all", bias=bias, device=CPU)
    rows, valid = len(values), len(values) - 3
    row_expert = torch.randint(0, _EXPERTS, (rows,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    offsets = torch.full((_EXPERTS + 1,), valid, dtype=torch.int32)
    inputs = {"gemm1": values, "row_expert": row_expert, "offsets": offsets}
    if weights.w13_bias is not None:
        inputs["bias"] = weights.w13_bias
    if kind == "nvfp4 of experts":
        inputs["global_scales"] = GLOBAL_SCALES
    factors = torch.empty(rows) if kind == "nvfp4 of rows" else None
    numbers = (0.0, 0.0, math.inf, None, None, None)
    number = _ROUNDINGS.index(rounding)
    arguments = (values, row_expert, offsets, weights.w13_bias, weights.activation.code, *numbers, number)
    done = execute_fp4(
        ["fp4_activation"],
        "activation",
        *(*arguments, row_format(kind, folded=folded)),
        arch=arch,
        factors=factors,
        **inputs,
    )
    made = reference.activate(
        values[:valid], row_expert[:valid], weights.w13_bias, activation, None, None, None, rounding=rounding
    )
    check_rows(done, quantized(made, kind, row_expert[:valid]), valid, factors)


def activated(problem: Fp4Problem, applied: Epilogue, experts_rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows, and their scales packed, that the activation kernel makes of a grouped GEMM's expected sums."""
    valid = int(problem.offsets[-1])
    row_expert = torch.repeat_interleave(torch.arange(len(experts_rows)), problem.offsets.diff()).to(torch.int32)
    return _close(problem.expected[:valid].contiguous(), row_expert, len(experts_rows), applied)


def check_activation_is_close(activation: str) -> None:
    weights = layer_of(_EXPERTS, 96, activation, "one for all", bias=True, device=CPU)
    g = torch.Generator().manual_seed(96)
    sums = torch.randn(8, weights.w13_rows, generator=g) * 4
    numbers = {name: getattr(weights, name) for name in ("alpha", "beta")}
    limit = math.inf if weights.limit is None else weights.limit
    given = {"bias": weights.w13_bias, "global_scales": GLOBAL_SCALES, "limit": limit, **numbers}
    row_expert = torch.arange(8, dtype=torch.int32) % _EXPERTS
    _close(sums, row_expert, _EXPERTS, Epilogue(activation=weights.activation, **given))


def _close(sums: Tensor, row_expert: Tensor, experts: int, applied: Epilogue) -> tuple[Tensor, Tensor]:
    """The kernel's rows and scales, compared with torch's: an exp's last bits change a few codes and scales."""
    offsets = torch.full((experts + 1,), len(sums), dtype=torch.int32)
    kind = "mxfp4" if applied.global_scales is None else "nvfp4 of experts"
    inputs = {"gemm1": sums, "row_expert": row_expert, "offsets": offsets}
    numbers = [applied.alpha, applied.beta, applied.limit]
    own = {f"number {i}": n for i, n in enumerate(numbers) if isinstance(n, Tensor)}
    inputs |= own | ({} if applied.bias is None else {"bias": applied.bias})
    if applied.global_scales is not None:
        inputs["global_scales"] = applied.global_scales
    rounding = None if applied.rounding is torch.float32 else applied.rounding
    arguments = (sums, row_expert, offsets, applied.bias, applied.activation.code)
    arguments += tuple(0.0 if isinstance(n, Tensor) else n for n in numbers)
    arguments += tuple(n if isinstance(n, Tensor) else None for n in numbers)
    arguments += (_ROUNDINGS.index(rounding), row_format(kind))
    done = execute_fp4(["fp4_activation"], "activation", *arguments, arch="120f", factors=None, **inputs)
    limit = None if isinstance(applied.limit, float) and math.isinf(applied.limit) else applied.limit
    values = reference.activate(
        sums, row_expert, applied.bias, applied.activation, applied.alpha, applied.beta, limit, rounding=rounding
    )
    expected = quantized(values, kind, row_expert, applied.global_scales)
    rows, scales = done.results
    off = torch.stack([(rows ^ expected.packed) & 0x0F, (rows ^ expected.packed) >> 4])
    assert (off != 0).float().mean() < 2e-3
    blocks = scales.transpose(0, 1)[: len(sums)].flatten(1)[:, : expected.scales.shape[1]]
    assert (blocks.int() - expected.scales.int()).abs().max() <= 1
    return rows, scales


def check_e2m1(arch: str) -> None:
    """Both conversions to E2M1, of all upper halves of float32 with the lower halves that touch them.

    Codes change where the lower half is 0 and nowhere else, so those between 1 and 0xFFFF have the same code.
    """
    ptx = compile_source_to_ptx(Path("tests/helpers/ptx/e2m1.cu"), arch, (), "e2m1")
    assert ("e2m1x2" in ptx) == (arch != "90a")
    low = torch.tensor([0, 1, 0xFFFF], dtype=torch.int64)
    bits = (torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16 | low).flatten()
    x = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
    by_hand, words = torch.empty(len(x), dtype=torch.uint8), torch.empty(len(x) // 8, dtype=torch.int32)
    machine = Machine()
    machine.memory.add("x", array_of(x), written=True, writable=False)
    for name, tensor in {"by_hand": by_hand, "words": words}.items():
        machine.memory.add(name, array_of(tensor), written=False, writable=True)
    pointers = struct.pack("3Q", *(tensor.data_ptr() for tensor in (x, by_hand, words)))
    sizes = {"grid": (len(words) // 256, 1, 1), "block": (256, 1, 1), "cluster": (1, 1, 1), "smem_bytes": 0}
    machine.run(ptx, launch.Launch(kernel="encode", programmatic=False, params=(pointers,), **sizes))
    of_numbers = torch.where(x.isnan(), 6.0, x)  # PTX ISA, cvt: a NaN becomes the largest number
    expected = formats.encode_e2m1(of_numbers)
    assert torch.equal(words.view(torch.uint8), expected)
    assert torch.equal(by_hand[0::2] | by_hand[1::2] << 4, expected)
