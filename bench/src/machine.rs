//! The machine and the versions that the figures come from, and processor time of others.

use crate::report::Report;
use pg_es_sync_tests::{Engine, process};
use std::process::Command;
use std::time::Duration;

pub fn describe(report: &mut Report, engine: &Engine, command: &str) {
    let output = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
    };
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let commit = output("git", &["-C", root, "-c", "safe.directory=*", "describe", "--always", "--dirty"]);
    let postgres = output(&format!("{}/postgres", process::setting("PG_BIN")), &["--version"]);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let nodes = engine.get("/_nodes?filter_path=nodes.*.version");
    let version = nodes["nodes"].as_object().and_then(|nodes| nodes.values().next()?["version"].as_str());
    let heap = engine.get("/_nodes/stats/jvm");
    let heap = find(&heap, "heap_max_in_bytes");
    report.line("# Benchmarks");
    report.line("");
    report.line(&format!(
        "Written by `{}`; do not edit. The ratios are what to look at: each figure and the one it is",
        command.trim_start_matches("QUICK=1 ")
    ));
    report.line("compared with were measured in turns on the same machine.");
    report.line("");
    report.line(&format!("- {}, commit {commit}, `{command}`", output("date", &["-u", "+%Y-%m-%d %H:%M UTC"])));
    report.line(&format!(
        "- {cores} cores ({}), {:.0} GB of memory, Linux {}, load average {} at the start",
        field("/proc/cpuinfo", "model name"),
        field("/proc/meminfo", "MemTotal").split(' ').next().and_then(|kb| kb.parse::<f64>().ok()).unwrap_or(0.0) / 1e6,
        output("uname", &["-r"]),
        std::fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').next().unwrap_or_default(),
    ));
    report.line(&format!(
        "- {}; Elasticsearch {} with a heap of {:.1} GB. Postgres, engine, worker and client share the cores.",
        postgres.trim_start_matches("postgres ").replace("(PostgreSQL)", "PostgreSQL"),
        version.unwrap_or("of unknown version"),
        heap / 1e9,
    ));
    report.line("");
}

/// The first line of a file of "name : value" lines that has this name.
fn field(path: &str, name: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let mut values = text.lines().filter(|line| line.starts_with(name)).filter_map(|line| line.split_once(':'));
    values.next().map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

/// The first number of this name anywhere in an answer: there is one node.
fn find(answer: &serde_json::Value, name: &str) -> f64 {
    match answer {
        serde_json::Value::Object(object) => match object.get(name) {
            Some(value) => value.as_f64().unwrap_or_default(),
            None => object.values().map(|value| find(value, name)).find(|value| *value > 0.0).unwrap_or_default(),
        },
        _ => 0.0,
    }
}

/// Seconds of processor time that the engine has used.
pub fn engine_seconds(engine: &Engine) -> f64 {
    find(&engine.get("/_nodes/stats/process")["nodes"], "total_in_millis") / 1e3
}

/// The same for a process, with all of its threads.
pub fn process_seconds(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in parentheses, may hold blanks; user and system time are fields 14 and 15, in hundredths.
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Waits until the engine has done what it does after its start or a large load.
pub fn quiet(engine: &Engine) {
    for _ in 0..30 {
        let before = engine_seconds(engine);
        std::thread::sleep(Duration::from_secs(1));
        if engine_seconds(engine) - before < 0.1 {
            return;
        }
    }
}
