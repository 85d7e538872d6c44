#!/bin/sh
# Swap on stripes over the memory of several hosts, in a guest that has a disk of each (docs/network-vm.md).
# It has the sum of their sizes. When one host is lost, all is lost: what is swapped out cannot be read.
#
#   stripe.sh md DISK...     by md RAID 0
#   stripe.sh lvm DISK...    by LVM, which can also be made larger later (vgextend, lvextend)
#   stripe.sh end            swap off, and end the stripes
#
# A stripe of 64 KiB: a page is on one host, and what Linux writes at once is mostly on one, too.
set -eu
md=${MD:-/dev/md0} volume=/dev/zramd/swap
case ${1-} in
md)
    shift
    mdadm --create "$md" --run --level=0 --raid-devices=$# --chunk=64 "$@"
    device=$md
    ;;
lvm)
    shift
    pvcreate --quiet "$@"
    vgcreate --quiet zramd "$@"
    lvcreate --quiet --stripes $# --stripesize 64k --extents 100%FREE --name swap zramd
    device=$volume
    ;;
end)
    if [ -e "$volume" ]; then
        swapoff "$volume"
        vgremove --quiet --force zramd
    else
        swapoff "$md"
        mdadm --stop "$md"
    fi
    exit
    ;;
*)
    sed -n 's/^#   //p' "$0" >&2
    exit 2
    ;;
esac
mkswap "$device" >/dev/null
swapon --discard --priority 100 "$device"
