"""ZeroMQ CURVE: who may connect, and to whom one talks.

Everyone has a pair of keys, made by ``emstream keygen NAME``: NAME.key, which others may have,
and NAME.key_secret, which nobody else may. Whoever binds a socket (the service, or a camera that is
connected to) admits the public keys in one folder; whoever connects knows the public key of the
other side. All that passes is encrypted and cannot be altered. See http://curvezmq.org.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from emstream.errors import KeyFileError

log = logging.getLogger(__name__)
PUBLIC, SECRET = ".key", ".key_secret"
_LOOK_AGAIN_S = 1.0
_DOMAIN = "emstream"
_HANDSHAKE_MS = 3000  # whoever has not shown a key by then is sent away; until then he holds an open file


@dataclass(frozen=True)
class KeyPair:
    """One's own keys, as ZeroMQ wants them: 40 bytes of Z85 each."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r})"


def make(name: str, folder: Path) -> tuple[Path, Path]:
    """Write NAME.key and, readable by its owner alone, NAME.key_secret. Raises KeyFileError; replaces nothing."""
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"name must be a plain file name such as microscope, got {name!r}")
    public, secret = (folder / f"{name}{suffix}" for suffix in (PUBLIC, SECRET))
    pair = KeyPair(*zmq.curve_keypair())
    texts = {
        secret: f'# Keep this file to yourself.\ncurve\n    public-key = "{pair.public.decode()}"\n'
        f'    secret-key = "{pair.secret.decode()}"\n',
        public: f'# Give this file to whoever is to know you.\ncurve\n    public-key = "{pair.public.decode()}"\n',
    }
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            mode = 0o600 if path == secret else 0o644
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
                written.append(path)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink()
        there = (
            "; choose another name: whoever uses these would be locked out"
            if error.errno == errno.EEXIST
            else ""
        )
        raise KeyFileError(
            f"cannot write keys: {error.filename or folder}: {error.strerror}{there}"
        ) from None
    return public, secret


def read_pair(path: Path) -> KeyPair:
    """Of a .key_secret file."""
    public, secret = _read(path)
    if secret is None:
        raise KeyFileError(
            f"{path} has no secret key: give the {SECRET} file that emstream keygen wrote beside it"
        )
    if zmq.curve_public(secret) != public:
        raise KeyFileError(
            f"the two keys in {path} do not belong together, so nobody could connect; emstream keygen makes a pair"
        )
    if path.stat().st_mode & 0o077 and os.name == "posix":
        log.warning("%s can be read by others: chmod 600 %s", path, path)
    return KeyPair(public, secret)


def read_public(path: Path) -> bytes:
    """Of a .key file."""
    return _read(path)[0]


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
        for key in (public, secret):
            if key is not None and (len(key) != 40 or len(z85.decode(key)) != 32):
                raise ValueError("a key has 40 characters")
    except OSError as error:
        raise KeyFileError(
            f"cannot read {path}: {error.strerror or 'no such file'}; emstream keygen makes keys"
        ) from None
    except (ValueError, KeyError, UnicodeDecodeError, struct.error) as error:
        raise KeyFileError(f"{path} is no key file ({error}); emstream keygen makes them") from None
    return public, secret


class Admitted:
    """The public keys in a folder, and one's own. A file that is added or removed counts within a second."""

    def __init__(self, folder: Path, own: bytes) -> None:
        self._folder = folder
        self._own = own
        self._keys: frozenset[bytes] = frozenset()
        self._said: set[str] = set()
        self._looked_s = -1e9
        self._lock = threading.Lock()
        if not folder.is_dir():
            raise KeyFileError(
                f"there is no folder {folder} of keys to admit: put the clients' {PUBLIC} files into one"
            )
        if not self._look():
            log.warning("%s has no %s file: nobody is admitted yet", folder, PUBLIC)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether `key` may connect; what ZeroMQ's authenticator calls."""
        with self._lock:
            if time.monotonic() - self._looked_s > _LOOK_AGAIN_S:
                self._look()
            return key == self._own or key in self._keys

    def _look(self) -> frozenset[bytes]:
        self._looked_s = time.monotonic()
        keys = set()
        try:
            for path in sorted(self._folder.glob(f"*{PUBLIC}")):
                try:
                    keys.add(read_public(path))
                except KeyFileError as error:
                    self._say(str(error))
            self._keys = frozenset(keys)
        except OSError as error:  # a network drive that is away: those known stay admitted
            self._say(f"cannot read {self._folder}: {error.strerror}")
        return self._keys

    def _say(self, problem: str) -> None:
        """Once: one looks again with every connection that is tried."""
        if problem not in self._said:
            self._said.add(problem)
            log.warning("%s", problem)


class Doorkeeper:
    """Admits to the sockets of one ZeroMQ context; there can be one for each. Start it before sockets are bound."""

    def __init__(
        self, pair: KeyPair, admit: Path, context: zmq.Context[zmq.Socket[bytes]] | None = None
    ) -> None:
        """`admit` is the folder of the public keys that may connect."""
        self.pair = pair
        admitted = Admitted(admit, pair.public)
        self._authenticator = ThreadAuthenticator(context or zmq.Context.instance())
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_DOMAIN, admitted)

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Only those admitted can connect to `socket`, which is bound next."""
        socket.curve_publickey, socket.curve_secretkey = self.pair.public, self.pair.secret
        socket.curve_server = True
        socket.handshake_ivl = _HANDSHAKE_MS
        socket.zap_domain = _DOMAIN.encode()

    @property
    def peer(self) -> Peer:
        """For sockets of one's own that connect to those guarded."""
        return Peer(self.pair, self.pair.public)

    def close(self) -> None:
        self._authenticator.stop()


@dataclass(frozen=True)
class Peer:
    """Whom one connects to: it is shown one's own keys, and nobody but the owner of `server` is talked to."""

    own: KeyPair
    server: bytes

    @classmethod
    def of(cls, key: str | Path | None, server_key: str | Path | None) -> Peer | None:
        """From one's own .key_secret file and the other's .key file; None without either."""
        if key is None and server_key is None:
            return None
        if key is None or server_key is None:
            raise ValueError(
                f"an encrypted connection takes two keys, your own secret one and the other side's public one, got "
                f"{key or server_key} alone"
            )
        return cls(read_pair(Path(key)), read_public(Path(server_key)))

    def introduce(self, socket: zmq.Socket[bytes]) -> None:
        """Of a `socket` that connects next."""
        socket.curve_publickey, socket.curve_secretkey = self.own.public, self.own.secret
        socket.curve_serverkey = self.server
