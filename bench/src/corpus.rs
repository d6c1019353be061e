//! The documents that are delivered: rows of words of a natural length, repeated as those of a language are.

use crate::raw::Document;
use postgres::Client;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

pub const COLUMNS: &str = "(id bigint primary key, title text, body text, tags text[], price numeric, stock int,
                            active bool, created_at timestamptz)";

/// Creates a table and fills it. `body` is the length of one of its columns: the others make some 180 bytes of JSON.
pub fn fill(client: &mut Client, table: &str, rows: usize, body: usize) {
    client.batch_execute(&format!("create table {table} {COLUMNS}")).expect("could not create a table");
    let mut random = fastrand::Rng::with_seed(5);
    let words: Vec<String> =
        (0..5_000).map(|number| (0..3 + number % 8).map(|_| random.lowercase()).collect::<String>()).collect();
    // A third power prefers the first words, as a language prefers some.
    let mut word = || &words[(random.f64().powi(3) * words.len() as f64) as usize];
    let mut copy = client.copy_in(&format!("copy {table} from stdin")).expect("could not begin a COPY");
    let (mut line, mut text) = (String::new(), String::new());
    for id in 1..=rows {
        text.clear();
        while text.len() < body {
            text.push_str(word());
            text.push(' ');
        }
        text.truncate(body);
        line.clear();
        let (day, second) = (id % 365, id % 86_400);
        let _ = writeln!(
            line,
            "{id}\t{} {} {}\t{}\t{{{},{}}}\t{}.{:02}\t{}\t{}\t2026-01-01 00:00:00+00",
            word(),
            word(),
            word(),
            text.trim_end(),
            words[id % 20],
            words[id % 30],
            day,
            second % 100,
            id % 1000,
            id % 3 == 0,
        );
        copy.write_all(line.as_bytes()).expect("could not COPY");
    }
    copy.finish().expect("could not end a COPY");
    client.batch_execute(&format!("vacuum (freeze, analyze) {table}")).expect("could not vacuum a table");
}

/// Creates a table of real records, Debian's package catalogue, and fills it with so many of them; how many there are.
pub fn packages(client: &mut Client, table: &str, rows: u32) -> u32 {
    let folder = tempfile::tempdir().expect("could not make a folder");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/catalogue.pl");
    let mut catalogue = Command::new("apt-cache");
    let mut catalogue = catalogue.arg("dumpavail").stdout(Stdio::piped()).spawn().expect("could not run apt-cache");
    let mut perl = Command::new("perl");
    perl.arg(script).arg(folder.path()).stdin(catalogue.stdout.take().expect("it is piped"));
    assert!(perl.status().expect("could not run perl").success(), "{script} failed");
    catalogue.wait().expect("could not wait for apt-cache");
    let tables = include_str!("../../demo/tables.sql");
    client
        .batch_execute(&format!("create schema catalogue; set search_path = catalogue; {tables}; reset search_path"))
        .expect("could not create the catalogue");
    for name in ["maintainers", "packages"] {
        let text = std::fs::read(folder.path().join(format!("{name}.copy"))).expect("could not read the catalogue");
        let mut copy = client.copy_in(&format!("copy catalogue.{name} from stdin")).expect("could not begin a COPY");
        copy.write_all(&text).expect("could not COPY");
        copy.finish().expect("could not end a COPY");
    }
    client
        .batch_execute(&format!(
            "create table {table} (id bigint primary key, name text, version text, section text, priority text,
                                   maintainer text, description text, depends text[], tags text[], size bigint,
                                   homepage text, stock int);
             insert into {table}
                select row_number() over (order by p.name), p.name, p.version, p.section, p.priority,
                       m.name || ' <' || m.email || '>', p.description, p.depends, p.tags, p.size, p.homepage, 0
                  from catalogue.packages p join catalogue.maintainers m on m.id = p.maintainer_id
                 order by p.name limit {rows};
             drop schema catalogue cascade"
        ))
        .expect("could not fill a table");
    let count: i64 =
        client.query_one(&format!("select count(*) from {table}"), &[]).expect("could not count the rows").get(0);
    u32::try_from(count).expect("fewer than four billion packages")
}

/// What the extension sends for the rows of a table; the callers make sure of that.
pub fn documents(client: &mut Client, table: &str) -> Vec<Document> {
    let rows = client.query(&format!("select id::text, row_to_json(t)::text from {table} t order by t.id"), &[]);
    rows.expect("could not read the documents").into_iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// The same for one row.
pub fn document(client: &mut Client, table: &str, id: &str) -> String {
    let row = client.query_one(&format!("select row_to_json(t)::text from {table} t where id = {id}"), &[]);
    row.expect("could not read a document").get(0)
}
