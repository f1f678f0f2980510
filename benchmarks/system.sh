#!/bin/sh
# Brings the tools that are measured beside us, where that is allowed (root on Debian or Ubuntu); never fails.
# Who is missing does not take part, and the report says so.
wanted=""
for tool in wrk nginx restic rsync sqlite3; do
    PATH="$PATH:/usr/sbin" command -v "$tool" >/dev/null 2>&1 || wanted="$wanted $tool"
done
[ -n "$wanted" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing$wanted …"
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # nginx is not to be started by its package
    apt-get update -qq >/dev/null 2>&1
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $wanted >/dev/null 2>&1 || echo "could not install$wanted"
fi
exit 0
