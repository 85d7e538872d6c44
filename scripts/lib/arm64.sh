# shellcheck shell=bash
# shellcheck disable=SC2154 # root and venv are those of common.sh
# An arm64 Debian, and zramd built for it, of which vm/arm64_image.py makes a guest. Source it after common.sh.
#
# The tests run in a virtual machine, not by qemu-user: with a quarter of the core's tests done that had most of 24 GiB
# of memory, perhaps because a device reserves far more address space than it uses.
#
# build/arm64 has tree/ (Debian's packages), site/ (the tests' wheels), and the builds, such as release/.

arm64=$root/build/arm64
arm64_tree=$arm64/tree
arm64_tree_packages=(
    python3-dev # Python, and the headers that the core is compiled with
    libc6-dev
    liblz4-dev
    libzstd-dev
    gcc    # the tests compile preloads
    nbdkit # and its plugin, nbd-client, strace: what swaps in the guest and looks on
    nbdkit-plugin-python
    nbd-client
    strace
    busybox-static
)

# ensure_arm64 PROFILE...: the tree and the wheels are there, and the profiles are built.
ensure_arm64() {
    local profile
    mkdir -p "$arm64"
    locked _ensure_tree
    locked _ensure_site
    for profile in "$@"; do locked _build_arm64 "$profile"; done
}

# The suite is this machine's: the tree then has the Python whose headers and wheels the build here knows.
_ensure_tree() {
    local stamp=$arm64/stamp.tree suite value
    suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    value="$suite ${arm64_tree_packages[*]}"
    if stamp_is "$stamp" "$value"; then return; fi
    ((EUID == 0)) || die "only root can make an arm64 Debian: run it with sudo once"
    rm -rf --one-file-system "$arm64_tree" "$stamp"
    with_arm64_programs run_quietly "making an arm64 $suite: ${arm64_tree_packages[*]} (five minutes)" \
        mmdebstrap --mode=root --variant=minbase --architectures=arm64 --skip=check/qemu \
        --dpkgopt=path-exclude=/usr/share/{doc,man,locale}/'*' --dpkgopt=force-unsafe-io \
        --customize-hook="rm -rf \"\$1\"/usr/lib/python3/dist-packages/botocore/data \"\$1\"/var/{cache/apt,lib/apt/lists}/*" \
        --include="$(IFS=,; printf '%s' "${arm64_tree_packages[*]}")" "$suite" "$arm64_tree"
    printf '%s' "$value" >"$stamp"
}

_ensure_site() {
    local stamp=$arm64/stamp.site value words
    value=$(sha256sum <"$root/pyproject.toml")
    if stamp_is "$stamp" "$value"; then return; fi
    mapfile -t words < <(requirements test)
    rm -rf "$arm64/site"
    pip_install "fetching for arm64 what the tests need: ${words[*]}" "$stamp" "$value" --target "$arm64/site" \
        --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 --only-binary=:all: "${words[@]}"
}

# Compiled here, by a compiler that makes arm64 code of the tree's headers: a minute instead of ten.
_build_arm64() {
    local profile=$1 stamp=$arm64/stamp.$1 value
    value=$(source_hash)
    if stamp_is "$stamp" "$value"; then return; fi
    run_quietly "building build/arm64/$profile" _run_arm64_build "$profile"
    printf '%s' "$value" >"$stamp"
}

_run_arm64_build() (
    # How the tree's Python was built: the names of its extensions, and the flags that they are compiled with.
    mkdir -p "$arm64/sysconfig"
    cp "$arm64_tree"/usr/lib/python3*/_sysconfigdata__aarch64-linux-gnu.py "$arm64/sysconfig/"
    export CC="aarch64-linux-gnu-gcc --sysroot=$arm64_tree"
    export PKG_CONFIG_LIBDIR=$arm64_tree/usr/lib/aarch64-linux-gnu/pkgconfig
    export _PYTHON_HOST_PLATFORM=linux-aarch64 _PYTHON_SYSCONFIGDATA_NAME=_sysconfigdata__aarch64-linux-gnu
    cd "$root" && mkdir -p "$arm64/tmp" &&
        PYTHONPATH=scripts/lib/backend:$arm64/sysconfig ZRAMD_BUILD=$1 "$venv/bin/python" -c \
            'from setuptools import setup; setup()' build --build-base build/arm64
)

# ---- Programs of arm64 on this machine --------------------------------------------------------------------

binfmt=/proc/sys/fs/binfmt_misc

# with_arm64_programs COMMAND...: runs it while this machine's kernel passes programs of arm64 to qemu-user.
# What had to be registered for that is taken back afterwards.
with_arm64_programs() {
    local registered='' mounted='' status=0
    if [[ ! -e $binfmt/register ]]; then
        mount -t binfmt_misc binfmt_misc "$binfmt" 2>/dev/null ||
            die "this kernel has no binfmt_misc, without which it cannot run programs of arm64"
        mounted=yes
    fi
    if [[ ! -e $binfmt/qemu-aarch64 ]]; then
        # F: the interpreter is opened now, and so is found in any root.
        printf '%s' ':qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00' \
            ':\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff' \
            ':/usr/bin/qemu-aarch64-static:F' >"$binfmt/register"
        registered=yes
    fi
    ("$@") || status=$?
    if [[ $registered ]]; then printf -- -1 >"$binfmt/qemu-aarch64"; fi
    if [[ $mounted ]]; then umount "$binfmt"; fi
    return "$status"
}
