"""The whole matrix of layouts; test_parity.py covers its pairs. tests/benchmarks/parity.py makes a record of it."""

from pathlib import Path

import pytest

from tests.parallel import parity


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_layout_does_what_one_plain_process_does(tmp_path: Path) -> None:
    found = parity.whole(tmp_path)
    assert len(found) == len(parity.MATRIX)
    wrong = {cell.name: parity.broken(values, cell.dtype) for cell, values in found.items()}
    assert {name: bounds for name, bounds in wrong.items() if bounds} == {}
    assert [cell.name for cell, values in found.items() if values["recompute"]] == []
