//! Documents are what the rows say, on both products.

use pg_es_sync_tests::{Engine, Server, expect, unique};
use serde_json::json;

#[test]
fn every_type_is_indexed_and_searchable_on_both_products() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        let name = unique("types");
        client
            .batch_execute(&format!(
                r#"set timezone = 'UTC';
                create type mood as enum ('sad', 'happy');
                create domain amount as numeric check (value > 0);
                create type pair as (a int, b text);
                create table {name} (
                    id int primary key, "Mixed Case" text, v varchar(10), c char(5), i2 int2, i8 int8, f4 float4, f8 float8,
                    n numeric(20, 5), flag boolean, d date, ts timestamp, tz timestamptz, t time, iv interval, u uuid,
                    tags text[], numbers int[], matrix int[][], doc jsonb, raw json, ip inet, net cidr, m mood, a amount,
                    span int4range, days daterange, period tstzrange, p pair, bits bit(3), cash money, x xml,
                    secret bytea, words tsvector);
                insert into {name} values (
                    1, 'Grüße "quoted" \ 	tab', 'v', 'c', 2, 9007199254740993, 1.5, 2.25, 12345.67891, true, '2024-02-29',
                    '2024-02-29 12:34:56.789012', '2024-02-29 12:34:56.789+02', '12:34', '1 day 2 hours',
                    'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', array['a', null, 'b,c'], array[1, 2], array[[1, 2], [3, 4]],
                    '{{"k": {{"deep": [1, 2]}}}}', E'{{"raw":\n 1}}', '10.1.2.3', '10.0.0.0/8', 'happy', 5.5,
                    '[1,5)', '[2024-01-01,)', '[2024-01-01,2024-02-01]', row(1, 'b'), b'101', 12.5, '<a/>',
                    '\x00ff', 'some words');
                insert into {name} (id) values (2);
                insert into {name} (id, f8, n, tz, d, doc, raw, span) values
                    (3, 'infinity', 'NaN', 'infinity', '0044-03-15 BC', '[1, "two"]', '"scalar"', 'empty');
                select es_sync.attach('{name}')"#
            ))
            .expect("set up");
        expect::settled(&mut client);
        let documents = engine.documents(&name);
        assert_eq!(documents.len(), 3, "nothing was refused");
        let one = &documents["1"];
        for (field, value) in [
            ("Mixed Case", json!("Grüße \"quoted\" \\ \ttab")),
            ("c", json!("c    ")),
            ("i8", json!(9007199254740993_i64)),
            ("flag", json!(true)),
            ("d", json!("2024-02-29")),
            ("ts", json!("2024-02-29T12:34:56.789012")),
            ("tz", json!("2024-02-29T10:34:56.789+00:00")),
            ("u", json!("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")),
            ("tags", json!(["a", null, "b,c"])),
            ("matrix", json!([[1, 2], [3, 4]])),
            ("doc", json!({"k": {"deep": [1, 2]}})),
            ("raw", json!({"raw": 1})),
            ("m", json!("happy")),
            ("span", json!({"gte": 1, "lt": 5})),
            ("days", json!({"gte": "2024-01-01"})),
            ("p", json!({"a": 1, "b": "b"})),
        ] {
            assert_eq!(one[field], value, "{field}");
        }
        for absent in ["secret", "words"] {
            assert!(one.get(absent).is_none(), "{absent} is left out");
        }
        let three = &documents["3"];
        assert_eq!(
            (&three["n"], &three["doc"], &three["raw"], &three["span"]),
            (&json!("NaN"), &json!({"value": [1, "two"]}), &json!({"value": "scalar"}), &json!(null))
        );
        for query in [
            json!({"match": {"Mixed Case": "grüße"}}),
            json!({"term": {"v.keyword": "v"}}),
            json!({"term": {"i8": 9007199254740993_i64}}),
            json!({"range": {"tz": {"gte": "2024-02-29T10:00:00Z", "lt": "2024-02-29T11:00:00Z"}}}),
            json!({"term": {"u": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"}}),
            json!({"term": {"tags.keyword": "b,c"}}),
            json!({"term": {"numbers": 2}}),
            json!({"term": {"ip": "10.1.0.0/16"}}),
            json!({"term": {"net": "10.200.0.1"}}),
            json!({"term": {"m": "happy"}}),
            json!({"term": {"span": 4}}),
            json!({"term": {"days": "2030-01-01"}}),
            json!({"term": {"flag": true}}),
            json!({"term": {"doc.k.deep": "1"}}),
        ] {
            assert_eq!(engine.search_ids(&name, query.clone()), ["1"], "{query} on {:?}", engine.product());
        }
    }
}

#[test]
fn keys_of_every_kind_make_ids_that_cannot_be_confused() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let (pairs, texts, times, numbers) = (unique("pairs"), unique("texts"), unique("times"), unique("numbers"));
    client
        .batch_execute(&format!(
            r#"create table {pairs} (a text, b text, note text, primary key (a, b));
            insert into {pairs} values ('x', 'y|z'), ('x|y', 'z'), ('', ''), ('\', '|'), ('\|', ''), ('ü', '😀');
            create table {texts} (k text primary key, note text);
            insert into {texts} values (''), ('\'), ('a/b?c#d%20'), ('"quoted" {{json}}'), (E'line\nfeed'), ('ünï');
            create table {times} (k timestamptz primary key, note text);
            insert into {times} values ('2024-01-01 00:00+00'), ('2024-07-01 12:00:00.000001+02');
            create table {numbers} (k numeric primary key, note text);
            insert into {numbers} values (1.0), (2), (1e20);
            select es_sync.attach('{pairs}'), es_sync.attach('{texts}'), es_sync.attach('{times}'), es_sync.attach('{numbers}')"#
        ))
        .expect("set up");
    expect::settled(&mut client);
    // Sessions with other settings write the same keys.
    client
        .batch_execute(&format!(
            "set datestyle = 'German'; set timezone = 'Asia/Tokyo';
             update {times} set note = 'changed'; update {texts} set note = 'changed'; update {pairs} set note = 'changed';
             update {numbers} set k = 1.00 where k = 1; update {numbers} set note = 'changed';
             reset datestyle; set timezone = 'UTC'"
        ))
        .expect("changes");
    let escape = |column: &str| format!(r"replace(replace({column}, '\', '\\'), '|', '\|')");
    let joined = format!("{} || '|' || {}", escape("a"), escape("b"));
    let id = |expression: &str| {
        format!(
            r"case when ({expression}) = '' then '\' when left({expression}, 1) = '\' then '\' || ({expression}) else {expression} end"
        )
    };
    expect::table_equal(&mut client, &pairs, &id(&joined), &engine, &pairs);
    expect::table_equal(&mut client, &texts, &id("k"), &engine, &texts);
    expect::table_equal(&mut client, &times, "k::text", &engine, &times);
    expect::table_equal(&mut client, &numbers, "k::text", &engine, &numbers);
    client
        .batch_execute(&format!("delete from {pairs} where a = 'x'; delete from {texts} where k = ''"))
        .expect("delete");
    expect::table_equal(&mut client, &pairs, &id(&joined), &engine, &pairs);
    expect::table_equal(&mut client, &texts, &id("k"), &engine, &texts);
}

#[test]
fn a_filter_and_excluded_columns_shape_the_documents() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = unique("Filtered");
    client
        .batch_execute(&format!(
            r#"create table "{name}" (id uuid primary key default gen_random_uuid(), "isPrivate" boolean, title text, pin text);
            insert into "{name}" ("isPrivate", title, pin) select i % 3 = 0, 't' || i, 'secret' from generate_series(1, 300) i;
            select es_sync.attach('"{name}"', index => 'x-{lower}', filter => 'NOT "isPrivate"', exclude => '{{pin}}')"#,
            lower = name.to_lowercase()
        ))
        .expect("set up");
    let index = format!("x-{}", name.to_lowercase());
    let rows = format!(
        r#"select id, row_to_json(t) from (select id, "isPrivate", title from "{name}" where not "isPrivate") t"#
    );
    expect::settled(&mut client);
    expect::documents_equal(&mut client, &rows, &engine, &index);
    client
        .batch_execute(&format!(
            r#"update "{name}" set "isPrivate" = not "isPrivate" where title in ('t1', 't3');
            update "{name}" set "isPrivate" = null where title = 't2'"#
        ))
        .expect("changes");
    expect::settled(&mut client);
    expect::documents_equal(&mut client, &rows, &engine, &index);
}

#[test]
fn two_indexes_of_one_table_are_both_followed_and_detached_apart() {
    let engine = Engine::opensearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = unique("twice");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} select i, 't' from generate_series(1, 50) i;
             select es_sync.attach('{name}'), es_sync.attach('{name}', index => '{name}-b', filter => 'id > 10');
             update {name} set title = 'changed' where id % 2 = 0"
        ))
        .expect("set up");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    let second = format!("select id, row_to_json(t) from {name} t where id > 10");
    expect::documents_equal(&mut client, &second, &engine, &format!("{name}-b"));
    client
        .batch_execute(&format!("select es_sync.detach('{name}', index => '{name}', drop_index => true)"))
        .expect("detach");
    client.batch_execute(&format!("update {name} set title = 'again' where id = 20")).expect("update");
    expect::settled(&mut client);
    expect::documents_equal(&mut client, &second, &engine, &format!("{name}-b"));
    pg_es_sync_tests::wait::until("the index is dropped", pg_es_sync_tests::wait::SHORT, || !engine.exists(&name));
}

#[test]
fn a_column_added_or_dropped_while_attached_does_not_stop_the_flow() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = unique("altered");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text, old text);
             insert into {name} select i, 't', 'o' from generate_series(1, 50) i; select es_sync.attach('{name}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    client
        .batch_execute(&format!(
            "alter table {name} add column extra int default 7; alter table {name} drop column old;
             update {name} set title = 'changed'"
        ))
        .expect("alter");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn sync_indexes_what_is_there_and_deletes_what_is_not() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = unique("synced");
    client
        .batch_execute(&format!(
            "create table {name} (id bigint primary key, title text);
             insert into {name} select i, 't' from generate_series(1, 20) i; select es_sync.attach('{name}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    let alias = engine.indexes_of(&name).remove(0);
    engine.delete(&format!("/{alias}/_doc/3"));
    engine.put(&format!("/{alias}/_doc/99"), json!({"id": 99}));
    engine.put(&format!("/{alias}/_doc/4"), json!({"id": 4, "title": "by hand"}));
    let keys: i64 = client.query_one(&format!("select es_sync.sync('{name}', 3, 4, 99)"), &[]).expect("sync").get(0);
    assert_eq!(keys, 3);
    let keys: i64 = client.query_one(&format!("select es_sync.sync('{name}', '5', '006')"), &[]).expect("sync").get(0);
    assert_eq!(keys, 2);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    let wrong = client.query_one(&format!("select es_sync.sync('{name}', 'not a number')"), &[]).expect_err("refused");
    assert_eq!(wrong.code().map(postgres::error::SqlState::code), Some("22P02"));
}
