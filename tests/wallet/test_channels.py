"""The channels of a database: of real nodes, of old releases, damaged, somebody else's."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sqlite3
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from errors import BackupError, DatabaseError
from tests import support
from tests.support import run_cli
from wallet import channels, scb
from wallet.channels import Channel, Found

PEER = bytes.fromhex("0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798")
"""A point of the curve: its generator."""
TXID = bytes(range(32))
ONION = "a" * 56 + ".onion"
RELEASE_0_7 = """
CREATE TABLE vars (name VARCHAR(32), val VARCHAR(255), PRIMARY KEY (name));
CREATE TABLE peers (id INTEGER PRIMARY KEY, node_id BLOB UNIQUE, address TEXT);
CREATE TABLE channels (
    id INTEGER PRIMARY KEY, peer_id INTEGER, short_channel_id TEXT, channel_config_remote INTEGER,
    state INTEGER, funder INTEGER, channel_flags INTEGER, minimum_depth INTEGER,
    funding_tx_id BLOB, funding_tx_outnum INTEGER, funding_satoshi INTEGER,
    msatoshi_local INTEGER, shachain_remote_id INTEGER, revocation_basepoint_remote BLOB,
    payment_basepoint_remote BLOB, htlc_basepoint_remote BLOB,
    delayed_payment_basepoint_remote BLOB);
CREATE TABLE channel_configs (id INTEGER PRIMARY KEY, to_self_delay INTEGER);
CREATE TABLE shachains (id INTEGER PRIMARY KEY, min_index INTEGER, num_valid INTEGER);
CREATE TABLE shachain_known (
    shachain_id INTEGER, pos INTEGER, idx INTEGER, hash BLOB, PRIMARY KEY (shachain_id, pos));
"""
"""What the tables were in 2019, as far as they are read."""


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a node with a closed channel and an open one."""
    return support.trace_database("router", tmp_path_factory.mktemp("router"))


def old_database(path: Path, *statements: str) -> Path:
    """A database of 2019 with one channel, and then ``statements``."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(RELEASE_0_7)
        connection.execute("INSERT INTO peers VALUES (3, ?, '[::1]:9735')", (PEER,))
        connection.execute(
            "INSERT INTO channels VALUES"
            " (7, 3, '500x20x1', 4, 3, 1, 1, 3, ?, 258, 16777215, 9001, 5, ?, ?, ?, ?)",
            (TXID, PEER, PEER, PEER, PEER),
        )
        connection.execute("INSERT INTO channel_configs VALUES (4, 144)")
        connection.execute("INSERT INTO shachains VALUES (5, ?, 2)", (2**48 - 2,))
        known = [(5, 0, 2**48 - 1, b"a" * 32), (5, 1, 2**48 - 2, b"b" * 32)]
        connection.executemany("INSERT INTO shachain_known VALUES (?, ?, ?, ?)", known)
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return path


def found_in(path: Path) -> Found:
    before = sorted(path.parent.iterdir()), path.read_bytes()
    found = channels.of_file(str(path), f"{path}.channels-")
    assert (sorted(path.parent.iterdir()), path.read_bytes()) == before, "a look has changed it"
    return found


def only(found: Found) -> Channel:
    (channel,) = found.channels
    return channel


# What a database of a node gives


def test_a_node_of_today(router: Path) -> None:
    """What the trace's database holds, byte by byte; test_lightningd asks lightningd itself."""
    found = found_in(router)
    closed, channel = found.channels
    assert (found.version, found.damage) == (691, None)
    assert (closed.state, closed.is_open, closed.scb) == ("CLOSED", False, None)
    assert channel == Channel(
        id=2,
        peer_id="03cecbfdc68544cc596223b68ce0710c9e5d2c9cb317ee07822d95079acc703d31",
        address="127.0.0.1:38105",
        funding="78f4b9d11233c5af0b6e0ecc0aba69ffd7c69aef5176da5b2eef6f492bc81a04:0",
        short_channel_id="103x2x0",
        capacity_sat=10_000_000,
        our_msat=9_948_068_416,
        state="CHANNELD_NORMAL",
        is_open=True,
        scb=channel.scb,
        notes=(),
    )
    assert channel.scb is not None and channel.funding is not None
    head, _, secrets = channel.scb.partition("01fc")
    txid = bytes.fromhex(channel.funding.partition(":")[0])[::-1].hex()
    assert head == (
        f"{2:016x}{txid}{channel.peer_id}01{'7f000001'}{38105:04x}{txid}{0:08x}{10_000_000:016x}"
        f"0003{'401000'}{len(secrets + '01fc') // 2:08x}"
    )
    assert secrets.endswith("0501000702" + f"{5:04x}")


def test_a_release_of_2019(tmp_path: Path) -> None:
    """Columns that were not there yet are filled in as lightningd's migrations do."""
    found = found_in(old_database(tmp_path / "old.sqlite3"))
    channel = only(found)
    assert (found.version, found.node_id, found.damage) == (None, None, None)
    assert (channel.address, channel.short_channel_id) == ("[::1]:9735", "500x20x1")
    assert (channel.our_msat, channel.notes) == (9001, ())
    tlvs = b"\1\x5c" + struct.pack("!QI", 2**48 - 2, 2)
    tlvs += struct.pack("!Q", 2**48 - 1) + b"a" * 32 + struct.pack("!Q", 2**48 - 2) + b"b" * 32
    tlvs += b"\3\x84" + PEER * 4 + b"\5\1\1" + b"\7\2" + struct.pack("!H", 144)
    channel_id = TXID[:30] + bytes((30 ^ 1, 31 ^ 2))
    expected = struct.pack("!Q", 7) + channel_id + PEER
    expected += b"\2" + bytes(15) + b"\1" + struct.pack("!H", 9735)
    expected += TXID + struct.pack("!IQ", 258, 16777215) + struct.pack("!HI", 0, len(tlvs)) + tlvs
    assert channel.scb == expected.hex()


@pytest.mark.parametrize(
    ("columns", "features"),
    [
        ((), ""),
        (("option_static_remotekey INTEGER DEFAULT 0",), ""),
        (("option_static_remotekey INTEGER DEFAULT 1",), "1000"),
        ((f"local_static_remotekey_start INTEGER DEFAULT {2**63 - 1}",), ""),
        (("local_static_remotekey_start INTEGER DEFAULT 0",), "1000"),
        (("option_anchor_outputs INTEGER DEFAULT 1",), "101000"),
        (
            (
                "local_static_remotekey_start INTEGER DEFAULT 0",
                "alias_remote INTEGER DEFAULT 77",
            ),
            "1000",  # It is announced.
        ),
        (("channel_type BLOB DEFAULT x'401000'",), "401000"),
    ],
)
def test_channel_type(columns: Sequence[str], features: str, tmp_path: Path) -> None:
    adding = (f"ALTER TABLE channels ADD {column}" for column in columns)
    channel = only(found_in(old_database(tmp_path / "old.sqlite3", *adding)))
    assert channel.scb is not None
    assert channel.scb.partition(f"{16777215:016x}")[2].startswith(
        f"{len(features) // 2:04x}{features}000000"
    )


def test_unannounced_and_zeroconf_channel_type(tmp_path: Path) -> None:
    path = old_database(
        tmp_path / "old.sqlite3",
        "ALTER TABLE channels ADD alias_remote INTEGER DEFAULT 77",
        "UPDATE channels SET channel_flags = 0, minimum_depth = 0",
    )
    channel = only(found_in(path))
    assert channel.scb is not None
    assert channel.scb.partition(f"{16777215:016x}")[2].startswith("0007" + "04400000000000")


@pytest.mark.parametrize("state", [*range(1, 16), -1, "NULL", "'text'", "x'ff'", 2.5])
def test_which_channels_are_open(state: object, tmp_path: Path) -> None:
    """As lightningd's staticbackup has it; what is unknown may well be open."""
    path = old_database(tmp_path / "old.sqlite3", f"UPDATE channels SET state = {state}")
    channel = only(found_in(path))
    assert channel.is_open == (state not in (1, 10)) == (channel.scb is not None)
    assert channel.state.startswith("unknown state ") == (state not in range(1, 15))


def test_a_wal_and_a_journal_are_read_and_stay(tmp_path: Path) -> None:
    path = old_database(tmp_path / "old.sqlite3")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("UPDATE channels SET msatoshi_local = 5")
        connection.commit()
        copy = tmp_path / "copy" / path.name
        copy.parent.mkdir()
        for file in tmp_path.glob("old.sqlite3*"):
            shutil.copy(file, copy.parent)
    assert only(found_in(copy)).our_msat == 5
    assert only(found_in(path)).our_msat == 5  # Mode WAL, without one.
    path = old_database(tmp_path / "hot.sqlite3")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA cache_size = 0")
        connection.execute("BEGIN")
        connection.execute("UPDATE channels SET msatoshi_local = 6")
        connection.execute("CREATE TABLE more AS SELECT zeroblob(99999) AS x")
        for file in tmp_path.glob("hot.sqlite3*"):
            shutil.copy(file, copy.parent)
    assert (copy.parent / "hot.sqlite3-journal").exists()
    assert only(found_in(copy.parent / "hot.sqlite3")).our_msat == 9001


# Addresses


@pytest.mark.parametrize(
    ("text", "wire"),
    [
        ("1.2.3.4:9735", "01010203042607"),
        ("[2001:db8::1]:1", "0220010db80000000000000000000000010001"),
        (f"{ONION}:9735", "04" + "00" * 35 + "2607"),
        ("node.example.org:9735", "05106e6f64652e6578616d706c652e6f72672607"),
    ],
)
def test_address(text: str, wire: str) -> None:
    assert scb.address_on_wire(text) == bytes.fromhex(wire)
    assert scb.address_in_words(bytes.fromhex(wire)) == text
    for end in range(len(wire) // 2):
        assert scb.address_in_words(bytes.fromhex(wire)[:end]) is None
    assert scb.address_in_words(bytes.fromhex(wire) + bytes(300)) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "1.2.3.4", "1.2.3.4:0", "1.2.3.4:65536", "1.2.3.4:9x", "/run/socket", "::1"),
        *("(ws)1.2.3.4:9735", "a" * 16 + ".onion:9735", "a" * 256 + ":1", "x\ny:1", ":9735"),
        *("1.2.3.4:\N{ARABIC-INDIC DIGIT ONE}", "\udcff:1", "autotor:127.0.0.1:9051/x"),
    ],
)
def test_no_address(text: str, tmp_path: Path) -> None:
    """lightningd's own stand-in takes the place, and the operator is told."""
    assert scb.address_on_wire(text) is None
    path = old_database(tmp_path / "old.sqlite3", "UPDATE peers SET address = NULL")
    channel = only(found_in(path))
    assert channel.address is None
    assert channel.scb is not None and scb.NOWHERE.hex() in channel.scb
    assert any("lightning-cli connect" in note for note in channel.notes)


def test_address_that_lightningd_prefers(tmp_path: Path) -> None:
    adding = "ALTER TABLE peers ADD last_known_address BLOB"
    for known, expected in (("01010203042607", "1.2.3.4:9735"), ("0102030404", "[::1]:9735")):
        path = old_database(
            tmp_path / known, adding, f"UPDATE peers SET last_known_address = x'{known}'"
        )
        assert only(found_in(path)).address == expected


# Damaged ones, and those that somebody else made


@pytest.mark.parametrize(
    ("statement", "missing"),
    [
        ("DROP TABLE shachain_known", "revoked secrets"),
        ("DROP TABLE shachains", "revoked secrets"),
        ("CREATE VIEW bad AS SELECT 1", ""),
        ("DELETE FROM shachain_known WHERE pos = 0", "revoked secrets"),
        ("UPDATE shachains SET num_valid = 50", "revoked secrets"),
        ("UPDATE shachains SET num_valid = 'many'", "revoked secrets"),
        ("UPDATE shachain_known SET hash = 'text' WHERE pos = 1", "revoked secrets"),
        ("UPDATE channels SET payment_basepoint_remote = zeroblob(33)", "basepoints"),
        ("UPDATE channels SET htlc_basepoint_remote = NULL", "basepoints"),
        ("UPDATE channels SET funder = 2", "who opened it"),
        ("UPDATE channel_configs SET to_self_delay = 65536", "delay"),
        ("DELETE FROM channel_configs", "delay"),
    ],
)
def test_what_is_missing_is_left_out_and_named(
    statement: str, missing: str, tmp_path: Path
) -> None:
    channel = only(found_in(old_database(tmp_path / "old.sqlite3", statement)))
    assert channel.scb is not None
    assert [missing in note for note in channel.notes] == ([True] if missing else [])


@pytest.mark.parametrize(
    ("statement", "missing"),
    [
        ("DELETE FROM peers", "peer"),
        ("UPDATE peers SET node_id = zeroblob(33)", "peer"),
        ("UPDATE peers SET node_id = x'02' || zeroblob(31) || x'05'", "peer"),  # Text.
        ("UPDATE peers SET node_id = zeroblob(99999999)", "peer"),
        ("UPDATE channels SET peer_id = 'x'", "peer"),
        ("UPDATE channels SET funding_tx_id = NULL", "funding"),
        ("UPDATE channels SET funding_tx_outnum = 65536", "funding"),
        ("UPDATE channels SET funding_satoshi = 2100000000000001", "funding"),
        ("UPDATE channels SET funding_satoshi = 0", "funding"),
        ("UPDATE channels SET id = -7", "funding"),
    ],
)
def test_without_these_there_is_no_static_backup(
    statement: str, missing: str, tmp_path: Path
) -> None:
    """lightningd would end by itself at such a peer, or skip it all without a word."""
    channel = only(found_in(old_database(tmp_path / "old.sqlite3", statement)))
    assert channel.scb is None
    assert missing in channel.notes[0]


def test_points_of_the_curve() -> None:
    assert scb.is_point(PEER)
    assert not scb.is_point(b"\4" + PEER[1:])
    assert not scb.is_point(b"\2" + (5).to_bytes(32, "big"))
    assert not scb.is_point(b"\2" + b"\xff" * 32)
    assert not scb.is_point(b"")


@pytest.mark.parametrize(
    ("statements", "says"),
    [
        (("DROP TABLE channels",), "it has no table channels"),
        (("ALTER TABLE channels RENAME COLUMN peer_id TO peer",), "has no peer_id"),
        (
            ("DROP TABLE channels", "CREATE VIEW channels AS SELECT * FROM peers"),
            "its channels is no table",
        ),
    ],
)
def test_a_schema_that_is_not_known(statements: Sequence[str], says: str, tmp_path: Path) -> None:
    path = old_database(tmp_path / "old.sqlite3", *statements)
    with pytest.raises(DatabaseError, match=says):
        channels.of_file(str(path), f"{path}.")


def test_a_generated_column_is_never_computed(tmp_path: Path) -> None:
    """It could compute anything, for ever."""
    forever = "ALTER TABLE channels ADD scid INTEGER AS (zeroblob(1e9) || 1)"
    assert only(found_in(old_database(tmp_path / "old.sqlite3", forever))).notes == ()


def test_more_channels_than_any_node_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_CHANNELS", 2)
    more = (f"INSERT INTO channels (id) VALUES ({number})" for number in (8, 9))
    found = found_in(old_database(tmp_path / "old.sqlite3", *more))
    assert len(found.channels) == 2
    assert found.damage is not None and "more than 2" in found.damage


def damaged(data: bytes, chance: random.Random) -> bytes:
    """``data`` with some of its bytes or pages wrong, or its end cut."""
    broken = bytearray(data)
    for _ in range(chance.choice((1, 3, 30))):
        place = chance.randrange(len(broken))
        match chance.randrange(4):
            case 0:
                broken[place] ^= 1 << chance.randrange(8)
            case 1:
                broken[place : place + 4] = chance.randbytes(4)
            case 2:
                broken[place - place % 4096 : place - place % 4096 + 4096] = bytes(4096)
            case 3:
                del broken[max(100, place) :]
    return bytes(broken)


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_ends_in_a_traceback(seed: int, router: Path, tmp_path: Path) -> None:
    """Of whatever is left, the rest is listed, or plain words come."""
    chance, path = random.Random(seed), tmp_path / "damaged.sqlite3"
    small = old_database(tmp_path / "old.sqlite3").read_bytes()
    listed = 0
    for number in range(60):
        path.write_bytes(damaged(router.read_bytes() if number % 4 == 0 else small, chance))
        with contextlib.suppress(BackupError):
            listed += len(found_in(path).channels)
    assert listed > 20


# The command


def test_the_command(router: Path, url: str, tmp_path: Path) -> None:
    """A database and a backup of it give the same; the warning is always there."""
    database = tmp_path / "lightningd.sqlite3"
    shutil.copy(router, database)
    node = tmp_path / "regtest"
    node.mkdir()
    shutil.copy(router, node / "lightningd.sqlite3")
    run_cli("init", "--lightning-dir", node, url)
    shown = []
    for source in (database, url):
        words = run_cli("channels", source)
        assert "9,948,068.416 sat" in words.stdout
        assert "2 channels, 1 of them open" in words.stdout
        assert "never start lightningd on it" in words.stderr
        static = run_cli("channels", "--static", source)
        assert "recoverchannel" in static.stderr
        shown.append(json.loads(run_cli("channels", "--json", "--static", source).stdout))
        assert [channel["scb"] for channel in shown[-1]["channels"]] == [
            None,
            *static.stdout.split(),
        ]
    assert shown[0] == shown[1]
    assert "scb" not in json.loads(run_cli("channels", "--json", url).stdout)["channels"][1]
    assert sorted(file.name for file in tmp_path.iterdir() if "channels" in file.name) == []


def test_what_is_wrong_ends_with_exit_code_3(tmp_path: Path) -> None:
    path = old_database(tmp_path / "old.sqlite3", "UPDATE peers SET node_id = NULL")
    done = run_cli("channels", "--static", path, check=3)
    assert done.stdout == ""
    assert "WARNING: channel 500x20x1: its peer is not known" in done.stderr
    assert "recoverchannel" not in done.stderr


def test_what_stands_before_damage_in_a_backup(router: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/node.bkp"
    node = tmp_path / "regtest"
    node.mkdir()
    shutil.copy(router, node / "lightningd.sqlite3")
    run_cli("init", "--lightning-dir", node, url)
    support.add_session(url, [support.change(692, "UPDATE channels SET state = 10")])
    log = tmp_path / "node.bkp"
    record = log.read_bytes().index(b"UPDATE channels SET state = 10")
    support.flip(log, record)
    done = run_cli("channels", url, check=3)
    assert "2 channels, 1 of them open" in done.stdout
    assert "is damaged at offset" in done.stderr


def test_a_change_that_does_not_replay(router: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/node.bkp"
    node = tmp_path / "regtest"
    node.mkdir()
    shutil.copy(router, node / "lightningd.sqlite3")
    run_cli("init", "--lightning-dir", node, url)
    support.add_session(url, [support.change(692, "UPDATE nothing SET state = 10")])
    done = run_cli("channels", url, check=3)
    assert "2 channels, 1 of them open" in done.stdout
    assert "does not replay" in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing", None, "is no file and no backup URL"),
        ("empty", b"", "is no SQLite database"),
        ("log", b"no database" * 99, "name it as file:///"),
        ("head", b"SQLite format 3\0" + b"x" * 999, "SQLite says"),
    ],
)
def test_what_is_no_database(name: str, content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert says in run_cli("channels", path, check=1).stderr


def test_a_directory_and_a_disk_that_is_not_there(tmp_path: Path) -> None:
    done = run_cli("channels", tmp_path, check=1)
    assert f"Name the database: {tmp_path}/lightningd.sqlite3." in done.stderr
    done = run_cli("channels", f"file://{tmp_path}/unmounted/node.bkp", check=1)
    assert f"{tmp_path}/unmounted does not exist. Create or mount it." in done.stderr
