"""Hugging Face through `huggingface_hub`: its cache, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, proxies and retries.

The library compares sizes but no hashes; `client.check_file` adds these. It restarts a partial file instead of resuming
it, so a second run saves whole files only.
"""

import contextlib
import difflib
import logging
import re
from collections.abc import Callable
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import errors, file_download, hf_api
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
    http_stream_backoff,
)
from tqdm import tqdm

from dsv4.errors import Dsv4Error, InputError, MachineError
from dsv4.progress import Progress

from .answers import Answer, Page, check_listed, cut, file_expected, forget, not_a_hub, note
from .client import AGAIN, BadFile, Busy, Dropped, NetworkError, NoRepository, RemoteFile, first_line, with_patience
from .source import HubName

_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_LOGIN = "Log in with `hf auth login`, set HF_TOKEN, or give --token."
_NOT_CACHED = "HF_HUB_OFFLINE is set and the cache does not have it"
_OFFLINE = "Unset HF_HUB_OFFLINE, or fetch it first where there is a network."
_DROPS = ("ReadError", "RemoteProtocolError", "ReadTimeout")  # of the HTTP client, in the middle of an answer
_HEX = re.compile(r"[0-9a-f]+")

Result = TypeVar("Result")


def _gated(error: errors.GatedRepoError, label: str) -> Dsv4Error:
    page = f"{huggingface_hub.constants.ENDPOINT}/{label.partition(':')[2]}"
    text = f"{label} is gated: the hub answers {error.response.status_code}"
    return NetworkError(text, f"Ask for access at {page}. {_LOGIN}")


def _no_entry(error: errors.EntryNotFoundError, label: str) -> Dsv4Error:
    url = str(error.response.url) if isinstance(error, errors.HfHubHTTPError) else "in the cache"
    return BadFile(f"{label}: a listed file is not there: {url}", "Try again later.")


def _http_status(error: errors.HfHubHTTPError, label: str) -> Dsv4Error:
    status = error.response.status_code
    if status in (401, 403):
        return NetworkError(f"{label}: the hub refuses access ({status})", _LOGIN)
    if status in _TRANSIENT:
        why = "too many requests" if status == 429 else "the hub has a problem"
        asked = error.response.headers.get("retry-after", "")
        return Busy(f"{label}: the hub answers {status} ({why})", AGAIN, float(asked) if asked.isdecimal() else 0.0)
    return MachineError(f"{label}: the hub answers {status}", first_line(error))


def _no_connection(error: Exception, label: str) -> Dsv4Error:
    hint = "Check the network, HF_ENDPOINT and proxies, and run the same command again."
    text = f"{label}: {huggingface_hub.constants.ENDPOINT} does not answer: {first_line(error)}"
    return NetworkError(text, hint)


def _dropped(error: Exception, label: str) -> Dsv4Error:
    return Dropped(f"{label}: the hub dropped the connection: {first_line(error)}", AGAIN)


def _transfer_failed(error: Exception, label: str) -> Dsv4Error:
    hint = "Run the same command again, or set HF_HUB_DISABLE_XET=1."
    return NetworkError(f"{label}: the transfer failed: {first_line(error)}", hint)


def _has_wrong_size(error: BaseException) -> bool:
    """The library compares sizes, but raises a plain OSError when they differ."""
    return isinstance(error, OSError) and error.errno is None and "Consistency check" in str(error)


def _module(error: BaseException) -> str:
    return type(error).__module__


def _is_of_client(error: BaseException) -> bool:
    """Whether it comes from the library's HTTP client."""
    return _module(error).partition(".")[0].startswith("httpx")


def _offline(error: Exception, label: str) -> Dsv4Error:
    return MachineError(f"{label}: {_NOT_CACHED}", _OFFLINE)


def _no_repository(error: Exception, label: str) -> Dsv4Error:
    return NoRepository(f"{label}: no such repository, or it is private", f"If it is private: {_LOGIN}")


def _no_revision(error: Exception, label: str) -> Dsv4Error:
    return InputError(f"{label}: no such branch, tag or commit", "Look at its branches on the hub.")


def _not_complete(error: Exception, label: str) -> Dsv4Error:
    return MachineError(f"{label}: not complete in the local cache", "Run `dsv4 download` with a network.")


def _wrong_size(error: Exception, label: str) -> Dsv4Error:
    return BadFile(f"{label}: {first_line(error)}")


def _no_metadata(error: Exception, label: str) -> Dsv4Error:
    return not_a_hub(label, "a file")


def _another_form(error: Exception, label: str) -> Dsv4Error:
    """The library could not parse the answer."""
    return not_a_hub(label, "a listing")


Meaning = Callable[[Any, str], Dsv4Error]

# Exceptions of the library, and what they mean; the first row that fits counts.
_TYPES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Meaning], ...] = (
    (errors.OfflineModeIsEnabled, _offline),
    (errors.GatedRepoError, _gated),
    (errors.RepositoryNotFoundError, _no_repository),
    (errors.RevisionNotFoundError, _no_revision),
    (errors.LocalEntryNotFoundError, _not_complete),
    (errors.EntryNotFoundError, _no_entry),
    (errors.HfHubHTTPError, _http_status),
    (errors.FileMetadataError, _no_metadata),
    ((KeyError, TypeError, AttributeError, ValueError), _another_form),
)
# The same for those that have no type of their own, or one of another library.
_OTHERS: tuple[tuple[Callable[[BaseException], bool], Meaning], ...] = (
    (lambda error: _is_of_client(error) and type(error).__name__ in _DROPS, _dropped),
    (lambda error: _is_of_client(error), _no_connection),
    (lambda error: _module(error) == "hf_xet", _transfer_failed),
    (lambda error: isinstance(error, RuntimeError | ConnectionError | TimeoutError), _transfer_failed),
    (_has_wrong_size, _wrong_size),
)


def _wrapped(error: BaseException) -> BaseException | None:
    """The cause of "cannot find it in the cache either": why the hub itself failed."""
    wraps = isinstance(error, errors.LocalEntryNotFoundError | ValueError)
    own = isinstance(error, errors.HfHubHTTPError | JSONDecodeError)
    return error.__cause__ or error.__context__ if wraps and not own else None


def explain(error: BaseException, label: str) -> Dsv4Error | None:
    """A library exception as a Dsv4Error; None for errors of the machine or of dsv4, which pass through."""
    if isinstance(error, Dsv4Error):
        return error
    behind = _wrapped(error)
    if behind is not None and (explained := explain(behind, label)) is not None:
        return explained
    for types, meaning in _TYPES:
        if isinstance(error, types):
            return meaning(error, label)
    return next((meaning(error, label) for fits, meaning in _OTHERS if fits(error)), None)


def _bar_for(progress: Progress) -> "type[tqdm[NoReturn]]":
    class Bar(tqdm):  # type: ignore[type-arg]
        """A bar that is never drawn: it calls our progress with the library's byte counts."""

        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> bool | None:
            progress(int(n or 0))
            return None

        # Xet storage reports received and written bytes. With these two methods it asks for one bar only.
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, *_: object, **__: object) -> None:
            pass

    return Bar


def _cached_file(folder: Path, path: Path) -> RemoteFile:
    name, blob = path.relative_to(folder).as_posix(), path.resolve().name
    kind = {64: "sha256", 40: "git_sha1"}.get(len(blob)) if _HEX.fullmatch(blob) else None
    return RemoteFile(name, path.stat().st_size, **({kind: blob} if kind else {}))


def _note_answer(response: Any) -> None:
    """Called by the library's HTTP client for every answer, before its body is read."""

    def body() -> str:
        if "text/html" in response.headers.get("content-type", ""):
            response.read()
        return str(response.text) if hasattr(response, "_content") else ""

    length = response.headers.get("content-length", "")
    note(
        Answer(
            str(response.url), response.status_code, response.headers.get("content-type", ""),
            int(length) if length.isdecimal() else None, body,
        )
    )  # fmt: skip


def _watch_answers() -> None:
    """Install the response hook. The library makes a new client after some errors, so this runs before every call."""
    forget()
    hooks = huggingface_hub.get_session().event_hooks["response"]
    if _note_answer not in hooks:
        hooks.append(_note_answer)


class HuggingFace:
    """Hugging Face through huggingface_hub; the methods of client.Hub."""

    prefix: HubName = "hf"
    title = "Hugging Face"

    def __init__(self, token: str | None) -> None:
        self._token = token
        self._api = huggingface_hub.HfApi(token=token)
        self._storage: dict[str, str] = {}  # address of a file at the hub -> where it redirects to
        disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(
            logging.ERROR
        )  # its retries are reported by us if they do not help

    def _call(self, repository: str, action: Callable[[], Result]) -> Result:
        """Call the library and translate its exceptions into Dsv4Error."""
        _watch_answers()
        try:
            return action()
        except Page as page:
            raise page.error from None
        except Exception as error:
            explained = explain(error, f"hf:{repository}")
            if explained is None:
                raise
            raise explained from error

    def offline(self) -> bool:
        """Whether HF_HUB_OFFLINE is set."""
        return bool(huggingface_hub.constants.HF_HUB_OFFLINE)

    def cached_files(self, repository: str, revision: str | None, cache: Path | None) -> tuple[str, list[RemoteFile]]:
        """Commit and files of a cached snapshot. In this cache a file is a link to a blob that is named by its hash."""
        try:
            folder = huggingface_hub.snapshot_download(
                repository, revision=revision, cache_dir=cache, local_files_only=True
            )
        except errors.LocalEntryNotFoundError as error:
            raise _offline(error, f"hf:{repository}") from None
        return Path(folder).name, [
            _cached_file(Path(folder), p) for p in sorted(Path(folder).rglob("*")) if p.is_file()
        ]

    def resolve(self, repository: str, revision: str | None) -> str:
        """The commit that a branch or tag points to now; the default branch for None."""
        wanted = revision or huggingface_hub.constants.DEFAULT_REVISION
        commit = self._call(repository, lambda: self._api.model_info(repository, revision=wanted).sha)
        if not commit or not file_download.REGEX_COMMIT_HASH.fullmatch(commit):
            raise not_a_hub(f"hf:{repository}", f"the commit of '{wanted}'")
        return commit

    def files(self, repository: str, commit: str) -> list[RemoteFile]:
        """Every file of a commit, with the hash that the hub lists."""
        listed = self._call(
            repository, lambda: list(self._api.list_repo_tree(repository, revision=commit, recursive=True))
        )
        return [
            RemoteFile(e.path, e.lfs.size, sha256=e.lfs.sha256)
            if e.lfs is not None
            else RemoteFile(e.path, e.size, git_sha1=e.blob_id)
            for e in check_listed(listed, f"hf:{repository}@{commit}")
            if isinstance(e, hf_api.RepoFile)
        ]

    def read(self, repository: str, commit: str, file: RemoteFile, offset: int, length: int) -> bytes:
        """`length` bytes by a range request. If the server ignores Range, the bytes before `offset` are skipped.

        The hub redirects to its storage, by an address that is valid for a while. Later ranges of a file are read there
        at once: the hub limits how often it may be asked, and an audit reads many ranges.
        """
        url = huggingface_hub.hf_hub_url(repository, file.name, revision=commit)

        def read() -> bytes:
            if (storage := self._storage.get(url)) is not None:
                with contextlib.suppress(errors.HfHubHTTPError):  # such as 403: the address is no longer valid
                    return self._read(storage, build_hf_headers(token=False), url, file, offset, length)
                self._storage.pop(url, None)
            return self._read(url, build_hf_headers(token=self._token), url, file, offset, length)

        return with_patience(lambda: self._call(repository, read), (Dropped,))

    def _read(
        self, address: str, headers: dict[str, str], url: str, file: RemoteFile, offset: int, length: int
    ) -> bytes:
        """Read from the hub's `url` or from the `address` where it redirected to."""
        headers |= {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        timeout, data = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT, b""
        dropped: Exception | None = None
        with http_stream_backoff("GET", address, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else offset
            try:
                data = cut(response.iter_bytes(1 << 16), skip, length, file, url)
            except Exception as error:
                if not _is_of_client(error):
                    raise
                dropped = error  # raised in here, the library would ask again and have nobody to give it to
        if dropped is not None:
            raise dropped
        if urlsplit(str(response.url)).netloc != urlsplit(url).netloc:
            self._storage[url] = str(response.url)
        return data

    def _download(
        self,
        repository: str,
        commit: str,
        file: RemoteFile,
        progress: Progress,
        again: bool,
        folder: Path | None = None,
        cache: Path | None = None,
    ) -> Path:
        """Fetch a file into `folder`, or into the library's cache at `cache` (None: its default place)."""
        with file_expected(f"hf:{repository}", file):
            path = self._call(
                repository,
                lambda: huggingface_hub.hf_hub_download(
                    repository, file.name, revision=commit, local_dir=folder, cache_dir=cache, token=self._token,
                    force_download=again, tqdm_class=_bar_for(progress),
                ),
            )  # fmt: skip
        return Path(path)

    def fetch_to_folder(
        self, repository: str, commit: str, file: RemoteFile, folder: Path, progress: Progress, again: bool
    ) -> Path:
        """Fetch a file to `folder`/name. `again` ignores every copy that is already on disk."""
        return self._download(repository, commit, file, progress, again, folder=folder)

    def fetch_to_cache(
        self, repository: str, commit: str, file: RemoteFile, cache: Path | None, progress: Progress, again: bool
    ) -> Path:
        """Fetch a file into the library's cache and return its path there."""
        return self._download(repository, commit, file, progress, again, cache=cache)

    def cached(self, repository: str, commit: str, name: str, cache: Path | None) -> Path | None:
        """The path of a file in the library's cache; None if it is not there."""
        found = huggingface_hub.try_to_load_from_cache(repository, name, cache_dir=cache, revision=commit)
        return Path(found) if isinstance(found, str) else None

    def _cache_folder(self, repository: str, cache: Path | None) -> Path:
        root = Path(cache or huggingface_hub.constants.HF_HUB_CACHE)
        return root / file_download.repo_folder_name(repo_id=repository, repo_type="model")

    def snapshot_folder(self, repository: str, commit: str, cache: Path | None) -> Path:
        """The folder of a commit in the library's cache."""
        return self._cache_folder(repository, cache) / "snapshots" / commit

    def remember(self, repository: str, revision: str | None, commit: str, cache: Path | None) -> None:
        """Write the commit to refs/<branch> in the cache, as its documentation describes."""
        wanted = revision or huggingface_hub.constants.DEFAULT_REVISION
        if wanted != commit:
            reference = self._cache_folder(repository, cache) / "refs" / wanted
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit)

    def abort(self) -> None:
        """Stop Xet transfers: they run outside Python and do not call the progress."""
        with contextlib.suppress(ImportError):
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()  # type: ignore[no-untyped-call]

    def similar(self, repository: str) -> list[str]:
        """At most three repositories with names like this one, best first; [] if the hub does not answer."""
        owner, name = repository.split("/")
        try:
            found = {m.id for m in self._api.list_models(author=owner, limit=100)}
            found |= {m.id for m in self._api.list_models(search=name, limit=20)}
        except Exception:  # a suggestion is a courtesy; the error that led here is what the user must see
            return []
        return difflib.get_close_matches(repository, sorted(found), n=3, cutoff=0.6)
