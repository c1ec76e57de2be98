"""Telling a hub from whatever else may answer in its place: a proxy, a firewall, the login page of a network.

Such an answer has the status 200 like a good one. A web page is noticed as soon as it arrives (`note`). Nothing, `{}`
or `[]` is noticed by whoever cannot use it, and `not_a_hub` says what the last answer was.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from dsv4.errors import InputError

from .client import BadFile, NetworkError, RemoteFile

Item = TypeVar("Item")
_TITLE = re.compile(r"<title[^>]*>\s*(.*?)\s*</title>", re.IGNORECASE | re.DOTALL)
MOST_SHOWN = 60
EMPTY_JSON_BYTES = 2  # `{}` and `[]`


@dataclass(frozen=True)
class Answer:
    """An HTTP answer. `body` returns as much of it as is at hand, "" if nothing is; `length` is what it announced."""

    url: str
    status: int
    content_type: str
    length: int | None
    body: Callable[[], str]

    @property
    def is_page(self) -> bool:
        """Whether this is a web page, and not one of the repository's files."""
        wants_page = re.search(r"\.html?\b", unquote(self.url))
        return self.status < 300 and self.content_type.lower().startswith("text/html") and not wants_page

    def describe(self) -> str:
        """In a few words, for a message."""
        text = self.body()
        if title := _TITLE.search(text):
            return f"a web page titled '{title[1][:MOST_SHOWN]}'"
        if self.is_page:
            return "a web page"
        if self.length == 0:
            return "nothing"
        if text:
            return f"'{text.strip()[:MOST_SHOWN]}'"
        return f"{self.length} bytes of {self.content_type or 'no type'}"


class Page(BaseException):
    """Ends a call of a library that got a web page; no library may take it for something to retry."""

    def __init__(self, error: NetworkError) -> None:
        super().__init__(str(error))
        self.error = error


class _Last(threading.local):
    answer: Answer | None = None


_last = _Last()


def not_a_hub(label: str, wanted: str) -> NetworkError:
    """The error for an answer that no hub gives. `wanted` is what was asked for; the last answer is this thread's."""
    answer, hint = _last.answer, "Check HTTPS_PROXY, NO_PROXY, HF_ENDPOINT and MODELSCOPE_ENDPOINT."
    if answer is None:
        return NetworkError(f"{label}: the answer does not come from a hub, {wanted} was asked for", hint)
    parts = urlsplit(answer.url)
    host = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return NetworkError(
        f"{label}: {host} answers {answer.status} with {answer.describe()}, {wanted} was asked for",
        "A proxy, a firewall or the login page of this network answers instead of the hub. "
        f"Open {host} in a browser. {hint}",
    )


def note(answer: Answer) -> None:
    """Keep an answer as the last one of this thread. Raises Page for a web page."""
    _last.answer = answer
    if answer.is_page:
        raise Page(not_a_hub("the hub", "a file or a listing"))


def _is_nothing(size: int) -> bool:
    """Whether the last answer was nothing, `{}` or `[]` though a file of `size` bytes was asked for."""
    length = _last.answer.length if _last.answer else None
    return length is not None and length <= EMPTY_JSON_BYTES and length != size


def check_listed(listed: list[Item], label: str) -> list[Item]:
    """A list of files that is not empty. Raises NetworkError if no hub answered, InputError if it lists nothing."""
    if not listed and _is_nothing(size=-1):
        raise not_a_hub(label, "a list of files")
    if not listed:
        raise InputError(f"{label}: lists no files", "Look at its branches on the hub.")
    return listed


@contextmanager
def file_expected(label: str, file: RemoteFile) -> Iterator[None]:
    """While a file is fetched: one that is bad because no hub answered is no bad file. Raises NetworkError then."""
    try:
        yield
    except BadFile:
        if _is_nothing(file.size):
            raise not_a_hub(label, file.name) from None
        raise


def cut(chunks: Iterable[bytes], skip: int, length: int, file: RemoteFile, url: str) -> bytes:
    """`length` bytes of an answer, after the first `skip`; no more of it is read than that.

    Raises NetworkError if no hub answered, InputError if the answer ends before.
    """
    received = bytearray()
    for chunk in chunks:
        received += chunk
        if len(received) >= skip + length:
            return bytes(received[skip : skip + length])
    if _is_nothing(length):
        raise not_a_hub("the hub", file.name)
    raise InputError(f"{url}: ends after {len(received)} bytes", "The file is shorter than listed.")


def forget() -> None:
    """A new question is asked: no answer has come yet."""
    _last.answer = None
