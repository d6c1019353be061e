//! Statements, stops and reloads that come while a request is in flight: none hangs, fails or restarts the server.

use std::time::{Duration, Instant};

use pg_es_sync_tests::{Engine, Fault, Mode, Proxy, Server, expect, process, unique, wait};
use postgres::Client;

/// More than any of these takes on a busy machine, and less than a time-out of Postgres (5 s for other sessions to go) or
/// of the request (60 s) that somebody would have run into.
const PROMPT: Duration = Duration::from_millis(4_500);

struct Scene {
    engine: Engine,
    proxy: Proxy,
    server: Server,
    /// In database "app".
    client: Client,
    table: String,
}

/// A loaded table.
fn scene() -> Scene {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::builder()
        .conf("es_sync.url", proxy.url())
        .conf("es_sync.retry_max_delay", "300ms")
        .conf("allow_in_place_tablespaces", "on")
        .start();
    let mut client = server.create_database("app");
    let table = unique("living");
    client
        .batch_execute(&format!(
            "create table {table} (id int primary key, title text);
             insert into {table} select i, 'thing ' || i from generate_series(1, 1000) i;
             select es_sync.attach('{table}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    Scene { engine, proxy, server, client, table }
}

impl Scene {
    /// Changes rows, and returns once a request with them is on its way that is not going to be answered.
    fn in_flight(mut self) -> Scene {
        self.proxy.forget_seen();
        self.proxy.set_for("_bulk", Fault::Blackhole);
        let table = &self.table;
        self.client
            .batch_execute(&format!(
                "update {table} set title = 'changed ' || id where id <= 400; delete from {table} where id > 900"
            ))
            .expect("write");
        wait::until("a request is in flight", wait::SHORT, || !self.proxy.seen("_bulk").is_empty());
        self
    }

    fn worker(&self, database: &str) -> Option<u32> {
        self.server.workers().into_iter().find(|worker| worker.2 == database).map(|worker| worker.0)
    }

    /// The engine answers again: everything must have arrived, and what is written now arrives.
    fn goes_on_in(&mut self, database: &str) {
        self.proxy.set(Fault::Pass);
        let mut client = self.server.connect(database);
        wait::until("the worker is back", wait::SHORT, || self.worker(database));
        client.batch_execute(&format!("insert into {} values (5000, 'later')", self.table)).expect("write");
        expect::table_equal(&mut client, &self.table, "id", &self.engine, &self.table);
        self.unharmed();
    }

    fn unharmed(&self) {
        let log = self.server.log();
        assert!(!log.contains("terminated by signal") && !log.contains("reinitializing"), "nothing crashed");
    }
}

/// Asserts that it succeeds, and soon.
#[track_caller]
fn promptly(client: &mut Client, statement: &str) {
    let start = Instant::now();
    client.batch_execute(statement).unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    assert!(start.elapsed() < PROMPT, "{statement}: {:?}", start.elapsed());
}

#[test]
fn drop_table_does_not_wait_for_a_request() {
    let mut scene = scene();
    let dropped = unique("dropped");
    scene
        .client
        .batch_execute(&format!(
            "create table {dropped} (id int primary key); select es_sync.attach('{dropped}');
             insert into {dropped} select generate_series(1, 100)"
        ))
        .expect("attach");
    expect::settled(&mut scene.client);
    let mut scene = scene.in_flight();
    scene.client.batch_execute(&format!("insert into {dropped} select generate_series(101, 200)")).expect("write");
    promptly(&mut scene.client, &format!("drop table {dropped}"));
    scene.goes_on_in("app");
    wait::until("its attachment is gone", wait::SHORT, || -> bool {
        scene.client.query_one("select count(*) = 1 from es_sync.status", &[]).expect("status").get(0)
    });
}

#[test]
fn drop_extension_does_not_wait_for_a_request() {
    for statement in ["drop extension pg_es_sync", "drop extension pg_es_sync cascade", "drop schema es_sync cascade"] {
        let mut scene = scene().in_flight();
        promptly(&mut scene.client, statement);
        let table = &scene.table;
        scene.client.batch_execute(&format!("insert into {table} values (5000)")).expect("writers go on");
        wait::until("its worker has gone", wait::SHORT, || scene.worker("app").is_none());
        promptly(&mut scene.client, "create extension pg_es_sync");
        scene.proxy.set(Fault::Pass);
        scene
            .client
            .batch_execute(&format!("select es_sync.attach('{table}', options => '{{\"adopt\": true}}')"))
            .expect("attach again");
        expect::table_equal(&mut scene.client, table, "id", &scene.engine, table);
        scene.unharmed();
    }
}

#[test]
fn drop_database_does_not_wait_for_the_worker() {
    for statement in ["drop database app", "drop database app with (force)"] {
        let mut scene = leave(scene().in_flight());
        // Not a superuser: FORCE would not be allowed to end the worker, which is one.
        scene.client.batch_execute("create role owner login; alter database app owner to owner").expect("owner");
        promptly(&mut scene.server.connect_as("owner", "postgres"), statement);
        scene.unharmed();
        assert!(scene.server.workers().iter().all(|worker| worker.1.contains("launcher")));
    }
}

#[test]
fn a_database_can_be_a_template_and_goes_on_afterwards() {
    for (copy, options) in [("one", "strategy wal_log"), ("two", "strategy file_copy"), ("three", "")] {
        let mut scene = scene().in_flight();
        // From the database itself: its own session does not count.
        // The copy takes no connections, so that it gets no worker: what a copy may do is another matter.
        promptly(&mut scene.client, &format!("create database {copy} template app allow_connections false {options}"));
        scene.goes_on_in("app");
    }
}

#[test]
fn template1_needs_no_hold_and_new_databases_come_as_before() {
    let scene = scene().in_flight();
    let before = scene.worker("app");
    let mut client = scene.server.connect("postgres");
    promptly(&mut client, "create database another");
    promptly(&mut client, "create database third template template0 strategy file_copy");
    assert_eq!(scene.worker("app"), before, "nobody else's worker is stopped");
    assert!(before.is_some());
}

#[test]
fn a_renamed_database_is_synced_under_its_new_name() {
    let mut scene = leave(scene().in_flight());
    promptly(&mut scene.client, "alter database app rename to renamed");
    scene.goes_on_in("renamed");
    // Inside a transaction too, where the name's lock lasts until its end.
    promptly(&mut scene.client, "begin; alter database renamed rename to again");
    assert_eq!(scene.worker("again"), None);
    promptly(&mut scene.client, "rollback");
    wait::until("the worker is back", wait::SHORT, || scene.worker("renamed"));
    let log = scene.server.log();
    assert!(!log.contains("does not exist"), "no worker was started too early");
}

#[test]
fn a_database_can_move_to_another_tablespace() {
    let mut scene = leave(scene().in_flight());
    promptly(&mut scene.client, "create tablespace other location ''");
    promptly(&mut scene.client, "alter database app set tablespace other");
    scene.goes_on_in("app");
}

/// With its client in another database, so that nobody but the worker is in "app".
fn leave(mut scene: Scene) -> Scene {
    scene.client = scene.server.connect("postgres");
    wait::until("the session has ended", wait::SHORT, || -> bool {
        let sessions =
            "select count(*) = 0 from pg_stat_activity where datname = 'app' and backend_type = 'client backend'";
        scene.client.query_one(sessions, &[]).expect("sessions").get(0)
    });
    scene
}

#[test]
fn who_may_not_touch_a_database_cannot_stop_its_worker() {
    let mut scene = leave(scene());
    scene
        .client
        .batch_execute("create role nobody login; create role maker login createdb")
        .and_then(|()| scene.client.batch_execute("create tablespace other location ''"))
        .expect("roles and a tablespace");
    let before = scene.worker("app");
    assert!(before.is_some());
    for user in ["nobody", "maker"] {
        let mut client = scene.server.connect_as(user, "postgres");
        for statement in [
            "drop database app",
            "drop database app with (force)",
            "create database copy template app",
            "alter database app rename to mine",
            "alter database app set tablespace other",
        ] {
            client.batch_execute(statement).expect_err(statement);
        }
    }
    let client = &mut scene.client;
    client.batch_execute("begin").expect("begin");
    client.batch_execute("drop database app").expect_err("not inside a transaction");
    client.batch_execute("rollback").expect("rollback");
    client.batch_execute("alter database app connection limit 100").expect("a harmless change");
    assert_eq!(scene.worker("app"), before);
    assert!(!scene.server.log().contains("terminating background worker"));
}

#[test]
fn a_hold_ends_with_its_backend_and_lasts_as_long() {
    let scene = scene().in_flight();
    // The session in "app" makes CREATE DATABASE wait, for 5 s at the most.
    let create = "create database copy template app allow_connections false";
    let mut watcher = scene.server.connect("postgres");
    let mut creator = || -> Option<i32> {
        let active = format!("select pid from pg_stat_activity where state = 'active' and query = '{create}'");
        watcher.query_opt(&active, &[]).expect("activity").map(|row| row.get(0))
    };

    let mut other = scene.server.connect("postgres");
    let thread = std::thread::spawn(move || other.batch_execute(create));
    wait::until("the worker has stopped", wait::SHORT, || scene.worker("app").is_none());
    let start = Instant::now();
    let mut pid = None;
    while start.elapsed() < Duration::from_millis(2_500) {
        pid = creator();
        // Read in this order: a worker that was there before the creator ended was started too early.
        let worker = scene.worker("app");
        if creator().is_none() {
            break;
        }
        assert_eq!(worker, None, "no worker starts while the database is held");
    }
    let pid = pid.expect("CREATE DATABASE waits");
    scene.server.connect("postgres").execute("select pg_terminate_backend($1)", &[&pid]).expect("terminate");
    thread.join().expect("the thread").expect_err("it was terminated");
    wait::until("the worker is back after its owner was terminated", wait::SHORT, || scene.worker("app"));

    let mut psql = scene.server.command("psql");
    let mut psql =
        psql.args(["-d", "postgres", "-c", create]).stderr(std::process::Stdio::null()).spawn().expect("psql");
    wait::until("the worker has stopped again", wait::SHORT, || scene.worker("app").is_none());
    process::signal(psql.id(), "KILL");
    psql.wait().expect("psql");
    wait::until("the worker is back after the client vanished", wait::SHORT, || scene.worker("app"));
    let mut scene = scene;
    scene.goes_on_in("app");
}

#[test]
fn a_stop_does_not_wait_for_a_request() {
    for mode in [Mode::Fast, Mode::Immediate] {
        let mut scene = scene().in_flight();
        let start = Instant::now();
        scene.server.stop(mode);
        assert!(start.elapsed() < PROMPT, "{mode:?}: {:?}", start.elapsed());
        scene.server.start();
        scene.proxy.set(Fault::Pass);
        let mut client = scene.server.connect("app");
        client.batch_execute(&format!("insert into {} values (5000, 'later')", scene.table)).expect("write");
        wait::until("the worker runs and has seen what was lost", wait::SHORT, || -> bool {
            client.query_one("select exists (select from es_sync.marker)", &[]).expect("marker").get(0)
        });
        expect::table_equal(&mut client, &scene.table, "id", &scene.engine, &scene.table);
        assert!(mode == Mode::Immediate || !scene.server.log().contains("terminated by signal"), "nothing crashed");
    }
}

#[test]
fn a_reload_loses_nothing_that_is_in_flight() {
    for change in [None, Some(("es_sync.connections", "2")), Some(("es_sync.request_timeout", "30s"))] {
        let mut scene = scene().in_flight();
        let before = scene.worker("app");
        if let Some((key, value)) = change {
            scene.server.conf(key, value);
        }
        let start = Instant::now();
        scene.server.reload();
        let table = &scene.table;
        scene.client.batch_execute(&format!("update {table} set title = 'after' where id = 1")).expect("write");
        assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
        scene.goes_on_in("app");
        assert_eq!(scene.worker("app"), before, "the worker needs no restart for that");
    }
}

#[test]
fn drop_extension_and_writers_do_not_deadlock() {
    for statement in [
        "drop extension pg_es_sync cascade",
        "drop extension plpgsql, pg_es_sync cascade",
        "drop schema es_sync cascade",
    ] {
        let mut scene = scene();
        let table = scene.table.clone();
        let parted = unique("parted");
        scene
            .client
            .batch_execute(&format!(
                "create table {parted} (id int primary key) partition by range (id);
                 create table {parted}_one partition of {parted} for values from (0) to (100);
                 select es_sync.attach('{parted}')"
            ))
            .expect("attach");
        expect::settled(&mut scene.client);
        // The table with the higher OID first: DROP, were it to take one after the other, would meet this writer crosswise.
        let mut writer = scene.server.connect("app");
        writer
            .batch_execute(&format!("set deadlock_timeout = '100ms'; begin; insert into {parted} values (1)"))
            .expect("write");
        let mut dropper = scene.server.connect("app");
        let thread = std::thread::spawn(move || {
            dropper.batch_execute("set deadlock_timeout = '100ms'").and_then(|()| dropper.batch_execute(statement))
        });
        wait::until("DROP EXTENSION waits for the writer", wait::SHORT, || -> bool {
            let waits = format!(
                "select count(*) > 0 from pg_stat_activity where wait_event_type = 'Lock' and query = '{statement}'"
            );
            scene.client.query_one(&waits, &[]).expect("activity").get(0)
        });
        writer.batch_execute(&format!("insert into {table} values (6000)")).expect("the writer goes on");
        writer.batch_execute("commit").expect("and commits");
        thread.join().expect("the thread").expect("the extension is dropped");
        let traces = "select count(*) from pg_trigger where tgname like 'es_sync%'";
        assert_eq!(writer.query_one(traces, &[]).expect("triggers").get::<_, i64>(0), 0);
        assert!(!scene.server.log().contains("deadlock detected"));
        scene.unharmed();
    }
}

#[test]
fn defaults_of_database_and_roles_do_not_reach_the_worker() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    // This session began before, so that they do not reach it.
    let mut client = server.create_empty_database("app");
    let table = unique("defaults");
    for (setting, value) in [
        ("default_transaction_isolation", "serializable"),
        ("default_transaction_read_only", "on"),
        ("default_transaction_deferrable", "on"),
        ("statement_timeout", "1ms"),
        ("lock_timeout", "1ms"),
        ("idle_in_transaction_session_timeout", "1ms"),
        ("idle_session_timeout", "1ms"),
        ("search_path", "nowhere"),
        ("role", "harmless"),
        ("row_security", "off"),
        ("session_replication_role", "replica"),
        ("datestyle", "SQL, DMY"),
        ("intervalstyle", "sql_standard"),
        ("timezone", "Pacific/Chatham"),
        ("extra_float_digits", "-10"),
        ("bytea_output", "escape"),
        ("xmlbinary", "hex"),
        ("xmloption", "document"),
        ("standard_conforming_strings", "off"),
        ("transform_null_equals", "on"),
        ("quote_all_identifiers", "on"),
        ("client_encoding", "LATIN1"),
        ("default_tablespace", "pg_default"),
        ("synchronous_commit", "off"),
        ("client_min_messages", "error"),
        ("check_function_bodies", "off"),
    ] {
        client
            .batch_execute("do $$ begin create role harmless; exception when duplicate_object then null; end $$")
            .expect("role");
        let value = if value.contains(',') { value.to_owned() } else { format!("'{value}'") };
        client.batch_execute(&format!("alter database app set {setting} = {value}")).expect(setting);
        client.batch_execute(&format!("alter role all in database app set {setting} = {value}")).expect(setting);
    }
    client
        .batch_execute(&format!(
            "create extension pg_es_sync;
             create table {table} (
                 id int, at timestamptz, primary key (id, at), day date, span interval, real float8, bytes bytea, xml xml,
                 title text
             );
             alter table {table} enable row level security;
             insert into {table}
             select i, '2024-02-01 10:00+00'::timestamptz + i * interval '1 hour', '2024-02-01'::date + i,
                    i * interval '25 hours', i / 3.0, 'bytes', '<a>ä</a>', 'Grüße \\' || i
             from generate_series(1, 500) i;
             select es_sync.attach('{table}')"
        ))
        .expect("attach");
    expect::settled(&mut client);
    // Writers in such sessions, but for what keeps them from writing.
    client
        .batch_execute(&format!(
            "set datestyle = 'SQL, DMY'; set timezone = 'Pacific/Chatham'; set intervalstyle = 'sql_standard';
             set extra_float_digits = -10;
             update {table} set title = 'changed' where id <= 100; delete from {table} where id > 450;
             reset datestyle; reset timezone; reset intervalstyle; reset extra_float_digits"
        ))
        .expect("write");
    expect::settled(&mut client);
    let query = format!(
        "select id || '|' || to_char(at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS') || '+00',
                to_jsonb(t) - 'bytes' - 'span' - 'at' || jsonb_build_object('span', span::text, 'at', at)
         from {table} t"
    );
    client.batch_execute("set timezone = 'UTC'; set intervalstyle = 'iso_8601'").expect("as documents are written");
    expect::documents_equal(&mut client, &query, &engine, &table);
    client.batch_execute(&format!("drop table {table}")).expect("drop");
    wait::until("all traces of the table are gone", wait::SHORT, || -> bool {
        let traces = "select (select count(*) from es_sync.status) + (select count(*) from es_sync.jobs) = 0";
        client.query_one(traces, &[]).expect("traces").get(0)
    });
    assert_eq!(server.unexpected_log_lines(&[]), Vec::<String>::new());
}

#[test]
fn objects_of_another_version_make_the_worker_wait_and_say_so() {
    let mut scene = scene();
    let table = scene.table.clone();
    // As after an installation of a newer library: the server starts with it, the objects are still the old ones.
    scene
        .client
        .batch_execute("update pg_catalog.pg_extension set extversion = '0.0.9' where extname = 'pg_es_sync'")
        .expect("set back");
    scene.server.restart(Mode::Fast);
    scene.client = scene.server.connect("app");
    let cause = wait::until("the status says what is needed", wait::SHORT, || -> Option<String> {
        let status = scene.client.query_one("select state, cause from es_sync.status", &[]).expect("status");
        status.get::<_, Option<String>>(1).filter(|_| status.get::<_, String>(0) == "waiting")
    });
    assert!(cause.contains("ALTER EXTENSION pg_es_sync UPDATE"), "{cause}");
    scene.client.batch_execute(&format!("update {table} set title = 'meanwhile'")).expect("writers go on");
    scene
        .client
        .batch_execute(
            "update pg_catalog.pg_extension set extversion = default_version
                        from pg_catalog.pg_available_extensions where name = extname and extname = 'pg_es_sync'",
        )
        .expect("update");
    scene.goes_on_in("app");
    assert_eq!(scene.server.log().matches("needs ALTER EXTENSION").count(), 1, "said once");
}

#[test]
fn without_preload_writers_go_on_and_their_changes_arrive_later() {
    let mut scene = scene();
    let table = scene.table.clone();
    scene.server.conf("shared_preload_libraries", "");
    scene.server.restart(Mode::Fast);
    let mut client = scene.server.connect("app");
    client
        .batch_execute(&format!(
            "update {table} set title = 'late ' || id where id <= 300; delete from {table} where id > 950;
             begin; insert into {table} select i, 'prepared' from generate_series(2000, 2100) i; prepare transaction 'late'"
        ))
        .expect("writers need no preloaded library");
    let error = client.batch_execute("create table refused (id int primary key); select es_sync.attach('refused')");
    let error = error.expect_err("attach is refused");
    let error = error.as_db_error().expect("an error of the server");
    assert_eq!(error.code().code(), "55000");
    assert!(error.hint().is_some_and(|hint| hint.contains("shared_preload_libraries")), "{error:?}");
    let state: String = client.query_one("select state from es_sync.status", &[]).expect("status").get(0);
    assert_eq!(state, "no worker");
    scene.server.conf("shared_preload_libraries", "pg_es_sync");
    scene.server.restart(Mode::Fast);
    let mut client = scene.server.connect("app");
    client
        .batch_execute("commit prepared 'late'")
        .and_then(|()| client.batch_execute(&format!("update {table} set title = 'new' where id = 1")))
        .expect("write");
    expect::table_equal(&mut client, &table, "id", &scene.engine, &table);
    let builds: i64 = client.query_one("select count(*) from es_sync.jobs", &[]).expect("jobs").get(0);
    assert_eq!(builds, 1, "the queue was kept: nothing had to be built anew");
    scene.unharmed();
}

#[test]
fn a_database_among_many_gets_its_worker_however_few_places_there_are() {
    let engine = Engine::elasticsearch();
    // One for the launcher, one for that of logical replication, one for a worker.
    let server = Server::builder().conf("es_sync.url", engine.url()).conf("max_worker_processes", 3).start();
    let mut admin = server.connect("postgres");
    for number in 0..25 {
        admin.batch_execute(&format!("create database other_{number}")).expect("create a database");
    }
    let mut client = server.create_database("app");
    let name = unique("among_many");
    client
        .batch_execute(&format!("create table {name} (id int primary key); select es_sync.attach('{name}')"))
        .expect("set up");
    client.batch_execute(&format!("insert into {name} values (1)")).expect("write");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
}

#[test]
fn a_database_whose_drop_was_interrupted_is_left_alone() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut admin = server.connect("postgres");
    admin.batch_execute("create database half allow_connections false").expect("create a database");
    admin
        .batch_execute("update pg_database set datallowconn = true, datconnlimit = -2 where datname = 'half'")
        .expect("what an interrupted DROP DATABASE leaves");
    // The launcher looks at all databases when the extension has come to one.
    let mut client = server.create_database("app");
    let name = unique("beside");
    client
        .batch_execute(&format!("create table {name} (id int primary key); select es_sync.attach('{name}')"))
        .expect("set up");
    expect::table_equal(&mut client, &name, "id", &engine, &name);
    let log = server.log();
    assert!(!log.contains("cannot connect to invalid database"), "{log}");
}

#[test]
fn launcher_and_worker_come_back_when_they_are_terminated() {
    let mut scene = scene().in_flight();
    let mut admin = scene.server.connect("postgres");
    let mut terminate = |kind: &str, server: &Server| {
        let workers = server.workers();
        let pid = workers.iter().find(|worker| worker.1.ends_with(kind)).map(|worker| worker.0).expect(kind);
        admin.execute("select pg_terminate_backend($1)", &[&(pid as i32)]).expect("terminate");
        wait::until("another has taken its place", wait::SHORT, || {
            let workers = server.workers();
            if workers.iter().any(|worker| worker.0 != pid && worker.1.ends_with(kind))
                && workers.iter().all(|worker| worker.0 != pid)
            {
                Ok(())
            } else {
                Err(workers)
            }
        });
    };
    terminate("worker", &scene.server);
    let before = scene.worker("app");
    terminate("launcher", &scene.server);
    assert_eq!(scene.worker("app"), before, "a new launcher leaves a running worker alone");
    terminate("worker", &scene.server);
    scene.goes_on_in("app");
    assert_eq!(scene.server.workers().len(), 2, "one launcher, one worker");
}
