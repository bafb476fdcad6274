"""A headless Chromium over its DevTools pipe: no package, no port, no driver beside it."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PATH = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
"""Where it is; None where there is none."""
_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
]


class Page:
    """One page in a browser of its own; what it logs, requests and complains of is kept."""

    def __init__(self, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        there, self._out = _high_pipe()
        self._in, back = _high_pipe()

        def connect() -> None:  # the browser reads commands from descriptor 3 and answers on 4
            os.dup2(there, 3)
            os.dup2(back, 4)

        self._process = subprocess.Popen(
            [PATH, *_FLAGS, f"--user-data-dir={self._folder.name}"],
            pass_fds=(3, 4),
            preexec_fn=connect,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self._read, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)  # the browser ends when its pipe does
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        self._folder.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command; the events that come before its answer are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            got = os.read(self._in, 1 << 20)
            if not got:
                raise RuntimeError("chromium ended")
            self._read += got
        line, _, self._read = self._read.partition(b"\0")
        return json.loads(line)

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", answer))
        return answer["result"].get("value")

    def open(self, path: Path, fragment: str = "") -> None:
        """Until the report has drawn itself, or says that it cannot."""
        self.call("Page.navigate", url=f"{path.resolve().as_uri()}{fragment}")
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if self.run("document.documentElement?.dataset.drawn ?? null") is not None:
                self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
                return
            if self.complaints():
                raise RuntimeError(f"the page failed: {self.complaints()}")
            time.sleep(0.02)
        raise RuntimeError("the page drew nothing within a minute")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and what no one caught."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["exception"].get("description", "?"))
            elif event.get("method") == "Log.entryAdded":
                found.append(params["entry"]["text"])
            elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in (
                "error",
                "warning",
                "assert",
            ):
                found.append(str(params["args"]))
        return found

    def logged(self) -> list[str]:
        """What the page said with console.log."""
        return [
            " ".join(str(each.get("value")) for each in event["params"]["args"])
            for event in self.events
            if event.get("method") == "Runtime.consoleAPICalled"
            and event["params"]["type"] == "log"
        ]

    def requested(self) -> list[str]:
        """Addresses that the page asked for, itself included."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """ "mouseMoved" | "mousePressed" | "mouseReleased" | "mouseWheel"."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x: float, y: float) -> None:
        self.mouse("mousePressed", x, y, button="left", clickCount=1)
        self.mouse("mouseReleased", x, y, button="left", clickCount=1)

    def key(self, key: str) -> None:
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def settle(self, seconds: float = 0.4) -> None:
        """Lets glides end and what was asked for be drawn."""
        self.run(f"new Promise((done) => setTimeout(done, {seconds * 1000}))")

    def picture(self, path: Path, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))


def _high_pipe() -> tuple[int, int]:
    """Descriptors that are neither 3 nor 4."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return high
