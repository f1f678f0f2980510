"""What a command costs in time, processor and memory: `python clock.py COMMAND…` prints it as JSON, and nothing else.

A process of its own, and a small one: Linux counts the memory of whoever starts a command as the command's own until it
runs, so nothing can be measured below what this one takes (about 7 MB).
"""

import json
import os
import sys
import time

started = time.monotonic()
child = os.fork()
if child == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execvp(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
seconds = time.monotonic() - started
memory = usage.ru_maxrss * 1024 / 1e6
print(json.dumps({"seconds": seconds, "s of CPU": usage.ru_utime + usage.ru_stime, "MB at most": memory}))
sys.exit(os.waitstatus_to_exitcode(status) != 0)
