//! Hard cases of partitions that come and go: what moves under a load, what is asked for twice, and what the rights of a
//! single partition hide.

use std::time::Duration;

use pg_es_sync_tests::{Engine, Fault, Proxy, Server, expect, named, unique, wait};
use postgres::Client;

struct Parted {
    engine: Engine,
    proxy: Proxy,
    server: Server,
    client: Client,
    /// `{T}` in statements.
    name: String,
}

/// A partitioned table {T} with 100 rows in {T}_a.
const SETUP: &str = "
    create table {T} (id int primary key, title text, note text) partition by range (id);
    create table {T}_a partition of {T} for values from (0) to (1000);
    insert into {T} select i, 'thing ' || i, 'note' from generate_series(1, 100) i";
/// A table {T}_b that fits, of some hundreds of pages with room in the first ones.
const ROOMY: &str = "
    create table {T}_b (like {T} including indexes);
    insert into {T}_b select i, 'thing ' || i, repeat('x', 200) from generate_series(1000, 19999) i;
    delete from {T}_b where id < 1500;
    vacuum {T}_b";
/// Both as one table that is followed.
const FOLLOWED: &str = "
    alter table {T} attach partition {T}_b for values from (1000) to (20000);
    select es_sync.attach('{T}')";

impl Parted {
    #[track_caller]
    fn new(setup: &str) -> Parted {
        let engine = Engine::elasticsearch();
        let proxy = Proxy::to(engine.url());
        let server = Server::with_url(proxy.url());
        let client = server.create_database("app");
        let mut parted = Parted { engine, proxy, server, client, name: unique("loads") };
        parted.run(setup);
        expect::settled(&mut parted.client);
        parted
    }

    /// One after the other: VACUUM wants to be alone.
    #[track_caller]
    fn run(&mut self, statements: &str) {
        for statement in statements.split(';').filter(|text| !text.trim().is_empty()) {
            named::run(&mut self.client, &self.name, statement);
        }
    }

    #[track_caller]
    fn number(&mut self, query: &str) -> i64 {
        named::number(&mut self.client, &self.name, query)
    }

    #[track_caller]
    fn equal(&mut self) {
        expect::table_equal(&mut self.client, &self.name, "id", &self.engine, &self.name);
    }

    /// Attaches {T}_b as a partition, and returns while its first pages are on their way.
    #[track_caller]
    fn begin_load(&mut self) {
        self.proxy.set_for("_bulk", Fault::Delay(Duration::from_secs(1)));
        self.run("alter table {T} attach partition {T}_b for values from (1000) to (20000)");
        wait::until("some of the partition is enqueued", wait::LONG, || {
            self.number("select coalesce(max(done), 0) from es_sync.jobs where kind = 'partition'") > 0
        });
    }
}

#[test]
fn rows_that_a_skipped_update_moves_into_read_blocks_are_loaded() {
    let mut parted = Parted::new(&format!("{SETUP}; select es_sync.attach('{{T}}', exclude => '{{note}}')"));
    // Only now: VACUUM leaves what the first load's snapshot still sees.
    parted.run(ROOMY);
    parted.begin_load();
    // In a session that does not remember the page that it wrote to last.
    let update = format!("update {} set note = repeat('y', 200) where id > 19700", parted.name);
    parted.server.connect("app").batch_execute(&update).expect("update");
    let moved = "select count(*) from {T}_b where id > 19700 and (ctid::text::point)[0] < 20";
    assert!(parted.number(moved) > 100, "the rows were to move to the first pages");
    parted.proxy.set(Fault::Pass);
    expect::settled(&mut parted.client);
    let documents = format!("select id, json_build_object('id', id, 'title', title) from {}", parted.name);
    expect::documents_equal(&mut parted.client, &documents, &parted.engine, &parted.name);
}

#[test]
fn a_partition_that_is_rewritten_while_it_is_loaded_is_loaded_whole() {
    for statement in ["vacuum full {T}_b", "cluster {T}_b using {T}_b_pkey", "alter table {T}_b set unlogged"] {
        let mut parted = Parted::new(&format!("{SETUP}; select es_sync.attach('{{T}}')"));
        parted.run(ROOMY);
        // Without a note of the rows: nothing that documents show changes.
        parted.run("delete from {T}_b where id between 3000 and 15000");
        parted.begin_load();
        parted.run(statement);
        parted.proxy.set(Fault::Pass);
        expect::settled(&mut parted.client);
        parted.equal();
    }
}

#[test]
fn an_index_that_was_left_behind_while_a_partition_went_is_compared_as_a_whole() {
    let mut parted = Parted::new(&format!("{SETUP}; {ROOMY}"));
    parted.run(
        "alter table {T} attach partition {T}_b for values from (1000) to (20000);
         select es_sync.attach('{T}');
         select es_sync.attach('{T}', '{T}_second')",
    );
    expect::settled(&mut parted.client);
    parted.run("select es_sync.pause('{T}', '{T}_second'); alter table {T} detach partition {T}_b");
    wait::until("the search for its documents waits", wait::LONG, || {
        parted.number("select count(*) from es_sync.jobs where index = '{T}_second' and orphans_only") == 1
    });
    parted.run("update {T} set title = 'changed meanwhile'; insert into {T} values (500, 'new', 'new')");
    let wait = format!("select es_sync.wait('{}', '1 s')", parted.name);
    let _ = parted.client.query_one(&wait, &[]);
    parted.run("select es_sync.resume('{T}', '{T}_second')");
    expect::settled(&mut parted.client);
    parted.equal();
    let second = format!("{}_second", parted.name);
    expect::table_equal(&mut parted.client, &parted.name.clone(), "id", &parted.engine, &second);
}

#[test]
fn a_partition_that_is_emptied_again_and_again_is_swept_all_the_same() {
    let mut parted = Parted::new(&format!("{SETUP}; {ROOMY}; {FOLLOWED}"));
    // So the ids take longer than it is until the next TRUNCATE.
    parted.proxy.set_for("_search", Fault::Delay(Duration::from_millis(500)));
    let (engine, name) = (&parted.engine, parted.name.clone());
    wait::until("its documents are gone", wait::LONG, || {
        let truncate = format!("truncate {name}_b");
        parted.client.batch_execute(&truncate).expect("truncate");
        std::thread::sleep(Duration::from_millis(200));
        engine.refresh(&name);
        let left = engine.count(&name);
        if left == 100 { Ok(()) } else { Err(left) }
    });
    parted.proxy.set(Fault::Pass);
    parted.equal();
}

#[test]
fn a_comparison_under_way_goes_on_when_a_partition_goes_and_mends_nothing_if_it_was_not_to() {
    let mut parted = Parted::new(&format!("{SETUP}; {ROOMY}; {FOLLOWED}"));
    parted.proxy.set_for("_mget", Fault::Hold);
    parted.run("select es_sync.verify('{T}', sample => 0.5)");
    wait::until("documents are compared", wait::SHORT, || !parted.proxy.seen("_mget").is_empty());
    parted.run("truncate {T}_b");
    let comparisons = "select count(*) from es_sync.job where kind = 'verify'";
    let as_asked = format!("{comparisons} and state = 'running' and not repair and sample = 0.5");
    assert_eq!(parted.number(&as_asked), 1, "it neither began again nor became another one");
    parted.proxy.set(Fault::Pass);
    expect::settled(&mut parted.client);
    parted.equal();
    assert_eq!(parted.number(&format!("{comparisons} and state = 'done' and not repair and sample = 0.5")), 1);
    assert_eq!(parted.number(&format!("{comparisons} and state = 'done' and orphans_only")), 1);
}

#[test]
fn truncating_a_partition_reaches_documents_in_others_that_showed_its_rows() {
    let mut parted = Parted::new(
        "create table {T} (id int primary key, parent int, title text) partition by range (id);
         create table {T}_a partition of {T} for values from (0) to (1000);
         create table {T}_b partition of {T} for values from (1000) to (2000);
         insert into {T} select i, null, 'parent ' || i from generate_series(1, 50) i;
         insert into {T} select 1000 + i, i, 'child ' || i from generate_series(1, 50) i;
         create view {T}_document as
             select t.id, t.title, (select array_agg(c.title) from {T} c where c.parent = t.id) as children from {T} t;
         select es_sync.attach('{T}', document => '{T}_document')",
    );
    parted.run("truncate {T}_b");
    expect::settled(&mut parted.client);
    let documents = format!("select id, row_to_json(d) from {}_document d", parted.name);
    expect::documents_equal(&mut parted.client, &documents, &parted.engine, &parted.name);
}

#[test]
fn a_partition_whose_policies_hold_for_its_owner_is_loaded_as_a_part_of_the_whole() {
    let mut parted = Parted::new(
        "create role tenant;
         grant create on schema public to tenant;
         grant usage on schema es_sync to tenant;
         grant execute on all routines in schema es_sync to tenant;
         set role tenant;
         create table {T} (id int primary key, title text) partition by range (id);
         create table {T}_a partition of {T} for values from (0) to (1000);
         insert into {T} select i, 'thing ' || i from generate_series(1, 100) i;
         select es_sync.attach('{T}');
         reset role",
    );
    parted.run(
        "set role tenant;
         create table {T}_b (like {T} including indexes);
         insert into {T}_b select i, 'thing ' || i from generate_series(1000, 1999) i;
         alter table {T}_b enable row level security;
         alter table {T}_b force row level security;
         alter table {T} attach partition {T}_b for values from (1000) to (2000);
         reset role",
    );
    expect::settled(&mut parted.client);
    parted.equal();
    assert!(parted.server.log().contains("1000 documents missing"));
}
