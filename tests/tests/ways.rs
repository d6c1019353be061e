//! Ways from a related row to the documents that show it: each kind of value that may lead there, and each shape of view.

use pg_es_sync_tests::{Engine, Server, expect, unique};
use postgres::Client;

/// A view over tables of its own, and what happens to them. `{...}` in the statements are replaced by the caller.
struct Case {
    name: String,
    setup: String,
    steps: Vec<String>,
}

/// Attaches `root` with the view `document` of each case, then takes their steps side by side, and compares all documents
/// of all cases after each. Every step changes a document.
#[track_caller]
fn are_followed(engine: &Engine, prepare: &str, writer_settings: &str, cases: &[Case]) {
    let server = Server::with(engine);
    let mut client = server.create_database("ways");
    let run = |client: &mut Client, what: &str, sql: &str| {
        client.batch_execute(sql).unwrap_or_else(|error| panic!("{what}: {error:?} in: {sql}"));
    };
    run(&mut client, "all", &format!("set timezone = 'UTC'; {prepare}"));
    let mut writer = server.connect("ways");
    run(&mut writer, "all", writer_settings);
    let indexes: Vec<String> = cases.iter().map(|_| unique("way")).collect();
    for (number, case) in cases.iter().enumerate() {
        let path = format!("create schema c{number}; set search_path = c{number}, public");
        run(&mut client, &case.name, &format!("{path}; {}", case.setup));
        let attach = format!("select es_sync.attach('root', index => '{}', document => 'document')", indexes[number]);
        run(&mut client, &case.name, &attach);
    }
    compare(&mut client, engine, cases, &indexes, "the first load");
    let content = |client: &mut Client, number: usize| -> Option<String> {
        let query = format!("select md5(string_agg(d::text, '' order by id)) from c{number}.document d");
        client.query_one(&query, &[]).expect("the view can be read").get(0)
    };
    let rounds = cases.iter().map(|case| case.steps.len()).max().unwrap_or_default();
    for round in 0..rounds {
        for (number, case) in cases.iter().enumerate() {
            let Some(step) = case.steps.get(round) else { continue };
            let before = content(&mut client, number);
            run(&mut writer, &case.name, &format!("set search_path = c{number}, public; {step}"));
            assert_ne!(before, content(&mut client, number), "{}: it changes a document: {step}", case.name);
        }
        compare(&mut client, engine, cases, &indexes, &format!("step {}", round + 1));
    }
    assert_eq!(server.unexpected_log_lines(&[]), Vec::<String>::new());
}

/// All is searchable, and each index is what its view says.
#[track_caller]
fn compare(client: &mut Client, engine: &Engine, cases: &[Case], indexes: &[String], when: &str) {
    expect::settled(client);
    let differing: Vec<String> = cases
        .iter()
        .enumerate()
        .filter_map(|(number, case)| {
            let query = format!("select id, row_to_json(d) from c{number}.document d");
            let difference = expect::compare(client, &query, engine, &indexes[number]).err()?;
            let step = case.steps.iter().map(String::as_str).collect::<Vec<_>>().join("\n  ");
            Some(format!("{} after {when}: {difference}\n  {step}", case.name))
        })
        .collect();
    assert!(differing.is_empty(), "{}", differing.join("\n"));
}

/// Settings of a session whose texts of values are not ours.
const OTHER: &str = "set datestyle = 'German, DMY'; set intervalstyle = 'sql_standard'; set timezone = 'Asia/Kolkata';
                     set extra_float_digits = -3; set bytea_output = 'escape'";

/// For each kind of the linking columns: a value, another text that equals it, and a third that does not.
const VALUES: [(&str, [&str; 3]); 30] = [
    ("numeric", ["1.0", "1.00", "2"]),
    ("citext", ["'Key'", "'kEY'", "'other'"]),
    ("text collate loose", ["'Key'", "'kEY'", "'other'"]),
    ("varchar(20)", ["'a|b'", "'a|b'", r"'\N'"]),
    ("char(5)", ["'a'", "'a  '", "'b'"]),
    ("name", ["'a'", "'a'", "'b'"]),
    (r#""char""#, ["'a'", "'a'", "'b'"]),
    ("float8", ["'0'", "'-0'", "0.1::float8 + 0.2"]),
    ("float4", ["0.1", "0.1", "'NaN'"]),
    ("timestamptz", ["'2024-07-01 12:00:00.000001+02'", "'2024-07-01 10:00:00.000001+00'", "'infinity'"]),
    ("timestamp", ["timestamp '2024-07-01 12:00'", "timestamp '2024-07-01 12:00'", "timestamp '0044-03-15 BC'"]),
    ("date", ["date '2024-02-03'", "date '2024-02-03'", "date '0044-03-15 BC'"]),
    ("time", ["time '12:00:00.5'", "time '12:00:00.5'", "time '24:00'"]),
    ("timetz", ["'12:00+02'", "'12:00+02'", "'12:00+00'"]),
    ("interval", ["interval '1 mon'", "interval '30 days'", "interval '-1 day -02:03:04.5'"]),
    ("mood", ["'sad'", "'sad'", "'ok|so'"]),
    ("amount", ["1.0", "1.00", "2"]),
    ("nickname", ["'Key'", "'kEY'", "'other'"]),
    ("bytea", [r"'\x7c5c4e00'::bytea", r"'\x7c5c4e00'::bytea", r"'\x'::bytea"]),
    ("jsonb", [r#"'{"a": 1.0, "b|": 2}'"#, r#"'{"b|": 2, "a": 1.00}'"#, "'[]'"]),
    ("int4range", ["'[1,5]'", "'[1,6)'", "'empty'"]),
    ("inet", ["'10.0.0.1'", "'10.0.0.1/32'", "'::1'"]),
    ("money", ["1234.5::money", "1234.50::money", "(-1)::money"]),
    ("boolean", ["true", "'yes'", "false"]),
    ("int[]", ["'{1,2}'", "'{1, 2}'", "'{}'"]),
    ("text[]", [r#"'{"a|b",NULL}'"#, r#"'{a|b, null}'"#, r#"'{"\\N"}'"#]),
    ("pair", ["row(1.0, date '2024-02-03')::pair", "row(1.00, date '2024-02-03')::pair", "row(null, null)::pair"]),
    ("uuid", ["'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'", "'{a0eebc999c0b4ef8bb6d6bb9bd380a11}'", "gen_random_uuid()"]),
    ("bit varying", ["B'101'", "B'101'", "B''"]),
    ("xid8", ["'7'", "'7'", "'18446744073709551615'"]),
];

const TYPES: &str = "create extension citext;
    create collation loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
    create type mood as enum ('sad', 'ok|so'); create domain amount as numeric check (value > 0);
    create domain nickname as citext; create type pair as (a numeric, b date)";

/// Steps for a table `related (no, k, name)` of which documents show those that have the root's `k`.
fn steps(kind: &str, [a, same, b]: [&str; 3]) -> Vec<String> {
    [
        format!("insert into related values (3, {same}, 'three')"),
        "update related set name = 'changed' where no = 1".to_owned(),
        format!("update related set k = {b} where no = 1"),
        format!("update related set k = {same} where no = 1"),
        format!("update related set k = ({a})::{} where no = 2", kind.replace(" collate loose", "")),
        "update related set k = null where no = 3".to_owned(),
        format!("update root set k = {b} where id = 4; update related set k = {b} where no = 3"),
        "delete from related where no in (1, 3)".to_owned(),
    ]
    .into()
}

fn rows([a, same, b]: [&str; 3]) -> String {
    format!(
        "insert into root values (1, {a}), (2, {b}), (3, null), (4, {same});
         insert into related values (1, {same}, 'one'), (2, {b}, 'two')"
    )
}

#[test]
fn values_that_lead_to_documents_are_compared_as_the_view_compares_them() {
    let mut cases = Vec::new();
    for (kind, values) in VALUES {
        cases.push(Case {
            name: kind.to_owned(),
            setup: format!(
                "create table root (id int primary key, k {kind});
                 create table related (no int primary key, k {kind}, name text);
                 create view document as
                     select r.id, (select string_agg(x.name, ',' order by x.no) from related x where x.k = r.k) as names
                     from root r; {}",
                rows(values)
            ),
            steps: steps(kind, values),
        });
    }
    // Compared as what the columns are not, or with a column of another type.
    for (name, [root, related], condition, values) in [
        ("text as citext", ["text", "text"], "x.k::citext = r.k::citext", ["'Key'", "'kEY'", "'other'"]),
        ("text and citext as citext", ["text", "citext"], "x.k = r.k::citext", ["'Key'", "'kEY'", "'other'"]),
        ("citext as text", ["citext", "citext"], "x.k::text = r.k::text", ["'Key'", "'Key'", "'KEY'"]),
        ("text as char", ["text", "text"], "x.k::bpchar = r.k::bpchar", ["'a '", "'a  '", "'b'"]),
        ("varchar and char as char", ["varchar", "char(5)"], "x.k = r.k::bpchar", ["'a '", "'a  '", "'b'"]),
        ("varchar and text", ["varchar", "text"], "x.k = r.k", ["'a '", "'a '", "'a'"]),
        ("int and bigint", ["int", "bigint"], "x.k = r.k", ["1", "1", "2"]),
        ("float4 and float8", ["float4", "float8"], "x.k = r.k", ["0.5", "0.5", "'-Infinity'"]),
        (
            "date and timestamptz",
            ["date", "timestamptz"],
            "x.k = r.k",
            ["'2024-02-03Z'", "'2024-02-03 00:00Z'", "'infinity'"],
        ),
        ("oid and int as oid", ["oid", "int"], "x.k::oid = r.k", ["1", "1", "2"]),
        (
            "in a sub-select",
            ["citext", "text"],
            "exists (select from (select x.k::citext as k) s where s.k = r.k)",
            ["'Key'", "'kEY'", "'b'"],
        ),
        ("an element of varchar[]", ["varchar[]", "text"], "x.k = any (r.k)", ["", "", ""]),
        ("an element as citext", ["text[]", "citext"], "x.k = any (r.k::citext[])", ["", "", ""]),
        ("one of citext[]", ["citext", "citext[]"], "r.k = any (x.k)", ["", "", ""]),
        ("one of varchar[] as citext", ["text", "varchar[]"], "r.k::citext = any (x.k::citext[])", ["", "", ""]),
    ] {
        let array = |kind: &str, [a, same, b]: [&str; 3]| match kind.ends_with("[]") {
            true => {
                [format!("array[{a}, {b}]::{kind}"), format!("array[{same}]::{kind}"), format!("array[{b}]::{kind}")]
            }
            false => [a, same, b].map(str::to_owned),
        };
        let values = if values[0].is_empty() {
            let same = if name.contains("varchar[]") && !name.contains("citext") { "'Key'" } else { "'kEY'" };
            ["'Key'", same, "'other'"]
        } else {
            values
        };
        let (of_root, of_related) = (array(root, values), array(related, values));
        let [a, same, b] = &of_root;
        let [a2, same2, b2] = &of_related;
        cases.push(Case {
            name: name.to_owned(),
            setup: format!(
                "create table root (id int primary key, k {root});
                 create table related (no int primary key, k {related}, name text);
                 create view document as
                     select r.id, (select string_agg(x.name, ',' order by x.no) from related x where {condition}) as names
                     from root r;
                 insert into root values (1, {a}), (2, {b}), (3, null), (4, {same});
                 insert into related values (1, {same2}, 'one'), (2, {b2}, 'two')"
            ),
            steps: vec![
                format!("insert into related values (3, {same2}, 'three')"),
                "update related set name = 'changed' where no = 1".to_owned(),
                format!("update related set k = {b2} where no = 1"),
                format!("update related set k = {a2} where no = 1"),
                "update related set k = null where no = 3".to_owned(),
                "delete from related where no = 1".to_owned(),
            ],
        });
    }
    are_followed(&Engine::elasticsearch(), TYPES, OTHER, &cases);
}
