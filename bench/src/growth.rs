//! Whether size matters: the first load by the number of rows, the drain by the size of the backlog.

use crate::bounds::{drained, fill};
use crate::report::Target::AtLeast;
use crate::report::{Report, Samples, row, thousands};
use crate::{machine, raw};
use pg_es_sync_tests::{Engine, Server, unique, wait};
use postgres::Client;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

pub struct Scale {
    loads: [(u32, usize); 3],
    drains: [(u32, usize); 3],
}

pub const FULL: Scale = Scale {
    loads: [(100_000, 5), (1_000_000, 2), (5_000_000, 1)],
    drains: [(10_000, 5), (100_000, 3), (1_000_000, 1)],
};
pub const QUICK: Scale =
    Scale { loads: [(50_000, 3), (100_000, 2), (300_000, 1)], drains: [(5_000, 5), (20_000, 3), (100_000, 1)] };

pub fn measure(report: &mut Report, scale: &crate::Scale) {
    let engine = Engine::elasticsearch();
    let server = Server::builder()
        .conf("es_sync.url", engine.url())
        .conf("shared_buffers", "512MB")
        .conf("max_wal_size", "8GB")
        .conf("log_min_messages", "error")
        .start();
    let mut client = server.create_database("bench");
    report.line("## Growth");
    report.line("");
    loads(report, &mut client, &engine, &scale.growth);
    drains(report, &mut client, &engine, &scale.growth);
}

/// Loads before the first that counts. An engine that has just started gets faster with each of its first few, and the
/// smallest size, which comes first, would seem slow.
const WARM_UP: usize = 5;
/// How the documents are sent raw: as the extension sends them by default.
const CONNECTIONS: usize = 4;
const BODY_MB: usize = 5;
const COLUMNS: &str = "id bigint primary key, title text, n int";

fn loads(report: &mut Report, client: &mut Client, engine: &Engine, scale: &Scale) {
    let table = unique("growth");
    client.batch_execute(&format!("create table {table} ({COLUMNS})")).expect("could not create a table");
    let sender = raw::client(engine.url());
    let (mut rates, mut raw_rates) = (Vec::new(), Vec::new());
    let mut filled = 0;
    for (place, (rows, rounds)) in scale.loads.into_iter().enumerate() {
        client
            .batch_execute(&format!(
                "insert into {table} select i, 'title of row ' || i, i % 1000 from generate_series({filled} + 1, {rows}) i"
            ))
            .expect("could not fill the table");
        client.batch_execute(&format!("vacuum analyze {table}")).expect("could not vacuum a table");
        filled = rows;
        let (mut samples, mut raw_samples) = (Samples::default(), Samples::default());
        let warm_up = if place == 0 { WARM_UP } else { 0 };
        let documents = format!("select id::text, row_to_json(t)::text from {table} t order by t.id");
        let bodies = raw::bodies_of(client, &documents, BODY_MB, 1 << 8);
        for round in 0..warm_up + rounds {
            machine::quiet(engine);
            let (seconds, alike) = load(client, engine, &table, rows);
            machine::quiet(engine);
            let index = raw::create_index(engine, &alike);
            let start = Instant::now();
            raw::send(&sender, &index, &bodies, CONNECTIONS);
            engine.refresh(&index);
            let raw_seconds = start.elapsed().as_secs_f64();
            engine.delete(&format!("/{index}"));
            if round >= warm_up {
                samples.add(f64::from(rows) / seconds);
                raw_samples.add(f64::from(rows) / raw_seconds);
            }
        }
        rates.push((rows, samples));
        raw_rates.push((rows, raw_samples));
    }
    client.batch_execute(&format!("drop table {table}")).expect("could not drop the table");

    report.line("First load of rows of about 60 bytes:");
    report.line("");
    print(report, "rows", "documents/s", &rates);
    report.line(&format!(
        "The same documents sent raw in turns with it, over {CONNECTIONS} connections, bodies of {BODY_MB} MB, then a refresh: the engine itself"
    ));
    report.line("gets slower with the size of its index.");
    report.line("");
    print(report, "documents", "documents/s", &raw_rates);
    figures(report, "load", "rows", &rates, &raw_rates);
}

/// Attaches, waits for the end of the job and detaches: the job's seconds, and what the index was like.
fn load(client: &mut Client, engine: &Engine, table: &str, rows: u32) -> (f64, Value) {
    client.batch_execute(&format!("select es_sync.attach('{table}')")).expect("could not attach the table");
    drained(client);
    let job = "select extract(epoch from finished_at - started_at)::float8 from es_sync.jobs
                where kind = 'load' order by id desc limit 1";
    let seconds = client.query_one(job, &[]).expect("could not read the jobs").get(0);
    assert_eq!(engine.count(table), u64::from(rows), "documents after a load");
    let alike = raw::alike(engine, &engine.indexes_of(table).pop().expect("the load has made an index"));
    client.batch_execute(&format!("select es_sync.detach('{table}', drop_index => true)")).expect("could not detach");
    wait::until("the index is gone", wait::LONG, || !engine.exists(table));
    (seconds, alike)
}

fn drains(report: &mut Report, client: &mut Client, engine: &Engine, scale: &Scale) {
    let table = unique("drain");
    let rows = scale.drains[2].0;
    client
        .batch_execute(&format!(
            "create table {table} ({COLUMNS});
             insert into {table} select i, 'title of row ' || i, 0 from generate_series(1, {rows}) i;
             select es_sync.attach('{table}')"
        ))
        .expect("could not attach a table");
    drained(client);
    let documents =
        |up_to: u32| format!("select id::text, row_to_json(t)::text from {table} t where id <= {up_to} order by id");
    let sender = raw::client(engine.url());
    let alike = raw::alike(engine, &engine.indexes_of(&table).pop().expect("the load has made an index"));
    let index = raw::create_index(engine, &alike);
    let mut version = 1;
    raw::send(&sender, &index, &raw::bodies_of(client, &documents(rows), BODY_MB, version << 8), CONNECTIONS);
    raw::go_live(engine, &index, &alike);
    let (mut rates, mut raw_rates) = (Vec::new(), Vec::new());
    for (place, (backlog, rounds)) in scale.drains.into_iter().enumerate() {
        let (mut samples, mut raw_samples) = (Samples::default(), Samples::default());
        for round in 0..rounds + usize::from(place == 0) {
            machine::quiet(engine);
            client.batch_execute(&format!("select es_sync.pause('{table}')")).expect("could not pause");
            fill(client, &format!("update {table} set n = n + 1 where id between $1 and $2"), backlog, 100);
            let start = Instant::now();
            client.batch_execute(&format!("select es_sync.resume('{table}')")).expect("could not resume");
            // Not `drained`, whose pauses grow: the smallest backlog takes less than a second.
            while client
                .query_opt("select from es_sync.queue limit 1", &[])
                .expect("could not read the queue")
                .is_some()
            {
                assert!(start.elapsed() < Duration::from_secs(600), "a backlog of {backlog} keys was not drained");
                std::thread::sleep(Duration::from_millis(10));
            }
            let seconds = start.elapsed().as_secs_f64();
            version += 1;
            let bodies = raw::bodies_of(client, &documents(backlog), BODY_MB, version << 8);
            machine::quiet(engine);
            let raw_seconds = raw::send(&sender, &index, &bodies, CONNECTIONS).as_secs_f64();
            if place > 0 || round > 0 {
                samples.add(f64::from(backlog) / seconds);
                raw_samples.add(f64::from(backlog) / raw_seconds);
            }
        }
        rates.push((backlog, samples));
        raw_rates.push((backlog, raw_samples));
    }
    engine.delete(&format!("/{index}"));
    let changed = format!("select sum(n)::float8 from {table}");
    let changed: f64 = client.query_one(&changed, &[]).expect("could not add up").get(0);
    engine.refresh(&table);
    let sum = json!({"aggs": {"changed": {"sum": {"field": "n"}}}});
    let sum = engine.post(&format!("/{table}/_search?size=0"), sum);
    assert_eq!(sum["aggregations"]["changed"]["value"], changed, "what the documents add up to");
    client.batch_execute(&format!("select es_sync.detach('{table}', drop_index => true)")).expect("could not detach");
    wait::until("the index is gone", wait::LONG, || !engine.exists(&table));

    report.line("A backlog, written in transactions of 100 rows while the table is paused; from es_sync.resume() until the queue is");
    report.line(&format!("empty. The table has {} rows.", thousands(rows.into())));
    report.line("");
    print(report, "keys", "documents/s", &rates);
    report.line("The same documents sent raw in turns with it, into an index of their own that holds them already:");
    report.line("");
    print(report, "documents", "documents/s", &raw_rates);
    figures(report, "drain", "keys", &rates, &raw_rates);
}

/// How the largest compares with the smallest.
fn figures(report: &mut Report, what: &str, of: &str, rates: &[(u32, Samples)], raw_rates: &[(u32, Samples)]) {
    let growth = |rates: &[(u32, Samples)]| rates[2].1.median() / rates[0].1.median();
    let figure = format!("{what} of {} {of}, to {}", thousands(rates[2].0.into()), thousands(rates[0].0.into()));
    let beside = growth(rates) / growth(raw_rates);
    report.figure("Growth", figure.clone(), growth(rates), AtLeast(0.95));
    report.figure("Growth", format!("{figure}, beside the engine's own"), beside, AtLeast(0.95));
}

fn print(report: &mut Report, what: &str, unit: &str, rates: &[(u32, Samples)]) {
    let mut table = vec![row([what, unit, "range", "turns"])];
    for (size, samples) in rates {
        table.push(row([
            &thousands(f64::from(*size)),
            &thousands(samples.median()),
            &samples.range(0),
            &samples.count().to_string(),
        ]));
    }
    report.table(&table);
}
