"""Recorded launches executed in their order, on one memory: what the operator was given, and what it allocated.

Kernels that start early may not read what the one before them writes until griddepcontrol.wait, nor write at all before
it; the executor holds them to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .launch import Recording, entries
from .machine import Machine

POISON = 0xFF  # NaN in every format, E4M3 and E8M0 among them
EXECUTED: set[str] = set()  # kernels, by their names, in this session


def array_of(tensor: Tensor) -> Any:
    """The tensor's bytes, as numpy sees them: the same memory."""
    assert tensor.is_contiguous()
    return tensor.detach().view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)


class Run:
    """A recording under execution: `next` for each launch, then `finish`."""

    def __init__(
        self,
        recording: Recording,
        ptx: Sequence[str],
        inputs: Mapping[str, Tensor | None],
        *,
        outputs: Mapping[str, Tensor] | None = None,
        early: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """
        Args:
            ptx: texts with all of the kernels.
            inputs: the tensors among the operator's arguments; None for those that are not given.
            outputs: tensors that it writes, beside those that it allocates.
            early: the inputs that the kernel just before the first launch writes, and may still be writing.
        """
        self.machine = Machine(seed=seed)
        self.recording = recording
        self.left = list(recording.launches)
        self._ptx = {kernel: text for text in ptx for kernel in entries(text)}
        memory = self.machine.memory
        for name, tensor in inputs.items():
            if tensor is not None:
                memory.add(name, array_of(tensor), written=True, writable=name in early)
        for name, tensor in (outputs or {}).items():
            tensor.view(torch.uint8).fill_(POISON)
            memory.add(name, array_of(tensor), written=False, writable=True)
        for number, allocation in enumerate(recording.allocations):
            allocation.fill(POISON)
            memory.add(f"allocation {number}", allocation, written=False, writable=True)
        if early:
            self.machine.pretend_kernel(early)

    def next(self, name: str = "", junk: Sequence[range] = ()) -> None:
        """Runs the next launch, which is one of the kernel that is called so; `junk` as for Machine.run."""
        launch = self.left.pop(0)
        assert name in launch.kernel, f"expected {name}, got {launch.kernel}"
        self.machine.run(self._ptx[launch.kernel], launch, junk=junk)
        EXECUTED.add(launch.kernel)

    def allow_unwritten(self, tensor: Tensor) -> None:
        """What nobody wrote in this part of an allocation may be read: no result may depend on it."""
        begin, size = tensor.data_ptr(), tensor.numel() * tensor.dtype.itemsize
        assert tensor.is_contiguous()
        region = self.machine.memory.find(begin, begin + size, "look")
        at = slice(begin - region.base, begin - region.base + size)
        region.bytes[at][~region.written[at]] = POISON
        region.written[at] = True

    def finish(self) -> None:
        """That was all."""
        assert not self.left, f"not executed: {[launch.kernel for launch in self.left]}"

    def written(self, tensor: Tensor) -> Tensor:
        """Of each element in an output or allocation, whether a kernel wrote it."""
        begin, size = tensor.data_ptr(), tensor.numel() * tensor.dtype.itemsize
        if size == 0:
            return torch.zeros(tensor.shape, dtype=torch.bool)
        region = self.machine.memory.find(begin, begin + size, "look")
        state = region.written[begin - region.base :][:size].reshape(*tensor.shape, tensor.dtype.itemsize)
        return torch.from_numpy(state.any(-1))

    @property
    def results(self) -> Any:
        return self.recording.results


def execute(recording: Recording, ptx: Sequence[str], inputs: Mapping[str, Tensor | None], **options: Any) -> Run:
    """All launches; options as those of `Run`."""
    run = Run(recording, ptx, inputs, **options)
    while run.left:
        run.next()
    return run
