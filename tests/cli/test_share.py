"""``lit export --format folder``, ``lit push`` and ``lit pull``: against a small stand-in of the hub's API on this machine."""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

from lit_methods.cli.main import main


class Hub(http.server.BaseHTTPRequestHandler):
    """Keeps what is uploaded in memory: creation, commit, file list, files."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    refuse = 0

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, content: bytes, head: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if not head:
            self.wfile.write(content)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refuse:
            return self._send(self.refuse, b"{}")
        if self.path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            return self._json({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    type(self).files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._json({"commitUrl": f"{self._url()}/me/model/commit/{SHA}", "commitOid": SHA, "success": True})
        return self._json({"url": f"{self._url()}/me/model"})

    def _url(self) -> str:
        return f"http://{self.headers['Host']}"

    def do_GET(self) -> None:
        self._get(head=False)

    def do_HEAD(self) -> None:
        self._get(head=True)

    def _get(self, head: bool) -> None:
        found = re.fullmatch(rf"/me/model/resolve/{SHA}/(.+)", self.path)
        if found and found[1] in self.files:
            content = self.files[found[1]]
            etag = hashlib.sha1(content).hexdigest()
            self._send(200, content, head, ETag=f'"{etag}"', X_Repo_Commit=SHA)
        elif self.path.startswith("/api/models/me/model/tree/"):
            sizes = {name: len(content) for name, content in self.files.items()}
            self._json([{"type": "file", "path": name, "size": size, "oid": SHA} for name, size in sizes.items()])
        elif self.path.startswith("/api/models/me/model"):
            self._json({"id": "me/model", "sha": SHA, "siblings": [{"rfilename": name} for name in self.files]})
        else:
            self._send(404, b"{}", head, X_Error_Code="RepoNotFound")


SHA = "0123456789" * 4


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    handler = type("HubOfOneTest", (Hub,), {"files": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder as ``lit fit`` leaves it, without the training."""
    folder = tmp_path / "runs" / "mine" / "20260101-000000"
    (folder / "checkpoints").mkdir(parents=True)
    state = {"network.weight": torch.arange(6.0).view(2, 3)}
    torch.save(
        {"state_dict": state, "epoch": 0, "global_step": 3, "pytorch-lightning_version": "2.6.0"}, folder / "checkpoints" / "last.ckpt"
    )
    config = {
        "model": {"class_path": "lit_methods.ImageClassifier"},
        "trainer": {"callbacks": [{"class_path": "lit_methods.callbacks.TCM"}]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"command": ["lit", "/home/me"], "torch": "2.9.0"}))
    (folder / "git.json").write_text(json.dumps({"commit": "abc123"}))
    lines = [{"step": step, "epoch": 0, "metrics": {"loss": 1.0 / step}} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_weights_carry_their_origin(run: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    assert main(["export", str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "weights.safetensors")]) == 0
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        found = file.metadata()
        assert file.get_tensor("network.weight").tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert found["commit"] == "abc123"
    assert found["torch"] == "2.9.0"
    assert json.loads(found["metrics"]) == {"loss": 0.5}
    assert yaml.safe_load(found["config"])["model"] == {"class_path": "lit_methods.ImageClassifier"}
    assert "/home/me" not in str(found), "a command has paths of this machine"


def test_a_checkpoint_without_a_run_says_its_version_alone(tmp_path: Path) -> None:
    from safetensors import safe_open

    torch.save({"state_dict": {"a": torch.ones(1)}, "epoch": 0}, tmp_path / "alone.ckpt")
    assert main(["export", str(tmp_path / "alone.ckpt"), str(tmp_path / "alone.safetensors")]) == 0
    with safe_open(tmp_path / "alone.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "lit_methods"}


def test_a_model_goes_to_the_hub_and_back(run: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    out, back = tmp_path / "shared", tmp_path / "back"
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), str(out), "--format", "folder"]) == 0
    assert main(["push", str(out), "me/model"]) == 0
    assert set(hub.files) == {"README.md", "config.yaml", "model.safetensors", "origin.json"}
    assert main(["pull", "me/model", str(back)]) == 0
    assert load_file(back / "model.safetensors")["network.weight"].shape == (2, 3)
    card = (back / "README.md").read_text()
    assert "# mine" in card
    assert "- tcm" in card.split("---")[1]
    assert "2307.04047" in card
    assert "| `loss` | 0.5 |" in card
    assert "lit pull me/model" in capsys.readouterr().out
    assert main(["pull", "me/model", str(back)]) == 2, "nothing is overwritten"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["push", "{empty}", "me/model"], "has no model.safetensors: first lit export"),
        (["push", "{folder}", "not a name"], "is no name on the hub"),
        (["pull", "me/other", "{new}"], "the hub refuses me/other (404)"),
        (["export", "{ckpt}", "{folder}", "--format", "folder"], "is there already"),
        (["export", "{ckpt}", "{new}", "--format", "tflite"], "give weights, folder, sae-lens, onnx or torch-export"),
    ],
)
def test_mistakes_are_told(
    words: list[str], said: str, run: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, empty = tmp_path / "folder", tmp_path / "empty"
    empty.mkdir()
    ckpt = run / "checkpoints" / "last.ckpt"
    assert main(["export", str(ckpt), str(folder), "--format", "folder"]) == 0
    places = {"empty": empty, "folder": folder, "new": tmp_path / "new", "ckpt": ckpt}
    assert main([word.format(**places) for word in words]) != 0
    assert said in capsys.readouterr().err


def test_who_may_not_is_told_how_to_log_in(run: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuse = 403
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "out"), "--format", "folder"]) == 0
    assert main(["push", str(tmp_path / "out"), "me/model"]) == 1
    assert "hf auth login" in capsys.readouterr().err


# ---- and back into Python ----------------------------------------------------------------------------------------------


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder as ``lit export --format folder`` writes it, of an untrained classifier."""
    from lit_methods import MLP, ImageClassifier

    run = tmp_path / "runs" / "small" / "20260101-000000"
    (run / "checkpoints").mkdir(parents=True)
    network = "{class_path: lit_methods.MLP, init_args: {widths: [64, 8, 10]}}"
    (run / "config.yaml").write_text(
        f"model: {{class_path: lit_methods.ImageClassifier, init_args: {{network: {network}, learning_rate: 0.5}}}}\n"
    )
    module = ImageClassifier(MLP([64, 8, 10]))
    torch.save({"state_dict": module.state_dict(), "epoch": 0, "pytorch-lightning_version": "2.6.0"}, run / "checkpoints" / "last.ckpt")
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "small"), "--format", "folder"]) == 0
    return tmp_path / "small"


def test_a_shared_model_is_a_module_again(shared: Path) -> None:
    from safetensors.torch import load_file

    from lit_methods import load_shared

    module = load_shared(shared)
    assert not module.training
    assert module.hparams["learning_rate"] == 0.5
    for name, value in load_file(shared / "model.safetensors").items():
        assert torch.equal(module.state_dict()[name], value)


def test_a_shared_model_comes_from_the_hub(shared: Path, hub: type[Hub]) -> None:
    from lit_methods import load_shared

    assert main(["push", str(shared), "me/model"]) == 0
    assert load_shared("me/model").hparams["learning_rate"] == 0.5
    with pytest.raises(FileNotFoundError, match="me/other is no folder, and the hub doesn't give it"):
        load_shared("me/other")


def test_what_cannot_be_loaded_is_told(shared: Path) -> None:
    from lit_methods import load_shared

    with pytest.raises(FileNotFoundError, match=r"smal is no folder\n  nearest: .*small"):
        load_shared(shared.parent / "smal")
    config = (shared / "config.yaml").read_text()
    (shared / "config.yaml").write_text(config.replace("lit_methods.MLP", "os.path"))
    with pytest.raises(ValueError, match=r"needs os.path, which isn't of lit_methods: load it with trusted=True"):
        load_shared(shared)
    (shared / "config.yaml").write_text(config.replace("[64, 8, 10]", "[64, 9, 10]"))
    with pytest.raises(ValueError, match=r"don't fit ImageClassifier: size mismatch"):
        load_shared(shared)
    (shared / "config.yaml").write_text(config.replace("widths", "wdths"))
    with pytest.raises(ValueError, match="can't be built from this config"):
        load_shared(shared)
    (shared / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"has no config.yaml: give a folder that `lit export"):
        load_shared(shared)
