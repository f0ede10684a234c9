#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Init of a test bed's dom0: mounts, modules, network, Xen's daemons, sshd; then reaps children.
# The kernel command line gives testbed.host (primary or backup), testbed.n (1 or 2) and
# testbed.key (the public key that may log in).
XEN_BIN=$(echo /usr/lib/xen-4.*/bin)
export PATH=$XEN_BIN:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t debugfs debugfs /sys/kernel/debug
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/lock /run/xen /run/xenstored /run/sshd /var/log/xen/console /domu

read -r words < /proc/cmdline
for word in $words; do
	case $word in
	testbed.host=*) host=${word#*=} ;;
	testbed.n=*) n=${word#*=} ;;
	testbed.key=*) key=${word#*=} ;;
	testbed.probe=*) probe=${word#*=} ;;
	esac
done
stage() { read -r up _ < /proc/uptime; echo "testbed: $1 at $up s" > /dev/hvc0; }
stage init

echo "$host" > /etc/hostname
echo "$host" > /proc/sys/kernel/hostname
cat > /etc/hosts <<EOF
127.0.0.1 localhost
10.78.0.1 primary
10.78.0.2 backup
EOF
mkdir -p -m 700 /root/.ssh
echo "ssh-ed25519 $key" > /root/.ssh/authorized_keys

# IPv6 stays available, but nothing speaks it by itself on the test networks.
echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6
echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6

modprobe -a $(< /etc/testbed-modules)
stage modules
mount -t xenfs xenfs /proc/xen
if [ -b /dev/vdb ]; then mount -o noatime /dev/vdb /domu; fi

# Interfaces are told apart by the last octet of their address: 1 management, 2 LAN, 3 replication.
for path in /sys/class/net/eth*; do
	read -r mac < "$path/address"
	case $mac in
	*:01) ip link set "${path##*/}" name eth-mgmt ;;
	*:02) ip link set "${path##*/}" name eth-lan ;;
	*:03) ip link set "${path##*/}" name eth-repl ;;
	esac
done
[ -z "$probe" ] && ip -batch - <<EOF
link set lo up
addr add 10.79.0.$n/24 dev eth-mgmt
link set eth-mgmt up
link set eth-repl mtu 9000
addr add 10.78.0.$n/24 dev eth-repl
link set eth-repl up
link add xenbr0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0
link set xenbr0 address $(cat /sys/class/net/eth-lan/address)
link set eth-lan master xenbr0
link set eth-lan up
addr add 10.77.0.$((n + 1))/24 dev xenbr0
link set xenbr0 up
EOF
stage network
[ -z "$probe" ] && /usr/sbin/sshd

xenstored --pid-file /run/xenstored.pid
xen-init-dom0
xenconsoled --pid-file=/run/xenconsoled.pid --log=guest --timestamp=none
stage ready

if [ -n "$probe" ]; then
	ip link add xenbr0 up type bridge
	if xl create -q /domu/web.cfg > /dev/hvc0 2>&1; then
		until grep -qs 'GUEST READY' /var/log/xen/console/guest-*.log; do sleep 0.5; done
		stage "guest ran"
	fi
fi

# bash reaps orphans while it waits.
while true; do sleep 1000000 & wait $!; done
