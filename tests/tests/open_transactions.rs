//! What somebody has paused, cancelled or locked, and not committed, keeps nobody else waiting.

use std::time::{Duration, Instant};

use pg_es_sync_tests::{Engine, Server, expect, named, unique, wait};
use postgres::Client;

/// A table {T} (id, region, title, note), partitioned by region and attached, and one beside it, {T}_other.
struct Setting {
    engine: Engine,
    server: Server,
    client: Client,
    name: String,
}

impl Setting {
    fn new(attach: &str) -> Setting {
        let engine = Engine::elasticsearch();
        let server = Server::with(&engine);
        let client = server.create_database("app");
        let mut setting = Setting { engine, server, client, name: unique("open") };
        setting.run(
            "create table {T} (id int primary key, region int, title text, note text) partition by range (id);
             create table {T}_a partition of {T} for values from (0) to (1000);
             create table {T}_b partition of {T} for values from (1000) to (2000);
             insert into {T} select i, i % 5, 'title ' || i, 'note ' || i from generate_series(1, 1500) i;
             create view {T}_document as select id, title from {T};
             create table {T}_other (id int primary key, title text);
             insert into {T}_other select i, 'title ' || i from generate_series(1, 10) i;
             select es_sync.attach('{T}_other')",
        );
        setting.run(attach);
        expect::settled(&mut setting.client);
        setting
    }

    #[track_caller]
    fn run(&mut self, statements: &str) {
        named::run(&mut self.client, &self.name, statements);
    }

    /// A session whose transaction stays open.
    #[track_caller]
    fn open(&self, statements: &str) -> Client {
        let mut open = self.server.connect("app");
        open.batch_execute(&format!("begin; {}", statements.replace("{T}", &self.name))).expect("a transaction");
        open
    }

    /// Changes of the other table arrive one after the other; each wait for a lock would take two seconds.
    #[track_caller]
    fn others_go_on(&mut self) {
        let start = Instant::now();
        for round in 0..10 {
            self.run(&format!("update {{T}}_other set title = 'round {round}' where id = 1"));
            let wait = format!("select es_sync.wait('{}_other', '10 s')", self.name);
            assert!(self.client.query_one(&wait, &[]).expect("wait").get::<_, bool>(0), "round {round}");
        }
        assert!(start.elapsed() < Duration::from_secs(15), "ten changes took {:?}", start.elapsed());
    }

    fn worker_waits(&mut self) -> bool {
        let waits = "select wait_event_type is not distinct from 'Lock' from pg_stat_activity
                      where backend_type = 'es_sync worker' and datname = 'app'";
        self.client.query_one(waits, &[]).expect("activity").get(0)
    }

    /// The worker comes to the lock, and does other things than to wait for it.
    #[track_caller]
    fn worker_waits_seldom(&mut self) {
        wait::until("the worker comes to the lock", wait::SHORT, || self.worker_waits());
        let (mut looks, mut waiting) = (0, 0);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(4) {
            waiting += i32::from(self.worker_waits());
            looks += 1;
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(waiting * 2 < looks, "{waiting} of {looks}");
    }

    #[track_caller]
    fn equal(&mut self, mut open: Client, query: &str) {
        open.batch_execute("rollback").expect("rollback");
        expect::settled(&mut self.client);
        expect::documents_equal(&mut self.client, &query.replace("{T}", &self.name), &self.engine, &self.name);
        assert_eq!(self.server.unexpected_log_lines(&[]), Vec::<String>::new());
    }
}

const ROWS: &str = "select id, row_to_json(t) from {T} t";
const DOCUMENTS: &str = "select id, row_to_json(d) from {T}_document d";

#[test]
fn a_pause_keeps_no_other_table_waiting_while_partitions_come_and_go() {
    let mut setting = Setting::new("select es_sync.attach('{T}')");
    let open = setting.open("select es_sync.pause('{T}')");
    setting.run(
        "create table {T}_c (like {T}); insert into {T}_c select i, 1, 'c', 'c' from generate_series(2000, 2100) i;
         alter table {T}_c alter id set not null, add primary key (id);
         alter table {T} attach partition {T}_c for values from (2000) to (3000);
         alter table {T} detach partition {T}_b",
    );
    setting.others_go_on();
    setting.equal(open, ROWS);
}

#[test]
fn a_pause_keeps_no_other_table_waiting_while_the_table_is_truncated() {
    let mut setting = Setting::new("select es_sync.attach('{T}')");
    let open = setting.open("select es_sync.pause('{T}')");
    setting.run("truncate {T}; insert into {T} values (7, 7, 'seven', 'seven')");
    setting.others_go_on();
    setting.run("truncate {T}_b");
    setting.others_go_on();
    setting.equal(open, ROWS);
}

#[test]
fn a_pause_keeps_neither_writers_nor_other_tables_waiting_while_the_view_changes() {
    let mut setting = Setting::new("select es_sync.attach('{T}', document => '{T}_document')");
    let open = setting.open("select es_sync.pause('{T}')");
    setting.run("create or replace view {T}_document as select id, title, note from {T}");
    setting.others_go_on();
    // A writer of the table itself: whoever changes its triggers must not hold it for long.
    for id in 1..=20 {
        setting.run(&format!("set statement_timeout = '5s'; update {{T}} set note = 'later' where id = {id}"));
        setting.run("set statement_timeout = 0");
    }
    setting.others_go_on();
    setting.equal(open, DOCUMENTS);
}

#[test]
fn a_dead_letter_that_is_being_discarded_keeps_no_table_waiting() {
    let mut setting = Setting::new("select es_sync.attach('{T}', filter => '10 / region > 0')");
    setting.run("update {T} set title = 'again' where id = 5");
    wait::until("there are dead letters", wait::LONG, || {
        let count = setting.client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("letters");
        count.get::<_, i64>(0) > 0
    });
    let open = setting.open("select es_sync.discard_dead_letters()");
    // One of them can be indexed by now, another one fails again.
    setting.run("update {T} set region = 1 where id = 5; update {T} set title = 'once more' where id = 10");
    setting.others_go_on();
    setting.equal(open, "select id, row_to_json(t) from {T} t where region > 0");
}

#[test]
fn a_partition_that_is_locked_keeps_no_other_table_waiting_while_rights_are_granted() {
    let mut setting = Setting::new("select es_sync.attach('{T}')");
    let open = setting.open("lock table {T}_b in access exclusive mode");
    setting.run("grant select on {T} to public");
    setting.others_go_on();
    setting.equal(open, ROWS);
}

#[test]
fn a_locked_table_keeps_no_other_waiting_while_its_changes_are_to_be_read() {
    let mut setting = Setting::new(r#"select es_sync.attach('{T}', options => '{"delay": "2s"}')"#);
    // Read once, so that it need not be looked at first.
    setting.run("update {T} set note = 'read' where id = 1");
    expect::settled(&mut setting.client);
    setting.run("update {T} set note = 'unread'");
    let open = setting.open("lock table {T} in access exclusive mode");
    setting.worker_waits_seldom();
    setting.others_go_on();
    setting.equal(open, ROWS);
}

#[test]
fn a_locked_table_keeps_no_other_waiting_while_rows_lead_to_its_documents() {
    let mut setting = Setting::new(
        "create table {T}_text (id int primary key, body text);
         insert into {T}_text select i, 'body ' || i from generate_series(1, 100) i;
         create or replace view {T}_document as
             select t.id, t.title, x.body from {T} t left join {T}_text x on x.id = t.region;
         select es_sync.attach('{T}', document => '{T}_document')",
    );
    setting.run("select es_sync.pause('{T}'); update {T}_text set body = 'unread' where id = 2");
    let open = setting.open("lock table {T} in access exclusive mode");
    setting.run("select es_sync.resume('{T}')");
    setting.worker_waits_seldom();
    setting.others_go_on();
    setting.equal(open, DOCUMENTS);
}

#[test]
fn a_table_that_is_being_altered_keeps_no_other_table_waiting_while_it_is_compared() {
    let mut setting = Setting::new("select es_sync.attach('{T}'), es_sync.attach('{T}', '{T}_second')");
    setting.run("select es_sync.reindex('{T}'), es_sync.verify('{T}', '{T}_second')");
    let open = setting.open("alter table {T} add column more int");
    setting.others_go_on();
    setting.equal(open, ROWS);
}

#[test]
fn tables_attached_by_transactions_at_the_same_time_keep_their_changes_apart() {
    let mut setting = Setting::new("create table {T}_second (like {T} including indexes)");
    setting.run("insert into {T}_second select i, i % 3, 'second', 'note' from generate_series(1, 50) i");
    let attach = r#"select es_sync.attach('{T}', options => '{"routing": "region"}')"#;
    let mut one = setting.open(attach);
    let (mut two, second) = (setting.server.connect("app"), attach.replace("{T}", &format!("{}_second", setting.name)));
    let two = std::thread::spawn(move || two.batch_execute(&second).expect("attach"));
    wait::until("the second one waits for the first one", wait::SHORT, || -> bool {
        let waits = "select count(*) > 0 from pg_stat_activity where wait_event_type = 'Lock'";
        setting.client.query_one(waits, &[]).expect("activity").get(0)
    });
    one.batch_execute("commit").expect("commit");
    two.join().expect("the second one");
    expect::settled(&mut setting.client);
    setting.run(
        "delete from {T} where id = 3; update {T} set region = 9 where id = 4;
         delete from {T}_second where id = 5; update {T}_second set region = 9 where id = 6",
    );
    for name in ["{T}", "{T}_second"].map(|name| name.replace("{T}", &setting.name)) {
        expect::table_equal(&mut setting.client, &name, "id", &setting.engine, &name);
    }
}
