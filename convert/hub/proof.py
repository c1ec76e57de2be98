"""A source on a hub, as `verify` reads files: headers at once, each shard while its tensors are compared.

Only the transport is shared with the converter: fetching whole files and checking their hashes against the hub's
listing. What the bytes mean is for verify's own code.
"""

from .storage import HubStorage


class HubFiles:
    """See verify_files.Files."""

    def __init__(self, storage: HubStorage) -> None:
        self._storage = storage
        self.label = storage.label

    def sizes(self) -> dict[str, int]:
        """Files of the commit."""
        return self._storage.sizes()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """From the shard on disk if it was fetched, else by a range request."""
        self._storage.read_into(name, buffer, offset)

    def fetch(self, name: str) -> None:
        """Wait for the shard."""
        self._storage.acquire(name)

    def drop(self, name: str) -> None:
        """Remove the shard from disk."""
        self._storage.release(name)

    def abandon(self) -> None:
        """Stop fetching."""
        self._storage.abandon()
