//! How fast documents are delivered, beside the engine's own limit: the same documents, ready as bulk bodies, sent raw, in
//! turns. A first load, and then a backlog: every row changed while the table was paused.

use crate::raw::{self, Document, Way};
use crate::report::Target::{AtLeast, AtMost};
use crate::report::{Report, Samples, Turns, row, thousands};
use crate::{Scale, corpus, machine};
use pg_es_sync_tests::{Engine, Server, unique, wait};
use postgres::Client;
use serde_json::Value;
use std::time::{Duration, Instant};

struct Size {
    name: &'static str,
    /// Length of the longest column.
    body: usize,
    rows: usize,
}

/// As many documents as take the engine some four seconds: an index refreshes once a second, and of a run half as long a
/// refresh more or less would make a third.
const SIZES: [Size; 3] = [
    Size { name: "0.3 KB", body: 130, rows: 200_000 },
    Size { name: "1 KB", body: 850, rows: 100_000 },
    Size { name: "10 KB", body: 10_060, rows: 14_000 },
];
const CONNECTIONS: [usize; 4] = [1, 2, 4, 8];
const MEGABYTES: [usize; 3] = [1, 5, 10];

/// One table and its documents.
struct Bench<'a> {
    engine: &'a Engine,
    server: &'a Server,
    client: Client,
    raw: es::Client,
    table: String,
    documents: Vec<Document>,
    /// The mapping and the settings that the extension made.
    index: Value,
}

/// Seconds of processor time.
#[derive(Clone, Copy)]
struct Cpu {
    engine: f64,
    worker: f64,
    /// All of Postgres but the worker.
    others: f64,
    /// This process.
    client: f64,
}

/// One side of a comparison, run by run.
#[derive(Default)]
struct Side {
    /// Until the last document was acknowledged; for our load, until it had ended.
    seconds: Samples,
    /// Raw only: with the refresh after it.
    searchable: Samples,
    engine: Samples,
    worker: Samples,
    others: Samples,
    client: Samples,
}

#[derive(Default)]
struct Comparison {
    raw: Side,
    ours: Side,
}

impl Comparison {
    fn to_raw(&self) -> Samples {
        self.raw.seconds.over(&self.ours.seconds)
    }

    /// For a load, which ends when its documents are searchable.
    fn to_raw_and_refresh(&self) -> Samples {
        self.raw.searchable.over(&self.ours.seconds)
    }
}

pub fn measure(report: &mut Report, scale: &Scale) {
    report.line("## Delivery");
    report.line("");
    report.line(
        "First load: from the job's start to its end, with creating the index, refreshing it and swapping it in.",
    );
    report.line("Backlog: every row was changed while the table was paused; from `es_sync.resume` until all is acknowledged and");
    report.line(
        "the queue is empty. Both with default settings. Raw: the same documents with external versions, ready in",
    );
    report.line("memory, sent into an index of the same mapping and settings, for the backlog into one that holds them already.");
    report.line(&format!(
        "Medians of {} turns, the more the ratios scatter, and of each turn's ratio. CPU in seconds a run.",
        scale.delivery_turns
    ));
    report.line("");
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::builder()
            .conf("es_sync.url", engine.url())
            .conf("shared_buffers", "1GB")
            .conf("max_wal_size", "8GB")
            .conf("checkpoint_timeout", "1h")
            .conf("autovacuum", "off")
            .durable()
            .start();
        drop(server.create_database("bench"));
        let mut loads = vec![row(LOAD_HEAD)];
        let mut backlogs = vec![row(BACKLOG_HEAD)];
        let mut tried: Vec<Vec<(Way, f64)>> = Vec::new();
        for size in &SIZES {
            println!("({:?}, {})", engine.product(), size.name);
            let mut bench = Bench::new(&engine, &server, size, scale);
            let (ways, way) = bench.best_way();
            tried.push(ways);
            let (load, backlog) = bench.turns(way, scale.delivery_turns);
            let count = bench.documents.len() as f64;
            let bytes = bench.documents.iter().map(|(_, document)| document.len()).sum::<usize>() as f64 / count;
            let turns = load.ours.seconds.count();
            let what = format!("{}: {} of {bytes:.0} B, {turns} turns, {way}", size.name, thousands(count));
            loads.extend(load_rows(&what, &load, count));
            backlogs.extend(backlog_rows(&what, &backlog, count));

            let section: &'static str = match engine.product() {
                pg_es_sync_tests::engine::Product::Elasticsearch => "Delivery to Elasticsearch",
                pg_es_sync_tests::engine::Product::OpenSearch => "Delivery to OpenSearch",
            };
            let share = load.to_raw_and_refresh().median();
            report.figure(section, format!("first load of {}, to raw and a refresh", size.name), share, AtLeast(0.92));
            let share = backlog.to_raw().median();
            report.figure(section, format!("backlog of {}, to raw", size.name), share, AtLeast(0.88));
            let share = load.ours.worker.over(&load.ours.engine).median();
            report.figure(section, format!("worker's CPU to the engine's, {}", size.name), share, AtMost(0.2));
        }
        report.line(&format!("### {:?}: first load", engine.product()));
        report.line("");
        report.table(&loads);
        report.line(&format!("### {:?}: backlog", engine.product()));
        report.line("");
        report.table(&backlogs);
        report.line(&format!("### {:?}: raw, documents/s as tried on a third of them", engine.product()));
        report.line("");
        report.table(&tried_rows(&tried));
    }
}

const LOAD_HEAD: [&str; 9] = [
    "",
    "documents/s",
    "range",
    "to raw `_bulk`",
    "to raw and a refresh",
    "CPU engine",
    "worker",
    "other Postgres",
    "raw client",
];
const BACKLOG_HEAD: [&str; 8] =
    ["", "documents/s", "range", "to raw `_bulk`", "CPU engine", "worker", "other Postgres", "raw client"];

fn load_rows(what: &str, load: &Comparison, count: f64) -> [Vec<String>; 3] {
    let Comparison { raw, ours } = load;
    let share = |samples: Samples| format!("**{:.2}**", samples.median());
    let rate = |name: &str, seconds: &Samples, to_raw: String, to_searchable: String| {
        let rate = seconds.map(|seconds| count / seconds);
        let range = format!("{} to {}", thousands(rate.quantile(0.0)), thousands(rate.quantile(1.0)));
        vec![name.to_owned(), thousands(rate.median()), range, to_raw, to_searchable]
    };
    let none = String::new;
    let mut rows = [
        rate(&format!("{what}, raw `_bulk`"), &raw.seconds, none(), none()),
        rate("raw `_bulk` and a refresh", &raw.searchable, none(), none()),
        rate("first load", &ours.seconds, share(load.to_raw()), share(load.to_raw_and_refresh())),
    ];
    rows[0].extend(raw.raw_cpu());
    rows[1].extend([none(), none(), none(), none()]);
    rows[2].extend(ours.our_cpu());
    rows
}

fn backlog_rows(what: &str, backlog: &Comparison, count: f64) -> [Vec<String>; 2] {
    let Comparison { raw, ours } = backlog;
    let rate = |name: &str, seconds: &Samples, share: String| {
        let rate = seconds.map(|seconds| count / seconds);
        let range = format!("{} to {}", thousands(rate.quantile(0.0)), thousands(rate.quantile(1.0)));
        vec![name.to_owned(), thousands(rate.median()), range, share]
    };
    let share = format!("**{:.2}**", backlog.to_raw().median());
    let mut rows =
        [rate(&format!("{what}, raw `_bulk`"), &raw.seconds, String::new()), rate("backlog", &ours.seconds, share)];
    rows[0].extend(raw.raw_cpu());
    rows[1].extend(ours.our_cpu());
    rows
}

fn tried_rows(tried: &[Vec<(Way, f64)>]) -> Vec<Vec<String>> {
    let mut table = vec![row(["", SIZES[0].name, SIZES[1].name, SIZES[2].name])];
    for connections in CONNECTIONS {
        for megabytes in MEGABYTES {
            let way = Way { connections, megabytes };
            let rate = |ways: &Vec<(Way, f64)>| {
                ways.iter().find(|tried| tried.0 == way).map_or("-".to_owned(), |tried| thousands(tried.1))
            };
            let rates = tried.iter().map(rate);
            table.push(std::iter::once(way.to_string()).chain(rates).collect());
        }
    }
    table
}

impl Side {
    fn add_cpu(&mut self, cpu: Cpu) {
        self.engine.add(cpu.engine);
        self.worker.add(cpu.worker);
        self.others.add(cpu.others);
        self.client.add(cpu.client);
    }

    fn raw_cpu(&self) -> [String; 4] {
        [seconds(&self.engine), String::new(), String::new(), seconds(&self.client)]
    }

    fn our_cpu(&self) -> [String; 4] {
        [seconds(&self.engine), seconds(&self.worker), seconds(&self.others), String::new()]
    }
}

fn seconds(samples: &Samples) -> String {
    format!("{:.2}", samples.median())
}

impl<'a> Bench<'a> {
    /// Fills a table, and loads it once to see what the extension makes of it, which warms the engine up.
    fn new(engine: &'a Engine, server: &'a Server, size: &Size, scale: &Scale) -> Bench<'a> {
        let mut client = server.connect("bench");
        let table = unique("documents");
        corpus::fill(&mut client, &table, size.rows * scale.delivery_percent / 100, size.body);
        let documents = corpus::documents(&mut client, &table);
        let raw = raw::client(engine.url());
        let mut bench = Bench { engine, server, client, raw, table, documents, index: Value::Null };
        bench.load();
        let live = engine.indexes_of(&bench.table).pop().expect("the load has made an index");
        let (id, document) = &bench.documents[bench.documents.len() / 2];
        assert_eq!(engine.source(&live, id).as_ref(), Some(document), "a document that was sent raw would differ");
        bench.index = raw::alike(engine, &live);
        bench.detach();
        bench
    }

    /// Tries the ways on a third of the documents, the best two twice: what each reached, and the best.
    fn best_way(&self) -> (Vec<(Way, f64)>, Way) {
        let part = &self.documents[..self.documents.len() / 3];
        let mut tried = Vec::new();
        for megabytes in MEGABYTES {
            let bodies = raw::bodies(part, megabytes, 1 << 8);
            // With fewer bodies than connections it would be a way with fewer connections.
            for connections in CONNECTIONS.into_iter().filter(|connections| *connections <= bodies.len()) {
                tried.push((Way { connections, megabytes }, self.try_way(&bodies, connections)));
            }
        }
        let faster = |a: &(Way, f64), b: &(Way, f64)| b.1.total_cmp(&a.1);
        tried.sort_by(faster);
        for (way, rate) in tried.iter_mut().take(2) {
            *rate = rate.max(self.try_way(&raw::bodies(part, way.megabytes, 1 << 8), way.connections));
        }
        tried.sort_by(faster);
        let best = tried[0].0;
        (tried, best)
    }

    fn try_way(&self, bodies: &[es::Body], connections: usize) -> f64 {
        let index = raw::create_index(self.engine, &self.index);
        let took = raw::send(&self.raw, &index, bodies, connections);
        self.engine.delete(&format!("/{index}"));
        bodies.iter().map(es::Body::operations).sum::<usize>() as f64 / took.as_secs_f64()
    }

    fn turns(&mut self, way: Way, turns: Turns) -> (Comparison, Comparison) {
        let first = raw::bodies(&self.documents, way.megabytes, 1 << 8);
        let second = raw::bodies(&self.documents, way.megabytes, 2 << 8);
        let (mut load, mut backlog) = (Comparison::default(), Comparison::default());
        while turns.go_on(&[load.to_raw_and_refresh(), backlog.to_raw()]) {
            let round = load.ours.seconds.count();
            for turn in 0..2 {
                if (round + turn) % 2 == 0 {
                    self.raw_turn(&first, &second, way, &mut load.raw, &mut backlog.raw);
                } else {
                    self.our_turn(&mut load.ours, &mut backlog.ours);
                }
            }
        }
        (load, backlog)
    }

    fn raw_turn(&mut self, first: &[es::Body], second: &[es::Body], way: Way, load: &mut Side, backlog: &mut Side) {
        let index = raw::create_index(self.engine, &self.index);
        machine::quiet(self.engine);
        let (before, start) = (self.cpu(), Instant::now());
        load.seconds.add_time(raw::send(&self.raw, &index, first, way.connections));
        self.engine.refresh(&index);
        load.searchable.add_time(start.elapsed());
        load.add_cpu(self.cpu().since(before));
        assert_eq!(self.engine.count(&index), self.documents.len() as u64, "documents after a raw run");

        raw::go_live(self.engine, &index, &self.index);
        machine::quiet(self.engine);
        let before = self.cpu();
        backlog.seconds.add_time(raw::send(&self.raw, &index, second, way.connections));
        backlog.add_cpu(self.cpu().since(before));
        self.engine.delete(&format!("/{index}"));
    }

    fn our_turn(&mut self, load: &mut Side, backlog: &mut Side) {
        machine::quiet(self.engine);
        let before = self.cpu();
        load.seconds.add_time(self.load());
        load.add_cpu(self.cpu().since(before));

        let table = self.table.clone();
        self.sql(&format!("select es_sync.pause('{table}')"));
        self.sql(&format!("update {table} set stock = stock + 1"));
        // Hint bits and dirty pages are the update's business, not the backlog's.
        self.sql(&format!("vacuum {table}"));
        self.sql("checkpoint");
        machine::quiet(self.engine);
        let indexed = "select coalesce(sum(s.indexed), 0)::bigint
                         from es_sync.attachment a cross join lateral es_sync.index_statistics(a.id) s";
        let indexed = self.client.prepare(indexed).expect("could not prepare a question");
        let target = self.number(&indexed) + self.documents.len() as i64;
        let (before, start) = (self.cpu(), Instant::now());
        self.sql(&format!("select es_sync.resume('{table}')"));
        self.until(|bench| bench.number(&indexed) >= target);
        let queued = "select count(*) from es_sync.queue where keys is not null";
        let queued = self.client.prepare(queued).expect("could not prepare a question");
        self.until(|bench| bench.number(&queued) == 0);
        backlog.seconds.add_time(start.elapsed());
        backlog.add_cpu(self.cpu().since(before));
        let (id, _) = &self.documents[0];
        let now = corpus::document(&mut self.client, &table, id);
        assert_eq!(self.engine.source(&table, id), Some(now), "a document after the backlog");
        self.detach();
        // The next load is to read the table as it was, without dead rows.
        self.sql(&format!("vacuum full {table}"));
        self.sql(&format!("vacuum (freeze, analyze) {table}"));
    }

    /// Attaches the table and waits for the end of its load: the job's time.
    fn load(&mut self) -> Duration {
        let row = self.client.query_one(&format!("select es_sync.attach('{}')", self.table), &[]);
        let job: i64 = row.expect("could not attach the table").get(0);
        let seconds = wait::until("the load is done", Duration::from_secs(300), || {
            let row = self.client.query_one(
                "select state, extract(epoch from finished_at - started_at)::float8, error, phase
                   from es_sync.jobs where id = $1",
                &[&job],
            );
            let row = row.expect("could not read the jobs");
            let state: String = row.get(0);
            assert_ne!(state, "failed", "{:?}", row.get::<_, Option<String>>(2));
            if state == "done" { Ok(row.get::<_, f64>(1)) } else { Err(row.get::<_, Option<String>>(3)) }
        });
        assert_eq!(self.engine.count(&self.table), self.documents.len() as u64, "documents after the load");
        Duration::from_secs_f64(seconds)
    }

    fn detach(&mut self) {
        self.sql(&format!("select es_sync.detach('{}', drop_index => true)", self.table));
        wait::until("the index is gone", wait::SHORT, || !self.engine.exists(&self.table));
    }

    fn cpu(&self) -> Cpu {
        let workers = self.server.workers();
        let worker = workers.iter().find(|worker| worker.2 == "bench").expect("the database has a worker").0;
        let worker = machine::process_seconds(worker);
        Cpu {
            engine: machine::engine_seconds(self.engine),
            worker,
            others: machine::postgres_seconds(self.server) - worker,
            client: machine::process_seconds(std::process::id()),
        }
    }

    fn sql(&mut self, sql: &str) {
        self.client.batch_execute(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    fn number(&mut self, statement: &postgres::Statement) -> i64 {
        self.client.query_one(statement, &[]).expect("could not ask how far it is").get(0)
    }

    /// Looks so often that the figure is not the pause's.
    fn until(&mut self, mut holds: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < Duration::from_secs(300), "the backlog is not delivered");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Bench<'_> {
    fn drop(&mut self) {
        let _ = self.client.batch_execute(&format!("drop table {}", self.table));
    }
}

impl Cpu {
    fn since(self, before: Cpu) -> Cpu {
        Cpu {
            engine: self.engine - before.engine,
            worker: self.worker - before.worker,
            others: self.others - before.others,
            client: self.client - before.client,
        }
    }
}
