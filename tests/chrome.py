"""A headless browser, driven over a pipe by Chrome's DevTools protocol; needs nothing but the browser itself."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# The browser reads commands from file descriptor 3 and answers on 4. Ours may have any numbers, these two included.
_LAUNCH = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chrome() -> str | None:
    """The browser on the PATH, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chrome:
    """A browser that runs.

    Args:
        program: its path.
        profile: an empty folder for its files.
    """

    def __init__(self, program: str, profile: Path) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(commands), str(answers), program, *options],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._received = b""
        self._number = 0
        self._listeners: dict[str, Callable[[str, dict[str, Any]], None]] = {}

    def send(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """What a command gives; events that come before its answer go to whom they concern."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            listener = self._listeners.get(answer.get("sessionId", ""))
            if listener is not None:
                listener(answer["method"], answer["params"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            part = os.read(self._read, 2**20)
            assert part, "the browser ended"
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    @contextmanager
    def open(self, url: str, width: int = 1280, dark: bool = False) -> Iterator[Tab]:
        """A page that has loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        self._listeners[session] = tab.listen
        try:
            for domain in ("Page", "Runtime", "Log", "Network"):
                tab.send(f"{domain}.enable")
            tab.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            tab.set_dark(dark)
            tab.send("Page.navigate", url=url)
            tab.wait_until(f"document.readyState == 'complete' && location.href == {json.dumps(url)}")
            yield tab
        finally:
            del self._listeners[session]
            self.send("Target.closeTarget", targetId=target)

    def close(self) -> None:
        """End the browser."""
        self.send("Browser.close")
        os.close(self._write)
        os.close(self._read)
        self._process.wait(10)


class Tab:
    """A page in the browser.

    Attributes:
        problems: what the console said, and exceptions that nobody caught.
        requests: the addresses that were asked for.
    """

    def __init__(self, chrome: Chrome, session: str) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._chrome = chrome
        self._session = session

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a command gives for this page."""
        return self._chrome.send(method, self._session, **parameters)

    def listen(self, method: str, event: Mapping[str, Any]) -> None:
        """Take note of an event."""
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Log.entryAdded":
            self.problems.append(event["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(event["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.problems.append(str([value.get("value") for value in event["args"]]))

    def evaluate(self, script: str) -> Any:
        """The value of an expression, or of a promise, in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_until(self, condition: str) -> None:
        """Until an expression is true in the page, for at most ten seconds."""
        end = time.monotonic() + 10
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"not so after ten seconds: {condition}"
            time.sleep(0.02)

    def set_dark(self, dark: bool) -> None:
        """As if the user preferred dark pages, or light ones."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def press(self, key: str) -> None:
        """A key of the keyboard: ``Tab``, ``Enter``, ``ArrowRight``."""
        codes = {"Tab": 9, "Enter": 13, "ArrowRight": 39}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            extra = text if kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **extra)

    def screenshot(self, file: Path) -> None:
        """All of the page, as a PNG."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {**size, "height": min(size["height"], 4000), "scale": 1}
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        file.write_bytes(base64.b64decode(data))
