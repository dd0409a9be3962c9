"""Labels: clients' and gateways' names of a request. Echoed and logged, never a key; several requests may share one."""

import logging
import re

from twotower.showing import show

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"  # HTTP header and gRPC metadata: the label
OWN_ID = "x-twotower-id"  # gRPC metadata of an answer: the id that is ours alone
WANTED = "1 to 128 printable ASCII characters without spaces"
_LABEL = re.compile(r"[\x21-\x7e]{1,128}")


def is_label(text: str) -> bool:
    return _LABEL.fullmatch(text) is not None


def label_of(header: str) -> str:
    """The label that a gateway has put beside the request; empty if there is none.

    An invalid one is ignored: the client may not know of it, and the request is valid without.
    """
    if not header or is_label(header):
        return header
    logger.debug("%s: got %s, wanted %s: left out", REQUEST_ID, show(header), WANTED)
    return ""
