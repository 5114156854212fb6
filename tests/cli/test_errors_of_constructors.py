"""What a constructor of ours says reaches the user as one short message, also from deep inside a config."""

import pytest

from lit_methods.cli.main import main


def said(capsys, *words):
    assert main(["fit", "--config", "configs/superflow_probe.yaml", *map(str, words)]) == 1
    text = capsys.readouterr().err
    return text[text.rindex("error:") :]


def test_a_broken_checkpoint(capsys, tmp_path):
    pytest.importorskip("spconv", reason="spconv is not installed")
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 and nothing more")
    message = said(capsys, "--model.init_args.pretrained", tmp_path / "cut.ckpt", "--run_root", tmp_path)
    assert "cut.ckpt can't be read as a checkpoint" in message
    assert "Traceback" not in message
    assert len(message.splitlines()) < 4


def test_a_missing_library(capsys, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "spconv", None)
    for name in [name for name in sys.modules if name.startswith("spconv.")]:
        monkeypatch.delitem(sys.modules, name)
    message = said(capsys, "--run_root", tmp_path)
    assert 'pip install "lit-methods[lidar]"' in message
    assert "Namespace" not in message
    assert len(message.splitlines()) < 4
