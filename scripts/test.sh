#!/usr/bin/env bash
# Checks and tests on a private Postgres and real engines, which end with it, data and all. What stays is what was
# built, what setup.sh has installed and, where root runs it, the system user that the servers ran as.
#
#   scripts/test.sh                    all stages up to e2e, in this order:
#   scripts/test.sh lint               rustfmt, shellcheck, clippy with warnings denied
#   scripts/test.sh unit               the engine's package without a server (cargo test -p es)
#   scripts/test.sh pgrx               the tests inside the server (cargo pgrx test)
#   scripts/test.sh regress [NAME]     tests/regress/sql/*.sql through psql against expected/*.out; ACCEPT=1 writes these
#   scripts/test.sh e2e [ARGS]         the end-to-end tests; ARGS go to cargo test, e.g.  e2e --test smoke -- --nocapture
#   scripts/test.sh breaks [NAME]      builds each of tests/breaks/*.patch into the extension, and expects tests/random.rs
#                                      to fail
#   scripts/test.sh bench              measures speed, and writes docs/benchmarks.md with its chart; QUICK=1 measures less
#                                      and ONLY=writers,latency some sections, and both only print
#   scripts/test.sh bench-long         the same for memory and growth, and docs/benchmarks-long.md
#   scripts/test.sh shell              a shell with the environment of the end-to-end tests, for cargo test by hand
#
# What is built, in one target folder: the extension once in release mode (what users get, and what the regress and
# end-to-end tests run), and in the dev profile what the tests inside the server, clippy and the harness need. In
# release mode the harness would be linked with LTO for each of its files.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
"$ROOT/scripts/setup.sh"
find_tools
find_postgres
server_user
cd "$ROOT"

started=()
# shellcheck disable=SC2329,SC2317  # called by the trap
cleanup() {
    local code=$?
    trap - EXIT
    stop_all "${started[@]}"
    # A test binary that was killed leaves servers that are ending now.
    [ -z "$SERVER_USER" ] || for _ in $(seq 50); do
        pgrep -u "$SERVER_USER" -f "$RUN/" >/dev/null || break
        sleep 0.1
    done
    close_run
    exit "$code"
}
open_run test
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
make_prefix
server_folder "$RUN/servers"

# Both of these are part of what the bindings' build depends on: the same for clippy, for cargo pgrx test and for the
# cargo pgrx install within it, or each would build them anew. The file's date counts, so it is written when it changes.
export PGRX_PG_CONFIG_PATH=$PG_BIN/pg_config
mkdir -p "$PGRX_HOME"
config=$(printf '[configs]\npg%s = "%s"' "$PG" "$PG_BIN/pg_config")
[ "$(cat "$PGRX_HOME/config.toml" 2>/dev/null)" = "$config" ] || echo "$config" >"$PGRX_HOME/config.toml"

# engines [NAME...]: starts these, or both.
engines() {
    [ -z "${ES_URL:-}" ] || return 0
    local name
    local -A ports=() pids=()
    [ $# != 0 ] || set -- elasticsearch opensearch
    say "starting $*"
    for name in "$@"; do
        ports[$name]=$(free_port)
        engine_start "$name" "$RUN/$name" "${ports[$name]}"
        pids[$name]=$ENGINE_PID
        started+=("$ENGINE_PID")
    done
    for name in "$@"; do engine_ready "$name" "${ports[$name]}" "${pids[$name]}"; done
    export ES_URL=http://127.0.0.1:${ports[elasticsearch]}
    [ -z "${ports[opensearch]:-}" ] || export OPENSEARCH_URL=http://127.0.0.1:${ports[opensearch]}
}
built=''
extension() {
    [ -z "$built" ] || return 0
    say "building the extension for Postgres $PG"
    build_extension
    install_into_prefix
    built=yes
}
harness_environment() {
    export PG_ES_SYNC_PG_BIN=$PG_BIN PG_ES_SYNC_RUN=$RUN/servers PG_ES_SYNC_ENGINES=$RUN/engines PG_ES_SYNC_USER=$SERVER_USER
}

stage_lint() {
    local patch
    say "lint: rustfmt, shellcheck, clippy"
    cargo fmt --all --check
    shellcheck -x scripts/*.sh demo/*.sh .ci/run
    # Building them takes long; that they still fit does not.
    for patch in tests/breaks/*.patch; do patch --dry-run --silent -p1 <"$patch" || die "$patch does not apply"; done
    cargo clippy --workspace --all-targets --no-default-features --features "pg$PG" -- -D warnings
}
stage_unit() {
    say "unit tests of the engine's package"
    cargo test -p es
}
stage_pgrx() {
    say "tests inside the server"
    local options=()
    if [ -n "$SERVER_USER" ]; then options=(--runas "$SERVER_USER"); fi
    # Installs its own build, in the dev profile, into the prefix.
    server_folder "$RUN/pgrx"
    cargo pgrx test "pg$PG" --no-default-features --features "pg$PG" --package pg_es_sync --pgdata "$RUN/pgrx/data" "${options[@]}"
    [ -z "$built" ] || install_into_prefix
}

# Each file in a database of its own, named after it. Not pg_regress: that would run all of them in one.
stage_regress() {
    local file name difference port failed=0 passed=0
    local files=(tests/regress/sql/*.sql)
    if [ $# != 0 ]; then files=("tests/regress/sql/$1.sql"); fi
    [ -e "${files[0]}" ] || die "there is no ${files[0]}"
    extension
    engines
    say "regress files"
    port=$(free_port)
    postgres_start "$RUN/regress" "$port" <<CONF
fsync = off
shared_preload_libraries = 'pg_es_sync'
max_worker_processes = 64
max_prepared_transactions = 10
wal_level = logical
es_sync.url = '$ES_URL'
# As pg_regress does, so that the output is the same everywhere.
timezone = 'PST8PDT'
datestyle = 'Postgres, MDY'
CONF
    started+=("$POSTGRES_PID")
    export PGHOST=$RUN/regress PGPORT=$port PGUSER=postgres PGDATABASE=postgres
    for file in "${files[@]}"; do
        name=$(basename "$file" .sql)
        psql -Xq -c "create database \"regress_$name\""
        PGDATABASE=regress_$name psql -X -q -a -v VERBOSITY=default -f "$file" >"$RUN/$name.out" 2>&1 </dev/null || true
        [ -z "${ACCEPT:-}" ] || cp "$RUN/$name.out" "tests/regress/expected/$name.out"
        if difference=$(diff -u "tests/regress/expected/$name.out" "$RUN/$name.out"); then
            echo "ok      $name"
            passed=$((passed + 1))
        else
            printf 'FAILED  %s\n%s\n' "$name" "$difference"
            failed=$((failed + 1))
        fi
    done
    unset PGHOST PGPORT PGUSER PGDATABASE
    [ "$failed" = 0 ] || tail -n 60 "$RUN/regress/log"
    stop_all "$POSTGRES_PID"
    echo "regress: $passed passed, $failed failed"
    [ "$failed" = 0 ]
}
stage_e2e() {
    # Compiled first: a mistake there should not wait for the engines.
    cargo test -p pg_es_sync_tests --no-run
    extension
    engines
    harness_environment
    say "end-to-end tests"
    cargo test -p pg_es_sync_tests --no-fail-fast "$@"
}
# Each in a copy of the sources, with a target folder of its own: nothing broken can end up in what is tested or installed.
stage_breaks() {
    local patch name
    local sources=$RUN/breaks patches=(tests/breaks/*.patch) missed=()
    if [ $# != 0 ]; then patches=("tests/breaks/$1.patch"); fi
    [ -e "${patches[0]}" ] || die "there is no ${patches[0]}"
    cargo test -p pg_es_sync_tests --no-run --test random
    engines elasticsearch
    harness_environment
    for patch in "${patches[@]}"; do
        name=$(basename "$patch" .patch)
        say "break: $name"
        rm -rf "$sources"
        mkdir "$sources"
        tar --exclude=./target --exclude=./.git -cf - . | tar -C "$sources" -xf -
        patch -d "$sources" -p1 <"$patch"
        CARGO_TARGET_DIR=$TARGET/breaks "$sources/scripts/install.sh" build
        BUILT=$TARGET/breaks/release/pg_es_sync-pg$PG
        install_into_prefix
        if cargo test -p pg_es_sync_tests --test random -- elasticsearch >"$RUN/$name.out" 2>&1; then
            echo "NOT FOUND by the randomised test"
            missed+=("$name")
        elif grep -m 6 -A 5 'differs from the database' "$RUN/$name.out" | cut -c1-200; then
            echo "found by the randomised test"
        else
            tail -n 60 "$RUN/$name.out"
            die "the randomised test failed, but not because of a difference; see above"
        fi
    done
    [ ${#missed[@]} = 0 ] || die "the randomised test has missed ${missed[*]}"
}
build_bench() {
    extension
    say "building the bench"
    # cargo pgrx package's flags, so that what the bench shares with the extension is built once.
    RUSTFLAGS='-C link-arg=-Wl,--no-gc-sections' \
        cargo build --release -p pg_es_sync_bench -p empty_trigger --no-default-features --features "pg$PG"
    cp "$TARGET/release/libempty_trigger.so" "$PREFIX/lib/postgresql/$PG/lib/"
}
stage_bench() {
    build_bench
    local only=${ONLY:-}
    only=${only//[[:space:]]/}
    case ,${only:-peer}, in
        *,peer,*)
            PG_ES_SYNC_PGSYNC=$("$ROOT/scripts/pgsync.sh")
            export PG_ES_SYNC_PGSYNC
            ;;
    esac
    engines
    harness_environment
    say "measuring"
    "$TARGET/release/pg_es_sync_bench"
}
stage_bench-long() {
    build_bench
    # One that is idle takes memory, and now and then a core.
    engines elasticsearch
    harness_environment
    say "measuring"
    "$TARGET/release/pg_es_sync_bench" long
}
stage_shell() {
    extension
    engines
    harness_environment
    echo "cargo test -p pg_es_sync_tests runs here. Postgres: $PG_BIN, Elasticsearch: $ES_URL, OpenSearch: $OPENSEARCH_URL"
    "${SHELL:-bash}" || true
}

stage=${1:-all}
shift || true
case $stage in
    all)
        stage_lint
        stage_unit
        stage_pgrx
        stage_regress "$@"
        stage_e2e "$@"
        ;;
    lint | unit | pgrx | regress | e2e | breaks | bench | bench-long | shell) "stage_$stage" "$@" ;;
    *) die "there is no stage \"$stage\"; they are named on top of scripts/test.sh" ;;
esac
say "$stage: passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
