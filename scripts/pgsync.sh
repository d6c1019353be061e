#!/usr/bin/env bash
# Installs PGSync, which the bench measures beside this extension, into a folder of its own in the cache; quick when it
# is there. Run it as root or as a user with sudo.
#
#   scripts/pgsync.sh              prints the folder: bin/pgsync, bin/bootstrap, bin/redis-server
#
# The folder is a Python environment. PGSync itself pins all that it needs but greenlet.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

wanted=("pgsync==$PGSYNC_VERSION" greenlet==3.5.6)
folder=$CACHE/pgsync-$PGSYNC_VERSION

{
    # Not redis-server, which would start a service: this is the same program, told apart by the name it is called by.
    install_missing python3 python3-venv redis-tools
    if [ ! -e "$folder/ready" ]; then
        say "installing PGSync $PGSYNC_VERSION"
        rm -rf "$folder"
        # Debian's, whichever else is on PATH: an environment ends with the Python that it was made with.
        /usr/bin/python3 -m venv "$folder"
        (cd / && "$folder/bin/pip" install -q --disable-pip-version-check --no-cache-dir "${wanted[@]}")
        ln -s "$(command -v redis-check-rdb)" "$folder/bin/redis-server"
        "$folder/bin/redis-server" --version
        touch "$folder/ready"
    fi
} >&2
echo "$folder"
