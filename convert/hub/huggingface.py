"""Hugging Face through `huggingface_hub`: its cache, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, proxies and retries.

What it does not do and `client.check_file` adds: it compares sizes but no hashes. It also starts a file again
instead of resuming it, so what a second run saves are whole files.
"""

import contextlib
import difflib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import huggingface_hub
from huggingface_hub import errors, file_download, hf_api
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
    http_stream_backoff,
)
from tqdm import tqdm

from dsv4.convert.checkpoint.source import HubName
from dsv4.errors import Dsv4Error, InputError, MachineError, printable
from dsv4.progress import Progress

from .client import BadFile, Busy, NetworkError, NoRepository, RemoteFile

_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_LOGIN = "Log in with `hf auth login`, set HF_TOKEN, or give --token."
_OFFLINE = "Unset HF_HUB_OFFLINE, or fetch it first where there is a network."
_HEX = re.compile(r"[0-9a-f]+")

Result = TypeVar("Result")


def _status(error: errors.HfHubHTTPError) -> int:
    return error.response.status_code


def _explain_http(error: errors.HfHubHTTPError, repository: str) -> Dsv4Error:
    status = _status(error)
    if isinstance(error, errors.GatedRepoError):
        page = f"{huggingface_hub.constants.ENDPOINT}/{repository}"
        return NetworkError(
            f"hf:{repository} is gated: the hub answers {status}", f"Ask for access at {page}. {_LOGIN}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return NoRepository(f"hf:{repository}: no such repository, or it is private", f"If it is private: {_LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"hf:{repository}: no such branch, tag or commit", "Look at its branches on the hub.")
    if isinstance(error, errors.EntryNotFoundError):
        url = printable(str(error.response.url))
        return BadFile(f"hf:{repository}: a listed file is not there: {url}", "Try again later, or with --fallback.")
    if status in (401, 403):
        return NetworkError(f"hf:{repository}: the hub refuses access ({status})", _LOGIN)
    if status in _TRANSIENT:
        why = "too many requests" if status == 429 else "the hub has a problem"
        hint = "Run the same command again later: finished files are kept. --fallback tries the other hub."
        return Busy(f"hf:{repository}: the hub answers {status} ({why})", hint)
    return MachineError(f"hf:{repository}: the hub answers {status}", printable(str(error).splitlines()[0]))


def explain(error: BaseException, repository: str) -> Dsv4Error | None:
    """What a library exception means to a user; None for a fault of the machine or of dsv4, which passes through."""
    if isinstance(error, errors.OfflineModeIsEnabled):
        return MachineError(f"hf:{repository}: HF_HUB_OFFLINE is set and the cache does not have it", _OFFLINE)
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_http(error, repository)
    cause = error.__cause__ or error.__context__
    if isinstance(error, errors.LocalEntryNotFoundError | ValueError) and cause is not None:
        return explain(cause, repository)  # "cannot find it in the cache either": what matters is why the hub failed
    if isinstance(error, errors.LocalEntryNotFoundError):
        return MachineError(f"hf:{repository}: not complete in the local cache", "Run `dsv4 download` with a network.")
    if isinstance(error, errors.FileMetadataError):
        return NetworkError(f"hf:{repository}: the answer does not come from a hub", "Check HF_ENDPOINT and the proxy.")
    if type(error).__module__.partition(".")[0].startswith("httpx"):  # the library's HTTP client, by whatever name
        text = printable(str(error) or type(error).__name__)
        hint = "Check the network, HF_ENDPOINT and proxies, and run the same command again, or try --fallback."
        return NetworkError(f"hf:{repository}: {huggingface_hub.constants.ENDPOINT} does not answer: {text}", hint)
    if type(error).__module__ == "hf_xet" or isinstance(error, RuntimeError | ConnectionError | TimeoutError):
        # What the transfer library for Xet storage raises has no type of its own.
        text = printable((str(error).splitlines() or [type(error).__name__])[0])
        hint = "Run the same command again, set HF_HUB_DISABLE_XET=1, or try --fallback."
        return NetworkError(f"hf:{repository}: the transfer failed: {text}", hint)
    if isinstance(error, OSError) and error.errno is None and "Consistency check" in str(error):
        return BadFile(f"hf:{repository}: {printable(str(error).splitlines()[0])}")
    return None


def _raise(error: Exception, repository: str) -> NoReturn:
    explained = explain(error, repository)
    if explained is None:
        raise error
    raise explained from error


def _bar_for(progress: Progress) -> "type[tqdm[NoReturn]]":
    class Bar(tqdm):  # type: ignore[type-arg]
        """A bar that is never drawn; the library's bytes go to the progress."""

        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> bool | None:
            progress(int(n or 0))
            return None

        # Xet storage reports twice, what it received and what it wrote. With these two it asks for one bar only.
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, *_: object, **__: object) -> None:
            pass

    return Bar


def _cached_file(folder: Path, path: Path) -> RemoteFile:
    name, blob = path.relative_to(folder).as_posix(), path.resolve().name
    kind = {64: "sha256", 40: "git_sha1"}.get(len(blob)) if _HEX.fullmatch(blob) else None
    return RemoteFile(name, path.stat().st_size, **({kind: blob} if kind else {}))


class HuggingFace:
    """See client.Hub."""

    prefix: HubName = "hf"
    title = "Hugging Face"

    def __init__(self, token: str | None) -> None:
        self._token = token
        self._api = huggingface_hub.HfApi(token=token)
        disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(
            logging.ERROR
        )  # its retries are reported by us if they do not help

    def _call(self, repository: str, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except Exception as error:
            _raise(error, repository)

    def offline(self) -> bool:
        """See Hub."""
        return bool(huggingface_hub.constants.HF_HUB_OFFLINE)

    def cached_files(self, repository: str, revision: str | None, cache: Path | None) -> tuple[str, list[RemoteFile]]:
        """See Hub. In this cache a file is a link to a blob that is named by its hash."""
        try:
            folder = huggingface_hub.snapshot_download(
                repository, revision=revision, cache_dir=cache, local_files_only=True
            )
        except errors.LocalEntryNotFoundError:
            text = f"hf:{repository}: HF_HUB_OFFLINE is set and the cache does not have it"
            raise MachineError(text, _OFFLINE) from None
        return Path(folder).name, [
            _cached_file(Path(folder), p) for p in sorted(Path(folder).rglob("*")) if p.is_file()
        ]

    def resolve(self, repository: str, revision: str | None) -> str:
        """See Hub."""
        wanted = revision or huggingface_hub.constants.DEFAULT_REVISION
        commit = self._call(repository, lambda: self._api.model_info(repository, revision=wanted).sha)
        if not commit or not file_download.REGEX_COMMIT_HASH.fullmatch(commit):
            raise NetworkError(f"hf:{repository}: the hub names no commit for '{wanted}'", "Check HF_ENDPOINT.")
        return commit

    def files(self, repository: str, commit: str) -> list[RemoteFile]:
        """See Hub."""
        listed = self._call(
            repository, lambda: list(self._api.list_repo_tree(repository, revision=commit, recursive=True))
        )
        return [
            RemoteFile(e.path, e.lfs.size, sha256=e.lfs.sha256)
            if e.lfs is not None
            else RemoteFile(e.path, e.size, git_sha1=e.blob_id)
            for e in listed
            if isinstance(e, hf_api.RepoFile)
        ]

    def read(self, repository: str, commit: str, file: RemoteFile, offset: int, length: int) -> bytes:
        """See Hub. A server that ignores Range sends the file from its start: we stop where we have enough."""
        url = huggingface_hub.hf_hub_url(repository, file.name, revision=commit)
        headers = build_hf_headers(token=self._token)
        headers |= {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        return self._call(repository, lambda: self._read(url, headers, offset, length))

    def _read(self, url: str, headers: dict[str, str], offset: int, length: int) -> bytes:
        timeout = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        with http_stream_backoff("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else offset
            received = bytearray()
            for chunk in response.iter_bytes(1 << 16):
                received += chunk
                if len(received) >= skip + length:
                    break
        data = bytes(received[skip : skip + length])
        if len(data) < length:
            raise InputError(f"{printable(url)}: ends after {len(received)} bytes", "The file is shorter than listed.")
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
        """Into a folder, or else into a cache."""
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
        """See Hub."""
        return self._download(repository, commit, file, progress, again, folder=folder)

    def fetch_to_cache(
        self, repository: str, commit: str, file: RemoteFile, cache: Path | None, progress: Progress, again: bool
    ) -> Path:
        """See Hub."""
        return self._download(repository, commit, file, progress, again, cache=cache)

    def cached(self, repository: str, commit: str, name: str, cache: Path | None) -> Path | None:
        """See Hub."""
        found = huggingface_hub.try_to_load_from_cache(repository, name, cache_dir=cache, revision=commit)
        return Path(found) if isinstance(found, str) else None

    def _cache_folder(self, repository: str, cache: Path | None) -> Path:
        root = Path(cache or huggingface_hub.constants.HF_HUB_CACHE)
        return root / file_download.repo_folder_name(repo_id=repository, repo_type="model")

    def snapshot_folder(self, repository: str, commit: str, cache: Path | None) -> Path:
        """See Hub."""
        return self._cache_folder(repository, cache) / "snapshots" / commit

    def remember(self, repository: str, revision: str | None, commit: str, cache: Path | None) -> None:
        """See Hub. The cache's documented layout: refs/<branch> holds the commit."""
        wanted = revision or huggingface_hub.constants.DEFAULT_REVISION
        if wanted != commit:
            reference = self._cache_folder(repository, cache) / "refs" / wanted
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit)

    def abort(self) -> None:
        """See Hub. Xet transfers run outside Python and end only this way."""
        with contextlib.suppress(ImportError):
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()  # type: ignore[no-untyped-call]

    def similar(self, repository: str) -> list[str]:
        """See Hub."""
        owner, name = repository.split("/")
        try:
            found = {m.id for m in self._api.list_models(author=owner, limit=100)}
            found |= {m.id for m in self._api.list_models(search=name, limit=20)}
        except Exception:  # a suggestion is a courtesy; the error that led here is what the user must see
            return []
        return difflib.get_close_matches(repository, sorted(found), n=3, cutoff=0.6)
