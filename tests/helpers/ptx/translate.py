"""Kernels -> Python functions, one per run of instructions; the only place that knows instructions by name.

A unit starts at some instruction and goes on until control may leave it: a branch, a label, or an instruction that may
have to wait. It exists in two forms: `full`, for all 32 lanes together, and `masked`, for some of them. Registers are
arrays of 32 lanes in a list R; they are never changed in place. What a unit returns is the index of the instruction to
go on with, or WAITING when the group of lanes cannot go on (machine.py has set what it waits for).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from . import mma
from .faults import Fault, Kind
from .operands import Operands, pair, vector
from .parse import Instruction, Kernel
from .scalar import HELPERS, SCALAR

WAITING = -1

_FP4 = "mma.sync.aligned.kind::{}.block_scale.scale_vec::{}.m16n8k64.row.col.f32.e2m1.e2m1.f32.{}"
# PTX ISA, "mma" and "Block scaling for mma.sync"; 4X of ue8m0 came with PTX ISA 9.1, which CUDA 13.0 does not read.
_MMAS = {
    **{
        f"mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col.f32.{a}.{b}.f32.ue8m0": (
            mma.Instruction(a, b, 1)
        )
        for a in ("e4m3", "e2m1")
        for b in ("e4m3", "e2m1")
    },
    _FP4.format("mxf4", "2X", "ue8m0"): mma.Instruction("e2m1", "e2m1", 2),
    _FP4.format("mxf4nvf4", "2X", "ue8m0"): mma.Instruction("e2m1", "e2m1", 2),
    _FP4.format("mxf4nvf4", "4X", "ue4m3"): mma.Instruction("e2m1", "e2m1", 4),
    **{f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32": mma.Instruction(t, t, 0) for t in ("bf16", "f16")},
}
_COPY = (
    "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint",
    "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes",
)
_TYPES = r"([busf](?:8|16|32|64))"
_LOAD = re.compile(rf"ld(?:(\.relaxed\.gpu)\.global|\.(global|shared|param)(\.nc|\.cg)?|())(\.v2|\.v4)?\.{_TYPES}")
_STORE = re.compile(rf"st(?:\.(global|shared)|())(\.v2|\.v4)?\.{_TYPES}")
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2")
_SHUFFLE = re.compile(r"shfl\.sync\.(idx|bfly|up|down)\.b32")

# Each of these is a unit of its own: the lanes may have to wait. Name -> method of Warp and the types of its operands.
_BLOCKING = {
    "griddepcontrol.wait": ("grid_wait", ""),
    "barrier.cluster.arrive": ("cluster_arrive", ""),
    "barrier.cluster.wait": ("cluster_wait", ""),
}
_PLAIN_CALLS = {  # name -> method of Warp and the types of its operands; all lanes for themselves
    "griddepcontrol.launch_dependents": ("launch_dependents", ()),
    "mbarrier.init.shared::cta.b64": ("mbarrier_init", ("[b32]", "u32")),
    "mbarrier.arrive.expect_tx.shared::cta.b64": ("mbarrier_arrive", ("_", "[b32]", "u32")),
    "mbarrier.arrive.shared::cta.b64": ("mbarrier_arrive", ("_", "[b32]")),
    "fence.mbarrier_init.release.cluster": ("fence_mbarrier_init", ()),
    "prefetch.global.L2": ("prefetch", ("[b64]",)),
    "fence.proxy.async.shared::cta": ("fence_async", ()),
}


class Program:
    """One kernel, translated piece by piece as it is executed."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.instructions = kernel.instructions
        self.numbers: dict[str, int] = {}  # register -> place in R
        self.constants: dict[tuple[str, bytes], str] = {}
        self.names: dict[str, Any] = dict(HELPERS, force=mma.force, start=mma.start, WAITING=WAITING)
        self.units: tuple[dict[int, Callable[..., int]], ...] = ({}, {})  # masked, full
        self.labels = set(kernel.labels.values())
        self.symbols: dict[str, int] = {}  # addresses of shared variables and parameters; set by machine.py
        for instruction in self.instructions:
            for word in re.findall(r"[%A-Za-z_$][\w$]*", " ".join((*instruction.operands, instruction.guard))):
                if kernel.is_register(word):
                    self.numbers.setdefault(word, len(self.numbers))
        self.promised = self._promised()

    def _promised(self) -> set[str]:
        """Registers that may hold an MMA's result that is not computed yet."""
        found: set[str] = set()
        moves = []
        for i in self.instructions:
            if i.name in _MMAS or _WGMMA.fullmatch(i.name):
                found.update(vector(i.operands[0]))
            elif i.name in ("mov.b32", "mov.f32", "mov.u32"):
                moves.append((i.operands[0], i.operands[1]))
        size = -1
        while size != len(found):
            size = len(found)
            found.update(to for to, source in moves if source in found)
        return found

    def unit(self, at: int, full: bool) -> Callable[..., int]:
        units = self.units[full]
        if at not in units:
            text = _Writer(self, at, full).text()
            scope = self.names
            exec(compile(text, f"<{self.kernel.name}, instruction {at}>", "exec"), scope)
            units[at] = scope["unit"]
        return units[at]


class _Writer(Operands):
    """Writes one unit."""

    def __init__(self, program: Program, start: int, full: bool) -> None:
        super().__init__(program)
        self.start, self.full = start, full

    def text(self) -> str:
        at = self.start
        while True:
            if at != self.start and at in self.program.labels:
                self.lines.append(f"return {at}")
                break
            if at >= len(self.program.instructions):
                raise Fault(Kind.UNKNOWN, "the kernel's end without ret")
            if not self._write(at, self.program.instructions[at]):
                break
            at += 1
        return "def unit(w, R, m, g):\n" + "".join(f"    {line}\n" for line in self.lines)

    # --- instructions ------------------------------------------------------------------------------------------

    def _write(self, at: int, i: Instruction) -> bool:
        """Appends an instruction; False where the unit ends with it."""
        name = i.name
        if name in ("bra", "bra.uni"):
            return self._branch(at, i)
        if name in ("ret", "exit"):
            if i.guard:
                raise self.refuse(i, f"{name} under a guard")
            self.lines += [f"w.at = {at}", "return w.exit(g)"]
            return False
        waits = self._waiting(i)
        if waits is not None:
            if i.guard:
                raise self.refuse(i, f"{name} under a guard")
            if at != self.start:
                self.lines.append(f"return {at}")
            else:
                self.lines += [f"w.at = {at}", *waits]
            return False
        mask = "None" if self.full else "m"
        if i.guard:
            predicate = self.read(i.guard, "pred", i)
            predicate = f"~{predicate}" if i.negated else predicate
            self.lines.append(f"mg = {predicate}" if self.full else f"mg = {predicate} & m")
            mask = "mg"
        if name in SCALAR:
            scalar = SCALAR[name]
            return self._scalar(i, mask, scalar.result, scalar.operands, scalar.expression)
        if _is_together(name):
            if i.guard:
                raise self.refuse(i, f"{name} under a guard")
            return self._together(at, i)
        self.lines.append(f"w.at = {at}")
        start = len(self.lines)
        self._alone(i, mask)
        if i.guard:  # nobody may be left
            self.lines[start:] = [f"if mg.any(): {line}" for line in self.lines[start:]]
        return True

    def _branch(self, at: int, i: Instruction) -> bool:
        if not i.guard:
            self.lines.append(f"return {i.target}")
            return False
        predicate = self.read(i.guard, "pred", i)
        taken = f"~{predicate}" if i.negated else predicate
        total = "32"
        if not self.full:
            taken, total = f"({taken}) & m", "np.count_nonzero(m)"
        self.lines += [
            f"t = {taken}",
            "n = np.count_nonzero(t)",
            f"if n == {total}: return {i.target}",
            f"if n: return w.split(g, t, {i.target}, {at + 1})",
        ]
        return True

    def _scalar(self, i: Instruction, mask: str, result: str, kinds: tuple[str, ...], expression: str) -> bool:
        destination, *sources = i.operands
        if any(operand.startswith("{") for operand in i.operands):
            return self._halves(i, mask)
        if len(sources) != len(kinds):
            raise self.refuse(i, f"{i.name} with {len(sources)} operands")
        promised = self.program.promised
        if expression == "{0}" and sources[0] in promised and mask == "None":
            numbers = self.program.numbers
            self.lines.append(f"R[{numbers[destination]}] = R[{numbers[sources[0]]}]")
            return True
        values = [self.read(source, kind, i) for source, kind in zip(sources, kinds, strict=True)]
        self.assign(destination, expression.format(*values), result, mask, i)
        return True

    def _halves(self, i: Instruction, mask: str) -> bool:
        """mov between a register and the 2 or 4 parts that it is made of, low one first."""
        bits = {"mov.b16": 16, "mov.b32": 32, "mov.b64": 64}.get(i.name)
        if bits is None or len(i.operands) != 2:
            raise self.refuse(i)
        target, source = i.operands
        count = len(vector(target if target.startswith("{") else source))
        if count not in (2, 4) or bits // count not in (8, 16, 32):
            raise self.refuse(i)
        size = bits // count
        whole, part = f"u{bits}", f"u{size}"
        if target.startswith("{"):
            value = self.read(source, whole, i)
            for n, register in enumerate(vector(target)):
                if register != "_":
                    shifted = f"({value} >> {self._constant(whole, n * size)}).astype(u{size // 8})"
                    self.assign(register, shifted, part, mask, i)
        else:
            parts = [f"{self.read(r, part, i)}.astype(u{bits // 8})" for r in vector(source)]
            shifted = [f"{x} << {self._constant(whole, n * size)}" if n else x for n, x in enumerate(parts)]
            self.assign(target, " | ".join(shifted), whole, mask, i)
        return True

    def _alone(self, i: Instruction, mask: str) -> None:
        """Instructions of each lane for itself that touch more than its registers."""
        name = i.name
        if found := _LOAD.fullmatch(name):
            self._load(i, mask, found)
        elif found := _STORE.fullmatch(name):
            space = found[1] or "generic"
            values = vector(i.operands[1])
            if len(values) != {None: 1, ".v2": 2, ".v4": 4}[found[3]]:
                raise self.refuse(i)
            kind = found[4]
            # A narrow store takes the low bits of a wider register.
            reads = ", ".join(self.read(v, "u" + kind[1:], i) for v in values)
            address = self.address(i.operands[0], i)
            self.lines.append(f"w.store({space!r}, {mask}, {address}, ({reads},))")
        elif name in _PLAIN_CALLS:
            method, kinds = _PLAIN_CALLS[name]
            if len(kinds) != len(i.operands):
                raise self.refuse(i, f"{name} with {len(i.operands)} operands")
            words = [mask]
            for kind, operand in zip(kinds, i.operands, strict=True):
                if kind == "_":
                    if operand != "_":
                        raise self.refuse(i, f"{name} with a result")
                elif kind.startswith("["):
                    words.append(self.address(operand, i))
                else:
                    words.append(self.read(operand, kind, i))
            self.lines.append(f"w.{method}({', '.join(words)})")
        elif name in _COPY:
            to, source, barrier = i.operands[:3]
            found = re.fullmatch(r"\[\s*([^,]+),\s*\{([^,]+),([^}]+)\}\s*\]", source)
            if found is None or len(i.operands) != (4 if name.endswith("cache_hint") else 3):
                raise self.refuse(i, f"operands of {name}")
            self.lines.append(
                f"w.copy({mask}, {self.address(to, i)}, {self.read(found[1], 'u64', i)}, "
                f"{self.read(found[2], 's32', i)}, {self.read(found[3], 's32', i)}, {self.address(barrier, i)})"
            )
        elif name in ("cvta.to.global.u64", "cvta.param.u64"):
            self.assign(i.operands[0], self.read(i.operands[1], "u64", i), "u64", mask, i)
        elif name == "cvta.shared.u64":
            self.assign(i.operands[0], f"w.generic({self.read(i.operands[1], 'u64', i)})", "u64", mask, i)
        elif name == "mapa.u64":
            there = f"w.map_shared({mask}, {self.read(i.operands[1], 'u64', i)}, {self.read(i.operands[2], 'u32', i)})"
            self.assign(i.operands[0], there, "u64", mask, i)
        else:
            raise self.refuse(i)

    def _load(self, i: Instruction, mask: str, found: re.Match[str]) -> None:
        relaxed, space, mode, generic, width, kind = found.groups()
        if relaxed:
            space, mode = "global", "relaxed"
        elif generic is not None:
            space, mode = "generic", "plain"
        else:
            mode = (mode or ".plain")[1:]
        if (mode != "plain" and space != "global") or space is None:
            raise self.refuse(i)
        registers = vector(i.operands[0])
        count = {None: 1, ".v2": 2, ".v4": 4}[width]
        if len(registers) != count:
            raise self.refuse(i)
        size = int(kind[1:]) // 8
        address = self.address(i.operands[1], i)
        self.lines.append(f"t = w.load({space!r}, {mode!r}, {mask}, {address}, {size}, {count})")
        dtype = f"u{kind[1:]}"
        for n, register in enumerate(registers):
            value = f"t[{n}]" if kind[0] != "s" else f"t[{n}].view(i{size})"
            self.assign(register, value, dtype if kind[0] != "s" else kind, mask, i)

    # --- instructions of a warp's lanes together ---------------------------------------------------------------

    def _together(self, at: int, i: Instruction) -> bool:
        name, operands = i.name, i.operands
        members = "None"  # all lanes, .aligned
        if name.startswith(("bar.warp", "elect", "shfl", "redux", "match", "vote")):
            members = self.read(operands[-1], "u32", i)
        mask = "None"
        if not self.full:
            if at != self.start:
                self.lines.append(f"return {at}")
                return False
            mask = "m"
            self.lines += [f"w.at = {at}", f"r = w.converge(g, {at}, {members})", "if r is not None: return r"]
        elif members != "None":
            self.lines += [f"w.at = {at}", f"w.check_members({members})"]
        else:
            self.lines.append(f"w.at = {at}")
        if name == "bar.warp.sync":
            self.lines.append(f"w.meet({mask})")
        elif name == "elect.sync":
            lane, predicate = pair(operands[0])
            self.lines.append(f"t, p = w.elect({mask})")
            self.assign(lane, "t", "u32", mask, i)
            self.assign(predicate, "p", "pred", mask, i)
        elif found := _SHUFFLE.fullmatch(name):
            to, predicate = pair(operands[0])
            words = ", ".join(self.read(o, "u32", i) for o in operands[1:4])
            self.lines.append(f"t, p = w.shuffle({found[1]!r}, {mask}, {words})")
            self.assign(to, "t", "u32", mask, i)
            self.assign(predicate, "p", "pred", mask, i)
        elif name in ("redux.sync.max.u32", "redux.sync.min.u32"):
            function = "maximum" if "max" in name else "minimum"
            self.lines.append(f"t = w.reduce(np.{function}, {mask}, {self.read(operands[1], 'u32', i)})")
            self.assign(operands[0], "t", "u32", mask, i)
        elif name in ("vote.sync.any.pred", "vote.sync.all.pred"):
            self.lines.append(f"t = w.{name.split('.')[2]}({mask}, {self.read(operands[1], 'pred', i)})")
            self.assign(operands[0], "t", "pred", mask, i)
        elif name == "match.any.sync.b32":
            self.lines.append(f"t = w.match_any({mask}, {self.read(operands[1], 'u32', i)})")
            self.assign(operands[0], "t", "u32", mask, i)
        elif found := re.fullmatch(r"ldmatrix\.sync\.aligned\.x([124])\.m8n8\.shared\.b16", name):
            registers = vector(operands[0])
            if len(registers) != int(found[1]):
                raise self.refuse(i)
            self.lines.append(f"t = w.load_matrices({self.address(operands[1], i)}, {len(registers)})")
            for n, register in enumerate(registers):
                self.assign(register, f"t[{n}]", "u32", "None", i)
        elif name == "movmatrix.sync.aligned.m8n8.trans.b16":
            self.assign(operands[0], f"w.transpose({self.read(operands[1], 'u32', i)})", "u32", "None", i)
        elif name in _MMAS:
            self._mma(at, i, _MMAS[name])
        elif found := _WGMMA.fullmatch(name):
            self._wgmma(at, i, int(found[1]), found[2])
        elif name == "wgmma.fence.sync.aligned":
            pass  # of registers that threads write before a wgmma reads them: here it reads them as they are
        elif name == "wgmma.commit_group.sync.aligned":
            self.lines.append("w.wgmmas.commit()")
        elif name == "wgmma.wait_group.sync.aligned":
            self.lines.append(f"w.wgmmas.wait(w, {int(operands[0])})")
        elif name in ("setmaxnreg.dec.sync.aligned.u32", "setmaxnreg.inc.sync.aligned.u32"):
            self.lines.append(f"w.set_registers({'inc' in name}, {int(operands[0])})")
        else:
            raise self.refuse(i)
        return True

    def _mma(self, at: int, i: Instruction, kind: mma.Instruction) -> None:
        selectors: list[int] = []
        scales: list[str] = []
        if kind.scales and len(i.operands) == 8:
            d, a, b, c, scale_a, select_a, scale_b, select_b = i.operands
            scales = [self.read(s, "u32", i) for s in (scale_a, scale_b)]
            selectors = [int(x) for s in (select_a, select_b) for x in vector(s)]
            if len(selectors) != 4 or not all(byte in kind.bytes_selected for byte in selectors[::2]):
                raise self.refuse(i, f"selectors of {i.text}")
            if not (0 <= selectors[1] < 2 and 0 <= selectors[3] < 4):
                raise self.refuse(i, f"selectors of {i.text}")
        elif not kind.scales and len(i.operands) == 4:
            d, a, b, c = i.operands
        else:
            raise self.refuse(i, f"operands of {i.text}")
        if [len(vector(x)) for x in (d, a, b, c)] != [4, 4, 2, 4]:
            raise self.refuse(i, f"operands of {i.text}")
        numbers = self.program.numbers
        accumulators = ", ".join(
            f"R[{numbers[r]}]" if r in numbers else self.read(r, "f32", i) + ".view(u4)" for r in vector(c)
        )
        words = [", ".join(self.read(r, "u32", i) for r in vector(x)) for x in (a, b)]
        targets = ", ".join(f"R[{numbers[r]}]" for r in vector(d))
        name = f"M_{kind.a}_{kind.b}_{kind.scales}"
        self.program.names[name] = kind
        self.lines.append(
            f"{targets} = start(w.mmas, ({accumulators}), ({words[0]}), ({words[1]}), [{', '.join(scales)}], "
            f"{tuple(selectors)}, {name}, w.place({at}))"
        )

    def _wgmma(self, at: int, i: Instruction, columns: int, of: str) -> None:
        """A from registers, factors of 1, and B not transposed."""
        if len(i.operands) != 7 or [x.strip() for x in i.operands[4:]] != ["1", "1", "0"]:
            raise self.refuse(i, f"operands of {i.text}")
        d, a, descriptor, adds = i.operands[:4]
        if (len(vector(d)), len(vector(a))) != (columns // 2, 4):
            raise self.refuse(i, f"operands of {i.text}")
        targets = tuple(self.program.numbers[r] for r in vector(d))
        words = ", ".join(self.read(r, "u32", i) for r in vector(a))
        self.lines.append(
            f"w.wgmmas.start(w, {targets}, ({words}), {self.read(descriptor, 'u64', i)}, "
            f"{self.read(adds, 'pred', i)}, "
            f"{of!r}, w.place({at}))"
        )

    def _waiting(self, i: Instruction) -> list[str] | None:
        """The lines of an instruction that may have to wait, or None."""
        name, operands = i.name, i.operands
        if name in _BLOCKING:
            return [f"return w.{_BLOCKING[name][0]}(g)"]
        if name == "bar.sync":
            number = int(operands[0])
            count = self.read(operands[1], "u32", i) if len(operands) > 1 else "None"
            return [f"return w.barrier(g, {number}, {count}, None, None)"]
        if name == "bar.red.popc.u32":
            if len(operands) != 3:
                raise self.refuse(i, f"{name} with {len(operands)} operands")
            target = self.program.numbers[operands[0]]
            return [f"return w.barrier(g, {int(operands[1])}, None, {self.read(operands[2], 'pred', i)}, {target})"]
        if name == "mbarrier.try_wait.parity.shared::cta.b64":
            target = self.program.numbers[operands[0]]
            address, parity = self.address(operands[1], i), self.read(operands[2], "u32", i)
            return [f"return w.try_wait(g, {target}, {address}, {parity})"]
        return None


def _is_together(name: str) -> bool:
    return name in ("bar.warp.sync", "elect.sync") or name.startswith(
        ("shfl.", "redux.", "match.", "vote.", "ldmatrix.", "movmatrix.", "mma.", "wgmma.", "setmaxnreg.")
    )
