//! Statements about a table of which each test has its own: `{T}` in them stands for its name.

use postgres::Client;

/// Runs statements, in one transaction unless they say otherwise.
#[track_caller]
pub fn run(client: &mut Client, name: &str, statements: &str) {
    let statements = statements.replace("{T}", name);
    client.batch_execute(&statements).unwrap_or_else(|error| panic!("{error:?} in: {statements}"));
}

/// The one number that a query returns, a bigint.
#[track_caller]
pub fn number(client: &mut Client, name: &str, query: &str) -> i64 {
    client.query_one(&query.replace("{T}", name), &[]).expect("query").get(0)
}
