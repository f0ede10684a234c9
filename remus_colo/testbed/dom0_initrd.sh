#!/bin/busybox sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Init of dom0's initrd: find the disk, go on from there.
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules.order); do
	/bin/busybox insmod "/modules/$module" || echo "testbed: cannot load $module"
done
tries=0
while ! [ -b /dev/vda ]; do
	tries=$((tries + 1))
	if [ $tries -gt 300 ]; then echo "testbed: no disk"; exec /bin/busybox sh; fi
	/bin/busybox usleep 20000
done
/bin/busybox mount -t ext4 -o noatime /dev/vda /root
/bin/busybox mount -o move /dev /root/dev
exec /bin/busybox switch_root /root /usr/local/sbin/testbed-init
