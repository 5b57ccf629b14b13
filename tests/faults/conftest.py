"""The data that the fault tests train on."""

from pathlib import Path

import pytest

from data_pipeline.building import demo


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's shards of real digits."""
    out = tmp_path_factory.mktemp("data") / "digits"
    demo.digits(out)
    return out
