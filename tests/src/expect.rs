//! Comparing the engine's documents with what the database says they are: contents, not counts.

use crate::Engine;
use crate::engine::Place;
use postgres::Client;
use serde_json::{Number, Value};
use std::collections::BTreeMap;
use std::fmt::Debug;

/// Waits until all that was committed is searchable and no job is under way; fails if a job has failed.
#[track_caller]
pub fn settled(client: &mut Client) {
    crate::wait::until("all is searchable and no job runs", crate::wait::LONG, || {
        let waited: bool =
            client.query_one("select es_sync.wait(timeout => '20 s')", &[]).map_err(|error| error.to_string())?.get(0);
        let jobs = client
            .query(
                "select format('%s: %s %s %s of %s, %s', id, state, phase, done, total, error) from es_sync.jobs
                 where state not in ('done', 'cancelled')",
                &[],
            )
            .map_err(|error| error.to_string())?;
        let jobs: Vec<String> = jobs.iter().map(|row| row.get(0)).collect();
        if waited && jobs.is_empty() { Ok(()) } else { Err(format!("waited: {waited}, jobs: {jobs:?}")) }
    });
}

/// Waits until the queue is logged: the worker makes it so when es_sync.queue_durability says it.
#[track_caller]
pub fn logged_queue(client: &mut Client) {
    let logged = "select relpersistence = 'p' from pg_class where oid = 'es_sync.queue'::regclass";
    crate::wait::until("the queue is logged", crate::wait::SHORT, || -> bool {
        client.query_one(logged, &[]).expect("queue").get(0)
    });
}

/// `settled`, then `documents_equal` for a table whose documents are its rows as they are.
#[track_caller]
pub fn table_equal(client: &mut Client, table: &str, key: &str, engine: &Engine, index: &str) {
    settled(client);
    documents_equal(client, &format!("select {key}, row_to_json(t) from {table} t"), engine, index);
}

/// `settled`, then compares every attached index with its view or table, by what es_sync.status says of it; none must be
/// attached in vain. For documents that are their rows as they are, and keys whose text does not depend on the session.
#[track_caller]
pub fn everything_equal(client: &mut Client, engine: &Engine) {
    settled(client);
    client.batch_execute("set timezone = 'UTC'").expect("set");
    let attached = client.query(EVERYTHING, &[]).expect("status");
    assert!(!attached.is_empty(), "something is attached");
    for row in attached {
        places_equal(client, row.get("query"), engine, row.get("index"));
    }
}

/// Each index with the query of its documents and of the places where they lie. Left out are what the user excluded, and
/// types that never are in one.
const EVERYTHING: &str = r#"
select s.index,
       format($$select case when left(row_key, 1) = '\' or row_key = '' then '\' else '' end || row_key,
                       %s, to_jsonb(d) - %L::text[]
                from %s d cross join lateral (select %s) as key (row_key) where %s$$,
              place.text, s.exclude || unsent.columns, coalesce(s.document, s.relation), key.text, coalesce(s.filter, 'true')) as query
from es_sync.status s
join es_sync.attachment a on a.index_name = s.index
cross join lateral (
    select case when a.options ? 'routing'
                then format('(select r.%I from %s r where (%s) = (%s))', a.options ->> 'routing', s.relation,
                            string_agg(format('r.%I', c), ', '), string_agg(format('d.%I', c), ', '))
                else 'null' end as text
    from unnest(s.key_columns) as key_column (c)
) as place
cross join lateral (
    select coalesce(array_agg(a.attname::text), '{}') as columns
    from pg_attribute a
    where a.attrelid = coalesce(s.document, s.relation) and a.attnum > 0
      and a.atttypid in ('bytea'::regtype, 'tsvector'::regtype) and a.attname::text <> all (s.key_columns)
) as unsent
cross join lateral (
    select case when count(*) = 1 then format('d.%I::text', min(c))
                else string_agg(format($$replace(replace(d.%I::text, '\', '\\'), '|', '\|')$$, c), ' || ''|'' || ' order by n)
           end as text
    from unnest(s.key_columns) with ordinality as key_column (c, n)
) as key
order by s.index"#;

/// Asserts that the index holds exactly the documents that the query returns as (id text, document text or json).
/// Call it after `es_sync.wait()`. A field that is null may be absent, but none may be there that is not expected.
#[track_caller]
pub fn documents_equal(client: &mut Client, query: &str, engine: &Engine, index: &str) {
    if let Err(difference) = compare(client, query, engine, index) {
        panic!("{difference}");
    }
}

/// The same as a value, for [`crate::wait::until`].
#[track_caller]
pub fn compare(client: &mut Client, query: &str, engine: &Engine, index: &str) -> Result<(), String> {
    let query = format!("select id, null, document from ({query}) as expected (id, document)");
    let expected = rows(client, &query).into_iter().map(|((id, _), document)| (id, document)).collect();
    difference_of(index, &expected, &engine.documents(index))
}

/// As `documents_equal`, where the query returns (id, routing, document): each document lies where its routing says, and
/// nowhere else. Null and the empty text are no routing.
#[track_caller]
pub fn places_equal(client: &mut Client, query: &str, engine: &Engine, index: &str) {
    if let Err(difference) = difference_of(index, &rows(client, query), &engine.places(index)) {
        panic!("{difference}");
    }
}

/// What a query returns as id, routing and document; the two first together occur once.
#[track_caller]
pub fn rows(client: &mut Client, query: &str) -> BTreeMap<Place, Value> {
    // Cast here, so that a query may return any type that has a text form. A routing is as its type writes it, which a
    // cast does otherwise for booleans.
    let query = format!(
        "select id::text, nullif(format('%s', routing), ''), document::text
         from ({query}) as expected (id, routing, document)"
    );
    let rows = client.query(&query, &[]).unwrap_or_else(|error| panic!("{error:?} in: {query}"));
    let expected: BTreeMap<Place, Value> = rows
        .iter()
        .map(|row| ((row.get(0), row.get(1)), serde_json::from_str(row.get(2)).expect("the last column is JSON")))
        .collect();
    assert_eq!(rows.len(), expected.len(), "the query returns a document twice: {query}");
    expected
}

fn difference_of<K: Ord + Debug>(
    index: &str,
    expected: &BTreeMap<K, Value>,
    found: &BTreeMap<K, Value>,
) -> Result<(), String> {
    let mut missing = 0;
    let mut orphaned = 0;
    let mut different = 0;
    let mut examples = Vec::new();
    let mut note = |text: String| {
        if examples.len() < 5 {
            examples.push(text);
        }
    };
    for (id, document) in expected {
        match found.get(id) {
            None => {
                missing += 1;
                note(format!("missing   {id:?}: {document}"));
            }
            Some(other) if !same(document, other) => {
                different += 1;
                note(format!("different {id:?}: {}", difference("", document, other)));
            }
            Some(_) => {}
        }
    }
    for (id, document) in found {
        if !expected.contains_key(id) {
            orphaned += 1;
            note(format!("orphan    {id:?}: {document}"));
        }
    }
    if missing + orphaned + different == 0 {
        return Ok(());
    }
    Err(format!(
        "{index} differs from the database ({} documents, expected {}): {missing} missing, {different} different, {orphaned} that should not be there\n{}",
        found.len(),
        expected.len(),
        examples.join("\n")
    ))
}

fn same(expected: &Value, found: &Value) -> bool {
    match (expected, found) {
        (Value::Number(a), Value::Number(b)) => a == b || same_number(a, b),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            // What is null may be absent: a column that is added without a default rewrites no document.
            let same = |(key, value): (_, &Value)| b.get(key).map_or(value.is_null(), |other| same(value, other));
            a.iter().all(same) && b.keys().all(|key| a.contains_key(key))
        }
        _ => expected == found,
    }
}

/// The same number written with a fraction or exponent and without: json and jsonb do it differently.
fn same_number(a: &Number, b: &Number) -> bool {
    let integer = |number: &Number| number.as_i64().map(i128::from).or(number.as_u64().map(i128::from));
    match (integer(a), integer(b)) {
        (Some(integer), None) => b.as_f64().is_some_and(|float| float as i128 == integer && float.fract() == 0.0),
        (None, Some(_)) => same_number(b, a),
        _ => false,
    }
}

/// The first place where two values differ.
fn difference(path: &str, expected: &Value, found: &Value) -> String {
    if let (Value::Object(a), Value::Object(b)) = (expected, found) {
        for key in a.keys().chain(b.keys()) {
            match (a.get(key), b.get(key)) {
                (Some(x), Some(y)) if same(x, y) => {}
                (Some(Value::Null), None) => {}
                (Some(x), Some(y)) => return difference(&format!("{path}.{key}"), x, y),
                (Some(x), None) => return format!("{path}.{key} is absent, expected {x}"),
                (_, y) => return format!("{path}.{key} is {}, expected to be absent", y.unwrap_or(&Value::Null)),
            }
        }
    }
    format!("{path} is {found}, expected {expected}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_equal_that_mean_the_same_and_no_others() {
        assert!(same(&json!({"a": null, "b": 1}), &json!({"b": 1.0, "a": null})));
        assert!(same(&json!({"a": null}), &json!({})));
        assert!(!same(&json!({"a": 1}), &json!({})));
        assert!(!same(&json!({}), &json!({"a": null})));
        assert!(!same(&json!({"b": 1}), &json!({"b": "1"})));
        assert!(!same(&json!({"b": [1, 2]}), &json!({"b": [2, 1]})));
        // As floats these two are one.
        assert!(!same(&json!(9_007_199_254_740_993_i64), &json!(9_007_199_254_740_992.0)));
        assert!(same(&json!(1_000_000_000_000_000_i64), &json!(1e15)));
        assert_eq!(difference("", &json!({"a": {"b": 1}}), &json!({"a": {"b": 2}})), ".a.b is 2, expected 1");
        assert_eq!(difference("", &json!({"a": 1}), &json!({"b": null})), ".a is absent, expected 1");
    }
}
