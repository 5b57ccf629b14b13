"""What the tests of pages share: a browser, and a loud skip where there is none."""

import os
from collections.abc import Iterator

import pytest

from tests.pages import browser as browsers
from tests.pages.browser import Browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser. Where there can be none the tests skip; with COATNET_PAGES=1, as in CI, they fail."""
    obstacle = browsers.obstacle()
    if obstacle:
        reason = f"NO BROWSER, NO PAGE WAS TESTED: {obstacle}"
        if os.environ.get("COATNET_PAGES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with browsers.started(tmp_path_factory.mktemp("browser")) as running:
        yield running
