"""`dsv4 verify` with all sides on hubs: each shard fetched once, few on disk, continued after any fault."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exact_values import edit_tensors, tensors_of
from hub_servers import HubServer, Request, run_dsv4

from dsv4.convert import convert
from dsv4.convert.synthetic.checkpoint import make_checkpoint

SOURCE, OUTPUT = "acme/Tiny-V4", "else/Tiny-V4-FP8"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of seven shards, and its conversion in shards of another cut."""
    folder = tmp_path_factory.mktemp("both")
    make_checkpoint(folder / "source")
    convert(folder / "source", folder / "output", max_shard_size="2MB", max_workers=1)
    return folder / "source", folder / "output"


@pytest.fixture
def server(folders: tuple[Path, Path]) -> Iterator[HubServer]:
    with HubServer() as running:
        running.publish(SOURCE, folders[0])
        running.publish(OUTPUT, folders[1])
        yield running


def shards(folders: tuple[Path, Path]) -> list[str]:
    return sorted(path.name for folder in folders for path in folder.glob("*.safetensors"))


def weights_fetched(server: HubServer) -> list[Request]:
    """Requests for shards that are more than a header."""
    found = []
    for request in server.requests:
        if request.host == "storage" and request.method == "GET" and request.path.endswith(".safetensors"):
            headers = {name.lower(): value for name, value in request.headers.items()}
            if not headers.get("range", "").startswith("bytes=0-"):
                found.append(request)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("hubs", "scratch"), [(("hf", "ms"), 1), (("ms", "hf"), 2), (("hf", "hf"), 3)])
def test_each_shard_is_fetched_once(
    server: HubServer, folders: tuple[Path, Path], tmp_path: Path, hubs: tuple[str, str], scratch: int
) -> None:
    seen: list[int] = []

    def look(request: Request) -> None:
        for area in tmp_path.glob(".dsv4-verify-*"):
            seen.append(len({path.name for path in area.rglob("model-*.safetensors")}))

    server.watch = look
    pair = [f"{hubs[0]}:{SOURCE}", f"{hubs[1]}:{OUTPUT}"]
    planned = run_dsv4(server, tmp_path, "verify", *pair, "--scratch", scratch, "--dry-run", "--json")
    assert planned.returncode == 0 and not weights_fetched(server), planned.stderr  # a look at headers reads no weights
    plan = json.loads(planned.stdout)
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in folders]
    assert [fetch["size"] for fetch in plan["fetch"]] == sizes and plan["seconds"] > 0
    assert [fetch["shards"] for fetch in plan["fetch"]] == [len(list(f.glob("*.safetensors"))) for f in folders]
    done = run_dsv4(server, tmp_path, "verify", *pair, "--scratch", scratch, "--json")
    assert done.returncode == 0, done.stderr
    assert sorted(server.whole_shards()) == shards(folders) and 1 <= max(seen) <= scratch
    found = json.loads(done.stdout)
    assert found["read_bytes"] == plan["read_bytes"] and found["verdict"].startswith("IDENTICAL")
    assert [found[side].partition(":")[0] for side in ("source", "output")] == list(hubs)
    assert not list(tmp_path.glob(".dsv4-*"))


@pytest.mark.slow
def test_an_output_on_a_hub(server: HubServer, folders: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_dsv4(server, tmp_path, "verify", folders[0], f"hf:{OUTPUT}")
    assert done.returncode == 0 and "IDENTICAL" in done.stdout, done.stderr
    output = sorted(path.name for path in folders[1].glob("*.safetensors"))
    assert sorted(server.whole_shards()) == output and "fetching the output: " in done.stderr
    cached = run_dsv4(server, tmp_path, "download", OUTPUT)
    assert cached.returncode == 0, cached.stderr
    plan = run_dsv4(server, tmp_path, "verify", folders[0], f"hf:{OUTPUT}", "--dry-run", "--json")
    assert json.loads(plan.stdout)["fetch"][0]["size"] == 0  # the library's cache has them


def compare(server: HubServer, home: Path, *options: object) -> Any:
    return run_dsv4(server, home, "verify", f"hf:{SOURCE}", f"ms:{OUTPUT}", "--scratch", "1", *options)


@pytest.mark.slow
@pytest.mark.parametrize("late", ["model-00005-of-00007.safetensors", "model-00003-of-0000?.safetensors"])
def test_what_was_proved_is_kept(server: HubServer, folders: tuple[Path, Path], tmp_path: Path, late: str) -> None:
    """A hub that fails in the middle: the same command fetches only what is left."""
    server.strike("500", late, times=99, whole_only=True)
    failed = compare(server, tmp_path)
    assert failed.returncode == 4 and "What was compared is kept" in failed.stderr, failed.stderr
    server.heal()
    first = set(server.whole_shards())
    server.requests.clear()
    plan = json.loads(compare(server, tmp_path, "--dry-run", "--json").stdout)
    assert 0 < plan["continued_bytes"] < plan["read_bytes"]
    done = compare(server, tmp_path, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["verdict"].startswith("IDENTICAL"), done.stderr
    assert found["continued_bytes"] == plan["continued_bytes"]
    again = server.whole_shards()
    assert len(again) == len(set(again)) == sum(fetch["shards"] for fetch in plan["fetch"]) < len(shards(folders))
    assert set(again) | first == set(shards(folders))
    fresh = json.loads(compare(server, tmp_path, "--json").stdout)
    for timed in (found, fresh):
        del timed["seconds"], timed["continued_bytes"], timed["made_by"]
    assert found == fresh  # the same result as without a fault


@pytest.mark.slow
def test_alone_what_was_proved_is_kept(server: HubServer, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Against its own dsv4.json: files that were found whole are not fetched again."""
    words = ("verify", f"hf:{OUTPUT}", "--scratch", "1")
    cut = sorted(path.name for path in folders[1].glob("*.safetensors"))
    server.strike("500", cut[-1], times=99, whole_only=True)
    failed = run_dsv4(server, tmp_path, *words)
    assert failed.returncode == 4 and "What was compared is kept" in failed.stderr, failed.stderr
    server.heal()
    server.requests.clear()
    plan = json.loads(run_dsv4(server, tmp_path, *words, "--dry-run", "--json").stdout)
    assert 0 < plan["continued_bytes"] < plan["read_bytes"] and not server.whole_shards()
    done = run_dsv4(server, tmp_path, *words)
    assert done.returncode == 0 and "SOUND: structure, config, codes and hashes agree" in done.stdout, done.stderr
    assert re.search(r"continues: \d+ of \d+ files were proved before", done.stderr)
    again, (fetch,) = server.whole_shards(), plan["fetch"]
    assert cut[-1] in again and len(again) == len(set(again)) == fetch["shards"] < len(cut)
    assert sum((folders[1] / name).stat().st_size for name in again) == fetch["size"]


@pytest.mark.slow
def test_a_newer_commit_is_another_comparison(server: HubServer, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing that was proved of an older commit counts for a newer one, or for a branch of the same name."""
    server.strike("500", "model-00007-of-00007.safetensors", times=99, whole_only=True)
    assert compare(server, tmp_path).returncode == 4
    server.heal()
    newer = Path(shutil.copytree(folders[1], tmp_path / "newer"))
    name, tensor = next((n, t) for n, t in tensors_of(newer).items() if n.endswith("experts.0.w1.weight"))
    edit_tensors(newer, {name: tensor.like(tensor.array() ^ 1)})
    server.publish(OUTPUT, newer)
    done = compare(server, tmp_path, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["continued_bytes"] == 0
    assert name in [difference["name"] for difference in found["differences"]]


@pytest.mark.slow
def test_the_commit_is_pinned_first(server: HubServer, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A branch that moves while headers are read changes nothing."""
    old = server.repositories[OUTPUT].branches["main"]
    other = server.publish(OUTPUT, make_checkpoint(tmp_path / "other", seed=5))
    server.repositories[OUTPUT].branches |= {"main": old, "master": old}

    def move(request: Request) -> None:
        if request.host == "storage":
            server.repositories[OUTPUT].branches["main"] = other

    server.watch = move
    done = run_dsv4(server, tmp_path, "verify", f"hf:{SOURCE}", f"hf:{OUTPUT}", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["output"] == f"hf:{OUTPUT}@{old[:12]}", done.stderr
    assert server.repositories[OUTPUT].branches["main"] == other


@pytest.mark.slow
def test_differences_that_the_headers_show(server: HubServer, folders: tuple[Path, Path], tmp_path: Path) -> None:
    lacking = Path(shutil.copytree(folders[1], tmp_path / "lacking"))
    edit_tensors(lacking, {}, drop=("norm.weight",))
    server.publish(OUTPUT, lacking)
    for options in (("--dry-run",), ("--sample", "1%")):
        done = compare(server, tmp_path, *options)
        assert done.returncode == 1 and "- norm.weight" in done.stdout, done.stderr
    (lacking / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    next(lacking.glob("*.safetensors")).unlink()
    server.publish(OUTPUT, lacking)
    done = compare(server, tmp_path, "--dry-run")
    assert done.returncode == 3 and "which is not there" in done.stdout, done.stderr
    assert not server.whole_shards()


@pytest.mark.slow
def test_wrong_usage(server: HubServer, folders: tuple[Path, Path], tmp_path: Path) -> None:
    two = compare(server, tmp_path, "--revision", "main")
    assert two.returncode == 2 and "Write @revision behind each of them" in two.stderr
    absent = run_dsv4(server, tmp_path, "verify", folders[0], "absent")
    assert absent.returncode == 3 and "absent: does not exist" in absent.stderr
    one = run_dsv4(server, tmp_path, "verify", folders[0], f"hf:{OUTPUT}", "--revision", "main", "--dry-run")
    assert one.returncode == 0, one.stderr
    nothing = run_dsv4(server, tmp_path, "verify", f"hf:{SOURCE}", "hf:else/Nothing")
    assert nothing.returncode == 3 and "no such repository" in nothing.stderr
