"""The folder that a command fills: made, known to be writable, and held against a second command."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipermoe.specs.errors import UserError

_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)  # some network file systems


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it for the block. Raises `UserError` if it cannot be written or is held already.

    The lock ends with the last process that inherited it, however that ends; nothing is left in the folder.
    """
    handle = _open(folder)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another pipermoe is writing there; wait, or choose another --output") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
        yield
    finally:
        os.close(handle)


def _open(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        os.close(handle)
        raise UserError(f"{folder}: cannot be written to; choose another --output")
    return handle
