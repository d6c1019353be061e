//! The main job: three lines of SQL, and sessions that write all the while.

use pg_es_sync_tests::{Engine, Server, expect};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

/// README's three lines, word for word, on 100,000 rows; sessions insert, update and delete during load and reindex.
#[test]
fn the_three_lines_of_the_readme_keep_table_and_index_identical_under_writes() {
    let engine = Engine::elasticsearch();
    // The one name that is not unique: an earlier run against the same engine may have left it.
    for index in engine.indexes_of("collectives") {
        engine.delete(&format!("/{index}"));
    }
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).expect("README");
    let server = Server::with(&engine);
    let mut client = server.create_empty_database("app");
    client
        .batch_execute(
            "set timezone = 'UTC';
             create table collectives (id bigint primary key, name text, tags text[], counts int[], settings jsonb,
                 created_at timestamptz, updated_at timestamp, live boolean);
             insert into collectives
             select i, 'collective ' || i, array['tag ' || i % 7, null], array[i, i + 1],
                 jsonb_build_object('color', 'c' || i % 11, 'nested', jsonb_build_object('n', i)),
                 timestamptz '2024-01-01' + i * interval '1 s', timestamp '2020-01-01 10:00', i % 2 = 0
             from generate_series(1, 100000) i",
        )
        .expect("set up");
    let lines = [
        "CREATE EXTENSION pg_es_sync;",
        "SELECT es_sync.attach('collectives');",
        "SELECT es_sync.reindex('collectives');",
    ];
    for line in lines {
        assert!(readme.contains(line), "README shows: {line}");
    }

    client.batch_execute(lines[0]).expect(lines[0]);
    let stop = Arc::new(AtomicBool::new(false));
    let operations = Arc::new(AtomicU32::new(0));
    client.batch_execute(lines[1]).expect(lines[1]);
    let writers: Vec<_> = (0..3)
        .map(|number| {
            let (mut session, stop, operations) = (server.connect("app"), stop.clone(), operations.clone());
            thread::spawn(move || {
                let mut key = i64::from(number) * 31_337;
                while !stop.load(Ordering::Relaxed) {
                    key = (key * 7_919 + 12_345) % 100_000;
                    let statement = match key % 4 {
                        0 => format!("delete from collectives where id = {key}"),
                        1 => format!(
                            "insert into collectives (id, name) values ({}, 'inserted') on conflict (id) do nothing",
                            200_000 + key
                        ),
                        2 => format!(
                            "update collectives set name = 'updated ' || random() where id between {key} and {key} + 5"
                        ),
                        _ => format!(
                            "begin; update collectives set live = not live where id = {key}; savepoint s;
                                      delete from collectives where id = {key} + 1; rollback to s; commit"
                        ),
                    };
                    // Sessions may deadlock among themselves; that one is rolled back, which is a case too.
                    let _ = session.batch_execute(&statement).or_else(|_| session.batch_execute("rollback"));
                    operations.fetch_add(1, Ordering::Relaxed);
                    // Three sessions without a pause write more than an engine on the same two cores can index.
                    thread::sleep(std::time::Duration::from_millis(5));
                }
            })
        })
        .collect();

    // During the first load it joins that.
    let joined: i64 = client.query_one("SELECT es_sync.reindex('collectives')", &[]).expect("reindex").get(0);
    assert_eq!(joined, 1);
    expect::settled(&mut client);
    let during_load = operations.load(Ordering::Relaxed);
    assert!(during_load > 20, "sessions wrote during the load: {during_load}");
    client.batch_execute(lines[2]).expect(lines[2]);
    expect::settled(&mut client);
    assert!(operations.load(Ordering::Relaxed) > during_load + 20, "sessions wrote during the reindex");
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.join().expect("a writer saw an error");
    }

    expect::table_equal(&mut client, "collectives", "id", &engine, "collectives");
    let indexes = engine.indexes_of("collectives");
    assert_eq!(indexes.len(), 1, "the old index is gone: {indexes:?}");
    assert_ne!(indexes, ["collectives-1"], "it was rebuilt beside the first one");
    let letters: i64 = client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("letters").get(0);
    assert_eq!(letters, 0);
}

#[test]
fn a_change_is_searchable_within_about_a_second_without_any_call() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = pg_es_sync_tests::unique("quick");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text); select es_sync.attach('{name}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    client.batch_execute(&format!("insert into {name} values (1, 'hello')")).expect("insert");
    pg_es_sync_tests::wait::until("it is found", std::time::Duration::from_secs(5), || {
        engine.search_ids(&name, serde_json::json!({"match": {"title": "hello"}})) == ["1"]
    });
}
