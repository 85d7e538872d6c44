#!/bin/sh
# Swap on stripes over the memory of several hosts, in a guest that has a disk of each (docs/network.md).
# It has the sum of their sizes. When one host is lost, all is lost: what is swapped out cannot be read.
#
#   stripe.sh md DISK...     by md RAID 0, of empty disks
#   stripe.sh lvm DISK...    by LVM, which can also be made larger later (vgextend, lvextend)
#   stripe.sh end            swap off, end the stripes, and give the hosts their memory back
#
# A stripe of 64 KiB: a page is on one host, and what Linux writes at once is mostly on one, too.
# MD=/dev/md7 is the name of md's, if not /dev/md0; LVM's is always /dev/zramd/swap.
set -eu
md=${MD:-/dev/md0} volume=/dev/zramd/swap
fail() {
    echo "stripe.sh: $*" >&2
    exit 1
}
# free DISK: nothing may be on it, else it is not the disk that was meant.
free() {
    [ -b "$1" ] || fail "'$1' is no disk: 'lsblk' lists those that are there"
    kind=$(blkid -p -o value -s TYPE -s PTTYPE "$1") || [ $? = 2 ] || kind=unclear
    [ -z "$kind" ] ||
        fail "'$1' is not empty: if it is the disk that you mean, run 'wipefs --all $1' first"
}
case "${1-} $#" in
"-h 1" | "--help 1") sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
"end 1") program=true ;;
"md "[2-9] | "md "[1-9]?) program=mdadm ;;
"lvm "[2-9] | "lvm "[1-9]?) program=lvcreate ;;
*) fail "use md DISK..., lvm DISK... or end; --help says what they do" ;;
esac
[ "$(id -u)" = 0 ] || fail "only root can do that"
command -v "$program" >/dev/null || fail "$program is missing: install mdadm or lvm2"
way=$1
shift
for disk; do free "$disk"; done
case $way in
md)
    mdadm --create "$md" --run --level=0 --raid-devices=$# --chunk=64 "$@"
    device=$md
    ;;
lvm)
    pvcreate --quiet "$@"
    vgcreate --quiet zramd "$@"
    lvcreate --quiet --stripes $# --stripesize 64k --extents 100%FREE --name swap zramd
    device=$volume
    ;;
end)
    if [ -e "$volume" ]; then
        disks=$(pvs --noheadings --options pv_name --select vg_name=zramd)
        swapoff "$volume"
        vgremove --quiet --force zramd
    else
        [ -b "$md" ] || fail "there is neither '$volume' nor '$md': name it by MD="
        disks=$(mdadm --detail "$md" | sed -n 's,.* /dev/,/dev/,p')
        swapoff "$md"
        mdadm --stop "$md"
    fi
    for disk in $disks; do blkdiscard --force "$disk"; done
    exit
    ;;
esac
mkswap "$device" >/dev/null
swapon --discard --priority 100 "$device"
