"""Detects answers that do not come from a hub but from a proxy, a firewall or the login page of a network.

Such answers have status 200. `note` refuses a web page as soon as it arrives. An empty body, `{}` or `[]` is refused
where a listing or a file was expected; `not_a_hub` makes the error, which describes the last answer.
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
    """An HTTP answer. `body` returns the part that was received, "" if none was; `length` is the announced one."""

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
        """A few words for a message, such as "a web page titled 'Log in'"."""
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
    """Raised inside a library that received a web page. A BaseException, so that no library retries it."""

    def __init__(self, error: NetworkError) -> None:
        super().__init__(error.message)
        self.error = error


class _Last(threading.local):
    answer: Answer | None = None


_last = _Last()


def not_a_hub(label: str, wanted: str) -> NetworkError:
    """The error for this thread's last answer, which no hub gives. `wanted`: what was asked for."""
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
    """Record an answer as the last one of this thread. Raises Page for a web page."""
    _last.answer = answer
    if answer.is_page:
        raise Page(not_a_hub("the hub", "a file or a listing"))


def _is_nothing(size: int) -> bool:
    """Whether the last answer was nothing, `{}` or `[]` though a file of `size` bytes was asked for."""
    length = _last.answer.length if _last.answer else None
    return length is not None and length <= EMPTY_JSON_BYTES and length != size


def check_listed(listed: list[Item], label: str) -> list[Item]:
    """`listed`, if it is not empty. Raises NetworkError if no hub answered, InputError for an empty repository."""
    if not listed and _is_nothing(size=-1):
        raise not_a_hub(label, "a list of files")
    if not listed:
        raise InputError(f"{label}: lists no files", "Look at its branches on the hub.")
    return listed


@contextmanager
def file_expected(label: str, file: RemoteFile) -> Iterator[None]:
    """While a file is fetched: raises NetworkError in place of BadFile if the answer came from no hub."""
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
    """Forget the last answer of this thread, before a new request."""
    _last.answer = None
