"""A checkpoint on a hub, as `verify` reads files: headers at once, each shard while its tensors are compared.

Only the transport is shared with the converter: whole files are fetched and their hashes compared with the hub's
listing. `verify`'s own code reads what the bytes mean.
"""

from collections.abc import Collection, Sequence

from dsv4.errors import UsageError

from .storage import HubStorage


class HubFiles:
    """See proof.files.RemoteFiles."""

    def __init__(self, storage: HubStorage) -> None:
        self._storage = storage
        self.label = storage.label

    def sizes(self) -> dict[str, int]:
        """Files of the commit."""
        return self._storage.sizes()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """From the shard on disk if it was fetched, else by a range request."""
        self._storage.read_into(name, buffer, offset)

    def check_needs(self, groups: Sequence[Collection[str]]) -> None:
        """Raises UsageError if --scratch is too small for one of the groups."""
        try:
            self._storage.check_needs(groups)
        except UsageError as error:
            raise UsageError(str(error), "Give a larger --scratch if the disk has room for it.") from None

    def prepare(self, now: Collection[str], upcoming: Collection[str] = ()) -> None:
        """Wait for the shards in `now`, begin to fetch `upcoming`, and remove all others from the disk."""
        self._storage.prepare(now, upcoming)
