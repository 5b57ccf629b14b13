"""A real browser without a screen: Debian's chromium, driven through chromedriver by the W3C WebDriver protocol."""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.launch import free_port

LIMIT = 120.0  # seconds that a page may take to show what is waited for
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb")  # fmt: skip


def obstacle() -> str:
    """Why no browser can be started on this machine; empty where one can."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)} (`make test-pages` installs Debian's packages)" if missing else ""


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self._session = session

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One command of the protocol; its value."""
        return command(method, f"{self._session}{path}", body)

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is loaded."""
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script on the page returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    @property
    def text(self) -> str:
        """What a reader sees."""
        return str(self.run("return document.body.innerText"))

    def until(self, *words: str) -> str:
        """Wait until the page shows all of these; returns its text."""
        self.wait(lambda: all(word in self.text for word in words), f"{words} on the page")
        return self.text

    def wait(self, there: Callable[[], object], what: str) -> None:
        """Wait for something."""
        deadline = time.monotonic() + LIMIT
        while not there():
            assert time.monotonic() < deadline, f"{what}: not within {LIMIT:.0f} s; the page says:\n{self.text[:3000]}"
            time.sleep(0.2)

    def point(self, selector: str, x: float, y: float) -> None:
        """Move the pointer to a place in an element, in shares of its width and height."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        left, top, width, height = self.run(
            "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [r.left, r.top, r.width, r.height]",
            selector,
        )
        place = {"type": "pointerMove", "duration": 0, "x": round(left + x * width), "y": round(top + y * height)}
        source = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [place]}
        self._ask("POST", "/actions", {"actions": [source]})

    def size(self, width: int, height: int) -> None:
        """Make the window so large."""
        self._ask("POST", "/window/rect", {"width": width, "height": height})

    def scheme(self, name: str) -> None:
        """What the system says it prefers: light or dark."""
        media = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        self._ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": media})

    def picture(self, path: Path) -> None:
        """Save a screenshot."""
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def complaints(self) -> list[str]:
        """What the page's console said since the last call."""
        return [str(line["message"]) for line in self._ask("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        lines = self._ask("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(line["message"])["message"] for line in lines]
        return [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]


def command(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    """A command of the protocol; its value."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{method} {url}: {error.read().decode()}") from None


@contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in `folder`, ended with all its processes."""
    port = free_port()
    driver = f"http://127.0.0.1:{port}"
    with (folder / "chromedriver.log").open("w") as log:
        process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + LIMIT
        while not _ready(driver):
            assert process.poll() is None, (folder / "chromedriver.log").read_text()
            assert time.monotonic() < deadline, "chromedriver does not answer"
            time.sleep(0.05)
        options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}  # fmt: skip
        made = command("POST", f"{driver}/session", {"capabilities": {"alwaysMatch": wanted}})
        session = f"{driver}/session/{made['sessionId']}"
        try:
            yield Browser(session)
        finally:
            command("DELETE", session)  # ends chromium
    finally:
        process.terminate()
        process.wait()


def _ready(driver: str) -> bool:
    """Whether chromedriver takes commands."""
    try:
        return bool(command("GET", f"{driver}/status")["ready"])
    except OSError:
        return False
