"""Settings shared by all tests."""

import pytest
import torch
from hypothesis import settings

from mxfp4_moe.probe.assemblers import Assembler, examine
from wheelbuild.assemblers import install_all

# The tests make many small tensor operations, where a second thread mostly waits, badly so on a busy machine.
torch.set_num_threads(1)

settings.register_profile("mxfp4_moe", deadline=None, max_examples=60)
settings.load_profile("mxfp4_moe")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A GPU test that was asked for (-m gpu) fails without a GPU: skipping it would look like success."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("marked gpu, and torch sees no GPU here", pytrace=False)
    if item.get_closest_marker("multigpu") and torch.cuda.device_count() < 2:
        pytest.fail("marked multigpu, and torch sees fewer than two GPUs here", pytrace=False)


@pytest.fixture(scope="session")
def assemblers() -> dict[str, Assembler]:
    """ptxas of every release in ci/cuda-versions.json, by release, oldest first; fetched where it is not there yet."""
    return {release: examine(path, "ci/cuda-versions.json") for release, path in install_all().items()}
