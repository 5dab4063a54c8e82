#!/usr/bin/env bash
# Names everything that flashmoe's build needs from the machine and does not find, at once.
# usage: tools/check_machine.sh PYTHON
set -uo pipefail

python=$1
missing=()
packages=()
require() {  # what, apt package, command that proves it is there
  local what=$1 package=$2
  shift 2
  if ! "$@" >/dev/null 2>&1 </dev/null; then
    missing+=("$what")
    packages+=("$package")
  fi
}

cpp20() { echo '#include <concepts>' | "${CXX:-c++}" -std=c++20 -fsyntax-only -x c++ -; }

require "Python 3.10 or newer as '$python' (make PYTHON=... names another)" python3 \
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'
if [ ${#missing[@]} -eq 0 ]; then
  require "the venv module of '$python'" python3-venv "$python" -c 'import ensurepip, venv'
  require "Python.h for '$python'" python3-dev "$python" -c \
    'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
fi
require "a compiler for C++20 as '${CXX:-c++}' (CXX=... names another)" g++ cpp20

if [ ${#missing[@]} -gt 0 ]; then
  {
    echo "flashmoe is built on this machine, which lacks:"
    printf '  - %s\n' "${missing[@]}"
    echo "On Debian and Ubuntu: apt-get install ${packages[*]}"
  } >&2
  exit 1
fi
