"""The handshake: the connecting end shows a token and describes itself; the listening end admits it."""

import hmac
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from twotower.errors import TwoTowerError, Unavailable
from twotower.transport.codec import Codec, CodecError, listed
from twotower.transport.frames import framed

VERSION = 1
GREETING_S = 5.0
GREETING_BYTES = 4096  # the longest frame before the handshake is done

About = Mapping[str, str]
# The listening end's description for a peer with the token. Raises a TwoTowerError that says why it refuses the peer.
Admit = Callable[[About], About]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a process listens. It holds a secret: pass it on privately, never log all of it."""

    host: str
    port: int
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Hello:
    """From the connecting end."""

    version: int
    token: str
    about: dict[str, str]


@dataclass(frozen=True, slots=True)
class Welcome:
    """From the listening end: the peer is admitted."""

    about: dict[str, str]


@dataclass(frozen=True, slots=True)
class Refused:
    """From the listening end: the peer is refused."""

    reason: str


_CODEC: Codec[Hello | Welcome | Refused] = Codec(Hello, Welcome, Refused)


def new_token() -> str:
    return secrets.token_hex(32)


def hello(address: Address, about: About) -> Hello:
    return Hello(VERSION, address.token, dict(about))


def answer(body: bytes, token: str, admit: Admit) -> Welcome | Refused:
    """The answer to a peer's first frame."""
    try:
        match _CODEC.decode(body):
            case [Hello(version, shown, about)]:
                if not hmac.compare_digest(shown.encode(), token.encode()):
                    return Refused("the token is wrong")
                if version != VERSION:
                    return Refused(f"version: got {version}, wanted {VERSION}")
                return Welcome(dict(admit(about)))
        return Refused("wanted an introduction")
    except TwoTowerError as error:
        return Refused(str(error))


def welcome(body: bytes) -> About:
    """The other end's description. Raises Unavailable if it refuses us, and CodecError for malformed bytes."""
    match _CODEC.decode(body):
        case [Welcome(about)]:
            return about
        case [Refused(reason)]:
            raise Unavailable(f"refused: {reason}")
    raise CodecError("wanted a welcome")


def said(greeting: Hello | Welcome | Refused) -> bytes:
    """The message as a frame."""
    return framed(listed([_CODEC.encode(greeting)]))
