"""What two ends say before anything else: who connects shows a token and tells about itself; who listens lets it in."""

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
# What the listening end says to somebody who has the token: about itself. Raises a TwoTowerError that says why not.
Admit = Callable[[About], About]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a process listens. Carries a secret: hand it over privately, never log it whole."""

    host: str
    port: int
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Hello:
    """From whoever connects."""

    version: int
    token: str
    about: dict[str, str]


@dataclass(frozen=True, slots=True)
class Welcome:
    """The other end agrees."""

    about: dict[str, str]


@dataclass(frozen=True, slots=True)
class Refused:
    """Or does not."""

    reason: str


_CODEC: Codec[Hello | Welcome | Refused] = Codec(Hello, Welcome, Refused)


def new_token() -> str:
    return secrets.token_hex(32)


def hello(address: Address, about: About) -> Hello:
    return Hello(VERSION, address.token, dict(about))


def answer(body: bytes, token: str, admit: Admit) -> Welcome | Refused:
    """To the first frame that somebody sends."""
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
    """What the other end says about itself. Raises Unavailable where it lets nobody in, CodecError for nonsense."""
    match _CODEC.decode(body):
        case [Welcome(about)]:
            return about
        case [Refused(reason)]:
            raise Unavailable(f"refused: {reason}")
    raise CodecError("wanted a welcome")


def said(greeting: Hello | Welcome | Refused) -> bytes:
    """As a frame."""
    return framed(listed([_CODEC.encode(greeting)]))
