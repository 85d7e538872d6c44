#!/bin/bash
# check.sh: tries the packages in the tar archive on standard input, on the bare Debian that scripts/fresh has made.
# Each step prints what it found; the first one that is not as it should be ends it with status 1.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
place=$(mktemp -d)
tar -x -C "$place"
exec </dev/null
chmod 755 "$place"
cd "$place"
deb=$(echo "$place"/zramd_*.deb)
guest=$(echo "$place"/zramd-guest_*.deb)
wheel=$(echo "$place"/*.whl)
version=$(dpkg-deb --field "$deb" Version)
export DEBIAN_FRONTEND=noninteractive

step() { printf -- '-- %3d s  %s\n' "$SECONDS" "$*"; }
fail() {
    printf 'zramd: failed: %s\n' "$*" >&2
    exit 1
}
is() { [[ $2 == "$3" ]] || fail "$1 is '$2', not '$3'"; }
has() { [[ $2 == *"$3"* ]] || fail "$1 does not say '$3' but: $2"; }

install() { apt-get install --quiet=2 --yes --no-install-recommends "$@" >apt.log 2>&1 || { cat apt.log >&2 && fail "installing $*"; }; }

# All files but those that apt, dpkg and logging change themselves.
files() {
    find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /tmp -o -path /root -o -path "$place" \
        -o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/cache -o -path /var/log -o -path /run/mount \) -prune -o -print | LC_ALL=C sort
}

# The package as an older version.
older() {
    dpkg-deb --raw-extract "$deb" older
    sed -i "s/^Version: .*/Version: 0.0.1/" older/DEBIAN/control
    sed -i "s/^__version__ = .*/__version__ = \"0.0.1\"/" older/usr/lib/python3/dist-packages/zramd/__init__.py
    dpkg-deb --root-owner-group --build older older.deb >/dev/null
    rm -r older
}

# pid_of NAME, version_of NAME: of a device's server.
pid_of() { zramd list --raw --noheadings --output PID "$1"; }
version_of() { zramd dump "$1" | sed -n 's/^ *"version": "\(.*\)",*$/\1/p' | head -n 1; }
# client NAME SECONDS: begins one, whose report is NAME.report.
client() { python3 -I "$here/client.py" "/run/zramd/$1/nbd.sock" "$2" "$1.report" "$1.stop" & }
finish() {
    touch "$1.stop"
    wait "$2" || fail "the client of $1 found an error"
    rm "$1.stop"
    read -r written connections longest <"$1.report"
    printf '   %s: %s blocks written and verified, %s connections, longest request %s ms\n' "$1" "$written" "$connections" "$longest"
}

apt-get update --quiet=2
step "install by apt, with all that it depends on"
install "$deb"
is "its version" "$(zramd --version)" "zramd $version"
is "doctor's problems" "$(zramd doctor | grep -A1 '^problem' || true)" ""
zramd config check /usr/lib/zramd.conf >/dev/null
bash -n /usr/share/bash-completion/completions/zramd
dpkg --purge zramd >/dev/null
before=$(files)

step "install the older version, on $(. /etc/os-release && echo "$PRETTY_NAME"), nbdkit $(nbdkit --version | cut -d' ' -f2), $(python3 --version)"
older
said=$(dpkg -i older.deb 2>&1 >/dev/null) || fail "installing it: $said"
is "what its scripts say" "$said" ""
is "its version" "$(zramd --version)" "zramd 0.0.1"

step "nobody else's modules are taken"
mkdir -p evil/zramd "$(python3 -m site --user-site)/zramd"
echo 'raise SystemExit("evil")' | tee evil/zramd/__init__.py "$(python3 -m site --user-site)/zramd/__init__.py" >/dev/null
is "its version beside others" "$(cd evil && PYTHONPATH=$PWD zramd --version)" "zramd 0.0.1"
has "nbdkit" "$(cd evil && PYTHONPATH=$PWD nbdkit python /usr/lib/python3/dist-packages/nbdkit_plugin.py --dump-plugin)" zramd_version=0.0.1

step "upgrade to $version while two devices are written to and read"
zramd start kept --size 256M state=/dev/shm/kept.state >/dev/null
zramd start plain --size 64M >/dev/null
kept=$(pid_of kept)
plain=$(pid_of plain)
client kept 120
kept_client=$!
client plain 120
plain_client=$!
sleep 3
has "the upgrade" "$(dpkg -i "$deb" 2>&1)" "kept          restarted, away for "
sleep 2
[[ $(pid_of kept) != "$kept" ]] || fail "the server with a state was not replaced"
is "the server without a state" "$(pid_of plain)" "$plain"
is "the version of the server with a state" "$(version_of kept)" "$version"
is "the version of the server without one" "$(version_of plain)" 0.0.1
finish kept "$kept_client"
((connections == 2)) || fail "its client was not served by both servers: $connections connections"
zramd check kept >/dev/null

step "removal is refused while a client is connected"
! said=$(dpkg --remove zramd 2>&1) || fail "it was removed"
has "the refusal" "$said" "zramd is not removed: plain has clients: disconnect them first"
is "the server" "$(pid_of plain)" "$plain"
finish plain "$plain_client"
((connections == 1)) || fail "its client had to connect again: $connections connections"

step "removal is refused while another user serves a device"
mkdir -p /run/user/1234
chown 1234:1234 /run/user/1234
as_user() { setpriv --reuid 1234 --regid 1234 --clear-groups env HOME=/ XDG_RUNTIME_DIR=/run/user/1234 "$@"; }
as_user zramd start theirs --size 64M >/dev/null
! said=$(dpkg --remove zramd 2>&1) || fail "it was removed"
has "the refusal" "$said" "zramd is not removed: user 1234 serves a device: have it stopped first"
as_user zramd stop theirs
rm -r /run/user

step "removal is refused while this machine swaps to a device, or has it attached"
mount -t tmpfs tmpfs /sys
mkdir -p /sys/block/nbd3
echo zramd/zram0 >/sys/block/nbd3/backend
! said=$(dpkg --remove zramd 2>&1) || fail "it was removed"
has "the refusal" "$said" "zramd is not removed: /dev/nbd3 is attached: run 'zramd detach zram0' first"
printf 'Filename\tType\tSize\tUsed\tPriority\n/dev/nbd3 partition\t1000\t0\t100\n' >swaps
mount --bind swaps /proc/swaps
! said=$(dpkg --remove zramd 2>&1) || fail "it was removed"
has "the refusal" "$said" "zramd is not removed: this machine swaps to /dev/nbd3: run 'systemctl disable --now zramd@zram0'"
umount /proc/swaps /sys
is "its version" "$(zramd --version)" "zramd $version"

step "remove, and purge: nothing is left"
mkdir -p /etc/systemd/system/swap.target.wants
ln -s /usr/lib/systemd/system/zramd@.service /etc/systemd/system/swap.target.wants/zramd@zram0.service
said=$(dpkg --remove zramd 2>&1 >/dev/null) || fail "removing it: $said"
is "what its scripts say" "$said" ""
[[ ! -d /proc/$plain ]] || fail "a server is still there"
said=$(dpkg --purge zramd 2>&1 >/dev/null) || fail "purging it: $said"
is "what its scripts say" "$said" ""
rmdir /etc/systemd/system/swap.target.wants
rm /dev/shm/kept.state
left=$(diff <(printf '%s\n' "$before") <(files)) || fail "it has left: $left"

step "the package for guests: install, upgrade, remove, purge, where no disk of a zramd is"
said=$(dpkg -i "$guest" 2>&1 >/dev/null) || fail "installing it: $said"
is "what its scripts say" "$said" ""
[[ -L /etc/systemd/system/swap.target.wants/zramd-guest.service ]] || fail "it is not enabled"
for verb in setup refresh off; do
    zramd-guest "$verb" --if-any || fail "zramd-guest $verb --if-any is wrong where there is no disk"
    ! said=$(zramd-guest "$verb" 2>&1) || fail "zramd-guest $verb is right where there is no disk"
    has "zramd-guest $verb" "$said" "zramd-guest: no disk of a zramd is here"
done
rm /etc/systemd/system/swap.target.wants/zramd-guest.service
said=$(dpkg -i "$guest" 2>&1 >/dev/null) || fail "upgrading it: $said"
is "what its scripts say" "$said" ""
[[ ! -L /etc/systemd/system/swap.target.wants/zramd-guest.service ]] || fail "the upgrade has enabled what was disabled"
said=$(dpkg --remove zramd-guest 2>&1 >/dev/null) || fail "removing it: $said"
is "what its scripts say" "$said" ""
said=$(dpkg --purge zramd-guest 2>&1 >/dev/null) || fail "purging it: $said"
is "what its scripts say" "$said" ""
left=$(diff <(printf '%s\n' "$before") <(files)) || fail "it has left: $left"

step "removal is refused where memory cannot hold what is swapped out"
dpkg -i "$guest" >/dev/null
mount -t tmpfs tmpfs /sys
mkdir -p /sys/block/vdz
printf 'zramd-swap0' >/sys/block/vdz/serial
printf 'Filename\tType\tSize\tUsed\tPriority\n/dev/vdz partition\t%d\t%d\t100\n' $((1 << 40)) $((1 << 40)) >swaps
mount --bind swaps /proc/swaps
! said=$(dpkg --remove zramd-guest 2>&1) || fail "it was removed"
has "the refusal" "$said" "zramd-guest: $((1 << 30)) MiB are swapped out to /dev/vdz and only "
umount /proc/swaps /sys
zramd-guest off --if-any
dpkg --purge zramd-guest >/dev/null
left=$(diff <(printf '%s\n' "$before") <(files)) || fail "it has left: $left"

step "lintian"
install lintian
lintian --version
lintian --allow-root --fail-on error,warning --tag-display-limit 0 "$deb" "$guest"

step "the wheel, without a compiler"
install python3-venv
! command -v cc gcc >/dev/null || fail "there is a compiler"
python3 -m venv venv
venv/bin/pip --disable-pip-version-check --quiet install --no-index "$wheel"
is "its version" "$(venv/bin/zramd --version)" "zramd $version"
is "doctor's problems" "$(venv/bin/zramd doctor | grep -A1 '^problem' || true)" ""
venv/bin/zramd serve name=wheel disksize=64M >serve.log 2>&1 &
server=$!
until [[ -S /run/zramd/wheel/nbd.sock ]]; do
    [[ -d /proc/$server ]] || { cat serve.log >&2 && fail "it does not serve"; }
    sleep 0.1
done
grep -q "$place/venv/.*zramd.libs/liblz4" "/proc/$server/maps" || fail "the server has another lz4 than the wheel's"
client wheel 3
wait $! || fail "its client found an error"
read -r written connections longest <wheel.report
printf '   wheel: %s blocks written and verified\n' "$written"
kill "$server"
wait "$server" || fail "the server ended with status $?"
step "all is as it should be"
