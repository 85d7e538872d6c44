#!/bin/sh
# Swap that can move from the memory of one host to that of another, while it is in use, in a guest that has a
# disk of each (docs/network-vm.md). It is a mirror that has one half, but while it moves.
#
#   move.sh make DISK       make it of one disk that is empty, and swap to it
#   move.sh to DISK         copy all to another disk that is as large, then let the old one go
#   move.sh end             swap off, and end it
#
# Between the two steps of `to` both have all pages: when either host dies then, nothing is lost.
set -eu
md=${MD:-/dev/md0}
case ${1-} in
make)
    mdadm --create "$md" --run --level=1 --raid-devices=2 --bitmap=none --assume-clean "$2" missing
    mkswap "$md" >/dev/null
    swapon --discard --priority 100 "$md"
    ;;
to)
    old=$(mdadm --detail "$md" | sed -n 's,.*active sync.* /dev/,/dev/,p')
    mdadm "$md" --add "$2"
    mdadm --wait "$md" || true # it says so, too, when there was nothing to wait for
    mdadm --detail --test "$md" >/dev/null # it fails unless all has been copied
    mdadm "$md" --fail "$old"
    mdadm "$md" --remove "$old"
    blkdiscard --force "$old" # it was in use just now; its host has the memory back at once
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
