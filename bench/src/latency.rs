//! How late a change arrives: from its commit to the engine's acknowledgement, at a steady trickle of small commits,
//! beside the round trip of the same documents sent raw at the same pace.

use crate::load::Bench;
use crate::report::{Report, Samples, row};
use crate::{Scale, raw};
use pg_es_sync_tests::{unique, wait};
use std::time::{Duration, Instant};

const PACE: Duration = Duration::from_millis(10);
const RAW_REQUESTS: usize = 200;

pub fn measure(report: &mut Report, bench: &Bench, scale: &Scale) {
    let changes = scale.latency_seconds as usize * 100;
    let (mut raw_p50, mut raw_p99) = (Samples::default(), Samples::default());
    let (mut p50, mut p99, mut commit) = (Samples::default(), Samples::default(), Samples::default());
    // The first round warms up.
    for round in 0..=scale.latency_rounds {
        let trips = round_trips(bench);
        let (ours, insert) = trickle(bench, changes);
        if round > 0 {
            raw_p50.add(trips.median());
            raw_p99.add(trips.quantile(0.99));
            p50.add(ours.0);
            p99.add(ours.1);
            commit.add(insert);
        }
    }

    report.line("## Latency");
    report.line("");
    report.line(&format!(
        "Single-row INSERTs, 100 a second for {} s, fsync on: from commit to the engine's acknowledgement, as",
        scale.latency_seconds
    ));
    report.line(&format!(
        "es_sync.status says (a bucket's upper bound, up to a quarter too high), beside {RAW_REQUESTS} one-document `_bulk`"
    ));
    report.line(&format!("round trips at the same pace; medians of {} turns.", p50.count()));
    report.line("");
    let median = |samples: &Samples| format!("{:.2}", samples.median());
    report.table(&[
        row(["", "p50 ms", "range", "p99 ms", "range"]),
        row([
            "raw `_bulk` of one document",
            &median(&raw_p50),
            &raw_p50.range(2),
            &median(&raw_p99),
            &raw_p99.range(2),
        ]),
        row(["commit to acknowledged", &median(&p50), &p50.range(2), &median(&p99), &p99.range(2)]),
        row(["ratio", &median(&p50.over(&raw_p50)), &p50.over(&raw_p50).range(2), &median(&p99.over(&raw_p99)), ""]),
    ]);
    report.line(&format!("The INSERT with its commit took its client {} ms (p50).", median(&commit)));
}

/// Milliseconds of each one-document request.
fn round_trips(bench: &Bench) -> Samples {
    let index = unique("trips");
    bench.create_index(&index, "1s");
    let mut samples = Samples::default();
    let mut pace = Pace::new();
    for document in bench.documents.iter().take(RAW_REQUESTS) {
        let body = raw::bodies(std::slice::from_ref(document), 1);
        pace.wait();
        let start = Instant::now();
        raw::one(&bench.client, &index, &body[0]);
        samples.add(start.elapsed().as_secs_f64() * 1e3);
    }
    bench.engine.delete(&format!("/{index}"));
    samples
}

/// Commits at the pace into a table of its own: (p50, p99) to the acknowledgement, and p50 of the INSERT, all in ms.
fn trickle(bench: &Bench, changes: usize) -> ((f64, f64), f64) {
    let mut client = bench.server.connect("bench");
    let table = unique("trickle");
    client
        .batch_execute(&format!("create table {table} (like articles including all); select es_sync.attach('{table}')"))
        .expect("could not attach a table");
    let status = format!(
        "select state, latency_p50_ms, latency_p99_ms, coalesce(indexed, 0)
           from es_sync.status where relation = '{table}'::regclass"
    );
    wait::until("the empty table is loaded", wait::LONG, || {
        let state: String = client.query_one(&status, &[]).expect("could not read the status").get(0);
        if state == "ok" { Ok(()) } else { Err(state) }
    });
    let insert = client
        .prepare(&format!("insert into {table} select * from articles where id = $1"))
        .expect("could not prepare the insert");
    let mut inserts = Samples::default();
    let mut pace = Pace::new();
    for id in 1..=changes as i64 {
        pace.wait();
        let start = Instant::now();
        client.execute(&insert, &[&id]).expect("could not insert");
        inserts.add(start.elapsed().as_secs_f64() * 1e3);
    }
    let latency = wait::until("all is acknowledged", wait::SHORT, || {
        let row = client.query_one(&status, &[]).expect("could not read the status");
        let indexed: i64 = row.get(3);
        if indexed == changes as i64 { Ok((row.get(1), row.get(2))) } else { Err(indexed) }
    });
    client.batch_execute(&format!("select es_sync.detach('{table}', drop_index => true)")).expect("could not detach");
    wait::until("the index is gone", wait::SHORT, || !bench.engine.exists(&table));
    (latency, inserts.median())
}

/// Wakes every ten milliseconds, without drifting.
struct Pace(Instant);

impl Pace {
    fn new() -> Pace {
        Pace(Instant::now())
    }

    fn wait(&mut self) {
        self.0 += PACE;
        std::thread::sleep(self.0.saturating_duration_since(Instant::now()));
    }
}
