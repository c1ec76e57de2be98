"""`dsv4 env`: the facts are the system's own, and nothing secret is among them."""

import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from dsv4 import cli, compiled
from dsv4.quant import fp4_to_fp8_compiled


def facts(capsys: pytest.CaptureFixture[str]) -> dict:
    assert cli.run(["env", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_versions_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys)
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == version("torch")
    assert found["versions"]["safetensors"] == version("safetensors")
    assert found["cpu"]["torch_threads"] == torch.get_num_threads()
    assert len([d for d in found["devices"] if d["device"].startswith("cuda")]) == torch.cuda.device_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found["memory"]["total_bytes"] == pytest.approx(pages, rel=0.01)
    assert found["compiler"] == next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    assert found["compiled_cast"] == fp4_to_fp8_compiled.is_compiled()
    assert (found["compiled_problem"] is None) == compiled.FILE.exists() == bool(found["compiled_forms"])
    assert 0 < found["memory"]["available_bytes"] <= found["memory"]["total_bytes"]


def test_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    folders = facts(capsys)["folders"]
    assert folders["working folder"]["path"] == str(tmp_path)
    assert folders["working folder"]["total_bytes"] == shutil.disk_usage(tmp_path).total
    assert folders["Hugging Face cache"]["path"] == str(tmp_path / "not" / "there")
    assert folders["Hugging Face cache"]["exists"] is False
    assert folders["Hugging Face cache"]["total_bytes"] == shutil.disk_usage(tmp_path).total
    assert folders["ModelScope cache"]["path"]
    assert folders["compiled loops"]["path"] == str(compiled.FILE.parent)


def test_secrets_stay_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_VerySecretTokenOfSomebody"
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "SOMETHING_ELSE"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{secret}@proxy:3128")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for arguments in (["env"], ["env", "--json"]):
        assert cli.run(arguments) == 0
        printed = capsys.readouterr()
        assert secret not in printed.out + printed.err
    found = json.loads(printed.out)["variables"]
    assert found["HF_TOKEN"] == found["HTTPS_PROXY"] == "set"
    assert found["HF_HUB_OFFLINE"] == "1"
    assert "SOMETHING_ELSE" not in found


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["env"]) == 0
    printed = capsys.readouterr().out
    for title in ("Versions", "System", "Devices besides the CPU", "Folders", "Environment"):
        assert title in printed.splitlines()
    assert version("torch") in printed
