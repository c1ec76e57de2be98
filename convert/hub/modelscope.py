"""ModelScope through `modelscope_hub`, the client inside the `modelscope` package.

The client is used directly because importing `modelscope` takes 1.7 s and this takes 0.3 s. It resumes partial files
and checks SHA-256 itself, which the hub lists for every file.

The hub's API has no call that resolves a branch. Each listed file names the commit that last changed it. The newest of
these is taken for the branch's commit if listing it gives the same files as the branch. Otherwise the branch name is
kept, and the hashes of the first listing pin the content.
"""

import difflib
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import modelscope_hub
import requests
import urllib3
from modelscope_hub import _download as client_download
from modelscope_hub import errors
from tqdm.auto import tqdm

from dsv4.errors import Dsv4Error, InputError, MachineError
from dsv4.progress import Progress

from .answers import Answer, Page, check_listed, cut, file_expected, forget, not_a_hub, note
from .client import AGAIN, BadFile, Busy, Dropped, NetworkError, NoRepository, RemoteFile, first_line, with_patience
from .source import HubName

_LOGIN = "Log in with `modelscope login`, set MODELSCOPE_API_TOKEN, or give --token."
_DEFAULT_BRANCH = "master"
PAGE_BYTES = 2**14  # read of a web page: enough to find its title

Result = TypeVar("Result")


def _status(error: errors.HubError, label: str) -> Dsv4Error:
    return MachineError(f"{label}: the hub answers {getattr(error, 'status_code', None)}: {first_line(error)}")


def _refused(error: errors.APIError, label: str) -> Dsv4Error:
    hint = f"Ask for access on its page at the hub. {_LOGIN}"
    return NetworkError(f"{label}: the hub refuses access ({error.status_code})", hint)


def _no_repository(error: Exception, label: str) -> Dsv4Error:
    return NoRepository(f"{label}: no such repository, revision or file", f"If it is private: {_LOGIN}")


def _too_many(error: errors.RateLimitError, label: str) -> Dsv4Error:
    return Busy(f"{label}: the hub answers 429 (too many requests)", AGAIN, float(error.retry_after or 0))


def _server_error(error: errors.APIError, label: str) -> Dsv4Error:
    return Busy(f"{label}: the hub answers {error.status_code or 'with an error'}: {first_line(error)}", AGAIN)


def _no_answer(error: Exception, label: str) -> Dsv4Error:
    if error.args and isinstance(error.args[0], urllib3.exceptions.ProtocolError):  # it was connected
        return _dropped(error, label)
    return NetworkError(f"{label}: the hub does not answer: {first_line(error)}", AGAIN)


def _dropped(error: Exception, label: str) -> Dsv4Error:
    return Dropped(f"{label}: the hub dropped the connection: {first_line(error)}", AGAIN)


def _another_form(error: Exception, label: str) -> Dsv4Error:
    """The library could not parse the answer."""
    return not_a_hub(label, "a listing")


# Exceptions of the library, and what they mean; the first row that fits counts.
_MEANINGS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Callable[[Any, str], Dsv4Error]], ...] = (
    (errors.NotExistError, _no_repository),
    ((errors.PermissionDeniedError, errors.AuthenticationError), _refused),
    (errors.FileIntegrityError, lambda error, label: BadFile(f"{label}: {first_line(error)}")),
    (errors.RateLimitError, _too_many),
    (errors.ServerError, _server_error),
    (requests.JSONDecodeError, _another_form),
    (requests.exceptions.ChunkedEncodingError, _dropped),
    ((errors.NetworkError, requests.RequestException), _no_answer),
    (errors.APIError, _status),
    (errors.HubError, lambda error, label: NetworkError(f"{label}: {first_line(error)}", AGAIN)),
    ((KeyError, TypeError, AttributeError, ValueError), _another_form),
)


def explain(error: BaseException, label: str) -> Dsv4Error | None:
    """A library exception as a Dsv4Error; None for errors of the machine or of dsv4, which pass through."""
    if isinstance(error, Dsv4Error):
        return error
    return next((meaning(error, label) for types, meaning in _MEANINGS if isinstance(error, types)), None)


def _callback_for(progress: Progress) -> type[Any]:
    class Callback(client_download.ProgressCallback):
        def update(self, size: int) -> None:
            progress(size)

    return Callback


def _note_answer(response: requests.Response, *_: Any, **__: Any) -> None:
    """Called by the client's HTTP library for every answer, before its body is read."""
    kind, length = response.headers.get("Content-Type", ""), response.headers.get("Content-Length", "")

    def body() -> str:
        if response._content is not False:
            return response.text
        return response.raw.read(PAGE_BYTES, decode_content=True).decode(errors="replace") if "html" in kind else ""

    note(Answer(response.url, response.status_code, kind, int(length) if length.isdecimal() else None, body))


def _watched(api: modelscope_hub.HubApi) -> modelscope_hub.HubApi:
    """`api` with response hooks that record its answers."""
    for session in (api.legacy._session, api.legacy._read_session, api.openapi._session):
        session.hooks["response"].append(_note_answer)
    return api


def _remote_file(entry: dict[str, Any]) -> RemoteFile:
    sha256 = entry.get("Sha256") or None
    return RemoteFile(str(entry.get("Path") or entry.get("Name")), int(entry.get("Size") or 0), sha256=sha256)


class ModelScope:
    """ModelScope through modelscope_hub; the methods of client.Hub."""

    prefix: HubName = "ms"
    title = "ModelScope"

    def __init__(self, token: str | None) -> None:
        self._api = _watched(modelscope_hub.HubApi(token=token))
        # The client draws a bar for every file, also where stderr is no terminal; our bar counts all files.
        vars(client_download)["tqdm"] = functools.partial(tqdm, disable=True)
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)

    def _call(self, repository: str, action: Callable[[], Result]) -> Result:
        """Call the library and translate its exceptions into Dsv4Error."""
        forget()
        try:
            return action()
        except Page as page:
            raise page.error from None
        except Exception as error:
            explained = explain(error, f"ms:{repository}")
            if explained is None:
                raise
            raise explained from error

    def _entries(self, repository: str, revision: str) -> list[dict[str, Any]]:
        """The hub's entry for each file of a revision."""

        def listed() -> list[dict[str, Any]]:
            entries = self._api.legacy.list_repo_files(repository, "model", revision)
            return [entry for entry in entries if (entry.get("Type") or "blob") != "tree"]

        return check_listed(self._call(repository, listed), f"ms:{repository}@{revision}")

    def offline(self) -> bool:
        """False: this library has no offline switch."""
        return False

    def cached_files(self, repository: str, revision: str | None, cache: Path | None) -> tuple[str, list[RemoteFile]]:
        """Not available in this library. Raises MachineError; not called, because `offline` is False."""
        raise MachineError(f"ms:{repository}: cannot be listed without a network")

    def resolve(self, repository: str, revision: str | None) -> str:
        """The commit that a branch or tag points to now, or the branch itself: see the module's docstring."""
        self._endpoint_for(repository)
        wanted = revision or _DEFAULT_BRANCH
        entries = self._entries(repository, wanted)
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
            self._api = _watched(modelscope_hub.HubApi(endpoint=endpoint, token=self._api.legacy.token))

    def files(self, repository: str, commit: str) -> list[RemoteFile]:
        """Every file of a commit or branch, with the hash that the hub lists."""
        entries = self._entries(repository, commit)
        return self._call(repository, lambda: [_remote_file(entry) for entry in entries])

    def read(self, repository: str, commit: str, file: RemoteFile, offset: int, length: int) -> bytes:
        """`length` bytes by a range request. If the server ignores Range, the bytes before `offset` are skipped."""
        return with_patience(
            lambda: self._call(repository, lambda: self._read(repository, commit, file, offset, length))
        )

    def _read(self, repository: str, commit: str, file: RemoteFile, offset: int, length: int) -> bytes:
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        with self._api.legacy.download_stream(repository, "model", file.name, commit, headers=headers) as response:
            skip = 0 if response.status_code == 206 else offset
            return cut(response.iter_content(1 << 16), skip, length, file, f"ms:{repository}/{file.name}")

    def _fetch(
        self, repository: str, commit: str, file: RemoteFile, progress: Progress, again: bool, **where: Any
    ) -> Path:
        def fetched() -> Any:
            return self._api.downloader.download_file(
                repository, "model", file.name, revision=commit, force=again, expected_sha256=file.sha256,
                file_size=file.size, progress_callbacks=[_callback_for(progress)], **where,
            )  # fmt: skip

        try:
            with file_expected(f"ms:{repository}", file):
                return Path(self._call(repository, fetched))
        except NoRepository:
            name = f"ms:{repository}/{file.name}"
            raise BadFile(f"{name}: a listed file is not there", "Try again later.") from None

    def fetch_to_folder(
        self, repository: str, commit: str, file: RemoteFile, folder: Path, progress: Progress, again: bool
    ) -> Path:
        """Fetch a file to `folder`/name. `again` ignores every copy that is already on disk."""
        return self._fetch(repository, commit, file, progress, again, local_dir=folder)

    def fetch_to_cache(
        self, repository: str, commit: str, file: RemoteFile, cache: Path | None, progress: Progress, again: bool
    ) -> Path:
        """Fetch a file into the library's cache and return its path there."""
        return self._fetch(repository, commit, file, progress, again, cache_dir=cache)

    def cached(self, repository: str, commit: str, name: str, cache: Path | None) -> Path | None:
        """The path of a file in the library's cache; None if it is not there."""
        try:
            return Path(
                self._api.downloader.download_file(
                    repository, "model", name, revision=commit, cache_dir=cache, local_files_only=True
                )
            )
        except errors.CacheNotFound:
            return None

    def snapshot_folder(self, repository: str, commit: str, cache: Path | None) -> Path:
        """The folder of a commit in the library's cache."""
        root = cache or modelscope_hub.get_default_config().cache_dir
        return Path(root) / "models" / repository.replace("/", "--") / "snapshots" / commit

    def remember(self, repository: str, revision: str | None, commit: str, cache: Path | None) -> None:
        """Nothing to do: this cache does not record branches."""

    def abort(self) -> None:
        """Nothing to do: an exception from the progress ends every transfer of this library."""

    def similar(self, repository: str) -> list[str]:
        """At most three repositories with names like this one, best first; [] if the hub does not answer."""
        owner, name = repository.split("/")
        try:
            found = {str(m.repo_id) for m in self._api.list_repos("model", owner=owner, page_size=100).items}
            found |= {str(m.repo_id) for m in self._api.list_repos("model", search=name, page_size=20).items}
        except Exception:  # a suggestion is a courtesy; the error that led here is what the user must see
            return []
        return difflib.get_close_matches(repository, sorted(found), n=3, cutoff=0.6)
