"""Weights that stay prepared between calls: FlashInfer passes them raw with every call.

An entry is known by the memory that its tensors lie in, is used as long as torch has counted no write to them, and goes
with the first of their storages that is freed.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._arguments import require_tensor
from ..activations import Activation
from ..weights import MoEWeights


@dataclass(frozen=True, eq=False)
class _Entry:
    versions: tuple[int, ...]
    weights: MoEWeights
    finalizers: tuple[weakref.finalize[Any, Any], ...]


_entries: dict[tuple[object, ...], _Entry] = {}
_preparing = threading.RLock()


def forget_weights() -> None:
    """Frees all prepared weights; the next call with any weights prepares them again."""
    for key in tuple(_entries):
        _forget(key)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph must not take what it found once for constant
def prepared_weights(
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Tensor | None, ...],
    activation: Activation,
    ranks: tuple[int, int, int, int],
) -> MoEWeights:
    """The weights of a call: those that an earlier call with the same tensors prepared, else prepared now.

    Args:
        tensors: weights and scales of the two GEMMs, then their biases, as `cutlass_fused_moe` takes them.
        numbers: swiglu_alpha, swiglu_beta, swiglu_limit.
        activation: what stands between the GEMMs.
        ranks: ep_rank, ep_size, tp_rank, tp_size.
    """
    given = [tensor for tensor in (*tensors, *numbers) if tensor is not None]
    for tensor in given:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"weights, scales, biases and swiglu numbers: expected tensors, got {type(tensor).__name__}"
            )
    # The storage stands for the memory: views of it come and go with every call. Its wrapper lives as long as it does.
    places = tuple(
        None if t is None else (id(t.untyped_storage()), t.data_ptr(), t.shape, t.stride(), t.dtype)
        for t in (*tensors, *numbers)
    )
    key = (*places, activation, ranks)
    versions = tuple(-1 if t.is_inference() else t._version for t in given)
    entry = _entries.get(key)
    if entry is not None and entry.versions == versions:
        return entry.weights
    with _preparing:
        entry = _entries.get(key)
        if entry is None or entry.versions != versions:
            _forget(key)
            weights = _prepare(tensors, numbers, activation, ranks)
            storages = {id(storage): storage for storage in (t.untyped_storage() for t in given)}
            finalizers = tuple(weakref.finalize(storage, _forget, key) for storage in storages.values())
            for finalizer in finalizers:
                finalizer.atexit = False
            entry = _entries[key] = _Entry(versions, weights, finalizers)
    return entry.weights


def _prepare(
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Tensor | None, ...],
    activation: Activation,
    ranks: tuple[int, int, int, int],
) -> MoEWeights:
    fc1, fc1_scale, fc2, fc2_scale, fc1_biases, fc2_biases = tensors
    assert fc1 is not None
    if fc1.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "fc1_expert_weights: expected weights that an earlier call has prepared, got new ones while a CUDA graph "
            "is captured; call cutlass_fused_moe once before the capture"
        )
    for name, number in zip(("swiglu_alpha", "swiglu_beta", "swiglu_limit"), numbers, strict=True):
        if number is not None:
            require_tensor(name, number, torch.float32, (fc1.shape[0],), fc1.device)
    alpha, beta, limit = (None if number is None else number.contiguous() for number in numbers)
    no_limit = 7.0 if activation is Activation.SWIGLU_STEP else None
    weights = MoEWeights.from_flashinfer(
        fc1,
        fc1_scale,  # type: ignore[arg-type]  # None is refused by name
        fc2,  # type: ignore[arg-type]
        fc2_scale,  # type: ignore[arg-type]
        fc1_expert_biases=fc1_biases,
        fc2_expert_biases=fc2_biases,
        activation=activation,
        alpha=1.0 if alpha is None else alpha,
        beta=0.0 if beta is None else beta,
        limit=no_limit if limit is None else limit,
        ep_rank=ranks[0],
        ep_size=ranks[1],
        tp_rank=ranks[2],
        tp_size=ranks[3],
    )
    if fc1.is_cuda:  # calls on other streams find them without waiting
        torch.cuda.current_stream(fc1.device).synchronize()
    return weights


def _forget(key: tuple[object, ...]) -> None:
    entry = _entries.pop(key, None)
    if entry is not None:
        for finalizer in entry.finalizers:
            finalizer.detach()
