"""How much memory torch has at once."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# How safetensors shows a mapped file, and a mapped file itself: they take no memory.
_MAPPED = (torch.ops.aten.set_.source_Storage, torch.ops.aten.from_file.default)


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of all storages made under it, and the most that were alive after any one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in before and func not in _MAPPED:
                self.alive[storage._cdata] = StorageWeakRef(storage)
        self.alive = {key: ref for key, ref in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(map(_bytes, self.alive.values())))
        return out


def _bytes(ref: StorageWeakRef) -> int:
    """As many as the storage has by now: it may have been resized."""
    storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    return 0 if storage is None else storage.nbytes()
