//! Whatever was lost or changed by hand: index and table become equal again.

use std::time::{Duration, Instant};

use pg_es_sync_tests::{
    Engine, Fault, Mode, Proxy, Server, close_queue, crashed, expect, is_stale, process, unique, wait,
};
use postgres::Client;
use serde_json::json;

fn counts(client: &mut Client) -> (i64, i64, i64) {
    let row = client
        .query_one(
            "select coalesce(sum(missing), 0)::bigint, coalesce(sum(different), 0)::bigint,
                    coalesce(sum(orphaned), 0)::bigint
             from es_sync.job where kind = 'verify' and state = 'done'",
            &[],
        )
        .expect("jobs");
    (row.get(0), row.get(1), row.get(2))
}

fn table(client: &mut Client, rows: usize) -> String {
    let name = unique("repaired");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text, details jsonb, at timestamptz);
             insert into {name} select i, 'thing ' || i, jsonb_build_object('n', i / 7.0, 't', 'ä\n'), now()
             from generate_series(1, {rows}) i;
             select es_sync.attach('{name}')"
        ))
        .expect("set up");
    expect::settled(client);
    name
}

#[test]
fn verify_counts_what_differs_and_mends_it_only_when_asked() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        let name = table(&mut client, 5000);
        client.batch_execute(&format!("select es_sync.verify('{name}')")).expect("verify");
        expect::settled(&mut client);
        assert_eq!(counts(&mut client), (0, 0, 0), "equal documents are equal, whatever their values");

        let index = engine.indexes_of(&name).remove(0);
        engine.delete(&format!("/{index}/_doc/1"));
        engine.delete(&format!("/{index}/_doc/4999"));
        engine.put(&format!("/{index}/_doc/2"), json!({"id": 2, "title": "by hand"}));
        engine.put(&format!("/{index}/_doc/999999"), json!({"id": 999999}));
        engine.put(&format!("/{index}/_doc/no-integer"), json!({"id": 1}));
        engine.put(&format!("/{index}/_doc/007"), json!({"id": 7}));
        let before = engine.documents(&name);
        client.batch_execute(&format!("select es_sync.verify('{name}')")).expect("verify");
        expect::settled(&mut client);
        assert_eq!(counts(&mut client), (2, 1, 3));
        assert_eq!(engine.documents(&name), before, "nothing was changed");

        client.batch_execute(&format!("select es_sync.verify('{name}', repair => true)")).expect("repair");
        expect::table_equal(&mut client, &name, "id", &engine, &name);
        assert_eq!(counts(&mut client), (4, 2, 6));
        let indexed: Vec<i64> =
            client.query_one("select array[indexed, deleted] from es_sync.status", &[]).expect("status").get(0);
        assert_eq!(indexed, [5000 + 3, 3], "only what differs was sent");
    }
}

/// The last comparison's counts: missing, different, orphaned.
fn verified(client: &mut Client, name: &str, repair: bool) -> (i64, i64, i64) {
    client.batch_execute(&format!("select es_sync.verify('{name}', repair => {repair})")).expect("verify");
    expect::settled(client);
    let last = "select missing, different, orphaned from es_sync.jobs where kind = 'verify' order by id desc limit 1";
    let row = client.query_one(last, &[]).expect("job");
    (row.get(0), row.get(1), row.get(2))
}

#[test]
fn verify_passes_over_parked_keys() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        let name = unique("parked");
        client
            .batch_execute(&format!(
                "create table {name} (id int primary key, title text, doc jsonb);
                 insert into {name} select i, 'thing', '{{\"a\": 1}}' from generate_series(1, 50) i;
                 update {name} set doc = '7' where id = 3;
                 select es_sync.attach('{name}',
                     options => '{{\"mappings\": {{\"properties\": {{\"doc\": {{\"type\": \"object\"}}}}}}}}')"
            ))
            .expect("set up");
        expect::settled(&mut client);
        // One was never taken, another one not as it is now.
        client.batch_execute(&format!("update {name} set doc = '7' where id = 4")).expect("update");
        expect::settled(&mut client);
        let letters = |client: &mut Client| -> Vec<String> {
            let rows = client.query("select key from es_sync.dead_letters order by key", &[]).expect("letters");
            rows.iter().map(|row| row.get(0)).collect()
        };
        assert_eq!(letters(&mut client), ["3", "4"]);
        assert_eq!(verified(&mut client, &name, false), (0, 0, 0), "their letters say enough");
        assert_eq!(verified(&mut client, &name, true), (1, 1, 0), "a repair sends them once more");
        assert_eq!(letters(&mut client), ["3", "4"]);
        assert_eq!(verified(&mut client, &name, false), (0, 0, 0));
        assert_eq!(letters(&mut client), ["3", "4"], "a comparison takes no letter away");
        // Beside them everything else counts.
        let index = engine.indexes_of(&name).remove(0);
        engine.delete(&format!("/{index}/_doc/5"));
        assert_eq!(verified(&mut client, &name, false), (1, 0, 0));
        client.batch_execute(&format!("update {name} set doc = '{{\"a\": 2}}' where id in (3, 4, 5)")).expect("mend");
        expect::table_equal(&mut client, &name, "id", &engine, &name);
        assert_eq!(letters(&mut client), Vec::<String>::new());
        assert_eq!(verified(&mut client, &name, false), (0, 0, 0));
    }
}

/// With `_source` options or a pipeline of the index's own the engine gives back something else than it was sent.
#[test]
fn where_documents_are_not_given_back_as_sent_verify_compares_presence_only() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        let pipeline = unique("pipeline");
        engine.put(&format!("/_ingest/pipeline/{pipeline}"), json!({"processors": []}));
        for (n, options) in [
            json!({"mappings": {"_source": {"excludes": ["note"]}}}),
            json!({"mappings": {"_source": {"includes": ["id", "title"]}}}),
            json!({"settings": {"default_pipeline": pipeline}}),
            json!({"settings": {"index": {"final_pipeline": pipeline}}}),
            json!({"settings": {"index.final_pipeline": pipeline}}),
        ]
        .into_iter()
        .enumerate()
        {
            let name = unique("given_back");
            client
                .batch_execute(&format!(
                    "create table {name} (id int primary key, title text, note text);
                     insert into {name} select i, 'thing ' || i, 'note ' || i from generate_series(1, 30) i;
                     select es_sync.attach('{name}', options => '{options}')"
                ))
                .expect("set up");
            let shown = match n {
                0 | 1 => format!("select id, json_build_object('id', id, 'title', title) from {name}"),
                _ => format!("select id, row_to_json(t) from {name} t"),
            };
            expect::settled(&mut client);
            expect::documents_equal(&mut client, &shown, &engine, &name);
            assert_eq!(verified(&mut client, &name, false), (0, 0, 0), "{options}");
            let index = engine.indexes_of(&name).remove(0);
            let by_hand = |id: u32| engine.put(&format!("/{index}/_doc/{id}"), json!({"id": id, "title": "by hand"}));
            engine.delete(&format!("/{index}/_doc/1"));
            by_hand(2);
            by_hand(900);
            assert_eq!(verified(&mut client, &name, false), (1, 0, 1), "{options}");
            assert_eq!(verified(&mut client, &name, true), (1, 0, 1), "{options}");
            assert_eq!(verified(&mut client, &name, true), (0, 0, 0), "{options}");
            // The contents are a rebuild's.
            client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
            expect::settled(&mut client);
            expect::documents_equal(&mut client, &shown, &engine, &name);
        }
        engine.request("DELETE", &format!("/_ingest/pipeline/{pipeline}"), None);
    }
}

#[test]
fn verify_under_writes_finds_nothing_that_is_not_there() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = table(&mut client, 20_000);
    client.batch_execute(&format!("select es_sync.verify('{name}')")).expect("verify");
    let mut round = 0;
    wait::until("the comparison has ended", wait::LONG, || -> bool {
        round += 1;
        client
            .batch_execute(&format!(
                "update {name} set title = 'round {round}' where id % 97 = {round} % 97;
                 delete from {name} where id = 20000 - {round};
                 insert into {name} values (100000 + {round}, 'new', '{{}}', now())"
            ))
            .expect("write");
        client.query_one("select bool_and(state = 'done') from es_sync.jobs", &[]).expect("jobs").get(0)
    });
    assert_eq!(counts(&mut client), (0, 0, 0), "after {round} rounds of writes");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn rows_that_change_all_the_time_do_not_count_as_different() {
    let engine = Engine::elasticsearch();
    // So that there are always changes that nobody has claimed yet.
    let server = Server::builder().conf("es_sync.url", engine.url()).conf("es_sync.linger", "50ms").start();
    let mut client = server.create_database("app");
    let name = table(&mut client, 2000);
    let mut writer = server.connect("app");
    let hot = format!("update {name} set title = clock_timestamp()::text where id <= 40");
    let ended = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let begun = Instant::now();
            while !ended.load(std::sync::atomic::Ordering::Relaxed) && begun.elapsed() < wait::LONG {
                writer.batch_execute(&hot).expect("write");
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        for round in 0..10 {
            client.batch_execute(&format!("select es_sync.verify('{name}')")).expect("verify");
            wait::until("the comparison has ended", wait::LONG, || -> bool {
                client.query_one("select bool_and(state = 'done') from es_sync.jobs", &[]).expect("jobs").get(0)
            });
            assert_eq!(counts(&mut client), (0, 0, 0), "in round {round}");
        }
        ended.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

/// Leaves a request in flight and changes in the queue: 300 deletes, 100 updates, 10 new rows.
fn changes_in_flight(client: &mut Client, proxy: &Proxy, name: &str) {
    proxy.set_for("_bulk", Fault::Blackhole);
    proxy.forget_seen();
    client
        .batch_execute(&format!(
            "delete from {name} where id in (select id from {name} order by id limit 300);
             update {name} set title = 'changed' where id % 20 = 0;
             insert into {name} select i, 'new' from generate_series(50001, 50010) i on conflict do nothing"
        ))
        .expect("write");
    wait::until("a request is in flight", wait::SHORT, || !proxy.seen("_bulk").is_empty());
    let queued: i64 = client.query_one("select count(*) from es_sync.queue", &[]).expect("queue").get(0);
    assert!(queued > 0, "the queue is not empty");
}

fn server(proxy: &Proxy) -> Server {
    Server::builder().conf("es_sync.url", proxy.url()).conf("es_sync.lease_timeout", "2s").start()
}

/// Runs `fault` while requests are in flight; returns the deletes that a repair had to mend.
fn after(fault: impl FnOnce(&mut Server, Client)) -> i64 {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let mut server = server(&proxy);
    let mut client = server.create_database("app");
    let name = table(&mut client, 2000);
    changes_in_flight(&mut client, &proxy, &name);
    fault(&mut server, client);
    proxy.set(Fault::Pass);
    let mut client = wait::until("the server answers", wait::LONG, || server.try_connect("postgres", "app"));
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    let (missing, different, orphaned) = counts(&mut client);
    println!("mended by the repair: {orphaned} deletes, {different} updates, {missing} inserts");
    orphaned
}

#[test]
fn a_terminated_worker_loses_nothing_and_needs_no_repair() {
    let mended = after(|server, mut client| {
        let pid: i32 = client.query_one("select worker_pid from es_sync.status", &[]).expect("status").get(0);
        client.execute("select pg_terminate_backend($1)", &[&pid]).expect("terminate");
        wait::until("another worker runs", wait::LONG, || {
            server.workers().iter().any(|(other, _, database)| database == "app" && *other != pid as u32)
        });
    });
    assert_eq!(mended, 0, "the queue had all of them");
}

#[test]
fn after_a_killed_worker_the_repair_mends_what_the_queue_lost() {
    let mended = after(|server, client| {
        server.kill_worker("app");
        crashed(client);
    });
    assert_eq!(mended, 300);
}

#[test]
fn after_a_killed_writer_the_repair_mends_what_the_queue_lost() {
    let mended = after(|server, mut client| {
        // The victim's connection is gone before the server has noticed anything.
        let bystander = server.connect("app");
        let pid: i32 = client.query_one("select pg_backend_pid()", &[]).expect("pid").get(0);
        process::signal(pid as u32, "KILL");
        crashed(bystander);
    });
    assert_eq!(mended, 300);
}

#[test]
fn after_an_immediate_restart_the_repair_mends_what_the_queue_lost() {
    let mended = after(|server, _| server.restart(Mode::Immediate));
    assert_eq!(mended, 300);
}

#[test]
fn a_fast_restart_keeps_the_queue_and_needs_no_repair() {
    let mended = after(|server, _| server.restart(Mode::Fast));
    assert_eq!(mended, 0);
}

#[test]
fn a_logged_queue_survives_a_crash_and_needs_no_repair_of_what_it_holds() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let mut server = Server::builder()
        .conf("es_sync.url", proxy.url())
        .conf("es_sync.lease_timeout", "2s")
        .conf("es_sync.queue_durability", "logged")
        .durable()
        .start();
    let mut client = server.create_database("app");
    let name = table(&mut client, 2000);
    expect::logged_queue(&mut client);
    changes_in_flight(&mut client, &proxy, &name);
    server.restart(Mode::Immediate);
    let mut client = server.connect("app");
    let queued: i64 = client.query_one("select count(*) from es_sync.queue", &[]).expect("queue").get(0);
    assert!(queued > 0, "the queue survived");
    proxy.set(Fault::Pass);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    // The setting taken back under writes.
    server.conf("es_sync.queue_durability", "unlogged");
    server.reload();
    wait::until("the queue is unlogged", wait::SHORT, || -> bool {
        client.batch_execute(&format!("update {name} set at = now() where id = 1000")).expect("write");
        client
            .query_one("select relpersistence = 'u' from pg_class where oid = 'es_sync.queue'::regclass", &[])
            .expect("persistence")
            .get(0)
    });
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn beside_a_logged_queue_unlogged_tables_that_a_crash_empties_are_emptied_in_their_indexes() {
    let engine = Engine::elasticsearch();
    let server = Server::builder()
        .conf("es_sync.url", engine.url())
        .conf("es_sync.queue_durability", "logged")
        .durable()
        .start();
    let mut client = server.create_database("app");
    let (logged, unlogged) = (table(&mut client, 100), table(&mut client, 100));
    expect::logged_queue(&mut client);
    let marker = |client: &mut Client, persistence: &str| {
        let query = "select relpersistence::text from pg_class where oid = 'es_sync.marker'::regclass";
        wait::until_equal(
            "the marker is as durable as the tables",
            wait::SHORT,
            persistence.to_owned(),
            || -> String { client.query_one(query, &[]).expect("marker").get(0) },
        );
    };
    marker(&mut client, "p");
    client.batch_execute(&format!("alter table {unlogged} set unlogged; checkpoint")).expect("alter");
    marker(&mut client, "u");
    expect::table_equal(&mut client, &unlogged, "id", &engine, &unlogged);
    server.kill_worker("app");
    crashed(client);
    let mut client = wait::until("the server is back", wait::LONG, || {
        server.try_connect("postgres", "app").map_err(|error| error.to_string())
    });
    assert!(client.query(&format!("select from {unlogged}"), &[]).expect("table").is_empty(), "the crash emptied it");
    expect::table_equal(&mut client, &unlogged, "id", &engine, &unlogged);
    expect::table_equal(&mut client, &logged, "id", &engine, &logged);
    expect::logged_queue(&mut client);
    client.batch_execute(&format!("alter table {unlogged} set logged")).expect("alter");
    marker(&mut client, "p");
}

#[test]
fn with_a_logged_queue_nothing_is_sent_that_a_crash_takes_back() {
    let engine = Engine::elasticsearch();
    let mut server = Server::builder()
        .conf("es_sync.url", engine.url())
        .conf("es_sync.lease_timeout", "2s")
        .conf("es_sync.queue_durability", "logged")
        // A commit that nobody waits for is on disk ten seconds later, unless somebody sees to it.
        .conf("wal_writer_delay", "10s")
        .conf("wal_writer_flush_after", "2GB")
        .durable()
        .start();
    let mut client = server.create_database("app");
    let name = table(&mut client, 100);
    expect::logged_queue(&mut client);
    client.batch_execute("set synchronous_commit = off").expect("set");
    for id in 5001..5006 {
        client.batch_execute(&format!("insert into {name} values ({id}, 'not waited for')")).expect("write");
        wait::until("the document is there", wait::SHORT, || {
            engine.request("GET", &format!("/{name}/_doc/{id}"), None).0 == 200
        });
    }
    server.restart(Mode::Kill);
    let mut client = server.connect("app");
    let rows: i64 =
        client.query_one(&format!("select count(*) from {name} where id > 5000"), &[]).expect("count").get(0);
    assert_eq!(rows, 5, "what the index has, the table has");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

/// A table of which so many rows were written while the engine was away that the queue takes nothing more.
fn closed_queue(proxy: &Proxy, last: u32) -> (Server, Client, String) {
    let server = Server::builder().conf("es_sync.url", proxy.url()).with_small_queue().start();
    let mut client = server.create_database("app");
    let name = table(&mut client, 1000);
    proxy.set(Fault::Refuse);
    client
        .batch_execute(&format!("insert into {name} select i, 'much' from generate_series(100001, {last}) i"))
        .expect("a writer sees no error");
    close_queue(&mut client, proxy, &name);
    (server, client, name)
}

#[test]
fn a_full_queue_takes_nothing_more_fails_no_writer_and_is_repaired_afterwards() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client, name) = closed_queue(&proxy, 120000);
    let size = |client: &mut Client| -> i64 {
        client.query_one("select pg_relation_size('es_sync.queue')", &[]).expect("size").get(0)
    };
    let before = size(&mut client);
    assert!(before > 1 << 20, "{before}");
    client
        .batch_execute(&format!(
            "update {name} set title = 'not noted' where id % 2 = 0; delete from {name} where id < 100 or id > 110000"
        ))
        .expect("a writer sees no error");
    assert_eq!(size(&mut client), before, "nothing was enqueued");
    proxy.set(Fault::Pass);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    client.batch_execute(&format!("update {name} set title = 'noted again' where id = 500")).expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn prepared_transactions_fill_the_queue_as_others_do() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::builder().conf("es_sync.url", proxy.url()).with_small_queue().start();
    let mut client = server.create_database("app");
    let name = unique("prepared");
    client
        .batch_execute(&format!("create table {name} (id text primary key, n int); select es_sync.attach('{name}')"))
        .expect("set up");
    expect::settled(&mut client);
    proxy.set(Fault::Refuse);
    let size = |client: &mut Client| -> i64 {
        client.query_one("select pg_relation_size('es_sync.prepared_queue')", &[]).expect("size").get(0)
    };
    let prepared = |client: &mut Client, change: &str| {
        for statement in [&format!("begin; {change}; prepare transaction 'p'"), "commit prepared 'p'"] {
            client.batch_execute(statement).expect("a writer sees no error");
        }
    };
    // Few enough keys for each that they spill to no other queue.
    for transaction in 0..10 {
        let change = format!(
            "insert into {name} select 'a rather long key, of transaction {transaction}, ' || i, i
             from generate_series(1, 5000) i"
        );
        prepared(&mut client, &change);
    }
    assert!(size(&mut client) > 1 << 20);
    wait::until("the queue takes nothing more", wait::SHORT, || is_stale(&mut client));
    let before = size(&mut client);
    prepared(&mut client, &format!("update {name} set n = -n"));
    assert_eq!(size(&mut client), before, "nothing was enqueued");
    proxy.set(Fault::Pass);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(size(&mut client), 0, "it was emptied");
}

/// A single long text is stored out of line: the queue's own pages hold next to nothing then.
#[test]
fn long_values_fill_the_queue_as_many_short_ones_do() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::builder().conf("es_sync.url", proxy.url()).with_small_queue().start();
    let mut client = server.create_database("app");
    let index = unique("long");
    client
        .batch_execute(&format!(
            "create table host (id int primary key, code text, name text);
             create table root (id int primary key, code text);
             create view document as
                 select r.id, h.name as host from root r left join host h on h.code = r.code;
             insert into host
             select i, i || (select string_agg(md5(i || ' ' || j), '') from generate_series(1, 1000) j), 'before'
             from generate_series(1, 100) i;
             insert into root select id, code from host;
             select es_sync.attach('root', index => '{index}', document => 'document')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    proxy.set(Fault::Refuse);
    client.batch_execute("update host set name = 'after'").expect("a writer sees no error");
    let in_line: i64 = client.query_one("select pg_relation_size('es_sync.queue')", &[]).expect("size").get(0);
    assert!(in_line < 1 << 18, "{in_line}");
    wait::until("the queue takes nothing more", wait::SHORT, || is_stale(&mut client));
    proxy.set(Fault::Pass);
    expect::settled(&mut client);
    expect::documents_equal(&mut client, "select id, row_to_json(d) from document d", &engine, &index);
    let size: i64 = client.query_one("select pg_table_size('es_sync.queue')", &[]).expect("size").get(0);
    assert!(size < 1 << 18, "it was emptied: {size}");
}

#[test]
fn a_request_that_arrives_after_the_delete_that_overtook_it_brings_nothing_back() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::builder()
        .conf("es_sync.url", proxy.url())
        .conf("es_sync.request_timeout", "1s")
        .conf("es_sync.retry_max_delay", "100ms")
        .start();
    let mut client = server.create_database("app");
    let name = unique("late");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             select es_sync.attach('{name}', options => '{{\"settings\": {{\"index\": {{\"gc_deletes\": \"0s\"}}}}}}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    proxy.set_for("_bulk", Fault::Delay(Duration::from_millis(2500)));
    proxy.forget_seen();
    client.batch_execute(&format!("insert into {name} values (1, 'late')")).expect("write");
    wait::until("the insert is on its way", wait::SHORT, || !proxy.seen("_bulk").is_empty());
    proxy.set(Fault::Pass);
    client.batch_execute(&format!("delete from {name}")).expect("write");
    expect::settled(&mut client);
    // The delayed one arrives: the engine has forgotten the delete, and takes it. Its count stays when it is taken back.
    wait::until("the late request has arrived", wait::SHORT, || {
        engine.refresh(&name);
        let stats = engine.get(&format!("/{name}/_stats/indexing"));
        stats["_all"]["primaries"]["indexing"]["index_total"].as_u64() >= Some(1)
    });
    wait::until("it was taken back", wait::SHORT, || {
        engine.refresh(&name);
        engine.documents(&name).is_empty()
    });
}

#[test]
fn a_repair_that_is_interrupted_forgets_nothing_that_it_has_seen() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::with_url(proxy.url());
    let mut client = server.create_database("app");
    let name = table(&mut client, 30_000);
    let index = engine.indexes_of(&name).remove(0);
    for id in 1..=10 {
        engine.delete(&format!("/{index}/_doc/{id}"));
    }
    proxy.set_for("_mget", Fault::Delay(Duration::from_millis(400)));
    client.batch_execute(&format!("select es_sync.verify('{name}', repair => true)")).expect("verify");
    wait::until("it has gone some way", wait::LONG, || proxy.seen("_mget").len() >= 6);
    server.conf("es_sync.request_timeout", "17s");
    server.reload();
    proxy.set(Fault::Pass);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn a_repair_waits_for_a_transaction_that_found_the_queue_closed() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    // More keys than are held in memory: they are written before the commit.
    let (server, mut client, name) = closed_queue(&proxy, 240000);
    let mut writer = server.connect("app");
    writer.batch_execute(&format!("begin; update {name} set title = 'long'")).expect("write");
    server.conf("es_sync.queue_limit", "0");
    server.reload();
    proxy.set(Fault::Pass);
    let started = Instant::now();
    wait::until("a repair that does not wait has ended", wait::LONG, || -> bool {
        let ended = "select count(*) > 0 from es_sync.job where kind = 'verify' and state = 'done'";
        started.elapsed() > Duration::from_secs(10) || client.query_one(ended, &[]).expect("jobs").get(0)
    });
    writer.batch_execute("commit").expect("commit");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn a_comparison_that_is_too_much_for_the_engine_is_made_in_smaller_parts() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = server(&proxy);
    let mut client = server.create_database("app");
    let name = table(&mut client, 3000);
    proxy.judge(|head, body| {
        let is_too_much = head.contains("_mget") && body.len() > 4_000;
        is_too_much.then(|| (429, r#"{"error":{"type":"circuit_breaking_exception","reason":"too much"}}"#.to_owned()))
    });
    let index = engine.indexes_of(&name).remove(0);
    engine.delete(&format!("/{index}/_doc/2999"));
    assert_eq!(verified(&mut client, &name, true), (1, 0, 0));
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

/// A table that its owner must not read any more.
#[test]
fn a_comparison_that_cannot_read_its_table_says_why_and_stops_no_other() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let (closed, open) = (table(&mut client, 100), table(&mut client, 100));
    client
        .batch_execute(&format!(
            "create role keeper; grant create on schema public to keeper; alter table {closed} owner to keeper;
             select es_sync.wait('{closed}');
             revoke select on {closed} from keeper;
             select es_sync.verify('{closed}')"
        ))
        .expect("close it");
    wait::until("the job says why", wait::SHORT, || -> bool {
        let said =
            "select coalesce(bool_or(error like '%permission denied%'), false) from es_sync.jobs where kind = 'verify'";
        client.query_one(said, &[]).expect("jobs").get(0)
    });
    client.batch_execute(&format!("update {open} set title = 'goes on'")).expect("write");
    let flows: bool = client.query_one(&format!("select es_sync.wait('{open}', '10 s')"), &[]).expect("wait").get(0);
    assert!(flows);
    client.batch_execute(&format!("grant select on {closed} to keeper")).expect("open it");
    expect::settled(&mut client);
    let state: String = client
        .query_one("select state from es_sync.jobs where kind = 'verify' order by id desc limit 1", &[])
        .expect("job")
        .get(0);
    assert_eq!(state, "done");
    assert!(!server.log().contains("could not go on for the moment"), "{}", server.log());
}

/// As a snapshot is restored beside the live index: under another name, with its mark and its aliases.
fn restored_beside(engine: &Engine, name: &str) -> String {
    let index = engine.indexes_of(name).remove(0);
    let (beside, about) = (format!("restored-{index}"), engine.get(&format!("/{index}")));
    let about = &about[&index];
    let body = json!({"aliases": about["aliases"], "mappings": {"_meta": about["mappings"]["_meta"]}});
    engine.put(&format!("/{beside}"), body);
    beside
}

#[test]
fn an_index_restored_beside_the_live_one_is_kept_when_another_one_is_swapped_in_or_all_are_dropped() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = table(&mut client, 100);
    let former = engine.indexes_of(&name).remove(0);
    let beside = restored_beside(&engine, &name);
    assert_eq!(engine.indexes_of(&name).len(), 2);
    client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(engine.indexes_of(&name).len(), 1, "the new one alone is searched");
    assert!(engine.exists(&beside) && !engine.exists(&former));

    engine.put(&format!("/{beside}/_alias/{name}"), json!({}));
    client.batch_execute(&format!("select es_sync.detach('{name}', drop_index => true)")).expect("detach");
    wait::until("the live one is dropped", wait::SHORT, || engine.indexes_of(&name) == [&*beside]);
}

#[test]
fn a_dead_letter_stays_while_only_an_index_that_is_being_built_has_taken_the_document() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::with_url(proxy.url());
    let mut client = server.create_database("app");
    let name = unique("refused");
    let unmapped = r#"{"mappings": {"properties": {"title": null}}}"#;
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} values (1, '1'), (2, '2');
             select es_sync.attach('{name}', options => '{unmapped}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    // By hand: another index does not have it.
    engine.put(&format!("/{name}-1/_mapping"), json!({"properties": {"title": {"type": "integer"}}}));
    client.batch_execute(&format!("update {name} set title = 'two' where id = 2")).expect("write");
    let letters = |client: &mut Client| -> i64 {
        client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("letters").get(0)
    };
    wait::until("a document is refused", wait::LONG, || letters(&mut client) == 1);
    let settings = format!("/{name}-2/_settings");
    proxy.set_for(&settings, Fault::Hold);
    client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
    let settles = "select count(*) from es_sync.jobs where kind = 'reindex' and phase = 'settle'";
    wait::until("another index has taken it", wait::LONG, || -> bool {
        client.query_one(settles, &[]).expect("jobs").get::<_, i64>(0) == 1
    });
    assert_eq!(letters(&mut client), 1, "the live index has not");
    client.batch_execute("select es_sync.cancel(id) from es_sync.jobs where kind = 'reindex'").expect("cancel");
    proxy.set(Fault::Pass);
    wait::until("the other index is gone", wait::LONG, || !engine.exists(&format!("{name}-2")));
    assert_eq!(letters(&mut client), 1);
    client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
    wait::until("the next one is live", wait::LONG, || engine.indexes_of(&name) == [format!("{name}-3")]);
    wait::until("its letter goes", wait::LONG, || letters(&mut client) == 0);
}

#[test]
fn a_document_whose_dead_letter_was_discarded_counts_as_missing() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = table(&mut client, 10);
    let integer = r#"{"mappings": {"properties": {"title": {"type": "integer"}}}}"#;
    let refused = unique("refused");
    client
        .batch_execute(&format!("select es_sync.attach('{name}', index => '{refused}', options => '{integer}')"))
        .expect("attach");
    let compared = |client: &mut Client| {
        client.batch_execute(&format!("select es_sync.verify('{name}', index => '{refused}')")).expect("verify");
        expect::settled(client);
        counts(client)
    };
    wait::until("the index is live", wait::LONG, || engine.indexes_of(&refused) == [format!("{refused}-1")]);
    assert_eq!(compared(&mut client), (0, 0, 0), "their dead letters say so already");
    client.batch_execute("select es_sync.discard_dead_letters()").expect("discard");
    assert_eq!(compared(&mut client), (10, 0, 0));
}

/// A table whose documents show rows of another one, and the query that says what they are.
fn table_with_kinds(client: &mut Client) -> (String, String) {
    let name = unique("shown");
    client
        .batch_execute(&format!(
            "create table {name}_kind (id int primary key, name text);
             create table {name} (id int primary key, title text, kind int);
             create index on {name} (kind);
             create view {name}_document as
                 select t.id, t.title, k.name as kind from {name} t left join {name}_kind k on k.id = t.kind;
             insert into {name}_kind select i, 'kind ' || i from generate_series(1, 100) i;
             insert into {name} select i, repeat('thing ', 50), i % 100 + 1 from generate_series(1, 15000) i"
        ))
        .expect("set up");
    let documents = format!("select id, row_to_json(d) from {name}_document d");
    (name, documents)
}

/// Truncates the other table, which is not noted row by row, and has it name one kind.
#[track_caller]
fn truncate(client: &mut Client, name: &str, kind: usize) {
    let truncate = format!("truncate {name}_kind; insert into {name}_kind values ({kind}, 'truncated before')");
    client.batch_execute(&truncate).expect("truncate");
}

/// Does so again and again, more often than a job takes, until this query says that one has ended.
#[track_caller]
fn truncate_until(client: &mut Client, name: &str, what: &str, query: &str) {
    let mut round = 0;
    wait::until(what, wait::LONG, || -> bool {
        round += 1;
        truncate(client, name, round);
        std::thread::sleep(Duration::from_millis(200));
        client.query_one(query, &[]).expect("jobs").get(0)
    });
}

#[test]
fn a_related_table_that_is_truncated_again_and_again_keeps_no_build_from_ending() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = server(&proxy);
    let mut client = server.create_database("app");
    let (name, documents) = table_with_kinds(&mut client);
    let attach = format!("attach('{name}', document => '{name}_document')");
    for (builds, call) in [(1, attach), (2, format!("reindex('{name}')"))] {
        proxy.set_for("_bulk", Fault::Delay(Duration::from_secs(1)));
        client.batch_execute(&format!("select es_sync.{call}")).expect("begin a build");
        // A load that has not begun by the first TRUNCATE is a reindex from then on.
        let ended =
            format!("select count(*) = {builds} from es_sync.job where kind in ('load', 'reindex') and state = 'done'");
        truncate_until(&mut client, &name, "the new index is live", &ended);
        assert!(is_stale(&mut client), "it has rows that were read too early");
        proxy.set(Fault::Pass);
        expect::settled(&mut client);
        expect::documents_equal(&mut client, &documents, &engine, &name);
        assert!(!is_stale(&mut client));
    }
    assert_eq!(engine.indexes_of(&name), [format!("{name}-2")], "no build began again with another index");
}

#[test]
fn a_related_table_that_is_truncated_again_and_again_keeps_no_comparison_from_ending() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = server(&proxy);
    let mut client = server.create_database("app");
    let (name, documents) = table_with_kinds(&mut client);
    client.batch_execute(&format!("select es_sync.attach('{name}', document => '{name}_document')")).expect("attach");
    expect::settled(&mut client);
    proxy.set_for("_mget", Fault::Delay(Duration::from_millis(300)));
    let ended = "select count(*) > 0 from es_sync.job where kind = 'verify' and state = 'done'";
    truncate_until(&mut client, &name, "a comparison has ended", ended);
    assert!(is_stale(&mut client), "it is followed by another one, for what was truncated since it began");
    proxy.set(Fault::Pass);
    expect::settled(&mut client);
    expect::documents_equal(&mut client, &documents, &engine, &name);
    assert!(!is_stale(&mut client));
}

#[test]
fn a_repair_that_is_cancelled_is_followed_by_none_and_leaves_its_index_stale() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = server(&proxy);
    let mut client = server.create_database("app");
    let (name, documents) = table_with_kinds(&mut client);
    client.batch_execute(&format!("select es_sync.attach('{name}', document => '{name}_document')")).expect("attach");
    expect::settled(&mut client);
    proxy.set_for("_mget", Fault::Hold);
    truncate(&mut client, &name, 1);
    wait::until("documents are compared", wait::SHORT, || !proxy.seen("_mget").is_empty());
    truncate(&mut client, &name, 2);
    wait::until("another comparison is to follow", wait::SHORT, || -> bool {
        let followed = "select count(*) > 0 from es_sync.job where kind = 'verify' and again = 'repair'";
        client.query_one(followed, &[]).expect("jobs").get(0)
    });
    client
        .batch_execute("select es_sync.cancel(id) from es_sync.jobs where kind = 'verify' and state = 'running'")
        .expect("cancel");
    proxy.set(Fault::Pass);
    let count = |client: &mut Client, state: &str| -> i64 {
        let query = format!("select count(*) from es_sync.job where kind = 'verify' and state = '{state}'");
        client.query_one(&query, &[]).expect("jobs").get(0)
    };
    assert_eq!(count(&mut client, "cancelled"), 1);
    assert_eq!(count(&mut client, "queued") + count(&mut client, "running"), 0);
    assert!(is_stale(&mut client));
    client.batch_execute(&format!("select es_sync.verify('{name}', repair => true)")).expect("verify");
    expect::settled(&mut client);
    expect::documents_equal(&mut client, &documents, &engine, &name);
}
