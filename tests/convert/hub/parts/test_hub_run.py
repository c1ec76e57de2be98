"""`dsv4 run hf:…` and `ms:…` against both hubs: the folder's bits, and only what is needed is fetched, once."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from drafting import random_drafts
from folder_hub import FolderHub, part_storage
from hub_servers import HubServer, Request, hub_environment, run_dsv4
from patience import LONG
from ranks import run_ranks
from tiny import TINY

from dsv4.cli import run
from dsv4.convert import convert
from dsv4.convert.checkpoint.rank_files import open_checkpoint
from dsv4.convert.checkpoint.reader import Checkpoint
from dsv4.convert.hub.ranges import HEAD_BYTES
from dsv4.convert.synthetic.checkpoint import Geometry, make_checkpoint
from dsv4.convert.synthetic.v41 import V41Geometry
from dsv4.model.loading import check_loadable
from dsv4.model.reading.needed import bytes_of, needed_of

REPOSITORY = "acme/Sparse"
TOKENS = ("--tokens", "3,1,4,1,5,9,2,6")
SHORT = ("--temperature", "0", "--max-new-tokens", "3")
# Shards of more than the first bytes that are fetched for the header; more experts than a short prompt chooses.
SPARSE = Geometry(
    compress_ratios=(0, 4, 0), vocab_size=512, moe_intermediate_size=256, n_routed_experts=32, num_experts_per_tok=1
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sparse") / "c", geometry=SPARSE)


@pytest.fixture
def server(folder: Path) -> Iterator[HubServer]:
    with HubServer() as running:
        running.publish(REPOSITORY, folder)
        yield running


def ranges(server: HubServer) -> list[tuple[str, int, int]]:
    """(shard, first byte, end) of each range of a shard that the storage was asked for."""
    found = []
    for request in server.requests:
        if request.host == "storage" and request.method == "GET" and request.path.endswith(".safetensors"):
            headers = {name.lower(): value for name, value in request.headers.items()}
            first, _, last = headers["range"].removeprefix("bytes=").partition("-")
            found.append((request.path.rsplit("/", 1)[1], int(first), int(last) + 1))
    return sorted(found)


def fetched_once(server: HubServer) -> int:
    """Bytes of shards that were asked for, none of them twice."""
    found = ranges(server)
    assert all(one[0] != other[0] or one[2] <= other[1] for one, other in pairwise(found))
    return sum(end - first for _, first, end in found)


def chosen_bytes(folder: Path, trace: Path, tokens: int) -> tuple[int, int]:
    """Bytes at least and at most: of headers, dense weights and the experts in a trace; of these and single rows.

    The first bytes of a shard, which come with its header, may hold a little of what nobody asked for.
    """
    checkpoint = Checkpoint.open(folder)
    found = check_loadable(checkpoint)
    needed = needed_of(found.weights, found.config)
    experts = set()
    for line in map(json.loads, trace.read_text().splitlines()):
        if line["module"].endswith(".ffn.gate.experts"):
            layer = line["module"].removesuffix("gate.experts")
            experts |= {f"{layer}experts.{number}." for row in line["experts"] for number in row}
    spans = [span for span in needed.experts if any(span[0].startswith(prefix) for prefix in experts)]
    assert 0 < bytes_of(spans) < bytes_of(needed.experts)
    least = bytes_of(needed.always) + bytes_of(spans)
    return least, least + len(checkpoint.shards) * HEAD_BYTES + tokens * needed.row_bytes


@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_the_same_bits_and_only_what_is_needed(server: HubServer, folder: Path, tmp_path: Path, hub: str) -> None:
    name = f"{hub}:{REPOSITORY}"
    assert run(["run", str(folder), *TOKENS, "--logits", str(tmp_path / "expected")]) == 0
    planned = run_dsv4(server, tmp_path, "run", name, *TOKENS, "--logits", "out", "--dry-run", "--json")
    plan = json.loads(planned.stdout)["checkpoints"][0]
    assert planned.returncode == 0 and fetched_once(server) <= 8 * HEAD_BYTES, planned.stderr
    more = ("--logits", "out", "--trace", "trace", "--json")
    done = run_dsv4(server, tmp_path, "run", name, *TOKENS, *more)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == (tmp_path / "expected").read_bytes()
    hub_says = json.loads(done.stdout)["statistics"]["from_hub"]
    least, most = chosen_bytes(folder, tmp_path / "trace", 2 * 8)
    assert least <= fetched_once(server) <= most < 0.7 * sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert plan["fetch_bytes_least"] <= hub_says["fetched_bytes"] <= plan["fetch_bytes_most"]
    assert hub_says["commit"] == server.repositories[REPOSITORY].branches["main"]
    before = len(ranges(server))
    offline = {"HF_HUB_OFFLINE": "1"} if hub == "hf" else {}
    again = run_dsv4(server, tmp_path, "run", name, *TOKENS, *more, **offline)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["statistics"]["from_hub"]["fetched_bytes"] == 0
    assert len(ranges(server)) == before


def test_an_answer_is_the_folders(server: HubServer, folder: Path, tmp_path: Path) -> None:
    """Tokenizer, encoding and end of text come from the hub too. A new commit while it runs changes nothing."""
    newer = server.publish(REPOSITORY, make_checkpoint(tmp_path / "newer", geometry=SPARSE, seed=3))
    server.repositories[REPOSITORY].branches["main"] = server.publish(REPOSITORY, folder)
    server.move_after_listing(REPOSITORY, "main", newer)
    local = run_dsv4(server, tmp_path, "run", folder, "Hello", "--mode", "think", *SHORT, "--json")
    done = run_dsv4(server, tmp_path, "run", f"hf:{REPOSITORY}", "Hello", "--mode", "think", *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answers"] == json.loads(local.stdout)["answers"]
    assert json.loads(done.stdout)["edition_reason"] == json.loads(local.stdout)["edition_reason"]
    pinned = (f"hf:{REPOSITORY}", "--revision", server.repositories[REPOSITORY].branches["master"])
    done = run_dsv4(server, tmp_path, "run", *pinned, *TOKENS, "--compare", f"ms:{REPOSITORY}@{newer}", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["checkpoints"][1].startswith("ms:"), done.stderr


def _v41(folder: Path) -> Path:
    return make_checkpoint(folder, geometry=V41Geometry())


def _gguf(folder: Path) -> Path:
    convert(make_checkpoint(folder.with_name("source"), geometry=TINY), folder, to="gguf", max_workers=1)
    return folder


def _rank_files(folder: Path) -> Path:
    convert(make_checkpoint(folder.with_name("source")), folder, to="fp8", layout="mp", model_parallel=2)
    return folder


@pytest.mark.parametrize("make", [_v41, random_drafts, _gguf, _rank_files])
def test_every_form(server: HubServer, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """V4.1 with rows of its n-gram tables, DSpark's stages, GGUF, rank files."""
    made = make(tmp_path / "made")
    server.publish("acme/Form", made)
    done = run_dsv4(server, tmp_path, "run", "hf:acme/Form", *TOKENS, "--compare", made)
    assert done.returncode == 0 and "BIT-EQUAL" in done.stdout, done.stderr


def test_ranks(server: HubServer, folder: Path, tmp_path: Path) -> None:
    environment = hub_environment(server, tmp_path)
    done = run_ranks(2, tmp_path, "run", f"hf:{REPOSITORY}", *TOKENS, "--compare", folder, environment=environment)
    assert done.codes == [0, 0] and "BIT-EQUAL" in done.out[0], done.err


def test_an_interruption_keeps_what_has_arrived(server: HubServer, folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsv4", "run", f"hf:{REPOSITORY}", *TOKENS, *SHORT]
    running = subprocess.Popen(
        command, env=hub_environment(server, tmp_path), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )

    once = threading.Lock()

    def watch(request: Request) -> None:
        if len(ranges(server)) >= 12 and once.acquire(blocking=False):  # the headers have arrived, and a few parts
            os.kill(running.pid, signal.SIGINT)

    server.watch = watch
    _, words = running.communicate(timeout=LONG)
    assert running.returncode == 130 and "interrupted" in words and "What was fetched is kept" in words, words
    server.watch = lambda request: None
    done = run_dsv4(server, tmp_path, "run", f"hf:{REPOSITORY}", *TOKENS, "--compare", folder)
    assert done.returncode == 0, done.stderr
    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert sum(end - first for _, first, end in ranges(server)) < whole


@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_a_hub_that_refuses(server: HubServer, tmp_path: Path, hub: str) -> None:
    name = f"{hub}:{REPOSITORY}"
    server.repositories[REPOSITORY].gated = True
    done = run_dsv4(server, tmp_path, "run", name, *TOKENS, *SHORT)
    assert done.returncode == 4 and ("gated" in done.stderr or "refuses access" in done.stderr), done.stderr
    server.repositories[REPOSITORY].gated = False
    server.strike("short", "*.safetensors", times=99)
    done = run_dsv4(server, tmp_path, "run", name, *TOKENS, *SHORT)
    assert done.returncode in (3, 4), done.stdout


# Runs in a process of their own, one for each request that a clean one makes: that request gets no proper answer.
FAULTS = """
import json, os, shutil, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hub_servers import HubServer, hub_environment, outcome
home, folder, hub_name, faults = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5])
slept = []
with HubServer() as server:
    server.publish("acme/Sparse", folder)
    os.environ.update(hub_environment(server, home))
    from contextlib import closing
    from dsv4.convert.checkpoint.reader import Checkpoint
    from dsv4.convert.hub.open import HubOptions
    from dsv4.convert.hub.parts import storage as parts
    from dsv4.convert.hub.source import HubSource
    parts.HEAD_BYTES = 1 << 14
    time.sleep = slept.append  # retries at once
    local = Checkpoint.open(folder)
    names = [name for name in local.tensors if name.startswith(("layers.1.", "head", "norm"))]
    expected = {name: bytes(local.read_bytes(name)) for name in names}

    def read():
        with closing(parts.open_parts(HubSource(hub_name, "acme/Sparse"), HubOptions())) as storage:
            checkpoint = Checkpoint.open(storage)
            checkpoint.expect((name, 0, info.nbytes) for name in names for info in [checkpoint.tensors[name]])
            same = all(bytes(checkpoint.read_bytes(name)) == expected[name] for name in names)
            return storage.fetched_bytes if same else "wrong bytes"

    def anew():
        for cache in ("hf", "ms"):
            shutil.rmtree(home / cache, ignore_errors=True)

    found = {"clean": outcome(read), "second": outcome(read)}
    anew()
    server.requests.clear()
    outcome(read)
    requests = len(server.requests)
    for number in range(requests):
        anew()
        fault, counted = faults[number % len(faults)], iter(range(10**6))
        server.sabotage = lambda request: fault if next(counted) == number else ""
        found[f"{fault} {number}"] = outcome(read)
        server.sabotage = lambda request: ""
        server.heal()
        if isinstance(found[f"{fault} {number}"], str):
            found[f"{fault} {number}, again"] = outcome(read)
    anew()
    server.retry_after = 7
    server.sabotage = lambda request: "429" if request.host == "storage" else ""
    found["too many"] = outcome(read)
    print(json.dumps([found, slept]))
"""


@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_a_fault_at_every_request(tmp_path: Path, hub: str) -> None:
    """A run has the hub's bytes or ends with code 3 or 4, and the next one fetches the rest."""
    folder, faults = make_checkpoint(tmp_path / "c", geometry=TINY), ["close", "cut", "403"]
    lab = Path(__file__).parents[3] / "lab"
    words = [sys.executable, "-c", FAULTS, *map(str, (lab, tmp_path, folder, hub)), json.dumps(faults)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    found, slept = json.loads(done.stdout)
    clean = found["clean"]
    assert isinstance(clean, int) and found["second"] == 0
    ended = {what: end for what, end in found.items() if isinstance(end, str)}
    assert all(end[:2] in ("3 ", "4 ") for end in ended.values()), ended
    assert all(isinstance(end, int) and end <= clean for what, end in found.items() if what.endswith("again"))
    assert len(ended) > 2 and any("What was fetched is kept" in end for end in ended.values())
    assert found["too many"].startswith("4 ") and max(slept) >= 7  # as long as Retry-After says


def test_rank_files_and_gguf_are_read_by_ranges(tmp_path: Path) -> None:
    """Slices by columns, and blocks of codes beside scales: what is announced is what is read."""
    for make in (_rank_files, _gguf):
        folder = make(tmp_path / make.__name__ / "made")
        hub = FolderHub(folder, tmp_path / make.__name__ / "cache")
        with closing(part_storage(hub)) as storage:
            checkpoint, local = open_checkpoint(storage), open_checkpoint(folder)
            name = next(name for name in checkpoint.tensors if name.endswith("attn.wo_b.weight"))
            width = local.tensors[name].row_bytes
            expert = next(name for name in checkpoint.tensors if name.endswith("ffn.experts.1.w2.weight"))
            for each, start, stop in ((name, width, 3 * width), (expert, 0, local.tensors[expert].nbytes)):
                checkpoint.expect([(each, start, stop)])
                before = len(hub.read_ranges)
                assert checkpoint.read_bytes(each, start, stop) == local.read_bytes(each, start, stop)
                assert len(hub.read_ranges) == before
