//! Who may write: one database at a time, whatever copies of it there are.

use pg_es_sync_tests::{Engine, Fault, Mode, Proxy, Server, expect, unique, wait};
use postgres::Client;
use serde_json::json;

fn server(url: &str) -> Server {
    Server::builder().conf("es_sync.url", url).conf("es_sync.lease_timeout", "2s").start()
}

fn attached(server: &Server, engine: &Engine) -> (Client, String) {
    let mut client = server.create_database("app");
    let name = unique("leased");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} select i, 'thing ' || i from generate_series(1, 200) i;
             select es_sync.attach('{name}')"
        ))
        .expect("set up");
    expect::table_equal(&mut client, &name, "id", engine, &name);
    (client, name)
}

fn says(client: &mut Client, words: &str) {
    wait::until(&format!("the status says \"{words}\""), wait::LONG, || {
        let cause: Option<String> =
            client.query_one("select cause from es_sync.status", &[]).map_err(|error| error.to_string())?.get(0);
        let cause = cause.unwrap_or_default();
        if cause.contains(words) { Ok(()) } else { Err(cause) }
    });
}

fn repaired(client: &mut Client) {
    let ended = "select exists (select from es_sync.job where kind = 'verify' and state = 'done')";
    wait::until("a repair has ended", wait::LONG, || -> bool { client.query_one(ended, &[]).expect("jobs").get(0) });
}

#[test]
fn a_physical_copy_stays_off_while_the_original_lives_and_says_so() {
    let engine = Engine::elasticsearch();
    let mut original = server(engine.url());
    let (mut client, name) = attached(&original, &engine);

    let mut copy = original.copy(false);
    let mut there = copy.connect("app");
    says(&mut there, "holds the lease and is alive");
    there
        .batch_execute(&format!("insert into {name} select i, 'copy' from generate_series(1001, 1100) i"))
        .expect("write");
    client.batch_execute(&format!("update {name} set title = 'original' where id % 2 = 0")).expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    wait::until("the copy keeps no queue", wait::SHORT, || -> bool {
        there.query_one("select count(*) = 0 from es_sync.queue", &[]).expect("queue").get(0)
    });

    // It remembers, although nobody is there any more.
    original.stop(Mode::Fast);
    copy.restart(Mode::Fast);
    let mut there = copy.connect("app");
    says(&mut there, "holds the lease and is alive");

    // Until an administrator decides.
    there.batch_execute("select es_sync.take_over()").expect("take over");
    wait::until("the copy writes", wait::LONG, || -> bool {
        there.query_one("select state = 'ok' from es_sync.status", &[]).expect("status").get(0)
    });
    expect::table_equal(&mut there, &name, "id", &engine, &name);
    original.start();
    let mut client = original.connect("app");
    says(&mut client, "holds the lease and is alive");
    client.batch_execute(&format!("delete from {name}")).expect("write");
    there.batch_execute(&format!("delete from {name} where id < 10")).expect("write");
    expect::table_equal(&mut there, &name, "id", &engine, &name);
}

#[test]
fn a_copy_made_as_a_template_stays_off_while_the_original_lives_and_says_so() {
    let engine = Engine::opensearch();
    let server = server(engine.url());
    let (client, name) = attached(&server, &engine);
    drop(client);
    server.connect("postgres").batch_execute("create database copy template app").expect("copy");
    let mut there = server.connect("copy");
    says(&mut there, "is a copy of another one of its server");
    there.batch_execute(&format!("delete from {name}")).expect("write");
    let mut client = server.connect("app");
    client.batch_execute(&format!("update {name} set title = 'original' where id % 2 = 0")).expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn a_promoted_standby_takes_over_and_the_old_primary_is_fenced_off() {
    let engine = Engine::elasticsearch();
    let mut primary = server(engine.url());
    let (mut client, name) = attached(&primary, &engine);
    let standby = primary.copy(true);
    client.batch_execute(&format!("update {name} set title = 'late' where id < 20")).expect("write");
    expect::settled(&mut client);
    standby.catch_up_with(&mut client);
    primary.stop(Mode::Kill);
    // What the standby never got: its repair must take it back out of the index.
    engine.put(&format!("/{}/_doc/777777", engine.indexes_of(&name)[0]), json!({"id": 777777}));
    standby.promote();
    let mut there = standby.connect("app");
    there.batch_execute(&format!("delete from {name} where id between 50 and 60")).expect("write");
    wait::until("the standby writes", wait::LONG, || -> bool {
        there.query_one("select state = 'ok' from es_sync.status", &[]).expect("status").get(0)
    });
    expect::table_equal(&mut there, &name, "id", &engine, &name);
    let mended: i64 = there
        .query_one("select sum(orphaned)::bigint from es_sync.job where kind = 'verify'", &[])
        .expect("jobs")
        .get(0);
    assert_eq!(mended, 1, "one document was mended");

    primary.start();
    let mut client = primary.connect("app");
    says(&mut client, "holds the lease and is alive");
    client.batch_execute(&format!("delete from {name}")).expect("write");
    expect::table_equal(&mut there, &name, "id", &engine, &name);
}

#[test]
fn a_worker_that_finds_a_later_generation_stops_and_says_so() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let (mut client, name) = attached(&server, &engine);
    let token: String = client.query_one("select token::text from es_sync.installation", &[]).expect("token").get(0);
    let path = format!("/pg_es_sync-lease/_doc/{token}");
    let lease = |generation: i64| json!({"generation": generation, "holder": "somebody", "address": "elsewhere", "beats": 1, "version": 0, "released": false});
    engine.put(&path, lease(10_000_000));
    says(&mut client, "elsewhere has taken the lease over");
    client.batch_execute(&format!("delete from {name}; insert into {name} values (5, 'five')")).expect("write");
    assert_eq!(engine.documents(&name).len(), 200);
    client.batch_execute("select es_sync.take_over()").expect("take over");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn an_engine_that_was_set_back_is_noticed_and_repaired() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = server(proxy.url());
    let (mut client, name) = attached(&server, &engine);
    let token: String = client.query_one("select token::text from es_sync.installation", &[]).expect("token").get(0);
    let index = engine.indexes_of(&name).remove(0);
    let path = format!("/pg_es_sync-lease/_doc/{token}");
    // The lease forgotten, and documents of another time in the index.
    proxy.set(Fault::Refuse);
    engine.delete(&format!("/{index}/_doc/3"));
    engine.put(&format!("/{index}/_doc/4"), json!({"id": 4, "title": "of another time"}));
    engine.put(&format!("/{index}/_doc/5000"), json!({"id": 5000}));
    engine.delete(&path);
    proxy.set(Fault::Pass);
    repaired(&mut client);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    let row = client
        .query_one("select missing, different, orphaned from es_sync.job where kind = 'verify'", &[])
        .expect("job");
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i64>(2)), (1, 1, 1));
}

#[test]
fn an_index_replaced_by_hand_is_noticed_and_repaired() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = server(proxy.url());
    let (mut client, name) = attached(&server, &engine);
    let index = engine.indexes_of(&name).remove(0);
    proxy.set(Fault::Refuse);
    client.batch_execute(&format!("update {name} set title = 'new' where id = 7")).expect("write");
    wait::until("the outage was noticed", wait::LONG, || -> bool {
        client.query_one("select state = 'waiting' from es_sync.status", &[]).expect("status").get(0)
    });
    let token: String = client.query_one("select token::text from es_sync.installation", &[]).expect("token").get(0);
    engine.delete(&format!("/{index}"));
    let mut aliases = serde_json::Map::new();
    aliases.insert(name.clone(), json!({}));
    engine.put(
        &format!("/{index}"),
        json!({"aliases": aliases, "mappings": {"_meta": {"pg_es_sync": {"installation": token, "index": name}}}}),
    );
    engine.put(&format!("/{index}/_doc/9999"), json!({"id": 9999}));
    proxy.set(Fault::Pass);
    repaired(&mut client);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn a_write_alias_lost_by_hand_is_set_again() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let (mut client, name) = attached(&server, &engine);
    let index = engine.indexes_of(&name).remove(0);
    engine.delete(&format!("/{index}/_alias/{index}.write-*"));
    client
        .batch_execute(&format!("update {name} set title = 'new' where id = 7; delete from {name} where id = 8"))
        .expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(engine.indexes_of(&name), [index], "nothing was built anew");
}

#[test]
fn a_write_alias_that_a_restored_index_has_too_is_taken_from_it() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = server(engine.url());
        let (mut client, name) = attached(&server, &engine);
        let index = engine.indexes_of(&name).remove(0);
        let (beside, about) = (format!("restored-{index}"), engine.get(&format!("/{index}")));
        engine.put(&format!("/{beside}"), json!({"aliases": about[&index]["aliases"]}));
        client
            .batch_execute(&format!("update {name} set title = 'new' where id = 7; delete from {name} where id = 8"))
            .expect("write");
        expect::table_equal(&mut client, &name, "id", &engine, &index);
        let letters: i64 = client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("letters").get(0);
        assert_eq!(letters, 0);
        assert_eq!(engine.indexes_of(&format!("{index}.write-*")), [&*index]);
        assert_eq!(engine.indexes_of(&name).len(), 2, "the other alias is left alone");
        assert_eq!(engine.count(&beside), 0);
        let log = server.unexpected_log_lines(&[]);
        assert!(log.len() == 1 && log[0].contains(&format!("stood for {beside} as well")), "{log:?}");
    }
}

/// A user's transaction holds the table's row in es_sync.attachment until it is dropped.
fn holding(server: &Server, name: &str) -> Client {
    let mut session = server.connect("app");
    session.batch_execute(&format!("begin; select es_sync.pause('{name}')")).expect("hold");
    session
}

fn worker_was_held_up(server: &Server) {
    wait::until("the worker met the lock", wait::SHORT, || server.log().contains("could not go on for the moment"));
}

#[test]
fn a_lease_that_cannot_be_written_down_at_once_is_not_forgotten() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let (mut client, name) = attached(&server, &engine);
    let token: String = client.query_one("select token::text from es_sync.installation", &[]).expect("token").get(0);
    let index = engine.indexes_of(&name).remove(0);
    let held = holding(&server, &name);
    // The engine is set back.
    engine.delete(&format!("/{index}/_doc/5"));
    engine.delete(&format!("/pg_es_sync-lease/_doc/{token}"));
    worker_was_held_up(&server);
    drop(held);
    wait::until("a repair was asked for", wait::SHORT, || -> bool {
        client.query_one("select count(*) > 0 from es_sync.job where kind = 'verify'", &[]).expect("jobs").get(0)
    });
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn a_missing_index_that_cannot_be_noted_at_once_is_built_all_the_same() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let (mut client, name) = attached(&server, &engine);
    let index = engine.indexes_of(&name).remove(0);
    let held = holding(&server, &name);
    engine.delete(&format!("/{index}"));
    server.conf("es_sync.request_timeout", "17s");
    server.reload();
    worker_was_held_up(&server);
    drop(held);
    client.batch_execute(&format!("insert into {name} values (1000, 'later')")).expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}
