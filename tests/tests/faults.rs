//! What goes wrong, and what happens then.

use std::time::{Duration, Instant};

use pg_es_sync_tests::{Engine, Fault, Mode, Proxy, Server, expect, is_stale, unique, wait};
use postgres::Client;
use serde_json::json;

fn table(proxy_url: &str) -> (Server, Client, String) {
    table_with(proxy_url, "60s")
}

fn table_with(proxy_url: &str, request_timeout: &str) -> (Server, Client, String) {
    let server = Server::builder()
        .conf("es_sync.url", proxy_url)
        .conf("es_sync.retry_max_delay", "500ms")
        .conf("es_sync.request_timeout", request_timeout)
        .start();
    let mut client = server.create_database("app");
    let name = unique("faulty");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text, n int);
             insert into {name} select i, 'thing ' || i, i from generate_series(1, 1000) i;
             select es_sync.attach('{name}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    (server, client, name)
}

#[test]
fn writers_notice_nothing_while_the_engine_is_down_and_nothing_is_lost() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client, name) = table(proxy.url());
    proxy.set(Fault::Refuse);
    for i in 0..50 {
        client
            .batch_execute(&format!(
                "update {name} set title = 'down {i}' where id % 50 = {i}; delete from {name} where id = {i}"
            ))
            .expect("a writer sees no error");
    }
    wait::until("the status says why", wait::SHORT, || -> bool {
        client
            .query_one("select state = 'waiting' and cause is not null from es_sync.status", &[])
            .expect("status")
            .get(0)
    });
    proxy.set(Fault::Pass);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    let state: String = client.query_one("select state from es_sync.status", &[]).expect("status").get(0);
    assert_eq!(state, "ok");
}

#[test]
fn a_row_whose_reading_does_not_end_is_parked_and_holds_nothing_up_for_long() {
    let engine = Engine::elasticsearch();
    let server = Server::builder().conf("es_sync.url", engine.url()).conf("es_sync.read_timeout", "1s").start();
    let mut client = server.create_database("app");
    let (slow, other) = (unique("slow"), unique("other"));
    client
        .batch_execute(&format!(
            "create table {other} (id int primary key);
             select es_sync.attach('{other}');
             create table {slow} (id int primary key, title text);
             insert into {slow} select i, 'thing' from generate_series(1, 100) i;
             select es_sync.attach('{slow}', filter => 'id <> 7 or pg_sleep(3600) is null')"
        ))
        .expect("set up");
    let parked = |client: &mut Client| -> Vec<(String, String)> {
        let letters =
            client.query("select key, kind from es_sync.dead_letters order by key", &[]).expect("dead letters");
        letters.iter().map(|letter| (letter.get(0), letter.get(1))).collect()
    };
    let held = vec![("7".to_owned(), "57014".to_owned())];
    wait::until_equal("the load parks the row", wait::LONG, held.clone(), || parked(&mut client));
    wait::until("the load ends", wait::LONG, || engine.exists(&slow) && engine.documents(&slow).len() == 99);
    client.batch_execute(&format!("update {slow} set title = 'new'; insert into {other} values (1)")).expect("write");
    wait::until("the other table's row arrives", wait::SHORT, || {
        engine.refresh(&other);
        engine.documents(&other).len() == 1
    });
    wait::until("so do the others of its own", wait::LONG, || {
        engine.refresh(&slow);
        engine.documents(&slow).values().filter(|document| document["title"] == "new").count() == 99
    });
    assert_eq!(parked(&mut client), held);
    client.batch_execute(&format!("select es_sync.detach('{slow}')")).expect("it can be detached");
}

#[test]
fn many_rows_whose_reading_does_not_end_keep_the_worker_from_nothing_else() {
    let engine = Engine::elasticsearch();
    let server = Server::builder().conf("es_sync.url", engine.url()).conf("es_sync.read_timeout", "1s").start();
    let mut client = server.create_database("app");
    let name = unique("slow");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, slow boolean);
             insert into {name} select i, false from generate_series(1, 100) i;
             select es_sync.attach('{name}', filter => 'not slow or pg_sleep(3600) is null')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    client.batch_execute(&format!("update {name} set slow = true")).expect("write");
    wait::until("what is parked is written down while others are still tried", wait::SHORT, || -> bool {
        client.query_one("select count(*) between 1 and 50 from es_sync.dead_letters", &[]).expect("letters").get(0)
    });
    client.batch_execute(&format!("select es_sync.detach('{name}')")).expect("it can be detached");
    let other = unique("other");
    client
        .batch_execute(&format!("create table {other} (id int primary key); select es_sync.attach('{other}')"))
        .expect("and another attached");
    client.batch_execute(&format!("insert into {other} values (1)")).expect("write");
    expect::table_equal(&mut client, &other, "id", &engine, &other);
}

#[test]
fn resets_lost_answers_and_refusals_for_now_end_in_equality() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client, name) = table(proxy.url());
    let write = |client: &mut Client, round: usize| {
        client
            .batch_execute(&format!(
                "update {name} set title = 'round {round}' where id % 10 = {round}; delete from {name} where id = 100 + {round}"
            ))
            .expect("write");
    };
    for (round, fault) in [Fault::Reset, Fault::ResetAfterRequest, Fault::LoseAnswer].into_iter().enumerate() {
        proxy.set_for("_bulk", fault);
        proxy.forget_seen();
        write(&mut client, round);
        wait::until("a request met the fault", wait::SHORT, || !proxy.seen("_bulk").is_empty());
        proxy.set(Fault::Pass);
        expect::table_equal(&mut client, &name, "id", &engine, &name);
    }
    for (round, (status, body)) in
        [(429, "{}"), (503, "{}"), (413, ""), (401, "{}"), (400, "<html>The SSL certificate error"), (200, "no JSON")]
            .into_iter()
            .enumerate()
    {
        // As often as halving would take to come to a single document.
        proxy.answer("_bulk", if status == 400 { 10 } else { 2 }, status, body);
        write(&mut client, 3 + round);
        wait::until("the answers were given", wait::SHORT, || proxy.answers_left() == 0);
        expect::table_equal(&mut client, &name, "id", &engine, &name);
    }
    let letters: i64 = client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("letters").get(0);
    assert_eq!(letters, 0);
}

#[test]
fn a_row_that_cannot_be_read_behind_many_that_the_filter_leaves_out_keeps_no_load_from_ending() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = unique("sparse");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, kept bool, divisor int);
             insert into {name} select i, false, 1 from generate_series(1, 50000) i;
             insert into {name} values (50001, true, 0), (50002, true, 1);
             insert into {name} values (0, true, 0);
             select es_sync.attach('{name}', filter => 'kept and 1 / divisor > 0')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    let kept = format!("select id, row_to_json(t) from {name} t where id = 50002");
    expect::documents_equal(&mut client, &kept, &engine, &name);
    let letters = "select string_agg(key || ' ' || kind, ', ' order by key) from es_sync.dead_letters";
    let letters: Option<String> = client.query_one(letters, &[]).expect("letters").get(0);
    assert_eq!(letters.as_deref(), Some("0 22012, 50001 22012"));
}

#[test]
fn a_filter_that_leaves_out_rows_for_longer_than_a_read_may_take_keeps_them_all_in_the_load() {
    let engine = Engine::elasticsearch();
    let server = Server::builder().conf("es_sync.url", engine.url()).conf("es_sync.read_timeout", "500ms").start();
    let mut client = server.create_database("app");
    let name = unique("slow");
    client
        .batch_execute(&format!(
            "create function kept(int) returns bool language plpgsql as 'begin perform pg_sleep(0.002); return $1 > 990; end';
             create table {name} (id int primary key, title text);
             insert into {name} select i, 'title ' || i from generate_series(1, 1000) i;
             select es_sync.attach('{name}', filter => 'public.kept(id)')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    let kept = format!("select id, row_to_json(t) from {name} t where id > 990");
    expect::documents_equal(&mut client, &kept, &engine, &name);
    let by_the_way: i64 = client.query_one("select deleted from es_sync.status", &[]).expect("status").get(0);
    assert_eq!(by_the_way, 0, "no row was taken for one that cannot be read");
    client.batch_execute(&format!("select es_sync.verify('{name}')")).expect("verify");
    expect::settled(&mut client);
    let counts = "select missing + different + orphaned from es_sync.jobs where kind = 'verify'";
    let counts: i64 = client.query_one(counts, &[]).expect("jobs").get(0);
    assert_eq!(counts, 0);
}

#[test]
fn a_poison_document_is_parked_with_the_reason_and_the_others_flow() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        let name = unique("poison");
        client
            .batch_execute(&format!(
                "create table {name} (id int primary key, title text, span int4range, ratio int);
                 insert into {name} select i, 't', null, 1 from generate_series(1, 500) i;
                 select es_sync.attach('{name}', filter => '10 / ratio > 0',
                     options => '{{\"mappings\": {{\"properties\": {{\"title\": {{\"type\": \"integer\"}}}}}}}}')"
            ))
            .expect("set up");
        // Every title "t" is refused by the overriding mapping; numbers are taken.
        wait::until("the load has ended", wait::LONG, || -> bool {
            client.query_one("select state = 'done' from es_sync.jobs", &[]).expect("jobs").get(0)
        });
        let parked: i64 = client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("letters").get(0);
        assert_eq!(parked, 500);
        client.batch_execute(&format!("update {name} set title = id::text where id <> 7")).expect("mend");
        expect::settled(&mut client);
        let row = client.query_one("select key, kind, reason from es_sync.dead_letters", &[]).expect("one is left");
        assert_eq!(row.get::<_, String>(0), "7");
        assert!(row.get::<_, String>(2).contains("title"), "{}", row.get::<_, String>(2));
        let all_but =
            |missing: &str| format!("select id, row_to_json(t) from {name} t where id::text <> all (array[{missing}])");
        expect::documents_equal(&mut client, &all_but("'7'"), &engine, &name);

        // A row that Postgres itself cannot evaluate stands in nobody's way either.
        client
            .batch_execute(&format!(
                "update {name} set ratio = 0 where id = 8; update {name} set ratio = 2 where id = 9"
            ))
            .expect("write");
        wait::until("the row that cannot be read is parked", wait::SHORT, || -> bool {
            client
                .query_one("select exists (select from es_sync.dead_letters where key = '8' and kind = '22012')", &[])
                .expect("letters")
                .get(0)
        });
        expect::settled(&mut client);
        // Its document stays as it was.
        let before =
            "select id, row_to_json(t) from (select id, title, span, case id when 8 then 1 else ratio end as ratio";
        let before = format!("{before} from {name} where id <> 7) t");
        expect::documents_equal(&mut client, &before, &engine, &name);
        client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
        expect::settled(&mut client);
        // A rebuild parks it too, and ends.
        expect::documents_equal(&mut client, &all_but("'7', '8'"), &engine, &name);
    }
}

#[test]
fn an_index_deleted_by_hand_is_built_anew() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(engine.url());
    let concrete = engine.indexes_of(&name).remove(0);
    engine.delete(&format!("/{concrete}"));
    client
        .batch_execute(&format!("delete from {name} where id = 1; update {name} set n = 0 where id = 2"))
        .expect("write");
    wait::until("the index is there again and equal", wait::LONG, || {
        if !engine.exists(&name) {
            return Err("no index".to_owned());
        }
        expect::compare(&mut client, &format!("select id, row_to_json(t) from {name} t"), &engine, &name)
    });
    assert!(!engine.exists(&concrete), "a delete did not bring the old one back");
}

#[test]
fn a_document_edited_by_hand_gets_its_next_change_all_the_same() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(engine.url());
    let concrete = engine.indexes_of(&name).remove(0);
    for _ in 0..3 {
        engine.put(&format!("/{concrete}/_doc/5"), serde_json::json!({"id": 5, "title": "by hand"}));
    }
    client.batch_execute(&format!("update {name} set title = 'by Postgres' where id = 5")).expect("update");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn a_killed_worker_or_a_crashed_server_ends_in_equality() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (mut server, mut client, name) = table(proxy.url());
    for mode in [None, Some(Mode::Fast), Some(Mode::Immediate), Some(Mode::Kill)] {
        proxy.set_for("_bulk", Fault::Blackhole);
        proxy.forget_seen();
        client
            .batch_execute(&format!(
                "insert into {name} select 10000 + (random() * 1e6)::int, 'new' from generate_series(1, 10) on conflict do nothing;
                 delete from {name} where id in (select id from {name} order by id limit 20);
                 update {name} set title = 'changed ' || random() where id % 3 = 0"
            ))
            .expect("write");
        wait::until("a request is in flight", wait::SHORT, || !proxy.seen("_bulk").is_empty());
        let queued: i64 = client.query_one("select count(*) from es_sync.queue", &[]).expect("queue").get(0);
        assert!(queued > 0, "the queue is not empty");
        match mode {
            None => drop(server.kill_worker("app")),
            Some(mode) => server.restart(mode),
        }
        proxy.set(Fault::Pass);
        client = wait::until("a worker runs again", wait::LONG, || {
            let mut client = server.try_connect("postgres", "app").map_err(|error| error.to_string())?;
            let row =
                client.query_one("select worker_pid from es_sync.status", &[]).map_err(|error| error.to_string())?;
            row.get::<_, Option<i32>>(0).map(|_| client).ok_or("no worker".to_owned())
        });
        expect::table_equal(&mut client, &name, "id", &engine, &name);
    }
}

#[test]
fn a_load_goes_on_after_the_worker_was_stopped() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::with_url(proxy.url());
    let mut client = server.create_database("app");
    let name = unique("resumed");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} select i, repeat('x', 500) from generate_series(1, 60000) i"
        ))
        .expect("set up");
    client.batch_execute(&format!("select es_sync.attach('{name}')")).expect("attach");
    wait::until("the load is half way", wait::LONG, || -> bool {
        client
            .query_one("select coalesce(max(done), 0) between 1 and 50000 from es_sync.jobs", &[])
            .expect("jobs")
            .get(0)
    });
    let pid: i32 = client.query_one("select worker_pid from es_sync.status", &[]).expect("status").get(0);
    client.execute("select pg_terminate_backend($1)", &[&pid]).expect("terminate");
    client
        .batch_execute(&format!(
            "update {name} set title = 'changed' where id % 100 = 0; delete from {name} where id <= 10"
        ))
        .expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(engine.indexes_of(&name), [format!("{name}-1")], "it went on with the same index");
}

#[test]
fn a_request_that_takes_long_holds_up_no_other_page_of_a_load() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::builder().conf("es_sync.url", proxy.url()).conf("es_sync.bulk_bytes", "256kB").start();
    let mut client = server.create_database("app");
    let name = unique("slow");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} select i, case i when 1 then 'the slow one' else repeat('x', 300) end
               from generate_series(1, 9000) i"
        ))
        .expect("set up");
    proxy.set_where("_bulk", "the slow one", Fault::Hold);
    client.batch_execute(&format!("select es_sync.attach('{name}')")).expect("attach");
    let index = format!("{name}-1");
    wait::until("all pages but the first have arrived", wait::SHORT, || {
        engine.exists(&index) && engine.count(&index) > 8000
    });
    assert!(engine.source(&index, "1").is_none(), "the first page waits");
    proxy.set(Fault::Pass);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

/// A request of `count` rows of the table in flight that is going to fail; then the breaker opens.
fn fail_with_rows_on_their_way(proxy: &Proxy, client: &mut Client, name: &str, count: usize) {
    proxy.forget_seen();
    proxy.set_for("_bulk", Fault::Blackhole);
    client
        .batch_execute(&format!("insert into {name} select 10000 + i, 'new', i from generate_series(1, {count}) i"))
        .expect("write");
    wait::until("a request is in flight", wait::SHORT, || !proxy.seen("_bulk").is_empty());
}

#[test]
fn a_probe_for_a_table_that_is_gone_does_not_hold_up_the_others() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client, name) = table(proxy.url());
    let gone = unique("gone");
    client
        .batch_execute(&format!(
            "create table {gone} (id int primary key, title text, n int); select es_sync.attach('{gone}')"
        ))
        .expect("attach");
    expect::settled(&mut client);
    fail_with_rows_on_their_way(&proxy, &mut client, &gone, 10);
    proxy.set(Fault::Refuse);
    wait::until("the breaker is open", wait::SHORT, || -> bool {
        client.query_one("select bool_and(state = 'waiting') from es_sync.status", &[]).expect("status").get(0)
    });
    // The next probe finds nothing but documents of the dropped table.
    client.batch_execute(&format!("drop table {gone}")).expect("drop");
    proxy.set(Fault::Pass);
    client.batch_execute(&format!("update {name} set title = 'kept'")).expect("write");
    let start = Instant::now();
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert!(start.elapsed() < wait::SHORT, "{:?}", start.elapsed());
}

#[test]
fn a_probe_that_is_refused_shows_that_the_engine_is_back() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client, name) = table(proxy.url());
    fail_with_rows_on_their_way(&proxy, &mut client, &name, 10);
    proxy.answer("_bulk", 1, 400, r#"{"error":{"type":"illegal_argument_exception","reason":"not this one"}}"#);
    proxy.set(Fault::Pass);
    let start = Instant::now();
    expect::settled(&mut client);
    assert!(start.elapsed() < wait::SHORT, "{:?}", start.elapsed());
    assert_eq!(proxy.answers_left(), 0, "the probe was refused");
    let parked: Vec<String> = client
        .query("select key from es_sync.dead_letters where reason like '%not this one%'", &[])
        .expect("dead letters")
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(parked.len(), 1, "it stood alone, so it was to blame: {parked:?}");
    client.batch_execute(&format!("update {name} set title = 'again' where id = {}", parked[0])).expect("mend");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

fn one_more(client: &mut Client) -> String {
    let name = unique("beside");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} select i, 'thing ' || i from generate_series(1, 10) i;
             select es_sync.attach('{name}')"
        ))
        .expect("set up");
    expect::settled(client);
    name
}

#[test]
fn a_swap_that_cannot_be_noted_at_once_leaves_nothing_behind() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (server, mut client, name) = table(proxy.url());
    proxy.set_for("_settings", Fault::Delay(Duration::from_secs(2)));
    proxy.forget_seen();
    client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
    wait::until("the settings are given back", wait::SHORT, || !proxy.seen("_settings").is_empty());
    // A user's transaction holds the row that is to name the new index.
    let mut held = server.connect("app");
    held.batch_execute(&format!("begin; select es_sync.pause('{name}')")).expect("hold");
    // Once before it swaps, once after, and each time that it could not be noted.
    let looked = || proxy.seen(&format!("/_alias/{name}")).len() > 3;
    wait::until("the swap could not be noted, and is asked for again", wait::SHORT, looked);
    proxy.set(Fault::Pass);
    drop(held);
    expect::settled(&mut client);
    client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
    expect::settled(&mut client);
    client.batch_execute(&format!("update {name} set title = 'later'")).expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn the_queue_changes_its_durability_although_an_index_takes_nothing() {
    let engine = Engine::elasticsearch();
    let (server, mut client, whole) = table(engine.url());
    let broken = one_more(&mut client);
    let index = engine.indexes_of(&broken).remove(0);
    engine.put(&format!("/{index}/_settings"), json!({"index.blocks.write": true}));
    client.batch_execute(&format!("update {broken} set title = 'held up'")).expect("write");
    wait::until("it is held up", wait::SHORT, || -> bool {
        let state = format!("select cause is not null from es_sync.status where index = '{broken}'");
        client.query_one(&state, &[]).expect("status").get(0)
    });
    server.conf("es_sync.queue_durability", "logged");
    server.reload();
    expect::logged_queue(&mut client);
    client.batch_execute(&format!("update {whole} set title = 'flows'")).expect("write");
    let flows: bool = client.query_one(&format!("select es_sync.wait('{whole}', '20 s')"), &[]).expect("wait").get(0);
    assert!(flows);
    engine.put(&format!("/{index}/_settings"), json!({"index.blocks.write": null}));
    for name in [broken, whole] {
        expect::table_equal(&mut client, &name, "id", &engine, &name);
    }
}

#[test]
fn an_index_without_its_shard_stops_no_other() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let (_server, mut client, whole) = table(engine.url());
        let broken = unique("broken");
        let create = format!(
            r#"create table {broken} (id int primary key, title text);
               select es_sync.attach('{broken}', options =>
                   '{{"settings": {{"routing.allocation.require._name": "nowhere"}}}}')"#
        );
        client.batch_execute(&create).expect("set up");
        wait::until("its load waits for the shard", wait::SHORT, || -> bool {
            let waits = "select coalesce(bool_or(error like '%shard%'), false) from es_sync.jobs";
            client.query_one(waits, &[]).expect("jobs").get(0)
        });
        // Each in a request of its own: more than there are connections.
        for round in 1..=6 {
            let write = format!("insert into {broken} values ({round}); update {whole} set n = {round}");
            client.batch_execute(&write).expect("write");
            let flows = format!("select es_sync.wait('{whole}', '10 s')");
            let flows: bool = client.query_one(&flows, &[]).expect("wait").get(0);
            assert!(flows, "round {round}: {:?}", engine.product());
        }
        let cause = format!("select cause from es_sync.status where index = '{broken}'");
        wait::until("the status says why", wait::SHORT, || -> bool {
            let cause: Option<String> = client.query_one(&cause, &[]).expect("status").get(0);
            cause.is_some_and(|cause| cause.contains("shard"))
        });
        let index =
            engine.get("/_alias").as_object().expect("aliases").keys().find(|name| name.starts_with(&broken)).cloned();
        let settings = format!("/{}/_settings", index.expect("the new index"));
        engine.put(&settings, json!({"index.routing.allocation.require._name": null}));
        for name in [broken, whole] {
            expect::table_equal(&mut client, &name, "id", &engine, &name);
        }
        let letters: i64 = client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("letters").get(0);
        assert_eq!(letters, 0);
    }
}

#[test]
fn a_reindex_replaces_an_index_that_takes_nothing() {
    for (engine, rows) in [(Engine::elasticsearch(), 20_000_u64), (Engine::opensearch(), 10)] {
        let (server, mut client, name) = table(engine.url());
        let index = engine.indexes_of(&name).remove(0);
        engine.put(&format!("/{index}/_settings"), json!({"index.blocks.write": true}));
        let write = format!("insert into {name} select i, 'new', i from generate_series(2000, 1999 + {rows}) i");
        client.batch_execute(&write).expect("write");
        wait::until("it takes nothing", wait::SHORT, || -> bool {
            client.query_one("select cause is not null from es_sync.status", &[]).expect("status").get(0)
        });
        std::thread::scope(|scope| {
            let mut waiting = server.connect("app");
            let (engine, name) = (&engine, &name);
            let found = scope.spawn(move || {
                let wait = format!("select es_sync.wait('{name}', '60 s')");
                let answered: bool = waiting.query_one(&wait, &[]).expect("wait").get(0);
                answered.then(|| engine.count(name))
            });
            client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
            client.batch_execute(&format!("update {name} set title = 'during' where id % 7 = 0")).expect("write");
            assert_eq!(found.join().expect("who waits"), Some(1_000 + rows), "what is there when he is answered");
        });
        expect::table_equal(&mut client, &name, "id", &engine, &name);
        assert!(!engine.indexes_of(&name).contains(&index));
        let job = "select state, error from es_sync.jobs order by id desc limit 1";
        let job = client.query_one(job, &[]).expect("jobs");
        assert_eq!((job.get(0), job.get::<_, Option<String>>(1)), ("done".to_owned(), None));
    }
}

#[test]
fn an_index_that_a_cancelled_reindex_has_left_behind_is_stale_until_it_is_mended() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(engine.url());
    let second = unique("second");
    client.batch_execute(&format!("select es_sync.attach('{name}', index => '{second}')")).expect("attach");
    expect::settled(&mut client);
    // What waits for the second keeps the reindex from its end.
    let both = [&name, &second].map(|index| engine.indexes_of(index).remove(0));
    let block = |is: serde_json::Value| {
        both.iter()
            .for_each(|index| drop(engine.put(&format!("/{index}/_settings"), json!({"index.blocks.write": is}))));
    };
    block(true.into());
    client.batch_execute(&format!("update {name} set title = 'new'")).expect("write");
    client.batch_execute(&format!("select es_sync.reindex('{name}', index => '{name}')")).expect("reindex");
    let stale = format!("select stale from es_sync.status where index = '{name}'");
    let why: String = wait::until("it is left behind", wait::SHORT, || {
        client.query_one(&stale, &[]).expect("status").get::<_, Option<String>>(0)
    });
    assert!(why.contains("took no changes"), "{why}");
    client.batch_execute("select es_sync.cancel(max(id)) from es_sync.jobs").expect("cancel");
    block(serde_json::Value::Null);
    client.batch_execute(&format!("update {name} set n = -n where id = 1")).expect("write");
    let searchable = format!("select es_sync.wait('{name}', '2 s')");
    let searchable: bool = client.query_one(&searchable, &[]).expect("wait").get(0);
    assert!(!searchable, "nobody is told that it is equal");
    client.batch_execute(&format!("select es_sync.verify('{name}', '{name}', repair => true)")).expect("verify");
    for index in [&name, &second] {
        expect::table_equal(&mut client, &name, "id", &engine, index);
    }
    assert_eq!(engine.indexes_of(&name), both[..1]);
}

#[test]
fn a_comparison_of_an_index_that_is_left_behind_waits_and_then_mends_it() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(engine.url());
    let index = engine.indexes_of(&name).remove(0);
    // Neither to be written to nor to be removed: the swap is refused, and may be cancelled.
    engine.put(&format!("/{index}/_settings"), json!({"index.blocks.read_only": true}));
    client.batch_execute(&format!("update {name} set title = 'new'")).expect("write");
    client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
    wait::until("the swap is refused", wait::SHORT, || -> bool {
        let refused =
            "select coalesce(phase = 'swap' and error is not null, false) from es_sync.jobs where kind = 'reindex'";
        client.query_one(refused, &[]).expect("jobs").get(0)
    });
    client.batch_execute(&format!("select es_sync.verify('{name}', repair => true)")).expect("verify");
    // Nobody notes this for the old index.
    client.batch_execute(&format!("update {name} set n = -n where id = 1")).expect("write");
    wait::until("it has been delivered", wait::SHORT, || -> bool {
        client.query_one("select not exists (select from es_sync.queue)", &[]).expect("queue").get(0)
    });
    assert!(is_stale(&mut client), "the comparison waits");
    client.batch_execute("select es_sync.cancel(id) from es_sync.jobs where kind = 'reindex'").expect("cancel");
    engine.put(&format!("/{index}/_settings"), json!({"index.blocks.read_only": null}));
    // Mended, or swapped after all: a call that was under way may have been let through.
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    let stale: Option<String> = client.query_one("select stale from es_sync.status", &[]).expect("status").get(0);
    assert_eq!(stale, None);
}

#[test]
fn a_reindex_says_which_other_index_of_its_table_it_waits_for() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(engine.url());
    let second = unique("second");
    client.batch_execute(&format!("select es_sync.attach('{name}', index => '{second}')")).expect("attach");
    expect::settled(&mut client);
    let index = engine.indexes_of(&second).remove(0);
    engine.put(&format!("/{index}/_settings"), json!({"index.blocks.write": true}));
    client.batch_execute(&format!("update {name} set title = 'new'")).expect("write");
    client.batch_execute(&format!("select es_sync.reindex('{name}', index => '{name}')")).expect("reindex");
    let job = "select error from es_sync.jobs where kind = 'reindex'";
    let error: String = wait::until("it says what it waits for", wait::SHORT, || {
        client.query_one(job, &[]).expect("jobs").get::<_, Option<String>>(0)
    });
    assert!(error.contains(&second) && error.contains("es_sync.pause"), "{error}");
    client.batch_execute(&format!("select es_sync.pause('{name}', '{second}')")).expect("pause");
    wait::until("it goes on", wait::SHORT, || -> bool {
        client
            .query_one("select state = 'done' and error is null from es_sync.jobs where kind = 'reindex'", &[])
            .expect("jobs")
            .get(0)
    });
    engine.put(&format!("/{index}/_settings"), json!({"index.blocks.write": null}));
    client.batch_execute(&format!("select es_sync.resume('{name}', '{second}')")).expect("resume");
    for index in [&name, &second] {
        expect::table_equal(&mut client, &name, "id", &engine, index);
    }
}

#[test]
fn an_index_that_takes_no_alias_stops_no_other() {
    let ways = [
        (Engine::elasticsearch(), "read_only"),
        // As the engine does it where a disk is full; it takes the block away by itself some time later.
        (Engine::elasticsearch(), "read_only_allow_delete"),
        (Engine::opensearch(), "read_only_allow_delete"),
    ];
    for (engine, block) in ways {
        let (server, mut client, whole) = table(engine.url());
        let broken = one_more(&mut client);
        let index = engine.indexes_of(&broken).remove(0);
        let block = format!("index.blocks.{block}");
        engine.put(&format!("/{index}/_settings"), json!({&block: true}));
        let generation = |client: &mut Client| -> i64 {
            client.query_one("select generation from es_sync.lease", &[]).expect("lease").get(0)
        };
        let before = generation(&mut client);
        server.conf("es_sync.request_timeout", "17s");
        server.reload();
        wait::until("the lease was taken anew", wait::SHORT, || generation(&mut client) > before);
        client
            .batch_execute(&format!("update {whole} set title = 'flows'; update {broken} set title = 'waits'"))
            .expect("write");
        let flows = format!("select es_sync.wait('{whole}', '10 s')");
        let flows: bool = client.query_one(&flows, &[]).expect("wait").get(0);
        assert!(flows, "the other index goes on, {block}");
        client.batch_execute(&format!("select es_sync.reindex('{broken}')")).expect("reindex");
        wait::until("its reindex says what it waits for", wait::SHORT, || -> bool {
            let job = "select error is not null or state = 'done' from es_sync.jobs order by id desc limit 1";
            client.query_one(job, &[]).expect("jobs").get(0)
        });
        // Elasticsearch lets an index go that has no room.
        if engine.indexes_of(&broken).contains(&index) {
            engine.put(&format!("/{index}/_settings"), json!({&block: null}));
        }
        for name in [broken, whole] {
            expect::table_equal(&mut client, &name, "id", &engine, &name);
        }
    }
}

#[test]
fn a_document_with_the_highest_version_there_is_becomes_a_dead_letter() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, _) = table(engine.url());
    let name = one_more(&mut client);
    let index = engine.indexes_of(&name).remove(0);
    engine.put(
        &format!("/{index}/_doc/1?version=9223372036854775807&version_type=external"),
        json!({"id": 1, "title": "by hand"}),
    );
    client.batch_execute(&format!("update {name} set title = 'later'")).expect("write");
    expect::settled(&mut client);
    let letters: i64 = client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("letters").get(0);
    assert_eq!(letters, 1);
    let later = engine.documents(&name).values().filter(|document| document["title"] == "later").count();
    assert_eq!(later, 9, "the others go on");
}

#[test]
fn an_index_whose_requests_hang_stops_no_other() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client, name) = table_with(proxy.url(), "6s");
    let silent = one_more(&mut client);
    proxy.set_for(&format!("/{silent}"), Fault::Blackhole);
    let start = Instant::now();
    // It may take all connections until the first of its requests has timed out, and then one at a time.
    for turn in 1.. {
        let change = format!("insert into {silent} values (1000 + {turn}); update {name} set n = {turn}");
        client.batch_execute(&change).expect("write");
        let patience = if start.elapsed() < Duration::from_secs(7) { "10 s" } else { "3 s" };
        let wait = format!("select es_sync.wait('{name}', '{patience}')");
        assert!(client.query_one(&wait, &[]).expect("wait").get::<_, bool>(0), "turn {turn}, {:?}", start.elapsed());
        if start.elapsed() > Duration::from_secs(25) {
            break;
        }
    }
    proxy.set(Fault::Pass);
    for name in [&silent, &name] {
        expect::table_equal(&mut client, name, "id", &engine, name);
    }
}

#[test]
fn an_index_whose_requests_get_no_answer_stops_no_other() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client, name) = table(proxy.url());
    let silent = one_more(&mut client);
    for (fault, round) in [(Fault::Reset, 1), (Fault::LoseAnswer, 2)] {
        proxy.forget_seen();
        proxy.set_for(&format!("/{silent}"), fault);
        client.batch_execute(&format!("update {silent} set title = 'round {round}'")).expect("write");
        wait::until("a request met the fault", wait::SHORT, || !proxy.seen(&format!("/{silent}")).is_empty());
        // Again and again: each that goes unanswered in between holds the others back for a moment only.
        for turn in 1..=5 {
            client.batch_execute(&format!("update {name} set n = {round} * 10 + {turn}")).expect("write");
            let flows: bool =
                client.query_one(&format!("select es_sync.wait('{name}', '10 s')"), &[]).expect("wait").get(0);
            assert!(flows, "round {round}, turn {turn}");
        }
        proxy.set(Fault::Pass);
        for name in [&silent, &name] {
            expect::table_equal(&mut client, name, "id", &engine, name);
        }
    }
}

/// The indexes that a table's builds have left in the engine, whatever is behind its alias.
fn built_for(engine: &Engine, name: &str) -> Vec<String> {
    engine.get(&format!("/{name}-*")).as_object().expect("indexes").keys().cloned().collect()
}

#[test]
fn of_indexes_whose_creation_is_not_answered_none_stays_behind() {
    const CREATION: &str = "wait_for_active_shards";
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let proxy = Proxy::to(engine.url());
        let (_server, mut client, name) = table(proxy.url());
        let second = unique("unanswered");
        for (index, begin) in [
            (&name, format!("select es_sync.reindex('{name}')")),
            (&second, format!("select es_sync.attach('{name}', index => '{second}')")),
        ] {
            proxy.forget_seen();
            proxy.set_for(CREATION, Fault::LoseAnswer);
            client.batch_execute(&begin).expect("begin a build");
            wait::until("several were created", wait::LONG, || proxy.seen(CREATION).len() > 3);
            let live = engine.indexes_of(index).len();
            let built = built_for(&engine, index);
            assert!(built.len() <= live + 1, "each is dropped before the next: {built:?}");
            // What comes meanwhile is in the next one.
            client.batch_execute(&format!("update {name} set n = -n where id % 10 = 0")).expect("write");
            proxy.set(Fault::Pass);
            expect::table_equal(&mut client, &name, "id", &engine, index);
            assert_eq!(built_for(&engine, index), engine.indexes_of(index), "{:?}", engine.product());
        }
        assert_eq!(engine.indexes_of(&name).len(), 1);
    }
}

#[test]
fn a_name_that_is_somebody_elses_is_passed_over_and_spared() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let (_server, mut client, name) = table(engine.url());
        let live = engine.indexes_of(&name).remove(0);
        let number: u32 = live.rsplit('-').next().and_then(|number| number.parse().ok()).expect("a number");
        let [index, alias, next] = [1, 2, 3].map(|more| format!("{name}-{}", number + more));
        // The next numbers: an index, and an alias of two.
        engine.put(&format!("/{index}/_doc/1?refresh=true"), json!({"whose": "somebody's"}));
        let others = ["a", "b"].map(|other| format!("{name}.{other}"));
        for other in &others {
            engine.put(&format!("/{other}"), json!({"aliases": {&alias: {}}}));
        }
        client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
        expect::table_equal(&mut client, &name, "id", &engine, &name);
        assert_eq!(engine.indexes_of(&name), [next]);
        assert_eq!(engine.count(&index), 1);
        assert_eq!(engine.indexes_of(&alias), others);
    }
}

#[test]
fn an_index_that_cannot_be_written_to_any_more_is_dropped_before_another_is_built() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client, name) = table(proxy.url());
    proxy.set_for("_bulk", Fault::Hold);
    proxy.forget_seen();
    client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
    wait::until("it is being filled", wait::SHORT, || !proxy.seen("_bulk").is_empty());
    let built = built_for(&engine, &name);
    let half = built.iter().find(|index| !engine.indexes_of(&name).contains(index)).expect("the new index");
    // It stays, but for its write alias.
    engine.delete(&format!("/{half}/_alias/{half}.write-*"));
    proxy.set(Fault::Pass);
    client.batch_execute(&format!("delete from {name} where id % 10 = 0")).expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(built_for(&engine, &name), engine.indexes_of(&name));
    assert!(!engine.exists(half));
}
