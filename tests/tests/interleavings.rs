//! Moments at which something goes wrong between two steps: each is arranged, not waited for.

use pg_es_sync_tests::{
    Engine, Fault, Mode, Proxy, Server, close_queue, crashed, expect, is_stale, process, unique, wait,
};
use postgres::{Client, GenericClient};

fn server(url: &str) -> Server {
    Server::builder().conf("es_sync.url", url).conf("es_sync.lease_timeout", "2s").start()
}

fn table(client: &mut Client, rows: usize) -> String {
    let name = unique("between");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} select i, 'thing ' || i from generate_series(1, {rows}) i;
             select es_sync.attach('{name}')"
        ))
        .expect("set up");
    expect::settled(client);
    name
}

/// An attached table of ten rows, whose worker reaches the engine by the proxy.
fn behind_a_proxy() -> (Engine, Proxy, Server, Client, String) {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = server(proxy.url());
    let mut client = server.create_database("app");
    let name = table(&mut client, 10);
    (engine, proxy, server, client, name)
}

/// Attaches a table to one more index, into which nothing is loaded.
fn attach_unloaded(client: &mut impl GenericClient, table: &str, index: &str) {
    client
        .batch_execute(&format!(
            r#"select es_sync.attach('{table}', index => '{index}', options => '{{"load": false}}')"#
        ))
        .expect("attach");
}

/// Attaches a table to one more index, into which nothing is loaded, and changes a row while the engine's answer to `held`
/// is waited for.
fn change_beside_attach(client: &mut Client, proxy: &Proxy, table: &str, index: &str, held: &str) {
    proxy.forget_seen();
    proxy.set_for(held, Fault::Hold);
    attach_unloaded(client, table, index);
    wait::until("the engine is asked", wait::SHORT, || !proxy.seen(held).is_empty());
    client.batch_execute(&format!("update {table} set title = 'changed' where id = 7")).expect("write");
}

/// Has the server restart all of its processes, and so lose the queue; a new connection.
fn crash(server: &Server, client: Client) -> Client {
    server.kill_worker("app");
    crashed(client);
    wait::until("the server answers", wait::LONG, || server.try_connect("postgres", "app"))
}

/// The old holder's write alias is gone by the time its request arrives.
#[test]
fn a_request_of_the_old_primary_that_arrives_after_the_takeover_changes_nothing() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let mut primary = server(proxy.url());
    let mut client = primary.create_database("app");
    let name = table(&mut client, 100);
    let standby = primary.copy(true);
    standby.conf("es_sync.url", engine.url());
    standby.reload();
    proxy.set_for("_bulk", Fault::Hold);
    proxy.forget_seen();
    client.batch_execute(&format!("insert into {name} values (777, 'of the old primary')")).expect("write");
    wait::until("the insert is on its way", wait::SHORT, || !proxy.seen("_bulk").is_empty());
    standby.catch_up_with(&mut client);
    primary.stop(Mode::Kill);
    standby.promote();
    let mut there = standby.connect("app");
    there.batch_execute(&format!("delete from {name} where id = 777")).expect("write");
    expect::table_equal(&mut there, &name, "id", &engine, &name);
    // All else that the old primary asked has long been answered.
    let before = proxy.carried_out();
    proxy.set(Fault::Pass);
    wait::until("the old request has arrived", wait::SHORT, || proxy.carried_out() > before);
    expect::table_equal(&mut there, &name, "id", &engine, &name);
}

#[test]
fn a_swap_whose_answer_is_lost_is_found_out_and_not_done_twice() {
    for fault in [Fault::LoseAnswer, Fault::Reset] {
        let engine = Engine::elasticsearch();
        let proxy = Proxy::to(engine.url());
        let server = server(proxy.url());
        let mut client = server.create_database("app");
        let name = table(&mut client, 100);
        // The write alias of the new index goes the same way first.
        proxy.set_for("/_aliases", fault);
        proxy.forget_seen();
        client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
        wait::until("an answer was lost", wait::SHORT, || !proxy.seen("/_aliases").is_empty());
        client.batch_execute(&format!("update {name} set title = 'meanwhile' where id < 50")).expect("write");
        proxy.set(Fault::Pass);
        expect::settled(&mut client);
        proxy.set_for("/_aliases", fault);
        client.batch_execute(&format!("delete from {name} where id > 90")).expect("write");
        proxy.set(Fault::Pass);
        expect::table_equal(&mut client, &name, "id", &engine, &name);
        assert_eq!(engine.indexes_of(&name).len(), 1, "one index is live");
    }
}

#[test]
fn a_table_locked_by_ddl_keeps_no_other_table_waiting() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let mut client = server.create_database("app");
    let (locked, other) = (table(&mut client, 100), table(&mut client, 100));
    let mut ddl = server.connect("app");
    client.batch_execute(&format!("update {locked} set title = 'before'")).expect("write");
    ddl.batch_execute(&format!("begin; alter table {locked} add column extra text")).expect("lock");
    client.batch_execute(&format!("update {other} set title = 'meanwhile'")).expect("write");
    wait::until("the other table's changes have arrived", wait::SHORT, || {
        engine.refresh(&other);
        expect::compare(&mut client, &format!("select id, row_to_json(t) from {other} t"), &engine, &other)
    });
    ddl.batch_execute("rollback").expect("roll back");
    expect::table_equal(&mut client, &locked, "id", &engine, &locked);
}

#[test]
fn a_restored_dump_beside_its_original_stays_off_until_it_takes_over() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let mut client = server.create_database("app");
    let name = table(&mut client, 100);
    let dump = process::server_folder("dump");
    let file = dump.path().join("dump.sql");
    let status = server.command("pg_dump").args(["-d", "app", "-f"]).arg(&file).status().expect("pg_dump");
    assert!(status.success());
    drop(server.create_empty_database("restored"));
    let status = server
        .command("psql")
        .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", "restored", "-f"])
        .arg(&file)
        .stdout(std::process::Stdio::null())
        .status()
        .expect("psql");
    assert!(status.success(), "the dump can be restored");
    let mut there = server.connect("restored");
    wait::until("the copy stands off", wait::LONG, || -> bool {
        there.query_one("select state = 'standing off' from es_sync.status", &[]).expect("status").get(0)
    });
    there.batch_execute(&format!("delete from {name} where id < 50")).expect("write");
    client.batch_execute(&format!("update {name} set title = 'original'")).expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    there.batch_execute("select es_sync.take_over()").expect("take over");
    wait::until("the original is fenced off", wait::LONG, || -> bool {
        client.query_one("select state = 'standing off' from es_sync.status", &[]).expect("status").get(0)
    });
    expect::table_equal(&mut there, &name, "id", &engine, &name);
    let wish: bool = there.query_one("select take_over from es_sync.lease", &[]).expect("lease").get(0);
    assert!(!wish, "a copy made later must not find it");
}

/// The worker runs as soon as the extension is there: long before the tables have their rows, and these their triggers.
#[test]
fn a_dump_that_is_restored_slowly_is_left_alone_until_it_is_whole() {
    for original_is_gone in [false, true] {
        let engine = Engine::elasticsearch();
        let server = server(engine.url());
        let mut client = server.create_database("app");
        let (name, parted) = (table(&mut client, 100), unique("parted"));
        client
            .batch_execute(&format!(
                "create table {parted} (id int primary key, title text) partition by range (id);
                 create table {parted}_one partition of {parted} for values from (0) to (1000);
                 insert into {parted} select i, 'thing ' || i from generate_series(1, 100) i;
                 select es_sync.attach('{parted}')"
            ))
            .expect("attach");
        expect::settled(&mut client);
        let folder = process::server_folder("dump");
        let file = folder.path().join("dump");
        let dumped = server.command("pg_dump").args(["-d", "app", "-Fc", "-f"]).arg(&file).status().expect("pg_dump");
        assert!(dumped.success());
        drop(client);
        if original_is_gone {
            server.connect("postgres").batch_execute("drop database app").expect("drop");
        }

        drop(server.create_empty_database("restored"));
        let restore = |what: &[&str]| {
            let mut command = server.command("pg_restore");
            let status = command.args(["-d", "restored", "--exit-on-error"]).args(what).arg(&file).status();
            assert!(status.expect("pg_restore").success(), "{what:?}");
        };
        restore(&["--section=pre-data"]);
        restore(&["--section=data", "--schema=es_sync"]);
        let mut there = server.connect("restored");
        let seen = |there: &mut Client| {
            wait::until("the worker has seen the attachments", wait::SHORT, || -> bool {
                let said = "select coalesce(bool_and(cause like '%have no triggers%'), false) from es_sync.status";
                there.query_one(said, &[]).expect("status").get(0)
            });
        };
        seen(&mut there);
        restore(&["--section=data", "--schema=public"]);
        seen(&mut there);
        restore(&["--section=post-data"]);
        if !original_is_gone {
            wait::until("the copy stands off", wait::LONG, || -> bool {
                let states = "select bool_and(state = 'standing off') from es_sync.status";
                there.query_one(states, &[]).expect("status").get(0)
            });
            continue;
        }
        there.batch_execute(&format!("delete from {name} where id < 50; truncate {parted}_one")).expect("write");
        expect::table_equal(&mut there, &name, "id", &engine, &name);
        expect::table_equal(&mut there, &parted, "id", &engine, &parted);
        let sent: i64 = there.query_one("select sum(indexed)::bigint from es_sync.status", &[]).expect("status").get(0);
        assert_eq!(sent, 0, "nothing had been taken out of the indexes");
    }
}

#[test]
fn a_dump_restored_without_triggers_waits_for_them_or_for_take_over() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let mut client = server.create_database("app");
    let name = table(&mut client, 100);
    let folder = process::server_folder("dump");
    let (file, list) = (folder.path().join("dump"), folder.path().join("list"));
    let dumped = server.command("pg_dump").args(["-d", "app", "-Fc", "-f"]).arg(&file).status().expect("pg_dump");
    assert!(dumped.success());
    let listed = server.command("pg_restore").arg("-l").arg(&file).output().expect("pg_restore");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let kept: Vec<&str> = listed.lines().filter(|line| !line.contains(" TRIGGER ")).collect();
    assert_eq!(listed.lines().count() - kept.len(), 2);
    std::fs::write(&list, kept.join("\n")).expect("write");
    drop(client);
    server.connect("postgres").batch_execute("drop database app").expect("drop");

    drop(server.create_empty_database("restored"));
    let mut command = server.command("pg_restore");
    command.args(["-d", "restored", "--exit-on-error", "-L"]).arg(&list).arg(&file);
    assert!(command.status().expect("pg_restore").success());
    let mut there = server.connect("restored");
    wait::until("the status says what is missing", wait::SHORT, || -> bool {
        let said = "select state = 'waiting' and cause like '%es_sync.take_over()%' from es_sync.status";
        there.query_one(said, &[]).expect("status").get(0)
    });
    there.batch_execute(&format!("delete from {name} where id < 50; select es_sync.take_over()")).expect("take over");
    expect::table_equal(&mut there, &name, "id", &engine, &name);
    there.batch_execute(&format!("truncate {name}")).expect("write");
    expect::table_equal(&mut there, &name, "id", &engine, &name);
}

#[test]
fn a_serializable_writer_beside_readers_of_the_views_is_not_aborted() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let mut client = server.create_database("app");
    let name = table(&mut client, 100);
    let mut reader = server.connect("app");
    for round in 0..20 {
        client.batch_execute("begin isolation level serializable").expect("begin");
        reader.batch_execute("begin isolation level serializable").expect("begin");
        for client in [&mut client, &mut reader] {
            client
                .batch_execute("select count(*), sum(pending) from es_sync.status; select es_sync.health()")
                .expect("read");
        }
        client.batch_execute(&format!("update {name} set title = 'a {round}' where id = 1")).expect("write");
        reader.batch_execute(&format!("update {name} set title = 'b {round}' where id = 2")).expect("write");
        client.batch_execute("commit").expect("no serialization failure");
        reader.batch_execute("commit").expect("no serialization failure");
    }
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn a_publication_for_all_tables_and_a_logged_queue_get_along() {
    let engine = Engine::elasticsearch();
    let server = Server::builder().conf("es_sync.url", engine.url()).conf("es_sync.queue_durability", "logged").start();
    let mut client = server.create_database("app");
    let name = table(&mut client, 100);
    expect::logged_queue(&mut client);
    client.batch_execute("create publication everything for all tables").expect("publication");
    client
        .batch_execute(&format!("update {name} set title = 'new' where id < 50; delete from {name} where id > 90"))
        .expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    wait::until("the queue is empty", wait::SHORT, || -> bool {
        client.query_one("select count(*) = 0 from es_sync.queue", &[]).expect("queue").get(0)
    });
    assert_eq!(server.unexpected_log_lines(&[]), Vec::<String>::new());
}

#[test]
fn a_transaction_prepared_while_the_queue_was_closed_is_waited_for_before_the_repair() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::builder().conf("es_sync.url", proxy.url()).with_small_queue().start();
    let mut client = server.create_database("app");
    let name = table(&mut client, 100);
    close_queue(&mut client, &proxy, &name);
    client
        .batch_execute(&format!(
            "begin; update {name} set title = 'prepared' where id = 7; delete from {name} where id = 8; prepare transaction 'held'"
        ))
        .expect("prepare");
    proxy.set(Fault::Pass);
    wait::until("the backlog is delivered", wait::LONG, || -> bool {
        client.query_one("select pending = 0 from es_sync.status", &[]).expect("status").get(0)
    });
    assert!(is_stale(&mut client), "the repair waits for the prepared transaction");
    client.batch_execute("commit prepared 'held'").expect("commit");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn a_transaction_prepared_while_the_queue_was_closed_is_waited_for_over_a_restart() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let mut server = Server::builder().conf("es_sync.url", proxy.url()).with_small_queue().start();
    let mut client = server.create_database("app");
    let name = table(&mut client, 100);
    for mode in [Mode::Immediate, Mode::Fast] {
        close_queue(&mut client, &proxy, &name);
        client
            .batch_execute(&format!(
                "begin; update {name} set title = 'prepared, {mode:?}' where id = 7; delete from {name} where id = 8;
                 prepare transaction 'held'"
            ))
            .expect("prepare");
        server.restart(mode);
        client = server.connect("app");
        proxy.set(Fault::Pass);
        wait::until("the worker goes on", wait::LONG, || -> bool {
            let status = "select pending = 0 and state = 'stale' from es_sync.status";
            client.query_one(status, &[]).expect("status").get(0)
        });
        // What was committed by now arrives; no repair has told the index from its table.
        client.batch_execute(&format!("insert into {name} values (1000, 'after the restart')")).expect("write");
        wait::until("what is written now arrives", wait::LONG, || {
            engine.refresh(&name);
            engine.documents(&name).contains_key("1000")
        });
        assert!(is_stale(&mut client), "the repair waits for the prepared transaction");
        client.batch_execute("commit prepared 'held'").expect("commit");
        expect::table_equal(&mut client, &name, "id", &engine, &name);
        client
            .batch_execute(&format!("delete from {name} where id = 1000; insert into {name} values (8, 'again')"))
            .expect("write");
        expect::table_equal(&mut client, &name, "id", &engine, &name);
    }
}

#[test]
fn a_commit_that_ends_where_a_page_of_the_wal_ends_does_not_end_the_worker() {
    let engine = Engine::elasticsearch();
    let server = Server::builder().conf("es_sync.url", engine.url()).conf("es_sync.queue_durability", "logged").start();
    let mut client = server.create_database("app");
    let name = table(&mut client, 10);
    expect::logged_queue(&mut client);
    let worker = server.workers();
    let insert_place = |client: &mut Client| -> i64 {
        client.query_one("select (pg_current_wal_insert_lsn() - '0/0')::int8", &[]).expect("place").get(0)
    };
    const PAGE: i64 = 8192;
    let (mut met, mut commit_takes) = (0, 0);
    let deadline = std::time::Instant::now() + wait::LONG;
    for round in 0.. {
        assert!(std::time::Instant::now() < deadline, "commits that ended at a page's end: {met}");
        client.batch_execute(&format!("begin; update {name} set title = '{round}' where id = 1")).expect("write");
        // A record of no effect, so that this commit ends at a page's end if it takes what the last one took.
        let left = (PAGE - (insert_place(&mut client) + commit_takes) % PAGE) % PAGE;
        let filler = format!("select pg_logical_emit_message(false, '', repeat('x', {}))", (left - 56).max(0));
        client.batch_execute(&filler).expect("message");
        let before = insert_place(&mut client);
        client.batch_execute("commit").expect("commit");
        let after = insert_place(&mut client);
        commit_takes = after - before;
        // Behind a page's header, or that of a segment's first page.
        met += i64::from([24, 40].contains(&(after % PAGE)));
        expect::settled(&mut client);
        if met >= 3 {
            break;
        }
    }
    assert_eq!(server.workers(), worker, "the same worker");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn a_crash_during_a_load_a_reindex_or_a_comparison_ends_in_equality() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let mut client = server.create_database("app");
    let name = unique("between");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} select i, repeat('x', 300) from generate_series(1, 40000) i"
        ))
        .expect("set up");
    for call in ["attach", "reindex", "verify"] {
        client.batch_execute(&format!("select es_sync.{call}('{name}')")).expect("begin a job");
        wait::until("the job has come some way", wait::LONG, || -> bool {
            client.query_one("select done > 0 from es_sync.jobs order by id desc limit 1", &[]).expect("jobs").get(0)
        });
        // Deleted rows that the job has seen, whose deletes are lost with the queue.
        client
            .batch_execute(&format!("delete from {name} where id in (select id from {name} order by id limit 50)"))
            .expect("write");
        client = crash(&server, client);
        expect::table_equal(&mut client, &name, "id", &engine, &name);
    }
}

#[test]
fn what_changes_before_an_index_is_there_that_nothing_is_loaded_into_is_in_it() {
    let (engine, proxy, _server, mut client, name) = behind_a_proxy();
    let second = unique("unread");
    change_beside_attach(&mut client, &proxy, &name, &second, &format!("/{second}-1"));
    // Time enough to claim it and let go of it.
    let waited: bool = client.query_one("select es_sync.wait(timeout => '1 s')", &[]).expect("wait").get(0);
    assert!(!waited, "the index is not there");
    proxy.set(Fault::Pass);
    expect::settled(&mut client);
    expect::documents_equal(
        &mut client,
        &format!("select id, row_to_json(t) from {name} t where id = 7"),
        &engine,
        &second,
    );
}

#[test]
fn what_changes_before_an_index_is_there_that_nothing_is_loaded_into_outlives_the_queue() {
    let (engine, proxy, server, mut client, name) = behind_a_proxy();
    let second = unique("second");
    change_beside_attach(&mut client, &proxy, &name, &second, &format!("/{second}-1"));
    client = crash(&server, client);
    proxy.set(Fault::Pass);
    expect::settled(&mut client);
    // Nobody knows any more which row it was.
    expect::table_equal(&mut client, &name, "id", &engine, &second);
}

#[test]
fn an_index_that_was_half_built_when_the_queue_was_lost_does_not_stay() {
    let (engine, proxy, server, mut client, name) = behind_a_proxy();
    let second = unique("second");
    proxy.forget_seen();
    proxy.set_for("_bulk", Fault::Hold);
    client.batch_execute(&format!("select es_sync.attach('{name}', index => '{second}')")).expect("attach");
    wait::until("the index is being filled", wait::SHORT, || !proxy.seen("_bulk").is_empty());
    client = crash(&server, client);
    proxy.set(Fault::Pass);
    expect::settled(&mut client);
    expect::table_equal(&mut client, &name, "id", &engine, &second);
    assert_eq!(engine.indexes_of(&second), [format!("{second}-2")]);
    assert!(!engine.exists(&format!("{second}-1")), "it belongs to nobody");
}

#[test]
fn a_worker_that_connects_anew_loads_nothing_where_no_load_is_wanted() {
    let (engine, proxy, server, mut client, name) = behind_a_proxy();
    let second = unique("second");
    let settings = format!("/{second}-1/_settings");
    change_beside_attach(&mut client, &proxy, &name, &second, &settings);
    server.conf("es_sync.bulk_bytes", "4MB");
    server.reload();
    wait::until("the worker has connected anew", wait::LONG, || proxy.seen(&settings).len() > 1);
    proxy.set(Fault::Pass);
    expect::settled(&mut client);
    let documents = format!("select id, row_to_json(t) from {name} t where id = 7");
    expect::documents_equal(&mut client, &documents, &engine, &second);
}

#[test]
fn a_reindex_reads_all_rows_although_the_first_load_under_way_was_to_read_none() {
    let (engine, proxy, _server, mut client, name) = behind_a_proxy();
    let is_whole = |client: &mut Client, index: &str, generation: u32| {
        expect::table_equal(client, &name, "id", &engine, index);
        assert_eq!(engine.indexes_of(index), [format!("{index}-{generation}")]);
    };
    for held in ["/{index}-1", "/{index}-1/_settings", "/_aliases"] {
        let index = unique("reread");
        change_beside_attach(&mut client, &proxy, &name, &index, &held.replace("{index}", &index));
        client.batch_execute(&format!("select es_sync.reindex('{name}', '{index}')")).expect("reindex");
        proxy.set(Fault::Pass);
        is_whole(&mut client, &index, 2);
        assert!(!engine.exists(&format!("{index}-1")), "it belongs to nobody");
    }
    let index = unique("reread");
    let mut transaction = client.transaction().expect("begin");
    attach_unloaded(&mut transaction, &name, &index);
    transaction.batch_execute(&format!("select es_sync.reindex('{name}', '{index}')")).expect("reindex");
    transaction.commit().expect("commit");
    is_whole(&mut client, &index, 1);
}

/// COMMIT PREPARED announces nothing, and rows of a table that has an index already make nobody ask for another one.
#[test]
fn what_changes_after_a_prepared_attach_of_another_index_is_in_it() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let mut client = server.create_database("app");
    let name = table(&mut client, 10);
    for id in 1..=3 {
        let index = unique("prepared");
        client.batch_execute("begin").expect("begin");
        attach_unloaded(&mut client, &name, &index);
        for statement in [
            "prepare transaction 'attach'",
            "commit prepared 'attach'",
            &format!("update {name} set title = 'changed' where id = {id}"),
        ] {
            client.batch_execute(statement).unwrap_or_else(|error| panic!("{error:?} in: {statement}"));
        }
        expect::settled(&mut client);
        let changed = format!("select id, row_to_json(t) from {name} t where id = {id}");
        expect::documents_equal(&mut client, &changed, &engine, &index);
    }
}

#[test]
fn what_was_searchable_before_a_swap_is_so_after_it() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = server(proxy.url());
    let mut client = server.create_database("app");
    let name = unique("swapped");
    client
        .batch_execute(&format!(
            r#"create table {name} (id int primary key, title text);
               insert into {name} select i, 'thing ' || i from generate_series(1, 100) i;
               select es_sync.attach('{name}', options => '{{"refresh": "-1"}}')"#
        ))
        .expect("set up");
    expect::settled(&mut client);
    // The rows are in the new index, and its settings are being given back.
    proxy.set_for(&format!("/{name}-2/_settings"), Fault::Hold);
    client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
    wait::until("all rows are read", wait::SHORT, || !proxy.seen("-2/_settings").is_empty());
    proxy.set_for("_bulk", Fault::Hold);
    client.batch_execute(&format!("insert into {name} values (1000, 'during')")).expect("write");
    let phase = "select phase = 'drain' from es_sync.jobs where kind = 'reindex'";
    wait::until("changes are waited for", wait::SHORT, || -> bool {
        client.query_one(phase, &[]).expect("jobs").get(0)
    });
    std::thread::scope(|scope| {
        let mut waiting = server.connect("app");
        let answered = scope.spawn(move || -> bool {
            waiting.query_one("select es_sync.wait(timeout => '20 s')", &[]).expect("wait").get(0)
        });
        wait::until("somebody waits", wait::SHORT, || -> bool {
            let waits = "select count(*) = 1 from pg_stat_activity where query like 'select es_sync.wait%' and state = 'active'";
            client.query_one(waits, &[]).expect("activity").get(0)
        });
        proxy.set(Fault::Pass);
        assert!(answered.join().expect("who waits"));
    });
    let done = "select state = 'done' from es_sync.jobs where kind = 'reindex'";
    wait::until("it was swapped", wait::SHORT, || -> bool { client.query_one(done, &[]).expect("jobs").get(0) });
    assert_eq!(engine.search_ids(&name, serde_json::json!({"term": {"id": 1000}})), ["1000"]);
}

#[test]
fn a_drop_that_is_tried_again_spares_the_index_that_was_built_under_the_name_since() {
    let (engine, proxy, _server, mut client, name) = behind_a_proxy();
    proxy.judge(|head, _| {
        head.starts_with("delete /between")
            .then(|| (503, r#"{"error":{"type":"busy","reason":"busy"},"status":503}"#.into()))
    });
    proxy.forget_seen();
    client.batch_execute(&format!("select es_sync.detach('{name}', drop_index => true)")).expect("detach");
    wait::until("the drop was tried", wait::SHORT, || proxy.seen(&name).iter().any(|seen| seen.method == "DELETE"));
    client.batch_execute(&format!("select es_sync.attach('{name}')")).expect("attach");
    let loaded = "select live_index is not null from es_sync.status";
    wait::until("it is loaded", wait::SHORT, || -> bool { client.query_one(loaded, &[]).expect("status").get(0) });
    let live = engine.indexes_of(&name);
    proxy.judge(|_, _| None);
    let done = "select state = 'done' from es_sync.jobs where kind = 'drop'";
    wait::until("the drop is over", wait::SHORT, || -> bool { client.query_one(done, &[]).expect("jobs").get(0) });
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(engine.indexes_of(&name), live);
    assert_ne!(live, [format!("{name}-1")], "a late request for the former index must not meet another one");
}

#[test]
fn a_comparison_looks_again_at_what_was_on_its_way_when_it_began() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = server(proxy.url());
    let mut client = server.create_database("app");
    let name = table(&mut client, 100);
    proxy.set_for("_bulk", Fault::Hold);
    proxy.forget_seen();
    client.batch_execute(&format!("update {name} set title = 'noted' where id = 7")).expect("write");
    wait::until("it is on its way", wait::SHORT, || !proxy.seen("_bulk").is_empty());
    client
        .batch_execute(&format!(
            "set es_sync.capture = off; update {name} set title = 'not noted' where id = 7; set es_sync.capture = on"
        ))
        .expect("write");
    wait::until("a comparison is under way", wait::SHORT, || -> bool {
        let running = "select count(*) > 0 from es_sync.jobs where kind = 'verify' and state = 'running'";
        client.query_one(running, &[]).expect("jobs").get(0)
    });
    // Time enough to compare all else.
    let waited: bool = client.query_one("select es_sync.wait(timeout => '1 s')", &[]).expect("wait").get(0);
    assert!(!waited, "it is on its way");
    proxy.set(Fault::Pass);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn a_row_that_became_unreadable_unnoticed_gets_its_dead_letter_from_the_comparison() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let mut client = server.create_database("app");
    let name = unique("unreadable");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, n int);
             insert into {name} select i, 1 from generate_series(1, 50) i;
             select es_sync.attach('{name}', filter => '100 / n > 0')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    client
        .batch_execute(&format!(
            "set es_sync.capture = off; update {name} set n = 0 where id in (7, 50); set es_sync.capture = on"
        ))
        .expect("write");
    wait::until_equal("both are dead letters", wait::LONG, vec!["50".to_owned(), "7".to_owned()], || {
        let keys = "select key from es_sync.dead_letters order by key";
        client.query(keys, &[]).expect("letters").iter().map(|row| row.get(0)).collect::<Vec<String>>()
    });
}

/// Runs `second` while a transaction that has done `first` is open, which is committed once the second one waits for it.
/// Its SQLSTATE where it is refused.
#[track_caller]
fn beside(server: &Server, first: &str, second: &str) -> Option<String> {
    let (mut one, mut two, mut admin) = (server.connect("app"), server.connect("app"), server.connect("app"));
    one.batch_execute(&format!("begin; {first}")).expect(first);
    let second = second.to_owned();
    let asked = std::thread::spawn(move || two.batch_execute(&second));
    wait::until("the second one waits for the first one", wait::SHORT, || -> bool {
        let waits = "select count(*) = 1 from pg_stat_activity
                     where wait_event_type = 'Lock' and backend_type = 'client backend'";
        admin.query_one(waits, &[]).expect("activity").get(0)
    });
    one.batch_execute("commit").expect("commit");
    let refused = asked.join().expect("the second one").err();
    refused.map(|error| error.code().expect("the server refuses it").code().to_owned())
}

fn triggers(client: &mut Client, table: &str) -> i64 {
    let query =
        format!("select count(*) from pg_trigger where tgname like 'es_sync%' and tgrelid = '{table}'::regclass");
    client.query_one(&query, &[]).expect("triggers").get(0)
}

#[test]
fn of_two_tables_that_are_attached_to_one_index_at_once_one_is_refused() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let mut client = server.create_database("app");
    let name = unique("shared");
    client
        .batch_execute("create table one (id int primary key); create table two (id int primary key)")
        .expect("set up");
    let attach = |table: &str| format!("select es_sync.attach('{table}', '{name}')");
    assert_eq!(beside(&server, &attach("one"), &attach("two")).as_deref(), Some("42710"));
    expect::table_equal(&mut client, "one", "id", &engine, &name);
}

#[test]
fn a_partition_and_its_table_are_not_attached_at_once() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let mut client = server.create_database("app");
    for (first, second) in [("", "_part"), ("_part", "")] {
        let name = unique("tree");
        client
            .batch_execute(&format!(
                "create table {name} (id int primary key) partition by range (id);
                 create table {name}_part partition of {name} for values from (0) to (100)"
            ))
            .expect("set up");
        let attach = |part: &str| format!("select es_sync.attach('{name}{part}')");
        assert_eq!(beside(&server, &attach(first), &attach(second)).as_deref(), Some("0A000"), "{first}");
    }
}

#[test]
fn indexes_that_are_detached_at_once_leave_no_trigger() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let mut client = server.create_database("app");
    let name = table(&mut client, 10);
    client.batch_execute(&format!("select es_sync.attach('{name}', '{name}_second')")).expect("attach");
    expect::settled(&mut client);
    let detach = |index: &str| format!("select es_sync.detach('{name}', '{name}{index}')");
    assert_eq!(beside(&server, &detach(""), &detach("_second")), None);
    assert_eq!(triggers(&mut client, &name), 0);
}

#[test]
fn a_table_that_somebody_begins_to_follow_keeps_its_triggers_although_another_lets_go() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let mut client = server.create_database("app");
    let (name, other) = (table(&mut client, 10), unique("other"));
    client
        .batch_execute(&format!(
            "select es_sync.detach('{name}'); create table shown (id int primary key, name text);
             insert into shown select i, 'name ' || i from generate_series(1, 10) i;
             create table {other} (id int primary key); insert into {other} select generate_series(1, 10);
             create view {name}_document as select t.id, s.name from {name} t left join shown s on s.id = t.id;
             create view {other}_document as select t.id, s.name from {other} t left join shown s on s.id = t.id;
             select es_sync.attach('{name}', '{name}_documents', '{name}_document')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    let attach = format!("select es_sync.attach('{other}', document => '{other}_document')");
    assert_eq!(beside(&server, &attach, &format!("select es_sync.detach('{name}')")), None);
    assert_eq!(triggers(&mut client, "shown"), 2);
    client.batch_execute("update shown set name = 'changed'").expect("update");
    expect::settled(&mut client);
    let documents = format!("select id, row_to_json(d) from {other}_document d");
    expect::documents_equal(&mut client, &documents, &engine, &other);
    assert_eq!(server.unexpected_log_lines(&[]), Vec::<String>::new());
}

#[test]
fn drop_extension_does_not_deadlock_with_who_attaches() {
    let engine = Engine::elasticsearch();
    let server = server(engine.url());
    let mut client = server.create_database("app");
    let name = table(&mut client, 10);
    client.batch_execute("create table another (id int primary key)").expect("set up");
    let (mut one, mut two) = (server.connect("app"), server.connect("app"));
    one.batch_execute(&format!("begin; select es_sync.attach('another', '{name}_another')")).expect("attach");
    let drop = std::thread::spawn(move || two.batch_execute("drop extension pg_es_sync"));
    wait::until("the other one waits", wait::SHORT, || -> bool {
        let waits = "select count(*) = 1 from pg_stat_activity
                     where wait_event_type = 'Lock' and backend_type = 'client backend'";
        client.query_one(waits, &[]).expect("activity").get(0)
    });
    one.batch_execute(&format!("select es_sync.attach('{name}', '{name}_second'); commit")).expect("attach");
    drop.join().expect("the other one").expect("drop extension");
    assert_eq!(triggers(&mut client, &name), 0);
}
