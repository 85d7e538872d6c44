# shellcheck shell=bash
# What the scripts share: packages, the virtual environment, the builds. Source it, after `set -euo pipefail`.

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
venv=$root/.venv

# Settings that would lead Python, or the Python in nbdkit, to another installation.
unset PYTHONHOME PYTHONPATH PYTHONEXECUTABLE PYTHONSTARTUP PYTHONUSERBASE __PYVENV_LAUNCHER__ VIRTUAL_ENV
export PYTHONNOUSERSITE=1
# Without this `python -m` imports the present folder first: in a checkout, the source without its core.
export PYTHONSAFEPATH=1

say() { printf '%s\n' "zramd: $*" >&2; }

die() {
    say "$@"
    exit 1
}

# run_quietly WHAT COMMAND...: says WHAT, then runs the command and shows its output only if it fails.
run_quietly() {
    local what=$1 output
    shift
    say "$what"
    output=$(mktemp)
    if ! "$@" </dev/null >"$output" 2>&1; then
        cat "$output" >&2
        rm -f "$output"
        die "failed: $what"
    fi
    rm -f "$output"
}

# ---- Debian packages -------------------------------------------------------------------------------------

serve_packages=(
    nbdkit               # the NBD server
    nbdkit-plugin-python # runs nbdkit_plugin.py
    libnbd-bin           # nbdinfo and nbdcopy, to look at a device and to copy it
    python3-venv         # the virtual environment and its pip
    python3-dev          # Python.h
    gcc                  # compiles the core; brings the sanitizers too
    libc6-dev            # the C library's headers
    liblz4-dev           # the compressor
    libzstd-dev          # the compressor of cold blocks
    pkg-config           # finds it
)
test_packages=(
    python3-libnbd # the tests' NBD client
    fio            # writes, verifies and measures over NBD
    qemu-utils     # qemu-io and qemu-img: a second, independent client
    e2fsprogs      # a real file system to put on a device
    file           # says what an archive made here is
    curl           # reads the control socket as a user would
    gnutls-bin     # makes certificates for TLS
    strace         # counts a server's system calls
    tmux           # a terminal for zramd top
    zsh            # and fish: shells to complete commands in
    fish
    systemtap-sdt-dev # <sys/sdt.h>: with it the release build has probes; a build needs none
)
vm_packages=(
    qemu-system-x86 # runs the virtual machine
    busybox-static  # the guest's shell
    nbd-client      # attaches the kernel's NBD device
    dmsetup         # makes disks of the guest fail, or slow
    iproute2        # makes the guest's network slow
    wireguard-tools # encrypts it
    mdadm           # mirrors the guest's disks
    lvm2            # stripes them
    e2fsprogs       # makes the guests' root images
    mmdebstrap      # makes a Debian out of packages
    libvirt-clients # virsh, and the check of descriptions
    libxml2-utils   # that check's own tool
    libvirt-daemon-driver-qemu # makes qemu's command line of a description
)
arm64_packages=(
    qemu-system-arm       # runs the virtual machine
    qemu-user-static      # runs what a package of arm64 does when it is installed
    gcc-aarch64-linux-gnu # compiles for arm64
)
check_packages=(
    shellcheck        # lints the scripts
    systemtap-sdt-dev # for the release build, which is then the tests' too
)
package_packages=(
    dpkg-dev # finds the libraries that a Debian package depends on
)

fresh_packages=(
    mmdebstrap             # makes a bare Debian
    debian-archive-keyring # and checks its signatures, on a machine of another make too
)

# need_packages serve|test|vm|arm64|check|package|fresh: installs what is missing (root), or says how to (anyone else).
need_packages() {
    local wanted=("${serve_packages[@]}") missing=() package
    case $1 in
    serve) ;;
    test) wanted+=("${test_packages[@]}") ;;
    vm) wanted+=("${test_packages[@]}" "${vm_packages[@]}") ;;
    arm64) wanted+=("${test_packages[@]}" "${vm_packages[@]}" "${arm64_packages[@]}") ;;
    check) wanted+=("${check_packages[@]}") ;;
    package) wanted+=("${package_packages[@]}") ;;
    fresh) wanted=("${fresh_packages[@]}") ;;
    esac
    command -v dpkg-query >/dev/null ||
        die "dpkg-query is not there: the scripts need Debian or a relative of it"
    local installed
    installed=" $(dpkg-query -W -f='${db:Status-Status}:${Package} ' "${wanted[@]}" 2>/dev/null || true)"
    for package in "${wanted[@]}"; do
        [[ $installed == *" installed:$package "* ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0

    if ((EUID != 0)); then
        printf '%s\n' "sudo apt-get install --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    run_quietly "installing ${missing[*]}" install_packages "${missing[@]}"
}

# Without recommended packages: those of nbdkit's Python plugin are large and of no use here.
install_packages() {
    local install=(apt-get install --yes --no-install-recommends -o DPkg::Lock::Timeout=600 "$@")
    export DEBIAN_FRONTEND=noninteractive
    # The package lists are missing on a fresh image and go stale on an old one: the install tells.
    "${install[@]}" || { apt-get update && "${install[@]}"; }
}

# ---- The virtual environment -----------------------------------------------------------------------------

# The Python that nbdkit embeds, as "3.11". It decides, not the python3 that is first in PATH.
embedded_python() {
    local version
    version=$(nbdkit python --dump-plugin 2>/dev/null | sed -n 's/^python_version=\([0-9]*\.[0-9]*\).*/\1/p') || true
    [[ $version ]] || die "'nbdkit python --dump-plugin' does not tell its Python version: reinstall nbdkit-plugin-python"
    printf '%s' "$version"
}

# A hash of all that a build is made from.
source_hash() {
    (
        cd "$root" &&
            find zramd systemd docs/zramd.conf -type f -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z |
                xargs -0 sha256sum -- nbdkit_plugin.py pyproject.toml README.md LICENSE docs/LICENSE.zstd docs/zramd.1 scripts/lib/backend/zramd_build.py 2>&1
    ) | sha256sum | cut -c1-32
}

# requirements WHICH: one per line, from pyproject.toml: "build", or the name of an extra.
requirements() {
    "$venv/bin/python" - "$root/pyproject.toml" "$1" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    table = tomllib.load(file)
extras = table["project"]["optional-dependencies"]
print("\n".join(table["build-system"]["requires"] if sys.argv[2] == "build" else extras[sys.argv[2]]))
PYTHON
}

stamp_is() { [[ -f $1 && $(<"$1") == "$2" ]]; }

# pip_install WHAT STAMP VALUE ARGUMENTS...: does nothing if the stamp has that value already.
pip_install() {
    local what=$1 stamp=$2 value=$3
    shift 3
    run_quietly "$what" "$venv/bin/python" -m pip --disable-pip-version-check install "$@"
    printf '%s' "$value" >"$stamp"
}

install_requirements() {
    local which=$1 stamp=$venv/stamp.$1 value words
    value=$(sha256sum <"$root/pyproject.toml")
    if stamp_is "$stamp" "$value"; then return; fi
    must_be_writable
    mapfile -t words < <(requirements "$which")
    pip_install "installing what $which needs: ${words[*]}" "$stamp" "$value" "${words[@]}"
}

must_be_writable() {
    local folder
    for folder in "$root" "$venv" "$root/build"; do
        [[ ! -e $folder || -w $folder ]] ||
            die "$root is not set up for its present source and $(id -un) cannot write there: run $0 as its owner"
    done
}

# The lock is on the folder itself, so that it needs no file of its own and no right to write.
locked() {
    local fd
    exec {fd}<"$root"
    flock "$fd"
    "$@" {fd}<&-
    exec {fd}<&-
}

# ensure_venv WHAT...: .venv has what each of WHAT names: "build" (compiler side), "test", "dev" (extras of
# pyproject.toml), "zramd" (the release, installed).
ensure_venv() { locked _ensure_venv "$@"; }

_ensure_venv() {
    local version what
    version=$(embedded_python)
    if [[ ! -x $venv/bin/python$version || ! -e $venv/stamp.venv ]]; then
        must_be_writable
        rm -rf "$venv"
        run_quietly "creating .venv with Python $version, which nbdkit embeds" "/usr/bin/python$version" -m venv "$venv"
        touch "$venv/stamp.venv"
    fi
    for what in "$@"; do
        case $what in
        zramd) _install_zramd ;;
        *) install_requirements "$what" ;;
        esac
    done
    if [[ " $* " == *" test "* ]]; then _link_libnbd "$version"; fi
}

_install_zramd() {
    local stamp=$venv/stamp.zramd value
    value=$(source_hash)
    if stamp_is "$stamp" "$value"; then return; fi
    must_be_writable
    install_requirements build
    ZRAMD_BUILD=release pip_install "building the release and installing it into .venv" "$stamp" "$value" \
        --no-deps --no-build-isolation --force-reinstall "$root"
}

# libnbd's Python module is in Debian only. Linking just it keeps the rest of Debian's Python out of .venv.
_link_libnbd() {
    local file target=$venv/lib/python$1/site-packages
    for file in /usr/lib/python3/dist-packages/{nbd.py,libnbdmod*.so}; do
        [[ -e $target/${file##*/} ]] || ln -s "$file" "$target/"
    done
}

# ---- Builds ----------------------------------------------------------------------------------------------

# build_profile NAME: build/NAME holds the complete package of the profile, built from the present source.
build_profile() {
    ensure_venv build
    locked _build_profile "$1"
}

_build_profile() {
    local profile=$1 stamp=$root/build/tmp/$1.stamp value
    value=$(source_hash)
    if stamp_is "$stamp" "$value"; then return; fi
    must_be_writable
    run_quietly "building build/$profile" run_build "$profile" "$root"
    printf '%s' "$value" >"$stamp"
}

# run_build PROFILE FOLDER: builds the source in FOLDER.
run_build() (
    cd "$2" && mkdir -p build/tmp &&
        PYTHONPATH=scripts/lib/backend ZRAMD_BUILD=$1 "$venv/bin/python" -c 'from setuptools import setup; setup()' build
)
