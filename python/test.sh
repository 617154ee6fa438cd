#!/usr/bin/env bash
# Installs the package into a fresh environment of each Python that is given; runs its tests and a type checker there.
#
#     python/test.sh /usr/bin/python3 python3
set -euo pipefail
cd "$(dirname "$0")/.."
count=0
for python in "$@"; do
    count=$((count + 1))
    environment=target/python/$count
    "$python" -m venv --clear "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check './python[test]' \
        --requirement hosts/requirements.txt
    "$environment/bin/python" -c 'import sqlite3, sys; print(sys.version.split()[0], "with SQLite", sqlite3.sqlite_version,
        "and" if hasattr(sqlite3.Connection, "enable_load_extension") else "without", "load_extension")'
    "$environment/bin/python" -m pytest -q -rs -p no:cacheprovider python/tests
    "$environment/bin/mypy" --strict --cache-dir=/dev/null python/src python/tests
done
