//! Odd values are indexed as they are, or parked with a reason; never dropped, and never in their neighbours' way.
//! On both products, for rows that are loaded and for rows that change.

use pg_es_sync_tests::engine::Product;
use pg_es_sync_tests::{Engine, Server, unique, wait};

/// What is to become of a value.
#[derive(Clone, Copy)]
enum Fate {
    /// The document is the row as `row_to_json` makes it, byte for byte.
    Same,
    /// So it is, but for the column, whose JSON is this.
    As(&'static str),
    /// It becomes a dead letter whose kind and reason hold this.
    Parked(&'static str),
    /// On Elasticsearch, on OpenSearch.
    Either(&'static Fate, &'static Fate),
}

use Fate::{As, Either, Parked, Same};

/// Puts each value, as SQL, into `column` of a row of its own, between good rows: once before the table is attached,
/// once after. Then asks what became of each.
#[track_caller]
fn fates(setup: &str, column: &str, kind: &str, values: &[(&str, Fate)]) {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        let name = unique("odd");
        client
            .batch_execute(&format!(
                "set timezone = 'UTC'; {setup};
                 create table {name} (id text primary key, {column} {kind}, beside int default 1)"
            ))
            .expect("set up");
        let mut insert = |when: &str| {
            let mut rows = vec![format!("('first {when}', null)")];
            rows.extend(values.iter().enumerate().map(|(n, (value, _))| format!("('{n} {when}', ({value})::{kind})")));
            rows.push(format!("('last {when}', null)"));
            // In one statement, so that they travel in one request.
            client
                .batch_execute(&format!("insert into {name} (id, {column}) values {}", rows.join(",\n")))
                .expect("insert");
            if when == "loaded" {
                client.batch_execute(&format!("select es_sync.attach('{name}')")).expect("attach");
            }
            wait::until("all is searchable", wait::LONG, || -> bool {
                client.query_one("select es_sync.wait(timeout => '20 s')", &[]).expect("wait").get(0)
            });
        };
        insert("loaded");
        insert("changed");
        let rows = format!("select id, row_to_json(r.*)::text, to_json({column})::text from {name} r");
        let rows = client.query(&rows, &[]).expect("rows");
        assert_eq!(rows.len(), 2 * (values.len() + 2));
        for row in rows {
            let (id, row, value): (String, String, Option<String>) = (row.get(0), row.get(1), row.get(2));
            let place = id.split(' ').next().and_then(|place| place.parse::<usize>().ok());
            let (what, mut fate) = place.map_or(("a good row", Same), |place| values[place]);
            if let Either(elasticsearch, opensearch) = fate {
                fate = if engine.product() == Product::Elasticsearch { *elasticsearch } else { *opensearch };
            }
            let found = engine.source(&name, &id);
            let letter = client
                .query_opt("select kind || ': ' || reason from es_sync.dead_letters where key = $1", &[&id])
                .expect("dead letters")
                .map(|row| row.get::<_, String>(0));
            let context = format!("{what} ({id}) on {:?}", engine.product());
            // A raw line end would be the end of the document.
            let row = row.replace('\n', " ");
            let wanted = match fate {
                Same => row,
                As(other) => row.replacen(&value.expect("a value").replace('\n', " "), other, 1),
                Parked(reason) => {
                    let letter = letter.unwrap_or_else(|| panic!("{context} has no dead letter"));
                    assert!(letter.contains(reason), "{context}: {letter}");
                    assert!(found.is_none(), "{context} is parked and has a document");
                    continue;
                }
                Either(..) => unreachable!("chosen above"),
            };
            assert_eq!(letter, None, "{context}");
            let found = found.unwrap_or_else(|| panic!("{context} has no document and no dead letter"));
            assert!(found == wanted, "{context}: {}", first_difference(&found, &wanted));
        }
    }
}

fn first_difference(found: &str, wanted: &str) -> String {
    let at = found.bytes().zip(wanted.bytes()).take_while(|(a, b)| a == b).count();
    let near = |text: &str| {
        let bytes = text.as_bytes();
        String::from_utf8_lossy(&bytes[at.saturating_sub(40).min(bytes.len())..(at + 80).min(bytes.len())]).into_owned()
    };
    format!("found ...{}..., wanted ...{}...", near(found), near(wanted))
}

#[test]
fn floats_that_are_no_numbers_are_indexed_as_they_are() {
    fates("", "ratio", "float4", &[("'NaN'", Same), ("'Infinity'", Same), ("'-Infinity'", Same), ("1e-45", Same)]);
    fates(
        "",
        "ratios",
        "float8[]",
        &[("array['NaN', 'Infinity', '-Infinity', '-0']", Same), ("array['1.7976931348623157e308', '5e-324']", Same)],
    );
}

#[test]
fn numerics_of_any_size_are_indexed_or_parked() {
    fates(
        "",
        "amount",
        "numeric",
        &[
            ("'NaN'", Same),
            ("'-Infinity'", Same),
            ("repeat('9', 900)", Same),
            ("'-0.' || repeat('7', 900)", Same),
            // The engines read numbers of 1,000 digits at the most.
            ("repeat('9', 1500)", Parked("Number value length")),
            ("'0.' || repeat('7', 20000)", Parked("Number value length")),
        ],
    );
}

#[test]
fn dates_without_end_before_christ_and_far_ahead_are_indexed_as_they_are() {
    fates(
        "",
        "day",
        "date",
        &[
            ("'infinity'", Same),
            ("'-infinity'", Same),
            ("'0044-03-15 BC'", Same),
            ("'12345-06-07'", Same),
            ("'5874897-12-31'", Same),
        ],
    );
    fates(
        "",
        "moment",
        "timestamptz",
        &[
            ("'infinity'", Same),
            ("'4713-01-01 00:00+00 BC'", Same),
            ("'294276-12-31 23:59:59.999999+00'", Same),
            ("'2024-01-01 00:00+15:59:59'", Same),
        ],
    );
}

#[test]
fn ranges_without_end_are_open_and_bounds_beyond_the_engine_are_parked() {
    fates(
        "",
        "days",
        "daterange",
        &[
            ("'[2024-01-01,infinity]'", As(r#"{"gte":"2024-01-01"}"#)),
            ("'[-infinity,2024-01-01)'", As(r#"{"lt":"2024-01-01"}"#)),
            ("'(,)'", As("{}")),
            ("'empty'", As("null")),
            ("'[0044-03-15 BC,2024-01-01)'", Parked("0044-03-15 BC")),
            ("'[2024-01-01,12345-01-01)'", Parked("12345-01-01")),
        ],
    );
    fates(
        "",
        "amounts",
        "numrange",
        &[
            ("'[1,Infinity]'", As(r#"{"gte":1}"#)),
            ("'(-Infinity,1.50]'", As(r#"{"lte":1.50}"#)),
            ("'[1,NaN]'", Parked("finite")),
            ("numrange(1, repeat('9', 900)::numeric)", Parked("finite")),
        ],
    );
}

#[test]
fn json_numbers_beyond_a_double_keep_their_digits() {
    fates(
        "",
        "doc",
        "jsonb",
        &[
            (r#"'{"n": 1e400, "m": -1e-400, "i": 123456789012345678901234567890}'"#, Same),
            (r#"'{"n": ' || repeat('9', 900) || '}'"#, Same),
            (r#"'{"n": ' || repeat('9', 1500) || '}'"#, Parked("Number value length")),
        ],
    );
}

#[test]
fn json_field_names_may_be_empty_blank_dotted_or_long() {
    const LONG_NAME: Fate = Parked("immense");
    fates(
        "",
        "doc",
        "jsonb",
        &[
            (r#"'{"": 1, "a": {"": {"": 2}}}'"#, Same),
            (r#"'{".": 1, "..": {"a..b": 1}, ".a": 2, "a.": 3}'"#, Same),
            (r#"'{"a.b": 1, "a": {"b": 2}}'"#, Same),
            (r#"'{" ": 1, "\t": 2, "a\nb": 3}'"#, Same),
            (r#"'{"_id": 1, "_source": 2, "id": {}}'"#, Same),
            ("jsonb_build_object(repeat('k', 1000), 1)", Same),
            ("(select jsonb_object_agg('k' || i, i) from generate_series(1, 5000) i)", Same),
            ("jsonb_build_object(repeat('k', 40000), 1)", LONG_NAME),
            // Elasticsearch does not index such a value; OpenSearch has no such limit for its type, and refuses.
            ("jsonb_build_object('k', repeat('v', 40000))", Either(&Same, &LONG_NAME)),
        ],
    );
}

#[test]
fn json_that_is_no_object_is_wrapped_and_arrays_of_it_too() {
    fates(
        "",
        "doc",
        "jsonb",
        &[
            ("'{}'", Same),
            ("'[]'", Same),
            (r#"'[{"a": 1}, {"b": {"c": [[1, [2]], {}]}}]'"#, Same),
            (r#"'[[1], {"a": 1}]'"#, As(r#"{"value": [[1], {"a": 1}]}"#)),
            ("'null'", As("null")),
        ],
    );
    fates(
        "",
        "docs",
        "jsonb[]",
        &[
            (r#"array['{"a": 1}', '{"b": 1}']::jsonb[]"#, Same),
            (r#"array['{"a": 1}', '[1]', '2', 'null']::jsonb[]"#, As(r#"{"value" : [{"a": 1},[1],2,null]}"#)),
            (r#"array[array['{"a": 1}'], array['{"b": 1}']]::jsonb[]"#, As(r#"{"value" : [[{"a": 1}],[{"b": 1}]]}"#)),
            (r#"array['{"a": 1}', null]::jsonb[]"#, As(r#"{"value" : [{"a": 1},null]}"#)),
        ],
    );
}

#[test]
fn raw_json_may_hold_line_ends_nuls_and_broken_characters() {
    fates(
        "",
        "raw",
        "json",
        &[
            (r#"E'{"a":\n\r\n 1,\n"b": [\n]\n}'"#, Same),
            (r#"'{"a": "x\u0000y"}'"#, Same),
            (r#"'"\u0000"'"#, As(r#"{"value" : "\u0000"}"#)),
            (r#"'{"x\u0000y": 1}'"#, Either(&Parked("reserved character"), &Same)),
            (r#"'{"a": "\ud800", "b": "\udc00x"}'"#, Same),
            (r#"'{"\ud800": 1}'"#, Same),
            (r#"'{"a": 1e400, "b": 1E-999999999, "c": 1e999999999, "d": -0}'"#, Same),
            (r#"'{"a": 1, "a": 2}'"#, Parked("Duplicate field")),
        ],
    );
}

/// A line end in the middle of a row's JSON would let a row's author write operations of his own into the request.
#[test]
fn a_line_end_in_nested_json_ends_no_document() {
    let operation = r#"{"delete":{"_id":"first loaded"}}"#;
    let json = format!(r#"E'[\n{operation}\n]'"#);
    fates("", "raws", "json[]", &[(&format!("array[{json}]::json[]"), As(&wrapped(operation)))]);
    fates("create type holder as (a int, j json)", "held", "holder", &[(&format!("row(1, {json})"), Same)]);
}

fn wrapped(operation: &str) -> &'static str {
    format!(r#"{{"value" : [[ {operation} ]]}}"#).leak()
}

#[test]
fn json_nested_deeper_than_the_engine_bears_is_parked() {
    const DEEP: Fate = Parked("too_deep: document is nested more than 100 levels deep");
    fates(
        "create function pg_temp.deep(levels int, opening text, closing text) returns jsonb
             return (repeat(opening, levels) || '1' || repeat(closing, levels))::jsonb",
        "doc",
        "jsonb",
        &[
            (r#"pg_temp.deep(21, '{"a":', '}')"#, Same),
            (r#"pg_temp.deep(99, '{"a":', '}')"#, Same),
            (r#"pg_temp.deep(100, '{"a":', '}')"#, DEEP),
            (r#"pg_temp.deep(2000, '{"a":', '}')"#, DEEP),
            (r#"pg_temp.deep(2000, '[', ']')"#, DEEP),
            (r#"jsonb_build_object('a', repeat('{', 2000))"#, Same),
        ],
    );
}

#[test]
fn long_and_odd_texts_are_indexed_as_they_are() {
    fates(
        "",
        "body",
        "text",
        &[
            ("repeat('word ', 1024 * 1024)", Same),
            ("repeat('x', 5 * 1024 * 1024)", Same),
            ("repeat('😀', 9000)", Same),
            ("(select string_agg(chr(i), '') from generate_series(1, 40) i) || chr(127) || chr(8232)", Same),
            ("chr(65535) || chr(1114111) || chr(57344)", Same),
            ("''", Same),
        ],
    );
    // A keyword, longer than Lucene takes.
    fates("", "bits", "varbit", &[("repeat('1', 40000)", Same)]);
}

#[test]
fn keys_may_be_empty_have_separators_and_fill_an_id() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        let name = unique("long_keys");
        let keys = r"(''), ('|'), ('\'), ('\\|'), (repeat('i', 512)), (repeat('ü', 256)), (repeat('i', 513)), (repeat('ü', 257)), ('\' || repeat('i', 511))";
        client
            .batch_execute(&format!(
                "create table {name} (k text primary key, note text); insert into {name} values {keys};
                 select es_sync.attach('{name}')"
            ))
            .expect("set up");
        let settled = |client: &mut postgres::Client| {
            wait::until("all is searchable", wait::LONG, || -> bool {
                client.query_one("select es_sync.wait(timeout => '20 s')", &[]).expect("wait").get(0)
            });
        };
        settled(&mut client);
        client.batch_execute(&format!("update {name} set note = 'changed'")).expect("update");
        settled(&mut client);
        let id = r"case when k = '' then '\' when left(k, 1) = '\' then '\' || k else k end";
        let fits = format!("select {id}, row_to_json(r.*) from {name} r where octet_length({id}) <= 512");
        pg_es_sync_tests::expect::documents_equal(&mut client, &fits, &engine, &name);
        let parked =
            client.query("select kind, octet_length(document_id) from es_sync.dead_letters", &[]).expect("letters");
        let parked: Vec<(String, i32)> = parked.iter().map(|row| (row.get(0), row.get(1))).collect();
        assert_eq!(parked.len(), 3);
        assert!(parked.iter().all(|(kind, length)| kind == "id_too_long" && *length > 512), "{parked:?}");
        // Deleting what never had a document leaves nothing behind.
        client.batch_execute(&format!("delete from {name}")).expect("delete");
        settled(&mut client);
        assert_eq!(engine.documents(&name).len(), 0);
    }
}

#[test]
fn keys_of_fixed_length_are_found_again() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    for (kind, first, second) in
        [("char(5)", "'ab'", "'abcde'"), ("bit(4)", "B'1010'", "B'1011'"), ("name", "'x'", "'y'")]
    {
        let name = unique("fixed");
        client
            .batch_execute(&format!(
                "create table {name} (k {kind} primary key, note text); insert into {name} values ({first}, 'loaded');
                 select es_sync.attach('{name}')"
            ))
            .expect("set up");
        pg_es_sync_tests::expect::settled(&mut client);
        client
            .batch_execute(&format!(
                "insert into {name} values ({second}, 'new'); update {name} set note = 'changed' where k = {first}"
            ))
            .expect("changes");
        let query = format!("select format('%s', row_to_json(r.*)->>'k'), row_to_json(r.*) from {name} r");
        pg_es_sync_tests::expect::settled(&mut client);
        pg_es_sync_tests::expect::documents_equal(&mut client, &query, &engine, &name);
    }
}

#[test]
fn columns_may_have_odd_names_and_what_the_engine_cannot_name_is_refused_at_once() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        let name = unique("names");
        let odd = [
            "a.b",
            "a.c.d",
            "sp ace",
            "quo\"te",
            "new\nline",
            "back\\slash",
            "*",
            "ünï",
            "x:y",
            "SELECT",
            "-",
            "#",
            "{",
            "$1",
        ];
        let columns: Vec<String> =
            odd.iter().map(|name| format!("\"{}\" int default 7", name.replace('"', "\"\""))).collect();
        client
            .batch_execute(&format!(
                "create table {name} (id int primary key, {}); insert into {name} (id) values (1);
                 select es_sync.attach('{name}'); insert into {name} (id) values (2)",
                columns.join(", ")
            ))
            .expect("set up");
        pg_es_sync_tests::expect::table_equal(&mut client, &name, "id", &engine, &name);
        let found = engine.search_ids(&name, serde_json::json!({"term": {"a.c.d": 7}}));
        assert_eq!(found, ["1", "2"]);
        for refused in
            [r#"" " int"#, r#""." int"#, r#"".a" int"#, r#""a." int"#, r#""a..b" int"#, r#"a int, "a.b" int"#]
        {
            let table = unique("refused");
            client.batch_execute(&format!("create table {table} (id int primary key, {refused})")).expect("table");
            let error = client.batch_execute(&format!("select es_sync.attach('{table}')")).expect_err(refused);
            assert_eq!(error.code().map(postgres::error::SqlState::code), Some("42939"), "{refused}");
        }
    }
}
