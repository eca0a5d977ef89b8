"""Weights that stay prepared between calls: FlashInfer passes them raw with every call.

A layer is known by the storages that its tensors lie in, is used as long as torch has counted no write to them, and
goes with the first of them that dies. What a call adds to the two GEMMs' weights (biases, numbers of the activation,
ranks) is small and kept beside them, so that calls which differ in that alone share one prepared layer.

The raw weights are a second copy that no call reads any more. `set_raw_weights` says what becomes of it.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._arguments import describe
from ..weights import MoEWeights
from .given_weights import GivenWeights, check_types, prepare_layer, with_the_rest
from .raw_memory import can_refuse_reads, freed_message, is_freed, owns_its_memory, refuse_reads

_CHOICES = ("auto", "release", "keep")
# With "auto", raw weights stay while all that stay take less than this part of a GPU's memory: a few layers of a script
# or a test, and never a model.
_KEPT_PART = 8

Key = tuple[object, ...]
Finalizers = tuple["weakref.finalize[Any, Any]", ...]


@dataclass(frozen=True, eq=False)
class _Call:
    versions: tuple[int, ...]
    weights: MoEWeights
    finalizers: Finalizers


@dataclass(eq=False)
class _Layer:
    versions: tuple[int, ...]
    weights: MoEWeights  # without what calls add
    finalizers: Finalizers
    raw_bytes: int  # of raw tensors that may still be freed, by "auto"
    released: bool
    calls: dict[Key, _Call] = field(default_factory=dict)


_layers: dict[Key, _Layer] = {}
_preparing = threading.RLock()
_choice = "auto"
_full: set[torch.device] = set()  # where "auto" frees


def set_raw_weights(choice: str) -> str:
    """What becomes of raw weights once they are prepared, for calls that do not say it themselves.

    - ``"release"``: their memory is freed. While a layer is prepared, no more memory is needed on its device than for
      the layer and two experts; the raw tensors wait on the host (of CPU tensors, in a temporary file). Whoever reads
      a freed tensor is told so by torch, with the tensor's name; calls of `cutlass_fused_moe` go on to take it. Needs
      a CUDA build of torch, and tensors that have their storages for themselves.
    - ``"keep"``: they stay, so there are two copies.
    - ``"auto"``, the default: they stay on the CPU, and on a GPU as long as the raw weights of all prepared layers take
      less than an eighth of its memory. Beyond that they are freed, those of earlier layers at their next call, and a
      warning says so once.

    Returns:
        The choice until now.

    Raises:
        ValueError: another choice.
    """
    global _choice
    before, _choice = _choice, _checked(choice)
    return before


def forget_weights() -> None:
    """Frees prepared weights; the next call prepares them again. Those whose raw weights were freed stay."""
    for key, layer in tuple(_layers.items()):
        if not layer.released:
            _forget(key)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph must not take what it found once for constant
def prepared_weights(given: GivenWeights, raw_weights: str | None = None) -> MoEWeights:
    """The weights of a call: those that an earlier call with the same tensors prepared, else prepared now.

    Args:
        raw_weights: what becomes of the raw ones; None for the choice of `set_raw_weights`.

    Raises:
        RuntimeError: raw weights that were freed, or new ones while a CUDA graph is captured.
        TypeError, ValueError, NotImplementedError: as `prepare_layer` and `with_the_rest`; another choice.
    """
    check_types(given)
    key: Key = (*map(_place, given.layer), given.activation.is_gated)
    own_key: Key = (*map(_place, given.rest), given.activation, given.ranks)
    versions, own_versions = tuple(map(_version, given.layer)), tuple(map(_version, given.rest))
    choice = _choice if raw_weights is None else _checked(raw_weights)
    layer = _layers.get(key)
    if layer is not None and layer.versions == versions:
        call = layer.calls.get(own_key)
        if call is not None and call.versions == own_versions:
            if layer.raw_bytes and choice == "auto" and layer.weights.device in _full:
                _release_later(layer, given)
            return call.weights
    with _preparing:
        layer = _layers.get(key)
        if layer is None or layer.versions != versions:
            _refuse_capture(given)
            _forget(key)
            layer = _prepared(given, versions, choice)
            layer.finalizers = _when_freed(given.layer, _forget, key)
            _layers[key] = layer
        call = layer.calls.get(own_key)
        if call is None or call.versions != own_versions:
            _refuse_capture(given)
            _forget_call(key, own_key)
            weights = with_the_rest(layer.weights, given)
            _wait_for(weights)
            call = _Call(own_versions, weights, _when_freed(given.rest, _forget_call, key, own_key))
            layer.calls[own_key] = call
    return call.weights


# ---- preparing -------------------------------------------------------------------------------------------------------


def _prepared(given: GivenWeights, versions: tuple[int, ...], choice: str) -> _Layer:
    for name, tensor in zip(given.names, given.layer, strict=False):
        if is_freed(tensor):
            raise RuntimeError(freed_message(name))
    owned = tuple(i for i, tensor in enumerate(given.layer) if owns_its_memory(tensor))
    raw_bytes = sum(given.layer[i].nbytes for i in owned)
    release = choice == "release" or (choice == "auto" and _is_full(given.fc1_expert_weights.device, raw_bytes))
    if choice == "release":
        _require_release(given, owned)
    weights = prepare_layer(given, owned if release else ())
    _wait_for(weights)
    if release:
        _free(given, owned)
    kept = raw_bytes if choice == "auto" and not release else 0
    return _Layer(versions=versions, weights=weights, finalizers=(), raw_bytes=kept, released=release and bool(owned))


def _free(given: GivenWeights, which: Iterable[int]) -> None:
    for i in which:
        refuse_reads(given.names[i], given.layer[i].untyped_storage())


def _release_later(layer: _Layer, given: GivenWeights) -> None:
    """The raw weights of a layer that "auto" kept; the call that has them has just found them unchanged."""
    with _preparing:
        if layer.raw_bytes and not _captures(given):
            layer.raw_bytes, layer.released = 0, True
            _free(given, [i for i, tensor in enumerate(given.layer) if owns_its_memory(tensor)])


def _is_full(device: torch.device, more: int) -> bool:
    """Whether raw weights beside prepared ones would take more of the device than "auto" lets them."""
    if device.type != "cuda" or not can_refuse_reads():
        return False
    kept = sum(layer.raw_bytes for layer in _layers.values() if layer.weights.device == device)
    total = torch.cuda.get_device_properties(device).total_memory
    if device not in _full and (kept + more) * _KEPT_PART > total:
        _full.add(device)
        warnings.warn(
            f"cutlass_fused_moe: raw weights and prepared ones are two copies, by now of {(kept + more) / 1e9:.1f} GB "
            f"on {device}, so the raw ones are freed as they are prepared; set_raw_weights('release') says so from the "
            "start and without this warning, set_raw_weights('keep') keeps them",
            RuntimeWarning,
            stacklevel=2,
        )
    return device in _full


def _require_release(given: GivenWeights, owned: tuple[int, ...]) -> None:
    if not can_refuse_reads():
        raise RuntimeError(
            "raw_weights: 'release' needs a CUDA build of torch, which can answer reads of freed tensors with an "
            f"error, you have torch {torch.__version__}; 'keep' and 'auto' free nothing here"
        )
    for i, (name, tensor) in enumerate(zip(given.names, given.layer, strict=False)):
        if i not in owned:
            raise ValueError(
                f"{name}: expected a tensor with a storage of its own, which raw_weights='release' can free, got "
                f"{describe(tensor)} in a storage of {tensor.untyped_storage().nbytes()} bytes; clone it, or 'keep' it"
            )


def _refuse_capture(given: GivenWeights) -> None:
    if _captures(given):
        raise RuntimeError(
            "fc1_expert_weights: expected weights that an earlier call has prepared, got new ones while a CUDA graph "
            "is captured; call cutlass_fused_moe once before the capture"
        )


def _captures(given: GivenWeights) -> bool:
    return given.fc1_expert_weights.is_cuda and torch.cuda.is_current_stream_capturing()


def _wait_for(weights: MoEWeights) -> None:
    if weights.device.type == "cuda":  # calls on other streams find them without waiting
        torch.cuda.current_stream(weights.device).synchronize()


def _checked(choice: str) -> str:
    if choice not in _CHOICES:
        raise ValueError(f"raw_weights: expected one of {', '.join(map(repr, _CHOICES))}, got {choice!r}")
    return choice


# ---- keys, and their ends --------------------------------------------------------------------------------------------


def _place(tensor: Tensor | None) -> object:
    """The storage stands for the memory: views of it come and go with every call. Its wrapper lives as long as it."""
    if tensor is None:
        return None
    return (id(tensor.untyped_storage()), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _when_freed(tensors: Iterable[Tensor | None], function: Callable[..., None], *args: object) -> Finalizers:
    storages = {id(storage): storage for storage in (t.untyped_storage() for t in tensors if t is not None)}
    finalizers = tuple(weakref.finalize(storage, function, *args) for storage in storages.values())
    for finalizer in finalizers:
        finalizer.atexit = False
    return finalizers


def _forget(key: Key) -> None:
    layer = _layers.pop(key, None)
    if layer is not None:
        for finalizer in (*layer.finalizers, *(one for call in layer.calls.values() for one in call.finalizers)):
            finalizer.detach()


def _forget_call(key: Key, own_key: Key) -> None:
    layer = _layers.get(key)
    call = None if layer is None else layer.calls.pop(own_key, None)
    if call is not None:
        for finalizer in call.finalizers:
            finalizer.detach()
