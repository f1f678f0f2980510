"""Locks of files and directories, which end with the process that has them."""

import fcntl


def try_lock(fd: int) -> bool:
    """Lock an open file or directory without a wait; False if another one has it. True on a disk without locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
