"""The calls of a hub, one by one: servers that ignore ranges, branches, and what answers instead of a hub.

A proxy or the login page of a network that answers is no bug and no bad input, but the machine's trouble.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_servers import HubServer, Request, run_dsv4
from patience import LONG

from dsv4.convert.synthetic.checkpoint import make_checkpoint
from dsv4.convert.synthetic.geometry import Geometry

REPOSITORY = "acme/Tiny-V4"
PAGE = b"<!doctype html><html><head><title>Sign in to Airport WiFi</title></head><body>...</body></html>"
ESCAPES = "<html><head><title>\x1b[2JSign\u202e in\n\x9berror: FORGED</title></head></html>".encode()
ANSWERS = {"page": PAGE, "escapes": ESCAPES, "nothing": b"", "object": b"{}", "list": b"[]"}
SHOWN = {
    "page": "a web page titled 'Sign in to Airport WiFi'",
    "escapes": r"a web page titled '\x1b[2JSign\u202e in\n\x9berror: FORGED'",
    "nothing": "nothing", "object": "{}", "list": "[]",
}  # fmt: skip

# A hub's client in a process of its own, because the libraries read their endpoint when they are imported.
CLIENT = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hub_servers import HubServer, hub_environment
home, source, other = map(Path, sys.argv[2:5])
hub_name, repository, bodies = sys.argv[5], "acme/Tiny-V4", json.loads(sys.argv[6])
with HubServer() as server:
    commit = server.publish(repository, source)
    os.environ.update(hub_environment(server, home))
    from dsv4.convert.hub.open import open_hub
    from dsv4.errors import Dsv4Error
    hub = open_hub(hub_name)
    files = {{file.name: file for file in hub.files(repository, hub.resolve(repository, None))}}
    small, shard = files["config.json"], next(file for name, file in files.items() if name.endswith(".safetensors"))
{body}
"""
# Every call, answered by somebody else.
PORTAL = """
    calls = {"resolve": lambda: hub.resolve(repository, None), "files": lambda: hub.files(repository, commit)}
    for what, file in (("small", small), ("shard", shard)):
        ask = [repository, commit, file]
        calls |= {
            f"read {what}": lambda ask=ask: hub.read(*ask, 8, 100),
            f"fetch {what}": lambda ask=ask: hub.fetch_to_folder(*ask, home / "f", lambda count: None, True),
            f"cache {what}": lambda ask=ask: hub.fetch_to_cache(*ask, None, lambda count: None, True),
        }
    found = {}
    for name, body in bodies.items():
        for host in ("hub", "storage"):
            if hub_name == "hf":
                hub = open_hub(hub_name)  # which knows no address of the storage yet
            server.portal = lambda request: body.encode() if request.host == host else None
            for what, call in calls.items():
                if host == "storage" and "shard" not in what:
                    continue
                try:
                    call()
                    found[f"{name} {what} {host}"] = [0, "no error", ""]
                except Dsv4Error as error:
                    found[f"{name} {what} {host}"] = [error.exit_code, str(error), error.hint]
                except Exception as error:
                    found[f"{name} {what} {host}"] = [70, repr(error), ""]
    print(json.dumps(found))
"""
NO_RANGES = """
    server.strike("norange", times=99)
    for offset, length in ((0, 8), (8, 100), (shard.size - 5, 5), (0, shard.size)):
        read = hub.read(repository, commit, shard, offset, length)
        assert read == (source / shard.name).read_bytes()[offset : offset + length], (offset, length)
"""
BRANCHES = """
    assert hub.resolve(repository, None) == commit
    older = server.publish(repository, other)
    server.repositories[repository].branches |= {"main": commit, "master": commit}
    server.repositories[repository].last_changed = older  # which lists other files than the branch
    assert hub.resolve(repository, None) == "master"
    assert {file.name: file.sha256 for file in hub.files(repository, "master")} == {
        name: file.sha256 for name, file in files.items()
    }
"""


def client(hub: str, body: str, source: Path, home: Path, other: Path | None = None) -> str:
    """Run lines with `server`, `hub` and its `files`; what they print."""
    lab = Path(__file__).parents[2] / "lab"
    bodies = json.dumps({name: text.decode() for name, text in ANSWERS.items()})
    command = [sys.executable, "-c", CLIENT.format(body=body), lab, home, source, other or source, hub, bodies]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("portal") / "source", geometry=Geometry(compress_ratios=(0,)))


@pytest.mark.parametrize("hub", ["hf", "ms"])
@pytest.mark.slow
def test_a_server_that_ignores_ranges(hub: str, source: Path, tmp_path: Path) -> None:
    """It sends the file from its start, wherever the bytes are that were asked for."""
    client(hub, NO_RANGES, source, tmp_path)


@pytest.mark.slow
def test_a_branch_whose_newest_commit_lists_other_files_keeps_its_name(source: Path, tmp_path: Path) -> None:
    """ModelScope has no call that resolves a branch."""
    other = make_checkpoint(tmp_path / "other", geometry=Geometry(compress_ratios=(0,)), seed=1)
    client("ms", BRANCHES, source, tmp_path, other)


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["hf", "ms"])
def test_every_call_answered_by_somebody_else(hub: str, source: Path, tmp_path: Path) -> None:
    found = json.loads(client(hub, PORTAL, source, tmp_path))
    assert len(found) == len(ANSWERS) * (8 + 3)
    for what, (exit_code, text, hint) in found.items():
        assert exit_code == 4, (what, text)
        assert "http://" in text and "answers 200 with" in text, (what, text)  # who, and what
        assert "Open http://" in hint and "HTTPS_PROXY" in hint, (what, hint)
        if (kind := what.partition(" ")[0]) in ("page", "escapes"):  # to a HEAD request it comes without its title
            assert SHOWN[kind] in text or "with a web page," in text, (what, text)


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["hf", "ms"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_from_the_command_line(hub: str, answer: str, source: Path, tmp_path: Path) -> None:
    with HubServer() as server:
        server.publish(REPOSITORY, source)
        server.portal = lambda request: ANSWERS[answer]
        done = run_dsv4(server, tmp_path, "inspect", f"{hub}:{REPOSITORY}", "--json")
        assert done.returncode == json.loads(done.stdout)["exit_code"] == 4, done.stderr
        assert f"{server.url} answers 200 with" in done.stderr and SHOWN[answer] in done.stderr


@pytest.mark.slow
def test_a_portal_in_the_middle_of_a_conversion(source: Path, tmp_path: Path) -> None:
    def after_the_headers(request: Request) -> bytes | None:
        whole = request.host == "storage" and "Range" not in request.headers
        return PAGE if whole and request.path.endswith(".safetensors") else None

    with HubServer() as server:
        server.publish(REPOSITORY, source)
        server.portal = after_the_headers
        done = run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out")
        assert done.returncode == 4 and SHOWN["page"] in done.stderr
        assert not (tmp_path / "out" / "config.json").exists()
        server.portal = lambda request: None
        assert run_dsv4(server, tmp_path, "convert", f"hf:{REPOSITORY}", "out").returncode == 0
