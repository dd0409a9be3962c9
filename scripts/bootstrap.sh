#!/bin/sh
# Finds a Python that can run this project and hands over to bootstrap.py, or to the script of this directory that is
# named. Knows nothing about what gets installed.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
probe='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

seen=""
for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11 python}; do
    path=$(command -v "$candidate" 2>/dev/null) || continue
    if "$path" -c "$probe" >/dev/null 2>&1; then
        exec "$path" "$here/${1:-bootstrap.py}"
    fi
    # A pyenv shim may exist and not run; then there is no version to show.
    version=$("$path" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || version="does not run"
    case "$version" in
        3.11.* | 3.12.* | 3.13.*) version="$version, without the venv module (Debian: apt install python3-venv)" ;;
    esac
    seen="$seen
  $path: $version"
done

echo "No Python 3.11, 3.12 or 3.13 found${PYTHON:+ as PYTHON=$PYTHON}. Looked at:${seen:-
  nothing: no python3 on the PATH}
Install one, or name one: make <target> PYTHON=/path/to/python3.12" >&2
exit 1
