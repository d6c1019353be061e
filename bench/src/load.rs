//! The first load beside the engine's own limit: the same documents sent raw, in turns.

use crate::raw::{self, Document, Way};
use crate::report::{Report, Samples, row, thousands};
use crate::{Scale, machine};
use pg_es_sync_tests::{Engine, Server, wait};
use postgres::Client;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const TABLE: &str = "articles";

/// A server with a table of documents, attached and loaded once.
pub struct Bench<'a> {
    pub engine: &'a Engine,
    pub server: Server,
    pub client: es::Client,
    /// The mapping that the extension made.
    pub mappings: Value,
    pub documents: Vec<Document>,
}

impl<'a> Bench<'a> {
    pub fn new(engine: &'a Engine, scale: &Scale) -> Bench<'a> {
        let server = Server::builder()
            .conf("es_sync.url", engine.url())
            .conf("shared_buffers", "512MB")
            .conf("max_wal_size", "4GB")
            .durable()
            .start();
        let mut client = server.create_database("bench");
        // Words of a natural length, repeated as those of a language are.
        let rows = scale.load_rows;
        client
            .batch_execute(&format!(
                "create table {TABLE} (id bigint primary key, title text, body text, tags text[], price numeric,
                                       stock int, active bool, created_at timestamptz);
                 create function word(n int) returns text language sql immutable as
                    $$ select left(md5(n::text), 3 + n % 8) $$;
                 select setseed(0.5);
                 insert into {TABLE}
                    select i, word(i % 5000) || ' ' || word(i * 7 % 5000),
                           (select string_agg(word((5000 * random() ^ 3)::int + n * 0), ' ')
                              from generate_series(1, 85 + i % 30) n),
                           array[word(i % 20), word(i % 30)], (i % 100000) / 100.0, i % 1000, i % 3 = 0,
                           timestamptz '2026-01-01' + i * interval '1 minute'
                      from generate_series(1, {rows}) i"
            ))
            .expect("could not fill the table");
        client.batch_execute(&format!("vacuum analyze {TABLE}")).expect("could not vacuum a table");
        let documents = client.query(&format!("select id::text, row_to_json(t)::text from {TABLE} t order by id"), &[]);
        let documents: Vec<Document> =
            documents.expect("could not read the documents").into_iter().map(|row| (row.get(0), row.get(1))).collect();
        println!("warming up the engine");
        let bench = Bench { engine, client: raw::client(engine.url()), server, mappings: Value::Null, documents };
        attach(&mut client);
        bench.loaded(&mut client);
        let live: String =
            client.query_one("select live_index from es_sync.status", &[]).expect("could not read the status").get(0);
        let mappings = engine.get(&format!("/{live}"))[&live]["mappings"].clone();
        let sent: Value = serde_json::from_str(&bench.documents[0].1).expect("a document is JSON");
        let stored = &engine.get(&format!("/{TABLE}/_doc/{}", bench.documents[0].0))["_source"];
        assert_eq!(stored, &sent, "a document of the load differs from the one that is sent raw");
        bench.detach(&mut client);
        Bench { mappings, ..bench }
    }

    /// Waits for the end of the last job; its time.
    fn loaded(&self, client: &mut Client) -> Duration {
        let seconds = wait::until("the load is done", Duration::from_secs(300), || {
            let row = client.query_one(
                "select state, extract(epoch from finished_at - started_at)::float8, error, phase
                   from es_sync.jobs where kind = 'load' order by id desc limit 1",
                &[],
            );
            let row = row.expect("could not read the jobs");
            let state: String = row.get(0);
            assert_ne!(state, "failed", "{:?}", row.get::<_, Option<String>>(2));
            if state == "done" { Ok(row.get::<_, f64>(1)) } else { Err(row.get::<_, Option<String>>(3)) }
        });
        assert_eq!(self.engine.count(TABLE), self.documents.len() as u64, "documents after the load");
        Duration::from_secs_f64(seconds)
    }

    fn detach(&self, client: &mut Client) {
        client.batch_execute(&format!("select es_sync.detach('{TABLE}', drop_index => true)")).expect("detach");
        wait::until("the index is gone", wait::SHORT, || !self.engine.exists(TABLE));
    }

    /// Makes an index as the extension does for a load.
    pub fn create_index(&self, name: &str, refresh: &str) {
        let settings = json!({"index": {"refresh_interval": refresh, "number_of_replicas": 0}});
        self.engine.put(&format!("/{name}"), json!({"settings": settings, "mappings": self.mappings}));
    }

    /// Sends documents raw into a new index: the time of `_bulk` alone, and with what makes them searchable.
    fn raw(&self, bodies: &[es::Body], way: Way) -> (Duration, Duration) {
        self.create_index("raw", "-1");
        let start = Instant::now();
        let bulk = raw::send(&self.client, "raw", bodies, way.connections);
        self.engine.refresh("raw");
        let searchable = start.elapsed();
        let count: usize = bodies.iter().map(es::Body::operations).sum();
        assert_eq!(self.engine.count("raw"), count as u64, "documents after a raw run");
        self.engine.delete("/raw");
        (bulk, searchable)
    }

    /// Tries the ways on a part of the documents, twice each: the fastest.
    fn best_way(&self) -> (Way, Vec<(Way, f64)>) {
        let part = &self.documents[..self.documents.len().min(33_000)];
        let ways = [1, 5].into_iter().flat_map(|megabytes| [1, 2, 4].map(|connections| Way { connections, megabytes }));
        let mut tried: Vec<(Way, f64)> = ways.map(|way| (way, 0.0)).collect();
        for _ in 0..2 {
            for (way, best) in &mut tried {
                let (bulk, _) = self.raw(&raw::bodies(part, way.megabytes), *way);
                *best = best.max(part.len() as f64 / bulk.as_secs_f64());
            }
        }
        let best = tried.iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("there are ways");
        (best.0, tried)
    }

    pub fn measure(&self, report: &mut Report, scale: &Scale) {
        let mut client = self.server.connect("bench");
        let (way, tried) = self.best_way();
        let bodies = raw::bodies(&self.documents, way.megabytes);
        let worker = || {
            let workers = self.server.workers();
            workers.iter().find(|worker| worker.2 == "bench").expect("the database has a worker").0
        };
        let (mut bulk, mut searchable, mut load) = (Samples::default(), Samples::default(), Samples::default());
        let (mut raw_cpu, mut load_cpu, mut worker_cpu) = (Samples::default(), Samples::default(), Samples::default());
        for _ in 0..scale.load_rounds {
            machine::quiet(self.engine);
            let before = machine::engine_seconds(self.engine);
            let (first, second) = self.raw(&bodies, way);
            bulk.add_time(first);
            searchable.add_time(second);
            raw_cpu.add(machine::engine_seconds(self.engine) - before);

            machine::quiet(self.engine);
            let pid = worker();
            let (before, worker_before) = (machine::engine_seconds(self.engine), machine::process_seconds(pid));
            attach(&mut client);
            load.add_time(self.loaded(&mut client));
            worker_cpu.add(machine::process_seconds(pid) - worker_before);
            load_cpu.add(machine::engine_seconds(self.engine) - before);
            self.detach(&mut client);
        }

        let count = self.documents.len() as f64;
        let bytes: usize = self.documents.iter().map(|(_, document)| document.len()).sum();
        report.line("## First load");
        report.line("");
        report.line(&format!(
            "{} documents of {:.0} bytes, from attach's job start to its end, beside the same documents sent raw from",
            thousands(count),
            bytes as f64 / count
        ));
        report.line(&format!(
            "memory into an index of the same mapping, over {way} (the fastest of those tried); medians of {} turns.",
            load.count()
        ));
        report.line(
            "es_sync.connections and es_sync.bulk_bytes have their defaults. The load includes creating the index,",
        );
        report.line("refreshing it and swapping it in.");
        report.line("");
        let mut table =
            vec![row(["", "documents/s", "range", "share of raw `_bulk`", "CPU s, engine", "CPU s, worker"])];
        let rate = |samples: &Samples| samples.map(|seconds| count / seconds);
        for (name, samples, engine_cpu, worker_cpu) in [
            ("raw `_bulk`", &bulk, Some(&raw_cpu), None),
            ("raw `_bulk`, then a refresh", &searchable, None, None),
            ("first load", &load, Some(&load_cpu), Some(&worker_cpu)),
        ] {
            let rates = rate(samples);
            let seconds = |samples: Option<&Samples>| samples.map_or(String::new(), |s| format!("{:.1}", s.median()));
            table.push(row([
                name,
                &thousands(rates.median()),
                &format!("{} to {}", thousands(rates.quantile(0.0)), thousands(rates.quantile(1.0))),
                &format!("{:.2}", bulk.over(samples).median()),
                &seconds(engine_cpu),
                &seconds(worker_cpu),
            ]));
        }
        report.table(&table);
        report.line(&format!(
            "Against raw with its refresh, the load runs at **{:.2}** ({}). Raw, as tried with {} documents:",
            searchable.over(&load).median(),
            searchable.over(&load).range(2),
            thousands(count.min(33_000.0))
        ));
        report.line("");
        let mut table = vec![row(["raw", "documents/s"])];
        table.extend(tried.iter().map(|(way, rate)| row([&way.to_string(), &thousands(*rate)])));
        report.table(&table);
    }
}

fn attach(client: &mut Client) {
    client.batch_execute(&format!("select es_sync.attach('{TABLE}')")).expect("could not attach the table");
}
