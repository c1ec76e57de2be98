"""`dsv4 verify --sample` of a repository on either hub: range requests only, about as many bytes as the sample has."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_servers import HubServer, Request, run_dsv4
from raw_safetensors import Tensors
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
