#!/bin/sh
# Swap on a mirror over the memory of two hosts, in a guest that has a disk of each (docs/network-vm.md).
#
#   mirror.sh make DISK1 DISK2    make the mirror of two disks that are empty, and swap to it
#   mirror.sh back DISK           take a disk back whose host is there again: what it lacks is copied to it
#   mirror.sh look                say how the mirror is; the exit status is 1 while a half is missing
#   mirror.sh end                 swap off, and end the mirror
#
# WRITE_MOSTLY=1 before `make`: pages are read from DISK1 alone, as long as it is there. Use it where DISK2 is
# farther away. Without it md reads from both. MD=/dev/md7 is the mirror's name, if not /dev/md0.
set -eu
md=${MD:-/dev/md0}
case ${1-} in
make)
    # The bitmap notes which parts differ while a half is missing. With it, one that comes back with its
    # memory needs those only. --assume-clean: both are empty, so they are the same already.
    mdadm --create "$md" --run --level=1 --raid-devices=2 --bitmap=internal --assume-clean \
        "$2" ${WRITE_MOSTLY:+--write-mostly} "$3"
    mkswap "$md" >/dev/null
    swapon --discard --priority 100 "$md"
    ;;
back)
    mdadm "$md" --remove failed
    # Of an empty disk nothing is known: all is copied, and what swap does not use is zeros, and costs nothing.
    mdadm "$md" --re-add "$2" || mdadm "$md" --add "$2"
    mdadm --wait "$md" || true # it says so, too, when there was nothing to wait for
    mdadm --detail --test "$md" >/dev/null
    ;;
look)
    cat /proc/mdstat
    mdadm --detail --test "$md" >/dev/null
    ;;
end)
    swapoff "$md"
    mdadm --stop "$md"
    ;;
*)
    sed -n 's/^#   //p' "$0" >&2
    exit 2
    ;;
esac
