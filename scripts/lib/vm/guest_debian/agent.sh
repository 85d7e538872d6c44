#!/bin/sh
# Does what the host says over ttyS1, line by line, as the small guest's process 1 does (../guest/init.sh).
exec </dev/ttyS1 >/dev/ttyS1 2>&1
for tty in 1 2 3; do
    # Lines, but nothing echoed and nothing translated.
    stty -F /dev/ttyS$tty -echo -onlcr -isig -ixon -crtscts icanon
done
# The first heartbeat tells the host that we listen.
/bin/guest_tool monitor /run/zramd/zram0 </dev/null >/dev/ttyS2 &
while IFS= read -r line; do
    sh -c "$line"
done
