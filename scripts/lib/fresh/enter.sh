#!/bin/bash
# enter.sh SYSTEM SUITE NAME=VALUE... -- COMMAND...: the first process in the namespaces that scripts/fresh makes.
# Mounts what a system has, then runs the command in the clone and ends with its status.
set -euo pipefail

system=$1
suite=$2
shift 2
environment=()
while [[ $1 != -- ]]; do
    environment+=("$1")
    shift
done
shift

# A root of its own, not a chroot: in one, a process may make no namespaces.
mount --bind "$system" "$system"
cd "$system"
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
mount -t tmpfs -o mode=755,nosuid tmpfs dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5,nosuid,noexec devpts dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs dev/shm
for device in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0" "fuse 10 229"; do
    read -r name major minor <<<"$device"
    mknod -m 666 "dev/$name" c "$major" "$minor"
done
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr

pivot_root . . # the old root now lies over the new one
umount --lazy .
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

hostname "fresh-$suite"
printf '127.0.0.1 fresh-%s\n' "$suite" >>/etc/hosts
update-ca-certificates >/dev/null 2>&1

# No exec: the first process collects those that lose their parents, which the command may not expect.
status=0
env -i USER=root LOGNAME=root SHELL=/bin/bash PATH="$PATH" "${environment[@]}" \
    bash -c 'cd ~/zramd && exec "$@"' bash "$@" || status=$?
exit "$status"
