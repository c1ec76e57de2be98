"""`dsv4 verify --sample` of a repository on either hub: range requests only, about as many bytes as the sample has."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_servers import HubServer, Request, run_dsv4
from patience import LONG
from raw_safetensors import Tensors, write_folder
from tall import SIDE, tall, write_tall

REPOSITORY = "acme/Tall"
ROWS = 400


@pytest.fixture(scope="module")
def model() -> Tensors:
    return tall(ROWS * SIDE, SIDE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, model: Tensors) -> Path:
    return write_tall(tmp_path_factory.mktemp("tall") / "source", model)


@pytest.fixture
def server(source: Path) -> Iterator[HubServer]:
    with HubServer() as running:
        running.publish(REPOSITORY, source)
        yield running


def range_of(request: Request) -> tuple[int, int] | None:
    """(first byte, bytes) of a range request of a shard that the storage answered."""
    if request.host != "storage" or request.method != "GET" or not request.path.endswith(".safetensors"):
        return None
    headers = {name.lower(): value for name, value in request.headers.items()}
    first, _, last = headers["range"].removeprefix("bytes=").partition("-")
    return int(first), int(last) - int(first) + 1


# Audits in a process of their own, one for each request that a clean one makes: that request gets no proper answer.
FAULTS = """
import json, os, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hub_servers import HubServer, hub_environment, outcome
home, source, output = map(Path, sys.argv[2:5])
hub_name, faults, settings = sys.argv[5], json.loads(sys.argv[6]), json.loads(sys.argv[7])
slept = []
with HubServer() as server:
    server.publish("acme/Tall", source)
    server.publish("else/Tall", output)
    os.environ.update(hub_environment(server, home))
    from contextlib import ExitStack, closing
    from dsv4.convert.hub.open import HubOptions
    from dsv4.convert.hub.source import HubSource
    from dsv4.convert.hub.storage import HubFiles, open_hub_storage
    from dsv4.convert.proof.audit.sample import Sample
    from dsv4.convert.proof.run import verify_files
    from dsv4.convert.proof.work.settings import Settings
    time.sleep = slept.append  # retries at once

    def audit():
        sample = Sample(0.01) if settings["sample"] else None
        with ExitStack() as stack:
            sides = []
            for name in ("acme/Tall", "else/Tall"):
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=home)))
                storage = open_hub_storage(HubSource(hub_name, name), scratch / "shards", HubOptions())
                sides.append(HubFiles(stack.enter_context(closing(storage))))
            how = Settings(sample=sample, journals=home / "journals", max_workers=2)
            return verify_files(*sides, how).exit_code

    found = {"clean": outcome(audit)}
    requests = len(server.requests)
    for fault in faults:
        for number in range(requests):
            counted = iter(range(10**6))
            server.sabotage = lambda request: fault if next(counted) == number else ""
            found[f"{fault} {number}"] = outcome(audit)
            server.sabotage = lambda request: ""
            server.heal()
            if isinstance(found[f"{fault} {number}"], str):
                found[f"{fault} {number}, again"] = outcome(audit)
    server.retry_after = 7
    server.sabotage = lambda request: "429" if request.host == "storage" else ""
    found["too many"] = outcome(audit)
    print(json.dumps([found, slept]))
"""


def under_faults(
    home: Path, source: Path, output: Path, hub: str, faults: list[str], **settings: object
) -> tuple[dict[str, int | str], list[float]]:
    lab = Path(__file__).parents[2] / "lab"
    words = [lab, home, source, output, hub, json.dumps(faults), json.dumps(settings)]
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *map(str, words)], capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == 0, done.stderr
    found, slept = json.loads(done.stdout)
    return found, slept


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["hf", "ms"])
@pytest.mark.parametrize("sample", [True, False])
def test_a_fault_at_every_request(tmp_path: Path, hub: str, sample: bool) -> None:
    """An audit ends with its verdict or with code 3 or 4, never with a wrong verdict; the next one has the verdict."""
    folders = [tmp_path / "source", tmp_path / "output"]
    for folder in folders:
        write_folder(folder, {"model.safetensors": tall(16 * SIDE, SIDE)}, index=False)
    faults = ["500", "close", "cut", "404", "403"] if hub == "hf" else ["close", "cut", "403"]
    found, slept = under_faults(tmp_path, *folders, hub, faults, sample=sample)
    good = 5 if sample else 0
    wrong = {what: code for what, code in found.items() if code != good and str(code)[:2] not in ("3 ", "4 ")}
    assert found["clean"] == good and not wrong
    assert not [what for what, code in found.items() if what.endswith("again") and code != good]
    assert any(str(code).startswith("4 ") for code in found.values()) and len(found) > 8 * len(faults)
    assert str(found["too many"]).startswith("4 ") and max(slept) >= 7  # as long as Retry-After says


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_sizes_that_lie_and_gates(server: HubServer, source: Path, tmp_path: Path, hub: str) -> None:
    words = ("verify", source, f"{hub}:{REPOSITORY}", "--sample", "1%")
    server.strike("short", "*.safetensors", times=99)
    done = run_dsv4(server, tmp_path, *words)
    assert done.returncode in (3, 4), done.stdout
    server.heal()
    server.repositories[REPOSITORY].gated = True
    done = run_dsv4(server, tmp_path, *words)
    assert done.returncode == 4 and ("gated" in done.stderr or "refuses access" in done.stderr), done.stderr


@pytest.mark.slow
def test_a_renamed_repository(server: HubServer, source: Path, tmp_path: Path) -> None:
    """Hugging Face redirects from the old name."""
    server.renamed = {"older/Name": REPOSITORY}
    done = run_dsv4(server, tmp_path, "verify", source, "hf:older/Name", "--sample", "1%")
    assert done.returncode == 5, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--sample", "1%"), ()])
def test_a_branch_that_moves_while_it_is_read(
    server: HubServer, source: Path, model: Tensors, tmp_path: Path, how: tuple[str, ...]
) -> None:
    """ModelScope has branches that cannot be resolved to a commit."""
    old = server.repositories[REPOSITORY].branches["master"]
    name = "layers.0.ffn.experts.1.w1.weight"
    other = dict(model) | {name: model[name].like(model[name].array() ^ np.uint8(1))}
    newer = server.publish(REPOSITORY, write_tall(tmp_path / "newer", other))
    repository = server.repositories[REPOSITORY]
    repository.branches["master"], repository.last_changed = old, newer  # so that the branch keeps its name

    def move(request: Request) -> None:
        if request.host == "storage":
            repository.branches["master"] = newer

    server.watch = move
    done = run_dsv4(server, tmp_path, "verify", source, f"ms:{REPOSITORY}", *how)
    assert done.returncode in (3, 4) and "DIFFERENT" not in done.stdout, done.stdout + done.stderr


def weights_fetched(server: HubServer) -> int:
    """Bytes of shards, without their first bytes, which hold the header."""
    found = [part for request in server.requests if (part := range_of(request)) is not None]
    return sum(size for first, size in found if first)


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_one_percent_fetches_about_one_percent(server: HubServer, source: Path, tmp_path: Path, hub: str) -> None:
    write_tall(tmp_path / "out", tall(ROWS * SIDE, SIDE))
    done = run_dsv4(server, tmp_path, "verify", f"{hub}:{REPOSITORY}", "out", "--sample", "1%", "--seed=4", "--json")
    assert done.returncode == 5, done.stderr
    audit = json.loads(done.stdout)["audit"]
    assert (audit["blocks"], audit["of_blocks"], audit["seed"]) == (4 + 8 + 1, 3 * ROWS + 1, 4)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert 0.009 * total < weights_fetched(server) < 0.012 * total
    assert not server.whole_shards() and not list((tmp_path / "out").glob(".dsv4-*"))
    asked = [r for r in server.requests if r.host == "hub" and r.method == "GET" and r.path.endswith(".safetensors")]
    assert hub == "ms" or len(asked) <= 4  # Hugging Face's hub: once for each shard, then its storage for each range


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_a_difference_is_found(server: HubServer, model: Tensors, tmp_path: Path, hub: str) -> None:
    name = "layers.0.ffn.experts.1.w1.weight"
    other = dict(model) | {name: model[name].like(model[name].array() ^ np.uint8(1))}
    write_tall(tmp_path / "out", other)
    done = run_dsv4(server, tmp_path, "verify", f"{hub}:{REPOSITORY}", "out", "--sample", "1%")
    assert done.returncode == 1 and f"* {name}" in done.stdout and "DIFFERENT (a sample of 13 blocks" in done.stdout


@pytest.mark.slow
def test_bytes_that_change_on_the_way_are_no_difference(server: HubServer, source: Path, tmp_path: Path) -> None:
    """A range has no hash: what differs is read a second time."""
    write_tall(tmp_path / "out", tall(ROWS * SIDE, SIDE))
    struck: list[Request] = []

    def watch(request: Request) -> None:
        if (part := range_of(request)) is not None and part[0] and not struck:  # a block, not a header
            struck.append(request)
            server.strike("flip")

    server.watch = watch
    done = run_dsv4(server, tmp_path, "verify", f"hf:{REPOSITORY}", "out", "--sample", "1%")
    assert done.returncode == 4 and "arrived damaged" in done.stderr, done.stdout


@pytest.mark.slow
def test_storage_addresses_that_expire(server: HubServer, tmp_path: Path) -> None:
    """Storage that refuses an address that was valid before is asked again by way of the hub."""
    write_tall(tmp_path / "out", tall(ROWS * SIDE, SIDE))
    server.expire_after = 3
    done = run_dsv4(server, tmp_path, "verify", f"hf:{REPOSITORY}", "out", "--sample", "2%")
    assert done.returncode == 5, done.stderr
    asked = [r for r in server.requests if r.host == "hub" and r.method == "GET" and r.path.endswith(".safetensors")]
    assert len(asked) > 4
