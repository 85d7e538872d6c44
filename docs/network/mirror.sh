#!/bin/sh
# Swap on a mirror over the memory of two hosts, in a guest that has a disk of each (docs/network.md).
#
#   mirror.sh make DISK1 DISK2    make the mirror of two empty disks, and swap to it
#   mirror.sh out DISK            use a disk no more: its host was booted, and is to serve again, empty
#   mirror.sh back DISK           take a disk back whose host is there again: what it lacks is copied to it
#   mirror.sh look                say how the mirror is; the exit status is 1 while a half is missing
#   mirror.sh end                 swap off, end the mirror, and give the hosts their memory back
#
# WRITE_MOSTLY=1 before `make`: pages are read from DISK1 alone, as long as it is there. Use it where DISK2 is
# farther away. Without it md reads from both. MD=/dev/md7 is the mirror's name, if not /dev/md0.
set -eu
md=${MD:-/dev/md0}
fail() {
    echo "mirror.sh: $*" >&2
    exit 1
}
# free DISK [KIND]: nothing may be on it, or what is of this kind: else it is not the disk that was meant.
free() {
    [ -b "$1" ] || fail "'$1' is no disk: 'lsblk' lists those that are there"
    kind=$(blkid -p -o value -s TYPE -s PTTYPE "$1") || [ $? = 2 ] || kind=unclear
    [ -z "$kind" ] || [ "$kind" = "${2-}" ] ||
        fail "'$1' is not empty: if it is the disk that you mean, run 'wipefs --all $1' first"
}
case "${1-} $#" in
"-h 1" | "--help 1") sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
"make 3" | "out 2" | "back 2" | "look 1" | "end 1") ;;
*) fail "use make DISK1 DISK2, out DISK, back DISK, look or end; --help says what they do" ;;
esac
[ "$(id -u)" = 0 ] || fail "only root can do that"
command -v mdadm >/dev/null || fail "mdadm is missing: install the package of that name"
[ "$1" = make ] || [ -b "$md" ] || fail "there is no mirror '$md': 'make' one, or name it by MD="
case $1 in
make)
    free "$2"
    free "$3"
    # The bitmap notes what differs while a half is missing. --assume-clean: both are empty, so the same.
    mdadm --create "$md" --run --level=1 --raid-devices=2 --bitmap=internal --assume-clean \
        "$2" ${WRITE_MOSTLY:+--write-mostly} "$3"
    mkswap "$md" >/dev/null
    swapon --discard --priority 100 "$md"
    ;;
out) mdadm "$md" --fail "$2" ;; # no harm if a request has failed there before
back)
    timeout 40 sh -c "until dd if='$2' bs=4k count=1 iflag=direct; do sleep 1; done" >/dev/null 2>&1 ||
        fail "'$2' does not answer: look whether its host serves (qemu tries every 16 s)"
    free "$2" linux_raid_member
    mdadm "$md" --remove failed
    # Of an empty disk nothing is known: all is copied, and what swap does not use is zeros, and costs nothing.
    mdadm "$md" --re-add "$2" || mdadm "$md" --add "$2"
    mdadm --wait "$md" || true # it says so, too, when there was nothing to wait for
    mdadm --detail --test "$md" >/dev/null || fail "'$md' still lacks a half: see 'mirror.sh look'"
    ;;
look)
    cat /proc/mdstat
    mdadm --detail --test "$md" >/dev/null || fail "'$md' lacks a half: 'back' takes it in again"
    ;;
end)
    disks=$(mdadm --detail "$md" | sed -n 's,.* /dev/,/dev/,p')
    swapoff "$md"
    mdadm --stop "$md"
    for disk in $disks; do
        blkdiscard --force "$disk" || echo "mirror.sh: the host of '$disk' is gone" >&2
    done
    ;;
esac
