"""``lit-lora adapter push``, against a hub on loopback."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from diffusers import UNet2DConditionModel

from lit_lora.cli import main
from lit_lora.formats import write_adapter
from tests.adapter_tools.unet import unet_adapter

# huggingface_hub's own.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


class Hub(ThreadingHTTPServer):
    """What the hub answers to an upload; it keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.status = 200
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str] = set()
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.messages: list[str] = []


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Be quiet."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        hub.tokens.add(self.headers.get("Authorization", ""))
        if hub.status != 200:
            self._answer({"error": "You may not write here"}, hub.status)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._answer({"url": f"{hub.address}/me/{hub.created[-1]['name']}"})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [{"path": one["path"], "uploadMode": _mode(one["path"]), "shouldIgnore": False} for one in files]
            self._answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            hrefs = [{**one, "actions": {"upload": {"href": f"{hub.address}/store/{one['oid']}"}}} for one in objects]
            self._answer({"transfer": "basic", "objects": hrefs})
        elif self.path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
            self._answer({"commitUrl": f"{hub.address}/me/x/commit/1", "commitOid": "1" * 40, "success": True})
        else:  # the check of the card's header
            self._answer({"errors": [], "warnings": []})

    def do_PUT(self) -> None:
        self.server.stored[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": "not there"}, 404)

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            else:
                self.server.files[value["path"]] = self.server.stored[value["oid"]]

    def _answer(self, answer: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its own protocol, to other servers
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(sd_folder: Path, tmp_path: Path) -> Path:
    """An adapter with a sample, and files that are nobody's business."""
    made = tmp_path / "adapter"
    (made / "samples").mkdir(parents=True)
    (made / "samples" / "0.png").write_bytes(b"an image")
    (made / "notes.txt").write_text("private")
    (made / "samples" / "other.txt").write_text("private")
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    write_adapter(unet_adapter(unet, ["conv_in", "conv_out"], base="me/base"), made)
    return made


UPLOADED = ["README.md", "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]


def test_a_folder(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["adapter", "push", str(folder), "me/blue-stars", "--private", "--message", "first"]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f"uploaded to {hub.address}/me/blue-stars\n")
    assert [(one["name"], one["visibility"]) for one in hub.created] == [("blue-stars", "private")]
    assert hub.messages == ["first"]
    assert hub.tokens == {"Bearer hf_of_a_test"}
    assert sorted(hub.files) == sorted([*UPLOADED, "samples/0.png"])
    for name in (*UPLOADED[1:], "samples/0.png"):
        assert hub.files[name] == (folder / name).read_bytes()
    card = hub.files["README.md"].decode()
    assert "base_model: me/base" in card
    assert "![sample](samples/0.png)" in card
    assert 'load_lora_weights("me/blue-stars", weight_name="pytorch_lora_weights.safetensors")' in card
    assert "this folder" not in card


def test_a_file_gets_a_card(hub: Hub, folder: Path) -> None:
    assert main(["adapter", "push", str(folder / "pytorch_lora_weights.safetensors"), "me/stars"]) == 0
    assert sorted(hub.files) == ["README.md", "pytorch_lora_weights.safetensors"]
    assert 'load_lora_weights("me/stars"' in hub.files["README.md"].decode()
    assert hub.created[0].get("visibility") in (None, "public")


def test_one_of_pefts_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "push", str(folder / "adapter_model.safetensors"), "somebody/x", "--dry_run"]) == 2
    assert f"name their folder, {folder}" in capsys.readouterr().err


def test_a_card_that_somebody_wrote_stays(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("My stars\n")
    assert main(["adapter", "push", str(folder), "me/stars"]) == 0
    assert hub.files["README.md"] == b"My stars\n"


def test_a_dry_run_uploads_nothing(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "push", str(folder), "me/stars", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:5]] == [*UPLOADED, "samples/0.png"]
    assert "nothing is uploaded to me/stars" in out
    assert "base_model: me/base" in out
    assert (hub.created, hub.files, hub.tokens) == ([], {}, set())


def test_a_hub_that_refuses(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.status = 403
    assert main(["adapter", "push", str(folder), "them/stars"]) == 2
    error = capsys.readouterr().err
    assert "the hub refuses the upload to them/stars" in error
    assert "hf auth login" in error
    assert "hf_of_a_test" not in error


def test_a_hub_that_is_not_there(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["adapter", "push", str(folder), "me/stars"]) == 2
    assert "the upload to http://127.0.0.1:9 failed (" in capsys.readouterr().err


def test_nothing_leaves_for_bad_input(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "push", str(folder), "a/b/c"]) == 2
    assert "'a/b/c' is not the id of a repository on the hub" in capsys.readouterr().err
    file = folder / "pytorch_lora_weights.safetensors"
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:2000])
    assert main(["adapter", "push", str(tmp_path / "half.safetensors"), "me/stars"]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert (hub.created, hub.files) == ([], {})
