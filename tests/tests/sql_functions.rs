//! What users call from SQL, beyond attach and reindex.

use pg_es_sync_tests::{Engine, Fault, Mode, Proxy, Server, expect, fill_queue, unique, wait};
use postgres::Client;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A table of 1,000 rows, attached and loaded.
fn attach(client: &mut Client, name: &str) {
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} select i, 'thing ' || i from generate_series(1, 1000) i;
             select es_sync.attach('{name}')"
        ))
        .expect("attach");
    expect::settled(client);
}

fn start(url: &str) -> (Server, Client) {
    let server = Server::builder().conf("es_sync.url", url).conf("es_sync.retry_max_delay", "500ms").start();
    let client = server.create_database("app");
    (server, client)
}

fn one<T: for<'a> postgres::types::FromSql<'a>>(client: &mut Client, query: &str) -> T {
    client.query_one(query, &[]).unwrap_or_else(|error| panic!("{error:?} in: {query}")).get(0)
}

/// SQLSTATE and message of a statement that must fail.
fn refused(client: &mut Client, statement: &str) -> (String, String) {
    let error = client.batch_execute(statement).expect_err(statement);
    let error = error.as_db_error().unwrap_or_else(|| panic!("{statement}: {error}"));
    (error.code().code().to_owned(), error.message().to_owned())
}

fn state(client: &mut Client, index: &str) -> String {
    one(client, &format!("select state from es_sync.status where index = '{index}'"))
}

fn until_state(client: &mut Client, index: &str, expected: &str) {
    wait::until_equal(&format!("{index} is {expected}"), wait::SHORT, expected.to_owned(), || state(client, index));
}

fn health(client: &mut Client) -> Value {
    serde_json::from_str(&one::<String>(client, "select es_sync.health()::text")).expect("health is JSON")
}

#[test]
fn sync_where_sends_the_rows_that_match_and_no_others() {
    let engine = Engine::elasticsearch();
    let (_server, mut client) = start(engine.url());
    let name = unique("matching");
    client
        .batch_execute(&format!(
            "create table {name} (tenant text, at date, title text, primary key (tenant, at));
             insert into {name} select 't|' || i % 3, date '2024-01-01' + i, 'thing ' || i from generate_series(1, 300) i;
             select es_sync.attach('{name}', options => '{{\"load\": false}}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    assert_eq!(engine.count(&name), 0);
    client.batch_execute("set datestyle = 'German'").expect("another session's dates");
    assert_eq!(one::<i64>(&mut client, &format!("select es_sync.sync_where('{name}', $$title <= 'thing 2'$$)")), 112);
    expect::settled(&mut client);
    let rows = format!(
        "select replace(tenant, '|', '\\|') || '|' || to_char(at, 'YYYY-MM-DD'), json_build_object('tenant', tenant,
             'at', to_char(at, 'YYYY-MM-DD'), 'title', title) from {name}"
    );
    expect::documents_equal(&mut client, &format!("{rows} where title <= 'thing 2'"), &engine, &name);
    client.batch_execute(&format!("select es_sync.sync_where('{name}', 'true')")).expect("all");
    expect::settled(&mut client);
    expect::documents_equal(&mut client, &rows, &engine, &name);
}

#[test]
fn sync_where_of_many_rows_spills_to_the_queue_and_is_rolled_back_as_a_whole() {
    let engine = Engine::elasticsearch();
    let (_server, mut client) = start(engine.url());
    let name = unique("many");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key); insert into {name} select generate_series(1, 200000);
             select es_sync.attach('{name}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    let mut transaction = client.transaction().expect("begin");
    let noted: i64 =
        transaction.query_one(&format!("select es_sync.sync_where('{name}', 'true')"), &[]).expect("sync_where").get(0);
    assert_eq!(noted, 200_000);
    let spilled: i64 =
        transaction.query_one("select coalesce(sum(count), 0) from es_sync.queue", &[]).expect("queue").get(0);
    assert!(spilled > 100_000, "keys went to the queue before the commit: {spilled}");
    transaction.rollback().expect("rollback");
    assert_eq!(one::<i64>(&mut client, "select count(*) from es_sync.queue"), 0);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn sync_where_refuses_a_wrong_condition_and_a_table_of_somebody_else() {
    let engine = Engine::elasticsearch();
    let (_server, mut client) = start(engine.url());
    let name = unique("conditions");
    attach(&mut client, &name);
    client
        .batch_execute(
            "create table unattached (id int primary key); create role clerk;
             grant usage on schema es_sync to clerk; grant execute on all routines in schema es_sync to clerk",
        )
        .expect("set up");
    for (condition, code) in
        [("titel is null", "42703"), ("title", "42804"), ("true) or (true", "42601"), ("1 / (id - 7) > 0", "22012")]
    {
        let statement = format!("select es_sync.sync_where('{name}', $${condition}$$)");
        assert_eq!(refused(&mut client, &statement).0, code, "{condition}");
    }
    assert_eq!(refused(&mut client, "select es_sync.sync_where('unattached', 'true')").0, "42704");
    client.batch_execute("set role clerk").expect("set role");
    assert_eq!(refused(&mut client, &format!("select es_sync.sync_where('{name}', 'true')")).0, "42501");
    client.batch_execute("reset role").expect("reset role");
    assert_eq!(one::<i64>(&mut client, "select count(*) from es_sync.queue"), 0);
}

#[test]
fn sync_takes_a_key_as_it_would_be_stored_whatever_its_length_or_scale() {
    let engine = Engine::elasticsearch();
    let (_server, mut client) = start(engine.url());
    for (kind, key, written) in [
        ("numeric(10, 2)", "1.50", "1.5"),
        ("char(5)", "ab   ", "'ab'"),
        ("varchar(3)", "abc", "'abc  '"),
        ("bit(3)", "101", "'101'"),
        ("timestamp(0)", "2024-01-01T10:00:00", "'2024-01-01 10:00:00.1'"),
    ] {
        let name = unique("modified");
        client
            .batch_execute(&format!(
                "create table {name} (k {kind} primary key, note text); insert into {name} values ('{key}', 'row');
                 select es_sync.attach('{name}')"
            ))
            .expect(kind);
        expect::settled(&mut client);
        let documents = engine.documents(&name);
        assert_eq!(documents.len(), 1, "{kind}");
        let (id, document) = documents.into_iter().next().expect("a document");
        let encoded: String = id.bytes().map(|byte| format!("%{byte:02X}")).collect();
        engine.delete(&format!("/{name}/_doc/{encoded}?refresh=true"));
        let synced: i64 = one(&mut client, &format!("select es_sync.sync('{name}', {written})"));
        assert_eq!(synced, 1, "{kind}");
        expect::settled(&mut client);
        assert_eq!(engine.documents(&name), [(id, document)].into(), "{kind}");
    }
    let name = unique("short");
    client
        .batch_execute(&format!("create table {name} (k varchar(3) primary key); select es_sync.attach('{name}')"))
        .expect("set up");
    let (code, message) = refused(&mut client, &format!("select es_sync.sync('{name}', 'abcd')"));
    assert_eq!((code.as_str(), message.as_str()), ("22001", "value too long for type character varying(3)"));
}

/// Titles are refused by a mapping that wants numbers; one row's title is a number.
fn poisoned(client: &mut Client, name: &str) {
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} values (1, 'secret one'), (2, 'secret two'), (3, '3');
             select es_sync.attach('{name}',
                 options => '{{\"mappings\": {{\"properties\": {{\"title\": {{\"type\": \"integer\"}}}}}}}}')"
        ))
        .expect("set up");
    expect::settled(client);
    assert_eq!(one::<i64>(client, &format!("select count(*) from es_sync.dead_letters where index = '{name}'")), 2);
}

#[test]
fn a_dead_letter_that_is_retried_stays_until_its_document_is_taken() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let (_server, mut client) = start(engine.url());
        let name = unique("letters");
        poisoned(&mut client, &name);
        assert_eq!(one::<i64>(&mut client, "select es_sync.retry_dead_letters()"), 2);
        wait::until("both were refused once more", wait::SHORT, || -> bool {
            one(&mut client, "select count(*) = 2 and min(attempts) = 2 from es_sync.dead_letters")
        });
        // Mended: from here on the engine ignores what is no number.
        let concrete = engine.indexes_of(&name).remove(0);
        engine.put(
            &format!("/{concrete}/_mapping"),
            json!({"properties": {"title": {"type": "integer", "ignore_malformed": true}}}),
        );
        let first: i64 = one(&mut client, "select id from es_sync.dead_letters where key = '1'");
        assert_eq!(one::<i64>(&mut client, &format!("select es_sync.retry_dead_letters('{{{first}, 999}}')")), 1);
        wait::until("its letter is gone, the other is not", wait::SHORT, || -> bool {
            one(&mut client, "select string_agg(key, ',') = '2' from es_sync.dead_letters")
        });
        assert_eq!(one::<i64>(&mut client, &format!("select es_sync.retry_dead_letters(relation => '{name}')")), 1);
        wait::until("no letter is left", wait::SHORT, || -> bool {
            one(&mut client, "select count(*) = 0 from es_sync.dead_letters")
        });
        expect::table_equal(&mut client, &name, "id", &engine, &name);
    }
}

#[test]
fn a_discarded_dead_letter_is_forgotten_and_its_document_can_be_parked_and_taken_again() {
    let engine = Engine::elasticsearch();
    let (_server, mut client) = start(engine.url());
    let name = unique("discarded");
    poisoned(&mut client, &name);
    let first: i64 = one(&mut client, "select id from es_sync.dead_letters where key = '1'");
    assert_eq!(one::<i64>(&mut client, &format!("select es_sync.discard_dead_letters('{{{first}}}')")), 1);
    assert_eq!(one::<i64>(&mut client, &format!("select es_sync.discard_dead_letters('{{{first}}}')")), 0);
    client.batch_execute(&format!("update {name} set title = 'again' where id = 1")).expect("update");
    wait::until("it is parked anew", wait::SHORT, || -> bool {
        one(&mut client, "select exists (select from es_sync.dead_letters where key = '1' and attempts = 1)")
    });
    assert_eq!(one::<i64>(&mut client, &format!("select es_sync.discard_dead_letters(relation => '{name}')")), 2);
    client.batch_execute(&format!("update {name} set title = id::text")).expect("mend");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(one::<i64>(&mut client, "select count(*) from es_sync.dead_letters"), 0);
}

#[test]
fn only_the_owner_of_a_table_may_use_its_dead_letters_and_see_their_reasons() {
    let engine = Engine::elasticsearch();
    let (_server, mut client) = start(engine.url());
    let (mine, theirs) = (unique("mine"), unique("theirs"));
    poisoned(&mut client, &mine);
    poisoned(&mut client, &theirs);
    client
        .batch_execute(&format!(
            "create role clerk; alter table {theirs} owner to clerk;
             grant usage on schema es_sync to clerk; grant execute on all routines in schema es_sync to clerk;
             grant select on es_sync.dead_letters to clerk; create role monitor;
             grant usage on schema es_sync to monitor; grant select on es_sync.dead_letters to monitor"
        ))
        .expect("set up");
    let id: i64 = one(&mut client, &format!("select min(id) from es_sync.dead_letters where index = '{mine}'"));
    client.batch_execute("set role clerk").expect("set role");
    for function in ["retry_dead_letters", "discard_dead_letters"] {
        let (code, message) = refused(&mut client, &format!("select es_sync.{function}('{{{id}}}')"));
        assert_eq!((code.as_str(), message), ("42501", format!("must be owner of table public.{mine}")));
        assert_eq!(refused(&mut client, &format!("select es_sync.{function}(relation => '{mine}')")).0, "42501");
    }
    let seen = "select string_agg(distinct index, ',') from es_sync.dead_letters where reason is not null";
    assert_eq!(one::<Option<String>>(&mut client, seen), Some(theirs.clone()));
    // Without any argument: his own.
    assert_eq!(one::<i64>(&mut client, "select es_sync.discard_dead_letters()"), 2);
    client.batch_execute("reset role; set role monitor").expect("set role");
    assert_eq!(one::<Option<String>>(&mut client, seen), None);
    assert_eq!(one::<i64>(&mut client, "select count(*) from es_sync.dead_letters where kind is not null"), 2);
}

#[test]
fn a_cancelled_first_load_leaves_nothing_in_the_engine_and_reindex_begins_it_again() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client) = start(proxy.url());
    let name = unique("cancelled");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} select i, repeat('x', 200) from generate_series(1, 50000) i"
        ))
        .expect("set up");
    proxy.set_for("_bulk", Fault::Delay(Duration::from_millis(200)));
    let job: i64 = one(&mut client, &format!("select es_sync.attach('{name}')"));
    wait::until("the load is under way", wait::SHORT, || !proxy.seen("_bulk").is_empty());
    client.batch_execute(&format!("select es_sync.cancel({job})")).expect("cancel");
    until_state(&mut client, &name, "cancelled");
    wait::until("the half-built index is gone", wait::SHORT, || !engine.exists(&format!("{name}-1")));
    let (code, message) = refused(&mut client, &format!("select es_sync.cancel({job})"));
    assert_eq!((code.as_str(), message), ("55000", format!("job {job} has ended already")));
    assert_eq!(refused(&mut client, "select es_sync.cancel(4711)").0, "42704");
    assert_eq!(one::<String>(&mut client, &format!("select state from es_sync.jobs where id = {job}")), "cancelled");

    client.batch_execute(&format!("delete from {name} where id <= 10")).expect("write");
    proxy.set(Fault::Pass);
    client.batch_execute(&format!("select es_sync.reindex('{name}')")).expect("reindex");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(state(&mut client, &name), "ok");
}

#[test]
fn a_cancel_or_pause_that_is_not_committed_keeps_nobody_waiting() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    // Small requests, so that the load lasts.
    let server = Server::builder().conf("es_sync.url", proxy.url()).conf("es_sync.bulk_bytes", "64kB").start();
    let mut client = server.create_database("app");
    let (loading, other) = (unique("loading"), unique("other"));
    attach(&mut client, &other);
    client
        .batch_execute(&format!(
            "create table {loading} (id int primary key, title text);
             insert into {loading} select i, repeat('x', 200) from generate_series(1, 60000) i"
        ))
        .expect("set up");
    proxy.set_for(&loading, Fault::Delay(Duration::from_millis(200)));
    let job: i64 = one(&mut client, &format!("select es_sync.attach('{loading}')"));
    wait::until("the load is under way", wait::SHORT, || {
        proxy.seen(&loading).iter().any(|seen| seen.path.contains("_bulk"))
    });
    let mut idle = server.connect("app");
    idle.batch_execute(&format!("begin; select es_sync.cancel({job}), es_sync.pause('{other}')")).expect("cancel");
    goes_on(&mut client, &other);
    let running: bool = one(&mut client, &format!("select state = 'running' from es_sync.jobs where id = {job}"));
    assert!(running, "the load ran all the while");
    idle.batch_execute("rollback").expect("rollback");
    proxy.set(Fault::Pass);
    expect::table_equal(&mut client, &loading, "id", &engine, &loading);
    expect::table_equal(&mut client, &other, "id", &engine, &other);
    assert_eq!(server.unexpected_log_lines(&[]), Vec::<String>::new());
}

#[test]
fn a_cancel_of_a_load_that_has_not_begun_keeps_nobody_waiting_while_it_is_not_committed() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::builder().conf("es_sync.url", proxy.url()).start();
    let mut client = server.create_database("app");
    let (loading, other) = (unique("beginning"), unique("other"));
    attach(&mut client, &other);
    client
        .batch_execute(&format!(
            "create table {loading} (id int primary key, title text);
             insert into {loading} select i, 'title' from generate_series(1, 1000) i"
        ))
        .expect("set up");
    proxy.answer(&loading, 1000, 503, "{}");
    let job: i64 = one(&mut client, &format!("select es_sync.attach('{loading}')"));
    wait::until("the index is asked for", wait::SHORT, || !proxy.seen(&loading).is_empty());
    let mut idle = server.connect("app");
    idle.batch_execute(&format!("begin; select es_sync.cancel({job})")).expect("cancel");
    proxy.forget_answers();
    goes_on(&mut client, &other);
    assert_eq!(one::<i64>(&mut client, &format!("select done from es_sync.jobs where id = {job}")), 0);
    idle.batch_execute("rollback").expect("rollback");
    expect::table_equal(&mut client, &loading, "id", &engine, &loading);
    assert_eq!(server.unexpected_log_lines(&[]), Vec::<String>::new());
}

#[test]
fn the_drop_of_an_index_is_its_tables_owners_to_cancel_whatever_the_table_is_called() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client) = start(proxy.url());
    let name = unique("dropped");
    attach(&mut client, &name);
    client
        .batch_execute(&format!(
            "create role clerk; create role other; grant usage on schema es_sync to clerk, other;
             grant execute on all routines in schema es_sync to clerk, other; alter table {name} owner to clerk"
        ))
        .expect("set up");
    let drops = |client: &mut Client| {
        proxy.set(Fault::Refuse);
        client.batch_execute(&format!("select es_sync.detach('{name}', drop_index => true)")).expect("detach");
        one::<i64>(client, "select max(id) from es_sync.jobs where kind = 'drop' and state in ('queued', 'running')")
    };
    let job = drops(&mut client);
    client
        .batch_execute(&format!(
            "alter table {name} rename to {name}_renamed; create table {name} (id int primary key);
             alter table {name} owner to other; set role other"
        ))
        .expect("the name is another table's");
    assert_eq!(refused(&mut client, &format!("select es_sync.cancel({job})")).0, "42501");
    client.batch_execute(&format!("set role clerk; select es_sync.cancel({job})")).expect("it is the clerk's");
    client
        .batch_execute(&format!(
            "reset role; drop table {name}; alter table {name}_renamed rename to {name}; select es_sync.attach('{name}')"
        ))
        .expect("attach");
    let job = drops(&mut client);
    client.batch_execute(&format!("drop table {name}; set role clerk")).expect("drop");
    assert_eq!(refused(&mut client, &format!("select es_sync.cancel({job})")).0, "42501");
    client.batch_execute(&format!("reset role; select es_sync.cancel({job})")).expect("it is a superuser's");
}

/// Changes of the table arrive one after the other; a wait for a lock would take two seconds each time.
fn goes_on(client: &mut Client, name: &str) {
    let start = Instant::now();
    for round in 0..10 {
        client.batch_execute(&format!("update {name} set title = 'round {round}' where id = 1")).expect("write");
        assert!(one::<bool>(client, &format!("select es_sync.wait('{name}', '10 s')")));
    }
    assert!(start.elapsed() < Duration::from_secs(15), "ten changes took {:?}", start.elapsed());
}

#[test]
fn a_cancelled_reindex_leaves_the_live_index_which_follows_on() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client) = start(proxy.url());
    let name = unique("kept");
    attach(&mut client, &name);
    client.batch_execute("create role clerk; grant usage on schema es_sync to clerk; grant execute on all routines in schema es_sync to clerk").expect("role");
    proxy.set_for("_bulk", Fault::Delay(Duration::from_millis(300)));
    let job: i64 = one(&mut client, &format!("select es_sync.reindex('{name}')"));
    wait::until("the build is under way", wait::SHORT, || !proxy.seen("-2.write").is_empty());
    client.batch_execute("set role clerk").expect("role");
    assert_eq!(refused(&mut client, &format!("select es_sync.cancel({job})")).0, "42501");
    client.batch_execute("reset role").expect("role");
    client
        .batch_execute(&format!("select es_sync.cancel({job}); update {name} set title = 'new' where id % 3 = 0"))
        .expect("cancel");
    proxy.set(Fault::Pass);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    assert_eq!(engine.indexes_of(&name), [format!("{name}-1")]);
    wait::until("the half-built index is gone", wait::SHORT, || !engine.exists(&format!("{name}-2")));
    assert_eq!(one::<String>(&mut client, &format!("select state from es_sync.jobs where id = {job}")), "cancelled");
}

#[test]
fn who_asks_for_a_reindex_at_the_same_time_is_told_the_same_job() {
    let engine = Engine::elasticsearch();
    let (server, mut client) = start(engine.url());
    let name = unique("twice");
    attach(&mut client, &name);
    client.batch_execute(&format!("select es_sync.pause('{name}')")).expect("so that the job does not end");
    let (mut other, mut admin) = (server.connect("app"), server.connect("app"));
    let reindex = format!("select es_sync.reindex('{name}')");
    client.batch_execute("begin").expect("begin");
    let job: i64 = one(&mut client, &reindex);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| one::<i64>(&mut other, &reindex));
        let waits =
            "select count(*) = 1 from pg_stat_activity where wait_event_type = 'Lock' and query like '%reindex%'";
        wait::until("the other one waits", wait::SHORT, || one::<bool>(&mut admin, waits));
        client.batch_execute("commit").expect("commit");
        assert_eq!(asked.join().expect("reindex"), job);
    });
}

#[test]
fn while_a_table_is_paused_its_changes_stay_in_the_queue_and_other_tables_go_on() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (mut server, mut client) = start(proxy.url());
    let (paused, other) = (unique("paused"), unique("other"));
    attach(&mut client, &paused);
    attach(&mut client, &other);
    client.batch_execute(&format!("select es_sync.pause('{paused}')")).expect("pause");
    until_state(&mut client, &paused, "paused");
    proxy.forget_seen();
    // More than the worker takes at once.
    client
        .batch_execute(&format!(
            "insert into {paused} select i, 'new' from generate_series(2000, 61999) i; delete from {paused} where id <= 5"
        ))
        .expect("write");
    let job: i64 = one(&mut client, &format!("select es_sync.reindex('{paused}')"));
    for round in 0..5 {
        client
            .batch_execute(&format!("update {other} set title = 'round {round}' where id % 5 = {round}"))
            .expect("write");
        assert!(one::<bool>(&mut client, &format!("select es_sync.wait('{other}', '10 s')")), "the other goes on");
    }
    let (code, message) = refused(&mut client, &format!("select es_sync.wait('{paused}')"));
    assert_eq!((code.as_str(), message), ("55000", format!("table \"{paused}\" is paused")));
    assert_eq!(refused(&mut client, "select es_sync.wait()").0, "55000");
    wait::until("the status counts them", wait::SHORT, || -> bool {
        one(&mut client, &format!("select pending = 60005 and paused from es_sync.status where index = '{paused}'"))
    });
    server.restart(Mode::Fast);
    client = server.connect("app");
    client.batch_execute(&format!("update {other} set title = 'after the restart'")).expect("write");
    expect_other(&mut client, &engine, &other);
    until_state(&mut client, &paused, "paused");
    assert_eq!(one::<String>(&mut client, &format!("select state from es_sync.jobs where id = {job}")), "queued");
    assert!(proxy.seen("_bulk").iter().all(|seen| !seen.path.contains(&paused)), "nothing was sent");

    client.batch_execute("select es_sync.resume()").expect("resume");
    expect::table_equal(&mut client, &paused, "id", &engine, &paused);
    assert_eq!(one::<String>(&mut client, &format!("select state from es_sync.jobs where id = {job}")), "done");
    assert_eq!(state(&mut client, &paused), "ok");
}

fn expect_other(client: &mut Client, engine: &Engine, name: &str) {
    wait::until("the other table has arrived", wait::SHORT, || {
        let rows = format!("select id, row_to_json(t) from {name} t");
        expect::compare(client, &rows, engine, name)
    });
}

#[test]
fn a_table_paused_with_documents_on_their_way_stops_and_loses_nothing() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client) = start(proxy.url());
    let (paused, other) = (unique("stopped"), unique("beside"));
    attach(&mut client, &paused);
    attach(&mut client, &other);
    proxy.set_for(&paused, Fault::Delay(Duration::from_millis(300)));
    proxy.forget_seen();
    client
        .batch_execute(&format!("insert into {paused} select i, repeat('x', 300) from generate_series(2000, 100000) i"))
        .expect("write");
    wait::until("requests are in flight", wait::SHORT, || !proxy.seen(&paused).is_empty());
    client.batch_execute(&format!("select es_sync.pause(index => '{paused}')")).expect("pause");
    until_state(&mut client, &paused, "paused");
    let start = Instant::now();
    client.batch_execute(&format!("update {other} set title = 'meanwhile'")).expect("write");
    assert!(one::<bool>(&mut client, &format!("select es_sync.wait('{other}', '10 s')")));
    assert!(start.elapsed() < Duration::from_secs(8), "the room is free for others: {:?}", start.elapsed());
    assert!(one::<bool>(&mut client, "select count(*) > 0 from es_sync.queue"), "the rest is in the queue");
    client.batch_execute(&format!("update {paused} set title = 'twice' where id % 2 = 0")).expect("write");
    proxy.set(Fault::Pass);
    client.batch_execute(&format!("select es_sync.resume('{paused}')")).expect("resume");
    expect::table_equal(&mut client, &paused, "id", &engine, &paused);
    expect::table_equal(&mut client, &other, "id", &engine, &other);
}

#[test]
fn changes_behind_and_between_the_rows_of_a_paused_table_are_found() {
    let engine = Engine::elasticsearch();
    let (_server, mut client) = start(engine.url());
    let (paused, other) = (unique("heavy"), unique("light"));
    attach(&mut client, &paused);
    attach(&mut client, &other);
    client.batch_execute(&format!("select es_sync.pause('{paused}')")).expect("pause");
    until_state(&mut client, &paused, "paused");
    // Half of them lie behind the other table's.
    fill_queue(&mut client, &paused, 200_000);
    for round in 0..300 {
        client.batch_execute(&format!("update {other} set title = 'a {round}' where id = {round} + 1")).expect("write");
    }
    expect_other(&mut client, &engine, &other);
    fill_queue(&mut client, &paused, 200_000);
    wait::until("the other table's rows leave room in the middle", wait::SHORT, || {
        client.batch_execute("vacuum es_sync.queue").expect("vacuum");
        one::<bool>(
            &mut client,
            &format!("select count(*) = 0 from es_sync.queue where source <> '{paused}'::regclass"),
        )
    });
    let ends: i64 = one(&mut client, "select pg_relation_size('es_sync.queue')");
    for round in 0..100 {
        client.batch_execute(&format!("update {other} set title = 'b {round}' where id = {round} + 1")).expect("write");
    }
    expect_other(&mut client, &engine, &other);
    assert_eq!(one::<i64>(&mut client, "select pg_relation_size('es_sync.queue')"), ends, "they lay in the middle");
    client.batch_execute("select es_sync.resume()").expect("resume");
    expect::table_equal(&mut client, &paused, "id", &engine, &paused);
    assert_eq!(one::<i64>(&mut client, "select count(*) from es_sync.queue"), 0);
}

#[test]
fn an_index_paused_beside_others_is_repaired_when_it_goes_on() {
    let engine = Engine::elasticsearch();
    let (_server, mut client) = start(engine.url());
    let (name, second) = (unique("first"), unique("second"));
    attach(&mut client, &name);
    client.batch_execute(&format!("select es_sync.attach('{name}', index => '{second}')")).expect("attach");
    expect::settled(&mut client);
    let rows = format!("select id, row_to_json(t) from {name} t");

    client.batch_execute(&format!("select es_sync.pause('{name}', '{second}')")).expect("pause");
    until_state(&mut client, &second, "paused");
    client
        .batch_execute(&format!(
            "update {name} set title = 'changed' where id <= 100; delete from {name} where id > 900"
        ))
        .expect("write");
    assert!(one::<bool>(&mut client, &format!("select es_sync.wait('{name}', '10 s')")), "the first one goes on");
    expect::documents_equal(&mut client, &rows, &engine, &name);
    assert_eq!(engine.count(&second), 1000, "the second one does not");
    let stale: String = one(&mut client, &format!("select stale from es_sync.status where index = '{second}'"));
    assert!(stale.contains("paused"), "{stale}");

    // Both paused, then the first alone goes on: the second is still left behind.
    client.batch_execute(&format!("select es_sync.pause('{name}')")).expect("pause both");
    client.batch_execute(&format!("insert into {name} values (5000, 'while both are paused')")).expect("write");
    client.batch_execute(&format!("select es_sync.resume('{name}', '{name}')")).expect("resume");
    assert!(one::<bool>(&mut client, &format!("select es_sync.wait('{name}', '10 s')")));
    expect::documents_equal(&mut client, &rows, &engine, &name);

    client.batch_execute(&format!("select es_sync.resume('{name}', '{second}')")).expect("resume");
    expect::settled(&mut client);
    for index in [&name, &second] {
        expect::documents_equal(&mut client, &rows, &engine, index);
        assert_eq!(state(&mut client, index), "ok");
    }
}

#[test]
fn only_the_owner_may_pause_and_without_arguments_only_his_own() {
    let engine = Engine::elasticsearch();
    let (_server, mut client) = start(engine.url());
    let (mine, theirs) = (unique("mine"), unique("theirs"));
    attach(&mut client, &mine);
    attach(&mut client, &theirs);
    client
        .batch_execute(&format!(
            "create role clerk; alter table {theirs} owner to clerk;
             grant usage on schema es_sync to clerk; grant execute on all routines in schema es_sync to clerk; set role clerk"
        ))
        .expect("set up");
    assert_eq!(refused(&mut client, &format!("select es_sync.pause('{mine}')")).0, "42501");
    assert_eq!(refused(&mut client, &format!("select es_sync.resume(index => '{mine}')")).0, "42501");
    assert_eq!(refused(&mut client, "select es_sync.pause(index => 'nonesuch')").0, "42704");
    client.batch_execute("select es_sync.pause(); reset role").expect("pause");
    let paused: String = one(&mut client, "select string_agg(index, ',') from es_sync.status where paused");
    assert_eq!(paused, theirs);
}

#[test]
fn a_blocked_index_with_a_long_queue_does_not_keep_other_tables_waiting() {
    let engine = Engine::elasticsearch();
    let (_server, mut client) = start(engine.url());
    let (blocked, other) = (unique("blocked"), unique("flowing"));
    attach(&mut client, &blocked);
    attach(&mut client, &other);
    let concrete = engine.indexes_of(&blocked).remove(0);
    engine.put(&format!("/{concrete}/_settings"), json!({"index.blocks.write": true}));
    client
        .batch_execute(&format!("insert into {blocked} select i, 'new' from generate_series(2000, 101999) i"))
        .expect("write");
    until_state(&mut client, &blocked, "retrying");
    for round in 0..5 {
        let start = Instant::now();
        client
            .batch_execute(&format!("update {other} set title = 'round {round}' where id = {round} + 1"))
            .expect("write");
        assert!(one::<bool>(&mut client, &format!("select es_sync.wait('{other}', '10 s')")));
        assert!(start.elapsed() < Duration::from_secs(5), "round {round} took {:?}", start.elapsed());
    }
    let cause: String = one(&mut client, &format!("select cause from es_sync.status where index = '{blocked}'"));
    assert!(cause.contains("blocked by"), "{cause}");
    engine.put(&format!("/{concrete}/_settings"), json!({"index.blocks.write": null}));
    expect::table_equal(&mut client, &blocked, "id", &engine, &blocked);
    expect::table_equal(&mut client, &other, "id", &engine, &other);
    assert_eq!(one::<i64>(&mut client, "select count(*) from es_sync.dead_letters"), 0);
}

#[test]
fn health_says_what_is_wrong_and_when_the_engine_is_asked_again() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client) = start(proxy.url());
    let name = unique("healthy");
    attach(&mut client, &name);
    let well = health(&mut client);
    assert_eq!((&well["state"], &well["breaker"], &well["cause"]), (&json!("ok"), &json!("closed"), &Value::Null));
    assert!(well["engine"].as_str().is_some_and(|engine| engine.starts_with("Elasticsearch ")), "{well}");
    assert!(well["worker_pid"].is_i64() && well["latency_p99_ms"].is_null(), "no change so far: {well}");
    assert_eq!((&well["pending"], &well["jobs"], &well["indexes"]), (&json!(0), &json!(0), &json!(1)));

    proxy.set(Fault::Refuse);
    client.batch_execute(&format!("update {name} set title = 'unsent'")).expect("write");
    let ill = wait::until("health says so", wait::SHORT, || {
        let health = health(&mut client);
        let told = health["state"] == "waiting" && health["breaker"] != "closed" && health["pending"] == 1000;
        if told && health["next_try"].is_string() { Ok(health) } else { Err(health) }
    });
    assert!(ill["cause"].is_string() && ill["since"].is_string() && ill["oldest_age_s"].is_number(), "{ill}");
    assert!(!ill["failures"].as_array().expect("failures").is_empty(), "{ill}");
    let row = client
        .query_one("select state, next_try is not null, since is not null, oldest_age > '0' from es_sync.status", &[])
        .expect("status");
    wait::until("so does the status", wait::SHORT, || -> bool {
        one(
            &mut client,
            "select state = 'waiting' and next_try > now() - interval '5 s' and since < now() and oldest_age > '0' from es_sync.status",
        )
    });
    assert_eq!((row.get::<_, String>(0), row.get::<_, bool>(2)), ("waiting".to_owned(), true));
    proxy.set(Fault::Pass);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    let well = wait::until("it is well again", wait::SHORT, || {
        let health = health(&mut client);
        if health["state"] == "ok" && health["next_try"].is_null() { Ok(health) } else { Err(health) }
    });
    assert!(well["latency_p99_ms"].is_number() && !well["failures"].as_array().expect("failures").is_empty(), "{well}");
}

#[test]
fn neither_health_nor_status_nor_log_quotes_a_document() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let (server, mut client) = start(engine.url());
        let name = unique("discreet");
        poisoned(&mut client, &name);
        client.batch_execute("create role monitor; grant usage on schema es_sync to monitor; grant execute on function es_sync.health() to monitor; set role monitor").expect("role");
        let health = health(&mut client);
        let failures = health["failures"].as_array().expect("failures");
        assert!(
            failures.iter().any(|failure| {
                failure["index"] == name.as_str()
                    && failure["at"].is_string()
                    && failure["text"].as_str().is_some_and(|text| text.contains("field \"title\""))
            }),
            "the field is named: {health}"
        );
        client.batch_execute("reset role").expect("role");
        let status: String = one(&mut client, "select string_agg(s::text, '') from es_sync.status s");
        let reasons: String = one(&mut client, "select string_agg(reason, '') from es_sync.dead_letters");
        assert!(reasons.contains("secret"), "the engine quotes it: {reasons}");
        for (what, text) in [("health", health.to_string()), ("status", status), ("log", server.log())] {
            assert!(!text.contains("secret one"), "{what}: {text}");
        }
    }
}

#[test]
fn health_remembers_the_last_ten_failures_each_once() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (_server, mut client) = start(proxy.url());
    let name = unique("failing");
    attach(&mut client, &name);
    for round in 0..12 {
        let body = json!({"error": {"type": "trouble", "reason": format!("number {round}")}, "status": 503});
        proxy.answer("_bulk", 2, 503, &body.to_string());
        client.batch_execute(&format!("update {name} set title = 'round {round}' where id = 1")).expect("write");
        wait::until("the answers were given", wait::SHORT, || proxy.answers_left() == 0);
        expect::settled(&mut client);
    }
    let health = health(&mut client);
    let texts: Vec<&str> =
        health["failures"].as_array().expect("failures").iter().filter_map(|f| f["text"].as_str()).collect();
    assert_eq!(texts.len(), 10, "{texts:?}");
    assert!(texts.iter().any(|text| text.contains("number 11")) && !texts.iter().any(|text| text.contains("number 0")));
    let mut distinct: Vec<String> = health["failures"]
        .as_array()
        .expect("failures")
        .iter()
        .map(|f| format!("{} {}", f["index"], f["text"]))
        .collect();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), 10, "{distinct:?}");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn on_a_standby_the_views_answer_and_what_writes_is_refused() {
    let engine = Engine::elasticsearch();
    let (server, mut client) = start(engine.url());
    let name = unique("standing");
    poisoned(&mut client, &name);
    let standby = server.copy(true);
    let mut reader = standby.connect("app");
    let health = health(&mut reader);
    assert_eq!((&health["state"], &health["dead_letters"]), (&json!("standby"), &json!(2)), "{health}");
    assert_eq!(state(&mut reader, &name), "standby");
    assert_eq!(one::<i64>(&mut reader, "select count(*) from es_sync.jobs"), 1);
    assert_eq!(one::<i64>(&mut reader, "select count(*) from es_sync.dead_letters where reason is not null"), 2);
    for call in [
        format!("attach('{name}', index => 'other')"),
        format!("detach('{name}')"),
        format!("reindex('{name}')"),
        format!("sync('{name}', 1)"),
        format!("sync_where('{name}', 'true')"),
        "retry_dead_letters()".to_owned(),
        "discard_dead_letters()".to_owned(),
        "cancel(1)".to_owned(),
        "pause()".to_owned(),
        "resume()".to_owned(),
        "wait()".to_owned(),
    ] {
        let (code, message) = refused(&mut reader, &format!("select es_sync.{call}"));
        let function = call.split('(').next().unwrap_or_default();
        assert_eq!(
            (code.as_str(), message),
            ("25006", format!("cannot execute es_sync.{function}() during recovery")),
            "{call}"
        );
    }
    reader.batch_execute("call es_sync.watch(1)").expect("a job that has ended is told");
    assert_eq!(standby.unexpected_log_lines(&["during recovery"]), Vec::<String>::new());
    drop(standby);
    client.batch_execute("set default_transaction_read_only = on").expect("read only");
    assert_eq!(refused(&mut client, &format!("select es_sync.sync('{name}', 1)")).0, "25006");
}

#[test]
fn watch_shows_a_jobs_progress_until_it_has_ended() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let (server, mut client) = start(proxy.url());
    let name = unique("watched");
    client
        .batch_execute(&format!(
            "create table {name} (id int primary key, title text);
             insert into {name} select i, repeat('x', 300) from generate_series(1, 60000) i; analyze {name}"
        ))
        .expect("set up");
    proxy.set_for("_bulk", Fault::Delay(Duration::from_millis(300)));
    let job: i64 = one(&mut client, &format!("select es_sync.attach('{name}')"));
    let watch = |job: i64| {
        let mut psql = server.command("psql");
        psql.args(["-X", "-d", "app", "-c", &format!("call es_sync.watch({job})")]);
        let output = psql.output().expect("psql");
        let shown = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{shown}");
        shown
    };
    let shown = watch(job);
    let lines: Vec<&str> = shown.lines().collect();
    assert!(lines.len() >= 3, "{shown}");
    assert!(shown.contains(&format!("NOTICE:  job {job}: load: ")) && shown.contains("of about 60000 rows"), "{shown}");
    assert!(
        lines.last().is_some_and(|line| line.starts_with(&format!("NOTICE:  job {job}: done, 60000 rows in "))),
        "{shown}"
    );
    assert_eq!(
        refused(&mut client, &format!("begin; call es_sync.watch({job})")),
        ("25001".to_owned(), "es_sync.watch() cannot run inside a transaction block".to_owned())
    );
    client.batch_execute("rollback").expect("rollback");
    assert_eq!(refused(&mut client, "call es_sync.watch(4711)").0, "42704");
    proxy.set(Fault::Pass);
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    let last_line = |job: i64| {
        let shown = watch(job);
        shown.lines().last().unwrap_or_default().trim_start_matches(&format!("NOTICE:  job {job}: ")).to_owned()
    };
    let compared = last_line(one(&mut client, &format!("select es_sync.verify('{name}')")));
    assert!(compared.starts_with("done, 60000 rows in "), "{compared}");
    assert!(compared.ends_with(", 0 missing, 0 different, 0 orphaned"), "{compared}");
    client.batch_execute(&format!("select es_sync.detach('{name}', drop_index => true)")).expect("detach");
    assert_eq!(last_line(one(&mut client, "select max(id) from es_sync.jobs where kind = 'drop'")), "done");
}

#[test]
fn who_waits_where_nothing_is_attached_is_answered() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let waited: bool = client.query_one("select es_sync.wait(timeout => '20 s')", &[]).expect("wait").get(0);
    assert!(waited);
}
