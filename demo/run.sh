#!/usr/bin/env bash
# Shows pg_es_sync at work: Debian's own package catalogue, some 60,000 records, in a private Postgres, kept in step with a
# real Elasticsearch. It asserts all that it shows, fails if anything is not so, and leaves nothing running.
#
#   demo/run.sh              the demo
#   KEEP=1 demo/run.sh       leaves both servers up and says how to use and stop them
#   demo/run.sh stop         stops what was left up
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/../scripts/lib.sh"

if [ "${1:-}" = stop ]; then
    run_path demo
    [ -e "$RUN/pids" ] || die "no demo was left up"
    exec 9>"$RUN.lock"
    # Its servers hold the lock, see open_run. Where it is free none of them runs, and these may be others' pids by now: the
    # folder outlives a reboot.
    if ! flock -n 9; then
        mapfile -t pids <"$RUN/pids"
        stop_all "${pids[@]}"
    fi
    close_run
    echo "stopped"
    exit
fi

"$ROOT/scripts/setup.sh"
find_tools
find_postgres
server_user
say "building the extension for Postgres $PG (a few minutes the first time)"
build_extension

started=()
# shellcheck disable=SC2329,SC2317  # called by the trap
cleanup() {
    local code=$?
    trap - EXIT
    if [ "$code" != 0 ] && [ -e "$RUN/postgres/log" ]; then
        printf '\nThe demo failed. The last lines of Postgres'\'' log:\n' >&2
        tail -n 30 "$RUN/postgres/log" >&2
    fi
    if [ "$code" != 0 ] || [ -z "${KEEP:-}" ]; then
        stop_all "${started[@]}"
        close_run
    fi
    exit "$code"
}
[ -z "${KEEP:-}" ] || export DETACH=1
open_run demo
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
begin=$SECONDS

bold() { if [ -t 1 ]; then printf '\033[1m%s\033[0m\n' "$*"; else printf '%s\n' "$*"; fi; }
step() { printf '\n'; bold "── $* ──"; }

step "starting Postgres and Elasticsearch"
make_prefix
install_into_prefix
es_port=$(free_port)
pg_port=$(free_port)
ES=http://127.0.0.1:$es_port
engine_start elasticsearch "$RUN/elasticsearch" "$es_port"
started+=("$ENGINE_PID")
postgres_start "$RUN/postgres" "$pg_port" <<CONF
shared_preload_libraries = 'pg_es_sync'
es_sync.url = '$ES'
max_worker_processes = 16
CONF
started+=("$POSTGRES_PID")
printf '%s\n' "${started[@]}" >"$RUN/pids"
export PGHOST=$RUN/postgres PGPORT=$pg_port PGUSER=postgres PGDATABASE=catalogue
export PGOPTIONS='-c client_min_messages=warning'
PATH=$PG_BIN:$PATH
createdb catalogue
engine_ready elasticsearch "$es_port" "${started[0]}"
echo "Postgres $(psql -XAtc 'show server_version') and Elasticsearch $ELASTICSEARCH_VERSION are up."

# value SQL: a single value.    sql SQL: shows the statement and its result.
value() { psql -XAtq -v ON_ERROR_STOP=1 -c "$1"; }
sql() {
    printf '%s\n' "$1" | sed 's/^/  sql> /'
    psql -Xq -v ON_ERROR_STOP=1 -P pager=off -P border=1 -P footer=off -c "$1" | sed 's/^/  /'
}
# change SQL...: runs and commits the statements, then waits. MS: from the commit until all of it is searchable.
change() {
    local arguments=() statement output
    for statement in "$@"; do
        printf '  sql> %s\n' "$statement"
        arguments+=(-c "$statement")
    done
    output=$(psql -XAtq -v ON_ERROR_STOP=1 "${arguments[@]}" -c '\timing on' -c 'select es_sync.wait()')
    [ "$(sed -n '/^[tf]$/p' <<<"$output" | tail -n1)" = t ] || die "es_sync.wait() ended without all changes being searchable: $output"
    MS=$(sed -n 's/^Time: \([0-9.]*\) ms.*/\1/p' <<<"$output")
}
# search INDEX QUERY: the engine's answer to a query body.
search() { curl -fsS -H 'content-type: application/json' "$ES/$1/_search" -d "$2"; }
# found INDEX FIELD VALUE: how many documents have it.
found() {
    curl -fsS -H 'content-type: application/json' "$ES/$1/_count" \
        -d "$(jq -n --arg field "$2" --arg value "$3" '{query: {match_phrase: {($field): $value}}}')" | jq .count
}
# check WHAT SEEN EXPECTED
check() {
    if [ "$2" = "$3" ]; then printf '  ✓ %s\n' "$1"; else die "$1: expected $3, saw $2"; fi
}

step "loading Debian's package catalogue"
if [ "$(apt-cache dumpavail | grep -c '^Package:')" -lt 1000 ]; then as_root apt-get -qq update; fi
apt-cache dumpavail | perl "$ROOT/demo/catalogue.pl" "$RUN"
psql -Xq -v ON_ERROR_STOP=1 -f "$ROOT/demo/tables.sql"
psql -Xq -v ON_ERROR_STOP=1 -c "\\copy maintainers from '$RUN/maintainers.copy'" -c "\\copy packages from '$RUN/packages.copy'" -c analyze
rm "$RUN"/*.copy
packages=$(value 'select count(*) from packages')
maintainers=$(value 'select count(*) from maintainers')
[ "$packages" -gt 1000 ] || die "apt knows only $packages packages"
echo "$packages packages of $maintainers maintainers."

step "attaching two tables: their first load"
sql 'create extension pg_es_sync;'
sql "select es_sync.attach('packages'), es_sync.attach('maintainers');"
# The same view that a person would look at while it runs.
for ((tick = 0; ; tick++)); do
    [ "$tick" -lt 1200 ] || die "the first load did not end within ten minutes"
    line=$(value "select coalesce(string_agg(format('%s %s/%s %s', relation, done, total, state), '   ' order by id), 'no job') from es_sync.jobs")
    error=$(value "select string_agg(error, '; ') from es_sync.jobs where error is not null and finished_at is not null")
    [ -z "$error" ] || die "the first load failed: $error"
    if [ -t 1 ]; then printf '\r\033[K  %s' "$line"; elif [ $((tick % 4)) = 0 ]; then printf '  %s\n' "$line"; fi
    [ "$(value 'select count(*) >= 2 and bool_and(finished_at is not null) from es_sync.jobs')" != t ] || break
    sleep 0.5
done
if [ -t 1 ]; then printf '\n'; fi
[ "$(value 'select es_sync.wait()')" = t ] || die "es_sync.wait() ended without everything being searchable"
sql "select relation, state, done, total, round(extract(epoch from finished_at - started_at)::numeric, 1) as seconds,
       round(done / nullif(extract(epoch from finished_at - started_at), 0)::numeric) as rows_per_second
  from es_sync.jobs order by id;"
check "as many packages in the engine as in the table: $packages" "$(curl -fsS "$ES/packages/_count" | jq .count)" "$packages"
check "as many maintainers: $maintainers" "$(curl -fsS "$ES/maintainers/_count" | jq .count)" "$maintainers"

step "searching"
echo "  search> packages whose description has \"web\" and \"server\""
answer=$(search packages '{"size": 3, "query": {"match": {"description": {"query": "web server", "operator": "and"}}}}')
jq -r '.hits.hits[] | "  \(._score * 100 | round / 100)  \(._id): \(._source.description | split("\n")[0])"' <<<"$answer"
[ "$(jq '.hits.total.value' <<<"$answer")" -gt 0 ] || die "the search found nothing"
expected=$(value "select count(*) from packages where 'libc6' = any (depends)")
check "$expected packages depend on libc6, in the table and in the engine" \
    "$(curl -fsS "$ES/packages/_count?q=depends.keyword:libc6" | jq .count)" "$expected"

step "a row is inserted"
change "insert into packages (name, version, maintainer_id, description, depends, tags) values ('quokka-search', '1.0', 1, 'a marsupial search engine', '{}', '{}')"
search packages '{"query": {"match": {"description": "marsupial"}}}' | jq -r '.hits.hits[] | "  hit: \(._id) \(._source.version), \(._source.description)"'
check "found, $MS ms after the commit" "$(found packages description 'marsupial search')" 1

step "it is updated"
change "update packages set description = 'an antipodean search engine', version = '2.0' where name = 'quokka-search'"
search packages '{"query": {"match": {"description": "antipodean"}}}' | jq -r '.hits.hits[] | "  hit: \(._id) \(._source.version), \(._source.description)"'
check "found under its new words, $MS ms after the commit" "$(found packages description 'antipodean')" 1
check "gone under its old ones" "$(found packages description 'marsupial search')" 0

step "a change is rolled back"
change 'begin' "update packages set description = 'a phantasmagorical engine' where name = 'quokka-search'" \
    "insert into packages (name, version, maintainer_id, description, depends, tags) values ('never-there', '1', 1, 'phantasmagorical', '{}', '{}')" 'rollback'
check "never to be found" "$(found packages description 'phantasmagorical')" 0
check "the row is found as it was" "$(found packages description 'antipodean')" 1

step "it is deleted"
change "delete from packages where name = 'quokka-search'"
check "gone, $MS ms after the commit" "$(found packages description 'antipodean')" 0

step "its key changes"
change "insert into packages (name, version, maintainer_id, description, depends, tags) values ('old-name', '1', 1, 'renamed quokka', '{}', '{}')" \
    "update packages set name = 'new-name' where name = 'old-name'"
check "one document, $MS ms after the commit" "$(found packages description 'renamed quokka')" 1
check "under the new key" "$(curl -fsS "$ES/packages/_doc/new-name" | jq -r ._source.name)" new-name
check "not under the old one" "$(curl -sS -o /dev/null -w '%{http_code}' "$ES/packages/_doc/old-name")" 404

step "many rows in one transaction"
games=$(value "select count(*) from packages where section = 'games'")
change "update packages set section = 'fun' where section = 'games'"
check "$games games moved, all searchable $MS ms after the commit" "$(curl -fsS "$ES/packages/_count?q=section.keyword:fun" | jq .count)" "$games"

step "what Postgres knows about it"
sql 'select relation, index, state, pending, indexed, deleted, dead_letters, latency_p50_ms, latency_p99_ms from es_sync.status;'
check "no dead letters" "$(value 'select count(*) from es_sync.dead_letters')" 0

step "every document is compared with its row"
# Names, versions, sections and first lines, page by page from the engine.
{
    page=$(curl -fsS -H 'content-type: application/json' "$ES/packages/_search?scroll=1m" -d '{"size": 5000, "sort": ["_doc"]}')
    while [ "$(jq '.hits.hits | length' <<<"$page")" != 0 ]; do
        jq -c '.hits.hits[] | [._id, ._source.name, ._source.version, ._source.section, ._source.description, ._source.depends, ._source.installed_size]' <<<"$page"
        page=$(jq -c '{scroll: "1m", scroll_id: ._scroll_id}' <<<"$page" | curl -fsS -H 'content-type: application/json' "$ES/_search/scroll" -d @-)
    done
} | LC_ALL=C sort >"$RUN/engine.txt"
value 'select json_build_array(name, name, version, section, description, depends, installed_size) from packages' | jq -c . | LC_ALL=C sort >"$RUN/postgres.txt"
differences=$(LC_ALL=C comm -3 "$RUN/engine.txt" "$RUN/postgres.txt" | wc -l)
[ "$differences" = 0 ] || LC_ALL=C comm -3 "$RUN/engine.txt" "$RUN/postgres.txt" | head -n 4 | cut -c1-300
check "$(wc -l <"$RUN/postgres.txt") documents, no difference" "$differences" 0

printf '\n'
bold "All of it held. $((SECONDS - begin)) s without the build."
if [ -n "${KEEP:-}" ]; then
    cat <<TEXT

Both servers are up. To try:
  $PG_BIN/psql -h $PGHOST -p $PGPORT -U postgres catalogue
  curl '$ES/packages/_search?q=description:postgres&pretty'
To stop them:
  make demo-stop
TEXT
fi
