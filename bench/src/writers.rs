//! What capture costs a writer: large statements on three tables alike, one without a trigger, one with an empty Rust
//! trigger, one attached. The engine is out of reach, so that the worker takes nothing from the queue and leaves the
//! cores to the writer.

use crate::report::Target::AtMost;
use crate::report::{Report, Samples, row, thousands};
use crate::{Scale, machine};
use pg_es_sync_tests::Server;
use postgres::Client;
use std::time::Instant;

const TABLES: [&str; 3] = ["plain", "empty", "attached"];
/// Every order, because what ran before has its after-effects.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1], [1, 0, 2]];
const NAMES: [&str; 3] = ["no trigger", "empty trigger", "attached"];
/// Each on the tables as the one before has left them, and its target. `{}` stands for the table.
const STATEMENTS: [(&str, &str, f64); 4] = [
    ("INSERT", "insert into {} select * from source", 1.05),
    ("UPDATE", "update {} set title = 'changed ' || id", 1.08),
    ("DELETE", "delete from {}", 1.08),
    ("COPY", "copy {} from '{file}'", 1.05),
];

/// Seconds of one table's statements, on the clock and of the backend's processor time.
#[derive(Default)]
struct Times {
    wall: Samples,
    cpu: Samples,
}

pub fn measure(report: &mut Report, scale: &Scale) {
    let rows = scale.writer_rows;
    // The disk's moods would drown what is asked for, so there is no fsync, no checkpoint during a statement, and WAL
    // goes into files that are there already. That makes the statements fast, and so the ratios large.
    let server = Server::builder()
        .conf("es_sync.url", "http://127.0.0.1:9")
        .conf("shared_buffers", "1GB")
        .conf("wal_level", "replica")
        .conf("min_wal_size", "4GB")
        .conf("max_wal_size", "8GB")
        .conf("checkpoint_timeout", "1h")
        .conf("bgwriter_lru_maxpages", "0")
        .conf("autovacuum", "off")
        .conf("log_min_messages", "error")
        .start();
    let mut client = server.create_database("bench");
    let width = prepare(&mut client, rows);
    let file = server.data().join("source.copy").display().to_string();
    client.batch_execute(&format!("copy source to '{file}'")).expect("could not write the file");
    report.line("## What writers pay: large statements");
    report.line("");
    report.line(&format!(
        "One statement on {} rows of {width:.0} bytes (bigint key, two texts, numeric, timestamptz), commit included; medians",
        thousands(f64::from(rows))
    ));
    report.line(
        "of turns, in which the three tables follow each other, in changing order. fsync is off, and the engine out of",
    );
    report.line("reach, so that the worker does not share the cores. Ratios are medians of each turn's ratio; half of all turns");
    report.line("lie within the range beside. CPU is the backend's own processor time, whatever else the machine did meanwhile.");
    report.line("");
    // Fewer turns of the second: no target is set for it.
    for (full_page_writes, rounds) in [(true, scale.writer_rounds), (false, scale.writer_rounds / 4)] {
        server.conf("full_page_writes", if full_page_writes { "on" } else { "off" });
        server.reload();
        let times = turns(&mut client, &file, rounds, rows);
        report.line(&match full_page_writes {
            true => format!(
                "After a checkpoint, so that the first change of a page writes it to the WAL whole ({rounds} turns):"
            ),
            false => {
                format!("The same without full_page_writes, the least that a statement can cost ({rounds} turns):")
            }
        });
        report.line("");
        report.table(&table(&times, rows));
        if full_page_writes {
            for ((name, _, target), times) in STATEMENTS.iter().zip(&times) {
                let ratio = times[2].wall.over(&times[1].wall).median();
                report.figure("Large statements", format!("{name}, to an empty trigger"), ratio, AtMost(*target));
            }
        }
    }
}

fn turns(client: &mut Client, file: &str, rounds: usize, rows: u32) -> [[Times; 3]; 4] {
    let backend: i32 = client.query_one("select pg_backend_pid()", &[]).expect("could not ask for the pid").get(0);
    let cpu_seconds = || machine::backend_seconds(backend as u32);
    let mut times: [[Times; 3]; 4] = Default::default();
    // The first round warms up.
    for round in 0..=rounds {
        for (statement, (_, sql, _)) in STATEMENTS.iter().enumerate() {
            if !sql.starts_with("update") && !sql.starts_with("delete") {
                client.batch_execute("truncate plain, empty, attached").expect("could not truncate");
            }
            client.batch_execute("truncate es_sync.queue; checkpoint").expect("could not write a checkpoint");
            // One after the other, so that neighbours in time are compared.
            for place in ORDERS[round % ORDERS.len()] {
                let sql = sql.replace("{file}", file).replace("{}", TABLES[place]);
                let (start, cpu) = (Instant::now(), cpu_seconds());
                client.batch_execute(&sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
                if round > 0 {
                    times[statement][place].wall.add_time(start.elapsed());
                    times[statement][place].cpu.add(cpu_seconds() - cpu);
                }
            }
            expect_noted(client, i64::from(rows));
        }
    }
    times
}

fn table(times: &[[Times; 3]; 4], rows: u32) -> Vec<Vec<String>> {
    let mut table = vec![row([
        "",
        "ms",
        "to no trigger",
        "to empty trigger",
        "half of turns",
        "CPU ms",
        "CPU to empty trigger",
        "half of turns",
        "CPU ns a row beyond it",
    ])];
    for ((name, ..), times) in STATEMENTS.iter().zip(times) {
        for (place, variant) in NAMES.iter().enumerate() {
            let Times { wall, cpu } = &times[place];
            let (to_empty, cpu_to_empty) = (wall.over(&times[1].wall), cpu.over(&times[1].cpu));
            let beyond = (cpu.median() - times[1].cpu.median()) / f64::from(rows) * 1e9;
            let attached = |text: String| if place == 2 { text } else { String::new() };
            table.push(row([
                &format!("{name}, {variant}"),
                &format!("{:.0}", wall.median() * 1e3),
                &format!("{:.2}", wall.over(&times[0].wall).median()),
                &attached(format!("**{:.3}**", to_empty.median())),
                &attached(to_empty.middle_half(2)),
                &format!("{:.0}", cpu.median() * 1e3),
                &attached(format!("{:.3}", cpu_to_empty.median())),
                &attached(cpu_to_empty.middle_half(2)),
                &attached(format!("{beyond:.0}")),
            ]));
        }
    }
    table
}

/// Makes the tables; the average width of a row.
fn prepare(client: &mut Client, rows: u32) -> f64 {
    for table in TABLES {
        create(client, table, "");
    }
    client
        .batch_execute(&format!(
            "create table source as {}; {}; select es_sync.attach('attached')",
            source(rows),
            empty_trigger("empty")
        ))
        .expect("could not prepare the tables");
    client.batch_execute("vacuum (freeze, analyze) source").expect("could not vacuum a table");
    let row = client.query_one("select avg(pg_column_size(s))::float8 from source s", &[]);
    row.expect("could not measure a row").get(0)
}

/// Creates a table whose rows have 300 bytes.
pub fn create(client: &mut Client, table: &str, options: &str) {
    let columns = "(id bigint primary key, title text, body text, price numeric, created_at timestamptz)";
    client.batch_execute(&format!("create table {table} {columns} {options}")).expect("could not create a table");
}

/// A query for its rows.
pub fn source(rows: u32) -> String {
    format!(
        "select i::bigint as id, 'title of row ' || i as title, repeat(md5(i::text), 7) as body,
                (i % 100000) / 100.0 as price, timestamptz '2026-01-01' + i * interval '1 minute' as created_at
           from generate_series(1, {rows}) i"
    )
}

/// Statements that give a table the empty trigger.
pub fn empty_trigger(table: &str) -> String {
    format!(
        "create or replace function empty_trigger() returns trigger language c
            as '$libdir/libempty_trigger', 'empty_trigger';
         create trigger empty after insert or update or delete on {table}
            for each row execute function empty_trigger()"
    )
}

/// The queue holds what the attached table should have noted, and nothing else.
fn expect_noted(client: &mut Client, rows: i64) {
    let noted =
        client.query_one("select coalesce(sum(count), 0)::bigint from es_sync.queue where keys is not null", &[]);
    let noted: i64 = noted.expect("could not read the queue").get(0);
    assert_eq!(noted, rows, "keys in the queue after writing to all tables");
}
