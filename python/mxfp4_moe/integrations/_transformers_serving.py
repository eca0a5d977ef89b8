"""Whether our kernels serve a model that transformers is about to load: on which devices, with which activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .._install import loading, wheel
from .._install.errors import LoadError
from ._engines import Choice, Settings, choose_activations, selftest_gate
from ._engines.activations import formats_on
from ._engines.settings import CPU_VARIABLE
from ._engines.table import TRANSFORMERS

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_STORES = ("cpu", "disk", "meta")  # in a device map with a GPU: where layers wait, not where they run


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is known of one load.

    Attributes:
        settings: the user's.
        wish: whose wish the activations are, where not the settings'.
        devices: that may execute layers.
        refused: why our kernels do not serve, "" where they do.
        next_step: what to do about that, or "".
        main: the device that executes layers which wait elsewhere, None where they are executed where they are.
    """

    settings: Settings
    wish: str = ""
    devices: tuple[torch.device, ...]
    refused: str = ""
    next_step: str = ""
    main: torch.device | None = None

    def with_device_map(self, device_map: Any) -> Serving:
        """The same once transformers has made its device map."""
        return replace(self, main=_main_device(device_map))

    def choose(self, dtype: str) -> Choice:
        """The activations for a model of this dtype, which every device must have kernels for."""
        formats = [name for name in formats_on(self.devices[0]) if all(name in formats_on(d) for d in self.devices)]
        half = "fp16" if dtype.removeprefix("torch.") == "float16" else "bf16"
        return choose_activations(TRANSFORMERS, self.settings, formats, dtype=half, wish=self.wish)

    def executes(self, device: torch.device) -> torch.device:
        """The device that executes a layer whose tensors are put on this one."""
        return self.main if device.type in _STORES and self.main is not None else device


def serving_on(device_map: Any, settings: Settings, wish: str = "") -> Serving:
    """Looks at every device that the layers of a model may be executed on.

    Args:
        device_map: as `from_pretrained` has it: None, "auto" and its like, a device, or a dict of devices.
    """
    devices = executing_devices(device_map)
    serving = Serving(settings=settings, wish=wish, devices=devices, main=_main_device(device_map))
    for device in devices:
        if refused := _refusal(device, settings):
            return replace(serving, refused=refused[0], next_step=refused[1])
    return serving


def executing_devices(device_map: Any) -> tuple[torch.device, ...]:
    """The devices that may execute layers. Without a device map all GPUs, where the user may move the model."""
    if device_map is None or (isinstance(device_map, str) and device_map in _AUTOMATIC):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is None:
            return (torch.device("cpu"),)
        return tuple(torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count()))
    places = device_map.values() if isinstance(device_map, dict) else (device_map,)
    found = {_device(place) for place in places if str(place) not in _STORES}
    return tuple(sorted(found, key=str)) or (torch.device("cpu"),)


def _main_device(device_map: Any) -> torch.device | None:
    """accelerate's rule: what waits on the CPU or the disk is executed on the map's first device."""
    if isinstance(device_map, str) and device_map in _AUTOMATIC:
        first = executing_devices(device_map)[0]
        return None if first.type == "cpu" else first
    if not isinstance(device_map, dict):
        return None
    return next((_device(place) for place in device_map.values() if str(place) not in _STORES), None)


def _device(place: Any) -> torch.device:
    device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _refusal(device: torch.device, settings: Settings) -> tuple[str, str] | None:
    """Why a device does not serve, and the next step."""
    if device.type == "cpu":
        if settings.cpu:
            return None
        return "this is a CPU, where we have a slow reference alone", f"{CPU_VARIABLE}=1 takes it, for tests"
    if device.type != "cuda":
        return f"there are no kernels for {device.type}", ""
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if wheel.arch_for(capability) is None:
        return f"this wheel has no machine code for compute capability {capability[0]}.{capability[1]} of {name}", ""
    try:
        loading.moe_ops()
    except LoadError as error:
        return str(error), "`mxfp4-moe doctor` says more"
    return selftest_gate(name, capability, settings)
