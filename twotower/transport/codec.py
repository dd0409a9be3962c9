"""Messages between our own processes as msgpack: dataclasses by the name of their kind. Nothing is unpickled.

Knows nothing of connections or of a message's meaning. The first use of a codec imports msgspec; towers and a pair in
one process do not need it.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from twotower import errors
from twotower.errors import FieldError, InvalidRequest, Overloaded, TwoTowerError

if TYPE_CHECKING:
    import msgspec

Message = TypeVar("Message")

_ERRORS: dict[str, type[TwoTowerError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, TwoTowerError)
}


class CodecError(TwoTowerError):
    """Bytes that are not one of our messages."""


class Codec(Generic[Message]):
    """Reads and writes dataclasses of the given kinds as `[kind, fields]`.

    Fields may be int, float, bool, str, bytes, enums of strings, errors, dataclasses, tuples and dicts of these, and
    None. An extra field is ignored, a missing field is refused.
    """

    def __init__(self, *kinds: type[Any]) -> None:
        self._kinds = {kind.__name__: kind for kind in kinds}
        assert len(self._kinds) == len(kinds), "two kinds of one name"

    def encode(self, message: Message) -> bytes:
        """One message."""
        return self._encoder.encode((type(message).__name__, message))

    def decode(self, messages: bytes | memoryview) -> list[Message]:
        """The messages of one list. Raises CodecError."""
        import msgspec

        try:
            return [self._decoders[kind].decode(fields) for kind, fields in self._envelopes.decode(messages)]
        except KeyError as error:
            raise CodecError(f"got a message {str(error)[:80]}, wanted one of {sorted(self._kinds)}") from None
        except (msgspec.MsgspecError, RecursionError) as error:
            raise CodecError(f"got {len(messages)} bytes that are no message of ours: {error}") from None

    @cached_property
    def _encoder(self) -> "msgspec.msgpack.Encoder":
        import msgspec

        return msgspec.msgpack.Encoder(enc_hook=_plain_error)

    @cached_property
    def _envelopes(self) -> "msgspec.msgpack.Decoder[list[tuple[str, msgspec.Raw]]]":
        import msgspec

        return msgspec.msgpack.Decoder(list[tuple[str, msgspec.Raw]])

    @cached_property
    def _decoders(self) -> "dict[str, msgspec.msgpack.Decoder[Message]]":
        import msgspec

        return {name: msgspec.msgpack.Decoder(kind, dec_hook=_error) for name, kind in self._kinds.items()}


def listed(messages: Sequence[bytes]) -> bytes:
    """Encoded messages as one list, for `decode`."""
    return b"".join((b"\xdd", len(messages).to_bytes(4, "big"), *messages))


def _plain_error(error: object) -> dict[str, Any]:
    """Errors outside the public tree travel as their nearest ancestor in it."""
    if not isinstance(error, TwoTowerError):
        raise NotImplementedError(f"a {type(error).__name__} is no field of a message")
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS)
    if isinstance(error, InvalidRequest):
        return {"type": name, "problems": [(p.field, p.message) for p in error.problems]}
    plain = {"type": name, "message": str(error)}
    return plain | {"retry_after_s": error.retry_after_s} if isinstance(error, Overloaded) else plain


def _error(wanted: type[Any], plain: object) -> TwoTowerError:
    """Raises CodecError."""
    match plain:
        case {"type": str(name), "problems": [*problems]} if issubclass(_ERRORS.get(name, Overloaded), InvalidRequest):
            return InvalidRequest([_problem(problem) for problem in problems])
        case {"type": "Overloaded", "message": str(message), "retry_after_s": None | float() as retry_after_s}:
            return Overloaded(message, retry_after_s)
        case {"type": str(name), "message": str(message)} if name in _ERRORS:
            return _ERRORS[name](message)
    raise CodecError(f"got {str(plain)[:80]!r}, wanted an error of ours")


def _problem(plain: object) -> FieldError:
    match plain:
        case [str(field), str(message)]:
            return FieldError(field, message)
    raise CodecError(f"got {str(plain)[:80]!r}, wanted a field and what is wrong with it")
