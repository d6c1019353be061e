//! How late a change arrives: from its commit to the engine's acknowledgement, and until a search finds it, at a steady
//! pace of small commits, beside the round trip of the same documents sent raw at the same pace.

use crate::report::Target::AtMost;
use crate::report::{Report, Samples, row};
use crate::{Scale, corpus, raw};
use pg_es_sync_tests::{Engine, Server, unique, wait};
use serde_json::json;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Commits a second, and the connections that they are spread over.
const PACES: [(u32, u32); 3] = [(1, 1), (100, 2), (1_000, 8)];
/// Rows that are there to be inserted.
const ROWS: usize = 20_000;
/// Of the rows at the highest pace, one in ten is searched for.
const SEARCHED: u32 = 100;
const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("p99.9", 0.999)];
const REFRESH_MS: f64 = 1_000.0;

struct Bench {
    engine: Engine,
    server: Server,
    raw: es::Client,
    documents: Vec<raw::Document>,
    mappings: serde_json::Value,
}

/// Is told the place of what was written, and when that began.
type Sent<'a> = dyn Fn(usize, Instant) + Sync + 'a;
/// Milliseconds by quantile, a sample a turn.
type Quantiles = [Samples; 4];

pub fn measure(report: &mut Report, scale: &Scale) {
    let bench = Bench::new();
    report.line("## Latency");
    report.line("");
    report.line(
        "Single-row INSERTs of 1 KB at a steady pace, fsync on, Elasticsearch, beside one-document `_bulk` round trips",
    );
    report.line("at the same pace; medians of turns. Acknowledged: from the moment before the commit is written to the engine's");
    report.line("answer, as es_sync.status counts it. Searchable: from sending the INSERT until a search, repeated every 10 ms,");
    report.line("finds the row (one turn, up to 100 rows a second); the refresh interval is 1 s. Milliseconds.");
    report.line("");
    let mut table = vec![row(["commits/s", "", "samples", "p50", "p95", "p99", "p99.9"])];
    for (pace, clients) in PACES {
        // At one a second there are only a few samples, and one turn.
        let rounds = if pace == 1 { 1 } else { scale.latency_rounds };
        let changes = (pace * scale.latency_seconds) as usize;
        let (mut trips, mut ours, mut commits): (Quantiles, Quantiles, Quantiles) = Default::default();
        // The first round warms up.
        for round in 0..=rounds {
            let changes = if round == 0 { changes / 4 + 1 } else { changes };
            let raw = bench.round_trips(pace, clients, changes);
            let (acknowledged, commit) = bench.acknowledged(pace, clients, changes);
            if round > 0 {
                for (place, (_, quantile)) in QUANTILES.iter().enumerate() {
                    trips[place].add(raw.quantile(*quantile));
                    commits[place].add(commit.quantile(*quantile));
                    ours[place].add(acknowledged[place]);
                }
            }
        }
        let (found, raw_found) = bench.searchable(pace, clients, changes);
        let searchable = QUANTILES.map(|(_, quantile)| found.quantile(quantile));
        let raw_searchable = QUANTILES.map(|(_, quantile)| raw_found.quantile(quantile));
        let ratio = |place: usize| ours[place].over(&trips[place]).median();
        let medians = |samples: &Quantiles| std::array::from_fn(|place| samples[place].median());
        let mut line = |what: &str, samples: usize, values: [f64; 4], decimals: usize| {
            let text = values.map(|value| format!("{value:.decimals$}"));
            let count = if samples > 0 { format!("{samples} x {rounds}") } else { String::new() };
            let first = if what.starts_with("raw `_bulk`") { pace.to_string() } else { String::new() };
            table.push(row([&first, what, &count, &text[0], &text[1], &text[2], &text[3]]));
        };
        line("raw `_bulk` of one document", changes, medians(&trips), 2);
        line("commit to acknowledged", changes, medians(&ours), 2);
        line("ratio", 0, std::array::from_fn(ratio), 2);
        line("the INSERT with its commit, for its client", changes, medians(&commits), 2);
        line("the same documents raw, to searchable", 0, raw_searchable, 0);
        line("commit to searchable", 0, searchable, 0);
        if pace == 100 {
            report.figure("Latency at 100 commits/s", "acknowledged p50, to a raw round trip", ratio(0), AtMost(2.0));
            report.figure("Latency at 100 commits/s", "acknowledged p99, to a raw round trip", ratio(2), AtMost(5.0));
            let limit = REFRESH_MS + ours[2].median();
            let what = "searchable p99, to the refresh interval and that";
            report.figure("Latency at 100 commits/s", what, searchable[2] / limit, AtMost(1.0));
        }
    }
    report.table(&table);
}

impl Bench {
    fn new() -> Bench {
        let engine = Engine::elasticsearch();
        let server = Server::builder()
            .conf("es_sync.url", engine.url())
            .conf("shared_buffers", "512MB")
            .conf("max_wal_size", "4GB")
            .durable()
            .start();
        let mut client = server.create_database("bench");
        corpus::fill(&mut client, "source", ROWS, 850);
        let documents = corpus::documents(&mut client, "source");
        let raw = raw::client(engine.url());
        let mut bench = Bench { engine, server, raw, documents, mappings: json!({}) };
        let table = bench.attach();
        let live = bench.engine.indexes_of(&table).pop().expect("there is an index");
        bench.mappings = bench.engine.get(&format!("/{live}"))[&live]["mappings"].take();
        bench.detach(&table);
        bench
    }

    /// Milliseconds of each one-document request.
    fn round_trips(&self, pace: u32, clients: u32, changes: usize) -> Samples {
        let index = self.create_index();
        let times = self.requests(&index, pace, clients, changes, &|_, _| ());
        self.engine.delete(&format!("/{index}"));
        times
    }

    /// Makes an index like that of an attached table.
    fn create_index(&self) -> String {
        let index = unique("trips");
        let settings = json!({"index": {"refresh_interval": "1s", "number_of_replicas": 0}});
        self.engine.put(&format!("/{index}"), json!({"settings": settings, "mappings": self.mappings}));
        index
    }

    /// Sends documents raw at the pace: milliseconds of each.
    fn requests(&self, index: &str, pace: u32, clients: u32, changes: usize, sent: &Sent<'_>) -> Samples {
        let send = |_: &mut (), place: usize| {
            let body = raw::bodies(std::slice::from_ref(&self.documents[place]), 1, 1 << 8);
            let start = Instant::now();
            raw::one(&self.raw, index, &body[0]);
            sent(place, start);
            start.elapsed()
        };
        paced(pace, clients, changes, || (), send)
    }

    /// Milliseconds to the acknowledgement by quantile, and of each INSERT.
    fn acknowledged(&self, pace: u32, clients: u32, changes: usize) -> ([f64; 4], Samples) {
        let table = self.attach();
        let inserts = self.inserts(&table, pace, clients, changes, &|_, _| ());
        let status = format!(
            "select latency_p50_ms, latency_p95_ms, latency_p99_ms, latency_p999_ms, coalesce(indexed, 0)
               from es_sync.status where relation = '{table}'::regclass"
        );
        let mut client = self.server.connect("bench");
        let latency = wait::until("all is acknowledged", wait::SHORT, || {
            let row = client.query_one(&status, &[]).expect("could not read the status");
            let indexed: i64 = row.get(4);
            if indexed == changes as i64 { Ok([0, 1, 2, 3].map(|place| row.get(place))) } else { Err(indexed) }
        });
        self.detach(&table);
        (latency, inserts)
    }

    /// Milliseconds until rows were found, and until documents sent raw were. Apart from the others, because the searches
    /// take the engine's time.
    fn searchable(&self, pace: u32, clients: u32, changes: usize) -> (Samples, Samples) {
        let index = self.create_index();
        let raw = self.found(&index, pace, |sent| self.requests(&index, pace, clients, changes, sent));
        self.engine.delete(&format!("/{index}"));
        let table = self.attach();
        let ours = self.found(&table, pace, |sent| self.inserts(&table, pace, clients, changes, sent));
        self.detach(&table);
        (ours, raw)
    }

    /// Searches for a part of what is sent.
    fn found(&self, index: &str, pace: u32, send: impl FnOnce(&Sent<'_>) -> Samples) -> Samples {
        let every = pace.div_ceil(SEARCHED) as usize;
        let (sender, sent) = channel();
        let sender = Mutex::new(sender);
        std::thread::scope(|scope| {
            let prober = scope.spawn(|| self.search(index, sent));
            send(&|place, start| {
                if place % every == 0 {
                    let sender = sender.lock().expect("no client has failed");
                    sender.send((self.documents[place].0.clone(), start)).expect("the prober waits");
                }
            });
            drop(sender);
            prober.join().expect("the prober ended badly")
        })
    }

    /// Searches for all that was sent and not found yet, until all is found: milliseconds of each.
    fn search(&self, table: &str, sent: Receiver<(String, Instant)>) -> Samples {
        let mut missing: HashMap<String, Instant> = HashMap::new();
        let mut found = Samples::default();
        let mut last_news = Instant::now();
        loop {
            match sent.recv_timeout(Duration::from_millis(10)) {
                Ok(first) => missing.extend(std::iter::once(first).chain(sent.try_iter())),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) if missing.is_empty() => return found,
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => std::thread::sleep(Duration::from_millis(10)),
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
            }
            if missing.is_empty() {
                continue;
            }
            let ids: Vec<&String> = missing.keys().collect();
            for id in self.engine.search_ids(table, json!({"ids": {"values": ids}})) {
                if let Some(start) = missing.remove(&id) {
                    found.add(start.elapsed().as_secs_f64() * 1e3);
                    last_news = Instant::now();
                }
            }
            assert!(last_news.elapsed() < wait::LONG, "{} rows are not found", missing.len());
        }
    }

    /// Inserts rows at the pace: milliseconds of each with its commit. `sent` gets each one's place and start.
    fn inserts(&self, table: &str, pace: u32, clients: u32, changes: usize, sent: &Sent<'_>) -> Samples {
        let sql = format!("insert into {table} select * from source where id = $1");
        let connect = || {
            let mut client = self.server.connect("bench");
            let insert = client.prepare(&sql).expect("could not prepare the insert");
            (client, insert)
        };
        paced(pace, clients, changes, connect, |(client, insert), place| {
            let start = Instant::now();
            client.execute(&*insert, &[&(place as i64 + 1)]).expect("could not insert");
            let took = start.elapsed();
            sent(place, start);
            took
        })
    }

    /// An empty table that is attached and has its index.
    fn attach(&self) -> String {
        let table = unique("latency");
        let mut client = self.server.connect("bench");
        client
            .batch_execute(&format!("create table {table} {}; select es_sync.attach('{table}')", corpus::COLUMNS))
            .expect("could not attach a table");
        let state = format!("select state from es_sync.status where relation = '{table}'::regclass");
        wait::until_equal("the empty table is loaded", wait::LONG, "ok".to_owned(), || {
            client.query_one(&state, &[]).expect("could not read the status").get(0)
        });
        table
    }

    fn detach(&self, table: &str) {
        let detach = format!("select es_sync.detach('{table}', drop_index => true)");
        self.server.connect("bench").batch_execute(&detach).expect("could not detach");
        wait::until("the index is gone", wait::SHORT, || !self.engine.exists(table));
    }
}

/// Does something `changes` times, `pace` times a second in all, from so many threads, each with what `open` gives it.
/// Milliseconds of each. One that is late delays only those of its own thread.
fn paced<T>(
    pace: u32,
    clients: u32,
    changes: usize,
    open: impl Fn() -> T + Sync,
    work: impl Fn(&mut T, usize) -> Duration + Sync,
) -> Samples {
    let (open, work) = (&open, &work);
    // Until then all have their connections.
    let begin = Instant::now() + Duration::from_millis(300);
    let client = |number: u32| {
        let mut tool = open();
        let mut samples = Samples::default();
        for place in (number as usize..changes).step_by(clients as usize) {
            let due = begin + Duration::from_secs(1) * place as u32 / pace;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            samples.add(work(&mut tool, place).as_secs_f64() * 1e3);
        }
        samples
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..clients).map(|number| scope.spawn(move || client(number))).collect();
        let mut all = Samples::default();
        for client in clients {
            all.extend(client.join().expect("a client ended badly"));
        }
        all
    })
}
