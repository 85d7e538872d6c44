#!/bin/sh
# The guest's first program, in the initramfs: loads the modules, mounts the root image, and goes on there.
# Every command is an applet of the busybox that runs it, which it finds through /proc. If one fails, the kernel
# panics, and so qemu ends.
set -e
/bin/busybox mount -t proc proc /proc
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module"
done </modules/order
# The disk may appear a moment after its driver.
until [ -b /dev/vda ]; do usleep 10000; done
mount -o ro /dev/vda /mnt
mount -o move /dev /mnt/dev
umount /proc
exec /bin/busybox switch_root /mnt /sbin/init
