"""ModelScope through `modelscope_hub`, the client that the `modelscope` package itself is made of.

The client is used directly because importing `modelscope` takes 1.7 s and this takes 0.3 s. It resumes partial files
and checks SHA-256 itself, which the hub lists for every file.

The hub's API has no call that resolves a branch. Each listed file carries the commit that last changed it; the newest
of them is the branch's commit, which is believed only if listing that commit gives the same files as the branch.
Otherwise the branch name stays, and the hashes of the first listing are what pins the content.
"""

import difflib
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import modelscope_hub
import requests
from modelscope_hub import _download as client_download
from modelscope_hub import errors
from tqdm.auto import tqdm

from dsv4.convert.checkpoint.source import HubName
from dsv4.errors import Dsv4Error, InputError, MachineError, printable
from dsv4.progress import Progress

from .client import BadFile, Busy, NetworkError, NoRepository, RemoteFile, with_patience

_LOGIN = "Log in with `modelscope login`, set MODELSCOPE_API_TOKEN, or give --token."
_DEFAULT_BRANCH = "master"

Result = TypeVar("Result")


def explain(error: BaseException, repository: str) -> Dsv4Error | None:
    """What a library exception means to a user; None for a fault of the machine or of dsv4, which passes through."""
    first_line = printable((str(error).splitlines() or [type(error).__name__])[0])
    if isinstance(error, errors.NotExistError):
        return NoRepository(f"ms:{repository}: no such repository, revision or file", f"If it is private: {_LOGIN}")
    if isinstance(error, errors.PermissionDeniedError | errors.AuthenticationError):
        hint = f"Ask for access on its page at the hub. {_LOGIN}"
        return NetworkError(f"ms:{repository}: the hub refuses access ({error.status_code})", hint)
    if isinstance(error, errors.FileIntegrityError):
        return BadFile(f"ms:{repository}: {first_line}")
    again = "Run the same command again: finished files are kept. --fallback tries the other hub."
    if isinstance(error, errors.RateLimitError):
        return Busy(f"ms:{repository}: the hub answers 429 (too many requests)", again)
    if isinstance(error, errors.ServerError):
        return Busy(f"ms:{repository}: the hub answers {error.status_code or 'with an error'}: {first_line}", again)
    if isinstance(error, errors.NetworkError | requests.RequestException):
        return NetworkError(f"ms:{repository}: the hub does not answer: {first_line}", again)
    if isinstance(error, errors.APIError):
        return MachineError(f"ms:{repository}: the hub answers {error.status_code}: {first_line}")
    if isinstance(error, errors.HubError):
        return NetworkError(f"ms:{repository}: {first_line}", again)
    return None


def _raise(error: Exception, repository: str) -> NoReturn:
    explained = explain(error, repository)
    if explained is None:
        raise error
    raise explained from error


def _callback_for(progress: Progress) -> type[Any]:
    class Callback(client_download.ProgressCallback):
        def update(self, size: int) -> None:
            progress(size)

    return Callback


def _remote_file(entry: dict[str, Any]) -> RemoteFile:
    sha256 = entry.get("Sha256") or None
    return RemoteFile(str(entry.get("Path") or entry.get("Name")), int(entry.get("Size") or 0), sha256=sha256)


class ModelScope:
    """See client.Hub."""

    prefix: HubName = "ms"
    title = "ModelScope"

    def __init__(self, token: str | None) -> None:
        self._api = modelscope_hub.HubApi(token=token)
        # The client draws a bar of its own for every file, also where nobody looks; ours counts all of them.
        vars(client_download)["tqdm"] = functools.partial(tqdm, disable=True)
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)

    def _call(self, repository: str, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except Exception as error:
            _raise(error, repository)

    def _entries(self, repository: str, revision: str) -> list[dict[str, Any]]:
        listed = self._call(repository, lambda: self._api.legacy.list_repo_files(repository, "model", revision))
        return [e for e in listed if (e.get("Type") or "blob") != "tree"]

    def offline(self) -> bool:
        """See Hub. This library has no such switch."""
        return False

    def cached_files(self, repository: str, revision: str | None, cache: Path | None) -> tuple[str, list[RemoteFile]]:
        """See Hub. Never called: see `offline`."""
        raise MachineError(f"ms:{repository}: cannot be listed without a network")

    def resolve(self, repository: str, revision: str | None) -> str:
        """See Hub, and the module's docstring."""
        self._endpoint_for(repository)
        wanted = revision or _DEFAULT_BRANCH
        entries = self._entries(repository, wanted)
        if not entries:
            raise InputError(f"ms:{repository}@{wanted}: lists no files", "Look at its branches on the hub.")
        newest = max(entries, key=lambda e: int(e.get("CommittedDate") or 0))
        commit = str(newest.get("Revision") or "")
        if len(commit) != 40 or commit == wanted:
            return wanted
        try:
            there = self._entries(repository, commit)
        except InputError:
            return wanted
        return commit if set(map(_remote_file, there)) == set(map(_remote_file, entries)) else wanted

    def _endpoint_for(self, repository: str) -> None:
        # modelscope.cn and modelscope.ai are two sites; MODELSCOPE_ENDPOINT decides where it is set.
        endpoint = self._call(repository, lambda: self._api.resolve_endpoint_for_read(repository))
        if endpoint != self._api.legacy.endpoint:
            self._api = modelscope_hub.HubApi(endpoint=endpoint, token=self._api.legacy.token)

    def files(self, repository: str, commit: str) -> list[RemoteFile]:
        """See Hub."""
        return [_remote_file(e) for e in self._entries(repository, commit)]

    def read(self, repository: str, commit: str, file: RemoteFile, offset: int, length: int) -> bytes:
        """See Hub. A server that ignores Range sends the file from its start: we stop where we have enough."""
        return with_patience(
            lambda: self._call(repository, lambda: self._read(repository, commit, file.name, offset, length))
        )

    def _read(self, repository: str, commit: str, name: str, offset: int, length: int) -> bytes:
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        with self._api.legacy.download_stream(repository, "model", name, commit, headers=headers) as response:
            skip = 0 if response.status_code == 206 else offset
            received = bytearray()
            for chunk in response.iter_content(1 << 16):
                received += chunk
                if len(received) >= skip + length:
                    break
        data = bytes(received[skip : skip + length])
        if len(data) < length:
            where = f"ms:{repository}/{printable(name)}"
            raise InputError(f"{where}: ends after {len(received)} bytes", "The file is shorter than listed.")
        return data

    def _fetch(
        self, repository: str, commit: str, file: RemoteFile, progress: Progress, again: bool, **where: Any
    ) -> Path:
        try:
            path = self._call(
                repository,
                lambda: self._api.downloader.download_file(
                    repository, "model", file.name, revision=commit, force=again, expected_sha256=file.sha256,
                    file_size=file.size, progress_callbacks=[_callback_for(progress)], **where,
                ),
            )  # fmt: skip
        except NoRepository:
            name = f"ms:{repository}/{printable(file.name)}"
            raise BadFile(f"{name}: a listed file is not there", "Try again later, or with --fallback.") from None
        return Path(path)

    def fetch_to_folder(
        self, repository: str, commit: str, file: RemoteFile, folder: Path, progress: Progress, again: bool
    ) -> Path:
        """See Hub."""
        return self._fetch(repository, commit, file, progress, again, local_dir=folder)

    def fetch_to_cache(
        self, repository: str, commit: str, file: RemoteFile, cache: Path | None, progress: Progress, again: bool
    ) -> Path:
        """See Hub."""
        return self._fetch(repository, commit, file, progress, again, cache_dir=cache)

    def cached(self, repository: str, commit: str, name: str, cache: Path | None) -> Path | None:
        """See Hub."""
        try:
            return Path(
                self._api.downloader.download_file(
                    repository, "model", name, revision=commit, cache_dir=cache, local_files_only=True
                )
            )
        except errors.CacheNotFound:
            return None

    def snapshot_folder(self, repository: str, commit: str, cache: Path | None) -> Path:
        """See Hub."""
        root = cache or modelscope_hub.get_default_config().cache_dir
        return Path(root) / "models" / repository.replace("/", "--") / "snapshots" / commit

    def remember(self, repository: str, revision: str | None, commit: str, cache: Path | None) -> None:
        """See Hub. This cache has no place for it."""

    def abort(self) -> None:
        """See Hub. The progress ends its transfers."""

    def similar(self, repository: str) -> list[str]:
        """See Hub."""
        owner, name = repository.split("/")
        try:
            found = {str(m.repo_id) for m in self._api.list_repos("model", owner=owner, page_size=100).items}
            found |= {str(m.repo_id) for m in self._api.list_repos("model", search=name, page_size=20).items}
        except Exception:  # a suggestion is a courtesy; the error that led here is what the user must see
            return []
        return difflib.get_close_matches(repository, sorted(found), n=3, cutoff=0.6)
