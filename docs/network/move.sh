#!/bin/sh
# Swap that can move from the memory of one host to that of another, while it is in use, in a guest that has a
# disk of each (docs/network.md). It is a mirror of one disk, and of two while it moves.
#
#   move.sh make DISK       make it of one empty disk, and swap to it
#   move.sh to DISK         copy all to another empty disk that is as large, then let the old one go
#   move.sh end             swap off, end it, and give the host its memory back
#
# Between the two steps of `to` both have all pages: when either host dies then, nothing is lost.
# MD=/dev/md7 is its name, if not /dev/md0.
set -eu
md=${MD:-/dev/md0}
fail() {
    echo "move.sh: $*" >&2
    exit 1
}
# free DISK: nothing may be on it, else it is not the disk that was meant.
free() {
    [ -b "$1" ] || fail "'$1' is no disk: 'lsblk' lists those that are there"
    kind=$(blkid -p -o value -s TYPE -s PTTYPE "$1") || [ $? = 2 ] || kind=unclear
    [ -z "$kind" ] ||
        fail "'$1' is not empty: if it is the disk that you mean, run 'wipefs --all $1' first"
}
# without DISK: from now on it has no part, and the mirror lacks none.
without() {
    mdadm "$md" --fail "$1"
    mdadm "$md" --remove "$1"
    mdadm --grow "$md" --raid-devices=1 --force
}
case "${1-} $#" in
"-h 1" | "--help 1") sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
"make 2" | "to 2" | "end 1") ;;
*) fail "use make DISK, to DISK or end; --help says what they do" ;;
esac
[ "$(id -u)" = 0 ] || fail "only root can do that"
command -v mdadm >/dev/null || fail "mdadm is missing: install the package of that name"
[ "$1" = make ] || [ -b "$md" ] || fail "there is no '$md': 'make' it, or name it by MD="
[ "$1" = end ] || free "$2"
old=$(mdadm --detail "$md" 2>/dev/null | sed -n 's,.*active sync.* /dev/,/dev/,p')
case $1 in
make)
    mdadm --create "$md" --run --force --level=1 --raid-devices=1 --bitmap=none "$2"
    mkswap "$md" >/dev/null
    swapon --discard --priority 100 "$md"
    ;;
to)
    mdadm --grow "$md" --raid-devices=2 --add "$2"
    mdadm --wait "$md" || true # it says so, too, when there was nothing to wait for
    # It fails unless all has been copied.
    mdadm --detail --test "$md" >/dev/null || {
        ! mdadm --detail "$md" | grep -q "active sync.* $old\$" || without "$2"
        fail "'$2' does not have all: swap stays on '$old'"
    }
    without "$old"
    blkdiscard --force "$old" # it was in use just now; its host has the memory back at once
    ;;
end)
    swapoff "$md"
    mdadm --stop "$md"
    blkdiscard --force "$old"
    ;;
esac
