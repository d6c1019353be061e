//! What capture costs a writer: large INSERTs and UPDATEs into three tables alike, one without a trigger, one with an
//! empty Rust trigger, one attached. The engine is out of reach, so that the worker takes nothing from the queue and
//! leaves the cores to the writer.

use crate::Scale;
use crate::report::{Report, Samples, row, thousands};
use pg_es_sync_tests::Server;
use postgres::Client;
use std::time::{Duration, Instant};

const TABLES: [&str; 3] = ["plain", "empty", "attached"];
/// Every order, because what ran before has its after-effects.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1], [1, 0, 2]];
const NAMES: [&str; 3] = ["no trigger", "empty Rust trigger", "attached"];

pub fn measure(report: &mut Report, scale: &Scale) {
    let rows = scale.writer_rows;
    // Without fsync: the disk's moods would drown what is asked for, and the ratio with them is the larger one.
    let server = Server::builder()
        .conf("es_sync.url", "http://127.0.0.1:9")
        .conf("shared_buffers", "1GB")
        .conf("max_wal_size", "8GB")
        .conf("checkpoint_timeout", "1h")
        .conf("autovacuum", "off")
        .conf("log_min_messages", "error")
        .start();
    let mut client = server.create_database("bench");
    let width = prepare(&mut client, rows);
    let mut inserts: [Samples; 3] = Default::default();
    let mut updates: [Samples; 3] = Default::default();
    for round in 0..=scale.writer_rounds {
        for place in ORDERS[round % ORDERS.len()] {
            let table = TABLES[place];
            client
                .batch_execute("truncate plain, empty, attached; truncate es_sync.queue")
                .expect("could not truncate");
            let insert = statement(&mut client, &format!("insert into {table} select * from source"));
            expect_noted(&mut client, table, i64::from(rows));
            let update = statement(&mut client, &format!("update {table} set title = 'changed ' || id"));
            expect_noted(&mut client, table, i64::from(rows));
            // The first round warms up.
            if round > 0 {
                inserts[place].add_time(insert);
                updates[place].add_time(update);
            }
        }
    }

    report.line("## What writers pay");
    report.line("");
    report.line(&format!(
        "One INSERT and one UPDATE of {} rows of {width:.0} bytes (bigint key, two texts, numeric, timestamptz), commit",
        thousands(f64::from(rows))
    ));
    report.line(&format!(
        "included; medians of {} turns. fsync is off, and the engine out of reach, so that the worker does not share",
        inserts[0].count()
    ));
    report.line("the cores. Ratios are medians of each turn's ratio, with their range.");
    report.line("");
    let mut table =
        vec![row(["", "ms", "range", "to no trigger", "range", "to an empty trigger", "ns a row beyond it"])];
    for (what, samples) in [("INSERT", &inserts), ("UPDATE", &updates)] {
        for (place, name) in NAMES.iter().enumerate() {
            let to_plain = samples[place].over(&samples[0]);
            let to_empty = samples[place].over(&samples[1]);
            let beyond = (samples[place].median() - samples[1].median()) / f64::from(rows) * 1e9;
            let attached = place == 2;
            table.push(row([
                &format!("{what}, {name}"),
                &format!("{:.0}", samples[place].median() * 1e3),
                &samples[place].map(|seconds| seconds * 1e3).range(0),
                &format!("{:.2}", to_plain.median()),
                &to_plain.range(2),
                &if attached { format!("**{:.2}**", to_empty.median()) } else { String::new() },
                &if attached { format!("{beyond:.0}") } else { String::new() },
            ]));
        }
    }
    report.table(&table);
}

/// Makes the tables; the average width of a row.
fn prepare(client: &mut Client, rows: u32) -> f64 {
    let columns = "(id bigint primary key, title text, body text, price numeric, created_at timestamptz)";
    for table in TABLES {
        client.batch_execute(&format!("create table {table} {columns}")).expect("could not create a table");
    }
    client
        .batch_execute(&format!(
            "create table source as
               select i::bigint as id, 'title of row ' || i as title, repeat(md5(i::text), 7) as body,
                      (i % 100000) / 100.0 as price, timestamptz '2026-01-01' + i * interval '1 minute' as created_at
                 from generate_series(1, {rows}) i;
             create function empty_trigger() returns trigger language c as '$libdir/libempty_trigger', 'empty_trigger';
             create trigger empty after insert or update or delete on empty
                for each row execute function empty_trigger();
             select es_sync.attach('attached')"
        ))
        .expect("could not prepare the tables");
    client.batch_execute("vacuum (freeze, analyze) source").expect("could not vacuum a table");
    let row = client.query_one("select avg(pg_column_size(s))::float8 from source s", &[]);
    row.expect("could not measure a row").get(0)
}

fn statement(client: &mut Client, sql: &str) -> Duration {
    client.batch_execute("checkpoint").expect("could not write a checkpoint");
    let start = Instant::now();
    client.batch_execute(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    start.elapsed()
}

/// The queue holds what a table should have noted, and is emptied.
fn expect_noted(client: &mut Client, table: &str, rows: i64) {
    let noted =
        client.query_one("select coalesce(sum(count), 0)::bigint from es_sync.queue where keys is not null", &[]);
    let noted: i64 = noted.expect("could not read the queue").get(0);
    assert_eq!(noted, if table == "attached" { rows } else { 0 }, "keys in the queue after writing to {table}");
    client.batch_execute("truncate es_sync.queue").expect("could not truncate the queue");
}
