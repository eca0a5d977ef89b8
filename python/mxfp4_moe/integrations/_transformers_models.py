"""What replace_experts has to know of a transformers model before it may touch it: which layers, whose, and where."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checkpoints.config import read_config
from .._checkpoints.contents import LayerSizes, choose_layer, layer_sizes
from .._checkpoints.files import Checkpoint
from .._checkpoints.schemes import GPT_OSS
from ..formats import BLOCK

EXPERTS = "GptOssExperts"
_PACKED = "Mxfp4GptOssExperts"
_CALLED_WITH = (  # what is passed behind the hidden states, [T, k] each, by the names that versions have for them
    ("router_indices", "routing_weights"),
    ("top_k_index", "top_k_weights"),
)
_PARAMETERS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_MODEL_TYPE = "gpt_oss"


@dataclass(frozen=True, kw_only=True)
class FoundExperts:
    """The experts of one layer of a model.

    Attributes:
        name: of the module, from the model that was given.
        number: the layer's own, or None where nothing tells.
        device: where its inputs come.
        config: the model's configuration, or None where no module of the layer has it.
    """

    name: str
    module: Any
    number: int | None
    device: torch.device
    config: Any

    @property
    def is_meta(self) -> bool:
        """Whether the weights are elsewhere: not made yet, or offloaded."""
        return any(getattr(self.module, name).device.type == "meta" for name in _PARAMETERS)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, H and I."""
        experts, hidden, rows = self.module.gate_up_proj.shape
        return experts, hidden, rows // 2


def find_experts(model: nn.Module, done: type[nn.Module]) -> list[FoundExperts]:
    """The experts of every layer that still has transformers' own; `done` are those that were replaced.

    Raises:
        TypeError: experts that this library cannot stand in for; says which, and what to do.
        ValueError: no experts at all, or sizes that are no multiples of 32.
    """
    modules = dict(model.named_modules())
    found = [_found(modules, name) for name, module in modules.items() if _kind(module) == EXPERTS]
    if found:
        numbers = [experts.number for experts in found if experts.number is not None]
        twice = sorted({number for number in numbers if numbers.count(number) > 1})
        if twice:
            names = ", ".join(experts.name for experts in found if experts.number in twice)
            raise ValueError(
                f"model: expected layers with numbers of their own, got layer {twice[0]} more than once: {names}"
            )
        return found
    if any(_kind(module) == _PACKED for module in modules.values()):
        raise TypeError(
            f"model: expected experts as transformers dequantizes them, got {_PACKED}; "
            "load it with quantization_config=Mxfp4Config(dequantize=True)"
        )
    if any(isinstance(module, done) for module in modules.values()):
        return []
    others = sorted({_kind(module) for module in modules.values() if "expert" in _kind(module).lower()})
    having = f"with {', '.join(others)}" if others else "without any"
    raise ValueError(f"model: expected a model with {EXPERTS}, got {_kind(model)} {having}")


def _found(modules: dict[str, nn.Module], name: str) -> FoundExperts:
    experts: Any = modules[name]
    shown = name or _kind(experts)
    _check_version(experts, shown)
    for parameter in _PARAMETERS:
        tensor = getattr(experts, parameter, None)
        if not isinstance(tensor, Tensor) or type(tensor).__name__ == "DTensor":
            got = "DTensor, sharded by transformers" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{shown}: expected {parameter} as a tensor of the whole layer, got {got}")
    above = _above(modules, name)
    for path, module in above:
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False) and getattr(hook, "place_submodules", False):
            raise ValueError(
                f"{path or _kind(module)}: expected a layer whose modules are placed one by one, got one that "
                "accelerate offloads as a whole; load the model without offloading it"
            )
    found = FoundExperts(
        name=name, module=experts, number=_number(modules, name), device=_device(experts, above), config=_config(above)
    )
    count, hidden, inter = found.sizes
    expected = {
        "gate_up_proj": (count, hidden, 2 * inter),
        "gate_up_proj_bias": (count, 2 * inter),
        "down_proj": (count, inter, hidden),
        "down_proj_bias": (count, hidden),
    }
    for parameter, shape in expected.items():
        here = list(getattr(experts, parameter).shape)
        if here != list(shape):
            raise ValueError(f"{shown}: expected {parameter} {list(shape)}, as {EXPERTS} has it, got {here}")
    if hidden % BLOCK or inter % BLOCK or not count:
        raise ValueError(f"{shown}: expected sizes that are multiples of {BLOCK}, got H = {hidden}, I = {inter}")
    return found


def _check_version(experts: Any, shown: str) -> None:
    """Only experts that are called as those of version 5: ids and weights of the chosen experts, [T, k] each."""
    kind = type(experts)
    if kind.__module__.split(".")[0] == "transformers":
        version = str(getattr(sys.modules.get("transformers"), "__version__", "0"))
        if not version.split(".")[0].isdecimal() or int(version.split(".")[0]) < 5:
            raise TypeError(
                f"{shown}: expected transformers 5 or newer, whose experts are called with a weight for each chosen "
                f"expert, got {version}; pip install -U transformers"
            )
    names = tuple(inspect.signature(kind.forward).parameters)[2:]
    if names not in _CALLED_WITH:
        expected = " or ".join(f"(hidden_states, {', '.join(some)})" for some in _CALLED_WITH)
        raise TypeError(
            f"{shown}: expected experts that are called with {expected}, got {names}; this version of transformers is "
            "not one that mxfp4-moe knows, so update the older of the two"
        )


def _above(modules: dict[str, nn.Module], name: str) -> list[tuple[str, nn.Module]]:
    """The module and those that hold it, the innermost first."""
    paths = [name]
    while paths[-1]:
        paths.append(paths[-1].rpartition(".")[0])
    return [(path, modules[path]) for path in paths if path in modules]


def _number(modules: dict[str, nn.Module], name: str) -> int | None:
    """A layer's own number, which its attention keeps (layer_idx) whatever list the layer was put into."""
    for _, module in _above(modules, name):
        if isinstance(module, nn.ModuleList):
            return None  # what is in it beside our layer are other layers
        for holder in (module, *module.children()):
            number = getattr(holder, "layer_idx", None)
            if isinstance(number, int) and not isinstance(number, bool):
                return number
    return None


def _config(above: list[tuple[str, nn.Module]]) -> Any:
    for _, module in above:
        for holder in (module, *module.modules()):
            config = getattr(holder, "config", None)
            if getattr(config, "model_type", None) == _MODEL_TYPE:
                return config
    return None


def _device(experts: Any, above: list[tuple[str, nn.Module]]) -> torch.device:
    own: torch.device = experts.gate_up_proj.device
    if own.type != "meta":
        return own
    for _, module in above:
        execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if execution is not None:
            return torch.empty(0, dtype=torch.uint8, device=execution).device
    for _, module in above:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type != "meta":
                return tensor.device
    return torch.device("cpu")


def check_checkpoint(found: list[FoundExperts], path: str | Path) -> None:
    """Compares every layer with what a checkpoint has under its number, from headers alone.

    Raises:
        ValueError: a layer whose number is not known, that the checkpoint lacks, or that is of another model.
        FileNotFoundError: as `Checkpoint`.
    """
    with Checkpoint(path) as checkpoint:
        config = read_config(checkpoint.folder)
        for experts in found:
            if experts.number is None:
                raise ValueError(
                    f"{experts.name or EXPERTS}: expected a part of a model that tells its layer's number (layer_idx "
                    "of its attention), got one that does not; pass the model, or whole decoder layers of it"
                )
            sizes = layer_sizes(checkpoint, choose_layer(checkpoint, experts.number, among=GPT_OSS))
            _compare(experts, sizes, checkpoint.path)
            limit = None if config is None else config.raw.get("swiglu_limit")
            if limit is not None and float(limit) != float(experts.module.limit):
                assert config is not None
                raise ValueError(
                    f"{experts.name}: expected a checkpoint with swiglu_limit {experts.module.limit}, as the model "
                    f"has, got {limit} in {config.file}; it is another model's"
                )


def _compare(experts: FoundExperts, sizes: LayerSizes, path: Path) -> None:
    count, hidden, inter = experts.sizes
    if (count, hidden, inter) != (sizes.num_experts, sizes.hidden_size, sizes.intermediate_size):
        raise ValueError(
            f"{experts.name}: expected {count} experts, hidden size {hidden}, intermediate size {inter}, as the model "
            f"has, got {sizes} in layer {experts.number} of {path}; the checkpoint is another model's"
        )


def check_here(found: list[FoundExperts]) -> None:
    """Refuses layers whose weights are not in the model.

    Raises:
        ValueError: names the layers, and what to do.
    """
    away = [experts.name for experts in found if experts.is_meta]
    if away:
        names = ", ".join(away[:4]) + (f" and {len(away) - 4} more" if len(away) > 4 else "")
        raise ValueError(
            f"{names}: expected experts with weights, "
            "got ones on meta (offloaded, or never loaded); pass checkpoint= so that they are read from its files, or "
            "load the model without offloading its experts"
        )


def note_format(found: list[FoundExperts]) -> None:
    """Says in the model's configuration which layers are MXFP4 now, so that what it saves is read as that again."""
    for experts in found:
        config = experts.config
        if config is None or experts.number is None:
            continue
        name = f"model.layers.{experts.number}.mlp.experts"
        given = getattr(config, "quantization_config", None)
        if not isinstance(given, _Noted):  # what else it says is of the files that the model came from
            every = [f"model.layers.{number}.mlp.experts" for number in range(int(config.num_hidden_layers))]
            given = _Noted(quant_method="mxfp4", modules_to_not_convert=[*_NOT_EXPERTS, *every])
        left = [module for module in given["modules_to_not_convert"] if module != name]
        config.quantization_config = _Noted(quant_method="mxfp4", modules_to_not_convert=left)


# What gpt-oss's own config.json has there.
_NOT_EXPERTS = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


class _Noted(dict[str, Any]):
    """A quantization_config that says what `replace_experts` did."""


def layers_without_format(found: list[FoundExperts]) -> Iterator[FoundExperts]:
    """Layers whose model's configuration is not within reach, so that a saved model would be read wrongly."""
    return (experts for experts in found if experts.config is None or experts.number is None)


def _kind(module: nn.Module) -> str:
    return type(module).__name__
