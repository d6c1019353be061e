//! `make bench`: what writers pay for capture, how fast a first load is, how late a change arrives,
//! and what faults cost. Each figure
//! stands beside the least that the same work costs without us, measured in turns with it, so that the ratio holds on
//! other machines too. A full run writes docs/benchmarks.md; QUICK=1 takes a third of the rows and only prints.
//! With the argument "long" it measures bounds and growth instead, for docs/benchmarks-long.md; with the name of one of
//! its sections only that, and only prints.
//!
//! Runs only through scripts/test.sh bench, which provides Postgres and the engine.

mod bounds;
mod faults;
mod growth;
mod latency;
mod load;
mod machine;
mod peer;
mod raw;
mod report;
mod targets;
mod writers;

use pg_es_sync_tests::Engine;
use report::Report;
use std::path::Path;

/// How much is measured.
struct Scale {
    writer_rows: u32,
    writer_rounds: usize,
    load_rows: u32,
    load_rounds: usize,
    latency_seconds: u32,
    latency_rounds: usize,
    outage_seconds: u32,
    outage_rounds: usize,
}

const FULL: Scale = Scale {
    writer_rows: 200_000,
    writer_rounds: 6,
    load_rows: 100_000,
    load_rounds: 3,
    latency_seconds: 10,
    latency_rounds: 3,
    outage_seconds: 60,
    outage_rounds: 3,
};
const QUICK: Scale = Scale {
    writer_rows: 66_000,
    writer_rounds: 3,
    load_rows: 33_000,
    load_rounds: 3,
    latency_seconds: 3,
    latency_rounds: 3,
    outage_seconds: 10,
    outage_rounds: 1,
};

fn main() {
    let quick = std::env::var("QUICK").is_ok_and(|value| !value.is_empty() && value != "0");
    let scale = if quick { QUICK } else { FULL };
    let engine = Engine::elasticsearch();
    machine::quiet(&engine);
    let mut report = Report::new();
    match std::env::args().nth(1).as_deref() {
        None => {}
        Some("long") => return long(&mut report, &engine, quick),
        Some("peer") => return peer::measure(&mut report, quick),
        Some("bounds") => return bounds::measure(&mut report, &engine, quick),
        Some("growth") => return growth::measure(&mut report, &engine, quick),
        Some(other) => panic!("there is no section \"{other}\""),
    }
    machine::describe(&mut report, &engine, if quick { "QUICK=1 make bench" } else { "make bench" });
    writers::measure(&mut report, &scale);
    let bench = load::Bench::new(&engine, &scale);
    bench.measure(&mut report, &scale);
    latency::measure(&mut report, &bench, &scale);
    drop(bench);
    peer::measure(&mut report, quick);
    faults::measure(&mut report, &scale);
    if !quick {
        report.write(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks.md"));
    }
}

/// What takes long, and changes rarely.
fn long(report: &mut Report, engine: &Engine, quick: bool) {
    machine::describe(report, engine, if quick { "QUICK=1 make bench-long" } else { "make bench-long" });
    growth::measure(report, engine, quick);
    bounds::measure(report, engine, quick);
    if !quick {
        report.write(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks-long.md"));
    }
}
