"""A headless chromium, driven over its pipe by DevTools messages, without a driver or a package for it."""

import base64
import itertools
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
SECONDS = 60


class Visit(NamedTuple):
    """What a page did: what it wrote to the console, what it asked for, how wide it became, how it looks.

    Also how wide its navigation is, and how wide what is in it.
    """

    complaints: list[str]
    requests: list[str]
    width: int
    png: bytes
    nav: list[int]


class Browser:
    """Chromium with a profile of its own; ends with the block."""

    def __init__(self, executable: str, profile: Path) -> None:
        (read, self._out), (self._in, write) = os.pipe(), os.pipe()
        script = f'exec "$@" 3<&{read} 4>&{write}'
        command = ["bash", "-c", script, "bash", executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self._ids, self._buffer = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.call("Browser.close")
        self._process.wait(SECONDS)
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; what happens meanwhile goes to `events`."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str) -> None:
        """Wait until an event has come."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], end - time.monotonic())[0], "chromium does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "chromium ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def visit(self, url: str, width: int, scheme: str = "light", media: str = "screen") -> Visit:
        """Open a page of a width, in a colour scheme, and see all of it."""
        self.events.clear()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable", session)
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", session, **screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", session, media=media, features=features)
        self.call("Page.navigate", session, url=url)
        self.wait_for("Page.loadEventFired")
        size = self.call("Page.getLayoutMetrics", session)["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
        code = "Array.from(document.querySelectorAll('nav'), n => [n.clientWidth, n.scrollWidth]).flat()"
        nav = self.call("Runtime.evaluate", session, expression=code, returnByValue=True)["result"]["value"]
        shot = self.call("Page.captureScreenshot", session, captureBeyondViewport=True, clip=clip)["data"]
        self.call("Target.closeTarget", targetId=target)
        happened = {
            kind: [event["params"] for event in self.events if event.get("method") == kind]
            for kind in (
                "Network.requestWillBeSent",
                "Runtime.consoleAPICalled",
                "Runtime.exceptionThrown",
                "Log.entryAdded",
            )
        }
        requests = [event["request"]["url"] for event in happened.pop("Network.requestWillBeSent")]
        complaints = [json.dumps(event) for events in happened.values() for event in events]
        return Visit(complaints, requests, round(size["width"]), base64.b64decode(shot), nav)
