"""Whether the Hub can be reached, asked once and at once: libraries would retry for a minute."""

from __future__ import annotations

import functools
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

_CONNECT_SECONDS = 5.0


@functools.cache
def unreachable(endpoint: str) -> str | None:
    """Why no connection to ``endpoint`` opens, or None. Behind a proxy nobody knows but the proxy."""
    address = urlsplit(endpoint)
    if getproxies().get(address.scheme) or os.environ.get("ALL_PROXY") or address.hostname is None:
        return None
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
