"""HTTP to a server: one session with the key, timeouts and retries, and errors that name who answered what.

The library `requests` is used, so proxies, certificates and `.netrc` work as usual. A server that is loading
or overloaded (408, 425, 429, 5xx) and a broken connection are tried again a few times, `Retry-After` included. A
request that takes too long is not sent again, because the server may still be computing it.
"""

import os
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ReadTimeoutError
from urllib3.util import Retry

from dsv4.errors import MachineError, UsageError

KEYS = ("DSV4_API_KEY", "OPENAI_API_KEY", "VLLM_API_KEY", "SGLANG_API_KEY", "LLAMA_API_KEY")
RETRIES = 3
SECONDS_TO_CONNECT = 10.0
SECONDS_TO_ANSWER = 600.0  # a long prompt on a slow machine
AGAIN = (408, 425, 429, 500, 502, 503, 504)
MOST_SHOWN = 200  # characters of an answer in a message


class _Retry(Retry):
    """urllib3's, but for answers that take too long."""

    def increment(
        self, method: str | None = None, url: str | None = None, response: Any = None, error: Exception | None = None,
        _pool: Any = None, _stacktrace: Any = None,
    ) -> Self:  # fmt: skip
        if isinstance(error, ReadTimeoutError):
            raise error
        return super().increment(method, url, response, error, _pool, _stacktrace)


def api_key(given: str | None) -> str | None:
    """--api-key, or the first of the usual variables that is set."""
    return given or next((os.environ[name] for name in KEYS if os.environ.get(name)), None)


class Client:
    """A server at an address. Methods raise MachineError for errors of the network or the server."""

    def __init__(
        self, address: str, key: str | None, seconds: float = SECONDS_TO_ANSWER, retries: int = RETRIES
    ) -> None:
        parts = urlsplit(address)
        if not parts.netloc or parts.query or parts.fragment:
            raise UsageError(f"'{address}' is not the address of a server", "Write http://host:port.")
        self.address = address.rstrip("/").removesuffix("/v1")
        self._seconds = seconds
        self._session = requests.Session()
        again = _Retry(
            total=retries, status=retries, backoff_factor=0.5, status_forcelist=AGAIN, allowed_methods=None,
            raise_on_status=False, respect_retry_after_header=True,
        )  # fmt: skip
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=again))
        if key is not None:
            self._session.headers["Authorization"] = f"Bearer {key}"

    def find(self, path: str) -> Any:
        """The JSON of a GET, or None if there is no such path or it holds something else."""
        response = self._send("GET", path, None)
        if response.status_code in (401, 403):
            raise self._refused(response, path)
        try:
            return response.json() if response.ok else None
        except requests.JSONDecodeError:
            return None

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that answers a POST."""
        response = self._send("POST", path, body)
        if not response.ok:
            raise self._refused(response, path)
        try:
            return response.json()
        except requests.JSONDecodeError:
            raise MachineError(
                f"{self.address}{path} answered with something that is not JSON: '{response.text[:MOST_SHOWN]}'",
                "A proxy may answer in the server's place.",
            ) from None

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> requests.Response:
        timeout = (SECONDS_TO_CONNECT, self._seconds)
        try:
            return self._session.request(method, self.address + path, json=body, timeout=timeout)
        except requests.exceptions.SSLError as error:
            reason = _reason(error)
            hint = "REQUESTS_CA_BUNDLE names the certificates to trust."
            if "CERTIFICATE" not in reason:
                hint = "Does the server speak https, and not http?"
            raise MachineError(f"{self.address}: no trusted connection: {reason}", hint) from None
        except requests.RequestException as error:
            if _is_timeout(error):
                text = f"{self.address} did not answer within {self._seconds:g} s"
                raise MachineError(text, "--timeout gives it longer.") from None
            if isinstance(error, requests.exceptions.ChunkedEncodingError):
                text = f"{self.address}{path} broke off its answer: {_reason(error)}"
                raise MachineError(text, "The server's own log says more.") from None
            raise MachineError(
                f"{self.address} cannot be reached: {_reason(error)}", "Is the server running, and is this its port?"
            ) from None

    def _refused(self, response: requests.Response, path: str) -> MachineError:
        status, text = response.status_code, _message(response)
        hint = "The server's own log says more."
        if status in (401, 403):
            hint = f"It wants a key: --api-key, or one of {', '.join(KEYS)}."
        return MachineError(f"{self.address}{path} answered {status}: {text}", hint)


def _is_timeout(error: requests.RequestException) -> bool:
    """Whether the server took too long; in the middle of an answer requests calls that a broken connection."""
    return isinstance(error, requests.ReadTimeout) or any(isinstance(cause, ReadTimeoutError) for cause in error.args)


def _reason(error: BaseException) -> str:
    """The innermost reason of a network error, on one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error).strip().splitlines()[0][:MOST_SHOWN] if str(error).strip() else type(error).__name__


def _message(response: requests.Response) -> str:
    """The message of an error answer: from its JSON, or the beginning of its text."""
    try:
        content = response.json()
    except requests.JSONDecodeError:
        return response.text.strip()[:MOST_SHOWN] or response.reason
    for name in ("error", "message", "detail"):
        if isinstance(content, dict) and name in content:
            content = content[name]
    return str(content)[:MOST_SHOWN]
