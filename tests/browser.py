"""A real browser without a window, for tests of pages: Chromium, spoken to in its DevTools protocol over two pipes."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# A browser reads from its file number 3 and writes to 4. In a process of its own, where these are nothing else.
LAUNCHER = """
import fcntl, os, sys
read_end, write_end = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 5) for number in sys.argv[1:3])
os.dup2(read_end, 3)
os.dup2(write_end, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One tab. `events` are what the browser tells on its own: messages of the console, requests, errors. RuntimeError
    or OSError if it does not start."""

    def __init__(self, folder):
        read_end, self.to_browser = os.pipe()
        self.from_browser, write_end = os.pipe()
        words = [FOUND, "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu",
                 "--hide-scrollbars", "--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}"]
        launcher = [sys.executable, "-c", LAUNCHER, str(read_end), str(write_end)]
        self.process = subprocess.Popen([*launcher, *words], pass_fds=(read_end, write_end),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read_end)
        os.close(write_end)
        self.number, self.rest, self.events, self.session = 0, b"", [], None
        try:
            self.open_tab()
        except (RuntimeError, OSError):
            self.close()
            raise

    def open_tab(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """What the browser answers. RuntimeError if it refuses."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def receive(self, timeout=60):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.from_browser], [], [], timeout)
            data = os.read(self.from_browser, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError("the browser does not answer")
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, url, width=1600, height=1000, dark=False, media=""):
        """Load a page anew, in a window of this size; `media` is "print" for how it would be on paper."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression):
        """The value of a JavaScript expression in the page. RuntimeError if it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait_for(self, expression, seconds=20):
        """Until a condition holds in the page. TimeoutError if it does not."""
        end = time.monotonic() + seconds
        while not self.run(expression):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.02)

    def press(self, key):
        """A key, by its name: "j", "1", "Tab"; then a moment until the page is drawn."""
        text = {"text": key} if len(key) == 1 else {}
        code = {"Tab": 9, "Escape": 27, "Enter": 13}.get(key, ord(key[0].upper()))
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                      **(text if kind == "keyDown" else {}))
        self.settle()

    def settle(self):
        """Wait until two frames are drawn: scrolling has told the page by then."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def screenshot(self, path):
        self.settle()
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def problems(self):
        """Errors and warnings of the console, and exceptions of the page, since it was opened."""
        self.run("0")  # what happened before has been told by now
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"])
            elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(params["args"])
        return found

    def requests(self):
        """Addresses of all that was loaded since the page was opened, itself included."""
        self.run("0")
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def close(self):
        self.session = None
        with contextlib.suppress(RuntimeError, OSError):
            self.call("Browser.close")
        self.process.terminate()
        self.process.wait()
        os.close(self.to_browser)
        os.close(self.from_browser)


def main(page, picture, width="1600", height="1000"):
    """python tests/browser.py "runs/read/index.html#mae+lut/loss" picture.png 1600 1000"""
    path, _, choice = page.partition("#")
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(folder)
        try:
            browser.open(f"{Path(path).resolve().as_uri()}#{choice}", int(width), int(height))
            browser.screenshot(Path(picture))
        finally:
            browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
