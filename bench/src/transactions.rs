//! What capture costs small transactions: pgbench's single-row updates, prepared, with a table without a trigger, with an
//! empty one, and attached: paused, draining into a stub, and into the engine.
//!
//! Each attached table has a database of its own, because the address of the engine is the database's.

use crate::report::Target::AtLeast;
use crate::report::{Report, Samples, row, thousands};
use crate::{Scale, machine, writers};
use pg_es_sync_tests::{Engine, Proxy, Server, process, unique, wait};
use std::path::PathBuf;

const ROWS: u32 = 100_000;

#[derive(Clone, Copy, PartialEq)]
enum Variant {
    Plain,
    Empty,
    Paused,
    Stub,
    Engine,
}
use Variant::{Empty, Paused, Plain, Stub};

/// Those that follow each other in turns, the ones to compare with first. The engine goes on working for a while after
/// its turn, beside whatever comes next: it has turns of its own, and fewer.
const WITHOUT_ENGINE: &[Variant] = &[Plain, Empty, Paused, Stub];
const WITH_ENGINE: &[Variant] = &[Plain, Empty, Variant::Engine];
const LESS_WITH_ENGINE: usize = 4;

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Plain => "no trigger",
            Empty => "empty trigger",
            Paused => "attached, delivery paused",
            Stub => "attached, draining into a stub",
            Variant::Engine => "attached, draining into Elasticsearch",
        }
    }
}

struct Bench {
    server: Server,
    proxy: Proxy,
    /// Of all attached tables: the stub passes on what is no bulk request, so their indexes are in one engine.
    tables: [String; 2],
    script: PathBuf,
}

/// What was measured of one variant at one number of clients.
#[derive(Default)]
struct Column {
    rate: Samples,
    /// Microseconds of the backends' processor time for a transaction.
    cpu: Samples,
}

pub fn measure(report: &mut Report, scale: &Scale) {
    let engine = Engine::elasticsearch();
    let bench = Bench::new(&engine);
    machine::quiet(&engine);
    report.line("## What writers pay: small transactions");
    report.line("");
    report.line(&format!(
        "pgbench -M prepared for {} s at a time: one UPDATE by key, on {} rows of 300 bytes (fillfactor 50), a transaction",
        scale.transaction_seconds,
        thousands(ROWS.into())
    ));
    report.line(&format!(
        "each; medians of {} turns, in which the variants follow each other, and of each turn's ratio (into Elasticsearch",
        scale.transaction_rounds
    ));
    report.line(
        "a quarter of them, beside turns of their own without and with an empty trigger). The stub answers `_bulk` at",
    );
    report.line(
        "once. Worker, engine and pgbench share the cores with the backends: the ratios with a worker at work say what",
    );
    report.line("that takes too. CPU is that of all of Postgres but the worker. synchronous_commit is on.");
    report.line("");
    let rounds = scale.transaction_rounds;
    for fsync in [true, false] {
        bench.server.conf("fsync", if fsync { "on" } else { "off" });
        bench.server.reload();
        report.line(match fsync {
            true => "As a server runs, with fsync on:",
            false => "With fsync off, so that nothing but the processor limits:",
        });
        report.line("");
        let mut table = vec![row(["clients", "", "tps", "to no trigger", "to empty trigger", "range", "CPU us each"])];
        for &clients in scale.transaction_clients {
            let without = bench.turns(WITHOUT_ENGINE, clients, rounds, scale.transaction_seconds);
            // The engine rests by now: it has had nothing to do.
            let with = bench.turns(WITH_ENGINE, clients, rounds.div_ceil(LESS_WITH_ENGINE), scale.transaction_seconds);
            machine::quiet(&engine);
            add_rows(&mut table, clients, &without, &with);
            judge(report, clients, fsync, &without);
        }
        report.table(&table);
    }
    bench.clean_up(&engine);
}

/// The variants at one number of clients, in the order of the report.
fn add_rows(table: &mut Vec<Vec<String>>, clients: u32, without: &[Column], with: &[Column]) {
    let without = WITHOUT_ENGINE.iter().zip(without).map(|(variant, column)| (*variant, column, without));
    // What the engine's turns are compared with is a row already.
    let with = WITH_ENGINE.iter().zip(with).skip(2).map(|(variant, column)| (*variant, column, with));
    for (variant, column, beside) in without.chain(with) {
        let (plain, empty) = (&beside[0], &beside[1]);
        let is_attached = !matches!(variant, Plain | Empty);
        let to_empty = column.rate.over(&empty.rate);
        let attached = |text: String| if is_attached { text } else { String::new() };
        table.push(row([
            &if variant == Plain { clients.to_string() } else { String::new() },
            variant.name(),
            &thousands(column.rate.median()),
            &format!("{:.2}", column.rate.over(&plain.rate).median()),
            &attached(format!("**{:.3}**", to_empty.median())),
            &attached(to_empty.range(2)),
            &format!("{:.0}", column.cpu.median()),
        ]));
    }
}

fn judge(report: &mut Report, clients: u32, fsync: bool, columns: &[Column]) {
    let without_fsync = if fsync { "" } else { ", fsync off" };
    for (variant, what, target) in [(Paused, "paused", 0.94), (Stub, "into a stub", 0.90)] {
        let place = WITHOUT_ENGINE.iter().position(|known| *known == variant).expect("it is one of them");
        let to_empty = columns[place].rate.over(&columns[1].rate).median();
        let figure = format!("tps at {clients}, {what}{without_fsync}, to an empty trigger");
        report.figure("Small transactions", figure, to_empty, AtLeast(target));
    }
}

impl Bench {
    fn new(engine: &Engine) -> Bench {
        let server = Server::builder()
            .conf("es_sync.url", engine.url())
            .conf("shared_buffers", "512MB")
            .conf("wal_level", "replica")
            .conf("min_wal_size", "2GB")
            .conf("max_wal_size", "8GB")
            .conf("checkpoint_timeout", "1h")
            .conf("autovacuum", "off")
            .conf("log_min_messages", "error")
            .start();
        let proxy = Proxy::to(engine.url());
        proxy.judge(|head, body| {
            // An action and a document each: nothing is deleted here.
            let is_bulk = head.lines().next().is_some_and(|line| line.contains("/_bulk"));
            is_bulk.then(|| (200, answer(body.bytes().filter(|byte| *byte == b'\n').count() / 2)))
        });
        let mut client = server.create_empty_database("plain");
        for table in ["plain", "empty"] {
            fill(&mut client, table);
        }
        client.batch_execute(&writers::empty_trigger("empty")).expect("could not create the empty trigger");
        let tables = [unique("stub"), unique("engine")];
        for (database, table, url) in [("stub", &tables[0], proxy.url()), ("engine", &tables[1], engine.url())] {
            drop(server.create_empty_database(database));
            let address = format!("alter database {database} set es_sync.url = '{url}'");
            server.connect("postgres").batch_execute(&address).expect("could not set the address");
            let mut client = server.connect(database);
            client.batch_execute("create extension pg_es_sync").expect("could not create the extension");
            fill(&mut client, table);
            // Without a load: the stub would take the documents, and the load miss them.
            let attach = format!("select es_sync.attach('{table}', options => '{{\"load\": false}}')");
            client.batch_execute(&attach).expect("could not attach a table");
        }
        let bench = Bench { server, proxy, tables, script: process::run_folder().join("update.sql") };
        for database in ["stub", "engine"] {
            bench.drain(database);
        }
        bench
    }

    fn turns(&self, variants: &[Variant], clients: u32, rounds: usize, seconds: u32) -> Vec<Column> {
        let mut columns: Vec<Column> = variants.iter().map(|_| Column::default()).collect();
        // The first round warms up.
        for round in 0..=rounds {
            for turn in 0..variants.len() {
                // Forth and back, so that no variant always comes after the same one.
                let place = if round % 2 == 0 { turn } else { variants.len() - 1 - turn };
                let (rate, cpu) = self.run(variants[place], clients, if round > 0 { seconds } else { 1 });
                if round > 0 {
                    columns[place].rate.add(rate);
                    columns[place].cpu.add(cpu);
                }
            }
        }
        columns
    }

    /// Transactions a second, and microseconds of processor time for each.
    fn run(&self, variant: Variant, clients: u32, seconds: u32) -> (f64, f64) {
        let (database, table) = match variant {
            Plain => ("plain", "plain"),
            Empty => ("plain", "empty"),
            Paused | Stub => ("stub", self.tables[0].as_str()),
            Variant::Engine => ("engine", self.tables[1].as_str()),
        };
        let pause = |what| {
            self.server.connect(database).batch_execute(&format!("select es_sync.{what}()")).expect("could not pause")
        };
        if variant == Paused {
            pause("pause");
        }
        let is_attached = !matches!(variant, Plain | Empty);
        let indexed = || if is_attached { self.indexed(database) } else { 0.0 };
        let indexed_before = indexed();
        let script = format!("\\set id random(1, {ROWS})\nupdate {table} set price = price + 1 where id = :id;\n");
        std::fs::write(&self.script, script).expect("could not write pgbench's script");
        let mut command = self.server.command("pgbench");
        command.args(["-n", "-M", "prepared", "-c", &clients.to_string(), "-j", &clients.min(2).to_string()]);
        command.args(["-T", &seconds.to_string(), "-f"]).arg(&self.script).arg(database);
        command.stderr(std::process::Stdio::null());
        let before = self.cpu();
        let output = process::run(command);
        let cpu = self.cpu() - before;
        if variant == Paused {
            pause("resume");
        }
        if is_attached {
            self.drain(database);
        }
        self.proxy.forget_seen();
        let number = |begin: &str| {
            let line = output.lines().find_map(|line| line.strip_prefix(begin)).unwrap_or_else(|| panic!("{output}"));
            line.split([' ', '/']).next().and_then(|number| number.parse::<f64>().ok()).expect("a number")
        };
        let transactions = number("number of transactions actually processed: ");
        // However they were gathered, each row that was changed has been sent at least once.
        let rows = f64::from(ROWS);
        let changed = rows * (1.0 - (-transactions / rows).exp());
        let sent = indexed() - indexed_before;
        assert!(!is_attached || sent > changed * 0.95, "{sent} documents for some {changed:.0} changed rows");
        (number("tps = "), cpu / transactions * 1e6)
    }

    /// Seconds of processor time of all of Postgres but the workers.
    fn cpu(&self) -> f64 {
        let workers: f64 = self.server.workers().iter().map(|worker| machine::process_seconds(worker.0)).sum();
        machine::postgres_seconds(&self.server) - workers
    }

    /// Documents that were acknowledged so far.
    fn indexed(&self, database: &str) -> f64 {
        let row =
            self.server.connect(database).query_one("select coalesce(indexed, 0)::float8 from es_sync.status", &[]);
        row.expect("could not read the status").get(0)
    }

    fn drain(&self, database: &str) {
        let mut client = self.server.connect(database);
        wait::until("all is delivered", wait::LONG, || -> bool {
            client.query_one("select es_sync.wait(timeout => '60 s')", &[]).expect("could not wait").get(0)
        });
        let stale = client.query_one("select count(*) from es_sync.status where stale is not null", &[]);
        assert_eq!(stale.expect("could not read the status").get::<_, i64>(0), 0, "changes went past the queue");
    }

    fn clean_up(&self, engine: &Engine) {
        for (database, table) in [("stub", &self.tables[0]), ("engine", &self.tables[1])] {
            let detach = format!("select es_sync.detach('{table}', drop_index => true)");
            self.server.connect(database).batch_execute(&detach).expect("could not detach");
            wait::until("the index is gone", wait::SHORT, || !engine.exists(table));
        }
    }
}

fn fill(client: &mut postgres::Client, table: &str) {
    writers::create(client, table, "with (fillfactor = 50)");
    client.batch_execute(&format!("insert into {table} {}", writers::source(ROWS))).expect("could not fill a table");
    client.batch_execute(&format!("vacuum (freeze, analyze) {table}")).expect("could not vacuum a table");
}

/// The answer to a bulk request of so many documents.
fn answer(documents: usize) -> String {
    let item = r#"{"index":{"status":200}}"#;
    format!(r#"{{"errors":false,"items":[{}]}}"#, vec![item; documents].join(","))
}
