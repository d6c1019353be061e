//! What is noted of a transaction, where it is kept until its end, and that nothing else arrives. Which statements are
//! captured is in statements.rs.

use std::time::Duration;

use pg_es_sync_tests::{Engine, Fault, Mode, Proxy, Server, expect, unique, wait};
use postgres::Client;

/// A server, a database, an attached and loaded table of 10 rows.
fn table(engine: &Engine) -> (Server, Client, String) {
    table_behind(engine.url())
}

fn table_behind(url: &str) -> (Server, Client, String) {
    let server = Server::with_url(url);
    let mut client = server.create_database("app");
    let name = attached(&mut client);
    (server, client, name)
}

fn attached(client: &mut Client) -> String {
    let name = unique("goods");
    client
        .batch_execute(&format!(
            "set timezone = 'UTC';
             create table {name} (id bigint primary key, title text, price numeric, at timestamptz default now());
             insert into {name} select i, 'thing ' || i, i / 7.0 from generate_series(1, 10) i;
             select es_sync.attach('{name}')"
        ))
        .expect("set up");
    expect::settled(client);
    name
}

fn equal(client: &mut Client, engine: &Engine, name: &str) {
    expect::table_equal(client, name, "id", engine, name);
}

#[test]
fn a_writer_s_lock_timeout_does_not_fail_his_commit_while_the_queue_is_locked() {
    let engine = Engine::elasticsearch();
    let (server, mut client, name) = table(&engine);
    let lock = "begin; lock table es_sync.queue in access exclusive mode";
    let mut writer = server.connect("app");
    let write = format!("set lock_timeout = '50ms'; insert into {name} values (11, 'patient')");
    std::thread::scope(|scope| {
        let mut other = server.connect("app");
        other.batch_execute(lock).expect("lock");
        let written = scope.spawn(|| writer.batch_execute(&write));
        let waits = "select count(*) = 1 from pg_stat_activity
                     where wait_event_type = 'Lock' and query ~ 'patient' and pid <> pg_backend_pid()
                         and clock_timestamp() - query_start > '300 ms'";
        wait::until("he has waited for longer", wait::SHORT, || -> bool {
            written.is_finished() || client.query_one(waits, &[]).expect("activity").get::<_, bool>(0)
        });
        other.batch_execute("commit").expect("unlock");
        written.join().expect("the writer").expect("no error");
    });
    // Elsewhere it holds.
    let mut other = server.connect("app");
    other.batch_execute(lock).expect("lock");
    let error = writer.batch_execute(lock).expect_err("he does not wait");
    assert_eq!(error.code().map(|code| code.code()), Some("55P03"));
    other.batch_execute("commit").expect("unlock");
    equal(&mut client, &engine, &name);
}

#[test]
fn rolled_back_work_never_arrives() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(&engine);
    client
        .batch_execute(&format!(
            "begin; insert into {name} values (100, 'rolled back'); rollback;
             begin; insert into {name} values (101, 'kept');
                 savepoint a; insert into {name} values (102, 'rolled back'); rollback to a;
                 savepoint b; insert into {name} values (103, 'kept');
                     savepoint c; insert into {name} values (104, 'rolled back'); rollback to c;
                 release b;
             commit;
             begin; insert into {name} values (105, 'rolled back'); prepare transaction 'p1'"
        ))
        .expect("work");
    client.batch_execute("rollback prepared 'p1'").expect("roll back prepared");
    equal(&mut client, &engine, &name);
    // Not only absent, but never asked for: beside the first ten only 101 and 103 were.
    assert_eq!(indexed(&mut client), 10 + 2);
}

fn indexed(client: &mut Client) -> i64 {
    client.query_one("select (indexed + deleted)::int8 from es_sync.status", &[]).expect("status").get(0)
}

#[test]
fn a_spilled_savepoint_that_rolls_back_takes_only_its_own_keys() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(&engine);
    // 1 MB of keys at 16 bytes each spills at 65,536.
    client
        .batch_execute(&format!(
            "begin;
             insert into {name} select i, 'outer' from generate_series(1000, 1999) i;
             savepoint s;
             insert into {name} select i, 'inner' from generate_series(100000, 199999) i;
             rollback to s;
             insert into {name} select i, 'after' from generate_series(300000, 370000) i;
             commit"
        ))
        .expect("work");
    equal(&mut client, &engine, &name);
    let documents: i64 = client.query_one(&format!("select count(*) from {name}"), &[]).expect("count").get(0);
    assert_eq!(documents, 10 + 1000 + 70_001);
    assert_eq!(indexed(&mut client), documents, "no key of the savepoint was delivered");
}

#[test]
fn a_prepared_transaction_arrives_after_commit_prepared() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(&engine);
    client
        .batch_execute(&format!(
            "begin; update {name} set title = 'prepared' where id = 1; delete from {name} where id = 2;
             prepare transaction 'p2';
             insert into {name} values (200, 'unrelated')"
        ))
        .expect("prepare");
    expect::settled(&mut client);
    equal(&mut client, &engine, &name);
    client.batch_execute("commit prepared 'p2'").expect("commit prepared");
    equal(&mut client, &engine, &name);
}

#[test]
fn a_role_without_any_right_on_the_extension_may_write() {
    let engine = Engine::elasticsearch();
    let (server, mut client, name) = table(&engine);
    client
        .batch_execute(&format!("create role clerk login; grant select, insert, update, delete on {name} to clerk"))
        .expect("role");
    let mut clerk = server.connect_as("clerk", "app");
    clerk
        .batch_execute(&format!(
            "insert into {name} values (300, 'by a clerk'); update {name} set title = 'clerk' where id = 1;
             begin; delete from {name} where id = 2; prepare transaction 'p3'"
        ))
        .expect("a clerk writes");
    clerk.batch_execute("commit prepared 'p3'").expect("a clerk commits what was prepared");
    assert!(clerk.query("select * from es_sync.queue", &[]).is_err(), "and sees nothing of ours");
    equal(&mut client, &engine, &name);
}

#[test]
fn an_update_that_changes_nothing_enqueues_nothing() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(&engine);
    let before = indexed(&mut client);
    client
        .batch_execute(&format!("update {name} set title = title; update {name} set title = 'one' where id = 1"))
        .expect("update");
    equal(&mut client, &engine, &name);
    assert_eq!(indexed(&mut client), before + 1);
}

#[test]
fn partitions_are_followed_through_the_root_and_by_themselves() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = unique("parts");
    client
        .batch_execute(&format!(
            "set timezone = 'UTC';
             create table {name} (id int, region text, title text, primary key (region, id)) partition by list (region);
             create table {name}_a partition of {name} for values in ('a');
             create table {name}_b (title text, id int not null, region text not null);
             alter table {name} attach partition {name}_b for values in ('b');
             insert into {name} select i, case when i % 2 = 0 then 'a' else 'b' end, 'x' from generate_series(1, 100) i;
             select es_sync.attach('{name}');
             create table {name}_c partition of {name} for values in ('c')"
        ))
        .expect("set up");
    client
        .batch_execute(&format!(
            "insert into {name} values (1000, 'c', 'in a later partition');
             update {name} set title = 'through the root' where id <= 10;
             update {name}_b set title = 'by itself' where id = 21;
             update {name} set region = 'a' where id = 31;
             delete from {name}_a where id = 40"
        ))
        .expect("changes");
    expect::table_equal(&mut client, &name, "region || '|' || id", &engine, &name);
}

/// Why an index may differ from its table; None where nothing is known to.
fn stale(client: &mut Client) -> Option<String> {
    client.query_one("select stale from es_sync.attachment", &[]).expect("attachment").get(0)
}

#[test]
fn a_load_with_capture_off_ends_equal_and_is_stale_until_then() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client, name) = table_behind(proxy.url());
    assert_eq!(stale(&mut client), None);
    // What mends the table is held up, so that there is a time before it is mended.
    proxy.set(Fault::Blackhole);
    client
        .batch_execute(&format!(
            "set es_sync.capture = off;
             begin; insert into {name} select i, 'loaded' from generate_series(1001, 11000) i;
             update {name} set title = 'changed'; delete from {name} where id <= 3; commit"
        ))
        .expect("load");
    let keys = client.query_one("select coalesce(sum(count), 0)::int8 from es_sync.queue where keys is not null", &[]);
    assert_eq!(keys.expect("queue").get::<_, i64>(0), 0, "no key was noted");
    wait::until("the index is known to be stale", wait::SHORT, || stale(&mut client).is_some());
    proxy.set(Fault::Pass);
    client
        .batch_execute(&format!("set es_sync.capture = on; update {name} set title = 'noted' where id = 5"))
        .expect("update");
    equal(&mut client, &engine, &name);
    assert_eq!(stale(&mut client), None);
    let rows: i64 = client.query_one(&format!("select count(*) from {name}"), &[]).expect("count").get(0);
    assert_eq!(rows, 10_007);
}

#[test]
fn capture_off_follows_savepoints_and_prepared_transactions() {
    let engine = Engine::elasticsearch();
    let (mut server, mut client, name) = table(&engine);
    let jobs = |client: &mut Client| -> i64 {
        client.query_one("select count(*) from es_sync.jobs", &[]).expect("jobs").get(0)
    };
    let before = jobs(&mut client);
    client
        .batch_execute(&format!(
            "begin; savepoint s; set local es_sync.capture = off; update {name} set title = 'never';
             rollback to s; update {name} set title = 'noted' where id = 1; commit;
             begin; set local es_sync.capture = off; update {name} set title = 'never'; rollback"
        ))
        .expect("work");
    equal(&mut client, &engine, &name);
    assert_eq!(jobs(&mut client), before, "what was rolled back asks for nothing");
    client
        .batch_execute(&format!(
            "begin; savepoint s; set local es_sync.capture = off; update {name} set title = 'unnoted' where id = 2;
             release s; prepare transaction 'unnoted'"
        ))
        .expect("prepare");
    server.restart(Mode::Immediate);
    let mut client = server.connect("app");
    client.batch_execute("set timezone = 'UTC'").expect("set");
    equal(&mut client, &engine, &name);
    client.batch_execute("commit prepared 'unnoted'").expect("commit prepared");
    equal(&mut client, &engine, &name);
}

#[test]
fn changes_with_capture_off_during_a_first_load_are_in_it() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::with_url(proxy.url());
    let mut client = server.create_database("app");
    let name = unique("loading");
    // The page is read before the change and reaches the engine after it.
    proxy.set_for("_bulk", Fault::Delay(Duration::from_millis(1500)));
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} select i, 'old' from generate_series(1, 100) i; select es_sync.attach('{name}')"
        ))
        .expect("set up");
    wait::until("the page is on its way", wait::LONG, || !proxy.seen("_bulk").is_empty());
    client
        .batch_execute(&format!(
            "set es_sync.capture = off; update {name} set title = 'new' where id <= 50; delete from {name} where id > 90"
        ))
        .expect("change");
    proxy.set(Fault::Pass);
    equal(&mut client, &engine, &name);
}

#[test]
fn with_capture_off_truncate_and_sync_do_the_same_as_ever() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(&engine);
    let repairs = |client: &mut Client| -> i64 {
        client.query_one("select count(*) from es_sync.jobs where kind = 'verify'", &[]).expect("jobs").get(0)
    };
    let index = engine.indexes_of(&name).remove(0);
    client.batch_execute("set es_sync.capture = off").expect("set");
    for (function, id) in [
        (format!("es_sync.sync('{name}', 3)"), 3),
        (format!("es_sync.sync_where('{name}', 'id = 4')"), 4),
        (format!("es_sync.sync_full('{name}', 5)"), 5),
    ] {
        engine.delete(&format!("/{index}/_doc/{id}"));
        client.batch_execute(&format!("select {function}")).expect("sync");
        equal(&mut client, &engine, &name);
    }
    for statements in [
        format!("truncate {name}"),
        // What comes after it in the same transaction is not noted, and not needed either: the index is built anew.
        format!(
            "begin; truncate {name}; set local es_sync.capture = on; insert into {name} values (1, 'after'); commit"
        ),
    ] {
        client.batch_execute(&statements).expect("truncate");
        equal(&mut client, &engine, &name);
    }
    assert_eq!(repairs(&mut client), 0, "none of it asks for a repair");
    client.batch_execute(&format!("insert into {name} values (2, 'not noted')")).expect("insert");
    equal(&mut client, &engine, &name);
    assert_eq!(repairs(&mut client), 1, "a row that is not noted does");
}

/// Memory of a backend that is its own and not the shared buffers', in MB.
fn memory(pid: i32) -> i64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the backend's status");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a line with its memory");
    line.trim().trim_end_matches(" kB").parse::<i64>().expect("a number") / 1024
}

/// A block costs Postgres itself some memory: what counts is how much more it is with a trigger.
#[test]
fn a_loop_of_exception_blocks_keeps_memory_bounded() {
    let engine = Engine::elasticsearch();
    let (server, mut client, name) = table(&engine);
    client
        .batch_execute(&format!(
            "create table {name}_plain (id text primary key); create table {name}_wide (id text primary key);
             select es_sync.attach('{name}_wide')"
        ))
        .expect("set up");
    // A transaction that is still open, and its backend's memory.
    let blocks = |table: &str, count: i32, key: &str| {
        let mut client = server.connect("app");
        let pid: i32 = client.query_one("select pg_backend_pid()", &[]).expect("pid").get(0);
        client
            .batch_execute(&format!(
                "begin; do $$ begin for i in 1..{count} loop
                     begin insert into {table} (id) values ({key}); exception when division_by_zero then null; end;
                 end loop; end $$"
            ))
            .expect("a loop of blocks");
        (client, memory(pid))
    };
    let plain = blocks(&format!("{name}_plain"), 200_000, "i").1;
    let attached = blocks(&name, 200_000, "i + 1000").1;
    assert!(attached < plain + 24, "200,000 blocks: {attached} MB with the trigger, {plain} MB without");
    blocks(&name, 2_000, "i + 1000").0.batch_execute("commit").expect("commit");
    equal(&mut client, &engine, &name);
    // 60 MB of keys, of which the limit leaves 16 in memory.
    let key = "lpad(i::text, 5000, 'k')";
    let plain = blocks(&format!("{name}_plain"), 12_000, key).1;
    let attached = blocks(&format!("{name}_wide"), 12_000, key).1;
    assert!(attached < plain + 32, "long keys: {attached} MB with the trigger, {plain} MB without");
}

#[test]
fn vacuum_full_of_the_queue_acknowledges_no_other_row() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client, name) = table_behind(proxy.url());
    let update = |client: &mut Client, id: i32, title: &str| {
        client.batch_execute(&format!("update {name} set title = '{title}' where id = {id}")).expect("update");
    };
    let sent = |title: &str| proxy.seen("_bulk").iter().any(|seen| seen.body.contains(title));
    // A dead row, then two in flight: the first is answered long before the second.
    update(&mut client, 1, "dead");
    expect::settled(&mut client);
    for (id, title, delay) in [(2, "first", 3), (3, "second", 60)] {
        proxy.forget_seen();
        proxy.set_for("_bulk", Fault::Delay(Duration::from_secs(delay)));
        update(&mut client, id, title);
        wait::until("it is in flight", wait::SHORT, || sent(title));
    }
    let places = |client: &mut Client| -> Option<String> {
        let rows = "select string_agg(ctid::text, ' ' order by id) from es_sync.queue";
        client.query_one(rows, &[]).expect("queue").get(0)
    };
    // Now the second row comes to lie where the first one lay.
    assert_eq!(places(&mut client).as_deref(), Some("(0,2) (0,3)"));
    client.batch_execute("vacuum full es_sync.queue").expect("vacuum");
    assert_eq!(places(&mut client).as_deref(), Some("(0,1) (0,2)"));
    // The first is sent again once it is answered, for its row was not found under its old place.
    wait::until("the first is answered", wait::LONG, || sent("first"));
    // The second was never answered: only the queue knows of it.
    client.batch_execute("select pg_terminate_backend(worker_pid) from es_sync.status").expect("end the worker");
    proxy.set(Fault::Pass);
    equal(&mut client, &engine, &name);
}

/// A library whose pre-commit callback writes to an attached table. One that is loaded before ours runs after it.
#[test]
fn what_another_extension_writes_before_the_commit_is_captured() {
    let library = compiled("late_writer");
    for libraries in [format!("{library}, pg_es_sync"), format!("pg_es_sync, {library}")] {
        another_extension_writes(&libraries);
    }
}

fn another_extension_writes(libraries: &str) {
    let engine = Engine::elasticsearch();
    let server =
        Server::builder().conf("es_sync.url", engine.url()).conf("shared_preload_libraries", libraries).start();
    let mut client = server.create_database("app");
    let name = attached(&mut client);
    let mut other = server.connect("app");
    for statement in [
        format!("set late_writer.statement = 'update {name} set title = ''first of all'' where id = 5'"),
        "begin; select; prepare transaction 'first'".to_owned(),
        "set late_writer.statement = ''".to_owned(),
        "commit prepared 'first'".to_owned(),
    ] {
        other.batch_execute(&statement).unwrap_or_else(|error| panic!("{error:?} in: {statement}"));
    }
    for statement in [
        format!("set late_writer.statement = 'update {name} set title = ''late'' where id = 1'"),
        format!("update {name} set title = 'in time' where id = 2"),
        format!("set late_writer.statement = 'delete from {name} where id = 3'"),
        format!("begin; update {name} set title = 'prepared' where id = 4; prepare transaction 'late'"),
        "set late_writer.statement = ''".to_owned(),
        "commit prepared 'late'".to_owned(),
    ] {
        client.batch_execute(&statement).unwrap_or_else(|error| panic!("{error:?} in: {statement}"));
    }
    equal(&mut client, &engine, &name);
    let written = format!("select string_agg(id || coalesce(title, ''), ' ' order by id) from {name} where id <= 5");
    let written: String = client.query_one(&written, &[]).expect("rows").get(0);
    assert_eq!(written, "1late 2in time 4prepared 5first of all", "the library did write");
    let jobs: i64 = client.query_one("select count(*) from es_sync.jobs", &[]).expect("jobs").get(0);
    assert_eq!(jobs, 1, "it was noted, not found out afterwards");
}

/// Compiles tests/libraries/NAME.c against the server's headers; the library's path.
fn compiled(name: &str) -> String {
    let folder = |variable: &str| {
        std::env::var(variable)
            .unwrap_or_else(|_| panic!("{variable} is not set: run these tests with `make test-e2e`"))
    };
    let mut config = std::process::Command::new(format!("{}/pg_config", folder("PG_ES_SYNC_PG_BIN")));
    let headers = config.arg("--includedir-server").output().expect("could not run pg_config").stdout;
    let headers = String::from_utf8(headers).expect("pg_config prints a path");
    let source = format!("{}/libraries/{name}.c", env!("CARGO_MANIFEST_DIR"));
    let library = format!("{}/{name}.so", folder("PG_ES_SYNC_RUN"));
    let mut compiler = std::process::Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-I", headers.trim(), "-o", &library, &source]);
    assert!(compiler.status().expect("could not run cc").success(), "could not compile {source}");
    library
}

#[test]
fn triggers_that_were_switched_off_are_noticed_and_what_they_missed_is_repaired() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let (plain, parted) = (unique("switched"), unique("switched"));
    client
        .batch_execute(&format!(
            "create table {plain} (id int primary key, title text);
             create table {parted} (id int primary key, title text) partition by range (id);
             create table {parted}_one partition of {parted} for values from (0) to (1000);
             insert into {plain} select i, 'thing' from generate_series(1, 100) i;
             insert into {parted} select i, 'thing' from generate_series(1, 100) i;
             select es_sync.attach('{plain}'), es_sync.attach('{parted}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    // As pg_restore --disable-triggers does, in one transaction and in several; a partition alone as well.
    client
        .batch_execute(&format!(
            "begin;
             alter table {plain} disable trigger all;
             update {plain} set title = 'missed' where id <= 50; delete from {plain} where id > 90;
             alter table {plain} enable trigger all;
             commit"
        ))
        .expect("switch");
    client.batch_execute(&format!("alter table {parted}_one disable trigger all")).expect("switch");
    client.batch_execute(&format!("update {parted} set title = 'missed' where id <= 50")).expect("write");
    client.batch_execute(&format!("alter table {parted}_one enable trigger all")).expect("switch");
    for table in [&plain, &parted] {
        wait::until("what was missed is repaired", wait::LONG, || {
            engine.refresh(table);
            expect::compare(&mut client, &format!("select id, row_to_json(t) from {table} t"), &engine, table)
        });
    }
    let lame: i64 = client
        .query_one("select count(*) from pg_trigger where tgname like 'es_sync%' and tgenabled <> 'A'", &[])
        .expect("triggers")
        .get(0);
    assert_eq!(lame, 0, "all fire always again");
    client
        .batch_execute(&format!("set session_replication_role = replica; delete from {plain} where id < 10"))
        .expect("write as a replica");
    expect::table_equal(&mut client, &plain, "id", &engine, &plain);
}

#[test]
fn triggers_that_were_switched_off_make_the_index_stale_until_what_they_missed_has_arrived() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client, name) = table_behind(proxy.url());
    for trigger in ["all", "es_sync_capture"] {
        // What mends the table is held up, so that there is a time before it is mended.
        proxy.set_for("_bulk", Fault::Blackhole);
        client
            .batch_execute(&format!(
                "begin; alter table {name} disable trigger {trigger};
                 update {name} set title = 'missed while {trigger}' where id <= 5; delete from {name} where id = (select max(id) from {name});
                 alter table {name} enable trigger {trigger}; commit"
            ))
            .expect("switch");
        wait::until("the status says so", wait::SHORT, || {
            let row = client.query_one("select state, stale, cause from es_sync.status", &[]).expect("status");
            let (state, stale): (String, Option<String>) = (row.get(0), row.get(1));
            let said = stale.as_ref().is_some_and(|stale| stale.contains("switched off"));
            if said && state != "ok" { Ok(()) } else { Err(format!("{state}, {stale:?}")) }
        });
        let answered = client.query_one("select es_sync.wait(timeout => '300 ms')", &[]);
        assert!(!answered.expect("wait").get::<_, bool>(0), "wait does not answer while the index is stale");
        proxy.set(Fault::Pass);
        equal(&mut client, &engine, &name);
        assert_eq!(stale(&mut client), None);
    }
}
