//! The harness itself, without the extension.

use pg_es_sync_tests::engine::Product;
use pg_es_sync_tests::{Engine, Fault, Mode, Proxy, Server, expect, unique, wait};
use serde_json::json;
use std::time::{Duration, Instant};

#[test]
fn a_server_starts_crashes_restarts_and_is_copied() {
    let mut server = Server::builder().without_preload().start();
    let mut client = server.create_empty_database("shop");
    client.batch_execute("create table goods (id int primary key); insert into goods values (1)").expect("set up");
    server.conf("work_mem", "7MB");
    server.reload();
    assert_eq!(server.connect("shop").query_one("show work_mem", &[]).expect("show").get::<_, String>(0), "7MB");
    for mode in [Mode::Fast, Mode::Immediate, Mode::Kill] {
        server.restart(mode);
    }
    let count = |server: &Server| -> i64 {
        server.connect("shop").query_one("select count(*) from goods", &[]).expect("count").get(0)
    };
    assert_eq!(count(&server), 1);

    let standby = server.copy(true);
    server.connect("shop").batch_execute("insert into goods values (2)").expect("insert");
    wait::until_equal("the standby follows", wait::SHORT, 2, || count(&standby));
    standby.promote();
    standby.connect("shop").batch_execute("insert into goods values (3)").expect("a promoted standby takes writes");
    server.stop(Mode::Fast);
    assert_eq!(count(&server.copy_of_files()), 2);
}

#[test]
fn documents_are_compared_with_what_sql_says() {
    let server = Server::builder().without_preload().start();
    let mut client = server.connect("postgres");
    let rows = "select i, json_build_object('number', i, 'none', null) from generate_series(1, 12000) i";
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let index = unique("harness");
        let mut body = String::new();
        for i in 1..=12000 {
            body += &format!("{{\"index\":{{\"_id\":\"{i}\"}}}}\n{{\"number\":{i}}}\n");
        }
        let sent = ureq::post(format!("{}/{index}/_bulk", engine.url()))
            .header("content-type", "application/x-ndjson")
            .send(body);
        sent.expect("_bulk");
        expect::documents_equal(&mut client, rows, &engine, &index);
        assert_eq!(engine.count(&index), 12000);
        assert_eq!(engine.search_ids(&index, json!({"term": {"number": 77}})), ["77"]);

        engine.put(&format!("/{index}/_doc/5"), json!({"number": 6}));
        engine.delete(&format!("/{index}/_doc/6"));
        engine.put(&format!("/{index}/_doc/x"), json!({}));
        let difference = expect::compare(&mut client, rows, &engine, &index).expect_err("it differs");
        assert!(difference.contains("1 missing, 1 different, 1 that should not be there"), "{difference}");
        engine.delete(&format!("/{index}"));
        assert!(!engine.exists(&index));
    }
}

#[test]
fn the_proxy_injects_each_fault() {
    let engine = Engine::elasticsearch();
    let index = unique("proxied");
    let proxy = Proxy::to(engine.url());
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(3)))
        .build()
        .into();
    let put = |id: u32| {
        let url = format!("{}/{index}/_doc/{id}", proxy.url());
        agent.put(&url).send_json(json!({"id": id})).map(|answer| answer.status().as_u16())
    };
    let there = |id: u32| engine.request("GET", &format!("/{index}/_doc/{id}"), None).0 == 200;

    assert_eq!(put(1).expect("it passes"), 201);
    proxy.answer("_doc", 2, 429, "{}");
    assert_eq!((put(1).expect("stub"), put(1).expect("stub"), put(1).expect("engine")), (429, 429, 200));

    proxy.set(Fault::Refuse);
    wait::until("the port is closed", wait::SHORT, || std::net::TcpStream::connect(&proxy.url()[7..]).is_err());
    assert!(put(2).is_err());
    proxy.set(Fault::Pass);
    wait::until("the port is open again", wait::SHORT, || put(3).is_ok());

    proxy.set(Fault::Reset);
    assert!(put(4).is_err() && !there(4));
    proxy.set(Fault::ResetAfterRequest);
    assert!(put(5).is_err());
    wait::until("the engine carried it out", wait::SHORT, || there(5));
    proxy.set(Fault::LoseAnswer);
    assert!(put(6).is_err() && there(6));
    proxy.set(Fault::Blackhole);
    let start = Instant::now();
    assert!(put(7).is_err() && !there(7));
    assert!(start.elapsed() >= Duration::from_secs(3));
    proxy.set(Fault::Delay(Duration::from_secs(4)));
    assert!(put(8).is_err() && !there(8));
    wait::until("the late request arrives", wait::SHORT, || there(8));
    proxy.set_for("_bulk", Fault::Reset);
    assert_eq!(put(9).expect("other paths pass"), 201);
    let seen = proxy.seen("_doc/9");
    assert_eq!(seen.len(), 1);
    assert!(seen[0].method == "PUT" && seen[0].body.contains("\"id\""), "{seen:?}");
}

#[test]
fn a_private_engine_keeps_its_documents_over_a_stop() {
    let mut engine = Engine::private(Product::OpenSearch);
    engine.put("/kept/_doc/1?refresh=true", json!({"a": 1}));
    engine.stop("KILL");
    engine.start();
    wait::until("the index is there again", wait::LONG, || {
        engine.request("GET", "/kept/_count", None).1["count"] == json!(1)
    });
}

#[test]
#[should_panic(expected = "until the sky falls; last seen: \"still up\"")]
fn a_wait_in_vain_names_what_was_awaited() {
    wait::until("the sky falls", Duration::from_millis(50), || Err::<(), _>("still up"));
}
