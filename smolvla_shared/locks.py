"""A directory that one process at a time may write in: a lock that a crash does not leave behind.

The operating system holds the lock, a POSIX record lock on a file, and releases it when the process ends, however it
ends. Forked processes do not inherit it, so that the workers of a killed run do not keep it either.
"""

import fcntl
import os
import socket
import sys
from pathlib import Path

LOCK_FILE = ".lock"
HELD: dict[Path, int] = {}  # descriptors of this process's locks: closing one releases the lock


def lock(directory: Path, what: str, fix: str) -> None:
    """Keep a directory to this process until `unlock`, or until the process ends. It may have it already.

    Raises ValueError, which names the process that has it, if that is another one.
    """
    path = directory.resolve() / LOCK_FILE
    if path in HELD:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of the two depends on the system
        holder = os.read(descriptor, 200).decode()
        os.close(descriptor)
        raise ValueError(f"{what}: {holder or 'another process'} is writing there now; {fix}") from None
    except OSError as error:  # a file system that has no locks
        os.close(descriptor)
        print(f"{directory} cannot be locked ({error}): let no other process write there", file=sys.stderr)
        return
    if not os.path.lexists(path) or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
        os.close(descriptor)  # whoever had it has removed this file meanwhile, another may lock the next one
        return lock(directory, what, fix)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    HELD[path] = descriptor


def unlock(directory: Path) -> None:
    """Let other processes have the directory, if this one has it."""
    path = directory.resolve() / LOCK_FILE
    if path in HELD:
        path.unlink(missing_ok=True)
        os.close(HELD.pop(path))
