"""The page of a run in a real browser, if the machine has one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from lit_lora.tools.run_page.write import write_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no browser")]


OWN = re.compile(r"\b(google|googleapis|gstatic)\.com\b")
"""Hosts that the browser asks for itself, whatever it shows."""


class Proxy(ThreadingHTTPServer):
    """The browser's way to all other hosts: it notes what was asked for, and refuses it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Refusal)
        self.asked: list[str] = []


class _Refusal(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        if not OWN.search(self.requestline):
            self.server.asked.append(self.requestline)
        self.send_error(502)

    do_CONNECT = do_POST = do_GET  # noqa: N815 likewise

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def show(page: Path, folder: Path, proxy: Proxy) -> tuple[list[str], list[str]]:
    """Messages in the browser's console about a page, and what it asked of other hosts; a picture goes to the folder."""
    quiet = ["background-networking", "component-update", "default-apps", "sync", "extensions", "gpu", "dev-shm-usage"]
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--no-first-run",
        *(f"--disable-{name}" for name in quiet),
        "--disable-features=OptimizationHints,MediaRouter",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--proxy-server=127.0.0.1:{proxy.server_port}",
        "--window-size=900,1200",
        f"--screenshot={folder / 'page.png'}",
        page.as_uri(),
    ]
    environment = os.environ | {"HOME": str(folder)}
    told = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, env=environment)
    console = [line for line in told.stderr.splitlines() if "CONSOLE" in line]
    return console, proxy.asked


def test_it_opens_from_a_folder_that_cannot_be_written_to(tmp_path: Path, proxy: Proxy) -> None:
    """Without a message in the console and a request to another host."""
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    for step in (0, 20):
        Image.new("RGB", (64, 64), (255, 0, 0)).save(run / "samples" / f"step-{step:06d}.png")
    (run / "metrics.csv").write_text("step,train/loss,val/loss\n0,,0.5\n9,0.4,\n19,0.3,0.4\n")
    (run / "report.json").write_text(json.dumps({"status": "finished", "total": {"optimizer_steps": 20}}))
    page = write_page(run)
    page.chmod(0o444)
    run.chmod(0o555)
    try:
        assert show(page, tmp_path, proxy) == ([], [])
    finally:
        run.chmod(0o755)
    with Image.open(tmp_path / "page.png") as picture:
        counts = {color: count for count, color in picture.convert("RGB").getcolors(1 << 20)}
    assert counts[255, 0, 0] > 2 * 64 * 64  # both samples are shown, large
    assert len(counts) > 20  # text and charts


def test_requests_and_messages_would_be_noticed(tmp_path: Path, proxy: Proxy) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="http://example.com/x.png"><script>console.error("told")</script>')
    console, asked = show(page, tmp_path, proxy)
    assert any("told" in line for line in console)
    assert any("http://example.com/x.png" in line for line in asked)
