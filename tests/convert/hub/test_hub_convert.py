"""`dsv4 convert` and `dsv4 verify` of a source that stays on a hub: the real client libraries, both hubs on loopback.

The bytes must be those of a conversion from a local copy, whatever happens on the way, and no more shards may be on
disk than were allowed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_servers import HubServer, Request, hub_environment, run_dsv4
from patience import LONG
from ranks import run_ranks
from raw_safetensors import scatter

from dsv4.convert import convert, verify
from dsv4.convert.hub.client import RemoteFile, Snapshot
from dsv4.convert.hub.open import HubOptions
from dsv4.convert.hub.source import HubSource
from dsv4.convert.hub.storage import HubStorage
from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.write.atomic_file import SCRATCH_NAME

REPOSITORY = "acme/Tiny-V4"
SHARDS = [f"model-{n:05d}-of-00007.safetensors" for n in range(1, 8)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "v4")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("expected") / "fp8"
    convert(source, output, max_workers=1)
    return contents(output)


@pytest.fixture
def server(source: Path) -> Iterator[HubServer]:
    with HubServer() as running:
        running.publish(REPOSITORY, source)
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too; of the manifest all but the source, which names the repository here."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if "dsv4.json" in found:
        manifest = json.loads(found["dsv4.json"])
        for key in ("hub", "repository", "commit"):
            manifest["source"].pop(key, None)
        found["dsv4.json"] = json.dumps(manifest).encode()
    return found


def shards_on_disk(output: Path) -> set[str]:
    """Source shards in the scratch area, those that are just arriving included."""
    found = [name for folder, _, names in os.walk(output) if "/.dsv4-" in folder for name in names]
    shards = {name.split(".safetensors")[0] for name in found if not name.endswith((".metadata", ".lock"))}
    return {name for name in shards if f"{name}.safetensors" in SHARDS}


@pytest.mark.slow
def test_from_python(server: HubServer, expected: dict[str, bytes], tmp_path: Path) -> None:
    program = f"""from dsv4.convert import convert, verify
source = "hf:{REPOSITORY}"
print(convert(source, "fp8", scratch=2).shards_written, verify(source, "fp8").exit_code, verify(source).exit_code)
"""
    command, environment = [sys.executable, "-c", program], hub_environment(server, tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LONG)
    shards = sum(name.endswith(".safetensors") for name in expected)
    assert done.returncode == 0 and done.stdout == f"{shards} 0 0\n", done.stderr
    assert contents(tmp_path / "fp8") == expected


def test_headers_are_told_as_they_arrive(source: Path, tmp_path: Path) -> None:
    def read(repository: str, commit: str, file: RemoteFile, offset: int, length: int) -> bytes:
        return (source / file.name).read_bytes()[offset : offset + length]

    files = {path.name: RemoteFile(path.name, path.stat().st_size) for path in source.glob("*.safetensors")}
    hub: Any = SimpleNamespace(cached=lambda *_: None, read=read, abort=lambda: None)
    snapshot = Snapshot(HubSource("hf", REPOSITORY), hub, "0", files)
    told: list[tuple[int, int]] = []
    with closing(HubStorage(snapshot, tmp_path, HubOptions(headers=lambda *now: told.append(now)))) as storage:
        assert storage.read(SHARDS[0], 0, 8) == (source / SHARDS[0]).read_bytes()[:8]
    assert told == [(number, 7) for number in range(1, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_same_bytes_as_from_a_local_copy(
    server: HubServer, tmp_path: Path, expected: dict[str, bytes], hub: str
) -> None:
    seen: list[int] = []

    def look(request: Request) -> None:
        arriving = {request.path.rsplit("/", 1)[1]} if request.path.rsplit("/", 1)[1] in SHARDS else set()
        seen.append(len(shards_on_disk(tmp_path / "out") | {n.split(".safetensors")[0] for n in arriving}))

    server.watch = look
    done = run_dsv4(server, tmp_path, "convert", f"{hub}:{REPOSITORY}", "out")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected
    assert sorted(server.whole_shards()) == SHARDS  # each once
    assert 1 <= max(seen) <= 2
    commit = server.repositories[REPOSITORY].branches["main"]
    manifest = json.loads((tmp_path / "out" / "dsv4.json").read_text())
    assert manifest["source"]["commit"] == commit
    assert f"dsv4 verify {hub}:{REPOSITORY}@{commit} out" in done.stderr
    proof = run_dsv4(server, tmp_path, "verify", f"{hub}:{REPOSITORY}@{commit}", "out", "--json")
    assert proof.returncode == 0, proof.stderr
    assert sorted(server.whole_shards()) == sorted(SHARDS * 2)
    assert 1 <= max(seen) <= 2
    assert contents(tmp_path / "out") == expected  # verify left nothing behind


@pytest.mark.slow
def test_into_gguf_and_from_there(server: HubServer, source: Path, tmp_path: Path) -> None:
    """The draft block's file draws on three shards. A repository of GGUF files is a source like any other."""
    convert(source, tmp_path / "local", to="gguf", max_shard_size="3MB")
    options = ("--to", "gguf", "--max-shard-size", "3MB", "--scratch", "3")
    done = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out", *options)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert run_dsv4(server, tmp_path, "verify", f"hf:{REPOSITORY}", "out", "--scratch", "3").returncode == 0
    server.publish("acme/Tiny-V4-GGUF", tmp_path / "local")
    done = run_dsv4(server, tmp_path, "convert", "hf:acme/Tiny-V4-GGUF", "back", "--to", "fp4", "--scratch", "3")
    assert done.returncode == 0, done.stderr
    proof = run_dsv4(server, tmp_path, "verify", "hf:acme/Tiny-V4-GGUF", "back", "--scratch", "3")
    assert proof.returncode == 0 and "IDENTICAL" in proof.stdout, proof.stderr
    assert verify(source, tmp_path / "back").exit_code == 0


@pytest.mark.slow
def test_into_the_other_forms_and_from_there(server: HubServer, source: Path, tmp_path: Path) -> None:
    """In one process, which imports torch once."""
    forms: dict[str, dict[str, Any]] = {"mxfp8": {}, "mxfp4": {}, "mlx": {}, "nvfp4": {"input_scale": 1.0}}
    for to, options in forms.items():
        convert(source, tmp_path / f"local-{to}", to=to, max_shard_size="3MB", **options)
        server.publish(f"acme/{to}", tmp_path / f"local-{to}")
    program = f"""from dsv4.convert import convert
for to, options in {forms!r}.items():
    convert("hf:{REPOSITORY}", to, to=to, max_shard_size="3MB", scratch=3, **options)
    convert(f"hf:acme/{{to}}", f"back-{{to}}", to="fp4", scratch=3)
"""
    command, environment = [sys.executable, "-c", program], hub_environment(server, tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    for to in forms:
        assert contents(tmp_path / to) == contents(tmp_path / f"local-{to}")
        proof = verify(source, tmp_path / f"back-{to}")
        assert proof.exit_code == 0 and proof.counts["≈"] == 0


@pytest.mark.slow
def test_shared_by_ranks_and_parts(server: HubServer, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """Each fetches what it needs into a scratch area of its own, and nothing of that is left."""
    environment = hub_environment(server, tmp_path)
    ended = run_ranks(2, tmp_path, "convert", f"hf:{REPOSITORY}", "ranks", environment=environment)
    assert ended.codes == [0, 0], ended.err
    for more in ("--part=2/2", "--part=1/2", "--finish"):
        done = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "parts", more)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "ranks") == contents(tmp_path / "parts") == expected
    ended = run_ranks(2, tmp_path, "verify", f"hf:{REPOSITORY}", "parts", environment=environment)
    assert ended.codes == [0, 0] and "IDENTICAL" in ended.out[0], ended.err
    assert contents(tmp_path / "parts") == expected


def test_dry_run_reads_headers_only(server: HubServer, tmp_path: Path, source: Path) -> None:
    done = run_dsv4(
        server, tmp_path, "convert", f"hf:{REPOSITORY}", "out", "--dry-run", "--json", "--token", "secret-token"
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["source_bytes"] == sum((source / name).stat().st_size for name in SHARDS)
    assert plan["source"] == f"hf:{REPOSITORY}@{server.repositories[REPOSITORY].branches['main']}"
    assert plan["scratch_bytes"] > 0
    assert server.whole_shards() == []
    assert len([r for r in server.requests if r.host == "storage"]) == len(SHARDS)  # one range of each
    assert not any("secret-token" in str(r.headers) for r in server.requests if r.host == "storage")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_server_that_ignores_ranges(server: HubServer, tmp_path: Path, expected: dict[str, bytes]) -> None:
    server.strike("norange", times=999)
    done = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_scratch_too_small_is_said_before_anything_is_fetched(server: HubServer, tmp_path: Path) -> None:
    done = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out", "--scratch", "1")
    assert done.returncode == 2
    assert "--scratch 2" in done.stderr
    ranks = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out", "--layout", "mp", "--model-parallel", "2")
    assert ranks.returncode == 2
    assert "--keep-source" in ranks.stderr
    assert server.whole_shards() == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_keep_source(server: HubServer, tmp_path: Path, source: Path, expected: dict[str, bytes]) -> None:
    done = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out", "--keep-source")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected
    commit = server.repositories[REPOSITORY].branches["main"]
    snapshot = tmp_path / "hf" / "hub" / "models--acme--Tiny-V4" / "snapshots" / commit
    assert all((snapshot / name).read_bytes() == (source / name).read_bytes() for name in SHARDS)
    server.requests.clear()
    arguments = ("convert", f"hf:{REPOSITORY}", "mp", "--layout", "mp", "--model-parallel", "2", "--keep-source")
    again = run_dsv4(server, tmp_path, *arguments, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    verified = run_dsv4(server, tmp_path, "verify", f"hf:{REPOSITORY}", "out", HF_HUB_OFFLINE="1")
    assert verified.returncode == 0
    assert server.requests == []
    assert all((snapshot / name).exists() for name in SHARDS)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--keep-source"]])
def test_a_damaged_shard_in_the_cache_is_fetched_again(
    server: HubServer, tmp_path: Path, expected: dict[str, bytes], source: Path, options: list[str]
) -> None:
    """Its header is whole, so that only its hash says so."""
    assert run_dsv4(server, tmp_path, "download", REPOSITORY).returncode == 0
    cached = next((tmp_path / "hf" / "hub").rglob(f"snapshots/*/{SHARDS[2]}"))
    blob = cached.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    server.requests.clear()
    done = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out", *options)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected
    assert server.whole_shards() == [SHARDS[2]]
    assert not options or cached.read_bytes() == (source / SHARDS[2]).read_bytes()


def interrupt_when(server: HubServer, home: Path, *ready: Path) -> subprocess.CompletedProcess[str]:
    """Convert, and press Ctrl-C as soon as these files exist and the server says nothing."""
    command = [sys.executable, "-m", "dsv4", "convert", f"hf:{REPOSITORY}", "out"]
    running = subprocess.Popen(command, env=hub_environment(server, home), cwd=home, stderr=subprocess.PIPE, text=True)
    while not (server.stalled.is_set() and all(path.exists() for path in ready)) and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, words = running.communicate(timeout=LONG)  # the server says nothing all the while
    server.heal()
    return subprocess.CompletedProcess(command, running.returncode, "", words)


@pytest.mark.slow
def test_interrupted(server: HubServer, tmp_path: Path, expected: dict[str, bytes]) -> None:
    server.strike("stall", SHARDS[4], times=99, whole_only=True)
    output, written = tmp_path / "out", [f"model-0000{number}-of-00004.safetensors" for number in (1, 2)]
    stopped = interrupt_when(server, tmp_path, output / written[1], output / SCRATCH_NAME / SHARDS[5])
    assert stopped.returncode == 130
    assert "same command again" in stopped.stderr
    assert all((output / name).read_bytes() == expected[name] for name in written)
    assert not (output / "config.json").exists()
    server.heal()
    server.requests.clear()
    done = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected
    assert sorted(server.whole_shards()) == [SHARDS[4], SHARDS[6]]  # neither what was converted nor what had arrived


@pytest.mark.slow
def test_wrong_bytes(server: HubServer, tmp_path: Path, expected: dict[str, bytes]) -> None:
    server.strike("wrong", SHARDS[3], times=99, whole_only=True)
    done = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out")
    assert done.returncode == 3
    assert SHARDS[3] in done.stderr
    assert "SHA-256" in done.stderr
    finished = {n: d for n, d in contents(tmp_path / "out").items() if not n.startswith(".dsv4")}
    assert "model-00001-of-00004.safetensors" in finished
    assert all(expected[name] == data for name, data in finished.items())
    assert "config.json" not in finished
    server.heal()
    again = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out")
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_damaged_header(server: HubServer, tmp_path: Path) -> None:
    server.strike("wrong", SHARDS[0])  # the first answer is the range that the plan is made from
    server.strike("wrong", "model.safetensors.index.json")
    done = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out")
    assert "model.safetensors.index.json" in done.stderr  # fetched once more
    assert done.returncode == 4
    assert SHARDS[0] in done.stderr
    assert "header arrived damaged" in done.stderr
    assert not list((tmp_path / "out").glob("model-*"))


@pytest.mark.slow
def test_branch_that_moves_between_two_runs(server: HubServer, tmp_path: Path, expected: dict[str, bytes]) -> None:
    old = server.repositories[REPOSITORY].branches["main"]
    server.strike("500", SHARDS[5], times=99, whole_only=True)
    assert run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out").returncode == 4
    server.heal()
    server.publish(REPOSITORY, make_checkpoint(tmp_path / "newer", seed=1))
    moved = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out")
    assert moved.returncode == 2
    assert old in moved.stderr
    pinned = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out", "--revision", old)
    assert pinned.returncode == 0, pinned.stderr
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_verify_finds_another_model(server: HubServer, tmp_path: Path) -> None:
    output = tmp_path / "fp8"
    convert(make_checkpoint(tmp_path / "other", seed=3), output)
    done = run_dsv4(server, tmp_path, "verify", f"hf:{REPOSITORY}", "fp8", "--scratch", "1", "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["counts"]["*"] > 0
    assert sorted(server.whole_shards()) == SHARDS
    assert not list(output.glob(".dsv4-*"))


@pytest.mark.slow
def test_verify_needs_shards_together(tmp_path: Path) -> None:
    """Scales lie in another shard than their weights: without room for both, it is refused before any is fetched."""
    folder = scatter(make_checkpoint(tmp_path / "scattered"), 3)
    convert(folder, tmp_path / "fp8")
    with HubServer() as server:
        server.publish(REPOSITORY, folder)
        refused = run_dsv4(server, tmp_path, "verify", f"hf:{REPOSITORY}", "fp8", "--scratch", "1")
        assert refused.returncode == 2 and "2 source shards are needed at once, --scratch allows 1" in refused.stderr
        assert "Give a larger --scratch" in refused.stderr and not server.whole_shards()
        done = run_dsv4(server, tmp_path, "verify", f"hf:{REPOSITORY}", "fp8")
        assert done.returncode == 0, done.stderr
        other = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out")
        assert other.returncode == 0, other.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "fp8")
