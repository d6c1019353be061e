//! Option `delay`: the changes of a document gather for so long and are sent as one; nothing of it is lost, and nobody
//! else waits.

use pg_es_sync_tests::{Engine, Mode, Proxy, Server, expect, unique, wait};
use postgres::Client;
use serde_json::json;
use std::time::{Duration, Instant};

/// A table of two columns with some rows, attached with options and loaded; its index has its name.
fn attached(client: &mut Client, name: &str, rows: usize, options: &str) -> String {
    let table = unique(name);
    client
        .batch_execute(&format!(
            "create table {table} (id int primary key, n int not null);
             insert into {table} select i, 0 from generate_series(1, {rows}) i;
             select es_sync.attach('{table}', options => '{options}')"
        ))
        .expect("attach");
    expect::settled(client);
    table
}

fn run(client: &mut Client, sql: &str) {
    client.batch_execute(sql).unwrap_or_else(|error| panic!("{error:?} in: {sql}"));
}

fn number(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap_or_else(|error| panic!("{error:?} in: {sql}")).get(0)
}

fn wait_now(client: &mut Client) {
    let begun = Instant::now();
    assert!(client.query_one("select es_sync.wait(timeout => '60 s')", &[]).expect("wait").get::<_, bool>(0));
    assert!(begun.elapsed() < Duration::from_secs(60));
}

/// Ends the worker and not the server; another one takes over.
fn end_worker(client: &mut Client) {
    let ended = "select pg_terminate_backend(worker_pid, 20000) from es_sync.status limit 1";
    assert!(client.query_one(ended, &[]).expect("worker").get::<_, bool>(0));
}

/// As the engine has it, without waiting for anything.
fn value(engine: &Engine, index: &str, id: &str) -> Option<i64> {
    let source: serde_json::Value = serde_json::from_str(&engine.source(index, id)?).expect("JSON");
    source["n"].as_i64()
}

#[test]
fn a_row_updated_a_thousand_times_in_ten_seconds_with_a_delay_of_five_is_sent_twice_or_thrice() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::with_url(proxy.url());
    let mut client = server.create_database("app");
    let hot = attached(&mut client, "hot", 10, r#"{"delay": "5s"}"#);
    let plain = attached(&mut client, "plain", 10, "{}");
    let second = unique("second");
    run(&mut client, &format!("select es_sync.attach('{hot}', index => '{second}')"));
    expect::settled(&mut client);
    proxy.forget_seen();

    let mut writer = server.connect("app");
    let updates = format!(
        "do $$ begin for i in 1..1000 loop update {hot} set n = i where id = 1; commit; perform pg_sleep(0.01);
         end loop; end $$"
    );
    let writing = std::thread::spawn(move || run(&mut writer, &updates));
    // Other tables, and another index of the same one, are as fast as ever meanwhile.
    let mut latencies = Vec::new();
    let began = Instant::now();
    let mut n = 0;
    while !writing.is_finished() {
        n += 1;
        run(&mut client, &format!("update {plain} set n = {n} where id = 2"));
        let begun = Instant::now();
        wait::until("another table's change arrives", wait::SHORT, || value(&engine, &plain, "2") == Some(n));
        latencies.push(begun.elapsed());
    }
    writing.join().expect("updates");
    let took = began.elapsed();
    latencies.sort();
    assert!(latencies.len() > 20, "{} changes of another table arrived in {took:?}", latencies.len());
    let median = latencies[latencies.len() / 2];
    assert!(median < Duration::from_secs(1), "another table's changes took {median:?}");
    wait::until("the last one arrives by itself", wait::SHORT, || value(&engine, &hot, "1") == Some(1000));

    let sent = |index: &str| {
        let concrete = format!("/{index}-");
        proxy.seen("_bulk").iter().filter(|seen| seen.path.starts_with(&concrete)).count()
    };
    let (folded, at_once) = (sent(&hot), sent(&second));
    // Thrice in the ten seconds that a machine takes which is not too busy.
    let most = took.as_secs() as usize / 5 + 1;
    assert!((2..=most).contains(&folded), "sent {folded} times in {took:?}");
    assert!(at_once > 20, "the other index got only {at_once} requests");
    for index in [&hot, &second] {
        expect::table_equal(&mut client, &hot, "id", &engine, index);
    }
    expect::table_equal(&mut client, &plain, "id", &engine, &plain);
}

#[test]
fn what_gathers_arrives_when_the_first_change_is_as_old_as_the_delay() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let hot = attached(&mut client, "hot", 10, r#"{"delay": "2s"}"#);
    run(&mut client, &format!("update {hot} set n = 1 where id = 1"));
    let begun = Instant::now();
    wait::until("it arrives by itself", wait::SHORT, || value(&engine, &hot, "1") == Some(1));
    assert!(begun.elapsed() > Duration::from_millis(1_500), "it gathered only {:?}", begun.elapsed());
    run(&mut client, &format!("delete from {hot} where id = 1; insert into {hot} values (11, 5)"));
    wait::until("so does a delete", wait::SHORT, || engine.source(&hot, "1").is_none());
    wait::until("and an insert", wait::SHORT, || value(&engine, &hot, "11") == Some(5));
    expect::table_equal(&mut client, &hot, "id", &engine, &hot);
}

#[test]
fn wait_has_sent_at_once_what_gathers() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        let hot = attached(&mut client, "hot", 100, r#"{"delay": "1h"}"#);
        run(&mut client, &format!("update {hot} set n = 7 where id <= 50; delete from {hot} where id > 90"));
        wait_now(&mut client);
        assert_eq!(engine.search_ids(&hot, json!({"term": {"n": 7}})).len(), 50, "searchable, not only sent");
        // A prepared transaction, a key change and a table of its own.
        run(&mut client, &format!("begin; update {hot} set id = 1000 where id = 1; prepare transaction 'keys'"));
        run(&mut client, "commit prepared 'keys'");
        let waited: bool =
            client.query_one(&format!("select es_sync.wait('{hot}', '60 s')"), &[]).expect("wait").get(0);
        assert!(waited);
        expect::table_equal(&mut client, &hot, "id", &engine, &hot);
    }
}

#[test]
fn a_document_that_changes_all_the_time_does_not_fill_the_queue() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let hot = attached(&mut client, "hot", 10, r#"{"delay": "1h"}"#);
    run(
        &mut client,
        &format!(
            "do $$ begin for i in 1..3000 loop update {hot} set n = i where id = 1 + i % 3; commit; end loop; end $$"
        ),
    );
    wait::until("one row stands for each document", wait::SHORT, || {
        let rows = number(&mut client, "select count(*) from es_sync.queue");
        if rows <= 3 { Ok(()) } else { Err(format!("{rows} rows")) }
    });
    assert_eq!(value(&engine, &hot, "1"), Some(0), "nothing was sent");
    expect::table_equal(&mut client, &hot, "id", &engine, &hot);
    assert_eq!(number(&mut client, "select count(*) from es_sync.queue"), 0);
}

#[test]
fn what_gathers_survives_the_worker_the_server_and_a_change_of_the_queue() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let hot = attached(&mut client, "hot", 100, r#"{"delay": "1h"}"#);
    let gathered = |client: &mut Client, hot: &str, n: i64| {
        for i in 0..20 {
            run(client, &format!("update {hot} set n = {n} where id = {}", 1 + i % 5));
        }
        wait::until("the changes gather", wait::SHORT, || {
            number(client, "select coalesce(sum(count), 0) from es_sync.queue") == 5
        });
    };
    gathered(&mut client, &hot, 1);
    end_worker(&mut client);
    expect::table_equal(&mut client, &hot, "id", &engine, &hot);

    gathered(&mut client, &hot, 2);
    drop(client);
    let mut server = server;
    server.restart(Mode::Fast);
    let mut client = server.connect("app");
    expect::table_equal(&mut client, &hot, "id", &engine, &hot);

    gathered(&mut client, &hot, 3);
    server.conf("es_sync.queue_durability", "logged");
    server.reload();
    expect::logged_queue(&mut client);
    run(&mut client, &format!("update {hot} set n = 4 where id = 1"));
    expect::table_equal(&mut client, &hot, "id", &engine, &hot);

    // The delay counts from when a change was enqueued, whoever claims it.
    run(&mut client, &format!("select es_sync.detach('{hot}')"));
    let short = unique("short");
    run(
        &mut client,
        &format!("select es_sync.attach('{hot}', index => '{short}', options => '{{\"delay\": \"3s\"}}')"),
    );
    expect::settled(&mut client);
    run(&mut client, &format!("update {hot} set n = 5 where id = 1"));
    end_worker(&mut client);
    wait::until("it arrives by itself", wait::LONG, || value(&engine, &short, "1") == Some(5));
    expect::table_equal(&mut client, &hot, "id", &engine, &short);
}

#[test]
fn a_crash_loses_nothing_that_gathered() {
    let engine = Engine::elasticsearch();
    let mut server = Server::with(&engine);
    let mut client = server.create_database("app");
    let hot = attached(&mut client, "hot", 100, r#"{"delay": "1h"}"#);
    run(&mut client, &format!("update {hot} set n = 1 where id = 1; delete from {hot} where id = 2"));
    drop(client);
    server.restart(Mode::Immediate);
    let mut client = server.connect("app");
    expect::table_equal(&mut client, &hot, "id", &engine, &hot);
}

#[test]
fn detach_of_one_index_lets_go_of_what_gathered_for_it_alone() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let hot = attached(&mut client, "hot", 100, r#"{"delay": "1h"}"#);
    let plain = unique("plain");
    run(&mut client, &format!("select es_sync.attach('{hot}', index => '{plain}')"));
    expect::settled(&mut client);
    run(&mut client, &format!("update {hot} set n = 1 where id <= 10"));
    wait::until("the other index has it", wait::SHORT, || value(&engine, &plain, "1") == Some(1));
    assert_eq!(value(&engine, &hot, "1"), Some(0));
    run(&mut client, &format!("select es_sync.detach('{hot}', index => '{hot}')"));
    wait::until("nothing is left in the queue", wait::SHORT, || {
        number(&mut client, "select count(*) from es_sync.queue") == 0
    });
    run(&mut client, &format!("update {hot} set n = 2 where id <= 10"));
    expect::table_equal(&mut client, &hot, "id", &engine, &plain);
}

#[test]
fn reindex_and_verify_under_writes_do_not_wait_for_the_delay() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let hot = attached(&mut client, "hot", 20_000, r#"{"delay": "1h"}"#);
    let mut writer = server.connect("app");
    let changes = format!(
        "do $$ begin for i in 1..2000 loop
           update {hot} set n = n + 1 where id = 1 + i % 7;
           update {hot} set n = i where id = 100 + i * 3;
           delete from {hot} where id = 10000 + i;
           insert into {hot} values (50000 + i, i);
           commit; end loop; end $$"
    );
    let writing = std::thread::spawn(move || run(&mut writer, &changes));
    run(&mut client, &format!("select es_sync.reindex('{hot}')"));
    expect::settled(&mut client);
    run(&mut client, &format!("select es_sync.verify('{hot}', repair => true)"));
    writing.join().expect("changes");
    expect::settled(&mut client);
    // Written behind the extension's back: a repair mends it, and does not wait for the delay either.
    engine.put(&format!("/{hot}/_doc/3?refresh=true"), json!({"id": 3, "n": -1}));
    engine.delete(&format!("/{hot}/_doc/4?refresh=true"));
    run(&mut client, &format!("select es_sync.verify('{hot}', repair => true)"));
    expect::settled(&mut client);
    let mended = "select coalesce(missing, 0) + coalesce(different, 0) from es_sync.jobs order by id desc limit 1";
    assert_eq!(number(&mut client, mended), 2);
    expect::table_equal(&mut client, &hot, "id", &engine, &hot);
}

#[test]
fn more_documents_than_may_gather_go_before_their_time_and_hold_back_nobody() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let hot = attached(&mut client, "hot", 60_000, r#"{"delay": "1h"}"#);
    let plain = attached(&mut client, "plain", 10, "{}");
    run(&mut client, &format!("update {hot} set n = 1"));
    run(&mut client, &format!("update {plain} set n = 1 where id = 1"));
    let begun = Instant::now();
    wait::until("another table's change arrives", wait::SHORT, || value(&engine, &plain, "1") == Some(1));
    assert!(begun.elapsed() < Duration::from_secs(10));
    wait::until("all but those that may gather are sent", wait::LONG, || {
        engine.refresh(&hot);
        let sent = engine.post(&format!("/{hot}/_count"), json!({"query": {"term": {"n": 1}}}))["count"].as_u64();
        if sent >= Some(56_000) { Ok(()) } else { Err(format!("{sent:?}")) }
    });
    run(&mut client, &format!("update {plain} set n = 2 where id = 1"));
    wait::until("another table's change arrives while they gather", wait::SHORT, || {
        value(&engine, &plain, "1") == Some(2)
    });
    expect::table_equal(&mut client, &hot, "id", &engine, &hot);
}

#[test]
fn changes_of_related_rows_gather_too_and_do_not_stand_still() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let index = unique("gather");
    run(
        &mut client,
        "create table host (id int primary key, name text);
         create table child (id int primary key, host int references host, n int not null default 0);
         create index on child (host);
         insert into host select i, 'host ' || i from generate_series(1, 3) i;
         insert into child select i, case when i <= 30000 then 1 else 2 end from generate_series(1, 30100) i;
         create view document as select c.id, c.n, h.name from child c left join host h on h.id = c.host",
    );
    run(
        &mut client,
        &format!(
            "select es_sync.attach('child', index => '{index}', document => 'document', options => '{{\"delay\": \"1h\"}}')"
        ),
    );
    expect::settled(&mut client);
    let query = "select id, row_to_json(d) from document d";
    run(&mut client, "update host set name = 'two' where id = 2; update child set n = 1 where id > 30050");
    run(&mut client, "update host set name = 'twice' where id = 2");
    expect::settled(&mut client);
    expect::documents_equal(&mut client, query, &engine, &index);
    run(&mut client, "update host set name = 'one' where id = 1");
    wait::until("most of many documents are sent before their time", wait::LONG, || {
        engine.refresh(&index);
        let query = json!({"query": {"term": {"name.keyword": "one"}}});
        engine.post(&format!("/{index}/_count"), query)["count"].as_u64() >= Some(20_000)
    });
    run(&mut client, "update child set n = 2 where id < 100; update host set name = 'once' where id = 1");
    expect::settled(&mut client);
    expect::documents_equal(&mut client, query, &engine, &index);
}

#[test]
fn a_row_that_leaves_the_related_one_whose_change_gathers_is_not_lost_when_it_is_found_anew() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let plain = attached(&mut client, "plain", 1, "{}");
    let index = unique("gather");
    run(
        &mut client,
        &format!(
            r#"create table host (id int primary key, name text);
               create table child (id int primary key, host int references host);
               create index on child (host);
               insert into host select i, 'host ' || i from generate_series(1, 2) i;
               insert into child select i, 1 from generate_series(1, 10) i;
               create view document as select c.id, h.name from child c left join host h on h.id = c.host;
               select es_sync.attach('child', index => '{index}', document => 'document', options => '{{"delay": "1h"}}')"#
        ),
    );
    expect::settled(&mut client);
    let mut changes = 0;
    let mut until_claimed = |client: &mut Client| {
        for _ in 0..2 {
            changes += 1;
            run(client, &format!("update {plain} set n = {changes} where id = 1"));
            wait::until("a later change arrives", wait::SHORT, || value(&engine, &plain, "1") == Some(changes));
        }
    };
    run(&mut client, "update host set name = 'changed' where id = 1");
    until_claimed(&mut client);
    run(&mut client, "delete from child where id = 7; update child set host = 2 where id = 8");
    until_claimed(&mut client);
    run(&mut client, "select es_sync.pause('child')");
    until_claimed(&mut client);
    run(&mut client, "select es_sync.resume('child')");
    expect::settled(&mut client);
    expect::documents_equal(&mut client, "select id, row_to_json(d) from document d", &engine, &index);
}

#[test]
fn pause_and_resume_keep_what_gathers() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let hot = attached(&mut client, "hot", 100, r#"{"delay": "1h"}"#);
    run(&mut client, &format!("update {hot} set n = 1 where id <= 10; update {hot} set n = 2 where id <= 5"));
    run(&mut client, &format!("select es_sync.pause('{hot}')"));
    run(&mut client, &format!("update {hot} set n = 3 where id = 1; delete from {hot} where id = 2"));
    run(&mut client, &format!("select es_sync.resume('{hot}')"));
    expect::table_equal(&mut client, &hot, "id", &engine, &hot);
}

#[test]
fn a_delay_is_a_time_of_an_hour_at_the_most() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let table = unique("refused");
    run(&mut client, &format!("create table {table} (id int primary key)"));
    for wrong in ["5", "\"5\"", "\"2h\"", "\"5 s\"", "\"-1s\"", "true"] {
        let attach = format!("select es_sync.attach('{table}', options => '{{\"delay\": {wrong}}}')");
        let error = client.batch_execute(&attach).expect_err(wrong);
        assert_eq!(error.code().map(postgres::error::SqlState::code), Some("22023"), "{wrong}");
    }
}
