"""Drive a headless Chromium over its devtools socket: open a page, run JavaScript, read its text, take a picture."""

import asyncio
import base64
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page, as an asynchronous context manager. It reaches 127.0.0.1 only."""

    def __init__(self, *, width: int = 1500, height: int = 1100) -> None:
        self._size = (width, height)
        self._num_calls = 0

    async def __aenter__(self) -> "Browser":
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--window-size={self._size[0]},{self._size[1]}",
            f"--user-data-dir={self._profile.name}",
        ]
        self._process = subprocess.Popen([CHROMIUM, *options, "about:blank"], stderr=subprocess.DEVNULL)
        port_file = Path(self._profile.name) / "DevToolsActivePort"
        deadline = time.monotonic() + 300
        while not port_file.exists() or not port_file.read_text().strip():
            assert time.monotonic() < deadline, "Chromium did not start"
            await asyncio.sleep(0.2)
        port = int(port_file.read_text().split()[0])
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as answer:
            pages = await answer.json()
        page = next(page for page in pages if page["type"] == "page")
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        await self._call("Page.enable")
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._socket.close()
        await self._session.close()
        family = [*psutil.Process(self._process.pid).children(recursive=True), psutil.Process(self._process.pid)]
        for process in family:
            process.terminate()
        psutil.wait_procs(family, timeout=10)
        self._profile.cleanup()

    async def open(self, url: str) -> None:
        """Go to a page."""
        await self._call("Page.navigate", url=url)

    async def prefer(self, scheme: str) -> None:
        """Prefer a colour scheme: light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await self._call("Emulation.setEmulatedMedia", features=[feature])

    async def evaluate(self, script: str) -> Any:
        """Run JavaScript; return its value."""
        answer = await self._call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    async def text(self) -> str:
        """Return the visible text of the page."""
        return str(await self.evaluate("document.body.innerText"))

    async def wait_until(self, script: str, *, seconds: float = 300.0) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not await self.evaluate(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"{script} did not become true; the page says:\n{await self.text()}"
            await asyncio.sleep(0.3)

    async def picture(self, path: Path) -> None:
        """Write a PNG of the visible part once it has stopped changing: two pictures in a row are equal."""
        picture, previous = await self._screenshot(), b""
        while picture != previous:
            await asyncio.sleep(0.5)
            picture, previous = await self._screenshot(), picture
        path.write_bytes(picture)

    async def _screenshot(self) -> bytes:
        answer = await self._call("Page.captureScreenshot", format="png")
        return base64.b64decode(answer["data"])

    async def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._num_calls += 1
        number = self._num_calls
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == number:
                result: dict[str, Any] = answer.get("result", answer)
                return result
