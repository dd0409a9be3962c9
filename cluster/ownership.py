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


def check_free(where: str) -> None:
    """Raises Unavailable where an application or another's mark is there."""
    application = serve.status().applications.get(APP_NAME)
    if application is not None:
        raise _taken(where, f"serves an application {APP_NAME!r} already ({application.status.value})")
    if holder() is not None:
        raise _taken(where, "has another `up` that starts here, or died here")


def take(where: str, replace: bool) -> bytes:
    """A mark of our own, in the place of all that is there if that is to be replaced. Raises Unavailable if not."""
    mark = secrets.token_bytes(16)
    if replace:
        _internal_kv_put(_KEY, mark, overwrite=True, namespace=_NAMESPACE)
        if APP_NAME in serve.status().applications:
            serve.delete(APP_NAME)  # or its replicas would pass for ours
        return mark
    check_free(where)
    if _internal_kv_put(_KEY, mark, overwrite=False, namespace=_NAMESPACE):  # there was one: somebody was faster
        check_free(where)
    return mark


def holder() -> bytes | None:
    """The mark that is there."""
    mark: bytes | None = _internal_kv_get(_KEY, namespace=_NAMESPACE)
    return mark


def give_up() -> None:
    _internal_kv_del(_KEY, namespace=_NAMESPACE)


def _taken(where: str, by: str) -> Unavailable:
    return Unavailable(
        f"--address: the Ray at {where} {by}: end that one first, or take its place with --replace, which ends its "
        "requests"
    )
