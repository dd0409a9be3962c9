"""The key of a call, as clients of both faces send it."""

import base64
import binascii

CHALLENGES = ('Basic realm="TwoTower Serve"', "Bearer")  # a header each, or Chromium sees the first only


def key_of(authorization: str | None) -> str | None:
    """Of `Bearer KEY`, or of `Basic` with the key as password, which is how a browser asks for one. None where there is
    none."""
    scheme, _, rest = (authorization or "").strip().partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip() or None
    if scheme.lower() == "basic":
        try:
            _, _, key = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return None
        return key or None
    return None
