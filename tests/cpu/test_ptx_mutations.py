"""The executor must be able to fail: mistakes in a tile's PTX, sources and launch, each of which it must notice.

`./ci/test.sh -s tests/cpu/test_ptx_mutations.py` prints what noticed each.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from ptx import mutants
from ptx.mutants import Mutation
from ptx.mutations import MUTATIONS

FOUND: list[tuple[Mutation, str]] = []


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mistakes_are_noticed_and_nothing_else_is(mutation: Mutation) -> None:
    found = mutants.notices(mutation)
    FOUND.append((mutation, found))
    print(f"\n{mutants.table(FOUND).splitlines()[-1]}")
    assert bool(found) != mutation.harmless, found


def test_the_list(tmp_path: Path) -> None:
    assert not [name for name, times in Counter(m.name for m in MUTATIONS).items() if times > 1]
    assert sum(not mutation.harmless for mutation in MUTATIONS) >= 36
    assert sum(mutation.harmless for mutation in MUTATIONS) >= 3
    (tmp_path / "mutations.txt").write_text(mutants.table(FOUND) + "\n", encoding="utf-8")
    print(f"\n{tmp_path / 'mutations.txt'}")
