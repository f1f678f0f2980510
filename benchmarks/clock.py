"""Measure a command: `python clock.py COMMAND…` prints its time, CPU time and peak memory as JSON, and nothing else.

It is a small process of its own. Between fork and exec, Linux counts the memory of the parent as that of the command,
so no result is below the memory of this process (about 7 MB).
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
