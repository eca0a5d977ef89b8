"""What weights need to be multiplied in float16: factors for each matrix, made when they are first asked for.

`formats.fp16_weights` has the rule. Nothing of the prepared weights changes: kernels read the same bytes for bfloat16
and for float16 activations, and find in the factor what an expert's scales are relative to. NVFP4's factors are its
own, times what its weights are divided by: no code is read for them, so weights have them from the start.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._arguments import has_values
from .._torch_state import exact
from ..formats import (
    FP16_EXACT_BINADES,
    FP16_NVFP4_UNIT,
    WeightFormat,
    WordOrder,
    count_rounded_in_fp16,
    fp16_factor,
    scale_ends,
)
from .prepare import pieces_of

Factors = tuple[Tensor, Tensor]
_W = TypeVar("_W", bound="InFloat16")


class InFloat16:
    """The part of `MoEWeights` (which is above this room) that is about activation_format "fp16"."""

    # Of w13's sums and of w2's, and the tensors' versions that they are of; None: their owner keeps them in step.
    _fp16: tuple[Factors, tuple[int, ...] | None] | None = None
    _no_fp16 = ""  # why NVFP4 weights have none

    def fp16_factors(self) -> Factors:
        """What the sums of the two GEMMs are multiplied by for the weights where activations are float16.

        Of MXFP4 `formats.fp16_factor` of each expert's matrix; one warning says how many weights are rounded, if any.
        They are made in the first call, and again after a write to w13 or w2 that torch counts; a write that it does
        not count (by another library's kernel, or to a tensor of inference mode) takes `engines.update_fp16_factors`.
        The tensors stay the same, so that a CUDA graph reads what is new. Those of NVFP4 are made with the weights.

        Returns:
            float32 [E, 2] twice: of columns c with c % 16 < 8, and of the others. Of MXFP4 both are the same, because
            gates and ups are relative to the same scale.

        Raises:
            RuntimeError: they have to be made while a CUDA graph is captured.
            ValueError: an NVFP4 scale times 2^7 that float32 does not hold; MXFP4 weights of fake or meta tensors.
        """
        made = self._fp16
        if made is not None and made[1] in (None, _versions(self)):
            return made[0]
        self.update_fp16_factors()
        assert self._fp16 is not None
        return self._fp16[0]

    def _fp16_in_graph(self) -> Factors:
        """`fp16_factors` where a graph is traced, which has no values that they could be made of.

        Raises:
            ValueError: MXFP4 weights that have none yet; NVFP4 weights that `fp16_factors` refuses.
        """
        if self._fp16 is None:
            weights: Any = self
            raise ValueError(
                self._no_fp16
                or "weights: expected ones that are ready for activation_format 'fp16' under torch.compile and "
                f"torch.export; take weights.to('{weights.device}', activation_format='fp16') outside of the graph"
            )
        return self._fp16[0]

    def update_fp16_factors(self) -> None:
        """Makes `fp16_factors` anew."""
        weights: Any = self
        if _is_captured(weights):
            raise RuntimeError(
                "weights: expected ones that are ready for activation_format 'fp16' while a CUDA graph is captured, "
                "got some that were never called with it, or written since; call once before, or take "
                f"weights.to('{weights.device}', activation_format='fp16')"
            )
        with torch.inference_mode(False), torch.no_grad():  # what is made once is written again outside of it
            made = _nvfp4(weights) if weights.weight_format is WeightFormat.NVFP4 else _mxfp4(weights)
            if self._fp16 is not None:
                for kept, new in zip(self._fp16[0], made, strict=True):
                    kept.copy_(new)
                made = self._fp16[0]
            if weights.w13.is_cuda and has_values(weights.w13):  # other threads' streams read them from now on
                torch.cuda.current_stream(weights.device).synchronize()
        owned = self._fp16 is not None and self._fp16[1] is None
        self.__dict__["_fp16"] = made, None if owned else _versions(self)  # of a frozen dataclass

    def _read_fp16_factors_of(self, owner: Factors) -> None:
        """From now on the factors are these tensors, whose owner writes them when it writes w13 or w2."""
        self.__dict__["_fp16"] = owner, None

    def _made_with_nvfp4(self) -> None:
        """Makes the factors of NVFP4 weights that are being made; one that float32 does not hold is kept for calls."""
        if torch.compiler.is_compiling() or _is_captured(self):
            return
        try:
            self.update_fp16_factors()
        except ValueError as error:
            self.__dict__["_no_fp16"] = str(error)


def ready_for(weights: _W, activation_format: str | None) -> _W:
    """The weights, with what calls in this format will ask for."""
    if activation_format == "fp16":
        weights.fp16_factors()
    return weights


def _is_captured(weights: Any) -> bool:
    fake = type(weights.w13).__name__ == "FakeTensor"  # which needs no CUDA
    return weights.device.type == "cuda" and not fake and torch.cuda.is_current_stream_capturing()


def _versions(weights: Any) -> tuple[int, ...]:
    if weights.weight_format is WeightFormat.NVFP4:  # of no code
        return ()
    w13, w2 = weights.w13, weights.w2
    return -1 if w13.is_inference() else w13._version, -1 if w2.is_inference() else w2._version


@exact
def _nvfp4(weights: Any) -> Factors:
    _, own = weights.operator_arguments
    made = own["w13_factors"] * FP16_NVFP4_UNIT, own["w2_factors"] * FP16_NVFP4_UNIT
    if has_values(made[0]) and not bool(torch.cat(made).isfinite().all()):
        raise ValueError(
            "weights: expected NVFP4 scales per tensor below 2^121 for activation_format 'fp16', whose sums are "
            "multiplied by 2^7 times them, got a larger one; activation_format 'bf16' takes it"
        )
    return made


def _mxfp4(weights: Any) -> Factors:
    hidden, inter, order = weights.hidden_size, weights.intermediate_size, weights.word_order
    if not has_values(weights.w13):
        raise ValueError(
            f"weights: expected ones with values for activation_format 'fp16', got {weights!r} of fake or meta tensors"
        )
    made = [_of_matrix(weights.w13, weights.w13_rows, hidden, order), _of_matrix(weights.w2, hidden, inter, order)]
    rounded = sum(count for _, count in made)
    if rounded:
        codes = weights.num_experts * inter * hidden * (3 if weights.activation.is_gated else 2)
        warnings.warn(
            f"activation_format 'fp16': {rounded} of {codes} weights of {weights!r} are rounded, because their scales "
            f"are more than 2^{FP16_EXACT_BINADES} below the largest of their expert's matrix; 'bf16' and 'mxfp8' hold "
            "all of them exactly",
            RuntimeWarning,
            stacklevel=2,
        )
    w13, w2 = (factors.unsqueeze(1).expand(-1, 2).contiguous() for factors, _ in made)
    return w13, w2


def _of_matrix(weight: Tensor, n: int, k: int, order: WordOrder) -> tuple[Tensor, int]:
    """Factors float32 [E] of one matrix of each expert, and how many of its weights are rounded."""
    kind, ends = WeightFormat.MXFP4, []
    for one in weight:
        found = [scale_ends(*kind.read_rows(one, n, k, piece, order)) for piece in pieces_of(n)]
        largest, smallest = zip(*found, strict=True)
        ends.append((torch.stack(largest).amax(), torch.stack(smallest).amin()))
    largest_of = torch.stack([largest for largest, _ in ends])
    span = largest_of - torch.stack([smallest for _, smallest in ends])
    rounded = 0
    for e in (span > FP16_EXACT_BINADES).nonzero().flatten().tolist():
        for piece in pieces_of(n):
            rounded += int(count_rounded_in_fp16(*kind.read_rows(weight[e], n, k, piece, order), largest_of[e]))
    return fp16_factor(largest_of), rounded
