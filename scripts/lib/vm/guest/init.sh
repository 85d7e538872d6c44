#!/bin/sh
# Process 1 on the root image. The console is the kernel's, ttyS1 has a shell that does what the host says, ttyS2 has
# the heartbeat, ttyS3 is for the workload. Names without a path are busybox's applets.
export PATH=/usr/bin:/usr/sbin:/bin:/sbin
export PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1 PYTHONPATH=/zramd LC_ALL=C.UTF-8
/bin/busybox mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs tmp /tmp
ip link set lo up
for tty in 1 2 3; do
    # Lines, but nothing echoed and nothing translated.
    stty -F /dev/ttyS$tty -echo -onlcr -isig -ixon -crtscts icanon
done
echo -999 >/proc/self/oom_score_adj
/bin/guest_tool monitor /run/zramd/zram0 </dev/null >/dev/ttyS2 2>/dev/console &
while IFS= read -r line; do
    sh -c "$line"
done </dev/ttyS1 >/dev/ttyS1 2>&1
echo "the agent has ended" >/dev/console
