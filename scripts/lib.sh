# shellcheck shell=bash disable=SC2034
# What the scripts share. Sourced by them, never run.
#
# Folders:
#   CACHE    downloads and tools that outlive a run: engines/*.zip, tools/bin/cargo-pgrx
#   TARGET   cargo's one target folder (CARGO_TARGET_DIR is respected)
#   RUN      one run's servers, data, sockets and private Postgres; gone when the script ends
#
# initdb and the engines refuse root, and root's home is closed to others. So cargo runs as whoever called; only when
# that is root do the servers run as the system user "essync", inside RUN, whom the first run makes and none removes. An
# ordinary user's run as himself.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/pg_es_sync
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
PGRX_VERSION=0.18.1
# Others by the environment; from 9 and 3 on they want JAVA_HOME to be a Java 21.
ELASTICSEARCH_VERSION=${ELASTICSEARCH_VERSION:-8.19.0}
OPENSEARCH_VERSION=${OPENSEARCH_VERSION:-2.19.1}
# Only the bench's: what it is compared with.
PGSYNC_VERSION=7.3.0
export CARGO_TARGET_DIR=$TARGET
# pgrx's settings of this checkout, so that the caller's ~/.pgrx stays as it is.
export PGRX_HOME=$TARGET/pgrx
# A backtrace in the postmaster's environment is sent to clients as DETAIL; PG* would send our clients elsewhere.
unset RUST_BACKTRACE PGHOST PGPORT PGUSER PGDATABASE PGDATA PGOPTIONS PGPASSWORD PGSERVICE PG_VERSION PGRX_PG_CONFIG_PATH
# pgrx's tests connect as $USER, which containers and cron leave unset.
USER=$(id -un)
export USER
umask 022

say() { printf '\n\033[1m==> %s\033[0m\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

apt() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y "$@" </dev/null; }
refresh() {
    if [ -z "${refreshed:-}" ]; then
        say "reading the package lists"
        apt update
        refreshed=yes
    fi
}
# missing_packages NAME...: those of these Debian packages that are not installed. One call for all: dpkg-query takes 20 ms.
missing_packages() {
    local package
    local there=()
    mapfile -t there < <(dpkg-query -W -f '${db:Status-Status} ${binary:Package}\n' "$@" 2>/dev/null | sed -n 's/^installed \([^:]*\).*/\1/p')
    for package in "$@"; do
        [[ " ${there[*]} " = *" $package "* ]] || echo "$package"
    done
}
install_missing() { # NAME...
    local missing=()
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} != 0 ] || return 0
    refresh
    say "installing ${missing[*]}"
    # --force-confold: nobody is there to be asked about a configuration file that was changed; it stays.
    apt install --no-install-recommends -o Dpkg::Options::=--force-confold "${missing[@]}"
}

# rustup puts cargo where a login shell finds it, and a plain one does not.
[ -x "$HOME/.cargo/bin/cargo" ] && PATH=$HOME/.cargo/bin:$PATH
cargo_pgrx_is_there() { [ "$("$1" pgrx --version 2>/dev/null)" = "cargo-pgrx $PGRX_VERSION" ]; }
# Called again once setup.sh may have installed it.
find_tools() {
    if [ -x "$CACHE/tools/bin/cargo-pgrx" ] && ! cargo_pgrx_is_there cargo-pgrx; then PATH=$CACHE/tools/bin:$PATH; fi
}
export PATH
find_tools

# PG: the first version that this extension can be built for and whose server headers are installed. Empty if none.
find_postgres() {
    local version
    PG=''
    for version in 15 16 17; do
        if grep -q "^pg$version *=" "$ROOT/Cargo.toml" && [ -x "/usr/lib/postgresql/$version/bin/postgres" ] &&
            [ -f "/usr/include/postgresql/$version/server/postgres.h" ]; then
            PG=$version
            return
        fi
    done
}

# SERVER_USER: who runs the servers; empty for "the caller".
server_user() {
    SERVER_USER=''
    [ "$(id -u)" = 0 ] || return 0
    # Not pg_...: initdb names the superuser after it, and roles must not begin so.
    SERVER_USER=essync
    id "$SERVER_USER" >/dev/null 2>&1 ||
        useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$SERVER_USER"
}

# as_server COMMAND...: becomes COMMAND, run as the server's user. Call it in a subshell or in the background.
# A server dies with the script that started it, unless DETACH is set.
as_server() {
    local wrap=(setpriv)
    if [ -n "$SERVER_USER" ]; then wrap+=(--reuid="$SERVER_USER" --regid="$SERVER_USER" --init-groups); fi
    if [ -z "${DETACH:-}" ]; then wrap+=(--pdeathsig "${DEATH_SIGNAL:-TERM}"); else wrap+=(--pdeathsig clear); fi
    exec "${wrap[@]}" "$@"
}

# server_folder DIR: makes DIR, owned by the server's user.
server_folder() {
    mkdir -p "$1"
    if [ -n "$SERVER_USER" ]; then chown "$SERVER_USER:$SERVER_USER" "$1"; fi
}

# open_run NAME: makes RUN. Its path is the same each time for this checkout and caller, because pgrx's bindings are
# built anew whenever the path of pg_config changes; a lock keeps a second run away;
# its servers inherit it, so it is held until the last of them has ended. Short, because sockets live there.
run_path() { RUN=/var/tmp/pg_es_sync-$1-$(id -u)-$(printf %s "$ROOT" | cksum | cut -d' ' -f1); }
open_run() {
    run_path "$1"
    exec 9>"$RUN.lock"
    flock -n 9 || die "another \"make $1\" of this checkout is running, or was left up (its folder is $RUN)"
    # What a killed run left behind. Its servers have ended with it.
    if [ -e "$RUN" ]; then
        if [ ! -O "$RUN" ] || [ -L "$RUN" ]; then die "$RUN belongs to someone else"; fi
        rm -rf "$RUN"
    fi
    mkdir -m 755 "$RUN"
}
close_run() {
    cd /
    rm -rf "$RUN" "$RUN.lock"
}

# make_prefix: copies the installed Postgres to RUN/pg, so that extensions can be installed there and no system folder
# is written to. Postgres finds its folders relative to its binary; links would lead it back, so files are copied
# (20 MB without the JIT's bitcode, and JIT is of no use here).
make_prefix() {
    PREFIX=$RUN/pg
    PG_BIN=$PREFIX/lib/postgresql/$PG/bin
    mkdir -p "$PREFIX/lib/postgresql/$PG" "$PREFIX/share/postgresql"
    (cd "/usr/lib/postgresql/$PG" && tar --exclude=./lib/bitcode --exclude='./lib/llvmjit*' -cf - .) |
        tar -C "$PREFIX/lib/postgresql/$PG" -xf - --no-same-owner
    cp -r "/usr/share/postgresql/$PG" "$PREFIX/share/postgresql/"
    ln -s /usr/include "$PREFIX/include"
}

# build_extension: builds what users get, in release mode, into BUILT. It names the system's pg_config, whose path never
# changes, and a PGRX_HOME that nobody writes to: both are part of what the bindings' build depends on.
build_extension() {
    local pg_config=/usr/lib/postgresql/$PG/bin/pg_config
    mkdir -p "$PGRX_HOME/package"
    (cd "$ROOT" && PGRX_HOME=$PGRX_HOME/package PGRX_PG_CONFIG_PATH=$pg_config \
        cargo pgrx package --no-default-features --features "pg$PG" --pg-config "$pg_config")
    BUILT=$TARGET/release/pg_es_sync-pg$PG
}
install_into_prefix() { cp -r "$BUILT/usr/." "$PREFIX/"; }

free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
}

# engine_start NAME FOLDER PORT: starts an engine in the background; ENGINE_PID is its process. engine_ready waits for it.
engine_start() {
    DIST=$RUN/engines DETACH=${DETACH:-} "$ROOT/scripts/engine.sh" "$1" "$2" "$3" >"$RUN/$1.out" 2>&1 &
    ENGINE_PID=$!
}
engine_ready() { # NAME PORT PID
    local _
    for _ in $(seq 240); do
        if curl -fsS "http://127.0.0.1:$2/_cluster/health?wait_for_status=yellow&timeout=1s" >/dev/null 2>&1; then return; fi
        kill -0 "$3" 2>/dev/null || { tail -n 40 "$RUN/$1.out" >&2; die "$1 ended while it started; its output is above"; }
        sleep 0.5
    done
    tail -n 40 "$RUN/$1.out" >&2
    die "$1 did not answer within two minutes; its output is above"
}

# postgres_start FOLDER PORT: makes a cluster in FOLDER/data, with the settings on standard input, and starts it in the
# background with its socket in FOLDER; POSTGRES_PID is its process. The superuser is "postgres". Whoever
# connects may be that, so the socket lets in whom the server runs as (the caller, or for root essync), and root.
postgres_start() {
    local _
    server_folder "$1"
    (cd / && as_server "$PG_BIN/initdb" -D "$1/data" -U postgres -A trust -E UTF8 --locale=C.UTF-8 -N >/dev/null)
    {
        printf "listen_addresses = ''\nport = %s\n" "$2"
        printf "unix_socket_directories = '%s'\nunix_socket_permissions = 0700\n" "$1"
        cat
    } >>"$1/data/postgresql.conf"
    # SIGQUIT is its immediate shutdown, should this script be killed.
    (cd / && DEATH_SIGNAL=QUIT as_server "$PG_BIN/postgres" -D "$1/data") >"$1/log" 2>&1 </dev/null &
    POSTGRES_PID=$!
    for _ in $(seq 300); do
        if "$PG_BIN/pg_isready" -q -h "$1" -p "$2"; then return; fi
        kill -0 "$POSTGRES_PID" 2>/dev/null || break
        sleep 0.1
    done
    cat "$1/log" >&2
    die "Postgres did not start; its log is above"
}

# stop_all PID...: asks each to stop, and insists after ten seconds.
stop_all() {
    local pid _
    # TERM is for the engines, which ignore INT when started in the background; INT is Postgres' fast shutdown, which
    # TERM alone would have wait for clients.
    for pid in "$@"; do kill -TERM "$pid" 2>/dev/null || true; kill -INT "$pid" 2>/dev/null || true; done
    for pid in "$@"; do
        for _ in $(seq 100); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
}
