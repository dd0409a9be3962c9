"""The key of a call, as clients of both faces send it."""

import base64
import binascii
from collections.abc import Sequence

CHALLENGES = ('Basic realm="TwoTower Serve"', "Bearer")  # a header each, or Chromium sees the first only


def key_of(headers: Sequence[str]) -> str | None:
    """The key of `Bearer KEY`, or of `Basic` with the key as password, as browsers send it. None without a key, or with
    several headers that might name several.
    """
    if len(headers) != 1:
        return None
    scheme, _, rest = headers[0].strip().partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip() or None
    if scheme.lower() == "basic":
        try:
            _, _, key = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return None
        return key or None
    return None
