//! Keys of every kind: the document's id is the key's text, whatever the session's settings, and each row has one
//! document. Changed, swapped and reused keys are in statements.rs, long and odd texts in values.rs.

use pg_es_sync_tests::{Engine, Server, expect, named, process, unique, wait};
use postgres::Client;

/// The settings that keys are written with.
const CANONICAL: &str = "set datestyle = 'ISO, YMD'; set intervalstyle = 'iso_8601'; set timezone = 'UTC';
                         set extra_float_digits = 1; set bytea_output = 'hex'; set lc_monetary = 'C'";
/// None of these is any of those.
const OTHER: &str = "set datestyle = 'German, DMY'; set intervalstyle = 'sql_standard'; set timezone = 'Asia/Kolkata';
                     set extra_float_digits = -3; set bytea_output = 'escape'";

/// Loads, inserts, updates, changes and deletes rows with four different keys, alone, as the first of two key columns, and
/// with documents from a view, from a session with other settings than ours.
#[track_caller]
fn each_key_has_its_document(setup: &str, kind: &str, keys: [&str; 4]) {
    each_key_has_its_document_with(setup, kind, "k", keys);
}

/// As above, where the document shows the key as `value`.
#[track_caller]
fn each_key_has_its_document_with(setup: &str, kind: &str, value: &str, keys: [&str; 4]) {
    each_key_has_its_document_on(&Server::with(&Engine::elasticsearch()), OTHER, setup, kind, value, keys);
}

#[track_caller]
fn each_key_has_its_document_on(
    server: &Server,
    settings: &str,
    setup: &str,
    kind: &str,
    value: &str,
    keys: [&str; 4],
) {
    let engine = Engine::elasticsearch();
    let mut client = server.create_database("app");
    client.batch_execute(&format!("{CANONICAL}; {setup}")).expect("set up");
    let (alone, pair, viewed) = (unique("key"), unique("key"), unique("key"));
    let [first, second, third, fourth] = keys;
    let mut writer = server.connect("app");
    writer.batch_execute(settings).expect("settings");
    for table in [&alone, &pair, &viewed] {
        let key = if *table == pair { "k, part" } else { "k" };
        let (view, document) = match *table == viewed {
            true => {
                (format!("create view shown as select k, upper(note) as note from {table};"), ", document => 'shown'")
            }
            false => (String::new(), ""),
        };
        client
            .batch_execute(&format!(
                "create table {table} (note text, part text default 'a|b', k {kind}, primary key ({key})); {view}
                 insert into {table} (k, note) values ({first}, 'loaded'), ({second}, 'loaded');
                 select es_sync.attach('{table}'{document})"
            ))
            .expect("attach");
    }
    let id = |text: &str| format!(r"case when left({text}, 1) = '\' then '\' || {text} else {text} end");
    let pair_id = r#"(replace(replace(format('%s', k) collate "C", '\', '\\'), '|', '\|') || '|a\|b')"#;
    let document = format!("json_build_object('note', note, 'part', part, 'k', {value})");
    let alone_rows = format!("select {}, {document} from {alone}", id(r#"(format('%s', k) collate "C")"#));
    let pair_rows = format!("select {}, {document} from {pair}", id(pair_id));
    let viewed_rows = format!(
        "select {}, json_build_object('note', upper(note), 'k', {value}) from {viewed}",
        id(r#"(format('%s', k) collate "C")"#)
    );
    for change in [
        String::new(),
        format!("insert into T (k, note) values ({third}, 'inserted')"),
        "update T set note = 'changed'".to_owned(),
        format!("update T set k = {fourth} where k = {first}"),
        format!("begin; delete from T where k = {second}; insert into T (k, note) values ({second}, 'again'); commit"),
        format!("delete from T where k = {third}"),
        format!("insert into T (k, note) values ({third}, 'once more'), ({first}, 'once more')"),
    ] {
        for table in [&alone, &pair, &viewed] {
            let change = change.replace("T ", &format!("{table} "));
            writer.batch_execute(&change).unwrap_or_else(|error| panic!("{error:?} in: {change}"));
        }
        expect::settled(&mut client);
        expect::documents_equal(&mut client, &alone_rows, &engine, &alone);
        expect::documents_equal(&mut client, &pair_rows, &engine, &pair);
        expect::documents_equal(&mut client, &viewed_rows, &engine, &viewed);
    }
    // What is asked for by hand is written as people write it.
    let by_hand = if kind.ends_with("[]") { "k::text" } else { "k" };
    writer
        .batch_execute(&format!("select es_sync.sync('{alone}', {by_hand}) from {alone}"))
        .unwrap_or_else(|error| panic!("{error:?}"));
    for table in [&alone, &pair, &viewed] {
        client.batch_execute(&format!("select es_sync.verify('{table}')")).expect("verify");
    }
    expect::settled(&mut client);
    let differing: i64 = client
        .query_one(
            "select coalesce(sum(missing + different + orphaned), 0)::int8 from es_sync.jobs where kind = 'verify'",
            &[],
        )
        .expect("jobs")
        .get(0);
    assert_eq!(differing, 0, "{kind}");
    expect::documents_equal(&mut client, &alone_rows, &engine, &alone);
}

#[test]
fn uuid_keys_identify_documents() {
    each_key_has_its_document(
        "",
        "uuid",
        [
            "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'::uuid",
            "'{a0eebc99-9c0b4ef8-bb6d6bb9-bd380a12}'::uuid",
            "'00000000-0000-0000-0000-000000000000'::uuid",
            "'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid",
        ],
    );
}

#[test]
fn text_keys_with_every_separator_and_beyond_ascii_identify_documents() {
    each_key_has_its_document(
        "",
        "text",
        ["'a|b/c?d#e&f%20=g'", "'ünï \u{1F600} 漢字'", r#"'"quoted" {json} \back'"#, "E'line\\nfeed\\ttab, *'"],
    );
}

#[test]
fn varchar_keys_identify_documents() {
    each_key_has_its_document("", "varchar(10)", ["'a'", "'a '", "' a'", "'ä|b'"]);
}

#[test]
fn smallint_and_bigint_keys_identify_documents() {
    each_key_has_its_document("", "smallint", ["1", "-1", "32767", "(-32768)"]);
    each_key_has_its_document("", "bigint", ["0", "-1", "9223372036854775807", "(-9223372036854775808)"]);
}

#[test]
fn numeric_keys_identify_documents() {
    each_key_has_its_document("", "numeric", ["1.0", "2.00", "123456789012345678901234567890.5", "'NaN'"]);
}

#[test]
fn date_keys_under_any_datestyle_identify_documents() {
    each_key_has_its_document(
        "",
        "date",
        ["'2024-02-29'::date", "'1999-12-31'::date", "'0044-03-15 BC'::date", "'infinity'::date"],
    );
}

#[test]
fn timestamptz_keys_under_any_timezone_identify_documents() {
    each_key_has_its_document(
        "",
        "timestamptz",
        [
            "'2024-01-01 00:00+00'::timestamptz",
            "'2024-07-01 12:00:00.000001+02'::timestamptz",
            "'1900-01-01 00:00+00'::timestamptz",
            "'-infinity'::timestamptz",
        ],
    );
}

#[test]
fn timestamp_and_time_keys_under_any_datestyle_identify_documents() {
    each_key_has_its_document(
        "",
        "timestamp",
        [
            "'2024-01-01'::timestamp",
            "'2024-07-01 12:00:00.000001'::timestamp",
            "'0001-01-01 BC'::timestamp",
            "'infinity'::timestamp",
        ],
    );
    each_key_has_its_document(
        "",
        "timetz",
        ["'12:00+02'::timetz", "'12:00+00'::timetz", "'24:00+00'::timetz", "'00:00:00.1-15'::timetz"],
    );
}

#[test]
fn interval_keys_under_any_intervalstyle_identify_documents() {
    each_key_has_its_document(
        "",
        "interval",
        ["'1 year 2 mons'::interval", "'-3 days 04:05:06.7'::interval", "'0'::interval", "'100 hours'::interval"],
    );
}

#[test]
fn bytea_keys_under_any_bytea_output_identify_documents() {
    each_key_has_its_document(
        "",
        "bytea",
        [r"'\x00ff'::bytea", r"'\x7c5c7c'::bytea", r"'\x61'::bytea", r"'\x'::bytea"],
    );
}

#[test]
fn float_keys_under_any_extra_float_digits_identify_documents() {
    each_key_has_its_document(
        "",
        "float8",
        ["0.1::float8", "0.30000000000000004::float8", "1e-300::float8", "'-Infinity'::float8"],
    );
    each_key_has_its_document("", "float4", ["0.1::float4", "3.4028235e38::float4", "1e-45::float4", "'NaN'::float4"]);
}

/// The writer's session writes `1.234.567,89 EUR` for what is `$1,234,567.89` to us.
#[test]
fn money_keys_under_any_lc_monetary_identify_documents() {
    // A locale that few machines have is made for this server alone.
    let locales = process::server_folder("locales");
    let mut localedef = std::process::Command::new("localedef");
    localedef.args(["-i", "de_DE", "-f", "UTF-8"]).arg(locales.path().join("de_DE.UTF-8"));
    assert!(localedef.status().expect("localedef").success(), "package locales has the sources of all locales");
    let server = Server::builder()
        .conf("es_sync.url", Engine::elasticsearch().url())
        .env("LOCPATH", locales.path().display())
        .start();
    let mut client = server.connect("postgres");
    client.batch_execute("set lc_monetary = 'de_DE.UTF-8'").expect("the server has the locale");
    let written: String = client.query_one("select 1234567.89::money::text", &[]).expect("money").get(0);
    assert!(written.contains("1.234.567,89"), "{written}");
    each_key_has_its_document_on(
        &server,
        &format!("{OTHER}; set lc_monetary = 'de_DE.UTF-8'"),
        "",
        "money",
        "k::numeric",
        ["1::money", "1234567.89::money", "(-5)::money", "0::money"],
    );
}

#[test]
fn enum_keys_identify_documents() {
    each_key_has_its_document(
        "create type mood as enum ('sad', 'ok|so', 'ünglücklich', 'very happy')",
        "mood",
        ["'sad'::mood", "'ok|so'::mood", "'ünglücklich'::mood", "'very happy'::mood"],
    );
}

/// There are but two of them.
#[test]
fn boolean_keys_identify_documents() {
    let changes = [
        "update {T} set note = 'changed'",
        "insert into {T} values (false, 'inserted')",
        "update {T} set k = not k, note = note || ' and turned'",
        "delete from {T} where k",
        "begin; delete from {T}; insert into {T} values (true, 'again'); commit",
    ];
    let table = "create table {T} (k boolean primary key deferrable initially deferred, note text);
                 insert into {T} values (true, 'loaded')";
    let id = "case when k then 't' else 'f' end";
    Table::new(table).each(id, &changes);
    let pair = "create table {T} (k boolean, part text default 'a|b', note text, primary key (k, part) deferrable initially deferred);
                insert into {T} (k, note) values (true, 'loaded')";
    let changes = changes.map(|change| change.replace("insert into {T} values", "insert into {T} (k, note) values"));
    Table::new(pair).each(r"case when k then 't' else 'f' end || '|a\|b'", &changes.each_ref().map(String::as_str));
}

/// Their order and equality are not in pg_catalog, and not those of text. A load has several pages.
#[test]
fn keys_of_an_extension_s_types_are_read_page_by_page_in_their_own_order() {
    for (extension, kind, key, other) in [
        ("citext", "citext", "case when i % 2 = 0 then upper(md5(i::text)) else md5(i::text) end", "'x' || k"),
        (
            "ltree",
            "ltree",
            "('a' || i % 7 || '.' || case when i % 2 = 0 then 'Z' else 'b' end || i)::ltree",
            "('x.' || k::text)::ltree",
        ),
    ] {
        let mut table = Table::new(&format!(
            "create extension {extension}; create table {{T}} (k {kind} primary key, place int, note text);
             insert into {{T}} select {key}, i, 'note ' || i from generate_series(1, 6000) i"
        ));
        let (name, viewed) = (table.name.clone(), unique("viewed"));
        table.run(&format!(
            "create table paired (place int, k {kind}, note text, primary key (place, k));
             insert into paired select place % 3, k, note from {{T}};
             create view shown as select k, note from {{T}}; create view paired_shown as select place, k, note from paired;
             select es_sync.attach('{{T}}', index => '{viewed}', document => 'shown');
             select es_sync.attach('paired', index => '{viewed}_both', document => 'paired_shown')"
        ));
        let both = "select place || '|' || k::text, row_to_json(p) from paired p";
        for change in [
            String::new(),
            "update {T} set note = 'changed' where place % 100 = 0; update paired set note = 'changed' where place = 1"
                .to_owned(),
            format!("update {{T}} set k = {other} where place < 10; delete from {{T}} where place between 100 and 110"),
        ] {
            table.run(&change);
            expect::table_equal(&mut table.client, &name, "k", &table.engine, &name);
            let rows = "select k, row_to_json(s) from shown s";
            expect::documents_equal(&mut table.client, rows, &table.engine, &viewed);
            expect::documents_equal(&mut table.client, both, &table.engine, &format!("{viewed}_both"));
        }
        table.run("select es_sync.verify('{T}'), es_sync.verify('paired')");
        expect::settled(&mut table.client);
        let differing: i64 = table
            .client
            .query_one("select sum(missing + different + orphaned)::int8 from es_sync.jobs where kind = 'verify'", &[])
            .expect("jobs")
            .get(0);
        assert_eq!(differing, 0, "{kind}");
    }
}

#[test]
fn inet_and_oid_keys_identify_documents() {
    each_key_has_its_document(
        "",
        "inet",
        ["'10.0.0.1'::inet", "'10.0.0.0/8'::inet", "'::1'::inet", "'2001:db8::/32'::inet"],
    );
    each_key_has_its_document("", "oid", ["1::oid", "4294967295::oid", "2::oid", "3::oid"]);
}

/// The names of what they stand for are written as the session's search path says, and change.
#[test]
fn keys_that_stand_for_objects_of_the_catalog_are_their_oids() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let (alone, pair) = (unique("object"), unique("object"));
    client.batch_execute("create schema app; create table app.thing (); create table app.other ()").expect("tables");
    for (table, key) in [(&alone, "k"), (&pair, "k, part")] {
        client
            .batch_execute(&format!(
                "create table {table} (k regclass, part int default 7, note text, primary key ({key}));
                 insert into {table} values ('app.thing', 7, 'loaded'), ('pg_class', 7, 'loaded');
                 select es_sync.attach('{table}')"
            ))
            .expect("attach");
    }
    let mut writer = server.connect("app");
    writer.batch_execute("set search_path = app, public").expect("settings");
    for change in [
        "",
        "update T set note = 'changed'; insert into T values ('other', 7, 'new')",
        "alter table if exists thing rename to something; update T set note = 'renamed' where k <> 'other'::regclass",
        "delete from T where k = 'pg_class'::regclass; update T set k = 'pg_class' where k = 'something'::regclass",
        "begin; update T set note = 'last'; drop table if exists app.other; commit",
    ] {
        for table in [&alone, &pair] {
            writer.batch_execute(&change.replace("T ", &format!("{table} "))).expect("write");
        }
        expect::settled(&mut client);
        for (table, id) in [(&alone, "k::oid::text"), (&pair, "k::oid || '|7'")] {
            let rows = format!("select {id}, row_to_json(t) from {table} t");
            expect::documents_equal(&mut client, &rows, &engine, table);
        }
    }
}

#[test]
fn citext_keys_identify_documents() {
    each_key_has_its_document(
        "create extension citext",
        "citext",
        ["'Key'::citext", "'Other|'::citext", "'ÄÖ'::citext", "'x'::citext"],
    );
}

#[test]
fn keys_of_a_nondeterministic_collation_identify_documents() {
    each_key_has_its_document(
        "create collation loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
        "text collate loose",
        ["'Key'", "'Other'", "'Straße'", "'x|Y'"],
    );
}

#[test]
fn domain_keys_identify_documents() {
    each_key_has_its_document(
        "create domain day as date check (value > '1900-01-01'); create domain later as day check (value > '1910-01-01')",
        "later",
        ["'2024-02-29'::later", "'1999-12-31'::later", "'2000-01-01'::later", "'infinity'::later"],
    );
}

#[test]
fn range_and_composite_keys_identify_documents() {
    each_key_has_its_document_with(
        "",
        "daterange",
        "case when not isempty(k) then json_strip_nulls(json_build_object('gte', lower(k), 'lt', upper(k))) end",
        [
            "'[2024-01-01,2024-02-01)'::daterange",
            "'empty'::daterange",
            "'(,)'::daterange",
            "'[2024-01-01,)'::daterange",
        ],
    );
    each_key_has_its_document(
        "create type pair as (a int, at timestamptz)",
        "pair",
        [
            "row(1, '2024-01-01 00:00+00')::pair",
            "row(2, '2024-07-01 12:00+02')::pair",
            "row(3, null)::pair",
            "row(null, '1999-12-31 00:00+00')::pair",
        ],
    );
}

#[test]
fn array_and_jsonb_keys_identify_documents() {
    each_key_has_its_document(
        "",
        "date[]",
        ["'{2024-01-01}'::date[]", "'{2024-01-01,1999-12-31}'::date[]", "'{}'::date[]", "'{NULL}'::date[]"],
    );
    each_key_has_its_document(
        "",
        "jsonb",
        [r#"'{"a": 1}'::jsonb"#, r#"'{"a": [1, 2]}'::jsonb"#, r#"'{"b|": "x\\|y"}'::jsonb"#, "'{}'::jsonb"],
    );
}

struct Table {
    engine: Engine,
    _server: Server,
    client: Client,
    name: String,
}

impl Table {
    #[track_caller]
    fn new(setup: &str) -> Table {
        let engine = Engine::elasticsearch();
        let server = Server::with(&engine);
        let client = server.create_database("app");
        let mut table = Table { engine, _server: server, client, name: unique("keyed") };
        table.run(&format!("{setup}; select es_sync.attach('{{T}}')"));
        table
    }

    #[track_caller]
    fn run(&mut self, statements: &str) {
        named::run(&mut self.client, &self.name, statements);
    }

    /// Compares, then runs each statement and compares again.
    #[track_caller]
    fn each(mut self, id: &str, statements: &[&str]) {
        expect::table_equal(&mut self.client, &self.name, id, &self.engine, &self.name);
        for statement in statements {
            self.run(statement);
            expect::table_equal(&mut self.client, &self.name, id, &self.engine, &self.name);
        }
    }
}

#[test]
fn a_row_whose_key_its_domain_would_refuse_now_keeps_its_document() {
    Table::new(
        "create domain code as text; create table {T} (k code primary key, title text);
         insert into {T} values ('abc', 'x'), ('DEF', 'y'), ('zzz', 'last')",
    )
    .each(
        "k",
        &[
            "alter domain code add constraint upper check (value = upper(value)) not valid;
             update {T} set title = 'z' where k = 'abc'; select es_sync.sync('{T}', 'zzz'::text)",
            "select es_sync.reindex('{T}')",
            "select es_sync.verify('{T}', repair => true)",
        ],
    );
}

#[test]
fn a_row_without_a_key_crashes_nobody() {
    for kind in ["text", "uuid", "numeric", "int"] {
        let key = if kind == "uuid" { "00000000-0000-0000-0000-000000000001" } else { "1" };
        Table::new(&format!(
            "create table {{T}} (k {kind} primary key, tenant text);
             select es_sync.attach('{{T}}', '{{T}}_routed', options => '{{\"routing\": \"tenant\"}}')"
        ))
        .each(
            "k",
            &[&format!(
                "alter table {{T}} drop constraint {{T}}_pkey; alter table {{T}} alter k drop not null;
                 insert into {{T}} values (null, 'a'), ('{key}', 'c'); update {{T}} set tenant = 'b' where k is null;
                 delete from {{T}} where k is null; alter table {{T}} add primary key (k)"
            )],
        );
    }
}

#[test]
fn the_order_of_a_composite_key_is_that_of_the_constraint() {
    Table::new(
        "create table {T} (a int, b text, c date, note text, primary key (c, a, b));
         insert into {T} select i, 'b|' || i, '2024-01-01', 'x' from generate_series(1, 20) i",
    )
    .each(
        r"c || '|' || a || '|' || replace(b, '|', '\|')",
        &[
            "update {T} set note = 'changed'",
            "update {T} set a = a + 100 where a < 5",
            "delete from {T} where c = '2024-01-01' and a > 110",
        ],
    );
}

#[test]
fn keys_swapped_under_a_deferrable_constraint_keep_their_documents() {
    Table::new(
        "create table {T} (id int primary key deferrable initially deferred, note text);
         insert into {T} select i, 'row ' || i from generate_series(1, 10) i",
    )
    .each(
        "id",
        &[
            "update {T} set id = 11 - id",
            "update {T} set id = id % 10 + 1",
            "begin; insert into {T} values (1, 'twice for a moment'); delete from {T} where id = 1 and note <> 'twice for a moment'; commit",
            "begin; update {T} set id = 5 where id = 6; update {T} set id = 6 where id = 5 and note = (select min(note) from {T} where id = 5); commit",
        ],
    );
}

#[test]
fn a_replica_identity_index_is_the_key_where_there_is_no_primary_key() {
    Table::new(
        "create table {T} (n int, code text not null, region text not null, note text);
         create unique index {T}_code on {T} (region, code) include (note);
         alter table {T} replica identity using index {T}_code;
         insert into {T} select i, 'c' || i, 'eu', 'x' from generate_series(1, 20) i",
    )
    .each(
        "region || '|' || code",
        &[
            "update {T} set note = 'changed'",
            "update {T} set code = 'changed' where n = 1",
            "delete from {T} where n > 15",
        ],
    );
}

#[test]
fn a_primary_key_comes_before_a_replica_identity_index() {
    Table::new(
        "create table {T} (id int primary key, code text not null);
         create unique index {T}_code on {T} (code);
         alter table {T} replica identity using index {T}_code;
         insert into {T} select i, 'c' || i from generate_series(1, 20) i",
    )
    .each("id", &["update {T} set code = code || '.'", "update {T} set id = id + 100"]);
}

/// The key's text has twice its bytes, and its index none to spare.
#[test]
fn a_key_whose_text_is_longer_than_an_index_takes_is_a_dead_letter_like_any_other() {
    let mut table = Table::new(
        "create table {T} (k bytea primary key, note text);
         insert into {T} values ('\\x01', 'short')",
    );
    let name = table.name.clone();
    for note in ["long", "once more"] {
        table.run(&format!(
            "insert into {{T}}
             select decode(string_agg(encode(sha256(i::text::bytea), 'hex'), '' order by i), 'hex'), '{note}'
             from generate_series(1, 80) i on conflict (k) do update set note = excluded.note;
             update {{T}} set note = '{note}' where k = '\\x01'"
        ));
        expect::settled(&mut table.client);
        let letter = table.client.query_one("select length(key), kind, attempts from es_sync.dead_letters", &[]);
        let letter = letter.expect("one letter");
        let attempts = if note == "long" { 1 } else { 2 };
        assert_eq!((letter.get(0), letter.get(1), letter.get(2)), (5_122, "id_too_long".to_owned(), attempts));
    }
    table.run("delete from {T} where note <> 'short' and length(k) > 1");
    expect::settled(&mut table.client);
    assert_eq!(table.engine.count(&name), 1);
    let letters: i64 =
        table.client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("letters").get(0);
    assert_eq!(letters, 0, "nothing is refused any more");
}

#[test]
fn a_key_that_is_too_long_is_a_dead_letter_that_names_the_row() {
    let mut table = Table::new(
        "create table {T} (a text, b text, note text, primary key (a, b));
         insert into {T} values ('short', 'key', 'fits'), (repeat('a', 300), repeat('b', 300), 'does not')",
    );
    let name = table.name.clone();
    expect::settled(&mut table.client);
    let letters =
        table.client.query("select relation::text, key, kind, reason from es_sync.dead_letters", &[]).expect("letters");
    let letter: (String, String, String, String) =
        letters.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3))).next().expect("a letter");
    let key = format!("{}|{}", "a".repeat(300), "b".repeat(300));
    let reason = "document id of 601 bytes is longer than 512 bytes".to_owned();
    assert_eq!((letters.len(), letter), (1, (name.clone(), key, "id_too_long".to_owned(), reason)));
    table.run("update {T} set b = 'key' where note = 'does not'; insert into {T} values ('another', 'one', null)");
    expect::table_equal(&mut table.client, &name, "a || '|' || b", &table.engine, &name);
}

#[test]
fn a_table_without_a_usable_key_is_refused_with_a_hint() {
    let server = Server::with(&Engine::elasticsearch());
    let mut client = server.create_database("app");
    client
        .batch_execute(
            "create table keyless (id int, title text);
             create table merely_unique (id int not null unique);
             create table full_identity (id int not null unique); alter table full_identity replica identity full",
        )
        .expect("set up");
    for table in ["keyless", "merely_unique", "full_identity"] {
        let error = client.batch_execute(&format!("select es_sync.attach('{table}')")).expect_err(table);
        let error = error.as_db_error().expect("Postgres says it");
        assert_eq!(error.code().code(), "42P16", "{table}");
        assert!(error.hint().is_some_and(|hint| hint.contains("REPLICA IDENTITY")), "{table}: {error:?}");
    }
}

const LOOSE: &str = "create collation loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false); create extension citext";

/// Rows that it keeps apart may be equal in the order in which they are read.
#[test]
fn an_index_that_compares_otherwise_than_its_columns_is_no_key() {
    let server = Server::with(&Engine::elasticsearch());
    let mut client = server.create_database("app");
    client.batch_execute(LOOSE).expect("set up");
    for (column, index) in [
        ("text collate loose", "k collate \"C\""),
        ("citext", "k text_ops"),
        ("citext", "n, k text_ops"),
        ("text", "k text_pattern_ops"),
    ] {
        client
            .batch_execute(&format!(
                "create table odd (n int not null, k {column} not null); create unique index odd_key on odd ({index});
                 alter table odd replica identity using index odd_key"
            ))
            .expect(index);
        let error = client.batch_execute("select es_sync.attach('odd')").expect_err(index);
        let error = error.as_db_error().expect("Postgres says it");
        assert_eq!(error.code().code(), "42P16", "{index}");
        assert!(error.message().contains("compares otherwise than"), "{index}: {error:?}");
        assert!(error.hint().is_some_and(|hint| hint.contains("collation")), "{index}: {error:?}");
        client.batch_execute("drop table odd").expect("drop");
    }
    // By the columns' own, be it under another name.
    for (number, (column, index)) in
        [("text collate loose", "k"), ("citext", "k, n desc"), ("varchar", "k varchar_ops")].into_iter().enumerate()
    {
        let name = unique("even");
        client
            .batch_execute(&format!(
                "create table {name} (n int not null, k {column} not null); create unique index key{number} on {name} ({index});
                 alter table {name} replica identity using index key{number}; select es_sync.attach('{name}')"
            ))
            .expect(index);
    }
}

#[test]
fn an_index_that_compares_otherwise_than_its_columns_stands_in_for_no_primary_key() {
    let mut table = Table::new(&format!(
        "{LOOSE}; create table {{T}} (k citext primary key, note text); insert into {{T}} values ('a', 'one')"
    ));
    let name = table.name.clone();
    expect::settled(&mut table.client);
    table.run("create unique index odd on {T} (k text_ops); alter table {T} drop constraint {T}_pkey");
    let query = "select coalesce(obstacle, '') from es_sync.status";
    wait::until("the obstacle is told", wait::LONG, || {
        let said: String = table.client.query_one(query, &[]).expect("status").get(0);
        if said.starts_with("nothing keeps (k)") { Ok(()) } else { Err(said) }
    });
    table.run("create unique index even on {T} (k); insert into {T} values ('b', 'two')");
    expect::table_equal(&mut table.client, &name, "k", &table.engine, &name);
}

#[test]
fn two_indexes_of_one_table_differ_in_filter_and_columns() {
    let mut table = Table::new(
        "create table {T} (id int primary key, kind text, secret text);
         insert into {T} select i, 'kind ' || i % 3, 'secret' from generate_series(1, 60) i",
    );
    let name = table.name.clone();
    table.run(
        "select es_sync.attach('{T}', index => '{T}-public', filter => 'kind <> ''kind 0''', exclude => '{secret}')",
    );
    let public = format!("select id, json_build_object('id', id, 'kind', kind) from {name} where kind <> 'kind 0'");
    for change in [
        "",
        "update {T} set kind = 'kind 0' where id % 5 = 0",
        "update {T} set secret = 'only one of them shows it' where id > 30",
        "update {T} set id = id + 100, kind = 'kind 1' where id <= 10",
        "delete from {T} where id between 20 and 40",
    ] {
        table.run(change);
        expect::table_equal(&mut table.client, &name, "id", &table.engine, &name);
        expect::documents_equal(&mut table.client, &public, &table.engine, &format!("{name}-public"));
    }
}

#[test]
fn tables_of_one_name_in_two_schemas_have_an_index_each() {
    let mut table =
        Table::new("create table {T} (id int primary key, title text); insert into {T} values (1, 'public')");
    let name = table.name.clone();
    table.run("create schema other; create table other.{T} (id int primary key, title text); insert into other.{T} values (1, 'other'), (2, 'other')");
    let taken =
        table.client.batch_execute(&format!("select es_sync.attach('other.{name}')")).expect_err("the name is taken");
    let taken = taken.as_db_error().expect("Postgres says it");
    assert_eq!((taken.code().code(), taken.hint().is_some()), ("42710", true));
    table.run("select es_sync.attach('other.{T}', index => '{T}-other')");
    table.run("set search_path = other, public; update {T} set title = 'changed' where id = 1; reset search_path; insert into {T} values (3, 'public')");
    expect::table_equal(&mut table.client, &name, "id", &table.engine, &name);
    expect::table_equal(&mut table.client, &format!("other.{name}"), "id", &table.engine, &format!("{name}-other"));
}

#[test]
fn names_in_mixed_case_with_blanks_and_quotes_are_taken_as_they_are() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let index = unique("odd-name");
    let table = r#""My ""Schema""'s"."Order % Items|""#;
    client
        .batch_execute(&format!(
            r#"create schema "My ""Schema""'s";
            create table {table} ("Order Id" int, "select" text, "Ünï ""x""" text, "note" text, primary key ("select", "Order Id"));
            insert into {table} select i, 's', 'x', 'y' from generate_series(1, 10) i"#
        ))
        .expect("set up");
    let quoted = table.replace('\'', "''");
    let refused = client.batch_execute(&format!("select es_sync.attach('{quoted}')")).expect_err("no name of an index");
    let refused = refused.as_db_error().expect("Postgres says it");
    assert_eq!((refused.code().code(), refused.hint().is_some()), ("42602", true));
    client
        .batch_execute(&format!(
            r#"select es_sync.attach('{quoted}', index => '{index}', filter => '"Ünï ""x""" <> ''hidden''', exclude => '{{note}}',
                   options => '{{"routing": "Ünï \"x\""}}')"#
        ))
        .expect("attach");
    let shown = format!(
        r#"select "select" || '|' || "Order Id", row_to_json(x) from (select "Order Id", "select", "Ünï ""x""" from {table} where "Ünï ""x""" <> 'hidden') x"#
    );
    for change in [
        "",
        r#"update T set "Ünï ""x""" = 'hidden' where "Order Id" < 3"#,
        r#"update T set "Order Id" = "Order Id" + 100, "Ünï ""x""" = 'changed' where "Order Id" > 7"#,
        r#"delete from T where "Order Id" = 5"#,
    ] {
        client.batch_execute(&change.replace("T ", &format!("{table} "))).expect(change);
        expect::settled(&mut client);
        expect::documents_equal(&mut client, &shown, &engine, &index);
    }
    client
        .batch_execute(&format!(
            "select es_sync.sync_where('{quoted}', '\"Order Id\" > 0'), es_sync.detach('{quoted}')"
        ))
        .expect("detach");
}

#[test]
fn index_names_that_the_engine_refuses_are_refused_at_once_and_others_are_taken() {
    let server = Server::with(&Engine::elasticsearch());
    let mut client = server.create_database("app");
    client.batch_execute("create table things (id int primary key); insert into things values (1)").expect("set up");
    let bad = [
        "Upper", "ÄÖ", "_under", "-dash", "+plus", "a,b", "a b", "a/b", r"a\b", "a*b", "a?b", "a<b", "a>b", "a|b",
        "a\"b", "a#b", ".", "..", "a:b", "",
    ];
    let long = "ü".repeat(128);
    for name in bad.iter().copied().chain([long.as_str()]) {
        let path: String = name.bytes().map(|byte| format!("%{byte:02X}")).collect();
        for engine in [Engine::elasticsearch(), Engine::opensearch()] {
            // "." and ".." are taken for steps within the path.
            if !["", ".", ".."].contains(&name) {
                let (status, answer) = engine.request("PUT", &format!("/{path}"), None);
                assert!(status >= 400, "{:?} takes {name:?}: {answer}", engine.product());
            }
        }
        let error = client.execute("select es_sync.attach('things', index => $1)", &[&name]).expect_err(name);
        assert_eq!(error.code().map(postgres::error::SqlState::code), Some("42602"), "{name:?}");
    }
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        client
            .batch_execute("create table things (id int primary key); insert into things values (1)")
            .expect("set up");
        for odd in ["a.b", "a+b", "ünï-漢字", "a_b~c=d&e%20!'()$@", "1", &"x".repeat(150)] {
            let index = format!("{}{odd}", unique("i"));
            client.execute("select es_sync.attach('things', index => $1)", &[&index]).expect(odd);
            expect::settled(&mut client);
            let path: String = index.bytes().map(|byte| format!("%{byte:02X}")).collect();
            assert_eq!(engine.count(&path), 1, "{index}");
        }
    }
}

/// Neighbours are read as a range of the key's index, others key by key; here one batch has both, with rows in between
/// that have not changed, and some that are gone.
#[test]
fn integer_keys_that_change_together_are_read_right() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let [plain, filtered, parted, viewed] = ["plain", "filtered", "parted", "viewed"].map(unique);
    client
        .batch_execute(&format!(
            "create domain count as int check (value > -1000);
             create table {plain} (id smallint primary key, note text);
             create table {filtered} (id int primary key, note text);
             create table {parted} (id bigint primary key, note text) partition by hash (id);
             create table {parted}_0 partition of {parted} for values with (modulus 2, remainder 0);
             create table {parted}_1 partition of {parted} for values with (modulus 2, remainder 1);
             create table {viewed} (id count primary key, note text);
             create view shown as select id, upper(note) as note from {viewed}"
        ))
        .expect("create");
    let tables = [&plain, &filtered, &parted, &viewed];
    let options = ["", ", filter => 'id % 5 <> 4'", "", ", document => 'shown'"];
    for (table, options) in tables.into_iter().zip(options) {
        client
            .batch_execute(&format!(
                "insert into {table} select id, 'first' from generate_series(-300, 600) id;
                 select es_sync.attach('{table}'{options})"
            ))
            .expect("attach");
    }
    expect::settled(&mut client);
    for table in tables {
        client
            .batch_execute(&format!(
                "select es_sync.pause('{table}');
                 update {table} set note = 'neighbour' where id between -250 and -50;
                 update {table} set note = 'every other' where id between 0 and 400 and id % 2 = 0;
                 update {table} set note = 'far' where id > 400 and id % 20 = 0;
                 delete from {table} where id between -200 and 300 and id % 7 = 0;
                 insert into {table} select id, 'new' from generate_series(601, 700) id;
                 select es_sync.resume('{table}')"
            ))
            .expect("change");
    }
    expect::table_equal(&mut client, &plain, "id", &engine, &plain);
    let passing = format!("(select * from {filtered} where id % 5 <> 4)");
    expect::table_equal(&mut client, &passing, "id", &engine, &filtered);
    expect::table_equal(&mut client, &parted, "id", &engine, &parted);
    let shown = format!("select id, row_to_json(t) from (select id, upper(note) as note from {viewed}) t");
    expect::documents_equal(&mut client, &shown, &engine, &viewed);
}
