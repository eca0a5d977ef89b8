"""The worker: runs tiles one after the other, and sends what happens. Torch is imported when it starts to work."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..._install import blocklist, driver, wheel
from ..._install.troubles import words
from ...tiles import FP4_PAIRS, MXFP4_MXFP8, PAIRS, Tile, kernel_pair, load_manifest
from ..child import channel
from .outcome import NotRunError, Outcome, RunTile
from .report import Status


def work(
    tiles: Sequence[Tile], prepare: Callable[[], tuple[dict[str, Any], RunTile]], send: Callable[[dict[str, Any]], None]
) -> int:
    """Runs tiles and sends what happens; stops behind one that raised, for the GPU's context may be broken.

    Args:
        tiles: in the order in which to run them.
        prepare: gives the facts about the device and the function that runs a tile.
        send: delivers one message to the parent.

    Returns:
        The exit status.
    """
    try:
        facts, run_tile = prepare()
    except Exception as error:
        send({"fatal": words(error)})
        return 1
    send({"ready": facts})
    for tile in tiles:
        send({"start": tile.name})
        begin = time.monotonic()
        outcome, status, reason, broken = Outcome(), Status.PASSED, "", False
        try:
            outcome = run_tile(tile)
            if reason := outcome.reason():
                status = Status.FAILED
        except NotRunError as error:
            status, reason = Status.NOT_RUN, str(error)
        except Exception as error:
            status, reason, broken = Status.FAILED, words(error), True
        seconds = round(time.monotonic() - begin, 2)
        send({"result": tile.name, "status": status.value, "reason": reason, "seconds": seconds, **asdict(outcome)})
        if broken:
            return 1
    return 0


def prepare_gpu(index: int) -> tuple[dict[str, Any], RunTile]:
    """The facts about a GPU, and the function that runs a tile on it.

    Raises:
        RuntimeError: no such GPU, none that the wheel has machine code for, or extensions that do not load.
    """
    import torch

    from ... import arithmetic
    from ..._call.launch import check_capability
    from ..._install import loading
    from .checks import Kernel, tile_runner

    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        here = torch.cuda.device_count() if torch.version.cuda else "no CUDA"
        raise RuntimeError(f"needs GPU {index} and a CUDA build of torch, got torch {torch.__version__}, GPUs: {here}")
    torch.cuda.set_device(index)
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    check_capability(capability, name)
    loading.moe_ops()
    # No list is found in this folder, so that a tile which is blocked is run here as itself.
    os.environ[blocklist.CACHE_DIR_VARIABLE] = os.devnull
    arch = wheel.arch_for(capability)
    assert arch is not None  # check_capability has looked
    published = arithmetic.of_arch(arch)
    # Those that the wheel has beside the kernel that computes MXFP8 activations, and quantizing to FP4, which is more
    # than a kernel.
    own = kernel_pair(arch, MXFP4_MXFP8)
    pairs = [pair for pair in PAIRS if pair in FP4_PAIRS or kernel_pair(arch, pair) != own]
    kernels = [
        Kernel(pair=pair, published=arithmetic.of_arch(arch, pair), having=having)
        for pair in pairs
        if pair != MXFP4_MXFP8 and (having := wheel.tiles_of(pair, capability))
    ]
    rules = {rule.name: rule for rule in (published, *(kernel.published for kernel in kernels))}.values()
    facts = {
        "name": name,
        "index": index,
        "capability": list(capability),
        "multiprocessors": torch.cuda.get_device_properties(index).multi_processor_count,
        "arch": arch,
        "arithmetic": "; ".join(f"{rule.name} ({rule.words()})" for rule in rules),
        "driver": driver.driver_version(),
        "driver_cuda": driver.driver_cuda(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    return facts, tile_runner(torch.device("cuda", index), published, kernels)


def main(
    arguments: Sequence[str] | None = None,
    prepare: Callable[[int], tuple[dict[str, Any], RunTile]] = prepare_gpu,
) -> int:
    """The worker; users call `mxfp4-moe doctor --selftest`."""
    parser = argparse.ArgumentParser(prog="python -m mxfp4_moe._health.selftest", description=main.__doc__)
    parser.add_argument("--device", type=int, default=0, help="the GPU's number")
    parser.add_argument("tiles", nargs="*", metavar="TILE", help="names such as m128n128; all by default")
    args = parser.parse_args(arguments)
    manifest = load_manifest()
    tiles = [manifest.tile(name) for name in args.tiles] or list(wheel.built_tiles())
    messages = channel()

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")

    return work(tiles, lambda: prepare(args.device), send)
