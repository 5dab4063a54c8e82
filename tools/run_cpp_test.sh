#!/usr/bin/env bash
# Runs one C++ test. It passes if it exits with 0 and its last line reads "N passed, 0 failed" with N > 0: a test that
# stopped half-way, or ran nothing, has not passed.
set -uo pipefail

log=$(mktemp)
trap 'rm -f "$log"' EXIT

"$@" >"$log" 2>&1
status=$?
# ThreadSanitizer needs its shadow where some kernels' address randomisation puts the program.
if [ $status -ne 0 ] && grep -q "ThreadSanitizer: unexpected memory mapping" "$log"; then
  setarch -R "$@" >"$log" 2>&1
  status=$?
fi
cat "$log"

if [ $status -ne 0 ]; then
  echo "exit status $status"
  exit "$status"
fi
if ! tail -n 1 "$log" | grep -Eq '^[1-9][0-9]* passed, 0 failed$'; then
  echo "the last line must read 'N passed, 0 failed', N > 0"
  exit 1
fi
