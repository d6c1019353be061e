//! Partitions that come, go and change, while their table is attached or while documents show its rows.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pg_es_sync_tests::{Engine, Fault, Mode, Proxy, Raise, Server, expect, named, unique, wait};
use postgres::{Client, IsolationLevel};

/// A partitioned table {T} (id, region, title) with rows 1 to 900 in {T}_a, {T}_b and {T}_rest, attached and loaded.
struct Parted {
    engine: Engine,
    proxy: Proxy,
    server: Server,
    client: Client,
    name: String,
}

const REGIONS: &str = "
    create table {T} (id int, region text, title text, primary key (region, id)) partition by list (region);
    create table {T}_a partition of {T} for values in ('a');
    create table {T}_b partition of {T} for values in ('b');
    create table {T}_rest partition of {T} default;
    insert into {T} select i, (array['a', 'b', 'x'])[1 + i % 3], 'thing ' || i from generate_series(1, 900) i";

impl Parted {
    #[track_caller]
    fn new() -> Parted {
        Parted::of(REGIONS)
    }

    /// As `new`, with a table {T} of one's own making.
    #[track_caller]
    fn of(setup: &str) -> Parted {
        Parted::on(Engine::elasticsearch(), setup)
    }

    #[track_caller]
    fn on(engine: Engine, setup: &str) -> Parted {
        let mut parted = Parted::with(engine, setup);
        parted.run("select es_sync.attach('{T}')");
        expect::settled(&mut parted.client);
        parted
    }

    #[track_caller]
    fn without_attachment(setup: &str) -> Parted {
        Parted::with(Engine::elasticsearch(), setup)
    }

    #[track_caller]
    fn with(engine: Engine, setup: &str) -> Parted {
        let proxy = Proxy::to(engine.url());
        let server = Server::with_url(proxy.url());
        let client = server.create_database("app");
        let mut parted = Parted { engine, proxy, server, client, name: unique("parted") };
        parted.run(setup);
        parted
    }

    #[track_caller]
    fn run(&mut self, statements: &str) {
        named::run(&mut self.client, &self.name, statements);
    }

    #[track_caller]
    fn number(&mut self, query: &str) -> i64 {
        named::number(&mut self.client, &self.name, query)
    }

    #[track_caller]
    fn equal(&mut self) {
        expect::table_equal(&mut self.client, &self.name, "region || '|' || id", &self.engine, &self.name);
    }

    /// As `equal`, for a table of another key.
    #[track_caller]
    fn equal_by_id(&mut self) {
        expect::table_equal(&mut self.client, &self.name, "id", &self.engine, &self.name);
    }

    /// Asserts that the index was never built anew.
    #[track_caller]
    fn nothing_was_rebuilt(&mut self) {
        assert_eq!(self.number("select count(*) from es_sync.job where kind in ('load', 'reindex')"), 1);
        assert_eq!(self.engine.indexes_of(&self.name), [format!("{}-1", self.name)]);
    }

    /// Runs each statement and compares; none of them rebuilds.
    #[track_caller]
    fn each(&mut self, statements: &[&str]) {
        for statement in statements {
            self.run(statement);
            self.equal();
        }
        self.nothing_was_rebuilt();
    }
}

/// A table {T}_c that fits region c, with rows.
const FILLED: &str = "create table {T}_c (title text, gone int, id int not null, region text not null);
    alter table {T}_c drop column gone;
    insert into {T}_c select 'brought along ' || i, i, 'c' from generate_series(1, 20000) i";

#[test]
fn changes_through_the_root_and_through_partitions_are_captured() {
    Parted::new().each(&[
        "insert into {T} values (1001, 'a', 'new'), (1002, 'zz', 'new')",
        "insert into {T}_b values (1003, 'b', 'by itself'); insert into {T}_rest values (1004, 'yy', 'by itself')",
        "update {T} set title = 'changed' where id <= 30",
        "update {T}_a set title = 'by itself' where id <= 60",
        "delete from {T} where id between 61 and 80",
        "delete from {T}_rest where id between 81 and 120",
        "with gone as (delete from {T}_a where id < 200 returning *) insert into {T}_b select id, 'b', title from gone",
        "insert into {T} values (300, 'a', 'conflict'), (5000, 'a', 'none')
             on conflict (region, id) do update set title = excluded.title",
        "merge into {T} using (values (303, 'a', 'merged'), (306, 'a', null), (6000, 'b', 'new')) m (id, region, title)
             on {T}.id = m.id and {T}.region = m.region
         when matched and m.title is null then delete
         when matched then update set title = m.title
         when not matched then insert values (m.id, m.region, m.title)",
        "begin; declare c cursor for select * from {T} for update; fetch 2 from c;
         update {T} set title = 'current' where current of c; fetch 1 from c; delete from {T} where current of c; commit",
        "begin; savepoint s; delete from {T}_b; rollback to s; commit",
    ]);
}

#[test]
fn copy_into_the_root_and_into_a_partition_is_captured() {
    use std::io::Write;
    let mut parted = Parted::new();
    for (table, region) in [("{T}", "a"), ("{T}", "b"), ("{T}_rest", "other")] {
        let table = table.replace("{T}", &parted.name);
        let mut copy = parted.client.copy_in(&format!("copy {table} (id, region, title) from stdin")).expect("copy");
        for row in 2000..2500 {
            writeln!(copy, "{row}\t{region}\tcopied").expect("copy");
        }
        copy.finish().expect("copy");
    }
    parted.equal();
    parted.nothing_was_rebuilt();
}

#[test]
fn rows_that_move_between_partitions_keep_one_document() {
    let mut parted = Parted::new();
    parted.each(&[
        "update {T} set region = 'b' where region = 'a' and id <= 100",
        "update {T} set region = 'elsewhere' where region = 'b' and id > 800",
        "update {T} set region = 'a', id = id + 10000 where region = 'elsewhere'",
        "begin; update {T} set region = 'x' where id = 300; update {T} set region = 'a' where id = 300; commit",
        "begin; savepoint s; update {T} set region = 'b' where region = 'x'; rollback to s; commit",
    ]);
    assert_eq!(parted.number("select count(*) from {T}"), 900);
}

#[test]
fn rows_that_a_partition_key_outside_the_document_id_moves_are_captured() {
    // The index names the table's replica identity: unique over partitions of another column than those that are read.
    let mut parted = Parted::of(
        "create table {T} (id int, region text, part int, primary key (region, id, part)) partition by range (part);
         create table {T}_1 partition of {T} for values from (0) to (10); create table {T}_2 partition of {T} for values from (10) to (20);
         insert into {T} select i, 'r', 1 from generate_series(1, 100) i",
    );
    for statement in ["update {T} set part = 11 where id <= 50", "update {T} set part = part + 1", "delete from {T}_2"]
    {
        parted.run(statement);
        let key = "region || '|' || id || '|' || part";
        expect::table_equal(&mut parted.client, &parted.name, key, &parted.engine, &parted.name);
    }
}

#[test]
fn partitions_with_other_column_orders_and_dropped_columns_are_captured() {
    let mut parted = Parted::of(
        "create table {T} (junk int, id int, region text, more text, title text, primary key (region, id)) partition by list (region);
         alter table {T} drop column junk; alter table {T} drop column more;
         create table {T}_a (title text, region text not null, x int, id int not null); alter table {T}_a drop column x;
         alter table {T} attach partition {T}_a for values in ('a');
         create table {T}_b partition of {T} for values in ('b');
         insert into {T} select i, case when i % 2 = 0 then 'a' else 'b' end, 'x' from generate_series(1, 100) i",
    );
    parted.each(&[
        "update {T} set title = 'through the root'",
        "update {T}_a set title = 'by itself' where id < 50; update {T}_b set title = 'by itself' where id > 50",
        "update {T} set region = 'a' where id % 5 = 0",
        "delete from {T}_a where id % 10 = 0; insert into {T}_a (id, region, title) values (1000, 'a', 'new')",
        "create table {T}_c (region text not null, title text, id int not null); alter table {T} attach partition {T}_c for values in ('c');
         update {T} set region = 'c' where id % 3 = 0",
    ]);
}

#[test]
fn an_attached_partitions_rows_are_loaded_under_writes_and_nothing_is_rebuilt() {
    let mut parted = Parted::new();
    parted.run(FILLED);
    let name = parted.name.clone();
    let stop = AtomicBool::new(false);
    let rounds = std::thread::scope(|scope| {
        let mut writer = parted.server.connect("app");
        let (name, stop) = (&name, &stop);
        let writing = scope.spawn(move || {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                writer
                    .batch_execute(&format!(
                        "update {name}_c set title = 'round {round}' where id % 211 = {round} % 211;
                         delete from {name}_c where id = 20000 - {round};
                         insert into {name}_c (id, region, title) values (100000 + {round}, 'c', 'new')"
                    ))
                    .expect("write");
                // A busy writer, but not one that leaves nothing of the machine to the engine.
                std::thread::sleep(Duration::from_millis(1));
            }
            round
        });
        let stop = Raise(stop);
        wait::until("some was written before", wait::SHORT, || {
            parted.number("select count(*) from {T}_c where id > 100005") > 0
        });
        parted.run("alter table {T} attach partition {T}_c for values in ('c')");
        let answered: bool =
            parted.client.query_one("select es_sync.wait(timeout => '60 s')", &[]).expect("wait").get(0);
        assert!(answered);
        // What was brought along and never changed is searchable, as wait() says.
        assert!(parted.engine.source(name, "c|1899").is_some_and(|document| document.contains("1899")));
        wait::until("more was written", wait::SHORT, || parted.number("select max(id)::int8 from {T}_c") > 100_020);
        drop(stop);
        writing.join().expect("the writer")
    });
    println!("{rounds} rounds of writes");
    parted.equal();
    parted.nothing_was_rebuilt();
    assert_eq!(parted.number("select count(*) from es_sync.job where kind = 'partition' and state = 'done'"), 1);
    assert_eq!(parted.number("select count(*) from es_sync.status where state = 'ok'"), 1);
    assert_eq!(parted.server.unexpected_log_lines(&[]), Vec::<String>::new());
}

#[test]
fn an_empty_partition_that_comes_asks_for_nothing() {
    let mut parted = Parted::new();
    parted
        .run("create table {T}_c partition of {T} for values in ('c'); create table {T}_d (like {T}_c including all)");
    parted.run("alter table {T} attach partition {T}_d for values in ('d'); insert into {T} values (1, 'c', 'c'), (1, 'd', 'd')");
    wait::until_equal("both are known", wait::SHORT, 6, || {
        parted.number("select count(*) from es_sync.partition where parent = '{T}'::regclass")
    });
    parted.equal();
    // The rows may have been there already when they were noticed.
    assert_eq!(parted.number("select count(*) from es_sync.job where kind = 'verify'"), 0);
    parted.nothing_was_rebuilt();
}

#[test]
fn a_detached_partitions_documents_are_taken_out_and_nothing_is_rebuilt() {
    // The other product: its pages of ids and its deletes are its own.
    let mut parted = Parted::on(Engine::opensearch(), REGIONS);
    parted.run(&FILLED.replace("20000", "3000"));
    parted.run("alter table {T} attach partition {T}_c for values in ('c')");
    parted.each(&[
        "alter table {T} detach partition {T}_a",
        "alter table {T} detach partition {T}_b; delete from {T}_b where id > 100; update {T}_b set id = id + 5000",
        // It has a default partition, beside which PostgreSQL refuses CONCURRENTLY.
        "alter table {T} detach partition {T}_rest",
        "alter table {T} detach partition {T}_c concurrently",
    ]);
    assert_eq!(parted.number("select count(*) from {T}"), 0);
    wait::until("no trigger is left on what was a partition", wait::SHORT, || {
        let left = "select count(*) from pg_trigger where tgname like 'es\\_sync%' and tgrelid <> '{T}'::regclass";
        parted.number(left) == 0
    });
    parted.run("insert into {T}_a values (7777, 'a', 'of its own'); truncate {T}_b");
    parted.equal();
}

#[test]
fn a_dropped_partitions_documents_are_taken_out_and_nothing_is_rebuilt() {
    let mut parted = Parted::new();
    parted.each(&[
        "drop table {T}_a",
        "begin; drop table {T}_b; rollback",
        "create schema {T}_old; alter table {T}_b set schema {T}_old; drop schema {T}_old cascade",
        "alter table {T} detach partition {T}_rest; drop table {T}_rest",
    ]);
    assert_eq!(parted.server.unexpected_log_lines(&[]), Vec::<String>::new());
}

#[test]
fn a_partition_that_goes_and_comes_back_changed_ends_equal() {
    Parted::new().each(&[
        "begin; alter table {T} detach partition {T}_a; delete from {T}_a where id < 100; update {T}_a set title = 'meanwhile';
         insert into {T}_a values (9000, 'a', 'meanwhile'); alter table {T} attach partition {T}_a for values in ('a'); commit",
        "alter table {T} detach partition {T}_b; update {T}_b set title = 'meanwhile', id = id + 1000;
         alter table {T} attach partition {T}_b for values in ('b')",
        "begin; alter table {T} detach partition {T}_a; update {T}_a set title = 'never'; rollback",
    ]);
}

#[test]
fn sub_partitioned_trees_come_and_go_as_a_whole() {
    let mut parted = Parted::new();
    parted.each(&[
        "create table {T}_c (like {T} including all) partition by range (id);
         create table {T}_c1 partition of {T}_c for values from (0) to (500); create table {T}_c2 partition of {T}_c default;
         insert into {T}_c select i, 'c', 'deep' from generate_series(1, 1000) i;
         alter table {T} attach partition {T}_c for values in ('c')",
        "update {T}_c2 set title = 'by itself'; update {T} set id = id + 2000 where region = 'c' and id < 100",
        "create table {T}_c3 (like {T} including all); insert into {T}_c3 values (10000, 'c', 'deeper');
         delete from {T} where id >= 10000; alter table {T}_c attach partition {T}_c3 for values from (10000) to (20000)",
        "truncate {T}_c3",
        "alter table {T}_c detach partition {T}_c1",
        "truncate {T}_c",
        "insert into {T} select i, 'c', 'again' from generate_series(600, 700) i; alter table {T} detach partition {T}_c",
        "alter table {T} attach partition {T}_c for values in ('c')",
        "drop table {T}_c",
    ]);
}

#[test]
fn rows_carved_out_of_the_default_partition_keep_their_documents() {
    Parted::new().each(&["begin; create table {T}_x (like {T} including all); insert into {T}_x select * from {T}_rest where region = 'x';
         delete from {T}_rest where region = 'x'; alter table {T} attach partition {T}_x for values in ('x'); commit",
        "update {T}_x set title = 'in its own partition'",
    ]);
}

#[test]
fn a_truncated_partition_is_emptied_and_nothing_is_rebuilt() {
    let mut parted = Parted::new();
    parted.each(&[
        "truncate {T}_a",
        "begin; insert into {T}_b values (5000, 'b', 'before'); truncate {T}_b; insert into {T}_b values (5001, 'b', 'after'); commit",
        "begin; savepoint s; truncate {T}_rest; rollback to s; commit",
    ]);
    parted.run("begin; truncate {T}_b; prepare transaction 'emptied'");
    parted.run("commit prepared 'emptied'");
    parted.equal();
    assert_eq!(parted.number("select count(*) from {T}"), 300);
    parted.run("truncate {T}");
    parted.equal();
}

#[test]
fn a_table_attached_by_itself_cannot_become_a_partition_of_an_attached_table() {
    let mut parted = Parted::new();
    parted.run("create table {T}_c (like {T} including all); insert into {T}_c values (1, 'c', 'own')");
    parted.run("select es_sync.attach('{T}_c')");
    expect::settled(&mut parted.client);
    let attach = "alter table {T} attach partition {T}_c for values in ('c')".replace("{T}", &parted.name);
    let error = parted.client.batch_execute(&attach).expect_err("it is refused");
    assert!(error.as_db_error().is_some_and(|error| error.message().contains("es_sync_capture")), "{error:?}");
    parted.run("select es_sync.detach('{T}_c')");
    parted.run(&attach);
    parted.equal();
}

#[test]
fn a_partition_is_attached_by_itself_in_the_transaction_that_detaches_it() {
    let mut parted = Parted::of(
        "create table {T} (id int, region text, title text, primary key (region, id)) partition by list (region);
         create table {T}_a partition of {T} for values in ('a');
         create table {T}_tree partition of {T} for values in ('b', 'c') partition by list (region);
         create table {T}_b partition of {T}_tree for values in ('b');
         insert into {T} select i, (array['a', 'b'])[1 + i % 2], 'thing ' || i from generate_series(1, 20) i",
    );
    for (part, leaves) in [("a", 1), ("tree", 2)] {
        let triggers = format!(
            "select count(*) from pg_trigger t where t.tgname like 'es_sync_%' and t.tgenabled = 'A'
                 and t.tgrelid in (select '{{T}}_{part}'::regclass union select relid from pg_partition_tree('{{T}}_{part}'))"
        );
        parted.run(&format!(
            "begin; alter table {{T}} detach partition {{T}}_{part}; select es_sync.attach('{{T}}_{part}')"
        ));
        assert_eq!(parted.number(&triggers), 2 * leaves, "{part}");
        parted.run(&format!("commit; update {{T}}_{part} set title = 'alone'; delete from {{T}}_{part} where id < 5"));
        let alone = format!("{}_{part}", parted.name);
        expect::table_equal(&mut parted.client, &alone, "region || '|' || id", &parted.engine, &alone);
        parted.equal();
    }
    assert_eq!(parted.server.unexpected_log_lines(&[]), Vec::<String>::new());
}

#[test]
fn neither_a_partition_nor_its_parent_is_attached_beside_a_view_that_reads_the_other() {
    let mut parted = Parted::without_attachment(
        "create table {T} (id int, region text, title text, primary key (region, id)) partition by list (region);
         create table {T}_a partition of {T} for values in ('a');
         create table {T}_root (id int primary key);
         create view {T}_leaf as select r.id, a.title from {T}_root r left join {T}_a a on a.id = r.id;
         create view {T}_whole as select r.id, t.title from {T}_root r left join {T} t on t.id = r.id",
    );
    let name = parted.name.clone();
    for (view, read, attached) in [("leaf", "_a", ""), ("whole", "", "_a")] {
        parted.run(&format!("select es_sync.attach('{{T}}_root', document => '{{T}}_{view}')"));
        let error = parted
            .client
            .batch_execute(&format!("select es_sync.attach('{name}{attached}')"))
            .expect_err("a table of the same tree is followed");
        let error = error.as_db_error().expect("the server refuses it");
        let expected = format!(
            "cannot attach table public.{name}{attached} beside table public.{name}{read} of the same partition tree"
        );
        assert_eq!((error.code().code(), error.message()), ("0A000", expected.as_str()));
        assert!(error.hint().is_some_and(|hint| hint.contains("either the partitioned table or single partitions")));
        parted.run("select es_sync.detach('{T}_root')");
    }
    // The table itself may be both.
    parted.run("select es_sync.attach('{T}_root', document => '{T}_whole'), es_sync.attach('{T}')");
    parted.equal();
}

/// While the queue is kept and nobody claims: without preload there is no worker.
#[test]
fn partitions_that_come_and_go_while_there_is_no_worker_are_noticed_later() {
    let mut parted = Parted::new();
    parted.server.conf("shared_preload_libraries", "");
    parted.server.restart(Mode::Fast);
    parted.client = parted.server.connect("app");
    parted.run(FILLED);
    parted.run(
        "alter table {T} attach partition {T}_c for values in ('c'); drop table {T}_a;
         begin; alter table {T} detach partition {T}_b; delete from {T}_b where id < 300; alter table {T} attach partition {T}_b for values in ('b'); commit;
         update {T} set title = 'meanwhile' where id < 50",
    );
    parted.server.conf("shared_preload_libraries", "pg_es_sync");
    parted.server.restart(Mode::Fast);
    parted.client = parted.server.connect("app");
    parted.equal();
    parted.nothing_was_rebuilt();
}

#[test]
fn a_partitions_load_goes_on_after_the_worker_was_stopped() {
    let mut parted = Parted::new();
    parted.run(&FILLED.replace("20000", "60000"));
    parted.proxy.set_for("_bulk", Fault::Delay(Duration::from_millis(100)));
    parted.run("alter table {T} attach partition {T}_c for values in ('c')");
    wait::until("it has gone some way", wait::LONG, || {
        parted.number("select coalesce(max(done), 0) from es_sync.job where kind = 'partition'") > 10_000
    });
    parted.run("select pg_terminate_backend(worker_pid) from es_sync.status");
    parted.proxy.set(Fault::Pass);
    parted.equal();
    parted.nothing_was_rebuilt();
}

#[test]
fn a_partitions_load_that_a_crash_interrupts_ends_in_equality() {
    let mut parted = Parted::new();
    parted.run(&FILLED.replace("20000", "60000"));
    parted.proxy.set_for("_bulk", Fault::Delay(Duration::from_millis(100)));
    parted.run("alter table {T} attach partition {T}_c for values in ('c')");
    wait::until("it has gone some way", wait::LONG, || {
        parted.number("select coalesce(max(done), 0) from es_sync.job where kind = 'partition'") > 10_000
    });
    parted.server.restart(Mode::Immediate);
    parted.proxy.set(Fault::Pass);
    parted.client = parted.server.connect("app");
    parted.equal();
}

/// Everything that may happen to partitions, while a build is held up after it has read a page.
fn during_a_build(parted: &mut Parted, begin: &str) {
    parted.proxy.forget_seen();
    parted.proxy.set_for("_bulk", Fault::Delay(Duration::from_millis(1500)));
    parted.run(begin);
    wait::until("a page is on its way", wait::LONG, || !parted.proxy.seen("_bulk").is_empty());
    parted.run(&FILLED.replace("20000", "2000"));
    parted.run("alter table {T} attach partition {T}_c for values in ('c')");
    parted.run("alter table {T} detach partition {T}_a");
    parted.run("truncate {T}_b; insert into {T} values (1, 'b', 'after')");
    parted.run("update {T}_c set title = 'changed' where id < 100; delete from {T}_c where id > 1900");
    parted.proxy.set(Fault::Pass);
    parted.equal();
}

#[test]
fn partitions_that_come_go_and_are_emptied_during_a_first_load_end_equal() {
    let mut parted = Parted::without_attachment(REGIONS);
    during_a_build(&mut parted, "select es_sync.attach('{T}')");
    parted.nothing_was_rebuilt();
}

#[test]
fn partitions_that_come_go_and_are_emptied_during_a_reindex_end_equal() {
    let mut parted = Parted::new();
    during_a_build(&mut parted, "select es_sync.reindex('{T}')");
    assert_eq!(parted.number("select count(*) from es_sync.job where kind in ('load', 'reindex')"), 2);
    assert_eq!(parted.engine.indexes_of(&parted.name), [format!("{}-2", parted.name)], "it did not begin again");
}

#[test]
fn a_comparison_that_is_asked_for_during_a_first_load_forgets_no_partition_that_was_emptied() {
    let mut parted = Parted::without_attachment(REGIONS);
    parted.proxy.set_for("_bulk", Fault::Hold);
    parted.run("select es_sync.attach('{T}')");
    wait::until("a page is on its way", wait::LONG, || !parted.proxy.seen("_bulk").is_empty());
    parted.run("truncate {T}_b");
    wait::until("its documents are to be taken out", wait::LONG, || {
        parted.number("select count(*) from es_sync.job where kind = 'verify' and orphans_only") == 1
    });
    parted.run("select es_sync.verify('{T}')");
    wait::until("there is nothing to compare", wait::LONG, || {
        parted.number("select count(*) from es_sync.job where kind = 'verify' and state = 'done'") == 1
    });
    parted.proxy.set(Fault::Pass);
    expect::settled(&mut parted.client);
    parted.equal();
}

#[test]
fn a_table_truncated_during_a_reindex_is_emptied() {
    let mut parted = Parted::new();
    for table in ["{T}", "{T}_b"] {
        parted.proxy.forget_seen();
        parted.proxy.set_for("_bulk", Fault::Delay(Duration::from_millis(1500)));
        parted.run("select es_sync.reindex('{T}')");
        wait::until("a page is on its way", wait::LONG, || !parted.proxy.seen("_bulk").is_empty());
        parted.run(&format!("truncate {table}; insert into {{T}} values (1, 'b', 'after')"));
        parted.proxy.set(Fault::Pass);
        parted.equal();
        assert_eq!(parted.number("select count(*) from {T} where region = 'b'"), 1);
        parted.run(
            "delete from {T}; insert into {T} select i, (array['a', 'b', 'x'])[1 + i % 3], 'again' from generate_series(10, 900) i",
        );
        parted.equal();
    }
}

#[test]
fn a_lock_on_one_partition_keeps_no_other_table_waiting() {
    let mut parted = Parted::new();
    let other = unique("other");
    parted.run(&format!("create table {other} (id int primary key, title text); select es_sync.attach('{other}')"));
    expect::settled(&mut parted.client);
    let mut holder = parted.server.connect("app");
    holder.batch_execute(&format!("begin; lock table {}_a in access exclusive mode", parted.name)).expect("lock");
    // A table that is created has the worker look at triggers and partitions again.
    parted.run(&format!("create table {other}_more (id int); insert into {other} values (1, 'passes')"));
    wait::until("the other table's change arrives", wait::SHORT, || parted.engine.source(&other, "1").is_some());
    parted.run(&format!("insert into {other} values (2, 'passes')"));
    wait::until("and the next one", wait::SHORT, || parted.engine.source(&other, "2").is_some());
    holder.batch_execute("rollback").expect("release");
    parted.equal();
}

/// A partitioned table that a view reads, with a way through its own columns.
struct Shown(Parted);

impl Shown {
    fn new() -> Shown {
        let mut parted = Parted::without_attachment(
            "create table {T} (id int primary key, title text);
             insert into {T} select i, 'order ' || i from generate_series(1, 200) i;
             create table {T}_items (id int, region text, order_id int, name text, primary key (region, id)) partition by list (region);
             create table {T}_items_a partition of {T}_items for values in ('a');
             create table {T}_items_b partition of {T}_items for values in ('b');
             insert into {T}_items select i, (array['a', 'b'])[1 + i % 2], 1 + i % 200, 'item ' || i from generate_series(1, 1000) i;
             create view {T}_document as select o.id, o.title,
                 (select jsonb_agg(jsonb_build_object('id', i.id, 'name', i.name) order by i.region, i.id)
                  from {T}_items i where i.order_id = o.id) as items
             from {T} o",
        );
        parted.run("select es_sync.attach('{T}', document => '{T}_document')");
        let mut shown = Shown(parted);
        shown.equal();
        shown
    }

    #[track_caller]
    fn equal(&mut self) {
        let Parted { client, engine, name, .. } = &mut self.0;
        expect::settled(client);
        expect::documents_equal(client, &format!("select id, row_to_json(d) from {name}_document d"), engine, name);
    }

    #[track_caller]
    fn each(&mut self, statements: &[&str]) {
        for statement in statements {
            let state =
                |parted: &mut Parted| parted.number("select coalesce(sum(hashtext(d::text)), 0) from {T}_document d");
            let before = state(&mut self.0);
            self.0.run(statement);
            assert_ne!(before, state(&mut self.0), "the statement changes a document: {statement}");
            self.equal();
        }
        self.0.nothing_was_rebuilt();
    }
}

#[test]
fn partitions_of_a_table_that_a_view_reads_come_change_and_go() {
    Shown::new().each(&[
        "update {T}_items set name = 'changed' where id < 100",
        "update {T}_items_a set order_id = 7 where id < 20; delete from {T}_items_b where id > 990",
        "update {T}_items set region = 'b', name = 'moved' where id between 200 and 300",
        "create table {T}_items_c partition of {T}_items for values in ('c');
         insert into {T}_items values (1, 'c', 1, 'c'); insert into {T}_items_c values (2, 'c', 2, 'c')",
        "create table {T}_items_d (name text, order_id int, region text not null, id int not null);
         insert into {T}_items_d select 'brought along', 1 + i % 200, 'd', i from generate_series(1, 400) i;
         alter table {T}_items attach partition {T}_items_d for values in ('d')",
        "update {T}_items_d set name = 'changed' where id < 50",
        "alter table {T}_items detach partition {T}_items_d",
        "truncate {T}_items_a",
        "drop table {T}_items_b",
    ]);
}

#[test]
fn a_partition_of_a_table_that_a_view_reads_goes_during_a_reindex_which_goes_on() {
    let mut shown = Shown::new();
    shown.0.proxy.forget_seen();
    shown.0.proxy.set_for("_bulk", Fault::Hold);
    shown.0.run("select es_sync.reindex('{T}')");
    wait::until("a page is on its way", wait::LONG, || !shown.0.proxy.seen("_bulk").is_empty());
    shown.0.run("drop table {T}_items_b");
    wait::until("the worker has noticed", wait::LONG, || {
        shown.0.number("select count(*) from es_sync.job where kind = 'reindex' and again = 'repair'") == 1
    });
    shown.0.proxy.set(Fault::Pass);
    expect::settled(&mut shown.0.client);
    shown.equal();
    assert_eq!(shown.0.engine.indexes_of(&shown.0.name), [format!("{}-2", shown.0.name)], "it did not begin again");
}

#[test]
fn a_reindex_in_repeatable_read_finds_triggers_that_came_after_its_snapshot() {
    let mut shown = Shown::new();
    let parted = &mut shown.0;
    let mut other = parted.server.connect("app");
    for letter in 'c'..='z' {
        let name = format!("{}_items_{letter}", parted.name);
        let trigger =
            format!("select from pg_trigger where tgname = 'es_sync_truncate' and tgrelid = '{name}'::regclass");
        parted.run(&format!("create table {name} partition of {{T}}_items for values in ('{letter}')"));
        let mut reindex =
            other.build_transaction().isolation_level(IsolationLevel::RepeatableRead).start().expect("begin");
        if !reindex.query(&trigger, &[]).expect("triggers").is_empty() {
            // The worker was faster.
            continue;
        }
        wait::until("its trigger is there", wait::LONG, || {
            !parted.client.query(&trigger, &[]).expect("triggers").is_empty()
        });
        reindex.execute("select es_sync.reindex($1::text::regclass)", &[&parted.name]).expect("reindex");
        reindex.commit().expect("commit");
        return shown.equal();
    }
    panic!("the worker is always faster");
}

/// Each kind of index hears of every partition: by a filter, by routing over several shards, through a view.
#[test]
fn partitions_come_and_go_in_filtered_and_routed_indexes() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let mut parted = Parted::with(engine, REGIONS);
        parted.run(
            "create table {T}_names (region text primary key, name text); insert into {T}_names values ('a', 'Asia'), ('c', 'Chile');
             create view {T}_view as select t.id, t.region, upper(t.title) as title, n.name
                 from {T} t left join {T}_names n on n.region = t.region;
             select es_sync.attach('{T}'),
                 es_sync.attach('{T}', index => '{T}_filtered', filter => 'id % 2 = 0'),
                 es_sync.attach('{T}', index => '{T}_routed', filter => 'id % 3 <> 1',
                     options => '{\"routing\": \"title\", \"settings\": {\"number_of_shards\": 4}}'),
                 es_sync.attach('{T}', index => '{T}_viewed', document => '{T}_view',
                     options => '{\"routing\": \"region\", \"settings\": {\"number_of_shards\": 4}}')",
        );
        for statement in [
            "select",
            &FILLED.replace("20000", "300"),
            "alter table {T} attach partition {T}_c for values in ('c')",
            "update {T}_c set title = 'moved ' || id % 7 where id % 4 = 0",
            "update {T} set region = 'c' where region = 'a' and id > 600",
            "update {T}_names set name = 'China' where region = 'c'",
            "alter table {T} detach partition {T}_a",
            "truncate {T}_b; insert into {T}_b values (1, 'b', 'after'), (2, 'b', 'after')",
            "alter table {T} attach partition {T}_a for values in ('a')",
            "drop table {T}_c",
            "begin; alter table {T} detach partition {T}_a; update {T}_a set title = 'meanwhile', id = id + 5000 where id < 300;
             alter table {T} attach partition {T}_a for values in ('a'); commit",
            "truncate {T}",
            "insert into {T} select i, (array['a', 'b', 'x'])[1 + i % 3], 'again ' || i % 5 from generate_series(1, 30) i",
        ] {
            parted.run(statement);
            println!("{statement}");
            expect::everything_equal(&mut parted.client, &parted.engine);
        }
        assert_eq!(parted.number("select count(*) from {T}"), 30);
        assert_eq!(parted.number("select count(*) from es_sync.dead_letters"), 0);
    }
}

#[test]
fn tables_that_others_inherit_from_are_refused_or_say_so() {
    let mut parted = Parted::without_attachment(
        "create table {T} (id int primary key, region text, title text); create table {T}_child () inherits ({T});",
    );
    let attach = "select es_sync.attach('{T}')".replace("{T}", &parted.name);
    let error = parted.client.batch_execute(&attach).expect_err("it is refused");
    let error = error.as_db_error().expect("an error of the server");
    assert_eq!(error.code().code(), "0A000");
    assert!(error.hint().is_some_and(|hint| hint.contains("Attach each child")), "{error:?}");
    parted.run("drop table {T}_child; insert into {T} select i, 'r', 'x' from generate_series(1, 10) i");
    parted.run(&attach);
    parted.equal_by_id();
    let state = |parted: &mut Parted| -> (String, Option<String>) {
        let row = parted.client.query_one("select state, cause from es_sync.status", &[]).expect("status");
        (row.get(0), row.get(1))
    };
    assert_eq!(state(&mut parted), ("ok".to_owned(), None));
    parted.run("create table {T}_child () inherits ({T})");
    let (stale, cause) = state(&mut parted);
    assert_eq!(stale, "stale");
    assert!(cause.as_ref().is_some_and(|cause| cause.contains("inherit from")), "{cause:?}");
    // A child can be attached by itself, and has an index of its own.
    parted.run("alter table {T}_child add primary key (id); select es_sync.attach('{T}_child')");
    parted.run("insert into {T}_child values (100, 'c', 'child')");
    let (child, engine) = (format!("{}_child", parted.name), Engine::elasticsearch());
    expect::table_equal(&mut parted.client, &child, "id", &engine, &child);
    parted.run("select es_sync.detach('{T}_child'); drop table {T}_child");
    parted.equal_by_id();
    assert_eq!(state(&mut parted).0, "ok");
}

#[test]
fn a_partition_detached_concurrently_and_attached_again_ends_equal() {
    let mut parted = Parted::of(
        "create table {T} (id int, region text, title text, primary key (region, id)) partition by list (region);
         create table {T}_a partition of {T} for values in ('a');
         create table {T}_b partition of {T} for values in ('b');
         insert into {T} select i, (array['a', 'b'])[1 + i % 2], 'thing ' || i from generate_series(1, 100) i",
    );
    parted.run("alter table {T} detach partition {T}_a concurrently");
    parted.equal();
    parted.run("update {T}_a set title = 'detached'; delete from {T}_a where id = 2; alter table {T} attach partition {T}_a for values in ('a')");
    parted.equal();
}
