//! Documents from a view over three tables: what its capture costs the writers of each, and how fast a change of one row
//! reaches the many documents that show it.

use crate::report::Target::AtMost;
use crate::report::{Report, Samples, row, thousands};
use crate::writers::empty_trigger;
use crate::{Scale, machine, raw};
use pg_es_sync_tests::{Engine, Server, expect, unique, wait};
use postgres::Client;
use std::time::{Duration, Instant};

/// The tables that the view reads: what a row is made of, and what an UPDATE changes. Each has a twin with the empty
/// trigger, `<name>_empty`.
const TABLES: [Table; 3] = [
    Table {
        name: "expense",
        columns: "id bigint primary key, collective_id bigint, title text, body text",
        row: "i, i, 'title of row ' || i, repeat(md5(i::text), 7)",
        change: "title = 'changed ' || id",
    },
    Table {
        name: "collective",
        columns: "id bigint primary key, name text, body text",
        row: "i, 'name of row ' || i, repeat(md5(i::text), 7)",
        change: "name = 'changed ' || id",
    },
    Table {
        name: "item",
        columns: "id bigint primary key, expense_id bigint, title text, body text",
        row: "i, i, 'title of row ' || i, repeat(md5(i::text), 7)",
        change: "title = 'changed ' || id",
    },
];
const VIEW: &str = "create view expense_documents as
    select e.id, e.title, c.name as collective,
           (select coalesce(jsonb_agg(jsonb_build_object('title', i.title) order by i.id), '[]')
              from item i where i.expense_id = e.id) as items
      from expense e left join collective c on c.id = e.collective_id";
const STATEMENTS: [&str; 3] = ["INSERT", "UPDATE", "DELETE"];

struct Table {
    name: &'static str,
    columns: &'static str,
    row: &'static str,
    change: &'static str,
}

pub fn measure(report: &mut Report, scale: &Scale) {
    report.line("## Documents from a view");
    report.line("");
    capture(report, scale);
    fan_out(report, scale);
}

fn capture(report: &mut Report, scale: &Scale) {
    // Short statements and many turns: what else the machine does changes within seconds.
    let rows = scale.writer_rows / 4;
    // As for single tables: see writers.rs.
    let server = Server::builder()
        .conf("es_sync.url", "http://127.0.0.1:9")
        .conf("shared_buffers", "1GB")
        .conf("min_wal_size", "4GB")
        .conf("max_wal_size", "8GB")
        .conf("checkpoint_timeout", "1h")
        .conf("bgwriter_lru_maxpages", "0")
        .conf("autovacuum", "off")
        .conf("log_min_messages", "error")
        .start();
    let mut client = server.create_database("bench");
    for Table { name, columns, .. } in &TABLES {
        for table in [(*name).to_owned(), format!("{name}_empty")] {
            sql(&mut client, &format!("create table {table} ({columns})"));
        }
        sql(&mut client, &empty_trigger(&format!("{name}_empty")));
    }
    sql(&mut client, "create index on item (expense_id); create index on item_empty (expense_id)");
    sql(&mut client, "create index on expense (collective_id); create index on expense_empty (collective_id)");
    sql(&mut client, VIEW);
    sql(&mut client, "select es_sync.attach('expense', document => 'expense_documents')");

    let backend: i32 = client.query_one("select pg_backend_pid()", &[]).expect("could not ask for the pid").get(0);
    let mut wall: [[[Samples; 2]; 3]; 3] = Default::default();
    let mut cpu: [[[Samples; 2]; 3]; 3] = Default::default();
    // The first round warms up.
    for round in 0..=scale.view_rounds {
        sql(&mut client, "truncate expense, collective, item, expense_empty, collective_empty, item_empty");
        for (statement, statement_name) in STATEMENTS.iter().enumerate() {
            for (place, table) in TABLES.iter().enumerate() {
                sql(&mut client, "truncate es_sync.queue; checkpoint");
                for turn in [round % 2, 1 - round % 2] {
                    let name = if turn == 0 { format!("{}_empty", table.name) } else { table.name.to_owned() };
                    let text = match *statement_name {
                        "INSERT" => {
                            format!("insert into {name} select {} from generate_series(1, {rows}) i", table.row)
                        }
                        "UPDATE" => format!("update {name} set {}", table.change),
                        _ => format!("delete from {name}"),
                    };
                    let (start, before) = (Instant::now(), machine::backend_seconds(backend as u32));
                    sql(&mut client, &text);
                    if round > 0 {
                        wall[statement][place][turn].add_time(start.elapsed());
                        cpu[statement][place][turn].add(machine::backend_seconds(backend as u32) - before);
                    }
                }
                let noted = "select coalesce(sum(count), 0)::bigint from es_sync.queue where keys is not null";
                let noted: i64 = client.query_one(noted, &[]).expect("could not read the queue").get(0);
                assert_eq!(noted, i64::from(rows), "values noted by {statement_name} on {}", table.name);
            }
        }
    }

    report.line(&format!(
        "One statement on {} rows of some 300 bytes of each table that the view reads, commit included, beside the same on a",
        thousands(f64::from(rows))
    ));
    report.line(&format!(
        "twin with an empty Rust trigger; the engine out of reach, fsync off. Medians of {} turns and of each turn's ratio.",
        scale.view_rounds
    ));
    report.line("");
    let mut table = vec![row(["", "ms", "to empty trigger", "half of turns", "CPU to empty trigger", "half of turns"])];
    for (statement, statement_name) in STATEMENTS.iter().enumerate() {
        for (place, Table { name, .. }) in TABLES.iter().enumerate() {
            let [empty, followed] = &wall[statement][place];
            let ratio = followed.over(empty);
            let [empty_cpu, followed_cpu] = &cpu[statement][place];
            let cpu_ratio = followed_cpu.over(empty_cpu);
            let what = format!("{statement_name}, {name}");
            table.push(row([
                &what,
                &format!("{:.0}", followed.median() * 1e3),
                &format!("**{:.3}**", ratio.median()),
                &ratio.middle_half(2),
                &format!("{:.3}", cpu_ratio.median()),
                &cpu_ratio.middle_half(2),
            ]));
            report.figure(
                "A view over three tables",
                format!("{what}, to an empty trigger"),
                ratio.median(),
                AtMost(1.1),
            );
        }
    }
    report.table(&table);
}

fn fan_out(report: &mut Report, scale: &Scale) {
    let engine = Engine::elasticsearch();
    let server = Server::builder()
        .conf("es_sync.url", engine.url())
        .conf("shared_buffers", "1GB")
        .conf("max_wal_size", "4GB")
        .durable()
        .start();
    let mut client = server.create_database("bench");
    let rows = scale.writer_rows / 2;
    for Table { name, columns, row, .. } in &TABLES {
        sql(&mut client, &format!("create table {name} ({columns})"));
        sql(&mut client, &format!("insert into {name} select {row} from generate_series(1, {rows}) i"));
    }
    sql(&mut client, "update expense set collective_id = 1");
    sql(&mut client, "create index on item (expense_id); create index on expense (collective_id)");
    sql(&mut client, VIEW);
    sql(&mut client, "vacuum full");
    sql(&mut client, "analyze");
    let index = unique("fan");
    let attach = format!("select es_sync.attach('expense', '{index}', document => 'expense_documents')");
    sql(&mut client, &attach);
    let loaded = || engine.exists(&index) && engine.count(&index) == u64::from(rows);
    wait::until("the load is done", wait::LONG, loaded);
    drained(&mut client);
    let alike = raw::alike(&engine, &engine.indexes_of(&index).pop().expect("the load has made an index"));
    let sender = raw::client(engine.url());

    let (mut ours, mut raws, mut commits) = (Samples::default(), Samples::default(), Samples::default());
    // The first round warms up.
    for round in 0..=scale.fan_out_rounds {
        machine::quiet(&engine);
        let start = Instant::now();
        sql(&mut client, &format!("update collective set name = 'name of round {round}' where id = 1"));
        let commit = start.elapsed();
        drained(&mut client);
        let took = start.elapsed();

        // The same documents, into an index that holds them already.
        let documents = "select id::text, row_to_json(d)::text from expense_documents d order by d.id";
        let first = raw::bodies_of(&mut client, documents, 5, 1 << 8);
        let second = raw::bodies_of(&mut client, documents, 5, 2 << 8);
        let target = raw::create_index(&engine, &alike);
        raw::send(&sender, &target, &first, 4);
        raw::go_live(&engine, &target, &alike);
        machine::quiet(&engine);
        let raw = raw::send(&sender, &target, &second, 4);
        engine.delete(&format!("/{target}"));
        if round > 0 {
            ours.add(f64::from(rows) / took.as_secs_f64());
            raws.add(f64::from(rows) / raw.as_secs_f64());
            commits.add_time(commit);
        }
    }
    engine.refresh(&index);
    let documents = "select id, row_to_json(d) from expense_documents d";
    expect::documents_equal(&mut client, documents, &engine, &index);

    report.line(&format!(
        "One row changes that {} documents show, Elasticsearch, fsync on: from the statement's begin until all are",
        thousands(f64::from(rows))
    ));
    report.line("acknowledged, beside the same documents sent raw over 4 connections, bodies of 5 MB. Medians of");
    report.line(&format!("{} turns.", scale.fan_out_rounds));
    report.line("");
    report.table(&[
        row(["", "documents/s", "range", "to raw `_bulk`"]),
        row(["raw `_bulk`", &thousands(raws.median()), &raws.range(0), ""]),
        row(["fan-out", &thousands(ours.median()), &ours.range(0), &format!("**{:.2}**", ours.over(&raws).median())]),
    ]);
    report.line(&format!("The UPDATE with its commit took its client {:.1} ms.", commits.median() * 1e3));
    report.line("");
}

/// Waits until the queue has nothing left.
fn drained(client: &mut Client) {
    let start = Instant::now();
    while client
        .query_opt("select from es_sync.queue where keys is not null limit 1", &[])
        .expect("could not read the queue")
        .is_some()
    {
        assert!(start.elapsed() < Duration::from_secs(300), "the changes are not delivered");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn sql(client: &mut Client, text: &str) {
    client.batch_execute(text).unwrap_or_else(|error| panic!("{text}: {error}"));
}
