"""The message protocols, one file each, which a row of EDITIONS names. A file has a PROTOCOL."""

from importlib import import_module

from dsv4.convert.checkpoint.editions.table import EDITIONS
from dsv4.errors import UsageError
from dsv4.model.chat.protocol import Protocol


def _protocols() -> dict[str, Protocol]:
    """By the name of the edition, the earliest first."""
    files = dict.fromkeys(edition.protocol for edition in reversed(EDITIONS) if edition.protocol)
    found: list[Protocol] = [import_module(f".{file}", __package__).PROTOCOL for file in files]
    return {protocol.edition: protocol for protocol in found}


PROTOCOLS = _protocols()


def protocol_of(edition: str) -> Protocol:
    """The protocol of an edition. Raises UsageError for a name that is none."""
    if edition not in PROTOCOLS:
        raise UsageError(f"unknown edition '{edition}', expected {', '.join(PROTOCOLS)}")
    return PROTOCOLS[edition]
