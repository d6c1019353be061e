//! `make bench`: what writers pay for capture, how fast documents are delivered, how late a change arrives, how PGSync does
//! at the same, and what faults cost. Each figure stands beside the least that the same work costs without us, measured
//! in turns with it, so that the ratio holds on other machines too. `make bench-long`: what is bounded, and whether size
//! matters.
//!
//! A full run writes docs/benchmarks.md and its chart, or docs/benchmarks-long.md; QUICK=1 measures less and
//! ONLY=writers,latency some sections, and both only print.
//!
//! Runs only through scripts/test.sh bench and bench-long, which provide Postgres and the engines.

mod bounds;
mod chart;
mod corpus;
mod delivery;
mod documents;
mod faults;
mod growth;
mod latency;
mod machine;
mod peer;
mod raw;
mod report;
mod transactions;
mod writers;

use pg_es_sync_tests::Engine;
use report::{Report, Turns};
use std::path::Path;

/// How much is measured.
pub struct Scale {
    writer_rows: u32,
    writer_rounds: usize,
    view_rounds: usize,
    transaction_clients: &'static [u32],
    transaction_rounds: usize,
    transaction_seconds: u32,
    /// Of the documents of each size.
    delivery_percent: usize,
    delivery_turns: Turns,
    fan_out_rounds: usize,
    latency_rounds: usize,
    latency_seconds: u32,
    peer: peer::Scale,
    outage_seconds: u32,
    outage_rounds: usize,
    growth: growth::Scale,
    bounds: bounds::Scale,
}

const FULL: Scale = Scale {
    writer_rows: 200_000,
    writer_rounds: 16,
    view_rounds: 25,
    transaction_clients: &[1, 4, 16],
    transaction_rounds: 16,
    transaction_seconds: 1,
    delivery_percent: 100,
    delivery_turns: Turns { least: 3, most: 7 },
    fan_out_rounds: 3,
    latency_rounds: 3,
    latency_seconds: 8,
    peer: peer::FULL,
    outage_seconds: 30,
    outage_rounds: 3,
    growth: growth::FULL,
    bounds: bounds::FULL,
};
const QUICK: Scale = Scale {
    writer_rows: 60_000,
    writer_rounds: 4,
    view_rounds: 4,
    transaction_clients: &[1, 16],
    transaction_rounds: 1,
    transaction_seconds: 1,
    delivery_percent: 5,
    delivery_turns: Turns { least: 1, most: 1 },
    fan_out_rounds: 1,
    latency_rounds: 1,
    latency_seconds: 3,
    peer: peer::QUICK,
    outage_seconds: 5,
    outage_rounds: 1,
    growth: growth::QUICK,
    bounds: bounds::QUICK,
};

/// One of the reports.
pub struct Plan {
    command: &'static str,
    title: &'static str,
    introduction: [&'static str; 2],
    /// The names of its files in docs, without their endings.
    file: &'static str,
    /// Whether its figures are ratios throughout, which a chart compares.
    has_chart: bool,
    engines: &'static [fn() -> Engine],
    /// In the order of the report.
    sections: &'static [Section],
    /// Measured by QUICK=1 only if ONLY names it, so that a quick run takes five minutes.
    not_quick: &'static str,
}
type Section = (&'static str, fn(&mut Report, &Scale));

const BENCH: Plan = Plan {
    command: "make bench",
    title: "Benchmarks",
    introduction: [
        "The ratios are what to look at: each figure and the one it is",
        "compared with were measured in turns on the same machine.",
    ],
    file: "benchmarks",
    has_chart: true,
    engines: &[Engine::elasticsearch, Engine::opensearch],
    sections: &[
        ("writers", writers::measure),
        ("transactions", transactions::measure),
        ("delivery", delivery::measure),
        ("latency", latency::measure),
        ("documents", documents::measure),
        ("peer", peer::measure),
        ("faults", faults::measure),
    ],
    not_quick: "faults",
};
const LONG: Plan = Plan {
    command: "make bench-long",
    title: "Benchmarks that take long",
    introduction: ["What is bounded, and whether size matters:", "each figure beside the bound that it has to keep."],
    file: "benchmarks-long",
    has_chart: false,
    engines: &[Engine::elasticsearch],
    sections: &[("growth", growth::measure), ("bounds", bounds::measure)],
    not_quick: "",
};

fn main() {
    let plan = match std::env::args().nth(1).as_deref() {
        Some("long") => LONG,
        _ => BENCH,
    };
    let quick = std::env::var("QUICK").is_ok_and(|value| !value.is_empty() && value != "0");
    let only = std::env::var("ONLY").unwrap_or_default();
    let only: Vec<&str> = only.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    if let Some(name) = only.iter().find(|name| plan.sections.iter().all(|section| section.0 != **name)) {
        let names: Vec<&str> = plan.sections.iter().map(|section| section.0).collect();
        eprintln!("error: ONLY names no section \"{name}\" of {}; there are {}", plan.command, names.join(", "));
        std::process::exit(2);
    }
    let scale = if quick { QUICK } else { FULL };
    let mut report = Report::new();
    machine::describe(&mut report, &plan, quick);
    report.summary_goes_here();
    let mut evenness = machine::Evenness::default();
    for (name, measure) in plan.sections {
        let is_wanted = if only.is_empty() { !quick || *name != plan.not_quick } else { only.contains(name) };
        if is_wanted {
            evenness.sample();
            let start = std::time::Instant::now();
            measure(&mut report, &scale);
            println!("({name}: {:.0} s)\n", start.elapsed().as_secs_f64());
        }
    }
    evenness.sample();
    report.remark(evenness.remark());
    println!("{}", report.summary());
    if !quick && only.is_empty() {
        report.write(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(plan.file), plan.has_chart);
    }
}
