"""A headless Chromium, driven by its own protocol over two pipes; Debian's package `chromium` is one."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe --no-first-run".split()
KEYS = {
    "Enter": 13,
    " ": 32,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Tab": 9,
    "Escape": 27,
}


# Puts two pipes at the numbers at which Chromium looks for them, and becomes it.
PLACE = (
    "import fcntl, os, sys; ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]; "
    "os.dup2(ends[0], 3); os.dup2(ends[1], 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Tab:
    """One page; commands go to the browser through `to`, what it says comes from `of`, each ended by a zero byte."""

    def __init__(self, to: int, of: int) -> None:
        self.to, self.of, self.said, self.numbers = to, of, b"", itertools.count(1)
        self.session: dict[str, str] = {}
        self.errors: list[str] = []  # what scripts of the page did not catch
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]}
        self.call("Runtime.enable")

    def call(self, method: str, **params: Any) -> Any:
        """A command of the protocol, and its result."""
        number = next(self.numbers)
        os.write(
            self.to, json.dumps({"id": number, "method": method, "params": params, **self.session}).encode() + b"\0"
        )
        while True:
            said = self._message()
            if said.get("method") == "Runtime.exceptionThrown":
                details = said["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.said:
            assert select.select([self.of], [], [], 60)[0], "Chromium says nothing"
            more = os.read(self.of, 1 << 20)
            assert more, "Chromium has ended"
            self.said += more
        message, _, self.said = self.said.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Go there, and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """What an expression is, as JSON; a promise is waited for."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < deadline, f"never true: {condition}; errors: {self.errors}"
            time.sleep(0.05)

    def press(self, key: str, text: str = "") -> None:
        """One key, as from a keyboard."""
        about = {"key": key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        """Text, into what has the focus."""
        self.call("Input.insertText", text=text)

    def look(self, width: int, *, dark: bool = False, height: int = 900) -> None:
        """The window's width, and which colours its user likes."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def shoot(self, file: Path) -> None:
        """The whole page as a PNG."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def chromium(folder: Path) -> Iterator[Tab]:
    """A browser with one empty page; its files go to an empty folder."""
    assert CHROMIUM is not None
    (its_in, to), (of, its_out) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-Sc", PLACE, str(its_in), str(its_out), CHROMIUM, *FLAGS, f"--user-data-dir={folder}"],
        env={**os.environ, "HOME": str(folder)},
        pass_fds=(its_in, its_out),
        stderr=subprocess.DEVNULL,
    )
    os.close(its_in)
    os.close(its_out)
    try:
        yield Tab(to, of)
    finally:
        process.terminate()
        process.wait(20)
        os.close(to)
        os.close(of)
