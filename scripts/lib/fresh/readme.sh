#!/bin/bash
# What README.md shows, done as a reader does it: serve a device, look at it, stop it; run the quick tests.
set -euo pipefail

say() { printf '%s\n' "zramd: $*" >&2; }

die() {
    say "$@"
    exit 1
}

# Serves in the background until its output in $output tells the URI. Setting up takes its time.
serve() {
    local start=$SECONDS
    scripts/serve </dev/null >"$output" 2>&1 &
    server=$!
    until uri=$(sed -n 's/^ *NBD URI *//p' "$output") && [[ $uri ]]; do
        kill -0 "$server" 2>/dev/null || { cat "$output" >&2 && die "scripts/serve has ended without serving"; }
        sleep 0.2
    done
    cat "$output" >&2
    say "scripts/serve: served after $((SECONDS - start)) s"
}

stop() {
    local status=0
    kill -TERM "$server"
    wait "$server" || status=$?
    ((status == 0)) || die "scripts/serve ended with status $status"
    [[ -z $(.venv/bin/zramd list --noheadings) ]] || die "the server is stopped, and is still listed"
}

output=$(mktemp)
serve
nbdinfo "$uri"
nbdcopy "$output" "$uri"
.venv/bin/zramd list
stop
serve # again, with all set up
stop
rm "$output"

scripts/test --quick
