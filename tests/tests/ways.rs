//! Ways from a related row to the documents that show it: each kind of value that may lead there, and each shape of view.

use pg_es_sync_tests::shop::{PRICES, Shop};
use pg_es_sync_tests::{Engine, Server, expect, unique, wait};
use postgres::Client;
use std::time::Duration;

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
            "x.no in (select s.no from (select y.no, y.k::citext as k from related y) s where s.k = r.k)",
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

/// A root, items that belong to it, a badge for its code, details under its key, and the kinds of items.
const ITEMS: &str = "create table root (id int primary key, code text, title text);
    create table item (no int primary key, root_id int, code text, name text, place int, kind int, shown bool default true);
    create table badge (code text primary key, label text);
    create table detail (id int primary key, text text);
    create table kind (kind int primary key, called text);
    insert into root select i, 'c' || i, 'root ' || i from generate_series(1, 8) i;
    insert into item select i, i % 5 + 1, 'c' || i % 5 + 1, 'item ' || i, i, i % 3 from generate_series(1, 12) i;
    insert into badge select 'c' || i, 'badge ' || i from generate_series(1, 6) i;
    insert into detail select i, 'detail ' || i from generate_series(1, 6) i;
    insert into kind select i, 'kind ' || i from generate_series(0, 3) i;";

/// What becomes of an item of which documents show the name, or of the first one by its place.
const SHOWN: &[&str] = &[
    "insert into item values (100, 2, 'c2', 'a new one', 0, 1)",
    "update item set name = 'another name' where no = 100",
    "update item set root_id = 3, code = 'c3' where no = 100",
    "update item set place = 50, name = 'z' where no = 100",
    "delete from item where no in (2, 7, 100)",
];

/// The same where the place decides which item is shown.
const ORDERED: &[&str] = &[
    SHOWN[0],
    SHOWN[1],
    SHOWN[2],
    "update item set place = 50 where no = 100",
    SHOWN[4],
    "delete from item where place = 3",
];

/// The same where its being there decides whether there is a document. Roots 6, 7 and 8 have no item.
const COUNTED: &[&str] = &[
    "insert into item values (100, 6, 'c6', 'a new one', 0, 1)",
    "update item set shown = false where no = 100",
    "update item set shown = true where no = 100",
    "update item set root_id = 7, code = 'c7' where no = 100",
    "delete from item where no = 100",
];

/// What becomes of the one detail of a root.
const DETAIL: &[&str] = &[
    "update detail set text = 'changed' where id = 3",
    "insert into detail values (7, 'new')",
    "update detail set id = 8 where id = 7",
    "delete from detail where id = 8",
];

const BADGE: &[&str] = &[
    "update badge set label = 'changed' where code = 'c3'",
    "insert into badge values ('c7', 'new')",
    "update badge set code = 'c8' where code = 'c7'",
    "delete from badge where code = 'c8'",
];

/// An item's kind, two steps from the document; item 1 is the first of root 2.
const KIND: &[&str] = &[
    "update kind set called = 'changed' where kind = 1",
    "update item set kind = 3 where no = 1",
    "update kind set kind = 9 where kind = 3",
    "update item set root_id = 8, code = 'c8', kind = 0 where no = 1",
    "delete from kind where kind = 2",
];

/// Name, view and steps.
const SHAPES: &[(&str, &str, &[&str])] = &[
    ("IN", "select r.id, r.title from root r where r.id in (select i.root_id from item i where i.shown)", COUNTED),
    (
        "= ANY (sub-select)",
        "select r.id, r.title from root r where r.id = any (select i.root_id from item i where i.shown)",
        COUNTED,
    ),
    (
        "IN with several columns",
        "select r.id, r.title from root r where (r.id, r.code) in (select i.root_id, i.code from item i where i.shown)",
        COUNTED,
    ),
    (
        "EXISTS",
        "select r.id, r.title from root r where exists (select from item i where i.root_id = r.id and i.shown)",
        COUNTED,
    ),
    (
        "NOT EXISTS",
        "select r.id, r.title from root r where not exists (select from item i where i.root_id = r.id and i.shown)",
        COUNTED,
    ),
    (
        "EXISTS within OR",
        "select r.id, r.title from root r
         where r.id = 1 or exists (select from item i where i.root_id = r.id and i.shown)",
        COUNTED,
    ),
    (
        "an anti-join",
        "select r.id, r.title from root r left join item i on i.root_id = r.id and i.shown where i.no is null",
        COUNTED,
    ),
    (
        "a number of rows",
        "select r.id, r.title from root r where (select count(*) from item i where i.root_id = r.id and i.shown) > 0",
        COUNTED,
    ),
    (
        "DISTINCT",
        "select r.id, r.title from root r join (select distinct root_id from item where shown) s on s.root_id = r.id",
        COUNTED,
    ),
    (
        "INTERSECT",
        "select r.id, r.title from root r
         join (select id from root intersect select root_id from item where shown) s on s.id = r.id",
        COUNTED,
    ),
    (
        "EXCEPT",
        "select r.id, r.title from root r
         join (select id from root except select root_id from item where shown) s on s.id = r.id",
        COUNTED,
    ),
    (
        "IN (... EXCEPT ...)",
        "select r.id, r.title from root r
         where r.id in (select id from root except all select root_id from item where shown)",
        COUNTED,
    ),
    (
        "GROUP BY with HAVING",
        "select r.id, count(*) as items from root r join item i on i.root_id = r.id
         group by r.id having bool_or(i.shown)",
        COUNTED,
    ),
    (
        "LATERAL with a LIMIT",
        "select r.id, x.name from root r
         left join lateral (select i.name from item i where i.root_id = r.id order by i.place, i.no limit 1) x on true",
        ORDERED,
    ),
    (
        "LATERAL after a comma, with OFFSET and FETCH",
        "select r.id, x.name from root r,
         lateral (select i.name from item i where i.root_id = r.id order by i.place, i.no
                  offset 0 rows fetch first 1 row only) x",
        ORDERED,
    ),
    (
        "a sub-select with a LIMIT",
        "select r.id, (select i.name from item i where i.root_id = r.id order by i.place, i.no limit 1) as name from root r",
        ORDERED,
    ),
    (
        "a sub-select with an OFFSET in an expression",
        "select r.id, case when r.id > 0 then coalesce((select i.name from item i where i.root_id = r.id
                                                        order by i.place desc, i.no offset 1 limit 1), '-') end
             || (select min(i.name) from item i where i.root_id = r.id) as names
         from root r",
        SHOWN,
    ),
    (
        "DISTINCT ON the link",
        "select r.id, x.name from root r
         left join (select distinct on (i.root_id) i.root_id, i.name from item i order by i.root_id, i.place, i.no) x
             on x.root_id = r.id",
        ORDERED,
    ),
    (
        "DISTINCT ON the key",
        "select distinct on (r.id) r.id, i.name from root r left join item i on i.root_id = r.id
         order by r.id, i.place, i.no",
        ORDERED,
    ),
    (
        "a window of the link",
        "select r.id, x.name, x.first from root r
         left join (select i.root_id, i.name, row_number() over w as n, first_value(i.name) over w as first
                    from item i window w as (partition by i.root_id order by i.place, i.no)) x
             on x.root_id = r.id and x.n = 1",
        ORDERED,
    ),
    (
        "a window over groups",
        "select r.id, x.names from root r
         left join (select i.root_id, string_agg(i.name, ',' order by i.no) as names,
                           rank() over (partition by i.root_id order by count(*) desc) as n
                    from item i group by i.root_id, i.shown) x on x.root_id = r.id and x.n = 1",
        SHOWN,
    ),
    (
        "GROUP BY in a sub-select",
        "select r.id, x.names from root r
         left join (select root_id, string_agg(name, ',' order by no) as names from item
                    group by root_id having count(*) > 0) x on x.root_id = r.id",
        SHOWN,
    ),
    (
        "grouping sets within a sub-select",
        "select r.id, (select string_agg(concat(s.kind, ':', s.n, ':', s.name), ',' order by s.kind, s.name)
                       from (select i.kind, count(*) as n, min(i.name) as name from item i where i.root_id = r.id
                             group by grouping sets ((i.kind), ())) s) as kinds
         from root r",
        &[SHOWN[0], SHOWN[1], "update item set kind = 2 where no = 100", SHOWN[2], SHOWN[4]],
    ),
    (
        "order and filter of an aggregate",
        "select r.id, (select string_agg(i.name, ',' order by i.place) filter (where i.shown)
                       from item i where i.root_id = r.id) as names
         from root r",
        &[
            SHOWN[0],
            SHOWN[1],
            "update item set place = 50 where no = 100",
            "update item set shown = false where no = 100",
        ],
    ),
    (
        "an array of a sub-select",
        "select r.id, array(select i.name from item i where i.root_id = r.id order by i.no) as names from root r",
        SHOWN,
    ),
    (
        "WITH",
        "with named as (select root_id, name, no from item), grouped as materialized (
             select root_id, string_agg(name, ',' order by no) as names from named group by root_id)
         select r.id, g.names, (select count(*) from named n where n.root_id = r.id and n.name like 'a%') as a
         from root r left join grouped g on g.root_id = r.id",
        SHOWN,
    ),
    (
        "WITH in a sub-select, reading from outside",
        "select r.id, (with mine as (select name, no from item i where i.root_id = r.id)
                       select string_agg(name, ',' order by no) from mine) as names
         from root r",
        SHOWN,
    ),
    (
        "UNION in a sub-select",
        "select r.id, (select string_agg(n, ',' order by n) from (
             select i.name from item i where i.root_id = r.id
             union select b.label from badge b where b.code = r.code) u (n)) as names
         from root r",
        &[SHOWN[0], SHOWN[1], BADGE[0], BADGE[1], BADGE[2], SHOWN[2], BADGE[3], SHOWN[4]],
    ),
    (
        "EXCEPT in a sub-select",
        "select r.id, (select string_agg(n, ',' order by n) from (
             select i.name from item i where i.root_id = r.id
             except select k.called from kind k join item i using (kind) where i.root_id = r.id) u (n)) as names
         from root r",
        SHOWN,
    ),
    (
        "RIGHT JOIN",
        "select r.id, string_agg(i.name, ',' order by i.no) as names from item i right join root r on i.root_id = r.id
         group by r.id",
        SHOWN,
    ),
    ("JOIN USING the key", "select id, title, text from root left join detail using (id)", DETAIL),
    ("JOIN USING with an alias", "select j.id, r.title, d.text from root r join detail d using (id) as j", DETAIL),
    ("NATURAL JOIN", "select * from root natural join detail", DETAIL),
    ("NATURAL LEFT JOIN", "select root.*, text from root natural left join detail", DETAIL),
    ("JOIN USING another column", "select r.id, code, label from root r left join badge b using (code)", BADGE),
    (
        "JOIN USING within a join",
        "select r.id, string_agg(x.called, ',' order by x.no) as kinds
         from root r left join (item i join kind k using (kind)) x on x.root_id = r.id group by r.id",
        KIND,
    ),
    (
        "LATERAL over two tables",
        "select r.id, x.name, x.called from root r
         left join lateral (select i.name, k.called from item i left join kind k using (kind)
                            where i.root_id = r.id order by k.called desc nulls last, i.no limit 1) x on true",
        KIND,
    ),
    (
        "DISTINCT ON over two tables",
        "select r.id, x.called from root r
         left join (select distinct on (i.root_id) i.root_id, k.called from item i join kind k on k.kind = i.kind
                    order by i.root_id, k.called desc) x on x.root_id = r.id",
        KIND,
    ),
    (
        "two steps by IN",
        "select r.id, (select string_agg(k.called, ',' order by k.kind) from kind k
                       where k.kind in (select i.kind from item i where i.root_id = r.id)) as kinds
         from root r",
        KIND,
    ),
    (
        "two steps by EXISTS",
        "select r.id, r.title from root r where exists (
             select from item i where i.root_id = r.id and exists (
                 select from kind k where k.kind = i.kind and k.called <> 'kind 1'))",
        &[
            "update item set kind = 1",
            "update kind set called = 'changed' where kind = 1",
            "update kind set called = 'kind 1' where kind = 1",
            "update item set kind = 2 where root_id = 3",
            "delete from kind where kind = 2",
        ],
    ),
    (
        "a view that groups",
        "select r.id, s.names from root r left join lateral (
             select string_agg(g.names, ';' order by g.kind) as names from grouped g where g.root_id = r.id) s on true",
        SHOWN,
    ),
];

#[test]
fn shapes_that_determine_a_way_are_followed() {
    let cases: Vec<Case> = SHAPES
        .iter()
        .map(|(name, view, steps)| Case {
            name: (*name).to_owned(),
            setup: format!(
                "{ITEMS} create view grouped as select root_id, kind, string_agg(name, ',' order by no) as names
                     from item group by root_id, kind;
                 create view document as {view}"
            ),
            steps: steps.iter().map(|step| (*step).to_owned()).collect(),
        })
        .collect();
    are_followed(&Engine::elasticsearch(), "", "", &cases);
}

/// On OpenSearch ways are no others, but a few of everything go there.
#[test]
fn ways_lead_to_documents_in_opensearch_too() {
    let picked = ["EXISTS", "LATERAL with a LIMIT", "DISTINCT ON over two tables", "UNION in a sub-select"];
    let cases: Vec<Case> = SHAPES
        .iter()
        .filter(|(name, ..)| picked.contains(name))
        .map(|(name, view, steps)| Case {
            name: (*name).to_owned(),
            setup: format!("{ITEMS} create view document as {view}"),
            steps: steps.iter().map(|step| (*step).to_owned()).collect(),
        })
        .collect();
    assert_eq!(cases.len(), picked.len());
    are_followed(&Engine::opensearch(), "", "", &cases);
}

/// In none of these an equality says which documents show a row: nothing is guessed.
#[test]
fn shapes_that_determine_no_way_are_refused() {
    let server = Server::with(&Engine::elasticsearch());
    let mut client = server.create_database("ways");
    client.batch_execute(ITEMS).expect("tables");
    let item = "item";
    for (name, table, view, why) in [
        (
            "grouping sets",
            item,
            "select r.id, x.n from root r
             left join (select root_id, count(*) as n from item group by grouping sets ((root_id), ())) x on x.root_id = r.id",
            "grouping sets",
        ),
        (
            "rollup",
            item,
            "select r.id, x.n from root r
             left join (select root_id, count(*) as n from item group by rollup (root_id)) x on x.root_id = r.id",
            "grouping sets",
        ),
        (
            "OFFSET alone",
            item,
            "select r.id, x.name from root r left join (select * from item order by place offset 1) x on x.root_id = r.id",
            "LIMIT",
        ),
        (
            "FETCH FIRST WITH TIES",
            item,
            "select r.id, x.name from root r
             left join (select * from item order by place fetch first 1 row with ties) x on x.root_id = r.id",
            "LIMIT",
        ),
        (
            "a LIMIT behind UNION",
            item,
            "select r.id, x.name from root r
             left join (select root_id, name from item union all select id, text from detail limit 5) x on x.root_id = r.id",
            "LIMIT",
        ),
        (
            "a window of something else than the link",
            item,
            "select r.id, x.n from root r left join (
                 select root_id, rank() over (partition by root_id order by place) as a,
                        rank() over (partition by kind order by place) as n from item) x on x.root_id = r.id",
            "window",
        ),
        (
            "a window over the roots themselves",
            "root",
            "select r.id, rank() over (order by i.name) as n from root r join item i on i.root_id = r.id",
            "window",
        ),
        (
            "a LIMIT over the roots themselves",
            "root",
            "select r.id, i.name from root r join item i on i.root_id = r.id order by i.place limit 5",
            "LIMIT",
        ),
        ("a scalar", item, "select r.id from root r where r.id = (select max(root_id) from item)", "equality"),
        (
            "a cross join",
            item,
            "select r.id, x.name from root r
             left join lateral (select i.name from item i join badge b on b.code = r.code order by i.no limit 1) x on true",
            "LIMIT",
        ),
        (
            "IS NOT DISTINCT FROM",
            item,
            "select r.id, i.name from root r join item i on i.root_id is not distinct from r.id",
            "equality",
        ),
        (
            "an expression",
            item,
            "select r.id, i.name from root r join item i on i.code = lower(r.code)",
            "the result of an expression",
        ),
        (
            "a type that takes a cast",
            item,
            "select r.id, i.name from root r join item i on i.no::numeric = r.id::numeric",
            "equality",
        ),
        ("FULL JOIN USING", "root", "select id, i.name from root full join (select root_id as id, name from item) i using (id)", "outer"),
        ("NOT IN", item, "select r.id from root r where r.id not in (select root_id from item)", "equality"),
        ("= ALL", item, "select r.id from root r where r.id = all (select root_id from item)", "equality"),
        ("<> ANY", item, "select r.id from root r where r.id <> any (select root_id from item)", "equality"),
        (
            "IN with a LIMIT",
            item,
            "select r.id from root r where r.id in (select root_id from item order by place limit 5)",
            "LIMIT",
        ),
        ("IN within OR", item, "select r.id from root r where r.id = 1 or r.id in (select root_id from item)", "equality"),
    ] {
        client.batch_execute(&format!("create view document as {view}")).expect(name);
        let refused = client.batch_execute("select es_sync.attach('root', document => 'document')").expect_err(name);
        let refused = refused.as_db_error().expect("Postgres says it");
        let expected = format!("cannot follow table public.{table}, which view public.document reads");
        assert_eq!((refused.code().code(), refused.message()), ("42P17", expected.as_str()), "{name}");
        let detail = refused.detail().unwrap_or_default();
        assert!(detail.contains(&format!("public.{table}: ")) && detail.contains(why), "{name}: {detail}");
        client.batch_execute("drop view document").expect("drop");
    }
}

const GATHERED: &str = "create extension citext;
    create table root (id int primary key, k text, c citext);
    create table item (no int primary key, k citext, name text);
    insert into root values (1, 'Key', 'Key'), (2, 'other', 'other');
    insert into item values (1, 'Key', 'a'), (2, 'KEY', 'b'), (3, 'other', 'c')";

/// What gathers rows: a row of it has `k` from one of those that are equal as citext.
const GATHERINGS: [&str; 5] = [
    "select k, string_agg(name, ',' order by no) as names from item group by k",
    "select distinct on (k) k, name as names from item order by k, no",
    "select k, string_agg(name, ',') over (partition by k order by no desc) as names from item",
    "select distinct k, k::text || '' as names from item",
    "select k, k::text as names from item except select 'none'::citext, null",
];

#[test]
fn rows_that_a_coarser_equality_gathers_determine_no_way_by_a_finer_one() {
    let server = Server::with(&Engine::elasticsearch());
    let mut client = server.create_database("ways");
    client.batch_execute(GATHERED).expect("tables");
    for rows in GATHERINGS {
        client
            .batch_execute(&format!(
                "create view document as select r.id, string_agg(g.names, ';' order by g.names) as names
                 from root r left join ({rows}) g on g.k = r.k group by r.id"
            ))
            .expect(rows);
        let refused = client.batch_execute("select es_sync.attach('root', document => 'document')").expect_err(rows);
        let refused = refused.as_db_error().expect("Postgres says it");
        let expected = "cannot follow table public.item, which view public.document reads";
        assert_eq!((refused.code().code(), refused.message()), ("42P17", expected), "{rows}");
        client.batch_execute("drop view document").expect("drop");
    }
}

#[test]
fn rows_that_are_gathered_by_the_equality_that_they_are_compared_by_are_followed() {
    let tables = GATHERED.replace("create extension citext;", "");
    let cases = GATHERINGS.map(|rows| Case {
        name: rows.to_owned(),
        setup: format!(
            "{tables}; create view document as select r.id, string_agg(g.names, ';' order by g.names) as names
             from root r left join ({rows}) g on g.k = r.c group by r.id"
        ),
        steps: ["update item set k = 'kEY', name = 'changed' where no = 1", "delete from item where k = 'key'"]
            .map(str::to_owned)
            .into(),
    });
    are_followed(&Engine::elasticsearch(), "create extension citext", "", &cases);
}

const SEASONS: &str = "create table root (id int primary key, at int);
    create table season (id int primary key, low int, name text);
    create view document as
        select r.id, r.at, (select string_agg(s.name, ',' order by s.id) from season s
                            where case when s.low = 0 then r.at > 20 else r.at = 100 / s.low end) as seasons
        from root r;
    insert into root select i, i from generate_series(1, 50) i;
    insert into season values (1, 10, 'a'), (2, 20, 'b');";

#[test]
fn a_declared_way_that_fails_has_all_documents_compared() {
    let mut shop = Shop::new(SEASONS);
    shop.run(
        "select es_sync.relate('root', 'season', 'select r.id from public.root r where r.at = 100 / related.low')",
    );
    shop.attach();
    shop.each(&["update season set name = 'changed' where id = 1"]);
    assert!(!shop.server.log().contains("could not follow"));
    shop.each(&[
        "update season set low = 0, name = 'x' where id = 1",
        // Together with rows that can be followed.
        "update season set name = name || '!'; insert into season values (3, 25, 'c')",
        "update season set low = 50 where id = 1",
        "delete from season where id = 3",
    ]);
    assert!(shop.server.log().contains("could not follow a change of a related row: SQLSTATE 22012"));
    assert_eq!(shop.server.unexpected_log_lines(&["could not follow a change"]), Vec::<String>::new());
}

#[test]
fn a_declared_way_whose_table_was_renamed_has_all_documents_compared_and_holds_nobody_back() {
    let mut shop = Shop::new(
        "create table root (id int primary key);
        create table price (id int primary key, root_id int, name text, amount int);
        create table alias (name text, root_id int);
        create function price_of(int) returns int stable language sql
            as 'select sum(amount)::int from public.price where root_id = $1';
        create table host (id int primary key, root_id int, name text);
        create view document as
            select r.id, public.price_of(r.id) as price, (select min(h.name) from host h where h.root_id = r.id + 0) as host
            from root r;
        insert into root select generate_series(1, 10);
        insert into price select i, i, 'p' || i, i from generate_series(1, 10) i;
        insert into alias select name, root_id from price;
        insert into host select i, i, 'host ' || i from generate_series(1, 10) i;
        select es_sync.relate('root', 'price', 'select a.root_id from public.alias a where a.name = related.name');
        select es_sync.relate('root', 'host', 'select related.root_id')",
    );
    shop.attach();
    shop.each(&["update price set amount = 100 where id = 1", "update host set name = 'first' where id = 1"]);
    shop.run("alter table alias rename to nickname");
    shop.run("update price set amount = 200 where id = 2");
    let started = std::time::Instant::now();
    shop.run("update host set name = 'second' where id = 2");
    wait::until("a change on another way has arrived", wait::SHORT, || {
        shop.engine.source(&shop.index, "2").is_some_and(|source| source.contains("second"))
    });
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    shop.settle();
    let log = shop.server.log();
    let warning = "could not follow a change of a related row: relation \"public.alias\" does not exist";
    assert_eq!(log.matches(warning).count(), 1, "it was tried again, and then given up");
    shop.each(&["update price set amount = 300 where id = 3; update host set name = 'third' where id = 3"]);
    shop.run(
        "select es_sync.relate('root', 'price', 'select a.root_id from public.nickname a where a.name = related.name')",
    );
    shop.settle();
    let before = shop.server.log().matches("could not follow").count();
    shop.each(&["update price set amount = 400 where id = 4"]);
    assert_eq!(shop.server.log().matches("could not follow").count(), before);
}

#[test]
fn a_declared_way_over_a_table_of_the_view_that_was_renamed_is_told_in_status_until_it_is_mended() {
    let mut shop = Shop::new(
        "create table root (id int primary key, at int);
        create table season (id int primary key, name text);
        create table span (season_id int, low int, high int);
        create view document as
            select r.id, (select string_agg(s.name, ',' order by s.id) from season s join span p on p.season_id = s.id
                          where r.at between p.low and p.high) as seasons
            from root r;
        insert into root select i, i from generate_series(1, 20) i;
        insert into season values (1, 'a'), (2, 'b'); insert into span values (1, 1, 10), (2, 5, 15);
        select es_sync.relate('root', 'span', 'select r.id from public.root r where r.at between related.low and related.high');
        select es_sync.relate('root', 'season', 'select r.id from public.span p join public.root r on r.at between p.low and p.high
                                                 where p.season_id = related.id')",
    );
    shop.attach();
    shop.each(&["update season set name = 'x' where id = 1", "update span set high = 18 where season_id = 2"]);
    shop.run("alter table span rename to reach");
    wait::until("the status says what is in the way", wait::SHORT, || {
        let obstacle = shop.text("select obstacle from es_sync.status");
        if obstacle.contains("relation \"public.span\" does not exist") { Ok(()) } else { Err(obstacle) }
    });
    shop.run("update season set name = 'y' where id = 1; update reach set low = 2");
    shop.run(
        "select es_sync.relate('root', 'season', 'select r.id from public.reach p
              join public.root r on r.at between p.low and p.high where p.season_id = related.id')",
    );
    shop.settle();
    assert_eq!(shop.text("select obstacle from es_sync.status"), "");
    shop.each(&["update season set name = 'z' where id = 1", "delete from reach where season_id = 2"]);
}

#[test]
fn a_way_is_declared_for_a_key_of_several_columns() {
    let mut shop = Shop::new(
        "create table root (tenant int, number text, at int, primary key (number, tenant));
        create table season (id int primary key, tenant int, low int, high int, name text);
        create view document as
            select r.tenant, r.number, replace(r.number, '|', '\\|') || '|' || r.tenant as id,
                   (select string_agg(s.name, ',' order by s.id) from season s
                    where s.tenant = r.tenant and r.at between s.low and s.high) as seasons
            from root r;
        insert into root select t, n || '|' || t, t * 10 + length(n) from generate_series(1, 3) t, unnest(array['a', 'bb', 'ccc']) n;
        insert into season values (1, 1, 0, 100, 'a'), (2, 2, 22, 100, 'b')",
    );
    let (message, ..) = shop.refused("select es_sync.relate('root', 'season', 'select related.tenant')");
    assert_eq!(message, "the way returns 1 columns, but the key of table public.root has 2");
    // In the order of the key.
    shop.run(
        "select es_sync.relate('root', 'season', 'select r.number, r.tenant from public.root r
             where r.tenant = related.tenant and r.at between related.low and related.high')",
    );
    shop.attach();
    shop.each(&[
        "update season set name = 'x' where id = 2",
        "update season set low = 0, high = 11 where id = 1",
        "update season set tenant = 3, low = null where id = 2; update season set low = 0, name = 'y' where id = 2",
        "delete from season where id = 1",
    ]);
}

#[test]
fn a_related_table_of_a_declared_way_may_be_dropped() {
    let mut shop = Shop::new(
        "create table root (id int primary key, title text);
        create table price (id int primary key, root_id int, amount int);
        create function price_of(int) returns int stable language plpgsql as
            $$ begin return (select amount from public.price where root_id = $1);
               exception when undefined_table then return null; end $$;
        create view document as select r.id, r.title, public.price_of(r.id) as price from root r;
        insert into root select i, 'title' from generate_series(1, 10) i;
        insert into price select i, i, i from generate_series(1, 10) i;
        select es_sync.relate('root', 'price', 'select related.root_id')",
    );
    shop.attach();
    shop.each(&["update price set amount = 100 where id = 1"]);
    assert_eq!(shop.text("select followed::text from es_sync.status"), "{price}");
    shop.run("begin; update price set amount = 100; drop table price; commit");
    shop.run("update root set title = 'changed'");
    shop.settle();
    wait::until("nobody follows it any more", wait::SHORT, || {
        let followed = shop.text("select followed::text from es_sync.status");
        let declared = shop.count("select count(*) from es_sync.declaration");
        if followed.is_empty() && declared == 0 { Ok(()) } else { Err((followed, declared)) }
    });
    shop.each(&["update root set title = 'again' where id < 5", "delete from root where id = 1"]);
    shop.run("create table price (id int primary key, root_id int, amount int); insert into price values (2, 2, 5)");
    shop.run("select es_sync.relate('root', 'price', 'select related.root_id')");
    shop.settle();
    shop.each(&["update price set amount = 7 where id = 2"]);
}

#[test]
fn a_way_is_declared_with_the_rights_of_the_table_s_owner_and_of_no_other() {
    let mut shop = Shop::new(
        "create role keeper; create role someone;
        grant create, usage on schema public to keeper; grant usage on schema es_sync to keeper, someone;
        grant execute on all functions in schema es_sync to keeper, someone;
        create table price (id int primary key, root_id int, amount int); create table secret (root_id int);
        insert into price select i, i, i from generate_series(1, 10) i; insert into secret values (1);
        grant select on price to keeper;
        set role keeper;
        create table root (id int primary key);
        create function price_of(int) returns int stable language sql as 'select amount from public.price where root_id = $1';
        create view document as select id, public.price_of(id) as price from root;
        insert into root select generate_series(1, 10);
        reset role",
    );
    shop.attach();
    let way = "select es_sync.relate('root', 'price', 'select related.root_id')";
    shop.run("grant trigger on price to someone");
    for role in ["someone", "keeper"] {
        shop.run(&format!("set role {role}"));
        let error = shop.client.batch_execute(way).expect_err("it takes the table's owner, and TRIGGER on the other");
        assert_eq!(error.code().expect("Postgres says it").code(), "42501", "{role}: {error:?}");
        shop.run("reset role");
    }
    // The administrator lends the way nothing: it is the owner who must not read this table.
    let (message, ..) = shop.refused(
        "select es_sync.relate('root', 'price', 'select s.root_id from public.secret s where s.root_id = related.root_id')",
    );
    assert_eq!(message, "permission denied for table secret");
    shop.run("grant trigger on price to keeper; set role keeper");
    shop.run("select es_sync.relate('root', 'price', 'select related.root_id where current_user = ''keeper''')");
    shop.run("reset role");
    shop.settle();
    shop.each(&["update price set amount = 100 where id = 1"]);
    // A right that is lost later: the way fails, and all documents are compared.
    shop.run(
        "grant select on secret to keeper; select es_sync.relate('root', 'price',
        'select related.root_id where exists (select from public.secret)'); revoke select on secret from keeper",
    );
    shop.settle();
    shop.each(&["update price set amount = 200 where id = 2"]);
    assert!(
        shop.server.log().contains("could not follow a change of a related row: permission denied for table secret")
    );
}

/// Who had written to the related table before it was followed has noted nothing.
#[test]
fn a_way_declared_under_a_running_writer_misses_nothing() {
    let mut shop = Shop::new(PRICES);
    shop.attach();
    let mut writers = [shop.server.connect("shop"), shop.server.connect("shop")];
    writers[0].batch_execute("begin; update price set amount = 100 where id = 1").expect("write");
    writers[1]
        .batch_execute("begin; update price set amount = 200 where id = 2; prepare transaction 'held'")
        .expect("prepare");
    let mut declaring = shop.server.connect("shop");
    let declared = std::thread::spawn(move || {
        declaring.batch_execute("select es_sync.relate('root', 'price', 'select related.root_id')")
    });
    let waits = "select count(*) from pg_locks where not granted and relation = 'price'::regclass";
    wait::until("it waits for the writers", wait::SHORT, || shop.count(waits) == 1);
    writers[0].batch_execute("update price set amount = 300 where id = 3; commit").expect("commit");
    assert_eq!(shop.count(waits), 1, "it waits for the prepared one, too");
    writers[1].batch_execute("commit prepared 'held'").expect("commit");
    declared.join().expect("the thread ends").expect("relate");
    shop.settle();
    shop.each(&["update price set amount = 400 where id = 4"]);
}

/// Each row's own documents, and those that show it: exactly these are sent again.
#[test]
fn sync_full_mends_exactly_the_documents_that_show_a_row() {
    let mut shop = Shop::new(
        "create table country (code text primary key, name text);
        create table city (id int primary key, country text, name text);
        create table tag (id int primary key, name text);
        create table root (id int primary key, city_id int, parent_id int, at int);
        create table tagging (root_id int, tag_id int, primary key (tag_id, root_id));
        create table season (id int primary key, low int, high int, name text);
        create table pair (a int, b text, city_id int, primary key (a, b));
        create view document as
            select r.id, c.name as city, k.name as country, p.at as parent,
                   (select string_agg(t.name, ',' order by t.id) from tag t join tagging g on g.tag_id = t.id
                    where g.root_id = r.id) as tags,
                   (select string_agg(s.name, ',' order by s.id) from season s where r.at between s.low and s.high) as seasons
            from root r left join root p on p.id = r.parent_id
            left join city c on c.id = r.city_id left join country k on k.code = c.country;
        create view pair_document as
            select p.a, p.b, c.name as city from pair p left join city c on c.id = p.city_id;
        insert into country values ('d|e', 'Germany'), ('fr', 'France');
        insert into city values (1, 'd|e', 'Berlin'), (2, 'fr', 'Paris'), (3, 'd|e', 'Bonn');
        insert into tag values (1, 'one'), (2, 'two'), (3, 'three');
        insert into root select i, i % 4, i / 3, i from generate_series(1, 12) i;
        insert into tagging select i, i % 3 + 1 from generate_series(1, 12) i;
        insert into season values (1, 2, 4, 'spring'), (2, 4, 9, 'summer');
        insert into pair select i, 'x|' || i, i % 4 from generate_series(1, 6) i;
        select es_sync.relate('root', 'season', 'select r.id from public.root r where r.at between related.low and related.high')",
    );
    shop.attach();
    let pairs = unique("pairs");
    shop.run(&format!("select es_sync.attach('pair', index => '{pairs}', document => 'pair_document')"));
    expect::settled(&mut shop.client);
    for (before, call, roots, of_pairs) in [
        ("", "'root', 3", "id = 3 or parent_id = 3", "false"),
        ("", "'city', 1", "city_id = 1", "city_id = 1"),
        ("", "'country', 'd|e'", "city_id in (1, 3)", "false"),
        ("", "'tag', 2, 3", "id % 3 in (1, 2)", "false"),
        ("", "'tagging', '2|4'", "id = 4", "false"),
        ("", "'season', 2", "at between 4 and 9", "false"),
        ("", r"'pair', '2|x\|2', '5|x\|5'", "false", "a in (2, 5)"),
        // Rows that are gone: what their keys lead to.
        ("delete from tag where id = 3", "'tag', 3", "id % 3 = 2", "false"),
        ("delete from tagging where root_id = 4", "'tagging', '2|4'", "id = 4", "false"),
        ("delete from city where id = 3", "'city', 3", "city_id = 3", "city_id = 3"),
        ("delete from root where id = 2", "'root', 2", "id = 2 or parent_id = 2", "false"),
        ("delete from season where id = 1", "'season', 1", "false", "false"),
        (r"delete from pair where a = 3", r"'pair', '3|x\|3'", "false", "a = 3"),
    ] {
        // What a deletion itself refreshes is over before.
        let ids = format!("select id::text from root where {roots}");
        let pair_ids = format!(r"select a || '|' || replace(b, '|', '\|') from pair where {of_pairs}");
        let mut expected = [texts(&mut shop, &ids), texts(&mut shop, &pair_ids)];
        shop.run(before);
        expect::settled(&mut shop.client);
        let indexes = [shop.index.clone(), pairs.clone()];
        for (index, expected) in indexes.iter().zip(&expected) {
            let there = shop.engine.documents(index).into_keys();
            for id in there.chain(expected.iter().cloned()) {
                let id: String = id.bytes().map(|byte| format!("%{byte:02X}")).collect();
                shop.engine.put(&format!("/{index}/_doc/{id}"), serde_json::json!({"broken": true}));
            }
        }
        shop.run(&format!("select es_sync.sync_full({call})"));
        expect::settled(&mut shop.client);
        for (index, expected) in indexes.iter().zip(&mut expected) {
            let documents = shop.engine.documents(index);
            let broken = |id: &String| documents.get(id).is_some_and(|document| document["broken"] == true);
            expected.sort();
            let left: Vec<&String> = expected.iter().filter(|id| broken(id)).collect();
            assert!(left.is_empty(), "sync_full({call}) left {left:?} of {index} broken");
            let others: Vec<&String> = documents.keys().filter(|id| !broken(id) && !expected.contains(id)).collect();
            assert!(others.is_empty(), "sync_full({call}) sent {others:?} of {index} as well");
        }
        // All of them, for the next one.
        shop.run("select es_sync.sync_where('root', 'true'), es_sync.sync_where('pair', 'true')");
        shop.settle();
        let query = r"select a || '|' || replace(b, '|', '\|'), row_to_json(d) from pair_document d";
        expect::documents_equal(&mut shop.client, query, &shop.engine, &pairs);
    }
}

fn texts(shop: &mut Shop, query: &str) -> Vec<String> {
    shop.client.query(query, &[]).expect("ids").iter().map(|row| row.get(0)).collect()
}

fn case(name: &str, setup: &str, steps: &[&str]) -> Case {
    Case {
        name: name.to_owned(),
        setup: setup.to_owned(),
        steps: steps.iter().map(|step| (*step).to_owned()).collect(),
    }
}

/// Rows of which it is easily overlooked: another row of their group is chosen, what leads to them changes with them, their
/// values are equal by another equality than their own, they are shown without what they are compared with.
#[test]
fn a_row_reaches_every_document_that_it_has_a_part_in_whatever_else_is_compared() {
    let first = |view: &str| format!("{ITEMS} create view document as {view}");
    let chosen: &[&str] = &[
        "update item set name = 'root 3' where code = 'c3'",
        "insert into item values (100, 3, 'c3', 'other', 0, 1)",
        "update item set place = 50 where no = 100",
        "update item set place = 0 where no = 100",
        "delete from item where no = 100",
    ];
    let cases = [
        case(
            "DISTINCT ON, compared",
            &first(
                "select r.id, r.title, x.no from root r
                 join (select distinct on (code) code, no, name from item order by code, place, no) x
                   on x.code = r.code and x.name = r.title",
            ),
            chosen,
        ),
        case(
            "LATERAL LIMIT, compared",
            &first(
                "select r.id, r.title, x.no from root r, lateral (
                     select i.no, i.name from item i where i.code = r.code order by i.place, i.no limit 1) x
                 where x.name = r.title",
            ),
            chosen,
        ),
        case(
            "window, compared",
            &first(
                "select r.id, r.title, x.no from root r join (
                     select code, no, name, row_number() over (partition by code order by place, no) as n from item) x
                   on x.code = r.code and x.name = r.title and x.n = 1",
            ),
            chosen,
        ),
        case(
            "LATERAL LIMIT over two tables, compared",
            "create table root (id int primary key, currency text);
             create table supplier (id int primary key, root_id int, currency text);
             create table offer (no int primary key, supplier_id int, currency text, price int, at int);
             create view document as select r.id, x.price from root r, lateral (
                 select o.price, s.currency from offer o join supplier s on s.id = o.supplier_id
                 where s.root_id = r.id and o.currency = r.currency order by o.at desc limit 1) x
             where x.currency = r.currency;
             insert into root select i, 'EUR' from generate_series(1, 3) i;
             insert into supplier values (1, 1, 'EUR'), (2, 1, 'USD'), (3, 2, 'EUR');
             insert into offer values (1, 1, 'EUR', 10, 1), (2, 3, 'EUR', 20, 1)",
            &[
                "insert into offer values (3, 2, 'EUR', 30, 2)",
                "update offer set at = 0 where no = 3",
                "update offer set at = 3 where no = 3",
                "update supplier set currency = 'EUR' where id = 2",
                "update offer set supplier_id = 1, at = 0 where no = 3",
                "delete from offer where no = 2",
            ],
        ),
        case(
            "split key",
            "create table root (a int, b int, primary key (a, b));
             create table x (no int primary key, a int, m int); create index on x (m);
             create table m (m int primary key, b int, name text);
             create view document as select r.a, r.b, r.a || '|' || r.b as id,
                 (select string_agg(m.name, ',' order by x.no) from x join m on m.m = x.m where x.a = r.a and m.b = r.b) as names
             from root r;
             insert into root select a, b from generate_series(1, 4) a, generate_series(1, 4) b;
             insert into m select i, i % 4 + 1, 'm ' || i from generate_series(1, 12) i;
             insert into x select i, i % 3 + 1, i from generate_series(1, 12) i",
            &[
                "update m set name = 'changed' where m = 3",
                "delete from x where no = 1; delete from m where m = 1",
                "insert into m values (1, 2, 'back'); insert into x values (1, 2, 1)",
                "update x set m = 2 where no = 5; update m set b = 3 where m = 5; update m set m = 50 where m = 5",
            ],
        ),
        case(
            "loose in between",
            "create table root (id int primary key, k text);
             create table mid (k text collate loose primary key);
             create table x (no int primary key, k text, name text);
             create view document as select r.id, string_agg(x.name, ',' order by x.no) as names
                 from root r left join mid m on m.k = r.k left join x on x.k = m.k group by r.id;
             insert into root values (1, 'Key'), (2, 'other'); insert into mid values ('KEY'), ('other');
             insert into x values (1, 'kEY', 'one'), (2, 'other', 'two')",
            &["update x set name = 'changed' where no = 1", "delete from x where no = 1"],
        ),
        case(
            "the same table as citext",
            "create table root (id text primary key, name text);
             create view document as select r.id, r.name,
                 (select string_agg(p.name, ',' order by p.id) from root p where p.id::citext = r.id::citext) as names
             from root r;
             insert into root values ('Key', 'one'), ('kEY', 'two'), ('other', 'three')",
            &["update root set name = 'changed' where id = 'Key'", "delete from root where id = 'Key'"],
        ),
        case(
            "over the same table as citext",
            "create table g (id int primary key, name text);
             create table root (id text primary key, g_id int);
             create view document as select r.id, (select string_agg(g.name, ',' order by p.id)
                 from root p join g on g.id = p.g_id where p.id::citext = r.id::citext) as names from root r;
             insert into g values (1, 'one'), (2, 'two'), (3, 'three');
             insert into root values ('Key', 1), ('kEY', 2), ('other', 3)",
            &["update g set name = 'changed' where id = 1", "delete from g where id = 2"],
        ),
        case(
            "lateral from outside",
            "create table root (id int primary key, rid int);
             create table rel (id int primary key, name text);
             create table y (no int primary key, foo int unique, root_id int, label text);
             create view document as select z.id, r.name, y.label
                 from root z join rel r on r.id = z.rid
                 left join (lateral (select r.id as rid) x join y on y.foo = x.rid) on y.root_id = z.id;
             insert into root select i, i from generate_series(1, 6) i;
             insert into rel select i, 'rel ' || i from generate_series(1, 6) i;
             insert into y select i, i, i, 'y ' || i from generate_series(1, 3) i",
            &["update rel set name = 'changed' where id = 2", "update rel set name = 'changed' where id = 5"],
        ),
        case(
            "children by a key of several columns",
            "create table root (t int, n int, parent int, name text, primary key (t, n));
             create view document as select r.t, r.n, r.t || '|' || r.n as id, r.name,
                 (select string_agg(c.name, ',' order by c.n) from root c where c.t = r.t and c.parent = r.n) as children
             from root r;
             insert into root select t, n, nullif(n / 2, 0), 'n ' || n from generate_series(1, 2) t, generate_series(1, 6) n",
            &[
                "insert into root select 1, n, null, 'new' from generate_series(10, 20) n",
                "update root set name = 'x' where n = 3",
                "update root set parent = null where n = 3",
                "update root set parent = 10 where t = 1 and n > 12",
                "delete from root where n in (2, 14)",
            ],
        ),
        case(
            "numbers beyond the key",
            "create table root (id int primary key, name text);
             create table item (no int primary key, root_id bigint, name text);
             create view document as select r.id, (select string_agg(i.name, ',' order by no) from item i where i.root_id = r.id) as names
             from root r;
             insert into root select i, 'root ' || i from generate_series(1, 5) i;
             insert into item select i, i, 'item ' || i from generate_series(1, 5) i",
            &[
                "insert into item select i, 2999999990 + i, 'n' from generate_series(10, 20) i; insert into item values (77, 1, 'x')",
                "update item set root_id = 3 where root_id = 3000000000",
            ],
        ),
        case(
            "a set whose column nobody takes",
            "create table root (id int primary key);
             create table item (no int primary key, root_id int, tags text[]);
             create view item_tag as select i.root_id, unnest(i.tags) as tag from item i;
             create view document as select r.id,
                 (select count(*) from item_tag t where t.root_id = r.id) as n from root r;
             insert into root select generate_series(1, 3);
             insert into item select i, i, '{a}'::text[] from generate_series(1, 3) i",
            &["update item set tags = tags || 'x'::text where no = 2", "update item set tags = '{}' where no = 3"],
        ),
        case(
            "a set below EXISTS",
            "create table root (id int primary key);
             create table item (no int primary key, root_id int, tags text[]);
             create view document as select r.id,
                 exists (select unnest(i.tags) from item i where i.root_id = r.id) as tagged from root r;
             insert into root select generate_series(1, 3);
             insert into item select i, i, '{a}'::text[] from generate_series(1, 3) i",
            &["update item set tags = '{}' where no = 2", "update item set tags = '{b}' where no = 2"],
        ),
        case(
            "a declared way to what an aggregate reads",
            "create table root (id int primary key);
             create table price (no int primary key, root_id int, name text, amount int);
             create function plus_prices(int, int) returns int stable language sql set search_path from current
                 as 'select $1 + sum(p.amount)::int from price p where p.root_id = $2';
             create aggregate priced(int) (sfunc = plus_prices, stype = int, initcond = '0');
             create view document as select r.id,
                 (select string_agg(p.name, ',' order by p.no) from price p where p.root_id = r.id) as names,
                 (select priced(v.id) from (values (r.id)) v (id)) as total
             from root r;
             insert into root select generate_series(1, 3);
             insert into price select i, i, 'p' || i, i from generate_series(1, 3) i;
             select es_sync.relate('root', 'price', 'select related.root_id')",
            &["update price set name = 'changed' where no = 1", "update price set amount = 100 where no = 2"],
        ),
        case(
            "what says how large a sample is",
            "create table root (id int primary key);
             create table item (no int primary key, root_id int);
             create table share (root_id int primary key, percent real);
             create view document as select r.id, (
                 select count(*) from item i
                 tablesample bernoulli (coalesce((select s.percent from share s where s.root_id = r.id), 100))
                 where i.root_id = r.id) as n
             from root r;
             insert into root select generate_series(1, 3);
             insert into item select i, i % 3 + 1 from generate_series(1, 12) i;
             insert into share values (2, 100)",
            &[
                "update share set percent = 0 where root_id = 2",
                "insert into share values (3, 0)",
                "delete from share",
                "insert into item values (100, 1)",
            ],
        ),
        case(
            "regclass",
            "create table root (id int primary key, k regclass);
             create table related (no int primary key, k regclass, name text);
             create view document as select r.id, (select string_agg(x.name, ',' order by x.no) from related x where x.k = r.k) as names
             from root r;
             insert into root values (1, 'root'), (2, 'related'); insert into related values (1, 'root', 'one'), (2, 'related', 'two')",
            &["update related set name = 'changed' where no = 1", "update related set k = 'root' where no = 2"],
        ),
        case(
            "four generations",
            "create table root (id int primary key, parent int, name text);
             create view document as select r.id, concat_ws('/', g.name, q.name, p.name, r.name) as path,
                 (select count(*) from root c join root d on d.parent = c.id join root e on e.parent = d.id where c.parent = r.id) as below
             from root r left join root p on p.id = r.parent left join root q on q.id = p.parent left join root g on g.id = q.parent;
             insert into root select i, nullif(i / 2, 0), 'n' || i from generate_series(1, 40) i",
            &[
                "update root set name = 'x' where id = 2",
                "update root set parent = 3 where id = 5",
                "update root set id = 100, parent = 6 where id = 4",
                "update root set parent = 100 where id = 8; update root set id = 101 where id = 100; update root set parent = 101 where parent = 100",
                "delete from root where id = 10; update root set parent = 7 where parent = 10",
                "delete from root where id in (20, 21, 11)",
            ],
        ),
        case(
            "merge, conflict, triggers",
            &format!("{ITEMS} create view document as select r.id, r.title, string_agg(i.name || coalesce(k.called, ''), ',' order by i.no) as names
               from root r left join item i on i.root_id = r.id left join kind k on k.kind = i.kind group by r.id;
               create function other() returns trigger language plpgsql as $$ begin
                   if new.name = 'move' then new.root_id := new.root_id % 8 + 1; end if; return new; end $$;
               create trigger b before insert or update on item for each row execute function other();
               create function after() returns trigger language plpgsql as $$ begin
                   if new.name = 'kind' then update kind set called = called || '!' where kind = old.kind;
                      update item set root_id = root_id % 8 + 1 where no = new.no + 1; end if; return null; end $$;
               create trigger a after update on item for each row execute function after();"),
            &[
                "merge into item i using (select * from root) r on r.id = i.no when matched and r.id < 3 then delete
                   when matched then update set root_id = r.id, name = 'merged' when not matched then insert values (r.id, r.id, 'c1', 'new', 1, 1)",
                "update item set name = 'move' where no in (4, 5)",
                "insert into item values (6, 3, 'c', 'y', 1, 2), (60, 3, 'c', 'move', 1, 2) on conflict do nothing",
                "insert into item select no, 5, 'c', 'kept', 1, 2 from item where no < 6
                 on conflict (no) do update set root_id = excluded.root_id, name = 'kept'",
                "update item set name = 'kind' where no in (6, 9)",
                "begin; savepoint a; update item set root_id = 7; rollback to a; update item set root_id = 8 where no = 7; savepoint b; update item set root_id = 1 where no = 7; release b; commit",
            ],
        ),
    ];
    are_followed(&Engine::elasticsearch(), TYPES, OTHER, &cases);
}

/// The view's own column says how many rows there are of a root, even where documents leave it out.
#[test]
fn a_set_is_followed_whose_column_is_excluded() {
    let mut shop = Shop::new(
        "create table root (id int primary key, marks text[]);
         create view marked as select r.id, unnest(r.marks) as mark from root r;
         create view document as select id from marked;
         insert into root select i, '{a}'::text[] from generate_series(1, 3) i;",
    );
    let attach = format!(
        "select es_sync.attach('root', index => '{}', document => 'marked', exclude => '{{mark}}')",
        shop.index
    );
    shop.run(&attach);
    shop.settle();
    shop.each(&["update root set marks = '{}' where id = 2", "update root set marks = '{b}' where id = 2"]);
}

const SUMMED: &str = "create table root (id int primary key);
    create table price (no int primary key, root_id int, name text, amount int);
    create function price_of(int) returns int stable language sql
        as 'select sum(amount)::int from public.price where root_id = $1';
    insert into root select generate_series(1, 10);
    insert into price select i, i, 'p' || i, i from generate_series(1, 10) i;
    select es_sync.relate('root', 'price', 'select related.root_id');";

/// The view shows other columns of the same table.
#[test]
fn a_declared_way_is_followed_for_columns_that_only_a_function_reads() {
    let mut shop = Shop::new(&format!(
        "{SUMMED} create view document as select r.id, public.price_of(r.id) as total,
             (select string_agg(p.name, ',') from price p where p.root_id = r.id) as names from root r"
    ));
    shop.attach();
    shop.each(&["update price set name = 'x' where no = 1", "update price set amount = 100 where no = 2"]);
}

#[test]
fn a_declared_way_is_followed_for_columns_that_only_the_filter_reads() {
    let filter = |id: &str| format!("(select max(p.amount) from public.price p where p.root_id = {id}) > 3");
    let mut shop = Shop::new(&format!(
        "{SUMMED} create view everything as select r.id, r.id as root,
             (select string_agg(p.name, ',') from price p where p.root_id = r.id) as names from root r;
         create view document as select * from everything where {}",
        filter("root")
    ));
    let attach = format!(
        "select es_sync.attach('root', index => '{}', document => 'everything', filter => '{}')",
        shop.index,
        filter("root")
    );
    shop.run(&attach);
    shop.settle();
    assert_eq!(shop.text("select not_followed::text from es_sync.status"), "{}");
    shop.each(&["update price set name = 'x' where no = 5", "update price set amount = 100 where no = 2"]);
    // The way that the view determines is none of the filter's.
    shop.run("select es_sync.relate('root', 'price', null)");
    assert!(shop.text("select not_followed::text from es_sync.status").contains("public.price: the filter reads it"));
}
