"""What the rivals that use vLLM's MoE operators share: the router, and rows put in blocks of one expert each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .packages import Found

if TYPE_CHECKING:
    from torch import Tensor

    from ..inputs import CallInputs


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Slots sorted by expert, each expert's padded to whole blocks of `size` rows."""

    size: int
    slots: Tensor  # int32; T * k stands for padding
    experts: Tensor  # int32, one for each block
    padded: Tensor  # int32 [1]


def load(found: Found) -> Any:
    """`torch.ops._moe_C`, with the library's operators in it."""
    import torch

    torch.ops.load_library(str(found.path))  # type: ignore[no-untyped-call]
    return torch.ops._moe_C


class Router:
    """Buffers for one call's top-k and its blocks; `run` fills them."""

    def __init__(self, ops: Any, inputs: CallInputs, top_k: int) -> None:
        import torch

        tokens, device = inputs.tokens, inputs.logits.device
        self._ops, self._logits = ops, inputs.logits
        self.weights = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
        self.ids = torch.empty(tokens, top_k, dtype=torch.int32, device=device)
        self._source = torch.empty_like(self.ids)

    def run(self) -> None:
        """The router's kernel: softmax over the chosen logits."""
        self._ops.topk_softmax(self.weights, self.ids, self._source, self._logits, True, None)

    def blocks(self, size: int, experts: int) -> tuple[Blocks, Callable[[], None]]:
        """Buffers for blocks of this size, and the call that fills them after `run`."""
        import torch

        slots = self.ids.numel()
        bound = min(slots + experts * (size - 1), slots * size)

        def empty(length: int) -> Tensor:
            return torch.empty(length, dtype=torch.int32, device=self.ids.device)

        blocks = Blocks(size=size, slots=empty(bound), experts=empty(-(-bound // size)), padded=empty(1))

        def fill() -> None:
            self._ops.moe_align_block_size(self.ids, experts, size, blocks.slots, blocks.experts, blocks.padded, None)

        return blocks, fill
