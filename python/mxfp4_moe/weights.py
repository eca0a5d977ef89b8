"""Checkpoint layouts -> `MoEWeights`, the one layout that the kernels read, and back again, bit for bit.

Preparing moves bits and computes nothing: gate and up rows are put in groups of 8, nibbles are rotated inside their
32-bit words, scales are swizzled. Experts are prepared one at a time, so the extra memory is one expert's worth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .formats import BLOCK, describe, require_tensor, rotate_words, swizzle_scales, unrotate_words, unswizzle_scales

_EnumT = TypeVar("_EnumT", bound=Enum)
_BIAS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SUFFIXES = {  # argument of from_mxfp4 -> name in a gpt-oss checkpoint
    "w13": "gate_up_proj_blocks",
    "w13_scale": "gate_up_proj_scales",
    "w2": "down_proj_blocks",
    "w2_scale": "down_proj_scales",
    "w13_bias": "gate_up_proj_bias",
    "w2_bias": "down_proj_bias",
}


class GateUpOrder(str, Enum):
    """Order of a checkpoint's w13 rows."""

    INTERLEAVED = "interleaved"  # g0, u0, g1, u1, ... (gpt-oss)
    GATE_UP = "gate_up"  # all gates, then all ups
    UP_GATE = "up_gate"  # all ups, then all gates


class Activation(str, Enum):
    """What stands between the two GEMMs; formulas in `mxfp4_moe.reference.activate`."""

    SWIGLU = "swiglu"
    SWIGLU_OAI = "swiglu_oai"


class Mxfp4Tensors(NamedTuple):
    """Weights of one layer as checkpoints store them; `MoEWeights.from_mxfp4` takes these names."""

    w13: Tensor  # uint8 [E, 2I, H/2], low nibble = even k
    w13_scale: Tensor  # uint8 [E, 2I, H/32], E8M0
    w2: Tensor  # uint8 [E, H, I/2]
    w2_scale: Tensor  # uint8 [E, H, I/32]
    w13_bias: Tensor | None  # float32 [E, 2I]
    w2_bias: Tensor | None  # float32 [E, H]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MoEWeights:
    """The weights of one MoE layer, prepared for the kernels. Make them with `from_mxfp4` or `from_safetensors`.

    E experts, H hidden size, I intermediate size; H and I are multiples of 32. All tensors are contiguous and on one
    device.

    Attributes:
        w13: uint8 [E, 2I, H/2] packed E2M1, each 32-bit word rotated left by 2 (`formats.rotate_words`). Rows in groups
            of 16: 8 gates, then the 8 ups that belong to them.
        w13_scale: uint8 [E, ceil(2I/128), ceil(H/128), 512] E8M0, in the same row order (`formats.swizzle_scales`).
        w2: uint8 [E, H, I/2], rotated like w13.
        w2_scale: uint8 [E, ceil(H/128), ceil(I/128), 512].
        w13_bias: float32 [E, 2I] in w13's row order, or None.
        w2_bias: float32 [E, H], or None.
        activation: what stands between the GEMMs.
        alpha, beta, limit: swiglu_oai's numbers (limit None: no clamp); plain swiglu has none and ignores them.
        gate_up_order: order in which the checkpoint had w13's rows; `to_mxfp4` restores it.

    Raises:
        TypeError: a tensor of another dtype, or a value of another type.
        ValueError: a tensor whose shape, device or stride does not fit; numbers that are not finite.
    """

    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    activation: Activation = Activation.SWIGLU_OAI
    alpha: float = 1.702
    beta: float = 1.0
    limit: float | None = 7.0
    gate_up_order: GateUpOrder = GateUpOrder.INTERLEAVED

    def __post_init__(self) -> None:
        require_tensor("w13", self.w13, torch.uint8, ("E", "2I", "H/2"))
        experts, hidden, inter = self.num_experts, self.hidden_size, self.intermediate_size
        _check_sizes("w13", self.w13, experts, hidden, inter)
        device = self.w13.device
        shapes = {
            "w13": (experts, 2 * inter, hidden // 2),
            "w13_scale": (experts, _ceil_div(2 * inter, 128), _ceil_div(hidden, 128), 512),
            "w2": (experts, hidden, inter // 2),
            "w2_scale": (experts, _ceil_div(hidden, 128), _ceil_div(inter, 128), 512),
            "w13_bias": (experts, 2 * inter),
            "w2_bias": (experts, hidden),
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None and name.endswith("_bias"):
                continue
            require_tensor(name, tensor, torch.float32 if name.endswith("_bias") else torch.uint8, shape, device)
            if not tensor.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")
        if not isinstance(self.activation, Activation):
            raise TypeError(f"activation: expected an Activation, got {self.activation!r}")
        if not isinstance(self.gate_up_order, GateUpOrder):
            raise TypeError(f"gate_up_order: expected a GateUpOrder, got {self.gate_up_order!r}")
        _check_number("alpha", self.alpha)
        _check_number("beta", self.beta)
        if self.limit is not None:
            _check_number("limit", self.limit)
            if self.limit <= 0:
                raise ValueError(f"limit: expected a number above 0, or None, got {self.limit}")

    def __repr__(self) -> str:
        bias = "none" if self.w13_bias is None and self.w2_bias is None else "yes"
        return (
            f"MoEWeights(num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, bias={bias}, activation={self.activation.value}, "
            f"device={self.device})"
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        """H, in values."""
        return self.w13.shape[2] * 2

    @property
    def intermediate_size(self) -> int:
        """I, in values."""
        return self.w13.shape[1] // 2

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.w13.device

    def to(self, device: torch.device | str | int) -> MoEWeights:
        """The same weights on another device; tensors that are already there are shared, not copied."""
        return replace(
            self,
            w13=self.w13.to(device),
            w13_scale=self.w13_scale.to(device),
            w2=self.w2.to(device),
            w2_scale=self.w2_scale.to(device),
            w13_bias=None if self.w13_bias is None else self.w13_bias.to(device),
            w2_bias=None if self.w2_bias is None else self.w2_bias.to(device),
        )

    def to_mxfp4(self) -> Mxfp4Tensors:
        """The checkpoint's tensors again, bit for bit and in its gate/up order.

        Blocks come back 3-D ([E, N, K/2]) also where they came 4-D; biases as float32, which holds every bfloat16 and
        float16 exactly.
        """
        inverse = _source_rows(self.gate_up_order, self.intermediate_size, self.device).argsort()
        w13, w13_scale = _restore(self.w13, self.w13_scale, inverse)
        w2, w2_scale = _restore(self.w2, self.w2_scale, None)
        return Mxfp4Tensors(
            w13=w13,
            w13_scale=w13_scale,
            w2=w2,
            w2_scale=w2_scale,
            w13_bias=None if self.w13_bias is None else self.w13_bias[:, inverse].contiguous(),
            w2_bias=None if self.w2_bias is None else self.w2_bias.clone(),
        )

    @classmethod
    def from_mxfp4(
        cls,
        w13: Tensor,
        w13_scale: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        *,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        gate_up_order: GateUpOrder | str = GateUpOrder.INTERLEAVED,
        activation: Activation | str = Activation.SWIGLU_OAI,
        alpha: float = 1.702,
        beta: float = 1.0,
        limit: float | None = 7.0,
    ) -> MoEWeights:
        """Prepares weights given exactly as checkpoints store them. The tensors passed in stay as they are.

        Args:
            w13: uint8 [E, 2I, H/2] or [E, 2I, H/32, 16]; gate and up projections, low nibble = even k.
            w13_scale: uint8 [E, 2I, H/32], E8M0.
            w2: uint8 [E, H, I/2] or [E, H, I/32, 16]; down projection.
            w2_scale: uint8 [E, H, I/32].
            w13_bias: bfloat16, float16 or float32 [E, 2I] in the row order of w13, or None.
            w2_bias: the same, [E, H], or None.
            gate_up_order: row order of w13: "interleaved", "gate_up" or "up_gate".
            activation: "swiglu_oai" or "swiglu".
            alpha, beta, limit: swiglu_oai's numbers; plain swiglu ignores them.

        Returns:
            Prepared weights on the device of the tensors.

        Raises:
            TypeError: a tensor of another dtype.
            ValueError: a shape or device that does not fit, H or I not a multiple of 32, a scale byte 255 (NaN), an
                unknown gate_up_order or activation.
        """
        order = _member("gate_up_order", GateUpOrder, gate_up_order)
        between = _member("activation", Activation, activation)
        w13, w2 = _flatten_blocks("w13", w13, "2I", "H"), _flatten_blocks("w2", w2, "H", "I")
        experts, hidden, inter = w13.shape[0], w13.shape[2] * 2, w13.shape[1] // 2
        _check_sizes("w13", w13, experts, hidden, inter)
        device = w13.device
        require_tensor("w13_scale", w13_scale, torch.uint8, (experts, 2 * inter, hidden // BLOCK), device)
        require_tensor("w2", w2, torch.uint8, (experts, hidden, inter // 2), device)
        require_tensor("w2_scale", w2_scale, torch.uint8, (experts, hidden, inter // BLOCK), device)
        if w13_bias is not None:
            require_tensor("w13_bias", w13_bias, _BIAS_DTYPES, (experts, 2 * inter), device)
        if w2_bias is not None:
            require_tensor("w2_bias", w2_bias, _BIAS_DTYPES, (experts, hidden), device)

        rows = _source_rows(order, inter, device)
        prepared_w13, prepared_w13_scale = _prepare("w13_scale", w13, w13_scale, rows)
        prepared_w2, prepared_w2_scale = _prepare("w2_scale", w2, w2_scale, None)
        return cls(
            w13=prepared_w13,
            w13_scale=prepared_w13_scale,
            w2=prepared_w2,
            w2_scale=prepared_w2_scale,
            w13_bias=None if w13_bias is None else w13_bias[:, rows].to(torch.float32).contiguous(),
            w2_bias=None if w2_bias is None else w2_bias.to(torch.float32, copy=True).contiguous(),
            activation=between,
            alpha=alpha,
            beta=beta,
            limit=limit,
            gate_up_order=order,
        )

    @classmethod
    def from_safetensors(
        cls,
        path: str | Path,
        *,
        layer: int,
        gate_up_order: GateUpOrder | str = GateUpOrder.INTERLEAVED,
        activation: Activation | str = Activation.SWIGLU_OAI,
        alpha: float = 1.702,
        beta: float = 1.0,
        limit: float | None = 7.0,
        device: torch.device | str = "cpu",
    ) -> MoEWeights:
        """Reads and prepares one layer of a checkpoint with gpt-oss's names; nothing but that layer is read.

        The names are ``model.layers.{layer}.mlp.experts.`` + gate_up_proj_blocks, gate_up_proj_scales,
        gate_up_proj_bias, down_proj_blocks, down_proj_scales, down_proj_bias.

        Args:
            path: a .safetensors file, or a directory with model.safetensors or with model.safetensors.index.json and
                the shards that it names.
            layer: layer number, from 0.
            gate_up_order, activation, alpha, beta, limit: as for `from_mxfp4`; the defaults are gpt-oss's.
            device: where to put the weights.

        Raises:
            FileNotFoundError: path, or the checkpoint in it, does not exist.
            ValueError: a tensor or shard is missing, or a file is malformed (names the tensor and the file).
        """
        if layer < 0:
            raise ValueError(f"layer: expected 0 or more, got {layer}")
        files = _tensor_files(Path(path))
        tensors = {
            argument: _read_tensor(files, f"model.layers.{layer}.mlp.experts.{suffix}", device)
            for argument, suffix in _SUFFIXES.items()
        }
        return cls.from_mxfp4(
            **tensors, gate_up_order=gate_up_order, activation=activation, alpha=alpha, beta=beta, limit=limit
        )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _source_rows(order: GateUpOrder, intermediate_size: int, device: torch.device) -> Tensor:
    """int64 [2I]: the checkpoint row that stands at each prepared row."""
    row = torch.arange(2 * intermediate_size, device=device)
    j, up = row // 16 * 8 + row % 8, row % 16 // 8
    if order is GateUpOrder.INTERLEAVED:
        return 2 * j + up
    return j + intermediate_size * (up if order is GateUpOrder.GATE_UP else 1 - up)


def _prepare(scale_name: str, packed: Tensor, scales: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    experts, n, half_k = packed.shape
    prepared = torch.empty((experts, n, half_k), dtype=torch.uint8, device=packed.device)
    tiles = (_ceil_div(n, 128), _ceil_div(half_k, 64), 512)
    prepared_scales = torch.empty((experts, *tiles), dtype=torch.uint8, device=packed.device)
    for e in range(experts):
        expert, expert_scales = packed[e], scales[e]
        if bool((expert_scales == 255).any()):
            row, block = (expert_scales == 255).nonzero()[0].tolist()
            raise ValueError(f"{scale_name}: expected E8M0 bytes 0..254, got 255 (NaN) at [{e}, {row}, {block}]")
        if rows is not None:
            expert, expert_scales = expert[rows], expert_scales[rows]
        prepared[e] = rotate_words(expert)
        prepared_scales[e] = swizzle_scales(expert_scales)
    return prepared, prepared_scales


def _restore(prepared: Tensor, prepared_scales: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    experts, n, half_k = prepared.shape
    packed = torch.empty_like(prepared)
    scales = torch.empty((experts, n, half_k // 16), dtype=torch.uint8, device=prepared.device)
    for e in range(experts):
        expert = unrotate_words(prepared[e])
        expert_scales = unswizzle_scales(prepared_scales[e], n, half_k * 2)
        packed[e] = expert if rows is None else expert[rows]
        scales[e] = expert_scales if rows is None else expert_scales[rows]
    return packed, scales


def _check_sizes(name: str, w13: Tensor, experts: int, hidden: int, inter: int) -> None:
    for size, what in ((hidden, "H (twice the last dimension)"), (inter, "I (half the rows)")):
        if size == 0 or size % BLOCK:
            raise ValueError(f"{name}: expected {what} a multiple of {BLOCK}, got {size} from {describe(w13)}")
    if experts == 0 or w13.shape[1] % 2:
        raise ValueError(f"{name}: expected at least one expert and an even number of rows, got {describe(w13)}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def _member(name: str, kind: type[_EnumT], value: object) -> _EnumT:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(repr(m.value) for m in kind)
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}") from None


def _flatten_blocks(name: str, blocks: Tensor, rows: str, k: str) -> Tensor:
    """[E, N, K/32, 16] -> [E, N, K/2]; three dimensions pass."""
    shape: tuple[int | str, ...] = ("E", rows, f"{k}/2")
    if isinstance(blocks, Tensor) and blocks.dim() == 4:
        shape = ("E", rows, f"{k}/32", 16)
    require_tensor(name, blocks, torch.uint8, shape)
    return blocks.flatten(2)


def _tensor_files(path: Path) -> Callable[[str], Path]:
    """The function from a tensor's name to the file that holds it."""
    if path.is_file():
        return lambda name: path
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return lambda name: single
    if not index.is_file():
        what = f"{single.name} or {index.name} in the directory" if path.is_dir() else "a file or directory"
        raise FileNotFoundError(f"path: expected {what}, got {path}")
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{index}: expected JSON with a "weight_map" object, got {error!r}') from error
    if not isinstance(shards, dict):
        raise ValueError(f'{index}: expected "weight_map" to be an object, got {type(shards).__name__}')

    def find(name: str) -> Path:
        if name not in shards:
            raise ValueError(f"{name}: no such tensor in {index}")
        shard = shards[name]
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{name}: expected the name of a file beside {index}, got {shard!r}")
        if not (path / shard).is_file():
            raise ValueError(f"{name}: {index} says {shard}, and there is no such file")
        return path / shard

    return find


def _read_tensor(files: Callable[[str], Path], name: str, device: torch.device | str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    file = files(name)
    try:
        with safe_open(file, framework="pt", device=str(device)) as reader:
            names = reader.keys()
            if name not in names:
                raise ValueError(f"{name}: no such tensor in {file}")
            tensor: Tensor = reader.get_tensor(name)
            return tensor
    except SafetensorError as error:
        raise ValueError(f"{name}: cannot be read from {file}: {error}") from error
