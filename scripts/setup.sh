#!/usr/bin/env bash
# Installs what pg_es_sync needs and what is missing: Debian packages, cargo-pgrx and the two engines. Rust must be there.
# Run it as root or as a user with sudo; it is quick when nothing is missing.
#
#   scripts/setup.sh               for building, testing, measuring and the demo
#   scripts/setup.sh build         for building only: no engine, no Java, no tools of the tests
#
# Beside Debian's packages and cargo's own folder it leaves only its cache, ${XDG_CACHE_HOME:-~/.cache}/pg_es_sync, which
# may be deleted:
#   engines/     Elasticsearch and OpenSearch as zips, and ingest processors for the latter, 150 MB
#   tools/       cargo-pgrx, unless the right version is on PATH
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
purpose=${1:-all}
[[ $purpose = all || $purpose = build ]] || die "usage: scripts/setup.sh [build]"

RUST=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$ROOT/Cargo.toml")
have=$(cargo --version 2>/dev/null | cut -d' ' -f2) || true
if [ -z "$have" ] || [ "$(printf '%s\n' "$RUST" "$have" | sort -V | head -n1)" != "$RUST" ]; then
    die "Rust $RUST or later is needed, with rustfmt and clippy (found: ${have:-none}): install it with rustup, see https://rustup.rs, and run this again"
fi
[ -r /etc/debian_version ] || die "these scripts install their packages with apt: use Debian 12"
[ "$(id -u)" = 0 ] || command -v sudo >/dev/null || die "packages are missing or may be: run this as root, or install sudo"

wanted=(gcc make libc6-dev libclang-dev clang pkg-config libssl-dev)
[ "$purpose" = build ] || wanted+=(maven default-jre-headless unzip curl jq shellcheck patch sudo procps)
find_postgres
if [ -z "$PG" ]; then
    refresh
    for version in 15 16 17; do
        if grep -q "^pg$version *=" "$ROOT/Cargo.toml" && [ -n "$(apt-cache madison "postgresql-server-dev-$version" 2>/dev/null)" ]; then
            PG=$version
            break
        fi
    done
    [ -n "$PG" ] || die "this system has no packages for a Postgres version that pg_es_sync is built for ($(sed -n 's/^\(pg[0-9]*\) *=.*/\1/p' "$ROOT/Cargo.toml" | xargs)): use Debian 12, or add apt.postgresql.org to its package sources"
    # Debian's package makes and starts a cluster on port 5432 unless told not to; nobody asked for one. It is told for
    # this one time: who installs a Postgres later gets his cluster.
    (
        once=/etc/postgresql-common/createcluster.d/pg_es_sync.conf
        trap 'as_root rm -f "$once"; as_root rmdir -p --ignore-fail-on-non-empty "${once%/*}"' EXIT
        as_root mkdir -p "${once%/*}"
        echo 'create_main_cluster = false' | as_root tee "$once" >/dev/null
        install_missing "postgresql-$PG" "postgresql-server-dev-$PG"
    )
fi
# A test of pgvector's types uses it where there is a package; otherwise types that are written alike stand in for it.
if [ "$purpose" != build ] && [ -n "$(apt-cache madison "postgresql-$PG-pgvector" 2>/dev/null)" ]; then
    wanted+=("postgresql-$PG-pgvector")
fi
install_missing "${wanted[@]}"

if ! cargo_pgrx_is_there cargo-pgrx; then
    say "installing cargo-pgrx $PGRX_VERSION (four minutes on two cores)"
    (cd / && cargo install "cargo-pgrx@$PGRX_VERSION" --locked --root "$CACHE/tools" --target-dir "$TARGET/cargo-pgrx")
    rm -rf "$TARGET/cargo-pgrx"
fi
[ "$purpose" != build ] || exit 0

# engine GROUP ARTIFACT VERSION: from Maven Central, through maven, whose own folder of plugins is not kept.
engine() {
    [ -s "$CACHE/engines/$2-$3.zip" ] && return
    say "fetching $2 $3"
    mkdir -p "$CACHE/engines"
    local new
    new=$(mktemp -d "$CACHE/engines/.new.XXXXXX")
    (cd / && mvn -q -B -Dmaven.repo.local="$new/m2" org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy \
        -Dartifact="$1:$2:$3:zip" -DoutputDirectory="$new" </dev/null) || { rm -rf "$new"; die "could not fetch $2 $3"; }
    mv "$new/$2-$3.zip" "$CACHE/engines/"
    rm -rf "$new"
}
# processors VERSION: OpenSearch's zip has no ingest processor at all; this is the module with the usual ones, as the
# engine wants it.
processors() {
    local folder=$CACHE/engines/ingest-common-$1 new
    [ -d "$folder" ] && return
    say "fetching OpenSearch's ingest processors $1"
    new=$(mktemp -d "$CACHE/engines/.new.XXXXXX")
    cat >"$new/pom.xml" <<XML
<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>none</groupId> <artifactId>none</artifactId> <version>1</version>
  <dependencies>
    <dependency><groupId>org.opensearch.plugin</groupId> <artifactId>ingest-common</artifactId> <version>$1</version></dependency>
  </dependencies>
</project>
XML
    (cd / && mvn -q -B -f "$new/pom.xml" -Dmaven.repo.local="$new/m2" \
        org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies \
        -DincludeScope=runtime -DoutputDirectory="$new/module" </dev/null) || { rm -rf "$new"; die "could not fetch ingest-common $1"; }
    cat >"$new/module/plugin-descriptor.properties" <<DESCRIPTOR
name=ingest-common
description=Ingest processors
version=$1
opensearch.version=$1
java.version=11
classname=org.opensearch.ingest.common.IngestCommonPlugin
DESCRIPTOR
    chmod -R a+rX "$new/module"
    mv "$new/module" "$folder"
    rm -rf "$new"
}
engine org.elasticsearch.distribution.integ-test-zip elasticsearch "$ELASTICSEARCH_VERSION"
engine org.opensearch.distribution.integ-test-zip opensearch "$OPENSEARCH_VERSION"
processors "$OPENSEARCH_VERSION"
