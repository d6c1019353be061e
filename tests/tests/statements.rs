//! Every statement that changes a row has its change captured, whoever runs it and however.

use std::io::Write;

use pg_es_sync_tests::{Engine, Mode, Server, expect, named, unique, wait};
use postgres::Client;

struct Setting {
    engine: Engine,
    server: Server,
    client: Client,
    /// Table and index; `{T}` in statements.
    name: String,
}

impl Setting {
    /// Table {T} (id, title, n) with rows 1 to 10, attached and loaded, after `setup` has run.
    #[track_caller]
    fn new(setup: &str) -> Setting {
        Setting::attached(&format!(
            "create table {{T}} (id int primary key, title text, n int);
             insert into {{T}} select i, 'thing ' || i, i from generate_series(1, 10) i; {setup}"
        ))
    }

    /// As `new`, with a table {T} of one's own making.
    #[track_caller]
    fn attached(setup: &str) -> Setting {
        let engine = Engine::elasticsearch();
        let server = Server::with(&engine);
        let client = server.create_database("app");
        let mut setting = Setting { engine, server, client, name: unique("goods") };
        setting.run("set timezone = 'UTC'");
        setting.run(setup);
        setting.run("select es_sync.attach('{T}')");
        expect::settled(&mut setting.client);
        setting
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
        self.equal_by("id");
    }

    /// As `equal`, where the document's id is `key`.
    #[track_caller]
    fn equal_by(&mut self, key: &str) {
        expect::table_equal(&mut self.client, &self.name, key, &self.engine, &self.name);
    }

    /// Runs each statement and compares.
    #[track_caller]
    fn each(mut self, statements: &[&str]) {
        for statement in statements {
            self.run(statement);
            self.equal();
        }
    }
}

#[test]
fn insert_update_and_delete_are_captured() {
    Setting::new("").each(&[
        "insert into {T} values (11, 'new', 1), (12, 'newer', 2)",
        "insert into {T} select i, 'selected', i from generate_series(100, 120) i",
        "update {T} set title = 'changed' where id <= 3",
        "update {T} t set title = f.title from (values (4, 'from'), (5, 'from')) f (id, title) where t.id = f.id",
        "delete from {T} where id = 6",
        "delete from {T} t using generate_series(110, 115) i where t.id = i",
    ]);
}

#[test]
fn writes_in_common_table_expressions_are_captured() {
    Setting::new("").each(&[
        "with gone as (delete from {T} where id <= 2 returning *) insert into {T} select id + 1000, title, n from gone",
        "with changed as (update {T} set n = n + 1 where id > 5 returning id),
              added as (insert into {T} values (50, 'added', 1) returning id)
         select count(*) from changed, added",
    ]);
}

#[test]
fn copy_is_captured() {
    let mut setting = Setting::new("");
    for round in 0..2 {
        let mut copy = setting.client.copy_in(&format!("copy {} (id, title) from stdin", setting.name)).expect("copy");
        for row in 0..500 {
            writeln!(copy, "{}\tcopied", 1000 * (round + 1) + row).expect("copy");
        }
        copy.finish().expect("copy");
    }
    setting.equal();
}

#[test]
fn on_conflict_is_captured() {
    Setting::new("").each(&[
        "insert into {T} values (5, 'conflict'), (13, 'none') on conflict (id) do update set title = excluded.title",
        "insert into {T} values (5, 'nothing'), (14, 'none') on conflict do nothing",
        "insert into {T} as t values (5, 'no', 1), (6, 'yes', 1)
             on conflict (id) do update set title = excluded.title where t.id = 6",
        "insert into {T} values (7, 'moved') on conflict (id) do update set id = {T}.id + 700",
    ]);
}

#[test]
fn merge_is_captured() {
    Setting::new("").each(&[
        "merge into {T} using (values (1, 'merged'), (2, null), (3, 'skip'), (21, 'new'), (22, null)) m (id, title)
             on {T}.id = m.id
         when matched and m.title is null then delete
         when matched and m.title = 'skip' then do nothing
         when matched then update set title = m.title
         when not matched and m.title is null then do nothing
         when not matched then insert values (m.id, m.title)",
    ]);
}

#[test]
fn foreign_key_cascades_are_captured() {
    let mut setting = Setting::attached(
        "create table {T}_hosts (id int primary key, other int unique);
         insert into {T}_hosts select i, i from generate_series(1, 6) i;
         create table {T} (host int references {T}_hosts on delete cascade on update cascade, id int,
             friend int references {T}_hosts (other) on delete set null on update set default default 6,
             primary key (host, id));
         insert into {T} select h, i, 1 + (h % 5) from generate_series(1, 5) h, generate_series(1, 4) i",
    );
    for statement in [
        "delete from {T}_hosts where id = 1",
        "update {T}_hosts set id = 200 where id = 2",
        "update {T}_hosts set other = 30 where id = 3",
    ] {
        setting.run(statement);
        setting.equal_by("host || '|' || id");
    }
}

#[test]
fn deferred_triggers_that_write_at_commit_are_captured() {
    Setting::new(
        "create table {T}_orders (id int primary key);
         create function {T}_later() returns trigger language plpgsql as $$
             begin insert into {T} values (new.id, 'at commit', 1); update {T} set n = n + 1 where id = 1; return null; end $$;
         create constraint trigger later after insert on {T}_orders deferrable initially deferred
             for each row execute function {T}_later()",
    )
    .each(&[
        "insert into {T}_orders values (100), (101)",
        "begin; update {T} set title = 'before' where id = 2; insert into {T}_orders values (102); commit",
        "begin; insert into {T}_orders values (103); prepare transaction 'later'",
        "commit prepared 'later'",
    ]);
}

#[test]
fn columns_changed_by_a_before_trigger_are_captured() {
    Setting::attached(
        "create table {T} (id int primary key, title text, stamp text, twice text generated always as (title || title) stored);
         insert into {T} (id, title) values (1, 'a'), (2, 'b');
         create function {T}_stamp() returns trigger language plpgsql as $$
             begin new.stamp := coalesce(new.stamp, '') || 'x'; if tg_op = 'INSERT' then new.id := new.id * 10; end if; return new; end $$;
         create trigger stamp before insert or update on {T} for each row execute function {T}_stamp()",
    )
    .each(&[
        // The statement itself sets a column to what it was.
        "update {T} set id = id where id = 1",
        "insert into {T} (id, title) values (3, 'c')",
        "update {T} set title = 'd' where id = 30",
    ]);
}

#[test]
fn procedures_that_commit_and_roll_back_are_captured() {
    Setting::new("").each(&[
        "do $$ begin for i in 20..39 loop
             insert into {T} values (i, 'loop'); update {T} set n = i where id = 1;
             if i % 3 = 0 then rollback; else commit; end if;
         end loop; end $$",
        "do $$ begin for i in 40..59 loop
             begin insert into {T} values (i, 'block'); update {T} set n = i where id = 2;
                 if i % 2 = 0 then raise 'no'; end if;
             exception when others then null; end;
         end loop; end $$",
    ]);
}

#[test]
fn changes_made_as_a_replica_are_captured() {
    Setting::new("").each(&["set session_replication_role = replica;
         insert into {T} values (50, 'as a replica'); update {T} set title = 'too' where id = 1; delete from {T} where id = 2;
         reset session_replication_role"]);
}

#[test]
fn changes_applied_by_a_subscription_are_captured() {
    let publisher = Server::builder().start();
    let mut setting = Setting::attached("create table {T} (id int primary key, title text, n int)");
    let mut source = publisher.create_empty_database("source");
    let name = setting.name.clone();
    let publish = |source: &mut Client, statements: &str| {
        source.batch_execute(&statements.replace("{T}", &name)).expect("publish");
    };
    publish(
        &mut source,
        "create table {T} (id int primary key, title text, n int); insert into {T} select i, 'copied', i from generate_series(1, 500) i;
         create publication everything for table {T}",
    );
    let url = publisher.url("source");
    let subscribe = format!("create subscription follower connection '{url}' publication everything");
    setting.client.batch_execute(&subscribe).expect("subscribe");
    publish(
        &mut source,
        "insert into {T} values (1000, 'streamed', 1); update {T} set title = 'streamed' where id <= 10; delete from {T} where id = 11;
         begin; update {T} set id = 2000 where id = 12; delete from {T} where id = 13; insert into {T} values (13, 'again', 1); commit",
    );
    let rows = format!("select count(*), sum(hashtext(t::text)) from {name} t");
    let applied = |source: &mut Client, client: &mut Client| {
        let contents = |client: &mut Client| {
            let row = client.query_one(&rows, &[]).expect("count");
            (row.get::<_, i64>(0), row.get::<_, Option<i64>>(1))
        };
        let wanted = contents(source);
        wait::until_equal("the subscription has applied everything", wait::LONG, wanted, || contents(client));
    };
    applied(&mut source, &mut setting.client);
    setting.equal();
    publish(&mut source, "truncate {T}; insert into {T} values (1, 'after', 1)");
    applied(&mut source, &mut setting.client);
    setting.equal();
    setting.client.batch_execute("drop subscription follower").expect("unsubscribe");
}

#[test]
fn changed_keys_swapped_keys_and_keys_used_again_are_captured() {
    Setting::new("").each(&[
        "update {T} set id = id + 100 where id = 7",
        "update {T} set id = id + 1000",
        "begin; update {T} set id = -1 where id = 1001; update {T} set id = 1001 where id = 1002; update {T} set id = 1002 where id = -1; commit",
        "begin; delete from {T} where id = 1003; insert into {T} values (1003, 'again', 1); commit",
        "delete from {T} where id = 1004",
        "insert into {T} values (1004, 'again, later', 1)",
        "begin; insert into {T} values (1, 'for a moment', 1); delete from {T} where id = 1; commit",
    ]);
}

#[test]
fn writes_through_views_and_rules_are_captured() {
    Setting::new(
        "create view {T}_plain as select id, title from {T} where id < 1000;
         create view {T}_joined as select id, title, 'x' as more from {T} join (values (1)) v on true;
         create function {T}_instead() returns trigger language plpgsql as $$
             begin if tg_op = 'DELETE' then delete from {T} where id = old.id; return old; end if;
             update {T} set title = new.title where id = old.id; return new; end $$;
         create trigger instead instead of update or delete on {T}_joined for each row execute function {T}_instead();
         create table {T}_ruled (id int);
         create rule ruled as on insert to {T}_ruled do instead insert into {T} values (new.id, 'by rule', 0)",
    )
    .each(&[
        "insert into {T}_plain values (30, 'through a view'); update {T}_plain set title = 'view' where id = 1; delete from {T}_plain where id = 2",
        "update {T}_joined set title = 'instead' where id = 3; delete from {T}_joined where id = 4",
        "insert into {T}_ruled values (40), (41)",
    ]);
}

#[test]
fn writes_at_a_cursor_are_captured() {
    Setting::new("").each(&[
        "begin; declare c cursor for select * from {T} order by id for update; fetch 2 from c;
         update {T} set title = 'current' where current of c; fetch 1 from c; delete from {T} where current of c; commit",
    ]);
}

#[test]
fn a_prepared_transaction_survives_a_crash_with_all_its_keys() {
    let mut setting = Setting::new("");
    // 70,000 keys are more than a savepoint level holds: most of them are in the unlogged queue, which the crash empties.
    setting.run(
        "begin; update {T} set title = 'prepared' where id = 1; delete from {T} where id = 2; prepare transaction 'small';
         begin; insert into {T} select i, 'prepared', i from generate_series(1001, 71000) i; delete from {T} where id = 3;
         prepare transaction 'large';
         update {T} set title = 'in between' where id = 4",
    );
    setting.server.restart(Mode::Immediate);
    setting.client = setting.server.connect("app");
    setting.run("set timezone = 'UTC'");
    // The repair after the crash has ended before the prepared transactions do.
    setting.equal();
    setting.run("commit prepared 'small'");
    setting.equal();
    setting.run("commit prepared 'large'");
    setting.equal();
    assert_eq!(setting.number("select count(*) from {T}"), 70_008);
}

#[test]
fn a_truncated_table_is_emptied() {
    let mut setting = Setting::new(
        "create table {T}_hosts (id int primary key); alter table {T} add foreign key (n) references {T}_hosts not valid",
    );
    setting.run("begin; truncate {T}; insert into {T} (id, title) values (1, 'after'); commit");
    setting.equal();
    setting.run("truncate {T}_hosts restart identity cascade");
    setting.equal();
    assert_eq!(setting.number("select count(*) from {T}"), 0);
    setting.run("begin; insert into {T} (id) values (7); savepoint s; truncate {T}; rollback to s; commit");
    setting.equal();
    assert_eq!(setting.number("select count(*) from {T}"), 1);
}

#[test]
fn partitions_are_truncated_alone_or_with_their_root_whenever_they_came() {
    let mut setting = Setting::attached(
        "create table {T} (id int primary key, title text) partition by range (id);
         create table {T}_a partition of {T} for values from (0) to (100);
         create table {T}_b partition of {T} for values from (100) to (200) partition by range (id);
         create table {T}_b1 partition of {T}_b for values from (100) to (150);
         insert into {T} select i, 'x' from generate_series(1, 140) i",
    );
    setting.run("truncate {T}_a");
    setting.equal();
    setting.run("truncate {T}_b");
    setting.equal();
    // One comes after the attach; by the time it is truncated it has its trigger.
    setting.run("create table {T}_c partition of {T} for values from (200) to (300); insert into {T} select i, 'y' from generate_series(90, 220) i where i < 150 or i >= 200");
    wait::until("the new partition has its trigger", wait::SHORT, || {
        setting
            .number("select count(*) from pg_trigger where tgname = 'es_sync_truncate' and tgrelid = '{T}_c'::regclass")
            == 1
    });
    setting.equal();
    setting.run("truncate {T}_c");
    setting.equal();
    let triggers = "select count(*) from pg_trigger where tgname = 'es_sync_truncate' and tgenabled = 'A'";
    // Another is truncated at once: found out when it gets its trigger.
    setting.run("create table {T}_d partition of {T} for values from (300) to (400); insert into {T} values (301, 'z'); truncate {T}_d");
    wait::until_equal("every partition has its trigger", wait::SHORT, 6, || setting.number(triggers));
    setting.equal();
    setting.run("truncate {T}");
    setting.equal();
    setting.run("select es_sync.detach('{T}')");
    assert_eq!(setting.number("select count(*) from pg_trigger where tgname like 'es\\_sync%'"), 0);
}

#[test]
fn a_role_without_rights_on_the_extension_creates_partitions_and_writes_to_them() {
    let mut setting = Setting::attached(
        "create role landlord login; grant all on schema public to landlord; set role landlord;
         create table {T} (id int primary key, title text) partition by range (id);
         create table {T}_a partition of {T} for values from (0) to (100); insert into {T} values (1, 'x'); reset role",
    );
    let mut landlord = setting.server.connect_as("landlord", "app");
    landlord
        .batch_execute(
            &"create table {T}_b partition of {T} for values from (100) to (200);
              insert into {T} values (2, 'a'), (101, 'b'); insert into {T}_b values (102, 'c'); update {T} set id = 103 where id = 2;
              create table {T}_c (like {T} including all); alter table {T} attach partition {T}_c for values from (200) to (300);
              insert into {T}_c values (201, 'd'); delete from {T} where id = 102"
                .replace("{T}", &setting.name),
        )
        .expect("the landlord writes");
    assert!(landlord.query("select * from es_sync.attachment", &[]).is_err(), "and has no right on the extension");
    setting.equal();
}

#[test]
fn a_publication_of_all_tables_fails_no_delete_of_ours() {
    let mut setting = Setting::new("create publication everything for all tables");
    setting.run(
        "update {T} set title = 'changed' where id = 1; delete from {T} where id = 2;
         begin; delete from {T} where id = 3; prepare transaction 'published'",
    );
    setting.run("commit prepared 'published'");
    setting.equal();
    assert_eq!(
        setting.number("select count(*) from es_sync.queue")
            + setting.number("select count(*) from es_sync.prepared_queue"),
        0
    );
    // Parked, cleared, built anew, detached: the other tables have rows updated and deleted too.
    setting.run("insert into {T} values (50, 'x'); alter table {T} alter id type text; insert into {T} values (repeat('k', 600), 'too long')");
    wait::until("it is parked", wait::SHORT, || setting.number("select count(*) from es_sync.dead_letters") == 1);
    setting.run("delete from {T} where id = repeat('k', 600); select es_sync.reindex('{T}')");
    setting.equal();
    setting.run("select es_sync.detach('{T}', drop_index => true)");
    // Whatever logged tables there will be.
    let without = "select count(*) from pg_class c where c.relnamespace = 'es_sync'::regnamespace and c.relkind = 'r' and c.relpersistence = 'p'
        and c.relreplident <> 'f' and not exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary)";
    assert_eq!(setting.number(without), 0);
    assert_eq!(setting.server.unexpected_log_lines(&[]), Vec::<String>::new());
}

#[test]
fn keys_that_are_equal_but_not_identical_end_with_one_document() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    client
        .batch_execute(
            "set timezone = 'UTC'; set intervalstyle = 'iso_8601'; create extension citext;
             create collation loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
        )
        .expect("set up");
    let kinds = [
        ("numeric", "'1.0'", "'1.00'"),
        ("citext", "'key'", "'KEY'"),
        ("text collate loose", "'key'", "'KEY'"),
        ("float8", "'0'", "'-0'"),
        ("interval", "'1 day'", "'24 hours'"),
        ("jsonb", "'{\"a\": 1.0}'", "'{\"a\": 1.00}'"),
    ];
    let tables: Vec<String> = kinds
        .iter()
        .map(|(kind, first, _)| {
            let name = unique("equal");
            client
                .batch_execute(&format!(
                    "create table {name} (k {kind} primary key, note text); insert into {name} values ({first}, 'loaded');
                     create table {name}_pair (k {kind}, i int, note text, primary key (k, i)); insert into {name}_pair values ({first}, 1, 'loaded');
                     select es_sync.attach('{name}'), es_sync.attach('{name}_pair')"
                ))
                .expect(kind);
            name
        })
        .collect();
    let steps = [
        "update T set k = SECOND",
        "update T set note = 'changed' where k = FIRST",
        "begin; delete from T where k = FIRST; insert into T (k, OTHER note) values (FIRST, VALUE 'again'); commit",
        "insert into T (k, OTHER note) values (SECOND, VALUE 'conflict') on conflict (k CONFLICT) do update set k = excluded.k, note = excluded.note",
        "delete from T where k = FIRST",
        "insert into T (k, OTHER note) values (SECOND, VALUE 'last')",
    ];
    expect::settled(&mut client);
    for step in steps {
        for ((_, first, second), name) in kinds.iter().zip(&tables) {
            for (table, other, value, conflict) in
                [(name.clone(), "", "", ""), (format!("{name}_pair"), "i,", "1,", ", i")]
            {
                let statement = step
                    .replace("T ", &format!("{table} "))
                    .replace("FIRST", first)
                    .replace("SECOND", second)
                    .replace("OTHER", other)
                    .replace("VALUE", value)
                    .replace("CONFLICT", conflict);
                client.batch_execute(&statement).unwrap_or_else(|error| panic!("{error:?} in: {statement}"));
            }
        }
        expect::settled(&mut client);
        for ((kind, ..), name) in kinds.iter().zip(&tables) {
            let id = if *kind == "float8" { "case when k::text = '-0' then '-0' else k::text end" } else { "k::text" };
            expect::documents_equal(&mut client, &format!("select {id}, row_to_json(t) from {name} t"), &engine, name);
            let pair = format!("{name}_pair");
            let rows = format!("select {id} || '|' || i, row_to_json(t) from {pair} t");
            expect::documents_equal(&mut client, &rows, &engine, &pair);
        }
    }
}
