//! `es_sync.mapping`: what attach would create, before it is created.

use pg_es_sync_tests::{Engine, Server, expect, unique, wait};
use postgres::Client;
use serde_json::{Value, json};

fn mapping(client: &mut Client, arguments: &str) -> Value {
    let query = format!("select es_sync.mapping({arguments})");
    client.query_one(&query, &[]).unwrap_or_else(|error| panic!("{error:?} in: {query}")).get(0)
}

/// The SQLSTATE of a statement that fails.
#[track_caller]
fn state(client: &mut Client, statement: &str) -> String {
    let error = client.batch_execute(statement).expect_err(statement);
    error.code().unwrap_or_else(|| panic!("{error:?} in: {statement}")).code().to_owned()
}

/// Every value of nested objects, with its path.
fn leaves(path: &str, value: &Value, found: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                leaves(&format!("{path}.{name}"), value, found);
            }
        }
        _ => found.push((path.to_owned(), value.clone())),
    }
}

#[test]
fn what_is_shown_is_what_attach_creates() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        let table = unique("shown");
        client
            .batch_execute(&format!(
                "create table {table} (id int primary key, title text, doc jsonb, photo bytea, place point, price int4range,
                                       secret text, note text);
                 insert into {table} (id) values (1)"
            ))
            .expect("table");
        let options = r#"{"mappings": {"_source": {"excludes": ["note"]},
                                       "properties": {"title": {"fields": {"keyword": {"ignore_above": 10}}},
                                                      "note": null,
                                                      "doc": {"type": "object", "properties": {"n": {"type": "long"}}}}},
                          "settings": {"number_of_shards": 2, "index.mapping": {"total_fields.limit": 1234}},
                          "refresh": "3s", "delay": "100ms"}"#;
        let arguments = format!("'{table}', exclude => '{{secret}}', filter => 'id > 0', options => '{options}'");
        client.query_one(&format!("select es_sync.attach({arguments})"), &[]).expect("attach");
        expect::settled(&mut client);
        // The engine that is connected is the default.
        let mut shown = mapping(&mut client, &arguments);
        assert_eq!(shown["index"], *table);
        let concrete = &engine.indexes_of(&table)[0];
        let created = engine.get(&format!("/{concrete}?flat_settings=true"))[concrete].clone();
        // The engine does not repeat what goes without saying.
        assert_eq!(shown["mappings"]["properties"]["doc"]["type"].take(), "object");
        shown["mappings"]["properties"]["doc"].as_object_mut().expect("doc").remove("type");
        assert_eq!(shown["mappings"]["properties"], created["mappings"]["properties"]);
        assert_eq!(shown["mappings"]["_source"], created["mappings"]["_source"]);
        assert_eq!(shown["mappings"].get("_meta"), None, "our mark is not shown");
        assert_eq!(shown["mappings"]["properties"].get("photo"), None);
        assert_eq!(shown["mappings"]["properties"].get("secret"), None);
        assert_eq!(shown["mappings"]["properties"].get("note"), None);
        assert_eq!(shown["mappings"]["properties"]["title"]["fields"]["keyword"]["ignore_above"], 10);
        let mut settings = Vec::new();
        leaves("", &shown["settings"], &mut settings);
        assert!(settings.len() >= 3, "{settings:?}");
        for (path, value) in settings {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            assert_eq!(created["settings"][path.trim_start_matches('.')], *value, "{path}");
        }
    }
}

#[test]
fn what_is_shown_of_a_view_with_a_routing_and_a_pipeline_is_what_attach_creates() {
    for (engine, flattened) in [(Engine::elasticsearch(), "flattened"), (Engine::opensearch(), "flat_object")] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        let (table, pipeline) = (unique("shown"), unique("pipeline"));
        engine.put(&format!("/_ingest/pipeline/{pipeline}"), json!({"processors": []}));
        client
            .batch_execute(&format!(
                "create table {table} (id int primary key, tenant text, unseen text);
                 create table item (id int primary key, root_id int, doc jsonb, price numeric);
                 create view shown as
                     select t.id, t.tenant as of, (select jsonb_agg(i.doc) from item i where i.root_id = t.id) as docs,
                            (select jsonb_agg(i.doc) from item i where i.root_id = t.id) as items,
                            (select sum(i.price) from item i where i.root_id = t.id) as total, 'x'::text as left_out
                     from {table} t;
                 insert into {table} values (1, 'a', 'x'); insert into item values (1, 1, '{{\"n\": 5}}', 1.5)"
            ))
            .expect("tables");
        for (dynamic, expected) in [(json!({}), "false"), (json!({"dynamic": "strict"}), "strict")] {
            let index = unique("shown");
            let mut mappings =
                json!({"properties": {"items": {"type": "nested", "properties": {"n": {"type": "long"}}}}});
            mappings.as_object_mut().expect("object").extend(dynamic.as_object().expect("object").clone());
            let options = json!({"mappings": mappings, "routing": "tenant", "pipeline": pipeline,
                                 "settings": {"number_of_shards": 3, "index.max_ngram_diff": 5}});
            let arguments = format!(
                "'{table}', index => '{index}', document => 'shown', exclude => '{{left_out}}', options => '{options}'"
            );
            let shown = mapping(&mut client, &arguments);
            client.query_one(&format!("select es_sync.attach({arguments})"), &[]).expect("attach");
            expect::settled(&mut client);
            assert_eq!(shown["index"], *index);
            let properties = &shown["mappings"]["properties"];
            assert_eq!(properties["docs"]["type"], flattened, "JSON that nobody has mapped");
            assert_eq!(properties["items"]["type"], "nested");
            let fields: Vec<&String> = properties.as_object().expect("fields").keys().collect();
            assert_eq!(fields, ["docs", "id", "items", "of", "total"]);

            let concrete = &engine.indexes_of(&index)[0];
            let created = engine.get(&format!("/{concrete}?flat_settings=true"))[concrete].clone();
            let mut created_mappings = created["mappings"].clone();
            created_mappings.as_object_mut().expect("mappings").remove("_meta").expect("our mark is there");
            let (mut are_shown, mut are_created) = (Vec::new(), Vec::new());
            leaves("", &shown["mappings"], &mut are_shown);
            leaves("", &created_mappings, &mut are_created);
            // The engine writes a word where false was meant.
            let texts = |leaves: Vec<(String, Value)>| -> std::collections::BTreeMap<String, String> {
                let text = |value: Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                leaves.into_iter().map(|(path, value)| (path, text(value))).collect()
            };
            let (are_shown, are_created) = (texts(are_shown), texts(are_created));
            assert_eq!(are_shown, are_created);
            assert_eq!(are_created[".dynamic"], expected);
            let mut settings = Vec::new();
            leaves("", &shown["settings"], &mut settings);
            assert!(settings.len() >= 3, "{settings:?}");
            for (path, value) in settings {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                assert_eq!(created["settings"][path.trim_start_matches('.')], *value, "{path}");
            }
            assert_eq!(engine.documents(&index)["1"]["items"], json!([{"n": 5}]));
        }
    }
}

#[test]
fn mappings_and_settings_are_merged_by_rfc_7396() {
    let server = Server::builder().start();
    let mut client = server.create_database("app");
    client
        .batch_execute("create table t (id int primary key, title text, size int, doc jsonb, span daterange)")
        .expect("table");
    let mut shown =
        |options: Value| mapping(&mut client, &format!("'t', options => '{options}', product => 'elasticsearch'"));
    let plain = shown(json!({}));
    let keyword = json!({"type": "keyword", "ignore_above": 8191});
    assert_eq!(plain["mappings"]["properties"]["title"], json!({"type": "text", "fields": {"keyword": keyword}}));
    assert_eq!(plain["mappings"]["dynamic"], false);
    assert_eq!(plain["settings"]["index"]["mapping"]["total_fields"]["limit"], 1000);
    assert_eq!(plain["settings"]["index"]["refresh_interval"], "1s");

    // A patch is laid over, at any depth; what it does not name stays.
    let patched =
        shown(json!({"mappings": {"properties": {"title": {"analyzer": "german"}, "more": {"type": "long"}}}}));
    let title = json!({"type": "text", "analyzer": "german", "fields": {"keyword": keyword}});
    assert_eq!(patched["mappings"]["properties"]["title"], title);
    assert_eq!(patched["mappings"]["properties"]["more"], json!({"type": "long"}));
    assert_eq!(patched["mappings"]["properties"]["size"], plain["mappings"]["properties"]["size"]);

    // A null takes away: a parameter, a field, a thing of the top, a setting.
    let patched = shown(json!({
        "mappings": {"dynamic": null, "properties": {"title": {"fields": null}, "size": null}},
        "settings": {"index": {"mapping": {"total_fields": null}}},
    }));
    assert_eq!(patched["mappings"]["properties"]["title"], json!({"type": "text"}));
    assert_eq!(patched["mappings"]["properties"].get("size"), None);
    assert_eq!(patched["mappings"].get("dynamic"), None);
    assert_eq!(patched["settings"]["index"]["mapping"], json!({}));
    for own in [json!({"index.mapping.total_fields.limit": null}), json!({"mapping.total_fields": {"limit": null}})] {
        assert_eq!(shown(json!({"settings": own}))["settings"]["index"]["mapping"]["total_fields"], json!({}));
    }

    // What is no object replaces; another type has nothing of the derived one.
    let patched = shown(
        json!({"mappings": {"properties": {"size": {"type": "keyword"}, "doc": {"enabled": false, "type": "object"}}}}),
    );
    assert_eq!(patched["mappings"]["properties"]["size"], json!({"type": "keyword"}));
    assert_eq!(patched["mappings"]["properties"]["doc"], json!({"type": "object", "enabled": false}));
    assert_eq!(shown(json!({"mappings": {"dynamic": "strict"}}))["mappings"]["dynamic"], "strict");
}

#[test]
fn products_differ_where_their_types_do() {
    let server = Server::builder().start();
    let mut client = server.create_database("app");
    client.batch_execute("create table t (id int primary key, doc jsonb, title text)").expect("table");
    let [elasticsearch, opensearch] =
        ["elasticsearch", "OpenSearch"].map(|product| mapping(&mut client, &format!("'t', product => '{product}'")));
    assert_eq!(elasticsearch["mappings"]["properties"]["doc"]["type"], "flattened");
    assert_eq!(opensearch["mappings"]["properties"]["doc"]["type"], "flat_object");
    assert_eq!(elasticsearch["mappings"]["properties"]["title"], opensearch["mappings"]["properties"]["title"]);
    assert_eq!(state(&mut client, "select es_sync.mapping('t', product => 'solr')"), "22023");
    // No address is set, so none is connected.
    assert_eq!(state(&mut client, "select es_sync.mapping('t')"), "55000");
}

#[test]
fn what_attach_refuses_is_refused_likewise_and_nothing_is_made() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let table = unique("refused");
    client
        .batch_execute(&format!(
            "create table {table} (id int primary key, a int, b int);
             create table keyless (a int);
             create table odd (id int primary key, _id int);
             create table other (id int primary key, x int);
             create view guess as select t.id, (select max(x) from other) as x from {table} t;
             create view shown as select id, a from {table};
             create role someone"
        ))
        .expect("tables");
    for (arguments, expected) in [
        ("null", "22004"),
        ("'keyless'", "42P16"),
        ("'shown'", "42809"),
        ("'pg_class'", "42809"),
        ("'odd'", "42939"),
        ("TABLE, index => 'Upper'", "42602"),
        ("TABLE, exclude => '{id}'", "22023"),
        ("TABLE, exclude => '{nothing}'", "42703"),
        ("TABLE, filter => 'a +'", "42601"),
        ("TABLE, filter => 'a'", "42804"),
        ("TABLE, document => 'other'", "42809"),
        ("TABLE, document => 'guess'", "42P17"),
        ("TABLE, options => '{\"mapings\": {}}'", "22023"),
        ("TABLE, options => '{\"delay\": \"5\"}'", "22023"),
    ] {
        let arguments = arguments.replace("TABLE", &format!("'{table}'"));
        for function in ["attach", "mapping"] {
            let statement = format!("select es_sync.{function}({arguments})");
            assert_eq!(state(&mut client, &statement), expected, "{statement}");
        }
    }
    let shown = mapping(&mut client, &format!("'{table}', document => 'shown', product => 'elasticsearch'"));
    assert_eq!(shown["mappings"]["properties"].as_object().map(serde_json::Map::len), Some(2));
    let made: i64 = client
        .query_one(
            "select (select count(*) from es_sync.attachment) + (select count(*) from es_sync.job)
                  + (select count(*) from pg_trigger where tgname like 'es_sync%')",
            &[],
        )
        .expect("count")
        .get(0);
    assert_eq!(made, 0);
    client
        .batch_execute(
            "grant usage on schema es_sync to someone;
             grant execute on all functions in schema es_sync to someone;
             set role someone",
        )
        .expect("role");
    assert_eq!(state(&mut client, &format!("select es_sync.mapping('{table}')")), "42501");
}

/// An attached table's columns: bytea is noted as a change only where documents hold it.
#[test]
fn a_change_of_bytea_is_noted_only_where_it_is_mapped() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let (table, with) = (unique("bytes"), unique("with"));
    client
        .batch_execute(&format!(
            "create table {table} (id int primary key, data bytea, words tsvector);
             insert into {table} values (1, '\\x00', 'a');
             select es_sync.attach('{table}')"
        ))
        .expect("attach");
    expect::settled(&mut client);
    let indexed = |client: &mut Client| -> i64 {
        let sum = "select sum(indexed)::bigint from es_sync.status";
        client.query_one(sum, &[]).expect("status").get::<_, Option<i64>>(0).unwrap_or_default()
    };
    let before = indexed(&mut client);
    client.batch_execute(&format!("update {table} set data = '\\x01', words = 'b'")).expect("update");
    expect::settled(&mut client);
    assert_eq!(indexed(&mut client), before, "no document has it");
    client
        .batch_execute(&format!(
            "select es_sync.attach('{table}', index => '{with}', options => '{{\"mappings\": {{\"properties\": {{\"data\": {{}}, \"words\": {{}}}}}}}}')"
        ))
        .expect("attach");
    expect::settled(&mut client);
    for (change, field, wanted) in [("data = '\\x02'", "data", "Ag=="), ("words = 'c'", "words", "'c'")] {
        client.batch_execute(&format!("update {table} set {change}")).expect("update");
        expect::settled(&mut client);
        wait::until("the change is there", wait::SHORT, || {
            engine.source(&with, "1").is_some_and(|source| source.contains(&format!("\"{field}\":\"{wanted}\"")))
        });
    }
    let query =
        format!("select id, json_build_object('id', id, 'data', encode(data, 'base64'), 'words', words) from {table}");
    expect::documents_equal(&mut client, &query, &engine, &with);
}
