"""Every result says how it was made."""

import importlib.machinery
import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from icae.evaluation import record


@pytest.mark.parametrize(
    ("module", "words", "command"),
    [
        (None, ["/opt/bin/icae", "pretrain", "--config", "/srv/c.yaml"], "icae pretrain --config c.yaml"),
        ("icae.cli", ["cli.py", "sft"], "python -m icae.cli sft"),
        ("icae.__main__", ["__main__.py", "sft"], "python -m icae sft"),
        (None, ["train.py", "--seed", "3"], "python train.py --seed 3"),
    ],
)
def test_a_record_names_the_command_as_it_was_typed(monkeypatch, tmp_path, module, words, command):
    spec = module and importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    record.write_record(tmp_path / "record.json", {})
    assert json.loads((tmp_path / "record.json").read_text())["made_by"]["command"] == command


def test_the_commit_is_that_of_this_package_and_not_of_a_project_that_it_is_installed_in(monkeypatch, tmp_path):
    git = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    source, installed = tmp_path / "record.py", tmp_path / "venv" / "record.py"
    installed.parent.mkdir()
    for file in (source, installed):
        file.write_text("")
    git(["git", "init"])
    git(["git", "add", "record.py"])
    git(["git", "-c", "user.name=me", "-c", "user.email=me@example.com", "commit", "-m", "mine"])
    monkeypatch.setattr(record, "__file__", str(source))
    assert record.current_commit() == git(["git", "rev-parse", "HEAD"]).stdout.decode().strip()
    monkeypatch.setattr(record, "__file__", str(installed))
    assert record.current_commit() is None
    monkeypatch.setattr(record, "__file__", str(source))
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert record.current_commit() is None
