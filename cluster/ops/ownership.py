"""Which `up` the application of a Ray belongs to: a mark in Ray's own key-value store, one for the whole cluster.

Serve lets anyone deploy over an application of the same name. That would cut off the first one's clients, and both
would believe that they serve.
"""

import secrets

from ray import serve
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from cluster.app import APP_NAME
from twotower.errors import Unavailable

_KEY, _NAMESPACE = b"up", b"twotower"
_OWN_RAY, _ANY_RAY = b"own-ray:", b"any-ray:"


def check_free(where: str) -> None:
    """Raises Unavailable if there is an application or another mark."""
    application = serve.status().applications.get(APP_NAME)
    if application is not None:
        raise _taken(where, f"serves an application {APP_NAME!r} already ({application.status.value})")
    if holder() is not None:
        raise _taken(where, "belongs to another `up`, which is starting or was killed")


def new_mark(own_ray: bool) -> bytes:
    """`own_ray`: the Ray ends with the `up` that has this mark."""
    return (_OWN_RAY if own_ray else _ANY_RAY) + secrets.token_bytes(16)


def take(mark: bytes, where: str, replace: bool) -> None:
    """Stores this mark. Replaces another mark only with `replace`. Raises Unavailable.

    A present application stays running. Its place is ours now, and we have to end it.
    """
    if replace:
        if (holder() or b"").startswith(_OWN_RAY):
            raise Unavailable(f"--replace: the Ray at {where} ends with the `up` that started it; end that `up` first")
        _internal_kv_put(_KEY, mark, overwrite=True, namespace=_NAMESPACE)
        return
    check_free(where)
    while _internal_kv_put(_KEY, mark, overwrite=False, namespace=_NAMESPACE):  # another process was faster
        check_free(where)


def holder() -> bytes | None:
    """The present mark."""
    mark: bytes | None = _internal_kv_get(_KEY, namespace=_NAMESPACE)
    return mark


def give_up(mark: bytes) -> None:
    """Remove this mark; another mark stays."""
    if holder() == mark:
        _internal_kv_del(_KEY, namespace=_NAMESPACE)


def _taken(where: str, by: str) -> Unavailable:
    return Unavailable(
        f"--address: the Ray at {where} {by}; end that one first, or take its place with --replace, which lets "
        "its requests finish"
    )
