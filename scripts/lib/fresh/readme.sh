#!/bin/bash
# What README.md shows, done as a reader does it: serve a device, look at it, stop it; run the quick tests.
set -euo pipefail

say() { printf '%s\n' "zramd: $*" >&2; }

output=$(mktemp)
say "scripts/serve"
start=$SECONDS
scripts/serve </dev/null >"$output" 2>&1 &
server=$!
# Setting up takes its time; it is over when the server tells its URI, or when it has given up.
until uri=$(sed -n 's/^ *NBD URI *//p' "$output") && [[ $uri ]]; do
    if ! kill -0 "$server" 2>/dev/null; then
        cat "$output" >&2
        say "scripts/serve has ended without serving"
        exit 1
    fi
    sleep 0.2
done
cat "$output" >&2
say "served after $((SECONDS - start)) s"
nbdinfo "$uri"
nbdcopy "$output" "$uri"
.venv/bin/zramd list

kill -TERM "$server"
status=0
wait "$server" || status=$?
((status == 0)) || { say "scripts/serve ended with status $status" && exit 1; }
[[ -z $(.venv/bin/zramd list --noheadings) ]] || { say "the server is stopped, and still listed" && exit 1; }

start=$SECONDS
scripts/serve </dev/null >"$output" 2>&1 &
server=$!
until grep -q 'NBD URI' "$output"; do
    kill -0 "$server" || { cat "$output" >&2 && exit 1; }
    sleep 0.1
done
say "the second start took $((SECONDS - start)) s"
kill -TERM "$server"
wait "$server"
rm "$output"

say "scripts/test --quick"
scripts/test --quick
