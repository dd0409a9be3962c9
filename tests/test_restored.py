"""Routers and cells of two versions meet while a service is upgraded."""

import pickle

from twotower.core import DecodingParams, Mode, Request, RequestId

OLDER = 14  # fields that DecodingParams had before penalties and structured output came


def test_what_an_older_version_sends_has_the_defaults_of_what_it_does_not_know() -> None:
    sent = DecodingParams(Mode.AR, 5, top_k=3)
    got = DecodingParams.__new__(DecodingParams)
    got.__setstate__(sent.__getstate__()[:OLDER])  # type: ignore[attr-defined]
    assert got == sent and not got.steers and got.structured_outputs is None


def test_what_a_newer_version_sends_beyond_our_fields_is_dropped() -> None:
    got = DecodingParams.__new__(DecodingParams)
    got.__setstate__([*DecodingParams(Mode.VERIFIED).__getstate__(), "of a later version"])  # type: ignore[attr-defined]
    assert got == DecodingParams(Mode.VERIFIED)


def test_there_and_back() -> None:
    request = Request(RequestId("r"), (5, 6), DecodingParams(Mode.AR, 5, logit_bias=((3, 1.0),)), committed=(7,))
    assert pickle.loads(pickle.dumps(request)) == request
