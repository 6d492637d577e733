"""Walking the hosts of a cluster: the one that takes changes, or one that can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from backend import log
from errors import BackupError, ConfigError
from postgres import checks, url
from postgres.link import WATCHED, Denied, Failed, Link

LOCK_TIMEOUT_S = 30
REPLAY_S = 10.0
"""What a standby may take to replay what it has."""
_SETTINGS = {
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "lock_timeout": f"{LOCK_TIMEOUT_S}s",
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "plan_cache_mode": "force_generic_plan",
}


class Host(NamedTuple):
    """One host of the URL, and libpq's parameters for it."""

    name: str
    options: Mapping[str, str | int]


class Unreachable(BackupError):
    """No host of a cluster is as it has to be; nothing follows about what it holds."""

    def __init__(self, reason: object) -> None:
        said = _one_line(reason)
        next_step = "Bring back the primary and its standby; docs/postgres.md has what to do."
        if "password" in said or "pg_hba.conf" in said:
            next_step = (
                "Check ~/.pgpass (of the user who types this, with mode 600) and the server's"
                " pg_hba.conf; docs/postgres.md has both."
            )
        super().__init__(f"No host of the PostgreSQL cluster will do: {said}.", next_step)


def _one_line(said: object) -> str:
    """What libpq said, which is of several lines, and may end with a stop."""
    return " ".join(str(said).split()).rstrip(" .")


class Cluster:
    """The hosts that a URL names.

    Raises:
        ConfigError: the URL is none.
    """

    def __init__(self, text: str) -> None:
        self.url = url.parse(text)
        try:
            found = conninfo_to_dict(self.url.libpq)
        except psycopg.Error as error:
            raise ConfigError(f"libpq does not take the backup URL: {_one_line(error)}.") from error
        self._options = {key: value for key, value in found.items() if value is not None}
        if self._options.get("password"):
            raise ConfigError("A backup URL holds no password.", "Use passfile= or service=.")
        self._options.setdefault("application_name", "cln-backup")
        self._options["client_encoding"] = "UTF8"
        self._said_single = False

    @property
    def hosts(self) -> list[Host]:
        """Those of the URL, of its service, or of libpq's environment, in their order."""
        found = _with_defaults(self._options)
        split = {
            key: str(found[key]).split(",") if found.get(key) else []
            for key in ("host", "hostaddr", "port")
        }
        count = max(1, len(split["host"]), len(split["hostaddr"]))
        hosts = []
        for number in range(count):
            own = {
                key: values[number if len(values) > 1 else 0]
                for key, values in split.items()
                if values and (len(values) == 1 or number < len(values))
            }
            name = own.get("host") or own.get("hostaddr") or "the local socket"
            shown = f"{name}:{own['port']}" if own.get("port") else name
            hosts.append(Host(shown, {**self._options, **own}))
        return hosts

    def writer(self, timeout_s: float) -> Link:
        """A connection to the first host that may acknowledge changes.

        Raises:
            Failed: there is none; it names what is wrong with each.
        """
        wrong: list[str] = []
        for host, link in self._links(timeout_s, wrong):
            try:
                watched = link.run(WATCHED)[0]
                _, found = checks.ask(link, self.url.standbys)
                if not found:
                    link.watched = watched if self.url.standbys else None
                    self._say_single()
                    return link
                wrong.append(f"{host.name}: {'; '.join(found)}")
            except (Failed, Denied) as error:
                wrong.append(f"{host.name}: {error}")
            link.close()
        raise Failed(", and ".join(wrong))

    def reader(self, timeout_s: float) -> Link:
        """A connection to a host that shows all that was acknowledged.

        A primary that has its standbys is one. Without such a one all hosts are asked: of a
        record as many have it as a change waits for, and one of those has to be among them.

        Raises:
            Failed: there is none, or it cannot be told which.
        """
        wrong: list[str] = []
        heard: list[tuple[Host, Link, bool]] = []
        chosen: Link | None = None
        try:
            for host, link in self._links(timeout_s, wrong):
                try:
                    server, problems = checks.ask(link, self.url.standbys)
                except (Failed, Denied) as error:
                    wrong.append(f"{host.name}: {error}")
                    link.close()
                    continue
                if self.url.standbys and not problems:
                    chosen = link
                    return chosen
                heard.append((host, link, server.is_standby))
            chosen = self._most_advanced(heard, wrong, timeout_s)
            return chosen
        finally:
            for _, link, _ in heard:
                if link is not chosen:
                    link.close()

    def _most_advanced(
        self, heard: list[tuple[Host, Link, bool]], wrong: list[str], timeout_s: float
    ) -> Link:
        """The one of all that were ``heard``, and are a standby or not, that shows the most."""
        primaries = [(host, link) for host, link, is_standby in heard if not is_standby]
        if len(primaries) > 1:
            names = " and ".join(host.name for host, _ in primaries)
            raise Failed(f"{names} both take changes: let the URL name the right one alone")
        found = [(0, link) for _, link in primaries]
        for host, link, is_standby in heard:
            if is_standby and not primaries:
                try:
                    place = checks.replayed(link, min(timeout_s, REPLAY_S))
                except (Failed, Denied) as error:
                    wrong.append(f"{host.name}: {error}")
                    continue
                if place is None:
                    wrong.append(
                        f"{host.name}: the standby has not replayed all that it has, or the role"
                        " may not see that (GRANT pg_monitor)"
                    )
                else:
                    found.append((place, link))
        hosts, standbys = len(self.hosts), self.url.standbys
        enough = hosts - standbys if standbys else 1
        if (len(heard) if primaries else len(found)) < max(1, enough):
            if enough > 1:
                wrong.append(f"{enough} of the {hosts} hosts have to answer: others may have more")
            raise Failed(", and ".join(wrong))
        return max(found, key=lambda one: one[0])[1]

    def _links(self, timeout_s: float, wrong: list[str]) -> Iterator[tuple[Host, Link]]:
        for host in self.hosts:
            try:
                link = Link(host.options, timeout_s)
            except Failed as error:
                wrong.append(f"{host.name}: {error}")
                continue
            try:
                self._settle(link)
            except (Failed, Denied) as error:
                wrong.append(f"{host.name}: {error}")
                link.close()
                continue
            yield host, link

    def _settle(self, link: Link) -> None:
        settings = {**_SETTINGS, "synchronous_commit": self._synchronous_commit()}
        if link.server >= 140000:
            settings["idle_session_timeout"] = "0"
        calls = ", ".join(
            f"pg_catalog.set_config('{name}', '{value}', false)" for name, value in settings.items()
        )
        link.run(f"SELECT {calls}")

    def _synchronous_commit(self) -> str:
        """Never the server's default: that may be off, or wait for no standby."""
        if not self.url.standbys:
            return "local"  # A primary whose standby was lost goes on with that.
        chosen = str(self._options.get("options") or "").replace(" ", "")
        return "remote_apply" if "synchronous_commit=remote_apply" in chosen else "on"

    def _say_single(self) -> None:
        if not self.url.standbys and not self._said_single:
            self._said_single = True
            log.warning("standbys=0: changes are on one machine only, that of the primary")


def _with_defaults(options: Mapping[str, str | int]) -> Mapping[str, object]:
    """``options``, with the hosts that a service file or the environment names."""
    if options.get("host") or options.get("hostaddr"):
        return options
    if options.get("service") or os.environ.get("PGSERVICE"):
        # Only a connection reads the service file: one that leads nowhere is begun.
        begun = pq.PGconn.connect_start(make_conninfo("", **dict(options)).encode())
        try:
            found = begun.info
        finally:
            begun.finish()
    else:
        found = pq.Conninfo.get_defaults()
    named = {item.keyword.decode(): item.val.decode() for item in found if item.val}
    return {**{key: named.get(key) for key in ("host", "hostaddr", "port")}, **options}
