//! Rows that no client writes itself: applied by a subscription, cascaded by a foreign key, restored from a dump.

use pg_es_sync_tests::named::run;
use pg_es_sync_tests::{Engine, Server, expect, process, unique, wait};
use postgres::Client;

/// Partitioned table {T}, whose documents are its rows, and table {T}_orders, whose documents show its {T}_items.
struct Scene {
    engine: Engine,
    server: Server,
    client: Client,
    name: String,
}

const TABLES: &str = "
    create table {T} (id int, region text, title text, primary key (region, id)) partition by list (region);
    create table {T}_a partition of {T} for values in ('a');
    create table {T}_rest partition of {T} default;
    create table {T}_items (id int primary key, order_id int, name text)";

/// Like `TABLES`, where they come from.
const SOURCE: &str = "
    create table {T} (id int, region text, title text, primary key (region, id));
    create table {T}_items (id int primary key, order_id int, name text)";

const ROWS: &str = "
    insert into {T} select i, (array['a', 'b', 'c'])[1 + i % 3], 'thing ' || i from generate_series(1, 600) i;
    insert into {T}_items select i, 1 + i % 50, 'item ' || i from generate_series(1, 300) i";

impl Scene {
    #[track_caller]
    fn new(tables: &str) -> Scene {
        Scene::on(Engine::elasticsearch(), tables)
    }

    #[track_caller]
    fn on(engine: Engine, tables: &str) -> Scene {
        let server = Server::with(&engine);
        let client = server.create_database("app");
        let mut scene = Scene { engine, server, client, name: unique("upstream") };
        scene.run(tables);
        scene.run(
            "create table {T}_orders (id int primary key, title text);
             insert into {T}_orders select i, 'order ' || i from generate_series(1, 60) i;
             create view {T}_document as select o.id, o.title,
                 (select jsonb_agg(jsonb_build_object('id', i.id, 'name', i.name) order by i.id)
                  from {T}_items i where i.order_id = o.id) as items
             from {T}_orders o;
             select es_sync.attach('{T}'), es_sync.attach('{T}_orders', document => '{T}_document')",
        );
        scene.equal();
        scene
    }

    #[track_caller]
    fn run(&mut self, statements: &str) {
        let name = self.name.clone();
        run(&mut self.client, &name, statements);
    }

    /// What the two indexes should hold: the query and the index.
    fn documents(&self) -> [(String, String); 2] {
        let name = &self.name;
        [
            (format!("select region || '|' || id, row_to_json(t) from {name} t"), name.clone()),
            (format!("select id, row_to_json(d) from {name}_document d"), format!("{name}_orders")),
        ]
    }

    #[track_caller]
    fn equal(&mut self) {
        expect::settled(&mut self.client);
        for (query, index) in self.documents() {
            expect::documents_equal(&mut self.client, &query, &self.engine, &index);
        }
    }

    /// As `equal`, where nobody can say when what was missed is noticed.
    #[track_caller]
    fn becomes_equal(&mut self) {
        for (query, index) in self.documents() {
            wait::until("what was missed is mended", wait::LONG, || {
                self.engine.refresh(&index);
                expect::compare(&mut self.client, &query, &self.engine, &index)
            });
        }
        let lame = "select count(*) from pg_trigger where tgname like 'es\\_sync%' and tgenabled <> 'A'";
        wait::until_equal("all triggers fire always", wait::SHORT, 0, || -> i64 {
            self.client.query_one(lame, &[]).expect("triggers").get(0)
        });
    }
}

/// Waits until the subscriber's tables hold what the publisher's do.
#[track_caller]
fn applied(source: &mut Client, scene: &mut Scene) {
    let rows = "select (select count(*) || ' ' || coalesce(sum(hashtext(row(id, region, title)::text)), 0) from {T}),
                       (select count(*) || ' ' || coalesce(sum(hashtext(row(id, order_id, name)::text)), 0) from {T}_items)"
        .replace("{T}", &scene.name);
    let contents = |client: &mut Client| {
        let row = client.query_one(&rows, &[]).expect("contents");
        (row.get::<_, String>(0), row.get::<_, String>(1))
    };
    let wanted = contents(source);
    wait::until_equal("the subscription has applied everything", wait::LONG, wanted, || contents(&mut scene.client));
}

#[test]
fn a_subscription_is_captured_from_its_first_copy_on_in_partitions_and_in_tables_that_a_view_reads() {
    let publisher = Server::builder().start();
    let mut source = publisher.create_empty_database("source");
    let mut scene = Scene::new(TABLES);
    let name = scene.name.clone();
    run(&mut source, &name, SOURCE);
    run(&mut source, &name, ROWS);
    run(&mut source, &name, "create publication everything for all tables");
    scene.run(&format!("create subscription follower connection '{}' publication everything", publisher.url("source")));
    applied(&mut source, &mut scene);
    scene.equal();
    for statements in [
        "insert into {T} values (1000, 'a', 'streamed'), (1001, 'zz', 'streamed'); update {T} set title = 'streamed' where id <= 20;
         delete from {T} where id between 30 and 40",
        // It moves between the subscriber's partitions.
        "update {T} set region = 'b' where region = 'a' and id < 300",
        "insert into {T}_items values (1000, 7, 'streamed'); update {T}_items set order_id = 8 where order_id = 9;
         delete from {T}_items where id < 20",
        "begin; update {T}_items set id = id + 10000 where id > 250; update {T} set id = id + 10000 where id > 500; commit",
        "truncate {T}_items; insert into {T}_items values (1, 1, 'after')",
        "truncate {T}; insert into {T} values (1, 'a', 'after')",
    ] {
        run(&mut source, &name, statements);
        applied(&mut source, &mut scene);
        scene.equal();
    }
    scene.run("drop subscription follower");
}

#[test]
fn cascades_reach_partitions_and_documents_that_show_the_rows() {
    let mut scene = Scene::new(
        "create table {T}_hosts (id int primary key, other int unique);
         insert into {T}_hosts select i, i from generate_series(1, 12) i;
         create table {T} (id int, region text, host int references {T}_hosts on delete cascade on update cascade,
             friend int references {T}_hosts (other) on delete set null on update cascade, primary key (region, id))
             partition by list (region);
         create table {T}_a partition of {T} for values in ('a'); create table {T}_rest partition of {T} default;
         insert into {T} select i, (array['a', 'b', 'c'])[1 + i % 3], 1 + i % 12, 1 + i % 11 from generate_series(1, 300) i;
         create table {T}_groups (id int primary key, host int references {T}_hosts on delete cascade);
         insert into {T}_groups select i, 1 + i % 12 from generate_series(1, 60) i;
         create table {T}_items (id int primary key, order_id int references {T}_groups on delete cascade on update cascade, name text,
             host int references {T}_hosts on delete set null);
         insert into {T}_items select i, 1 + i % 60, 'item', 1 + i % 12 from generate_series(1, 300) i",
    );
    for statement in [
        "delete from {T}_hosts where id = 1",
        "update {T}_hosts set other = 30 where id = 3",
        "update {T}_groups set id = 1000 where id = 2",
        "update {T}_groups set id = 2 where id = 3",
        "delete from {T}_groups where id > 50",
        "begin; set local session_replication_role = origin; delete from {T}_hosts where id in (4, 5); commit",
    ] {
        scene.run(statement);
        scene.equal();
    }
}

#[test]
fn a_dump_restored_with_triggers_disabled_is_repaired() {
    let mut scene = Scene::on(Engine::opensearch(), TABLES);
    let name = scene.name.clone();
    let mut source = scene.server.create_empty_database("source");
    run(&mut source, &name, TABLES);
    run(&mut source, &name, ROWS);
    let folder = process::server_folder("dump");
    for options in [&["--disable-triggers"][..], &["--disable-triggers", "--rows-per-insert=50"]] {
        let file = folder.path().join("data.sql");
        let mut dump = scene.server.command("pg_dump");
        dump.args(["-d", "source", "--data-only"]).args(options).arg("-f").arg(&file);
        assert!(dump.status().expect("pg_dump").success());
        let mut restore = scene.server.command("psql");
        restore.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", "app", "-f"]).arg(&file);
        assert!(restore.stdout(std::process::Stdio::null()).status().expect("psql").success());
        scene.becomes_equal();
        scene.run("truncate {T}, {T}_items");
        scene.equal();
    }
}

#[test]
fn triggers_switched_off_on_one_partition_or_on_a_table_that_a_view_reads_are_noticed() {
    let mut scene = Scene::new(&format!("{TABLES}; {ROWS}"));
    for statements in [
        "begin; alter table {T}_a disable trigger all; update {T} set title = 'missed'; delete from {T}_a where id < 100;
         alter table {T}_a enable trigger all; commit",
        "begin; alter table {T} disable trigger es_sync_capture; update {T} set title = 'missed again';
         alter table {T} enable trigger es_sync_capture; commit",
        "begin; alter table {T}_items disable trigger all; update {T}_items set name = 'missed', order_id = order_id + 1;
         alter table {T}_items enable trigger all; commit",
        // Nobody switches it on again.
        "begin; alter table {T}_items disable trigger user; delete from {T}_items where id < 100; commit",
        "begin; alter table {T}_a enable replica trigger es_sync_capture; delete from {T}_a where id < 200; commit",
    ] {
        scene.run(statements);
        scene.becomes_equal();
    }
    scene.run("update {T} set title = 'captured'; update {T}_items set name = 'captured'");
    scene.equal();
}

#[test]
fn writes_as_a_replica_are_captured_in_partitions_and_in_tables_that_a_view_reads() {
    let mut scene = Scene::new(&format!("{TABLES}; {ROWS}"));
    scene.run("set session_replication_role = replica");
    for statement in [
        "update {T}_a set title = 'as a replica'; delete from {T}_rest where id < 50; insert into {T} values (5000, 'new', 'x')",
        "create table {T}_d partition of {T} for values in ('d'); insert into {T} values (5001, 'd', 'x')",
        "update {T}_items set order_id = 3 where id < 50; delete from {T}_items where id > 290",
        "update {T} set region = 'd' where region = 'a'",
    ] {
        scene.run(statement);
        scene.equal();
    }
}
