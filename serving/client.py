"""What the parts of a connection know of it, and what a client is answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from protocol import Nack, NackCode


class Dropped(Exception):
    """The peer broke a rule or a limit: it loses its connection."""


class Stored(NamedTuple):
    """What was asked for is durable.

    Attributes:
        chain: of protocol 2.
    """

    version: int
    chain: bytes = b""


Answer = Stored | Nack
"""What a client is told that asked for something to be stored."""


class Client(Protocol):
    """One client, as long as its connection lasts.

    Attributes:
        number: connections are numbered as they come.
        machine: its name as it says, else its address.
        who: a host's address or a user, the same for each of its connections.
        claims: it said that the backup is its own, and it may be.
        ended: its connection was cut.
    """

    number: int
    who: str
    machine: str
    claims: bool
    ended: bool

    def ask(self, decide: Callable[[], Answer]) -> Answer:
        """Have ``decide`` called when no other client's request is in hand, and answer that."""

    def write(self, decide: Callable[[], Answer]) -> None:
        """``ask`` for what is appended: if the disk fails then, the server stops."""

    def refuse(self, reason: str, code: NackCode = NackCode.OTHER) -> None:
        """Answer that nothing was stored; the log says why, in protocol 2 the client is told."""

    def cut(self) -> None:
        """End the connection from another thread."""
