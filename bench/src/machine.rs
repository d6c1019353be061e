//! The machine and the versions that the figures come from, and processor time of others.

use crate::Plan;
use crate::report::{Report, Samples};
use pg_es_sync_tests::{Engine, Server, process};
use std::hash::{DefaultHasher, Hasher};
use std::hint::black_box;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

pub fn describe(report: &mut Report, plan: &Plan, quick: bool) {
    let output = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
    };
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let commit = output("git", &["-C", root, "-c", "safe.directory=*", "describe", "--always", "--dirty"]);
    let postgres = output(&format!("{}/postgres", process::setting("PG_BIN")), &["--version"]);
    let cores = cores();
    let command = format!("{}{}", if quick { "QUICK=1 " } else { "" }, plan.command);
    let engines: Vec<String> = plan.engines.iter().map(|engine| version(&engine())).collect();
    report.line(&format!("# {}", plan.title));
    report.line("");
    report.line(&format!("Written by `{}`; do not edit. {}", plan.command, plan.introduction[0]));
    report.line(plan.introduction[1]);
    report.line("");
    report.line(&format!("- {}, commit {commit}, `{command}`", output("date", &["-u", "+%Y-%m-%d %H:%M UTC"])));
    report.line(&format!(
        "- {cores} cores ({}), {:.0} GB of memory, Linux {}, load average {} at the start",
        field("/proc/cpuinfo", "model name"),
        field("/proc/meminfo", "MemTotal").split(' ').next().and_then(|kb| kb.parse::<f64>().ok()).unwrap_or(0.0) / 1e6,
        kernel(&output("uname", &["-r"])),
        std::fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').next().unwrap_or_default(),
    ));
    report.line(&format!(
        "- {}; {}. Postgres, engine, worker and client share the cores.",
        postgres.trim_start_matches("postgres ").replace("(PostgreSQL)", "PostgreSQL"),
        engines.join("; "),
    ));
    report.line("");
}

/// "6.18" of "6.18.44-cloud-amd64": whose build it is says nothing to a reader.
fn kernel(release: &str) -> String {
    release.split('.').take(2).collect::<Vec<_>>().join(".")
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// How evenly the machine works: a virtual one may get a different share of a real one at each moment. The same piece of
/// work is timed, on all cores at once.
#[derive(Default)]
pub struct Evenness(Samples);

impl Evenness {
    const PIECES: usize = 20;
    /// Hashed in some 30 to 60 ms.
    const PIECE: usize = 1_000;

    pub fn sample(&mut self) {
        let threads: Vec<_> = (0..cores()).map(|_| thread::spawn(|| [(); Self::PIECES].map(|()| piece()))).collect();
        for thread in threads {
            thread.join().expect("hashing does not fail").into_iter().for_each(|time| self.0.add_time(time));
        }
    }

    pub fn remark(&self) -> String {
        let to_median = |share| self.0.quantile(share) / self.0.median();
        format!(
            "How even the machine was: of {} equal pieces of processor work, done on all cores at once between the sections,\n\
             one in ten took less than {:.2} and one in ten more than {:.2} of their median. Where these lie far from 1, so may\n\
             ratios of few turns from what they would be elsewhere.",
            self.0.count(),
            to_median(0.1),
            to_median(0.9),
        )
    }
}

fn piece() -> Duration {
    let start = Instant::now();
    let mut hasher = DefaultHasher::new();
    (0..Evenness::PIECE).for_each(|_| hasher.write(black_box(&[7; 64 << 10])));
    black_box(hasher.finish());
    start.elapsed()
}

fn version(engine: &Engine) -> String {
    let nodes = engine.get("/_nodes?filter_path=nodes.*.version");
    let version = nodes["nodes"].as_object().and_then(|nodes| nodes.values().next()?["version"].as_str());
    let heap = find(&engine.get("/_nodes/stats/jvm"), "heap_max_in_bytes");
    let version = version.unwrap_or("of unknown version");
    format!("{:?} {version} with a heap of {:.1} GB", engine.product(), heap / 1e9)
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

/// Seconds of processor time that the engine has used. Not what it says itself, which is up to a second old.
pub fn engine_seconds(engine: &Engine) -> f64 {
    process_seconds(engine_process(engine))
}

fn engine_process(engine: &Engine) -> u32 {
    let nodes = engine.get("/_nodes/process?filter_path=nodes.*.process.id");
    let pid = find(&nodes, "id") as u32;
    assert!(process_seconds(pid) > 0.0, "the engine has to run on this machine: {nodes}");
    pid
}

/// The same for a process, with all of its threads.
pub fn process_seconds(pid: u32) -> f64 {
    stat_seconds(pid, 2)
}

fn stat_seconds(pid: u32, fields: usize) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in parentheses, may hold blanks; user and system time are fields 14 and 15, those of children that have
    // ended 16 and 17, in hundredths.
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(fields);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// The same in nanoseconds' resolution, for a process' main thread: a backend has no other.
pub fn backend_seconds(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
    text.split(' ').next().and_then(|nanos| nanos.parse::<f64>().ok()).unwrap_or_default() / 1e9
}

/// The same for a server with all of its processes, those that have ended included.
pub fn postgres_seconds(server: &Server) -> f64 {
    let file = std::fs::read_to_string(server.data().join("postmaster.pid")).expect("the server runs");
    let postmaster: u32 = file.lines().next().and_then(|pid| pid.parse().ok()).expect("the file begins with the pid");
    let is_child = |pid: &u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = text.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
        parent.and_then(|pid| pid.parse().ok()) == Some(postmaster)
    };
    let processes = std::fs::read_dir("/proc").expect("there is a /proc").flatten();
    let processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let running: f64 = processes.filter(is_child).map(process_seconds).sum();
    running + stat_seconds(postmaster, 4)
}

/// Waits until the engine has done what it does after its start or a large load: merges above all.
pub fn quiet(engine: &Engine) {
    let pid = engine_process(engine);
    for _ in 0..60 {
        let before = process_seconds(pid);
        thread::sleep(Duration::from_millis(500));
        if process_seconds(pid) - before < 0.05 {
            return;
        }
    }
}
