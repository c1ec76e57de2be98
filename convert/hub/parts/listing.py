"""The listing of a commit, kept beside the parts of its shards: with HF_HUB_OFFLINE the hub is not asked for it.

The library's own cache knows only of files that it has whole.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

from dsv4.convert.hub.client import RemoteFile, Snapshot
from dsv4.files import result_file


def _path(folder: Path, commit: str) -> Path:
    return folder / f"{commit}.json"


def remember(snapshot: Snapshot, folder: Path) -> None:
    """Write the listing of a commit. A branch is not remembered: it may move."""
    path = _path(folder, snapshot.commit)
    if not snapshot.is_commit or path.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with result_file(path, lambda line: None) as file:
        file.write(json.dumps([asdict(listed) for listed in snapshot.files.values()]).encode())


def remembered(snapshot: Snapshot, folder: Path) -> Snapshot:
    """The snapshot of a commit with all of its files, if an earlier run has remembered them."""
    try:
        listed = [RemoteFile(**entry) for entry in json.loads(_path(folder, snapshot.commit).read_bytes())]
    except (OSError, ValueError, TypeError):
        return snapshot
    return replace(snapshot, files={file.name: file for file in listed} | snapshot.files)
