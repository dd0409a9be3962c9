"""Which `up` the application of a Ray belongs to: a mark in Ray's own key-value store, one for the whole cluster.

Serve lets anyone deploy over an application of the same name; its clients would be cut off, and both would think that
they serve.
"""

import secrets

from ray import serve
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from cluster.app import APP_NAME
from twotower.errors import Unavailable

_KEY, _NAMESPACE = b"up", b"twotower"
_BEGUN = "has another `up` that starts here, or died here"


def take(where: str, replace: bool) -> bytes:
    """A mark of our own. Raises Unavailable where an application or another's mark is there, unless it is to be
    replaced."""
    application, mark = serve.status().applications.get(APP_NAME), secrets.token_bytes(16)
    taken = _internal_kv_put(_KEY, mark, overwrite=replace, namespace=_NAMESPACE)
    if replace or not (taken or application):
        return mark
    there = f"serves an application {APP_NAME!r} already ({application.status.value})" if application else _BEGUN
    if not taken:
        give_up()
    raise Unavailable(
        f"--address: the Ray at {where} {there}: end that one first, or take its place with --replace, which ends its "
        "requests"
    )


def has(mark: bytes) -> bool:
    """Whether the application is still this mark's."""
    return bool(_internal_kv_get(_KEY, namespace=_NAMESPACE) == mark)


def give_up() -> None:
    _internal_kv_del(_KEY, namespace=_NAMESPACE)
