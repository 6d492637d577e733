"""``postgresql://user@host1,host2/dbname?...``: libpq's URL with three parameters of our own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote

from errors import ConfigError

SCHEMES = ("postgresql:", "postgres:")
DEFAULT_BACKUP = "node"
DEFAULT_STANDBYS = 1
DEFAULT_RETRY_FOR_S = 120.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(\.old-[0-9TZ-]+)?")
_RESERVED = (".old-", ".new-")
"""What building.replace names its own by, and building.prune finds those that it removes."""
_SECRETS = ("password", "sslpassword")


class PostgresUrl(NamedTuple):
    """A parsed URL.

    Attributes:
        libpq: the URL without what is our own.
        backup: which of the backups in the database it is.
        standbys: how many of them have a change before it is acknowledged.
        retry_for: seconds.
    """

    libpq: str
    backup: str = DEFAULT_BACKUP
    standbys: int = DEFAULT_STANDBYS
    retry_for: float = DEFAULT_RETRY_FOR_S

    def require_writable(self) -> None:
        """Refuse the name of a backup that was replaced, and is only kept; ConfigError."""
        if any(part in self.backup for part in _RESERVED):
            raise ConfigError(
                f"backup={self.backup} is no name to write to: {' and '.join(_RESERVED)} stand in"
                " the names of those that were replaced, and the older ones of them are removed.",
                "It can be read: restore it, or `move` it to another name.",
            )


def parse(url: str) -> PostgresUrl:
    """Take ``url`` apart, as far as it is not libpq's; ConfigError says what is wrong with it."""
    base, question, query = url.partition("?")
    pairs = query.split("&") if question else []
    own: dict[str, str] = {}
    rest = []
    for pair in pairs:
        name, _, value = pair.partition("=")
        if unquote(name) in _SECRETS:
            raise _password()
        if name not in ("backup", "standbys", "retry_for"):
            rest.append(pair)
        elif name in own:
            raise ConfigError(f"The parameter {name} stands twice in the URL.")
        else:
            own[name] = unquote(value)
    _, slashes, authority = base.partition("//")
    user, at, _ = authority.partition("/")[0].rpartition("@")
    if at and ":" in user:
        raise _password()
    if not slashes:
        raise ConfigError(f"{url!r} is not of the form postgresql://user@host/dbname.")
    return _with_own("?".join([base, "&".join(rest)] if rest else [base]), own)


def _with_own(libpq: str, own: Mapping[str, str]) -> PostgresUrl:
    backup = own.get("backup", DEFAULT_BACKUP)
    standbys = own.get("standbys", str(DEFAULT_STANDBYS))
    retry_for = own.get("retry_for", str(int(DEFAULT_RETRY_FOR_S)))
    if not _NAME.fullmatch(backup):
        raise ConfigError(f"backup={backup!r} is no name of a backup.", "Use letters and digits.")
    if not re.fullmatch(r"[0-9]{1,2}", standbys):
        raise ConfigError(f"standbys={standbys!r} is no number of standbys.", "Use 1, or 0.")
    if not re.fullmatch(r"[0-9]{1,6}", retry_for):
        raise ConfigError(f"retry_for={retry_for!r} is no number of seconds.")
    return PostgresUrl(libpq, backup, int(standbys), float(retry_for))


def _password() -> ConfigError:
    return ConfigError(
        "A backup URL holds no password: it stands in logs, and in the list of processes.",
        "Write it into ~/.pgpass with mode 600, or another file that passfile= in the URL names,"
        " or name a service=.",
    )
