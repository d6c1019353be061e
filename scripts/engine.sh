#!/usr/bin/env bash
# Runs a real Elasticsearch or OpenSearch in the foreground, on 127.0.0.1, open to everybody.
#
#   DIST=FOLDER scripts/engine.sh elasticsearch|opensearch FOLDER PORT
#
# DIST is where it is unpacked (once, from the cache that scripts/setup.sh fills); FOLDER gets its settings, data and
# logs. HEAP (1g) is the JVM's memory. SECURITY=true switches Elasticsearch's on, with everybody a superuser. It ends
# with the process that started it, unless DETACH is set.
# The end-to-end tests start their private engines with this same script.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

[ $# = 3 ] || die "usage: DIST=FOLDER scripts/engine.sh elasticsearch|opensearch FOLDER PORT"
name=$1 folder=$2 port=$3
case $name in
    elasticsearch) version=$ELASTICSEARCH_VERSION prefix=ES ;;
    opensearch) version=$OPENSEARCH_VERSION prefix=OPENSEARCH ;;
    *) die "there is no engine \"$name\"" ;;
esac
server_user

mkdir -p "$DIST"
home=$DIST/$name-$version
(
    flock 8
    if [ ! -d "$home" ]; then
        rm -rf "$home.new"
        mkdir "$home.new"
        unzip -q "$CACHE/engines/$name-$version.zip" -d "$home.new"
        mv "$home.new/$name-$version" "$home"
        rmdir "$home.new"
    fi
    if [ "$name" = opensearch ] && [ ! -d "$home/modules/ingest-common" ]; then
        cp -r "$CACHE/engines/ingest-common-$version" "$home.module"
        mv "$home.module" "$home/modules/ingest-common"
    fi
) 8>"$DIST/.lock"

rm -rf "$folder/config"
mkdir -p "$folder"/{config,data,logs,tmp}
# The JVM's own logs go to the read-only home otherwise.
cp -r "$home/config/." "$folder/config/"
sed -i "s|logs/|$folder/logs/|; s|HeapDumpPath=data|HeapDumpPath=$folder/logs|" "$folder/config/jvm.options"
# A speed-up of vector search that small builds of Java are without.
sed -i '/add-modules=jdk.incubator.vector/d' "$folder/config/jvm.options"
cat >"$folder/config/$name.yml" <<YML
discovery.type: single-node
network.host: 127.0.0.1
http.port: $port
transport.port: 0
path.data: $folder/data
path.logs: $folder/logs
# The tests' disk may be nearly full: an index would turn read-only and tests fail for no reason of ours.
cluster.routing.allocation.disk.threshold_enabled: false
# One engine serves a whole run of the tests, and days of a shell.
cluster.max_shards_per_node: 10000
YML
if [ "$name" = elasticsearch ]; then
    echo "xpack.security.enabled: ${SECURITY:-false}" >>"$folder/config/$name.yml"
    if [ "${SECURITY:-false}" = true ]; then
        printf 'xpack.security.authc.anonymous: {username: anyone, roles: superuser}\n' >>"$folder/config/$name.yml"
    fi
fi
[ -z "$SERVER_USER" ] || chown -R "$SERVER_USER:$SERVER_USER" "$folder"

java=${JAVA_HOME:+$JAVA_HOME/bin/java}
java=$(readlink -f "${java:-$(command -v java)}")
# Relative names such as logs/ are the home's, so start there.
cd "$home"
as_server env HOME="$folder" "${prefix}_JAVA_HOME=${java%/bin/java}" "${prefix}_PATH_CONF=$folder/config" \
    "${prefix}_TMPDIR=$folder/tmp" "${prefix}_JAVA_OPTS=-Xms${HEAP:-1g} -Xmx${HEAP:-1g}" "$home/bin/$name"
