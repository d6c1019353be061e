#!/usr/bin/env bash
# Builds pg_es_sync in release mode and installs it into this machine's Postgres, with sudo where needed.
#
#   scripts/install.sh             build and install
#   scripts/install.sh build       only build; the files are in target/release/pg_es_sync-pgNN
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
"$ROOT/scripts/setup.sh" build
find_tools
find_postgres
build_extension
[ "${1:-}" != build ] || exit 0
# Removed first: a running server has the library mapped, and one that is written over in place ends its processes by SIGBUS.
as_root cp -r --remove-destination --no-preserve=ownership "$BUILT/usr/." /usr/
printf '\nInstalled for Postgres %s.\n' "$PG"
if [ -z "$(pg_lsclusters -h | sed -n "/^$PG /p")" ]; then
    echo "There is no cluster of it yet. To make one:  $([ "$(id -u)" = 0 ] || echo 'sudo ')pg_createcluster $PG main --start"
fi
cat <<TEXT
To use it: add  shared_preload_libraries = 'pg_es_sync'  to postgresql.conf and restart, then
    alter system set es_sync.url = 'http://127.0.0.1:9200';
    select pg_reload_conf();
    create extension pg_es_sync;
TEXT
