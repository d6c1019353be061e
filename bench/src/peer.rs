//! PGSync beside us: the same rows, the same OpenSearch, each with a Postgres of its own that is set up alike. PGSync runs
//! as its documentation has it in production: triggers, logical slot, Redis, daemon. While we are measured its daemon is
//! stopped (SIGSTOP), because it polls.

use crate::report::Target::{AtLeast, AtMost};
use crate::report::{Report, Samples, Turns, row, thousands};
use crate::{corpus, machine, raw};
use pg_es_sync_tests::{Engine, Server, expect, process, unique, wait};
use postgres::Client;
use serde_json::{Value, json};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Chosen from PGSync's documentation and source, for throughput and early answers; they were not tried one by one.
const SETTINGS: [(&str, &str); 9] = [
    ("NUM_WORKERS", "2"),
    ("ELASTICSEARCH_CHUNK_SIZE", "2000"),
    ("ELASTICSEARCH_THREAD_COUNT", "4"),
    ("ELASTICSEARCH_HTTP_COMPRESS", "false"),
    ("POLL_TIMEOUT", "0.01"),
    ("REDIS_POLL_INTERVAL", "0.001"),
    ("REDIS_READ_CHUNK_SIZE", "5000"),
    ("REDIS_WRITE_CHUNK_SIZE", "5000"),
    ("SQLALCHEMY_POOL_PRE_PING", "false"),
];
const COLUMNS: [&str; 12] = [
    "id",
    "name",
    "version",
    "section",
    "priority",
    "maintainer",
    "description",
    "depends",
    "tags",
    "size",
    "homepage",
    "stock",
];

pub struct Scale {
    rows: u32,
    loads: Turns,
    changed: u32,
    updates: Turns,
    singles: usize,
}

pub const FULL: Scale = Scale {
    rows: 100_000,
    loads: Turns { least: 5, most: 9 },
    changed: 20_000,
    updates: Turns { least: 9, most: 15 },
    singles: 30,
};
pub const QUICK: Scale = Scale {
    rows: 20_000,
    loads: Turns { least: 1, most: 1 },
    changed: 5_000,
    updates: Turns { least: 1, most: 1 },
    singles: 10,
};

pub fn measure(report: &mut Report, scale: &crate::Scale) {
    let scale = &scale.peer;
    let engine = Engine::opensearch();
    let ours = Side::new(scale, &engine, unique("ours"), true);
    let theirs = Side::new(scale, &engine, unique("theirs"), false);
    let rows = ours.rows;
    let mut ours = Ours(ours);
    let properties = ours.properties();
    let mut peer = Peer::new(theirs, &engine, &properties);
    let start_up = peer.start_up();

    let (mut loads, mut raw, mut raw_update) = (Pair::default(), Samples::default(), Samples::default());
    // The first round warms up, for the engine's compiler above all: its first loads take half as long again.
    let mut is_warm = false;
    while scale.loads.go_on(&[loads.ratio()]) {
        if is_warm {
            peer.reset();
            ours.detach();
        }
        // Each begins when the engine has done what the one before left it: merges above all.
        machine::quiet(&engine);
        let theirs = peer.load().saturating_sub(start_up);
        let (mine, (load, update)) = peer.stopped(|| {
            machine::quiet(&engine);
            let mine = ours.load();
            machine::quiet(&engine);
            (mine, ours.raw(&properties, scale.changed as usize))
        });
        if std::mem::replace(&mut is_warm, true) {
            loads.add(mine, theirs);
            raw.add_time(load);
            raw_update.add_time(update);
        }
    }

    let (mut plain, mut statement) = (Pair::default(), Pair::default());
    let (mut added, mut converged) = (Pair::default(), Pair::default());
    // The first round warms up.
    for round in 0.. {
        if !scale.updates.go_on(&[converged.ratio()]) {
            break;
        }
        let turn = |side: &mut Side| {
            let value = 1_000_000 + round;
            let (_, base) = side.update("plain", scale.changed, value);
            machine::quiet(&engine);
            let before = side.operations();
            let (start, with) = side.update("packages", scale.changed, value);
            side.converged(value, scale.changed, before);
            (base, with, start.elapsed())
        };
        let theirs = turn(&mut peer.side);
        let mine = peer.stopped(|| turn(&mut ours.0));
        if round > 0 {
            plain.add(mine.0, theirs.0);
            statement.add(mine.1, theirs.1);
            added.ours.add(mine.1.as_secs_f64() - mine.0.as_secs_f64());
            added.theirs.add(theirs.1.as_secs_f64() - theirs.0.as_secs_f64());
            converged.add(mine.2, theirs.2);
        }
    }

    let mut single = Pair::default();
    for block in 0..3 {
        for number in 0..scale.singles / 3 + 1 {
            single.theirs.add_time(peer.side.single(block * 1000 + number));
        }
        peer.stopped(|| {
            for number in 0..scale.singles / 3 + 1 {
                single.ours.add_time(ours.0.single(block * 1000 + number));
            }
        });
    }
    let query = "select id, row_to_json(a) from packages a";
    expect::documents_equal(&mut ours.0.client, query, &engine, &ours.0.index);

    report.line("## Beside PGSync");
    report.line("");
    report.line(&format!(
        "PGSync {} as a daemon with triggers, logical slot and Redis, and we: {} rows of Debian's package catalogue, the same OpenSearch,",
        peer.version(),
        thousands(rows.into())
    ));
    report.line("mapping and index settings, each with a Postgres of its own set up alike (fsync on, wal_level logical). PGSync's");
    report.line("settings, beyond its defaults or stated:");
    let settings: Vec<String> = SETTINGS.iter().map(|(name, value)| format!("{name}={value}")).collect();
    report.line(&format!("`{}`. Ours are the defaults.", settings.join(" ")));
    report.line(&format!(
        "First load: theirs from the daemon's start until all is searchable, less the {:.1} s that its program takes to start,",
        start_up.as_secs_f64()
    ));
    report.line(&format!(
        "without its bootstrap; ours as the job says. {} rows are updated by one statement: what it took, beyond the same",
        thousands(scale.changed.into())
    ));
    report.line("statement on a table that nobody follows, and from its begin until a search counts all new values (it is made when");
    report.line("es_sync.wait returns, and when the engine, asked every 100 ms, has carried out as many operations for PGSync). Single");
    report.line(&format!(
        "row: from the commit's answer until a real-time GET shows it. Medians of {}, {} and {} turns, after some to warm up.",
        loads.ours.count(),
        plain.ours.count(),
        single.ours.count()
    ));
    report.line("");
    let rate = |samples: &Samples| samples.map(|seconds| f64::from(rows) / seconds);
    let loads = Pair { ours: rate(&loads.ours), theirs: rate(&loads.theirs) };
    let milliseconds = |pair: &Pair| Pair { ours: pair.ours.map(|s| s * 1e3), theirs: pair.theirs.map(|s| s * 1e3) };
    let mut table = vec![row(["", "ours", "range", "PGSync", "range"])];
    for (name, pair) in [
        ("first load, documents/s", &loads),
        ("UPDATE, followed by nobody, ms", &milliseconds(&plain)),
        ("UPDATE, ms", &milliseconds(&statement)),
        ("UPDATE, added cost, ms", &milliseconds(&added)),
        ("UPDATE, until converged, ms", &milliseconds(&converged)),
        ("single row, ms", &milliseconds(&single)),
    ] {
        let decimals = usize::from(name.starts_with("single"));
        table.push(row([
            name,
            &format!("{:.decimals$}", pair.ours.median()),
            &pair.ours.range(decimals),
            &format!("{:.decimals$}", pair.theirs.median()),
            &pair.theirs.range(decimals),
        ]));
    }
    report.table(&table);
    report.line(&format!(
        "The same documents sent raw over 4 connections, bodies of 5 MB, then a refresh: {} documents/s ({}), {:.1} times PGSync.",
        thousands(rate(&raw).median()),
        rate(&raw).range(0),
        rate(&raw).median() / loads.theirs.median()
    ));
    report.line(&format!(
        "{} of them sent once more, into the index that holds them, then a refresh: {:.0} ms ({:.0} to {:.0}); PGSync takes {:.1} times as long.",
        thousands(scale.changed.into()),
        raw_update.median() * 1e3,
        raw_update.quantile(0.0) * 1e3,
        raw_update.quantile(1.0) * 1e3,
        converged.theirs.median() / raw_update.median()
    ));
    report.line("");
    let mut figure = |name, value, target| report.figure("Beside PGSync", name, value, target);
    figure("first load, documents/s to PGSync's", loads.ours.median() / loads.theirs.median(), AtLeast(3.0));
    figure("PGSync's time to converge, to ours", converged.theirs.median() / converged.ours.median(), AtLeast(8.0));
    figure("an UPDATE's added cost, to PGSync's", added.ours.median() / added.theirs.median(), AtMost(0.1));
    figure("a single row's time, to PGSync's", single.ours.median() / single.theirs.median(), AtMost(0.2));
}

#[derive(Default)]
struct Pair {
    ours: Samples,
    theirs: Samples,
}

impl Pair {
    fn ratio(&self) -> Samples {
        self.theirs.over(&self.ours)
    }

    fn add(&mut self, ours: Duration, theirs: Duration) {
        self.ours.add_time(ours);
        self.theirs.add_time(theirs);
    }
}

/// A Postgres with the rows, and the index that they go to.
struct Side<'a> {
    server: Server,
    client: Client,
    engine: &'a Engine,
    index: String,
    rows: u32,
    ours: bool,
}

impl<'a> Side<'a> {
    fn new(scale: &Scale, engine: &'a Engine, index: String, ours: bool) -> Side<'a> {
        let builder = Server::builder()
            .conf("shared_buffers", "512MB")
            .conf("max_wal_size", "4GB")
            .conf("wal_level", "logical")
            .conf("max_replication_slots", "4")
            .durable();
        let builder = match ours {
            true => builder.conf("es_sync.url", engine.url()),
            false => builder.without_preload().conf("listen_addresses", "127.0.0.1"),
        };
        let server = builder.start();
        let mut client = if ours { server.create_database("bench") } else { server.create_empty_database("bench") };
        let rows = corpus::packages(&mut client, "packages", scale.rows);
        client
            .batch_execute("create table plain (like packages including all); insert into plain select * from packages")
            .expect("could not fill a table");
        client.batch_execute("vacuum analyze").expect("could not vacuum");
        Side { server, client, engine, index, rows, ours }
    }

    /// One statement that changes this many rows; when it began and how long it took, commit included.
    fn update(&mut self, table: &str, rows: u32, value: i32) -> (Instant, Duration) {
        self.client.batch_execute("checkpoint").expect("could not write a checkpoint");
        let start = Instant::now();
        let done = self.client.batch_execute(&format!("update {table} set stock = {value} where id <= {rows}"));
        done.expect("could not update");
        (start, start.elapsed())
    }

    /// Operations that the engine has carried out on the index. Asking costs it 4 ms of its processor time: less than a
    /// refresh, but not nothing.
    fn operations(&self) -> u64 {
        let stats = self.engine.get(&format!("/{}/_stats/indexing", self.index));
        stats["_all"]["primaries"]["indexing"]["index_total"].as_u64().unwrap_or_default()
    }

    /// Waits until a search finds so many documents with the new value; `before` is what `operations` was. We say when
    /// that may be; of PGSync only the engine can be asked.
    fn converged(&mut self, value: i32, rows: u32, before: u64) {
        if self.ours {
            let row = self.client.query_one("select es_sync.wait('packages', '5 minutes')", &[]);
            assert!(row.expect("could not wait").get::<_, bool>(0), "our changes have not arrived");
        } else {
            let arrived = || self.operations() >= before + u64::from(rows);
            poll("every change has arrived", Duration::from_millis(100), arrived);
        }
        poll("every change is searchable", Duration::from_millis(50), || {
            self.engine.refresh(&self.index);
            let query = json!({"query": {"term": {"stock": value}}});
            self.engine.post(&format!("/{}/_count", self.index), query)["count"] == rows
        });
    }

    /// One changed row: from its commit until a real-time GET shows it.
    fn single(&mut self, number: usize) -> Duration {
        // Out of step with whoever polls.
        std::thread::sleep(Duration::from_millis(50 + (number * 37 % 100) as u64));
        let (id, value) = (number as i64 % i64::from(self.rows) + 1, 2_000_000 + number as i32);
        let done = self.client.execute("update packages set stock = $1 where id = $2", &[&value, &id]);
        done.expect("could not update a row");
        let start = Instant::now();
        poll("a changed row arrives", Duration::from_millis(1), || {
            let document = self.engine.get(&format!("/{}/_doc/{id}?_source_includes=stock", self.index));
            document["_source"]["stock"] == value
        });
        start.elapsed()
    }
}

fn poll(what: &str, pause: Duration, mut reached: impl FnMut() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < Duration::from_secs(300), "waited five minutes in vain until {what}");
        std::thread::sleep(pause);
    }
}

struct Ours<'a>(Side<'a>);

impl Ours<'_> {
    /// What our index maps each column to, so that PGSync's index does the same work.
    fn properties(&mut self) -> Value {
        self.load();
        let (index, engine) = (self.0.index.clone(), self.0.engine);
        let live = engine.indexes_of(&index).pop().expect("the alias has an index");
        let properties = engine.get(&format!("/{live}/_mapping"))[&live]["mappings"]["properties"].clone();
        self.detach();
        properties
    }

    fn load(&mut self) -> Duration {
        let client = &mut self.0.client;
        let attach = format!("select es_sync.attach('packages', '{}')", self.0.index);
        client.batch_execute(&attach).expect("could not attach the table");
        let seconds = wait::until("the load is done", Duration::from_secs(300), || {
            let row = client.query_one(
                "select state, extract(epoch from finished_at - started_at)::float8, error
                   from es_sync.jobs where kind = 'load' order by id desc limit 1",
                &[],
            );
            let row = row.expect("could not read the jobs");
            let state: String = row.get(0);
            assert_ne!(state, "failed", "{:?}", row.get::<_, Option<String>>(2));
            if state == "done" { Ok(row.get::<_, f64>(1)) } else { Err(state) }
        });
        assert_eq!(self.0.engine.count(&self.0.index), u64::from(self.0.rows), "documents after our load");
        Duration::from_secs_f64(seconds)
    }

    /// The same documents sent raw, into an index alike, and the first so many of them once more: the engine's own limits,
    /// each until all is searchable.
    fn raw(&mut self, properties: &Value, changed: usize) -> (Duration, Duration) {
        let documents = corpus::documents(&mut self.0.client, "packages");
        let bodies = raw::bodies(&documents, 5, 1 << 8);
        let again = raw::bodies(&documents[..changed.min(documents.len())], 1, 2 << 8);
        let sender = raw::client(self.0.engine.url());
        let alike = json!({"settings": {"index": {}}, "mappings": {"properties": properties}});
        let index = raw::create_index(self.0.engine, &alike);
        let send = |bodies: &[es::Body]| {
            let start = Instant::now();
            raw::send(&sender, &index, bodies, 4);
            self.0.engine.refresh(&index);
            start.elapsed()
        };
        let load = send(&bodies);
        // As a live index has it.
        self.0.engine.put(&format!("/{index}/_settings"), json!({"index": {"refresh_interval": "1s"}}));
        let update = send(&again);
        self.0.engine.delete(&format!("/{index}"));
        (load, update)
    }

    fn detach(&mut self) {
        let detach = format!("select es_sync.detach('packages', '{}', drop_index => true)", self.0.index);
        self.0.client.batch_execute(&detach).expect("could not detach the table");
        wait::until("the index is gone", wait::SHORT, || !self.0.engine.exists(&self.0.index));
    }
}

/// PGSync with its Redis, in a folder of their own.
struct Peer<'a> {
    side: Side<'a>,
    folder: TempDir,
    redis: Child,
    environment: Vec<(String, String)>,
    daemon: Option<Child>,
}

impl<'a> Peer<'a> {
    fn new(side: Side<'a>, engine: &Engine, properties: &Value) -> Peer<'a> {
        let folder = process::server_folder("pgsync");
        let schema = json!([{
            "database": "bench",
            "index": side.index,
            "setting": {"number_of_shards": 1, "number_of_replicas": 0},
            "mapping": properties,
            "nodes": {"table": "packages", "columns": COLUMNS},
        }]);
        std::fs::write(folder.path().join("schema.json"), schema.to_string()).expect("could not write PGSync's schema");
        let port = process::free_port();
        let mut command = process::as_server(program("redis-server"), "TERM");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        command.arg("--dir").arg(folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let redis = process::spawn(command).expect("could not start Redis");
        let mut environment: Vec<(String, String)> =
            SETTINGS.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let database = side.server.port().to_string();
        for (name, value) in [
            ("PG_USER", "postgres"),
            ("PG_HOST", "127.0.0.1"),
            ("PG_PORT", &database),
            ("REDIS_HOST", "127.0.0.1"),
            ("REDIS_PORT", &port.to_string()),
            ("OPENSEARCH", "true"),
            ("ELASTICSEARCH", "false"),
            ("ELASTICSEARCH_URL", engine.url()),
            ("GENERAL_LOGGING_LEVEL", "WARNING"),
        ] {
            environment.push((name.into(), value.into()));
        }
        wait::until("Redis takes connections", wait::SHORT, || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        Peer { side, folder, redis, environment, daemon: None }
    }

    /// One of its programs, which ends with this process. It reads files from the folder that it is started in.
    fn command(&self, name: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM"]).arg(program(name)).current_dir(self.folder.path());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null());
        command
    }

    fn version(&self) -> String {
        let mut command = self.command("pgsync");
        command.arg("--version");
        process::run(command).trim().trim_start_matches("Version: ").to_owned()
    }

    /// What its program takes before it does anything: Python and its modules.
    fn start_up(&self) -> Duration {
        let mut samples = Samples::default();
        for _ in 0..3 {
            let start = Instant::now();
            self.version();
            samples.add_time(start.elapsed());
        }
        Duration::from_secs_f64(samples.median())
    }

    fn reset(&mut self) {
        self.stop();
        self.side.engine.delete(&format!("/{}", self.side.index));
    }

    /// Sets itself up and starts the daemon: from that start until every document is searchable.
    fn load(&mut self) -> Duration {
        let mut bootstrap = self.command("bootstrap");
        bootstrap.args(["--config", "schema.json"]);
        process::run(bootstrap);
        let output = self.folder.path().join("output");
        let file = File::create(&output).expect("could not create PGSync's output file");
        let mut daemon = self.command("pgsync");
        daemon.args(["--config", "schema.json", "--daemon"]);
        daemon.stdout(file.try_clone().expect("could not share a file")).stderr(file);
        let start = Instant::now();
        let mut child = process::spawn(daemon).expect("could not start PGSync");
        poll("PGSync has sent every document", Duration::from_millis(50), || {
            if let Some(status) = child.try_wait().expect("could not look after PGSync") {
                panic!("PGSync ended ({status}):\n{}", text(&output));
            }
            self.side.operations() >= self.side.rows.into()
        });
        self.daemon = Some(child);
        assert_eq!(
            self.side.engine.count(&self.side.index),
            u64::from(self.side.rows),
            "documents after PGSync's load"
        );
        let took = start.elapsed();
        // It listens only now, and first reads its slot.
        poll("PGSync listens", Duration::from_millis(50), || text(&output).contains("Sync bench"));
        std::thread::sleep(Duration::from_secs(1));
        took
    }

    fn stopped<T>(&self, work: impl FnOnce() -> T) -> T {
        let signal = |name| self.daemon.iter().for_each(|daemon| process::signal(daemon.id(), name));
        signal("STOP");
        let result = work();
        signal("CONT");
        result
    }

    fn stop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
            // Its slot is free once Postgres has noticed.
            wait::until("PGSync's connections are gone", wait::SHORT, || {
                let others = "select from pg_stat_activity where datname = 'bench' and pid <> pg_backend_pid()
                              and backend_type = 'client backend'";
                self.side.client.query(others, &[]).expect("could not read pg_stat_activity").is_empty()
            });
        }
    }
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        for child in self.daemon.iter_mut().chain([&mut self.redis]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn program(name: &str) -> PathBuf {
    Path::new(&process::setting("PGSYNC")).join("bin").join(name)
}

fn text(path: &Path) -> String {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}
