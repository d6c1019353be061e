//! What the engine may answer, and what becomes of the documents then.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use pg_es_sync_tests::{Engine, Fault, Proxy, Server, expect, process, unique, wait};
use postgres::Client;

struct Set {
    engine: Engine,
    proxy: Proxy,
    server: Server,
    client: Client,
    name: String,
}

fn set_up(rows: usize) -> Set {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::builder()
        .conf("es_sync.url", proxy.url())
        .conf("es_sync.retry_max_delay", "300ms")
        .conf("es_sync.max_attempts", "4")
        .start();
    let mut client = server.create_database("app");
    let name = unique("answered");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text, n int);
             insert into {name} select i, 'thing ' || i, i from generate_series(1, {rows}) i;
             select es_sync.attach('{name}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    Set { engine, proxy, server, client, name }
}

fn letters(client: &mut Client) -> Vec<(String, String)> {
    let rows = client.query("select key, kind from es_sync.dead_letters order by key", &[]).expect("dead letters");
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[test]
fn an_item_refused_for_now_is_read_again_and_sent_as_it_is_by_then() {
    for status in [429, 503] {
        let Set { engine, proxy, mut client, name, server: _server } = set_up(10);
        // Held back, so that the row can change between the refusal and the next attempt.
        let body = format!(
            r#"{{"errors":true,"items":[{{"index":{{"status":{status},"error":{{"type":"es_rejected_execution_exception","reason":"full"}}}}}}]}}"#
        );
        proxy.answer("_bulk", 2, 200, &body);
        client.batch_execute(&format!("update {name} set title = 'first' where id = 5")).expect("write");
        wait::until("it was refused", wait::SHORT, || proxy.answers_left() < 2);
        client.batch_execute(&format!("update {name} set title = 'second' where id = 5")).expect("write");
        expect::table_equal(&mut client, &name, "id", &engine, &name);
        assert_eq!(letters(&mut client), []);
    }
}

#[test]
fn a_request_that_is_too_large_is_sent_in_smaller_ones() {
    let Set { engine, proxy, mut client, name, server: _server } = set_up(10);
    let largest = Arc::new(AtomicUsize::new(0));
    let seen = largest.clone();
    proxy.judge(move |head, body| {
        if !head.contains("_bulk") {
            return None;
        }
        if body.len() > 100_000 {
            return Some((413, String::new()));
        }
        seen.fetch_max(body.len(), Ordering::Relaxed);
        None
    });
    client
        .batch_execute(&format!("insert into {name} select i, repeat('x', 200), i from generate_series(11, 5000) i"))
        .expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert!(largest.load(Ordering::Relaxed) > 10_000, "not one by one either");
    assert_eq!(letters(&mut client), []);
}

#[test]
fn a_request_that_takes_too_long_is_sent_in_smaller_ones() {
    let Set { engine, proxy, mut client, name, server: _server } = set_up(400);
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = requests.clone();
    proxy.judge(move |head, body| {
        if !head.contains("_bulk") {
            return None;
        }
        counted.fetch_add(1, Ordering::Relaxed);
        (body.lines().count() > 2 * 30).then(|| (504, r#"{"error":"too slow for so many"}"#.to_owned()))
    });
    client.batch_execute(&format!("update {name} set n = -n")).expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(letters(&mut client), []);
    let requests = requests.load(Ordering::Relaxed);
    assert!(requests < 100, "not one document after the other: {requests}");
}

#[test]
fn a_document_larger_than_the_engine_takes_is_parked_alone() {
    let Set { engine, proxy, mut client, name, server: _server } = set_up(10);
    proxy.judge(|head, body| (head.contains("_bulk") && body.len() > 200_000).then(|| (413, String::new())));
    client
        .batch_execute(&format!("update {name} set n = -1; update {name} set title = repeat('x', 300000) where id = 5"))
        .expect("write");
    expect::settled(&mut client);
    assert_eq!(letters(&mut client), [("5".to_owned(), "too_large".to_owned())]);
    let rows = format!(
        "select id, row_to_json(t) from {name} t where id <> 5 union all select 5, row_to_json(o) from (select 5 as id, 'thing 5' as title, 5 as n) o"
    );
    expect::documents_equal(&mut client, &rows, &engine, &name);
    // A version that fits clears it.
    client.batch_execute(&format!("update {name} set title = 'fits' where id = 5")).expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(letters(&mut client), []);
}

#[test]
fn a_request_refused_as_a_whole_is_halved_until_the_bad_document_stands_alone() {
    let Set { engine, proxy, mut client, name, server: _server } = set_up(10);
    let requests = Arc::new(AtomicUsize::new(0));
    let refused = requests.clone();
    proxy.judge(move |head, body| {
        (head.contains("_bulk") && body.contains("poison")).then(|| {
            refused.fetch_add(1, Ordering::Relaxed);
            (
                400,
                r#"{"error":{"type":"illegal_argument_exception","reason":"malformed action"},"status":400}"#
                    .to_owned(),
            )
        })
    });
    client
        .batch_execute(&format!(
            "insert into {name} select i, case when i = 700 then 'poison' else 'good' end, i from generate_series(11, 1010) i"
        ))
        .expect("write");
    expect::settled(&mut client);
    assert_eq!(letters(&mut client), [("700".to_owned(), "bad_request".to_owned())]);
    let refused = requests.load(Ordering::Relaxed);
    assert!((2..40).contains(&refused), "halved, not tried one by one: {refused}");
    let rows = format!("select id, row_to_json(t) from {name} t where id <> 700");
    expect::documents_equal(&mut client, &rows, &engine, &name);
    client.batch_execute(&format!("update {name} set title = 'good' where id = 700")).expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(letters(&mut client), []);
}

#[test]
fn a_document_that_fails_max_attempts_times_while_others_are_taken_is_parked() {
    let Set { engine, proxy, mut client, name, server: _server } = set_up(50);
    proxy.spoil("cursed", 503);
    client
        .batch_execute(&format!("update {name} set title = case when id = 9 then 'cursed' else 'fine' end"))
        .expect("write");
    // Attempts count only in requests that take other documents.
    wait::until("it is parked", wait::LONG, || {
        client.batch_execute(&format!("update {name} set n = n + 1 where id <> 9")).expect("write");
        let letters = letters(&mut client);
        if letters == [("9".to_owned(), "max_attempts".to_owned())] { Ok(()) } else { Err(letters) }
    });
    let attempts: i32 = client.query_one("select attempts from es_sync.dead_letters", &[]).expect("letter").get(0);
    assert_eq!(attempts, 4);
    proxy.spoil("", 0);
    client.batch_execute("select es_sync.retry_dead_letters()").expect("retry");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(letters(&mut client), []);
}

#[test]
fn a_document_that_the_engine_has_no_room_for_is_never_parked() {
    let Set { engine, proxy, mut client, name, server: _server } = set_up(50);
    proxy.spoil("unlucky", 429);
    client
        .batch_execute(&format!("update {name} set title = case when id = 9 then 'unlucky' else 'fine' end"))
        .expect("write");
    // More than the attempts that a document's own failures may have.
    wait::until("it was refused many times", wait::LONG, || {
        client.batch_execute(&format!("update {name} set n = n + 1 where id <> 9")).expect("write");
        assert_eq!(letters(&mut client), []);
        proxy.seen("_bulk").iter().filter(|seen| seen.body.contains("unlucky")).count() > 12
    });
    proxy.spoil("", 0);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(letters(&mut client), []);
}

#[test]
fn while_the_engine_is_away_it_is_sent_no_more_than_single_documents() {
    let Set { engine, proxy, mut client, name, server: _server } = set_up(1000);
    proxy.set_for("", Fault::Reset);
    client.batch_execute(&format!("update {name} set n = -n")).expect("write");
    wait::until("the breaker is open", wait::SHORT, || -> bool {
        client.query_one("select es_sync.health()->>'breaker' <> 'closed'", &[]).expect("health").get(0)
    });
    proxy.forget_seen();
    wait::until("it was probed", wait::SHORT, || proxy.seen("").len() >= 5);
    for probe in proxy.seen("_bulk") {
        assert_eq!(probe.body.lines().count(), 2, "one document: {}", probe.body);
    }
    proxy.set(Fault::Pass);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn too_many_requests_make_bodies_smaller_and_success_lets_them_grow_again() {
    let Set { engine, proxy, mut client, name, server: _server } = set_up(10);
    let sizes = Arc::new(Mutex::new(Vec::new()));
    let (noted, refusals) = (sizes.clone(), AtomicUsize::new(0));
    proxy.judge(move |head, body| {
        if !head.contains("_bulk") {
            return None;
        }
        if refusals.fetch_add(1, Ordering::Relaxed) < 5 {
            let reason = r#"{"error":{"type":"es_rejected_execution_exception","reason":"full"},"status":429}"#;
            return Some((429, reason.to_owned()));
        }
        noted.lock().expect("sizes").push(body.len());
        None
    });
    client
        .batch_execute(&format!("insert into {name} select i, repeat('x', 500), i from generate_series(11, 30000) i"))
        .expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    let sizes = sizes.lock().expect("sizes");
    let early = sizes.iter().take(4).max().copied().unwrap_or_default();
    let late = sizes.iter().skip(4).max().copied().unwrap_or_default();
    assert!(late > early * 2, "{early} at first, {late} later: {sizes:?}");
    assert_eq!(letters(&mut client), []);
}

#[test]
fn credentials_changed_on_disk_are_read_again_when_the_engine_refuses_the_old_ones() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let folder = process::server_folder("secret");
    let file = folder.path().join("api_key");
    std::fs::write(&file, "old-key\n").expect("key file");
    let accepted = Arc::new(Mutex::new("apikey old-key".to_owned()));
    let key = accepted.clone();
    proxy.judge(move |head, _| {
        let wanted = format!("authorization: {}\r\n", key.lock().expect("key"));
        let reason = r#"{"error":{"type":"security_exception","reason":"unable to authenticate"},"status":401}"#;
        (!head.contains(&wanted)).then(|| (401, reason.to_owned()))
    });
    let server = Server::builder()
        .conf("es_sync.url", proxy.url())
        .conf("es_sync.api_key_file", file.display())
        .conf("es_sync.retry_max_delay", "300ms")
        .start();
    let mut client = server.create_database("app");
    let name = unique("keyed");
    client
        .batch_execute(&format!("create table {name} (id int primary key); select es_sync.attach('{name}')"))
        .expect("set up");
    expect::settled(&mut client);
    *accepted.lock().expect("key") = "apikey new-key".to_owned();
    client.batch_execute(&format!("insert into {name} select generate_series(1, 100)")).expect("write");
    wait::until("the refusal is shown", wait::SHORT, || -> bool {
        let text: String = client.query_one("select es_sync.health()::text", &[]).expect("health").get(0);
        assert!(!text.contains("old-key"), "no credential is shown: {text}");
        text.contains("unable to authenticate")
    });
    std::fs::write(&file, "new-key\n").expect("key file");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert!(!server.log().contains("-key"), "no credential in the log");
}
