"""Forbids this Python process every network address but its own machine's.

Python imports a module of this name at start. conftest.py puts the directory on PYTHONPATH, so that each process that
a test starts is guarded like the test itself. An audit hook sees what goes through Python's socket module, whichever
library called it; it cannot be removed again.
"""

import socket
import sys

OWN_NAMES = {None, "", "localhost", "::1", "0.0.0.0", "::", socket.gethostname()}


def forbid(event: str, args: tuple) -> None:
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and args[0].family in (socket.AF_INET, socket.AF_INET6):
        host = args[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in OWN_NAMES and not host.startswith("127."):
        # Not an OSError: libraries take that for an outage and go on without.
        raise RuntimeError(f"the tests are offline, but something asked for {host}")


sys.addaudithook(forbid)
