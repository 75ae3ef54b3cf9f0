"""Real CURVE sockets: who is admitted, who is not, and what key files may be."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from emstream import keys
from emstream.errors import KeyFileError
from emstream.keys import Doorkeeper, KeyPair


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("service", "friend", "stranger"):
        keys.make(name, tmp_path)
    (tmp_path / "admitted").mkdir()
    (tmp_path / "friend.key").rename(tmp_path / "admitted/friend.key")
    return tmp_path


@pytest.fixture
def door(folder: Path, context: Any) -> Iterator[Any]:
    """A guarded publisher."""
    doorkeeper = Doorkeeper(keys.read_pair(folder / "service.key_secret"), folder / "admitted", context)
    socket = context.socket(zmq.PUB)
    doorkeeper.guard(socket)
    socket.bind("tcp://127.0.0.1:*")
    yield socket
    socket.close(linger=0)
    doorkeeper.close()


def hears(context: Any, door: Any, pair: KeyPair | None, server: bytes = b"") -> bool:
    """Whether one with these keys gets what is published within a second."""
    with context.socket(zmq.SUB) as socket:
        socket.linger = 0
        if pair:
            keys.Peer(pair, server).introduce(socket)
        socket.connect(door.get(zmq.LAST_ENDPOINT).decode().rstrip("\0"))
        socket.subscribe(b"")
        end = time.monotonic() + 1
        while time.monotonic() < end:
            door.send(b"hello")
            if socket.poll(20):
                return True
        return False


def pair(folder: Path, name: str) -> KeyPair:
    return keys.read_pair(folder / f"{name}.key_secret")


def test_only_those_admitted_hear_anything(folder: Path, context: Any, door: Any) -> None:
    service = keys.read_public(folder / "service.key")
    assert hears(context, door, pair(folder, "friend"), service)
    assert hears(context, door, pair(folder, "service"), service)  # its own recorder
    assert not hears(context, door, pair(folder, "stranger"), service)
    assert not hears(context, door, None)
    assert not hears(context, door, pair(folder, "friend"), keys.read_public(folder / "stranger.key"))


def test_one_who_connects_and_says_nothing_is_sent_away(
    folder: Path, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_HANDSHAKE_MS", 100)
    doorkeeper = Doorkeeper(pair(folder, "service"), folder / "admitted", context)
    guarded = context.socket(zmq.PUB)
    doorkeeper.guard(guarded)
    port = guarded.bind_to_random_port("tcp://127.0.0.1")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as silent:
        while silent.recv(1000):  # the greeting; then nothing, for ever or until it is closed
            pass
    guarded.close(linger=0)
    doorkeeper.close()


def test_key_that_is_added_or_removed_counts_soon(folder: Path, context: Any, door: Any) -> None:
    service, stranger = keys.read_public(folder / "service.key"), pair(folder, "stranger")
    (folder / "stranger.key").rename(folder / "admitted/stranger.key")
    time.sleep(1.1)
    assert hears(context, door, stranger, service)
    (folder / "admitted/stranger.key").unlink()
    time.sleep(1.1)
    assert not hears(context, door, stranger, service)


def test_secret_is_for_its_owner_alone(folder: Path) -> None:
    assert (folder / "service.key_secret").stat().st_mode & 0o777 == 0o600
    secret = pair(folder, "service").secret.decode()
    assert secret not in (folder / "service.key").read_text()
    assert secret not in repr(pair(folder, "service"))


def test_keys_are_never_replaced(folder: Path) -> None:
    before = (folder / "service.key_secret").read_bytes()
    with pytest.raises(KeyFileError, match=r"service\.key_secret: File exists; choose another name"):
        keys.make("service", folder)
    (folder / "service.key_secret").unlink()
    with pytest.raises(KeyFileError, match=r"service\.key: File exists"):
        keys.make("service", folder)
    assert not (folder / "service.key_secret").exists()
    assert before


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_name_must_be_one(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name must be a plain file name"):
        keys.make(name, folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "curve\n",
        'curve\n    public-key = "short"\n',
        'curve\n    public-key = "' + " " * 40 + '"\n',
        'curve\n    public-key = "' + "#" * 40 + '"\n',  # each five are more than 32 bits
    ],
)
def test_file_that_holds_no_key_is_explained(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.key"
    path.write_text(text)
    with pytest.raises(KeyFileError, match=r"bad\.key is no key file .*emstream keygen"):
        keys.read_public(path)


def test_missing_files_are_explained(folder: Path) -> None:
    with pytest.raises(KeyFileError, match=r"cannot read .*none\.key: .*emstream keygen makes keys"):
        keys.read_public(folder / "none.key")
    with pytest.raises(KeyFileError, match=r"service\.key has no secret key"):
        keys.read_pair(folder / "service.key")
    with pytest.raises(KeyFileError, match=r"there is no folder .*nowhere of keys to admit"):
        keys.Admitted(folder / "nowhere", b"")


def test_loose_permissions_and_bad_files_among_the_admitted_are_said(folder: Path, caplog: Any) -> None:
    (folder / "service.key_secret").chmod(0o644)
    pair(folder, "service")
    assert "chmod 600" in caplog.text
    (folder / "admitted/bad.key").write_text("nonsense")
    admitted = keys.Admitted(folder / "admitted", b"")
    assert "bad.key is no key file" in caplog.text
    assert admitted.callback("", keys.read_public(folder / "admitted/friend.key"))


def test_bad_file_put_among_the_admitted_locks_nobody_out(
    folder: Path, context: Any, door: Any, caplog: Any
) -> None:
    service = keys.read_public(folder / "service.key")
    for name in ("bad", "worse"):
        (folder / f"admitted/{name}.key").write_text('curve\n    public-key = "' + "#" * 40 + '"\n')
    for _ in range(2):
        time.sleep(1.1)
        assert hears(context, door, pair(folder, "friend"), service)
    assert caplog.text.count("bad.key is no key file") == 1  # and not once for every connection


def test_folder_that_cannot_be_read_for_a_while_locks_nobody_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    admitted = keys.Admitted(folder / "admitted", b"")
    friend = keys.read_public(folder / "admitted/friend.key")

    def away(path: Path, pattern: str) -> Any:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "glob", away)
    monkeypatch.setattr(keys, "_LOOK_AGAIN_S", 0.0)
    assert admitted.callback("", friend)
    assert not admitted.callback("", keys.read_public(folder / "stranger.key"))
    assert "Stale file handle" in caplog.text


def test_keys_that_do_not_belong_together_are_refused(folder: Path) -> None:
    path = folder / "service.key_secret"
    other = pair(folder, "stranger").public.decode()
    path.write_text(path.read_text().replace(pair(folder, "service").public.decode(), other))
    with pytest.raises(KeyFileError, match=r"the two keys in .*service\.key_secret do not belong together"):
        keys.read_pair(path)


@pytest.mark.parametrize("end", ["\r\n", "\n\n"])
def test_key_files_edited_elsewhere_are_read(folder: Path, end: str) -> None:
    path, before = folder / "service.key_secret", pair(folder, "service")
    path.write_bytes(path.read_text().replace("\n", end).encode())
    assert pair(folder, "service") == before
