"""The message protocols, one file each. A new edition is a new file and a row in `PROTOCOLS`."""

from dsv4.errors import UsageError
from dsv4.model.chat.protocol import Protocol

from .preview import PREVIEW
from .release_0731 import RELEASE_0731
from .v41 import V41

PROTOCOLS: dict[str, Protocol] = {protocol.edition: protocol for protocol in (PREVIEW, RELEASE_0731, V41)}


def protocol_of(edition: str) -> Protocol:
    """The protocol of an edition. Raises UsageError for a name that is none."""
    if edition not in PROTOCOLS:
        raise UsageError(f"unknown edition '{edition}', expected {', '.join(PROTOCOLS)}")
    return PROTOCOLS[edition]
