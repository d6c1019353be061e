//! The worker's life: where it runs, where not, and what ends it.

use pg_es_sync_tests::{Engine, Mode, Server, expect, unique, wait};

#[test]
fn a_worker_runs_where_the_extension_is_and_nowhere_else() {
    let engine = Engine::elasticsearch();
    let mut server = Server::with(&engine);
    server.create_empty_database("without");
    let mut one = server.create_database("one");
    server.create_database("two");
    let databases = |server: &Server| {
        let mut databases: Vec<String> = server.workers().into_iter().map(|(_, _, database)| database).collect();
        databases.retain(|database| !database.is_empty());
        databases.sort();
        databases
    };
    wait::until_equal("each has its worker", wait::SHORT, vec!["one".to_owned(), "two".to_owned()], || {
        databases(&server)
    });
    one.batch_execute("drop extension pg_es_sync").expect("drop");
    wait::until_equal("the worker ends with its extension", wait::SHORT, vec!["two".to_owned()], || databases(&server));
    server.kill_worker("two");
    wait::until("the server has recovered and the extension can be created again", wait::LONG, || {
        server.try_connect("postgres", "one")?.batch_execute("create extension pg_es_sync")
    });
    wait::until_equal("both are back", wait::LONG, vec!["one".to_owned(), "two".to_owned()], || databases(&server));
    server.restart(Mode::Fast);
    wait::until_equal("and after a restart", wait::LONG, vec!["one".to_owned(), "two".to_owned()], || {
        databases(&server)
    });
}

#[test]
fn dropping_table_or_extension_needs_no_cascade_and_leaves_writers_alone() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let (kept, dropped) = (unique("kept"), unique("dropped"));
    client
        .batch_execute(&format!(
            "create table {kept} (id int primary key); create table {dropped} (id int primary key);
             select es_sync.attach('{kept}'), es_sync.attach('{dropped}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    client
        .batch_execute(&format!(
            "insert into {dropped} values (1); drop table {dropped}; insert into {kept} values (1)"
        ))
        .expect("drop");
    expect::table_equal(&mut client, &kept, "id", &engine, &kept);
    wait::until("the dropped table's attachment is gone", wait::SHORT, || -> bool {
        client.query_one("select count(*) = 1 from es_sync.status", &[]).expect("status").get(0)
    });
    client.batch_execute(&format!("drop extension pg_es_sync; insert into {kept} values (2)")).expect("drop extension");
    let triggers: i64 =
        client.query_one("select count(*) from pg_trigger where tgname like 'es_sync%'", &[]).expect("triggers").get(0);
    assert_eq!(triggers, 0);
}

#[test]
fn detach_leaves_no_trigger_and_a_rolled_back_attach_leaves_nothing() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = unique("detached");
    let traces = "select (select count(*) from pg_trigger where tgname like 'es_sync%')
                      + (select count(*) from es_sync.status) + (select count(*) from es_sync.jobs where state = 'queued')";
    client.batch_execute(&format!("create table {name} (id int primary key)")).expect("create");
    client.batch_execute(&format!("begin; select es_sync.attach('{name}'); rollback")).expect("roll back");
    assert_eq!(client.query_one(traces, &[]).expect("traces").get::<_, i64>(0), 0);
    client.batch_execute(&format!("select es_sync.attach('{name}')")).expect("attach");
    expect::settled(&mut client);
    client.batch_execute(&format!("select es_sync.detach('{name}'); insert into {name} values (1)")).expect("detach");
    assert_eq!(client.query_one(traces, &[]).expect("traces").get::<_, i64>(0), 0);
    assert!(engine.exists(&name), "without drop_index the index stays");
}

#[test]
fn detach_by_a_session_that_acts_as_a_replica_leaves_nothing() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = unique("detached");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, divisor int); insert into {name} values (1, 0), (2, 1);
             create view {name}_document as select id, 1 / divisor as inverse from {name};
             select es_sync.attach('{name}', document => '{name}_document')"
        ))
        .expect("attach");
    expect::settled(&mut client);
    let traces = "select array[(select count(*) from es_sync.attachment), (select count(*) from es_sync.definition),
        (select count(*) from es_sync.way), (select count(*) from es_sync.job where kind <> 'drop'),
        (select count(*) from es_sync.dead_letter)]";
    assert_eq!(client.query_one(traces, &[]).expect("traces").get::<_, Vec<i64>>(0), [1, 1, 1, 1, 1]);
    client
        .batch_execute(&format!(
            "set session_replication_role = replica; select es_sync.detach('{name}', drop_index => true)"
        ))
        .expect("detach");
    assert_eq!(client.query_one(traces, &[]).expect("traces").get::<_, Vec<i64>>(0), [0; 5]);
    let role: String = client.query_one("show session_replication_role", &[]).expect("role").get(0);
    assert_eq!(role, "replica");
}

#[test]
fn without_preload_create_extension_says_what_to_do() {
    let server = Server::builder().without_preload().start();
    let mut client = server.create_empty_database("app");
    let error = client.batch_execute("create extension pg_es_sync").expect_err("refused");
    let error = error.as_db_error().expect("an error of the server");
    assert_eq!(error.code().code(), "55000");
    assert!(error.hint().is_some_and(|hint| hint.contains("shared_preload_libraries")), "{error:?}");
}

#[test]
fn attach_names_who_holds_the_table_and_gives_up_in_time() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let mut other = server.connect("app");
    client
        .batch_execute("create table locked (id int primary key); set es_sync.lock_timeout = '200ms'")
        .expect("set up");
    other.batch_execute("begin; insert into locked values (1)").expect("hold");
    let pid: i32 = other.query_one("select pg_backend_pid()", &[]).expect("pid").get(0);
    let error = client.batch_execute("select es_sync.attach('locked')").expect_err("refused");
    let error = error.as_db_error().expect("an error of the server");
    assert_eq!(error.code().code(), "55P03");
    assert!(error.hint().is_some_and(|hint| hint.contains(&pid.to_string())), "{error:?}");
}

#[test]
fn what_looks_at_a_locked_table_gives_up_in_time() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let mut other = server.connect("app");
    client
        .batch_execute(
            "create table item (id int primary key, n int);
             create table locked (id int primary key);
             create view shown as select i.id, (select count(*) from locked l where l.id = i.n) from item i;
             set es_sync.lock_timeout = '200ms'",
        )
        .expect("set up");
    other.batch_execute("begin; lock table locked").expect("hold");
    for call in [
        "attach('locked')",
        "mapping('locked')",
        "attach('item', document => 'shown')",
        "relate('locked', 'item', 'x')",
    ] {
        let error = client.batch_execute(&format!("select es_sync.{call}")).expect_err("refused");
        let error = error.as_db_error().expect("an error of the server");
        assert_eq!(error.code().code(), "55P03", "{call}: {error:?}");
        assert!(error.hint().is_some_and(|hint| hint.contains("es_sync.lock_timeout")), "{call}: {error:?}");
    }
}

#[test]
fn a_busy_server_stops_within_seconds() {
    let engine = Engine::elasticsearch();
    let proxy = pg_es_sync_tests::Proxy::to(engine.url());
    let mut server = Server::with_url(proxy.url());
    let mut client = server.create_database("app");
    let name = unique("stopped");
    client
        .batch_execute(&format!("create table {name} (id int primary key); select es_sync.attach('{name}')"))
        .expect("set up");
    expect::settled(&mut client);
    proxy.set(pg_es_sync_tests::Fault::Blackhole);
    client.batch_execute(&format!("insert into {name} select generate_series(1, 1000)")).expect("write");
    wait::until("a request is in flight", wait::SHORT, || !proxy.seen("_bulk").is_empty());
    let start = std::time::Instant::now();
    server.stop(Mode::Fast);
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(!server.log().contains("terminated by signal"), "nothing crashed");
}
