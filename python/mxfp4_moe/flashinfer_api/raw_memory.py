"""The memory of raw weights: put aside while they are prepared, and given back to torch afterwards.

A prepared layer is one block per GEMM, codes and scales together, and a raw one two: neither fits into the other's
memory. So that both need not be there at once, the raw tensors are copied aside (from a GPU to the host, on the CPU to
a file without a name), their memory is freed, and experts come back one at a time.

A tensor whose memory is gone still has its shape, dtype and place among the arguments of a call. Whoever reads it is
told by torch, in the words of `freed_message`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

# CUDA builds of torch have it, for the outputs of its own CUDA graphs.
_REFUSE_READS = getattr(torch._C, "_set_storage_data_ptr_access_error_msg", None)


def can_refuse_reads() -> bool:
    """Whether this torch can answer a read of freed memory with an error; without that nothing is freed."""
    return _REFUSE_READS is not None


def owns_its_memory(tensor: Tensor) -> bool:
    """Whether freeing the tensor's storage frees this tensor and nothing else."""
    storage = tensor.untyped_storage()
    return storage.resizable() and tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and tensor.nbytes > 0


def is_freed(tensor: Tensor) -> bool:
    """Whether the memory of a tensor that is not empty has been given back."""
    return tensor.untyped_storage().nbytes() == 0 and tensor.numel() > 0


def freed_message(name: str) -> str:
    """What a reader of a freed tensor gets to read."""
    return (
        f"{name}: expected raw weights, got a tensor of those that cutlass_fused_moe has prepared, whose memory was "
        "freed then; only calls of it can still take them; with raw_weights='keep', there or in set_raw_weights, raw "
        "weights stay as they are"
    )


def refuse_reads(name: str, storage: torch.UntypedStorage) -> None:
    """Frees a storage; from now on, torch answers each read of its tensor with `freed_message`."""
    assert _REFUSE_READS is not None
    storage.resize_(0)
    _REFUSE_READS(storage._cdata, freed_message(name))


class PutAside:
    """Copies of tensors [E, ...] elsewhere while this context lasts, in place of their own memory, which is freed.

    If an error leaves the context, the tensors get their memory and their values back.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._copies: list[Tensor] = []

    def expert(self, which: int, expert: int) -> Tensor:
        """One expert's part of one of the tensors, where the tensor was."""
        return self._copies[which][expert].to(self._tensors[which].device, copy=True)

    def __enter__(self) -> PutAside:
        self._copies = [_copied(tensor) for tensor in self._tensors]
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            for tensor, copy in zip(self._tensors, self._copies, strict=True):
                tensor.untyped_storage().resize_(tensor.nbytes)
                tensor.untyped_storage().copy_(copy.untyped_storage())
        self._copies.clear()


def _copied(tensor: Tensor) -> Tensor:
    if not tensor.is_cpu:
        return tensor.cpu()
    with tempfile.NamedTemporaryFile(prefix="mxfp4-moe-") as file:  # nameless once it is mapped
        copy = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return copy.view(tensor.shape).copy_(tensor)
