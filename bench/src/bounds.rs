//! What is bounded: memory of writers and of the worker, the queue on disk, the cost of a poll that finds nothing.
//! Memory is what is private to a process (RssAnon): shared buffers are counted for nobody.

use crate::machine;
use crate::report::Target::AtMost;
use crate::report::{Report, row, thousands};
use pg_es_sync_tests::{Engine, Fault, Proxy, Server, unique, wait};
use postgres::Client;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What the settings allow to be under way: a body for each connection and one that waits, and the size of each.
const BODIES: f64 = 5.0;
const BODY_MB: f64 = 5.0;
const HOURS: Duration = Duration::from_secs(3600);

pub struct Scale {
    rows: u32,
    /// Documents of 5 MB.
    large: u32,
    /// Single-row commits under a forgotten transaction.
    changes: u32,
    poll_seconds: u64,
}

pub const FULL: Scale = Scale { rows: 5_000_000, large: 60, changes: 1_000_000, poll_seconds: 20 };
pub const QUICK: Scale = Scale { rows: 300_000, large: 15, changes: 50_000, poll_seconds: 5 };

pub fn measure(report: &mut Report, scale: &crate::Scale) {
    let (engine, scale) = (&Engine::elasticsearch(), &scale.bounds);
    report.line("## Bounds");
    report.line("");
    report.line("Memory is what is private to a process, sampled every 5 ms; peaks are beyond what the process had before. In flight");
    report.line(&format!(
        "are at most {BODIES} bodies (es_sync.connections + 1) of {BODY_MB} MB (es_sync.bulk_bytes) or of one larger document."
    ));
    report.line("");
    // A server for each: a worker's memory does not shrink again, and would hide what comes next.
    Bounds::new(engine).transaction(report, scale.rows);
    Bounds::new(engine).backlog(report, scale.rows);
    Bounds::new(engine).large(report, scale.large);
    Bounds::new(engine).polls(report, scale);
}

struct Bounds<'a> {
    engine: &'a Engine,
    proxy: Proxy,
    server: Server,
    client: Client,
}

impl<'a> Bounds<'a> {
    fn new(engine: &'a Engine) -> Bounds<'a> {
        let proxy = Proxy::to(engine.url());
        let server = Server::builder()
            .conf("es_sync.url", proxy.url())
            .conf("shared_buffers", "512MB")
            .conf("max_wal_size", "8GB")
            .conf("log_min_messages", "error")
            .start();
        let mut client = server.create_database("bench");
        client
            .batch_execute(
                "create function empty_trigger() returns trigger language c as '$libdir/libempty_trigger', 'empty_trigger'",
            )
            .expect("could not create the empty trigger's function");
        Bounds { engine, proxy, server, client }
    }

    /// A table and its index, empty, under names that nobody else uses. One change has gone through.
    fn followed(&mut self, name: &str, columns: &str, first_row: &str, options: &str) -> String {
        let table = unique(name);
        self.client
            .batch_execute(&format!(
                "create table {table} ({columns}); select es_sync.attach('{table}', options => '{options}')"
            ))
            .expect("could not attach a table");
        self.drained();
        self.client.batch_execute(&format!("insert into {table} values ({first_row})")).expect("could not insert");
        self.drained();
        table
    }

    fn forget(&mut self, table: &str) {
        let done = self.client.batch_execute(&format!(
            "select es_sync.detach('{table}', drop_index => true); drop table {table}; checkpoint"
        ));
        done.expect("could not drop a table");
        wait::until("the index is gone", wait::LONG, || !self.engine.exists(table));
    }

    fn worker(&self) -> u32 {
        let workers = self.server.workers();
        workers.iter().find(|worker| worker.2 == "bench").expect("the database has a worker").0
    }

    /// Waits until all jobs are done and all changes acknowledged, however long that takes.
    fn drained(&mut self) {
        drained(&mut self.client);
    }

    fn expect_count(&self, index: &str, rows: u32) {
        assert_eq!(self.engine.count(index), u64::from(rows), "documents in {index}");
    }

    fn queue_bytes(&mut self) -> f64 {
        let row = self.client.query_one("select pg_total_relation_size('es_sync.queue')::float8", &[]);
        row.expect("could not read the queue's size").get(0)
    }

    /// One INSERT of so many rows, by writers of three kinds.
    fn transaction(&mut self, report: &mut Report, rows: u32) {
        let mut writers = Vec::new();
        self.client
            .batch_execute(
                "create table plain (id bigint primary key, n int);
                 create table empty (like plain including all);
                 create trigger empty after insert or update or delete on empty
                    for each row execute function empty_trigger()",
            )
            .expect("could not create the tables");
        let attached = self.followed("attached", "id bigint primary key, n int", "0, 0", "{}");
        let worker = self.worker();
        let idle = private(worker);
        let worker_watch = Watch::on(worker);
        let mut queue = 0.0;
        for table in ["plain", "empty", &attached] {
            let mut client = self.server.connect("bench");
            let pid: i32 = client.query_one("select pg_backend_pid()", &[]).expect("pg_backend_pid").get(0);
            let before = private(pid as u32);
            let watch = Watch::on(pid as u32);
            let start = Instant::now();
            let insert = format!("insert into {table} select i, i from generate_series(1, {rows}) i");
            client.batch_execute(&insert).expect("could not insert");
            writers.push((watch.peak() - before, start.elapsed()));
            queue = self.queue_bytes();
        }
        self.drained();
        let peak = worker_watch.peak() - idle;
        self.expect_count(&attached, rows + 1);
        self.forget(&attached);
        self.client.batch_execute("drop table plain, empty").expect("could not drop the tables");

        report.line(&format!("One INSERT of {} rows (two integers), the engine up:", thousands(rows.into())));
        report.line("");
        let mut table = vec![row(["", "peak, MB", "s"])];
        for (name, (bytes, took)) in
            ["writer, no trigger", "writer, empty Rust trigger", "writer, attached"].iter().zip(&writers)
        {
            table.push(row([name, &megabytes(*bytes), &format!("{:.1}", took.as_secs_f64())]));
        }
        table.push(row(["worker, until all was sent", &megabytes(peak), ""]));
        table.push(row(["worker, idle before", &megabytes(idle), ""]));
        table.push(row(["queue on disk after the commit", &megabytes(queue), ""]));
        report.table(&table);
        memory(report, "one transaction: writer beyond the empty trigger", mb(writers[2].0 - writers[1].0));
        memory(report, "one transaction: worker beyond idle and in flight", mb(peak) - BODIES * BODY_MB);
    }

    /// Transactions of 100 rows while the engine is down, then up again.
    fn backlog(&mut self, report: &mut Report, rows: u32) {
        let table = self.followed("backlog", "id bigint primary key, n int", "0, 0", "{}");
        let worker = self.worker();
        let idle = private(worker);
        self.proxy.set(Fault::Refuse);
        let watch = Watch::on(worker);
        fill(&mut self.client, &format!("insert into {table} select n, n from generate_series($1, $2) n"), rows, 100);
        // Long enough for it to try the engine again, and to count.
        std::thread::sleep(Duration::from_secs(10));
        let down = watch.peak() - idle;
        let queue = self.queue_bytes();
        let watch = Watch::on(worker);
        self.proxy.set(Fault::Pass);
        let start = Instant::now();
        self.drained();
        let took = start.elapsed();
        let drain = watch.peak() - idle;
        self.expect_count(&table, rows + 1);
        self.forget(&table);

        report.line(&format!(
            "{} keys in transactions of 100 while the engine is down, then drained:",
            thousands(rows.into())
        ));
        report.line("");
        report.table(&[
            row(["", ""]),
            row(["worker's peak while the engine is down, MB", &megabytes(down)]),
            row(["worker's peak while it drains, MB", &megabytes(drain)]),
            row(["worker, idle before, MB", &megabytes(idle)]),
            row(["queue on disk, MB", &megabytes(queue)]),
            row(["queue, bytes a key", &format!("{:.1}", queue / f64::from(rows))]),
            row(["drained after, s", &format!("{:.0}", took.as_secs_f64())]),
        ]);
        memory(report, "backlog, engine down: worker beyond idle and in flight", mb(down) - BODIES * BODY_MB);
        memory(report, "backlog, draining: worker beyond idle and in flight", mb(drain) - BODIES * BODY_MB);
    }

    /// Documents of 5 MB: a load, then all of them changed by one statement.
    fn large(&mut self, report: &mut Report, rows: u32) {
        let small = self.followed("small", "id bigint primary key, n int", "0, 0", "{}");
        let table = unique("large");
        self.client
            .batch_execute(&format!(
                "create table {table} (id bigint primary key, n int, body text);
                 alter table {table} alter column body set storage external;
                 insert into {table}
                    select i, 0, repeat(md5(i::text), (5 << 20) / 32) from generate_series(1, {rows}) i"
            ))
            .expect("could not make large documents");
        let worker = self.worker();
        let idle = private(worker);
        let watch = Watch::on(worker);
        self.client
            .batch_execute(&format!(
                "select es_sync.attach('{table}',
                    options => '{{\"mappings\": {{\"properties\": {{\"body\": {{\"type\": \"text\", \"index\": false}}}}}}}}')"
            ))
            .expect("could not attach the large documents");
        self.drained();
        let load = watch.peak() - idle;
        let watch = Watch::on(worker);
        self.client.batch_execute(&format!("update {table} set n = n + 1")).expect("could not update");
        self.drained();
        let update = watch.peak() - idle;
        self.expect_count(&table, rows);
        let after = private(worker);
        self.forget(&table);
        self.forget(&small);

        let in_flight = BODIES * (BODY_MB + 0.3);
        report.line(&format!("{rows} documents of 5 MB:"));
        report.line("");
        report.table(&[
            row(["worker", "MB"]),
            row(["peak of the load", &megabytes(load)]),
            row(["peak after one UPDATE of all", &megabytes(update)]),
            row(["idle before", &megabytes(idle)]),
            row(["idle afterwards", &megabytes(after)]),
        ]);
        memory(report, "documents of 5 MB, load: worker beyond idle and in flight", mb(load) - in_flight);
        memory(report, "documents of 5 MB, changes: worker beyond idle and in flight", mb(update) - in_flight);
    }

    /// Polls without changes, before and after many small commits whose dead rows nobody may remove.
    fn polls(&mut self, report: &mut Report, scale: &Scale) {
        let table = self.followed("polled", "id bigint primary key, n int", "0, 0", "{}");
        self.server.conf("es_sync.poll_interval", "10");
        self.server.reload();
        machine::quiet(self.engine);
        let time = Duration::from_secs(scale.poll_seconds);
        let before = poll_cost(self.worker(), time);
        let mut forgotten = self.server.connect("bench");
        forgotten
            .batch_execute(&format!("begin isolation level repeatable read; select count(*) from {table}"))
            .expect("could not open a transaction");
        let start = Instant::now();
        let insert = format!("insert into {table} select n, n from generate_series($1, $2) n");
        fill(&mut self.client, &insert, scale.changes, 1);
        let filled = start.elapsed();
        self.drained();
        let took = start.elapsed();
        // One turn of the worker's care for its queue.
        std::thread::sleep(Duration::from_secs(3));
        let after = poll_cost(self.worker(), time);
        let queue = self.queue_bytes();
        self.expect_count(&table, scale.changes + 1);
        forgotten.batch_execute("rollback").expect("could not end the transaction");
        self.server.conf("es_sync.poll_interval", "1000");
        self.server.reload();
        self.forget(&table);

        report.line(&format!(
            "{} single-row commits under a forgotten idle transaction, and the worker's processor time for a poll that finds",
            thousands(scale.changes.into())
        ));
        report.line(&format!(
            "nothing (over {} s of es_sync.poll_interval = 10 ms, all else that it does then included):",
            scale.poll_seconds
        ));
        report.line("");
        report.table(&[
            row(["", ""]),
            row(["a poll before, µs", &format!("{before:.0}")]),
            row(["a poll after, µs", &format!("{after:.0}")]),
            row(["queue on disk after, MB", &megabytes(queue)]),
            row(["the commits took, s", &format!("{:.0}", filled.as_secs_f64())]),
            row(["all sent after, s", &format!("{:.0}", took.as_secs_f64())]),
        ]);
        report.figure("Bounds", "an empty poll after, to before", after / before, AtMost(1.25));
    }
}

/// Megabytes that a process may take for itself.
fn memory(report: &mut Report, name: &str, megabytes: f64) {
    report.figure("Bounds", format!("{name}, MB"), megabytes, AtMost(64.0));
}

/// Runs a statement with the ranges $1 to $2 of so many numbers, each range in a transaction of its own.
pub fn fill(client: &mut Client, statement: &str, rows: u32, step: u32) {
    let statement = statement.replace("$1", "i").replace("$2", &format!("least(i + {step} - 1, {rows})"));
    let block = format!("do $$ begin for i in 1 .. {rows} by {step} loop {statement}; commit; end loop; end $$");
    client.batch_execute(&block).expect("could not fill a table");
}

/// Waits until all jobs are done and all changes acknowledged, however long that takes.
pub fn drained(client: &mut Client) {
    wait::until("no job runs and the queue is empty", HOURS, || {
        let query = "select not exists (select from es_sync.jobs where state in ('queued', 'running')),
                            coalesce((select sum(pending)::int8 from es_sync.status), 0)
                              + (select count(*) from (select from es_sync.queue limit 1) q),
                            (select max(error) from es_sync.jobs where state = 'failed')";
        let row = client.query_one(query, &[]).expect("could not read the status");
        let (done, pending, error): (bool, i64, Option<String>) = (row.get(0), row.get(1), row.get(2));
        assert_eq!(error, None, "a job failed");
        if done && pending == 0 { Ok(()) } else { Err(pending) }
    });
}

/// Microseconds of processor time for one poll, at a hundred a second.
fn poll_cost(worker: u32, time: Duration) -> f64 {
    // Of its main thread, which polls.
    let before = machine::backend_seconds(worker);
    std::thread::sleep(time);
    (machine::backend_seconds(worker) - before) * 1e6 / (time.as_secs_f64() * 100.0)
}

/// Bytes of private memory.
fn private(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or_default() * 1024.0
}

/// Looks at a process' memory again and again.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<f64>,
}

impl Watch {
    fn on(pid: u32) -> Watch {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut peak = 0f64;
            while !stopped.load(Ordering::Relaxed) {
                peak = peak.max(private(pid));
                std::thread::sleep(Duration::from_millis(5));
            }
            assert!(peak > 0.0, "process {pid} has ended");
            peak
        });
        Watch { stop, thread }
    }

    fn peak(self) -> f64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("could not watch a process")
    }
}

fn mb(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

fn megabytes(bytes: f64) -> String {
    format!("{:.1}", mb(bytes))
}
