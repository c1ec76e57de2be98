"""What a run fetches from a hub: opened, shown while it arrives, and counted at the end."""

from typing import TYPE_CHECKING, Any

from dsv4 import signals
from dsv4.commands.run.options import RunOptions
from dsv4.errors import Interrupted
from dsv4.output import Output, ProgressBar
from dsv4.text import human_bytes

if TYPE_CHECKING:
    from dsv4.convert.hub.parts.storage import PartStorage
    from dsv4.convert.hub.source import HubSource
    from dsv4.model.transformer import Transformer


class FetchBar:
    """A bar over the bytes that are fetched now, under the bar of the work that waits for them.

    While no bar is shown an answer is printed, which a bar would overwrite: then there is none.
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self._bar: ProgressBar | None = None

    def reach(self, done: int, total: int) -> None:
        """`done` of `total` bytes have arrived. Raises Interrupted if a signal has."""
        signals.token.check()
        if self._bar is None and self._out.shows_progress:
            self._bar = self._out.progress(total, "fetching", passing=True)
        if self._bar is not None:
            self._bar.reach(done, total)
        if done == total:
            self.close()

    def close(self) -> None:
        """Remove the bar. May be called again."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


def keep_hint(kind: object, error: BaseException | None, trace: object) -> None:
    """At the end of a run: an interruption says that what was fetched is kept."""
    from dsv4.convert.hub.parts.storage import KEPT

    if isinstance(error, Interrupted):
        error.hint = KEPT


def open_repository(source: "HubSource", options: RunOptions, bar: FetchBar, out: Output) -> "PartStorage":
    """The files of a repository, resolved to a commit. Raises InputError, NetworkError, MachineError."""
    from dsv4.convert.hub.open import HubOptions
    from dsv4.convert.hub.parts.storage import open_parts

    hub = HubOptions(options.token, options.cache_dir, warn=out.warn, detail=out.detail, progress=signals.look)
    return open_parts(source, hub, bar.reach)


def _storage_of(model: "Transformer") -> "PartStorage | None":
    from dsv4.convert.hub.parts.storage import PartStorage

    storage = model.store.checkpoint.storage
    return storage if isinstance(storage, PartStorage) else None


def fetched_json(model: "Transformer") -> dict[str, Any] | None:
    """Commit and bytes fetched so far, for `--json`; None for a checkpoint in a folder."""
    storage = _storage_of(model)
    if storage is None:
        return None
    return {**storage.identity(), "fetched_bytes": storage.fetched_bytes, "folder": str(storage.folder)}


def say_fetched(model: "Transformer", out: Output) -> None:
    """The same as a line."""
    storage = _storage_of(model)
    if storage is not None:
        out.say(f"fetched {human_bytes(storage.fetched_bytes)} of weights into {storage.folder}")
