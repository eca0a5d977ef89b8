"""The tests of csrc/moe's kernels can fail: each notices a mistake that is put into the sources on purpose.

`pytest -s` prints what noticed each.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ptx import finalize_mutations, fp4_row_mutations, launch, moe_mutations, router_mutations
from ptx.faults import Fault
from ptx.moe_mutations import Mutation

MUTATIONS = (
    *moe_mutations.MUTATIONS,
    *finalize_mutations.MUTATIONS,
    *fp4_row_mutations.MUTATIONS,
    *router_mutations.MUTATIONS,
)


def noticed(mutation: Mutation) -> str:
    """The kind of fault, or "wrong result"; empty where nothing was noticed."""
    try:
        mutation.case()
    except Fault as fault:
        return fault.kind.value
    except AssertionError as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        assert place is not None
        if Path(place.tb_frame.f_code.co_filename).parent.name == "ptx":
            raise  # of the executor itself
        return "wrong result"
    return ""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_is_noticed_and_nothing_else_is(
    mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = launch.ptx_of_moe
    changed = mutation.ptx(tmp_path)
    assert changed != original(mutation.unit)
    monkeypatch.setattr(
        launch, "ptx_of_moe", lambda source, *arch: changed if source == mutation.unit else original(source, *arch)
    )
    found = noticed(mutation)
    print(f"\n{mutation.name}: {found or 'nothing'}")
    assert bool(found) != mutation.harmless
