"""The tests of csrc/moe's kernels can fail: each notices a mistake that is put into the sources on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
from ptx import launch
from ptx.faults import Fault
from ptx.moe_mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_is_noticed(mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = launch.ptx_of_moe
    original(mutation.unit)
    changed = mutation.ptx(tmp_path)
    monkeypatch.setattr(launch, "ptx_of_moe", lambda source: changed if source == mutation.unit else original(source))
    with pytest.raises((Fault, AssertionError)) as caught:
        mutation.case()
    noticed = caught.value
    assert isinstance(noticed, Fault) or caught.traceback[-1].path.parent.name != "ptx", "the executor's own mistake"
    print(f"{mutation.name}: {noticed.kind.value if isinstance(noticed, Fault) else 'wrong result'}")
