"""The weights among a call's arguments, and what `MoEWeights` becomes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .._arguments import require_tensor
from .._checkpoints.layers import RawLayer, flashinfer_layer, prepared_fields
from .._checkpoints.nvfp4_layers import flashinfer_nvfp4_layer
from .._checkpoints.options import GateUpOrder, shard_of, source_rows
from .._checkpoints.sources import Source, flashinfer_scales, mxfp4_source
from .._checkpoints.tensor_scales import refuse_values
from ..activations import Activation
from ..weights import MoEWeights, TensorScales
from .mixed_gemm import mixed_gemm_layer, mixed_gemm_source
from .modes import Mode
from .raw_memory import PutAside

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SWIGLU_NAMES = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
_LAYERS = {Mode.NVFP4: flashinfer_nvfp4_layer, Mode.BF16: mixed_gemm_layer}  # others as `flashinfer_layer`
_GLOBALS = ("fc1 global", "fc2 act global", "fc2 global", "fc1 act global")
# alpha, beta and limit where a call does not give them.
_DEFAULTS = {Activation.SWIGLU_STEP: (1.0, 0.0, 7.0), Activation.SITU: (1.0, 4.0, 25.0)}


class GivenWeights(NamedTuple):
    """The weights among a call's arguments, by their names there."""

    fc1_expert_weights: Tensor
    fc1_scale: Tensor
    fc2_expert_weights: Tensor
    fc2_scale: Tensor
    fc1_expert_biases: Tensor | None
    fc2_expert_biases: Tensor | None
    alpha: Tensor | None  # of the activation, whatever the call's names for them are
    beta: Tensor | None
    limit: Tensor | None
    fc1_global: Tensor | None  # the three of FP8 x MXFP4 and of NVFP4
    fc2_act_global: Tensor | None
    fc2_global: Tensor | None
    activation: Activation
    ranks: tuple[int, int, int, int]  # ep_rank, ep_size, tp_rank, tp_size
    number_names: tuple[str, str, str] = SWIGLU_NAMES  # of alpha, beta and limit
    fc1_act_global: Tensor | None = None  # of NVFP4 alone
    mode: Mode = Mode.MXFP8

    @property
    def is_nvfp4(self) -> bool:
        """Whether the weights are NVFP4, else MXFP4."""
        return self.mode is Mode.NVFP4

    @property
    def layer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the two GEMMs multiply with."""
        return (self.fc1_expert_weights, self.fc1_scale, self.fc2_expert_weights, self.fc2_scale)

    @property
    def rest(self) -> tuple[Tensor | None, ...]:
        """What else has a value for each expert."""
        return (*self[4:12], self.fc1_act_global)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors, layer and rest, as a caller knows them."""
        first, second, *others = _scale_names(self.mode)
        own = ("fc1_expert_weights", first, "fc2_expert_weights", second)
        return (*own, *self._fields[4:6], *self.number_names, *others)


@functools.cache
def _scale_names(mode: Mode) -> tuple[str, ...]:
    return tuple(map(mode.argument, ("fc1 scales", "fc2 scales", *_GLOBALS)))


def check_types(given: GivenWeights) -> None:
    """Raises a TypeError that names a value which is no tensor and had to be one."""
    required = 4
    for i, (name, value) in enumerate(zip(given.names, (*given.layer, *given.rest), strict=True)):
        if not isinstance(value, Tensor) and (value is not None or i < required):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


@torch.no_grad()
def prepare_layer(given: GivenWeights, set_aside: tuple[int, ...] = ()) -> MoEWeights:
    """The two GEMMs' weights, prepared, without biases and numbers.

    Args:
        set_aside: which of `layer` own their memory and lose it.

    Raises:
        TypeError, ValueError: as `MoEWeights.from_flashinfer`; then no memory is lost.
    """
    gated = given.activation.is_gated
    raw = _LAYERS.get(given.mode, flashinfer_layer)(*given.layer, None, None, gated)
    if not set_aside or given.is_nvfp4:
        return _prepared(given, raw)
    with PutAside([given.layer[i] for i in set_aside]) as aside:

        def tensor_of(which: int) -> Callable[[int], Tensor]:
            if which not in set_aside:
                return given.layer[which].__getitem__
            return lambda expert: aside.expert(set_aside.index(which), expert)

        def source(name: str, which: int, n: int, k: int) -> Source:
            weight, scales = tensor_of(which), tensor_of(which + 1)
            if given.mode is Mode.BF16:
                return mixed_gemm_source(name, weight, scales)
            return mxfp4_source(
                name, lambda e: weight(e).view(torch.uint8), lambda e: flashinfer_scales(scales(e), n, k)
            )

        width = raw.inter * (2 if gated else 1)
        w13, w2 = source("fc1_scale", 0, width, raw.hidden), source("fc2_scale", 2, raw.hidden, raw.inter)
        return _prepared(given, replace(raw, w13=w13, w2=w2))


def _prepared(given: GivenWeights, raw: RawLayer) -> MoEWeights:
    # Of the activation, only the rows' order counts here.
    stands_for = Activation.SWIGLU if given.activation.is_gated else Activation.IDENTITY
    numbers, whole = (1.0, 0.0, None), (0, 1, 0, 1)
    fields = prepared_fields(raw, GateUpOrder.UP_GATE, stands_for, numbers, whole, given.mode.activation_format)
    return MoEWeights(**fields)


@torch.no_grad()
def with_the_rest(layer: MoEWeights, given: GivenWeights) -> MoEWeights:
    """A prepared layer with a call's biases, numbers, activation and ranks; the weights are shared.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device; ranks that do not fit.
        NotImplementedError: global scales other than 1.
    """
    experts, hidden, device = layer.num_experts, layer.hidden_size, layer.device
    ep_rank, ep_size, tp_rank, tp_size = given.ranks
    all_experts = experts * ep_size if isinstance(ep_size, int) else 0
    first, _ = shard_of("ep", ep_rank, ep_size, all_experts, 1)
    shard_of("tp", tp_rank, tp_size, tp_size if isinstance(tp_size, int) else 0, 1)
    rows = source_rows(GateUpOrder.UP_GATE, layer.intermediate_size, given.activation.is_gated, device)
    w13_bias, w2_bias = given.fc1_expert_biases, given.fc2_expert_biases
    if w13_bias is not None:
        require_tensor("fc1_expert_biases", w13_bias, _FLOATS, (experts, len(rows)), device)
        w13_bias = w13_bias[:, rows].to(torch.float32).contiguous()
    if w2_bias is not None:
        require_tensor("fc2_expert_biases", w2_bias, _FLOATS, (experts, hidden), device)
        w2_bias = None if tp_rank else w2_bias.to(torch.float32, copy=True).contiguous()
    named = zip(given.number_names, (given.alpha, given.beta, given.limit), strict=True)
    alpha, beta, limit = (_number(name, value, experts, device) for name, value in named)
    no_alpha, no_beta, no_limit = _DEFAULTS.get(given.activation, (1.0, 0.0, None))
    if not given.is_nvfp4:
        _check_global_scales(given, experts, device)
    return replace(
        layer,
        tensor_scales=_nvfp4_scales(given, layer, experts, device) if given.is_nvfp4 else None,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        activation=given.activation,
        alpha=no_alpha if alpha is None else alpha,
        beta=no_beta if beta is None else beta,
        limit=no_limit if limit is None else limit,
        first_expert=first,
        num_global_experts=all_experts,
    )


def _number(name: str, value: Tensor | None, experts: int, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    of_all = name == "clamped_relu2_limit"
    require_tensor(name, value, torch.float32, (1 if of_all else experts,), device)
    return value.expand(experts).clone(memory_format=torch.contiguous_format)


def _nvfp4_scales(given: GivenWeights, layer: MoEWeights, experts: int, device: torch.device) -> TensorScales:
    """Of NVFP4: FlashInfer multiplies sums by *_global, which undoes the global scales of inputs and of weights both.

    So the weights' own is 1 / (global * act global); multiplied again by what undoes the input's it comes back but for
    a few roundings.
    """
    fc1, act, fc2, fc1_act = given.rest[5:]
    parts = 2 if given.activation.is_gated else 1
    acts = []
    for name, value in ((given.names[12], fc1_act), (given.names[10], act)):
        require_tensor(
            name, value, torch.float32, (experts,) if isinstance(value, Tensor) and value.dim() else (), device
        )
        assert value is not None
        refuse_values(name, value, multiplies=False)
        acts.append(value.expand(experts))
    for name, value in ((given.names[9], fc1), (given.names[11], fc2)):
        require_tensor(name, value, torch.float32, (experts,), device)
        assert value is not None
        refuse_values(name, value, multiplies=False)
    assert fc1 is not None
    assert fc2 is not None
    products = fc1 * acts[0], fc2 * acts[1]
    made = [product.reciprocal() for product in products]
    for i, (factors, act_factors) in enumerate(((9, 12), (11, 10))):
        for values in (products[i], made[i]):  # each finite by itself; what is computed with is this
            refuse_values(f"{given.names[factors]} * {given.names[act_factors]}", values, multiplies=False)
    return TensorScales(
        w13=made[0].unsqueeze(1).repeat(1, parts),
        w2=made[1],
        w13_input=acts[0].unsqueeze(1).repeat(1, parts),
        w2_input=acts[1].clone(),
        divide=True,
    )


def _check_global_scales(given: GivenWeights, experts: int, device: torch.device) -> None:
    """Those of FP8 x MXFP4: with MXFP8 between the GEMMs, what quantizes there and what undoes it cancel."""
    fc1, act, fc2 = given.rest[5:8]
    if fc1 is None or act is None or fc2 is None:
        return
    of_fc1, of_act, of_fc2 = given.names[9:12]
    require_tensor(of_fc1, fc1, torch.float32, (experts,), device)
    require_tensor(of_fc2, fc2, torch.float32, (experts,), device)
    require_tensor(of_act, act, torch.float32, (experts,) if isinstance(act, Tensor) and act.dim() else (), device)
    for names, value in ((of_fc1, fc1), (f"{of_act}, {of_fc2}", act * fc2)):
        if bool((value != 1).any()):
            what = "a global scale of 1" if "," not in names else "global scales whose product is 1"
            raise NotImplementedError(
                f"{names}: this library has {what} only, since E8M0 scales cannot hold others; got "
                f"{value.flatten()[(value != 1).flatten()][0].item():g}; multiply the weights by it"
            )
