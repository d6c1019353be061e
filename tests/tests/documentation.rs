//! docs/documents.md is true: its SQL runs in the order of the page, and after each statement that may change a document
//! every document is what its view or table says. A comment "-- ERROR:  message" below a statement is the error that it ends in.

use std::collections::BTreeSet;

use pg_es_sync_tests::{Engine, Server, expect, unique};
use postgres::Client;

const PAGE: &str = include_str!("../../docs/documents.md");

#[test]
fn the_examples_of_the_page_about_documents_do_what_it_says() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let page = renamed(PAGE);
    let blocks: Vec<&str> = page.split("\n```sql\n").skip(1).filter_map(|part| part.split("\n```").next()).collect();
    assert!(blocks.len() > 10, "{} blocks were found", blocks.len());
    for block in blocks {
        for Example { statement, error } in examples(block) {
            lose_what_it_sends(&statement, &mut client, &engine);
            match (client.batch_execute(&statement), error) {
                (Ok(()), None) => {}
                (Ok(()), Some(expected)) => panic!("{statement}\nshould have failed: {expected}"),
                (Err(error), expected) => {
                    let message = error.as_db_error().map(|error| error.message().to_owned());
                    assert_eq!(message, expected, "{statement}\nfailed: {error:?}");
                }
            }
            let attached = client.query_one("select count(*) from es_sync.status", &[]).expect("status");
            let makes = ["CREATE TABLE", "CREATE INDEX", "CREATE UNIQUE", "CREATE VIEW"];
            if attached.get::<_, i64>(0) > 0 && !makes.iter().any(|made| statement.trim_start().starts_with(made)) {
                println!("{}", statement.trim());
                expect::everything_equal(&mut client, &engine);
            }
        }
    }
    let letters = client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("dead letters");
    assert_eq!(letters.get::<_, i64>(0), 0);
}

/// Documents that a call sends once more, as tables with conditions.
const SENT: &[(&str, &[(&str, &str)])] = &[
    ("es_sync.sync(", &[("expenses", "id = 17")]),
    ("es_sync.sync_where(", &[("expenses", "id < 10")]),
    (
        "es_sync.sync_full(",
        &[
            ("collectives", "id = 3"),
            ("expenses", "collective_id = 3 or collective_id in (select id from {collectives} where parent_id = 3)"),
        ],
    ),
];

/// Deletes by hand what the statement is to send, so that it is seen to do it.
fn lose_what_it_sends(statement: &str, client: &mut Client, engine: &Engine) {
    let Some((_, lost)) = SENT.iter().find(|(call, _)| statement.contains(call)) else { return };
    for (table, condition) in *lost {
        let table = renamed_name(table);
        let condition = condition.replace("{collectives}", &renamed_name("collectives"));
        let ids = format!("select array_agg(id::text) from {table} where {condition}");
        let ids: Vec<String> = client.query_one(&ids, &[]).expect("ids").get::<_, Option<_>>(0).unwrap_or_default();
        let indexes = "select index from es_sync.status where relation = $1::text::regclass";
        let mut deleted = 0;
        for index in client.query(indexes, &[&table]).expect("indexes") {
            let index: String = index.get(0);
            for ((id, routing), _) in engine.places(&index) {
                if ids.contains(&id) {
                    let routing = routing.map(|routing| format!("?routing={routing}")).unwrap_or_default();
                    engine.delete(&format!("/{index}/_doc/{id}{routing}"));
                    deleted += 1;
                }
            }
        }
        assert!(deleted > 0, "there are documents of {table} where {condition}");
    }
}

struct Example {
    statement: String,
    error: Option<String>,
}

/// A block's statements, each with the error that the comment behind it announces.
fn examples(block: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    let mut statement = String::new();
    let mut rest = block;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '\'' | '"' => 1 + rest[1..].find(first).map_or(rest.len() - 1, |end| end + 1),
            '$' if rest.starts_with("$$") => 2 + rest[2..].find("$$").map_or(rest.len() - 2, |end| end + 2),
            '-' if rest.starts_with("--") => rest.find('\n').unwrap_or(rest.len()),
            other => other.len_utf8(),
        };
        let (token, after) = rest.split_at(length);
        rest = after;
        if let Some(error) = token.strip_prefix("-- ERROR:") {
            let last = examples.last_mut().expect("an error follows a statement");
            last.error = Some(error.trim().to_owned());
        } else if token == ";" {
            examples.push(Example { statement: std::mem::take(&mut statement), error: None });
        } else if !token.starts_with("--") {
            statement.push_str(token);
        }
    }
    assert_eq!(statement.trim(), "", "the block's last statement has its semicolon");
    examples
}

/// The page with names of tables and indexes that no other test has: indexes are named after them, and the engine is
/// shared.
fn renamed(page: &str) -> String {
    let after = |word: &str| -> Vec<&str> {
        page.split(word)
            .skip(1)
            .filter_map(|rest| rest.split([' ', '(', ',', ')', '\'', '"']).find(|w| !w.is_empty()))
            .collect()
    };
    let mut names: Vec<&str> =
        BTreeSet::from_iter(after("CREATE TABLE ").into_iter().chain(after(" index => "))).into_iter().collect();
    assert!(names.len() > 4, "{names:?}");
    // Longest first: one may be a part of another one.
    names.sort_by_key(|name| std::cmp::Reverse(name.len()));
    let mut result = String::new();
    let mut rest = page;
    let word = |letter: char| letter.is_alphanumeric() || letter == '_' || letter == '-';
    'page: while !rest.is_empty() {
        if !result.ends_with(word) {
            for name in &names {
                if rest.starts_with(name) && !rest[name.len()..].starts_with(word) {
                    result.push_str(&renamed_name(name));
                    rest = &rest[name.len()..];
                    continue 'page;
                }
            }
        }
        let letter = rest.chars().next().unwrap_or_default();
        result.push(letter);
        rest = &rest[letter.len_utf8()..];
    }
    result
}

/// The same for the same name.
fn renamed_name(name: &str) -> String {
    static SUFFIX: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    format!("{name}{}", SUFFIX.get_or_init(|| unique("")))
}
