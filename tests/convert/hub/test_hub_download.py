"""`dsv4 download` from the command line: the real client libraries, both hubs on loopback, and their faults.

In each fault: the exit code, words that name the file or say what to do, nothing unchecked under a final name, and a
second run that completes without fetching again what was finished.
"""

import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_servers import HubServer, hub_environment, run_dsv4
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
from patience import LONG

from dsv4.convert.checkpoint.header import build_header
from dsv4.convert.hub import fetch
from dsv4.convert.hub.huggingface import _bar_for

REPOSITORY = "acme/Tiny-V4"
SHARDS = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
HUBS = ["hf", "ms"]


def make_repository(folder: Path, seed: int = 0) -> Path:
    """Three shards of 40 kB and small files, one of them in a sub-folder."""
    rng = random.Random(seed)
    (folder / "inference").mkdir(parents=True)
    for number, name in enumerate(SHARDS):
        header = build_header({f"layers.{number}.weight": ("BF16", (100, 200))})
        (folder / name).write_bytes(header + rng.randbytes(40_000))
    for name in ("config.json", "inference/config.json"):
        (folder / name).write_text(json.dumps({"seed": seed}))
    (folder / "README.md").write_text("# Tiny\n")
    (folder / "tokenizer.json").write_text("{}" + " " * 3000)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("source") / "v4")


@pytest.fixture
def server(source: Path) -> Iterator[HubServer]:
    with HubServer() as running:
        running.publish(REPOSITORY, source)
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name, without our record and what is still on its way."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {n: p.read_bytes() for p in paths if not (n := p.relative_to(folder).as_posix()).startswith(".dsv4")}


def assert_second_run_completes(server: HubServer, home: Path, source: Path, hub: str = "hf") -> None:
    """After the fault is gone: the same command ends well, and fetches only what was missing."""
    server.heal()
    finished = contents(home / "out")
    assert all(data == (source / name).read_bytes() for name, data in finished.items())
    server.requests.clear()
    done = run_dsv4(server, home, "download", f"{hub}:{REPOSITORY}", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert contents(home / "out") == contents(source)
    assert not (home / "out" / ".dsv4-incoming").exists()
    assert sorted(json.loads(done.stdout)["kept"]) == sorted(finished)
    assert all(server.fetched(name) == 0 for name in finished if name.endswith(".safetensors"))


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.slow
def test_whole_snapshot_and_nothing_twice(server: HubServer, tmp_path: Path, source: Path, hub: str) -> None:
    first = run_dsv4(server, tmp_path, "download", f"{hub}:{REPOSITORY}", "out")
    assert first.returncode == 0, first.stderr
    assert first.stdout == "out\n"
    assert "7 files fetched" in first.stderr
    record = json.loads((tmp_path / "out" / ".dsv4-source.json").read_text())
    assert record["commit"] == server.repositories[REPOSITORY].branches["main"]
    assert record["source"] == f"{hub}:{REPOSITORY}"
    (tmp_path / "out" / SHARDS[1]).unlink()
    (tmp_path / "out" / SHARDS[2]).write_bytes((source / SHARDS[2]).read_bytes()[::-1])  # right size, wrong bytes
    server.requests.clear()
    second = run_dsv4(server, tmp_path, "download", f"{hub}:{REPOSITORY}", "out", "--json")
    assert sorted(json.loads(second.stdout)["fetched"]) == SHARDS[1:]
    assert contents(tmp_path / "out") == contents(source)
    assert server.fetched(SHARDS[0]) == 0


@pytest.mark.slow
def test_dry_run_and_patterns(server: HubServer, tmp_path: Path) -> None:
    arguments = ("download", REPOSITORY, "out", "--include", "*.json", "--exclude", "inference/", "--json")
    planned = run_dsv4(server, tmp_path, *arguments, "--dry-run")
    assert planned.returncode == 0
    plan = json.loads(planned.stdout)
    assert [f["name"] for f in plan["files"]] == ["config.json", "tokenizer.json"]
    assert plan["missing_bytes"] == plan["bytes"] == sum(f["size"] for f in plan["files"])
    assert plan["free_bytes"] > 0
    assert not (tmp_path / "out").exists()
    assert server.fetched("config.json") == 0
    assert run_dsv4(server, tmp_path, *arguments).returncode == 0
    assert sorted(contents(tmp_path / "out")) == ["config.json", "tokenizer.json"]
    nothing = run_dsv4(server, tmp_path, "download", REPOSITORY, "out", "--include", "*.bin")
    assert nothing.returncode == 2
    assert "matches no file" in nothing.stderr


@pytest.mark.slow
def test_cache_is_the_library_s_own_and_serves_offline(server: HubServer, tmp_path: Path, source: Path) -> None:
    assert run_dsv4(server, tmp_path, "download", REPOSITORY, HF_HUB_OFFLINE="1").returncode == 4
    done = run_dsv4(server, tmp_path, "download", REPOSITORY)
    snapshot = Path(done.stdout.strip())
    assert snapshot.parent == tmp_path / "hf" / "hub" / "models--acme--Tiny-V4" / "snapshots"
    assert contents(snapshot) == contents(source)
    server.requests.clear()
    offline = run_dsv4(server, tmp_path, "download", REPOSITORY, "--json", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(json.loads(offline.stdout)["kept"]) == 7
    copied = run_dsv4(server, tmp_path, "download", REPOSITORY, "out", HF_HUB_OFFLINE="1")
    assert copied.returncode == 0, copied.stderr
    assert contents(tmp_path / "out") == contents(source)
    assert server.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.parametrize("ranges", [True, False], ids=["resumed", "range ignored"])
def test_connection_cut(server: HubServer, tmp_path: Path, source: Path, hub: str, ranges: bool) -> None:
    server.strike("cut", SHARDS[1])
    if not ranges:
        server.strike("norange", SHARDS[1], times=99)
    done = run_dsv4(server, tmp_path, "download", f"{hub}:{REPOSITORY}", "out")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(source)


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.slow
def test_too_many_requests_are_waited_for(server: HubServer, tmp_path: Path, source: Path, hub: str) -> None:
    for what in (SHARDS[0], "revision", "files"):
        server.strike("429", what)
    done = run_dsv4(server, tmp_path, "download", f"{hub}:{REPOSITORY}", "out")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(source)


@pytest.mark.slow
def test_server_error(server: HubServer, tmp_path: Path, source: Path) -> None:
    server.strike("500", SHARDS[2], times=99)
    done = run_dsv4(server, tmp_path, "download", REPOSITORY, "out", "--max-workers", "1")
    assert done.returncode == 4
    assert "500" in done.stderr
    assert "same command again" in done.stderr
    assert SHARDS[2] not in contents(tmp_path / "out")
    assert_second_run_completes(server, tmp_path, source)


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.slow
def test_wrong_byte_is_fetched_once_more(server: HubServer, tmp_path: Path, source: Path, hub: str) -> None:
    server.strike("wrong", SHARDS[0])
    server.strike("wrong", "README.md")
    done = run_dsv4(server, tmp_path, "download", f"{hub}:{REPOSITORY}", "out")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(source)
    if hub == "hf":  # ModelScope's client notices and repeats by itself
        assert "Fetching it once more" in done.stderr
        assert SHARDS[0] in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["wrong", "short"])
def test_bad_file_twice(server: HubServer, tmp_path: Path, source: Path, fault: str) -> None:
    server.strike(fault, SHARDS[0], times=99)
    server.strike(fault, "config.json", times=99)
    done = run_dsv4(server, tmp_path, "download", REPOSITORY, "out")
    assert done.returncode == 3
    assert SHARDS[0] in done.stderr
    assert "config.json" in done.stderr
    assert {SHARDS[1], SHARDS[2]} <= contents(tmp_path / "out").keys()  # the good ones are kept
    assert not {SHARDS[0], "config.json"} & contents(tmp_path / "out").keys()
    assert_second_run_completes(server, tmp_path, source)


@pytest.mark.slow
def test_bad_file_twice_leaves_nothing_in_the_cache(server: HubServer, tmp_path: Path, source: Path) -> None:
    server.strike("wrong", SHARDS[0], times=99)
    assert run_dsv4(server, tmp_path, "download", REPOSITORY).returncode == 3
    good = {p.read_bytes() for p in source.rglob("*") if p.is_file()}
    blobs = list((tmp_path / "hf" / "hub" / "models--acme--Tiny-V4" / "blobs").iterdir())
    assert blobs
    assert all(p.read_bytes() in good for p in blobs)
    server.heal()
    assert run_dsv4(server, tmp_path, "download", REPOSITORY).returncode == 0


@pytest.mark.slow
def test_shard_that_was_broken_before_it_was_uploaded(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "broken")
    (folder / SHARDS[1]).write_bytes(bytes(40_000))
    with HubServer() as server:
        server.publish(REPOSITORY, folder)
        done = run_dsv4(server, tmp_path, "download", REPOSITORY, "out")
    assert done.returncode == 3
    assert SHARDS[1] in done.stderr
    assert "header is empty" in done.stderr
    assert SHARDS[1] not in contents(tmp_path / "out")


@pytest.mark.parametrize("given", ["option", "environment"])
@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.fast_cases(1)
def test_token_does_not_follow_a_redirect(server: HubServer, tmp_path: Path, hub: str, given: str) -> None:
    option = ["--token", "secret-token"] if given == "option" else []
    variable = {"hf": "HF_TOKEN", "ms": "MODELSCOPE_API_TOKEN"}[hub]
    environment = {variable: "secret-token"} if given == "environment" else {}
    done = run_dsv4(server, tmp_path, "download", f"{hub}:{REPOSITORY}", "out", *option, **environment)
    assert done.returncode == 0, done.stderr
    stored = [r for r in server.requests if r.host == "storage"]
    asked = [r for r in server.requests if r.host == "hub"]
    assert len(stored) >= 3
    assert any("secret-token" in str(r.headers) for r in asked)
    assert not any("secret-token" in str(r.headers) + r.path for r in stored)
    assert "secret-token" not in done.stdout + done.stderr


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.fast_cases(1)
def test_path_that_leaves_the_folder(server: HubServer, tmp_path: Path, hub: str) -> None:
    server.repositories[REPOSITORY].extra_listed["../evil.txt"] = 5
    done = run_dsv4(server, tmp_path, "download", f"{hub}:{REPOSITORY}", "out")
    assert done.returncode == 3
    assert "../evil.txt" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("hub", HUBS)
def test_revision_that_moves(server: HubServer, tmp_path: Path, source: Path, hub: str) -> None:
    old = server.repositories[REPOSITORY].branches["main"]
    new = server.publish(REPOSITORY, make_repository(tmp_path / "newer", seed=1))
    server.repositories[REPOSITORY].branches |= {"main": old, "master": old}
    server.move_after_listing(REPOSITORY, "main", new)
    server.move_after_listing(REPOSITORY, "master", new)
    assert run_dsv4(server, tmp_path, "download", f"{hub}:{REPOSITORY}", "out").returncode == 0
    assert contents(tmp_path / "out") == contents(source)
    assert json.loads((tmp_path / "out" / ".dsv4-source.json").read_text())["commit"] == old
    named = run_dsv4(server, tmp_path, "download", f"{hub}:{REPOSITORY}@{new}", "new")
    assert named.returncode == 0, named.stderr
    assert contents(tmp_path / "new") == contents(tmp_path / "newer")


@pytest.mark.parametrize(("hub", "login"), [("hf", "hf auth login"), ("ms", "modelscope login")])
@pytest.mark.slow
def test_gated_repository(server: HubServer, tmp_path: Path, source: Path, hub: str, login: str) -> None:
    server.repositories[REPOSITORY].gated = True
    done = run_dsv4(server, tmp_path, "download", f"{hub}:{REPOSITORY}", "out")
    assert done.returncode == 4
    assert "403" in done.stderr
    assert login in done.stderr
    assert contents(tmp_path / "out") == {}
    server.repositories[REPOSITORY].gated = False
    assert_second_run_completes(server, tmp_path, source, hub)


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.slow
def test_no_such_repository_or_revision(server: HubServer, tmp_path: Path, hub: str) -> None:
    unknown = run_dsv4(server, tmp_path, "download", f"{hub}:acme/Tiny-V3", "out")
    assert unknown.returncode == 3
    assert "no such repository" in unknown.stderr
    assert f"Did you mean {'ms:' if hub == 'ms' else ''}acme/Tiny-V4?" in unknown.stderr
    revision = run_dsv4(server, tmp_path, "download", f"{hub}:{REPOSITORY}", "out", "--revision", "nope")
    assert revision.returncode == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_disk_full(server: HubServer, tmp_path: Path, source: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        [sys.executable, "-m", "dsv4", "download", REPOSITORY, "out", "--max-workers", "1"],
        env=hub_environment(server, tmp_path), cwd=tmp_path, capture_output=True, text=True, preexec_fn=small_files,
    )  # fmt: skip
    assert done.returncode == 4
    assert "file size limit" in done.stderr
    assert f"out/{SHARDS[0]}" in done.stderr
    assert not set(SHARDS) & contents(tmp_path / "out").keys()
    assert_second_run_completes(server, tmp_path, source)
    server.repositories[REPOSITORY].extra_listed["huge.bin"] = 10**18
    planned = run_dsv4(server, tmp_path, "download", REPOSITORY, "out")
    assert planned.returncode == 4
    assert "1000000.00 TB are missing" in planned.stderr
    assert "are free" in planned.stderr


@pytest.mark.slow
def test_interrupted(server: HubServer, tmp_path: Path, source: Path) -> None:
    server.strike("stall", SHARDS[2], times=99)
    command = [sys.executable, "-m", "dsv4", "download", REPOSITORY, "out"]
    running = subprocess.Popen(
        command, env=hub_environment(server, tmp_path), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    others = contents(source).keys() - {SHARDS[2]}
    while not all((tmp_path / "out" / name).exists() for name in others) and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, words = running.communicate(timeout=LONG)  # the server says nothing all the while
    server.heal()
    assert running.returncode == 130
    assert "interrupted" in words
    assert contents(tmp_path / "out").keys() == others
    assert_second_run_completes(server, tmp_path, source)


@pytest.mark.slow
def test_folder_of_another_repository(server: HubServer, tmp_path: Path, source: Path) -> None:
    server.publish("acme/Other-V4", make_repository(tmp_path / "other", seed=9))
    assert run_dsv4(server, tmp_path, "download", REPOSITORY, "out").returncode == 0
    done = run_dsv4(server, tmp_path, "download", "acme/Other-V4", "out")
    assert done.returncode == 2
    assert f"hf:{REPOSITORY}" in done.stderr
    assert contents(tmp_path / "out") == contents(source)


def test_a_file_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power loss a name without its bytes would be taken for a finished file by its size."""
    done: list[object] = []
    staged, final = tmp_path / "staging" / "file", tmp_path / "folder" / "file"
    staged.parent.mkdir()
    staged.write_bytes(b"bytes")
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.fstat(number).st_ino), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    inode = staged.stat().st_ino
    assert fetch._publish(staged, final) == final
    assert done == [inode, "replace", final.parent.stat().st_ino]


@pytest.mark.slow
def test_two_at_once(server: HubServer, tmp_path: Path) -> None:
    server.strike("stall", SHARDS[0], times=99)
    command = [sys.executable, "-m", "dsv4", "download", REPOSITORY, "out", "-q"]
    first = subprocess.Popen(command, env=hub_environment(server, tmp_path), cwd=tmp_path)
    while not (tmp_path / "out" / SHARDS[1]).exists() and first.poll() is None:
        time.sleep(0.02)
    second = run_dsv4(server, tmp_path, "download", REPOSITORY, "out")
    assert second.returncode == 4
    assert "another dsv4 download" in second.stderr
    server.heal()
    assert first.wait(LONG) == 0


@pytest.mark.slow
def test_fallback(server: HubServer, tmp_path: Path, source: Path) -> None:
    with HubServer() as other:
        other.publish(REPOSITORY, source)
        server.strike("500", SHARDS[1], times=99)
        done = run_dsv4(server, tmp_path, "download", REPOSITORY, "out", "--fallback", "--json", modelscope=other)
        assert done.returncode == 0, done.stderr
        assert SHARDS[1] in json.loads(done.stdout)["from_fallback"]
        assert contents(tmp_path / "out") == contents(source)
        (tmp_path / "out" / SHARDS[1]).unlink()
        server.strike("500", "revision", times=99)  # now it cannot even list; the record says what is wanted
        again = run_dsv4(server, tmp_path, "download", REPOSITORY, "out", "--fallback", "--json", modelscope=other)
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["from_fallback"] == [SHARDS[1]]
        assert contents(tmp_path / "out") == contents(source)


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.slow
def test_fallback_from_a_gated_repository(server: HubServer, tmp_path: Path, source: Path, hub: str) -> None:
    with HubServer() as other:
        other.publish(REPOSITORY, source)
        first, second = (server, other) if hub == "hf" else (other, server)
        server.repositories[REPOSITORY].gated = True
        done = run_dsv4(first, tmp_path, "download", f"{hub}:{REPOSITORY}", "out", "--fallback", modelscope=second)
    assert done.returncode == 0, done.stderr
    assert "Going on with" in done.stderr
    assert contents(tmp_path / "out") == contents(source)


@pytest.mark.slow
def test_the_first_hub_s_token_stays_with_it(server: HubServer, tmp_path: Path, source: Path) -> None:
    """Whether the first hub fails for a file or cannot even list."""
    token = "hf_ForTheFirstHubOnly"
    with HubServer() as other:
        other.publish(REPOSITORY, source)
        for fault, name in ((SHARDS[1], "out"), ("revision", "other")):
            server.strike("500", fault, times=99)
            arguments = ("download", REPOSITORY, name, "--fallback", "--token", token)
            done = run_dsv4(server, tmp_path, *arguments, modelscope=other)
            assert done.returncode == 0, done.stderr
    asked = [(request.path, *request.headers.items()) for request in other.requests]
    assert asked and token not in str(asked)
    assert token in str([request.headers for request in server.requests])


@pytest.mark.slow
def test_fallback_is_checked_against_the_first_listing(server: HubServer, tmp_path: Path, source: Path) -> None:
    """Of small files the first hub lists git's SHA-1 only, the other SHA-256 only: only the bytes can be compared."""
    changed = Path(shutil.copytree(source, tmp_path / "changed"))
    (changed / "config.json").write_bytes((source / "config.json").read_bytes().replace(b"0", b"1"))
    with HubServer() as other:
        other.publish(REPOSITORY, changed)
        server.strike("500", "config.json", times=99)
        done = run_dsv4(server, tmp_path, "download", REPOSITORY, "out", "--fallback", modelscope=other)
    assert done.returncode == 3
    assert "config.json: the bytes are not those that the hub lists: git SHA-1" in done.stderr
    assert "config.json" not in contents(tmp_path / "out")
    assert_second_run_completes(server, tmp_path, source)


@pytest.mark.slow
def test_fallback_with_other_bytes_is_refused(server: HubServer, tmp_path: Path, source: Path) -> None:
    with HubServer() as other:
        other.publish(REPOSITORY, make_repository(tmp_path / "other", seed=5))
        server.strike("500", SHARDS[1], times=99)
        done = run_dsv4(server, tmp_path, "download", REPOSITORY, "out", "--fallback", modelscope=other)
    assert done.returncode == 3
    assert SHARDS[1] in done.stderr
    assert "SHA-256 differ" in done.stderr
    assert SHARDS[1] not in contents(tmp_path / "out")
    assert_second_run_completes(server, tmp_path, source)


@pytest.mark.slow
def test_xet_storage_that_fails(server: HubServer, tmp_path: Path, source: Path) -> None:
    """Its transfers run in a binary with errors of its own kinds."""
    server.xet = True
    done = run_dsv4(server, tmp_path, "download", REPOSITORY, "out")
    assert done.returncode == 4
    assert "404" in done.stderr
    assert "HF_HUB_DISABLE_XET=1" in done.stderr
    plain = run_dsv4(server, tmp_path, "download", REPOSITORY, "out", HF_HUB_DISABLE_XET="1")
    assert plain.returncode == 0, plain.stderr
    assert contents(tmp_path / "out") == contents(source)


def test_xet_storage_s_bytes_are_counted_once() -> None:
    counted: list[int] = []
    with XetDownloadProgressReporter(
        reconstruction_desc="", total=100, log_level=logging.ERROR, tqdm_class=_bar_for(counted.append)
    ) as reporter:
        for written, received in ((0, 30), (40, 90), (100, 100)):
            reporter.update_progress(
                SimpleNamespace(
                    total_bytes=100, total_bytes_completed=written, total_bytes_completion_rate=None,
                    total_transfer_bytes_completed=received, total_transfer_bytes_completion_rate=1.0,
                )
            )  # fmt: skip
    assert sum(counted) == 100


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.slow
def test_proxy_and_mirror(server: HubServer, tmp_path: Path, source: Path, hub: str) -> None:
    """Endpoints that no name server knows are reached through the proxy that the environment names."""
    mirror = "http://mirror.test"
    environment = {"HF_ENDPOINT": mirror, "MODELSCOPE_ENDPOINT": mirror, "HTTP_PROXY": server.url,
                   "http_proxy": server.url, "NO_PROXY": "localhost", "no_proxy": "localhost"}  # fmt: skip
    done = run_dsv4(server, tmp_path, "download", f"{hub}:{REPOSITORY}", "out", **environment)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(source)
    assert all(r.path.startswith(mirror) for r in server.requests if r.host == "hub")


def test_no_hub_at_all(tmp_path: Path) -> None:
    with HubServer() as server:
        pass  # closed again: nothing listens there
    done = run_dsv4(server, tmp_path, "download", REPOSITORY, "out")
    assert done.returncode == 4
    assert "does not answer" in done.stderr


@pytest.mark.slow
def test_libraries_are_imported_only_when_used(server: HubServer, tmp_path: Path) -> None:
    code = (
        "import sys; from dsv4 import cli; code = cli.run(sys.argv[1:]);"
        "print(code, sorted({'torch', 'numpy', 'huggingface_hub', 'modelscope', 'modelscope_hub'} & set(sys.modules)))"
    )
    for arguments, expected in [
        (["download", "--help"], "0 []"),
        (["download", REPOSITORY, "out", "-q"], "0 ['huggingface_hub']"),
        (["download", f"ms:{REPOSITORY}", "out", "-q"], "0 ['modelscope_hub']"),
    ]:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=hub_environment(server, tmp_path), cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == expected, done.stderr
