//! `make bench`: what writers pay for capture, how fast documents are delivered, how late a change arrives, and what
//! faults cost. Each figure stands beside the least that the same work costs without us, measured in turns with it, so
//! that the ratio holds on other machines too. A full run writes docs/benchmarks.md and its chart; QUICK=1 measures less
//! and ONLY=writers,latency some sections, and both only print.
//!
//! Runs only through scripts/test.sh bench, which provides Postgres and the engines.

mod chart;
mod corpus;
mod delivery;
mod faults;
mod latency;
mod machine;
mod raw;
mod report;
mod transactions;
mod writers;

use report::Report;
use std::path::Path;

/// How much is measured.
pub struct Scale {
    writer_rows: u32,
    writer_rounds: usize,
    transaction_rounds: usize,
    transaction_seconds: u32,
    /// Of the documents of each size.
    delivery_percent: usize,
    delivery_rounds: usize,
    latency_rounds: usize,
    latency_seconds: u32,
    outage_seconds: u32,
    outage_rounds: usize,
}

const FULL: Scale = Scale {
    writer_rows: 200_000,
    writer_rounds: 12,
    transaction_rounds: 5,
    transaction_seconds: 3,
    delivery_percent: 100,
    delivery_rounds: 3,
    latency_rounds: 3,
    latency_seconds: 8,
    outage_seconds: 30,
    outage_rounds: 3,
};
const QUICK: Scale = Scale {
    writer_rows: 60_000,
    writer_rounds: 4,
    transaction_rounds: 1,
    transaction_seconds: 1,
    delivery_percent: 10,
    delivery_rounds: 1,
    latency_rounds: 1,
    latency_seconds: 3,
    outage_seconds: 5,
    outage_rounds: 1,
};

/// In the order of the report.
type Section = (&'static str, fn(&mut Report, &Scale));
const SECTIONS: [Section; 5] = [
    ("writers", writers::measure),
    ("transactions", transactions::measure),
    ("delivery", delivery::measure),
    ("latency", latency::measure),
    ("faults", faults::measure),
];

fn main() {
    let quick = std::env::var("QUICK").is_ok_and(|value| !value.is_empty() && value != "0");
    let only = std::env::var("ONLY").unwrap_or_default();
    let only: Vec<&str> = only.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    if let Some(name) = only.iter().find(|name| SECTIONS.iter().all(|section| section.0 != **name)) {
        let names = SECTIONS.map(|section| section.0).join(", ");
        eprintln!("error: ONLY names no section \"{name}\"; there are {names}");
        std::process::exit(2);
    }
    let scale = if quick { QUICK } else { FULL };
    let mut report = Report::new();
    machine::describe(&mut report, if quick { "QUICK=1 make bench" } else { "make bench" });
    report.summary_goes_here();
    for (name, measure) in SECTIONS {
        if only.is_empty() || only.contains(&name) {
            let start = std::time::Instant::now();
            measure(&mut report, &scale);
            println!("({name}: {:.0} s)\n", start.elapsed().as_secs_f64());
        }
    }
    println!("{}", report.summary());
    if !quick && only.is_empty() {
        report.write(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs"));
    }
}
