//! Odd values are indexed as they are, or parked with a reason; never dropped, and never in their neighbours' way.
//! On both products, for rows that are loaded and for rows that change.

use pg_es_sync_tests::engine::Product;
use pg_es_sync_tests::{Engine, Server, expect, unique, wait};
use postgres::Client;

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

/// A column, its type, and the values that are put into it, as SQL.
type Column<'a> = (&'a str, &'a str, &'a [(&'a str, Fate)]);

/// A database on the server for each product.
fn databases(server: &Server) -> [(Engine, Client); 2] {
    [("es", Engine::elasticsearch()), ("os", Engine::opensearch())].map(|(name, engine)| {
        let alter = format!("alter database {name} set es_sync.url = '{}'", engine.url());
        server.create_empty_database(name).batch_execute(&alter).expect("could not set the address");
        let mut client = server.connect(name);
        client
            .batch_execute("create extension pg_es_sync; set timezone = 'UTC'")
            .expect("could not create the extension");
        (engine, client)
    })
}

fn arrived(client: &mut Client) {
    wait::until("all is searchable", wait::LONG, || -> bool {
        client.query_one("select es_sync.wait(timeout => '20 s')", &[]).expect("wait").get(0)
    });
}

/// Puts each value into a row of its own, between good rows: once before the table is attached, once after. Then asks
/// what became of each.
#[track_caller]
fn fates(setup: &str, columns: &[Column]) {
    let server = Server::builder().start();
    for (engine, mut client) in databases(&server) {
        let name = unique("odd");
        let definitions: Vec<String> = columns.iter().map(|(column, kind, _)| format!("{column} {kind}")).collect();
        client
            .batch_execute(&format!("{setup}; create table {name} (id text primary key, {})", definitions.join(", ")))
            .expect("set up");
        for when in ["loaded", "changed"] {
            // In one transaction, so that they travel in one request.
            let mut rows = format!("begin; insert into {name} (id) values ('first {when}');\n");
            for (column, kind, values) in columns {
                for (n, (value, _)) in values.iter().enumerate() {
                    let insert = format!(
                        "insert into {name} (id, {column}) values ('{column} {n} {when}', ({value})::{kind});\n"
                    );
                    rows.push_str(&insert);
                }
            }
            rows.push_str(&format!("insert into {name} (id) values ('last {when}'); commit"));
            client.batch_execute(&rows).expect("insert");
            if when == "loaded" {
                client.batch_execute(&format!("select es_sync.attach('{name}')")).expect("attach");
            }
            arrived(&mut client);
        }
        let count: i64 = client.query_one(&format!("select count(*) from {name}"), &[]).expect("count").get(0);
        assert_eq!(count as usize, 4 + 2 * columns.iter().map(|(.., values)| values.len()).sum::<usize>());
        judge(&mut client, &engine, &name, "id ~ '^(first|last) '", "id", |_| ("a good row", Same));
        for (column, _, values) in columns {
            judge(&mut client, &engine, &name, &format!("id like '{column} %'"), column, |id| {
                values[id.split(' ').nth(1).and_then(|place| place.parse::<usize>().ok()).expect("a place")]
            });
        }
    }
}

#[track_caller]
fn judge<'a>(
    client: &mut Client,
    engine: &Engine,
    table: &str,
    which: &str,
    column: &str,
    case: impl Fn(&str) -> (&'a str, Fate),
) {
    let query = format!("select id, row_to_json(r.*)::text, to_json({column})::text from {table} r where {which}");
    for row in client.query(&query, &[]).expect("rows") {
        let (id, row, value): (String, String, Option<String>) = (row.get(0), row.get(1), row.get(2));
        let (what, mut fate) = case(&id);
        if let Either(elasticsearch, opensearch) = fate {
            fate = if engine.product() == Product::Elasticsearch { *elasticsearch } else { *opensearch };
        }
        let found = engine.source(table, &id);
        let letter = client
            .query_opt("select kind || ': ' || reason from es_sync.dead_letters where key = $1", &[&id])
            .expect("dead letters")
            .map(|row| row.get::<_, String>(0));
        let context = format!("{what} ({id}) on {:?}", engine.product());
        // A raw line end would be the end of the document.
        let row = row.replace('\n', " ");
        let wanted = match fate {
            Same => row,
            As(other) => {
                let (name, value) = (column.trim_matches('"'), value.expect("a value").replace('\n', " "));
                row.replacen(&format!("\"{name}\":{value}"), &format!("\"{name}\":{other}"), 1)
            }
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
    fates(
        "",
        &[
            ("ratio", "float4", &[("'NaN'", Same), ("'Infinity'", Same), ("'-Infinity'", Same), ("1e-45", Same)]),
            (
                "ratios",
                "float8[]",
                &[
                    ("array['NaN', 'Infinity', '-Infinity', '-0']", Same),
                    ("array['1.7976931348623157e308', '5e-324']", Same),
                ],
            ),
        ],
    );
}

#[test]
fn values_of_the_usual_types_are_written_as_row_to_json_writes_them() {
    fates(
        "create domain words as text; create domain amount as numeric(12, 3); create domain number as int;
         create domain moment as timestamptz; create domain yes as bool; create domain list as text[]",
        &[
            ("small", "smallint", &[("-32768", Same), ("32767", Same), ("0", Same), ("null", Same)]),
            ("middle", "int", &[("-2147483648", Same), ("2147483647", Same)]),
            ("large", "bigint", &[("-9223372036854775808", Same), ("9223372036854775807", Same)]),
            ("truth", "bool", &[("true", Same), ("false", Same), ("null", Same)]),
            ("fixed", "char(8)", &[("'ab'", Same), ("'\"\\'", Same), ("'äöü'", Same)]),
            ("short", "varchar(20)", &[("'twenty characters ab'", Same), ("E'tab\\there'", Same), ("''", Same)]),
            ("blocks", "text", &[("repeat('x', 15) || '\"' || repeat('y', 16) || E'\\n'", Same)]),
            ("packed", "text", &[("repeat('so \"much\" to say ', 1000)", Same)]),
            ("amount", "numeric(20, 4)", &[("-0.5", Same), ("12345678901234.5678", Same), ("1e-4", Same)]),
            ("day", "date", &[("'2000-02-29'", Same)]),
            ("local", "timestamp", &[("'1999-12-31 23:59:59.999999'", Same), ("'infinity'", Same)]),
            ("instant", "timestamptz(0)", &[("'2026-06-01 12:00:00+05:30'", Same)]),
            ("of_words", "words", &[("'of \"a\" domain'", Same)]),
            ("of_amount", "amount", &[("1.5", Same), ("'NaN'", Same)]),
            ("of_number", "number", &[("-7", Same)]),
            ("of_moment", "moment", &[("'2026-06-01 12:00:00.5+00'", Same)]),
            ("of_yes", "yes", &[("false", Same)]),
            ("of_list", "list", &[("array['a', null, 'b \"c\"']", Same)]),
            ("tags", "text[]", &[("'{}'", Same), ("array[['a', 'b'], ['c', null]]", Same)]),
        ],
    );
}

#[test]
fn numerics_of_any_size_are_indexed_or_parked() {
    fates(
        "",
        &[(
            "amount",
            "numeric",
            &[
                ("'NaN'", Same),
                ("'-Infinity'", Same),
                ("repeat('9', 900)", Same),
                ("'-0.' || repeat('7', 900)", Same),
                // The engines read numbers of 1,000 digits at the most.
                ("repeat('9', 1500)", Parked("Number value length")),
                ("'0.' || repeat('7', 15000)", Parked("Number value length")),
            ],
        )],
    );
}

#[test]
fn dates_without_end_before_christ_and_far_ahead_are_indexed_as_they_are() {
    fates(
        "",
        &[
            (
                "day",
                "date",
                &[
                    ("'infinity'", Same),
                    ("'-infinity'", Same),
                    ("'0044-03-15 BC'", Same),
                    ("'12345-06-07'", Same),
                    ("'5874897-12-31'", Same),
                ],
            ),
            (
                "moment",
                "timestamptz",
                &[
                    ("'infinity'", Same),
                    ("'4713-01-01 00:00+00 BC'", Same),
                    ("'294276-12-31 23:59:59.999999+00'", Same),
                    ("'2024-01-01 00:00+15:59:59'", Same),
                ],
            ),
        ],
    );
}

#[test]
fn ranges_without_end_are_open_and_bounds_beyond_the_engine_are_parked() {
    fates(
        "",
        &[
            (
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
            ),
            (
                "amounts",
                "numrange",
                &[
                    ("'[1,Infinity]'", As(r#"{"gte":1}"#)),
                    ("'(-Infinity,1.50]'", As(r#"{"lte":1.50}"#)),
                    ("'[1,NaN]'", Parked("finite")),
                    ("numrange(1, repeat('9', 900)::numeric)", Parked("finite")),
                ],
            ),
        ],
    );
}

#[test]
fn ranges_narrower_than_the_engine_counts_are_written_so_that_it_takes_them() {
    fates(
        "",
        &[
            (
                "during",
                "tsrange",
                &[
                    (
                        "'[2024-01-01 10:00:00.1234,2024-01-01 10:00:00.1239)'",
                        As(r#"{"gte":"2024-01-01T10:00:00.123","lte":"2024-01-01T10:00:00.123"}"#),
                    ),
                    (
                        "'(2024-01-01 10:00:00.1231,2024-01-01 10:00:00.1239]'",
                        As(r#"{"gte":"2024-01-01T10:00:00.123","lte":"2024-01-01T10:00:00.123"}"#),
                    ),
                    (
                        "'(1969-12-31 23:59:59.9985,1969-12-31 23:59:59.9995)'",
                        As(r#"{"gte":"1969-12-31T23:59:59.998","lte":"1969-12-31T23:59:59.999"}"#),
                    ),
                    (
                        "'(1969-12-31 23:59:59.998,1969-12-31 23:59:59.999)'",
                        As(r#"{"gte":"1969-12-31T23:59:59.998","lte":"1969-12-31T23:59:59.998"}"#),
                    ),
                    (
                        "'(2024-01-01 10:00,2024-01-01 10:00:00.0005)'",
                        As(r#"{"gte":"2024-01-01T10:00:00.000","lte":"2024-01-01T10:00:00.000"}"#),
                    ),
                    (
                        "'(2024-01-01 10:00,2024-01-01 10:00:00.002)'",
                        As(r#"{"gt":"2024-01-01T10:00:00.000","lt":"2024-01-01T10:00:00.002"}"#),
                    ),
                    (
                        "'[2024-01-01 10:00,2024-01-01 10:00:00.001)'",
                        As(r#"{"gte":"2024-01-01T10:00:00.000","lt":"2024-01-01T10:00:00.001"}"#),
                    ),
                    ("'(2024-01-01 10:00:00.5,infinity]'", As(r#"{"gt":"2024-01-01T10:00:00.500"}"#)),
                    ("'(,2024-01-01 10:00]'", As(r#"{"lte":"2024-01-01T10:00:00.000"}"#)),
                    ("'(,)'", As("{}")),
                    ("'empty'", As("null")),
                    ("'[infinity,)'", Parked("infinity")),
                    ("'[0044-03-15 BC,2024-01-01)'", Parked("0044-03-15T00:00:00.000 BC")),
                    ("'[2024-01-01,12345-01-01)'", Parked("12345-01-01T00:00:00.000")),
                ],
            ),
            (
                "held",
                "tstzrange",
                &[
                    (
                        "'[2024-01-01 12:00:00.1234+02,2024-01-01 10:00:00.1239+00)'",
                        As(r#"{"gte":"2024-01-01T10:00:00.123+00:00","lte":"2024-01-01T10:00:00.123+00:00"}"#),
                    ),
                    ("'[-infinity,2024-01-01 00:00+00)'", As(r#"{"lt":"2024-01-01T00:00:00.000+00:00"}"#)),
                    ("'[0044-03-15 BC,2024-01-01)'", Parked("0044-03-15T00:00:00.000+00:00 BC")),
                ],
            ),
            (
                "amounts",
                "numrange",
                &[
                    (
                        "'[1.00000000000000001,1.00000000000000002)'",
                        As(r#"{"gte":1.00000000000000001,"lte":1.00000000000000002}"#),
                    ),
                    ("'(-1.0000000000000002,-1)'", As(r#"{"gte":-1.0000000000000002,"lte":-1}"#)),
                    ("'(1,1.000000000000001)'", As(r#"{"gt":1,"lt":1.000000000000001}"#)),
                    ("'[0,0.5)'", As(r#"{"gte":0,"lt":0.5}"#)),
                ],
            ),
        ],
    );
}

#[test]
fn narrow_ranges_are_found_and_none_goes_on_behind_its_bounds() {
    let server = Server::builder().start();
    for (engine, mut client) in databases(&server) {
        let name = unique("ranges");
        client
            .batch_execute(&format!(
                "create table {name} (id text primary key, during tsrange, amount numrange);
                 insert into {name} (id, during) values
                     ('within', '[2024-01-01 10:00:00.1234,2024-01-01 10:00:00.1239)'),
                     ('between', '(2024-01-01 10:00:00.5,2024-01-01 10:00:00.501)'),
                     ('hour', '[2024-01-01 11:00,2024-01-01 12:00]'),
                     ('second', '(2024-01-01 13:00,2024-01-01 13:00:01)');
                 insert into {name} (id, amount) values
                     ('one', '[1.00000000000000001,1.00000000000000002)'),
                     ('two', '(2,2.0000000000000004)'),
                     ('nearly nothing', numrange(1e-400, 2e-400));
                 select es_sync.attach('{name}')"
            ))
            .expect("set up");
        arrived(&mut client);
        let letters: i64 = client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("letters").get(0);
        assert_eq!(letters, 0, "{:?}", engine.product());
        for (time, found) in [
            ("10:00:00.122", None),
            ("10:00:00.123", Some("within")),
            ("10:00:00.124", None),
            ("10:00:00.499", None),
            ("10:00:00.500", Some("between")),
            ("10:00:00.501", None),
            ("10:59:59.999", None),
            ("11:00:00.000", Some("hour")),
            ("12:00:00.000", Some("hour")),
            ("12:00:00.001", None),
            ("12:00:00.500", None),
            ("13:00:00.000", None),
            ("13:00:00.001", Some("second")),
            ("13:00:00.999", Some("second")),
            ("13:00:01.000", None),
        ] {
            let query = serde_json::json!({"term": {"during": format!("2024-01-01T{time}")}});
            let ids = engine.search_ids(&name, query);
            assert_eq!(ids, Vec::from_iter(found.map(str::to_owned)), "{time} on {:?}", engine.product());
        }
        for (amount, found) in [(1.0, "one"), (2.0, "two"), (0.0, "nearly nothing")] {
            let ids = engine.search_ids(&name, serde_json::json!({"term": {"amount": amount}}));
            assert_eq!(ids, [found], "{amount} on {:?}", engine.product());
        }
    }
}

#[test]
fn json_numbers_beyond_a_double_keep_their_digits() {
    fates(
        "",
        &[(
            "doc",
            "jsonb",
            &[
                (r#"'{"n": 1e400, "m": -1e-400, "i": 123456789012345678901234567890}'"#, Same),
                (r#"'{"n": ' || repeat('9', 900) || '}'"#, Same),
                (r#"'{"n": ' || repeat('9', 1500) || '}'"#, Parked("Number value length")),
            ],
        )],
    );
}

#[test]
fn json_field_names_may_be_empty_blank_dotted_or_long() {
    const IMMENSE: Fate = Parked("immense");
    fates(
        "",
        &[(
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
                ("jsonb_build_object(repeat('k', 40000), 1)", IMMENSE),
                // Elasticsearch does not index such a value; OpenSearch's type has no limit to set, and refuses.
                ("jsonb_build_object('k', repeat('v', 40000))", Either(&Same, &IMMENSE)),
            ],
        )],
    );
}

#[test]
fn json_that_is_no_object_is_wrapped_and_arrays_of_it_too() {
    fates(
        "",
        &[
            (
                "doc",
                "jsonb",
                &[
                    ("'{}'", Same),
                    ("'[]'", Same),
                    (r#"'[{"a": 1}, {"b": {"c": [[1, [2]], {}]}}]'"#, Same),
                    (r#"'[[1], {"a": 1}]'"#, As(r#"{"value": [[1], {"a": 1}]}"#)),
                    ("'null'", As("null")),
                ],
            ),
            (
                "docs",
                "jsonb[]",
                &[
                    (r#"array['{"a": 1}', '{"b": 1}']"#, Same),
                    (r#"array['{"a": 1}', '[1]', '2', 'null']"#, As(r#"{"value" : [{"a": 1},[1],2,null]}"#)),
                    (r#"array[array['{"a": 1}'], array['{"b": 1}']]"#, As(r#"{"value" : [[{"a": 1}],[{"b": 1}]]}"#)),
                    (r#"array['{"a": 1}', null]"#, As(r#"{"value" : [{"a": 1},null]}"#)),
                ],
            ),
        ],
    );
}

#[test]
fn raw_json_may_hold_line_ends_nuls_and_broken_characters() {
    fates(
        "",
        &[(
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
        )],
    );
}

/// A line end in the middle of a row's JSON would let a row's author write operations of his own into the request.
#[test]
fn a_line_end_in_nested_json_ends_no_document() {
    fates(
        "create type holder as (a int, j json)",
        &[
            (
                "raws",
                "json[]",
                &[(
                    r#"array[E'[\n{"delete":{"_id":"first loaded"}}\n]']"#,
                    As(r#"{"value" : [[ {"delete":{"_id":"first loaded"}} ]]}"#),
                )],
            ),
            ("held", "holder", &[(r#"row(1, E'[\n{"delete":{"_id":"first loaded"}}\n]')"#, Same)]),
        ],
    );
}

/// OpenSearch's process would end, and end again whenever it starts.
#[test]
fn json_nested_deeper_than_the_engine_bears_is_parked() {
    const DEEP: Fate = Parked("too_deep: document is nested more than 100 levels deep");
    fates(
        "create function pg_temp.deep(levels int, opening text, closing text) returns jsonb
             return (repeat(opening, levels) || '1' || repeat(closing, levels))::jsonb",
        &[(
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
        )],
    );
}

#[test]
fn long_and_odd_texts_are_indexed_as_they_are() {
    fates(
        "",
        &[
            (
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
            ),
            // A keyword, longer than Lucene takes.
            ("bits", "varbit", &[("repeat('1', 40000)", Same)]),
        ],
    );
}

#[test]
fn keys_may_be_empty_have_separators_and_fill_an_id() {
    let server = Server::builder().start();
    for (engine, mut client) in databases(&server) {
        let name = unique("long_keys");
        let keys = r"(''), ('|'), ('\'), ('\\|'), (repeat('i', 512)), (repeat('ü', 256)), (repeat('i', 513)), (repeat('ü', 257)), ('\' || repeat('i', 511))";
        client
            .batch_execute(&format!(
                "create table {name} (k text primary key, note text); insert into {name} values {keys};
                 select es_sync.attach('{name}')"
            ))
            .expect("set up");
        arrived(&mut client);
        client.batch_execute(&format!("update {name} set note = 'changed'")).expect("update");
        arrived(&mut client);
        let id = r"case when k = '' then '\' when left(k, 1) = '\' then '\' || k else k end";
        let fits = format!("select {id}, row_to_json(r.*) from {name} r where octet_length({id}) <= 512");
        expect::documents_equal(&mut client, &fits, &engine, &name);
        let parked =
            client.query("select kind, octet_length(document_id) from es_sync.dead_letters", &[]).expect("letters");
        let parked: Vec<(String, i32)> = parked.iter().map(|row| (row.get(0), row.get(1))).collect();
        assert_eq!(parked.len(), 3);
        assert!(parked.iter().all(|(kind, length)| kind == "id_too_long" && *length > 512), "{parked:?}");
        // Deleting what never had a document leaves nothing behind.
        client.batch_execute(&format!("delete from {name}")).expect("delete");
        arrived(&mut client);
        assert_eq!(engine.documents(&name).len(), 0);
    }
}

#[test]
fn keys_of_fixed_length_are_found_again() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    for (kind, first, second, third) in [
        ("char(5)", "'ab'", "'abcde'", "'c'"),
        ("bit(4)", "B'1010'", "B'1011'", "B'0000'"),
        ("name", "'x'", "'y'", "'z'"),
    ] {
        let name = unique("fixed");
        client
            .batch_execute(&format!(
                "create table {name} (k {kind} primary key, note text); insert into {name} values ({first}, 'loaded');
                 select es_sync.attach('{name}')"
            ))
            .expect("set up");
        expect::settled(&mut client);
        let query = format!("select format('%s', row_to_json(r.*)->>'k'), row_to_json(r.*) from {name} r");
        for statement in [
            format!(
                "insert into {name} values ({second}, 'new'); update {name} set note = 'changed' where k = {first}"
            ),
            format!("update {name} set k = {third} where k = {first}"),
            format!("delete from {name} where k = {second}"),
            format!("insert into {name} values ({second}, 'again'); update {name} set k = {first} where k = {third}"),
            format!("select es_sync.sync('{name}', {first}, {second})"),
            format!("delete from {name}"),
        ] {
            client.batch_execute(&statement).unwrap_or_else(|error| panic!("{error:?} in: {statement}"));
            println!("{kind}: {statement}");
            expect::settled(&mut client);
            expect::documents_equal(&mut client, &query, &engine, &name);
        }
    }
}

#[test]
fn columns_may_have_odd_names_and_what_the_engine_cannot_name_is_refused_at_once() {
    let server = Server::builder().start();
    for (engine, mut client) in databases(&server) {
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
        expect::table_equal(&mut client, &name, "id", &engine, &name);
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
