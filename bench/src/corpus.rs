//! The documents that are delivered: rows of words of a natural length, repeated as those of a language are.

use crate::raw::Document;
use postgres::Client;
use std::fmt::Write as _;
use std::io::Write as _;

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
