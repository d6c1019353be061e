//! Nobody's code runs with more rights than its owner's, and nobody's tables are anybody else's business. A table's owner
//! who may attach is taken for an attacker here.

use pg_es_sync_tests::{Engine, Server, expect, named, unique, wait};
use postgres::Client;
use serde_json::json;

/// A database, and a role "clerk" that may use everything of es_sync and owns tables.
struct Setting {
    engine: Engine,
    server: Server,
    client: Client,
    /// `{T}` in statements.
    name: String,
}

/// A domain whose check tells the server's log when it runs as a superuser. Of the number 1, so that none else's does.
const DOMAIN: &str = "
    create function {T}_seen(value int) returns boolean language plpgsql as $$
    begin
        if (select r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user) then
            raise warning 'code of a user ran as superuser';
        end if;
        return true;
    end $$;
    create domain {T}_checked as int check ({T}_seen(value))";

/// A function that does the same when it is planned with constants: it is called where a query is simplified, before any
/// row is read.
const FOLDED: &str = "
    create function {T}_one(value int) returns int immutable language plpgsql as $$
    begin
        if (select r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user) then
            raise warning 'code of a user ran as superuser';
        end if;
        return 1;
    end $$";

impl Setting {
    fn new() -> Setting {
        let engine = Engine::elasticsearch();
        let server = Server::with(&engine);
        let client = server.create_database("app");
        let mut setting = Setting { engine, server, client, name: unique("rights") };
        setting.run(
            "create role clerk;
             grant create on schema public to clerk;
             grant usage on schema es_sync to clerk;
             grant execute on all routines in schema es_sync to clerk;
             create table {T}_victim (id int primary key, secret text);
             insert into {T}_victim values (1, 'secret');
             set role clerk",
        );
        setting
    }

    #[track_caller]
    fn run(&mut self, statements: &str) {
        named::run(&mut self.client, &self.name, statements);
    }

    #[track_caller]
    fn refused(&mut self, statements: &str) -> String {
        let error = self.client.batch_execute(&statements.replace("{T}", &self.name)).expect_err("it is refused");
        error.code().expect("the server refuses it").code().to_owned()
    }

    /// Waits until this many triggers fire always, and none does not.
    #[track_caller]
    fn all_triggers_are_on(&mut self, number: i64) {
        let client = &mut self.client;
        wait::until("all triggers fire", wait::LONG, || {
            let query = "select count(*) filter (where t.tgenabled = 'A'), count(*)
                         from pg_catalog.pg_trigger t where t.tgname like 'es_sync_%'";
            let row = client.query_one(query, &[]).expect("triggers");
            row.get::<_, i64>(0) == number && row.get::<_, i64>(1) == number
        });
    }

    #[track_caller]
    fn no_code_ran_as_superuser(&self) {
        let log = self.server.log();
        assert!(!log.contains("code of a user ran as superuser"), "{log}");
    }
}

#[test]
fn checks_of_domains_in_filters_and_declared_ways_run_as_the_tables_owner_only() {
    let mut setting = Setting::new();
    setting.run(DOMAIN);
    setting.run(
        "create table {T} (id int primary key, k int, title text);
         insert into {T} select i, i % 2, 'thing ' || i from generate_series(1, 20) i;
         create table {T}_price (k int, price int);
         insert into {T}_price values (0, 10), (1, 20);
         create view {T}_document as
             select t.id, t.title, (select max(p.price) from {T}_price p where p.k <= t.k) as price from {T} t;
         select es_sync.relate('{T}', '{T}_price',
             $$select t.id from public.{T} t where t.k >= related.k and related.k <> all ('{5}'::public.{T}_checked[])$$);
         select es_sync.mapping('{T}', document => '{T}_document', product => 'opensearch',
             filter => $$price <> all ('{7}'::public.{T}_checked[])$$);
         select es_sync.attach('{T}', document => '{T}_document',
             filter => $$price <> all ('{7}'::public.{T}_checked[])$$)",
    );
    setting.run("reset role");
    expect::settled(&mut setting.client);
    setting.run(
        "set role clerk; update {T}_price set price = price + 1; update {T} set title = title || '!' where id < 9",
    );
    // The worker looks at the filter and at the ways again.
    setting.run(
        "create or replace view {T}_document as
             select t.id, t.title, (select max(p.price) from {T}_price p where p.k <= t.k) as price, t.k from {T} t",
    );
    setting.run(
        "create or replace function {T}_seen(value int) returns boolean language plpgsql as $$
         begin
             if (select r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user) then
                 raise warning 'code of a user ran as superuser';
             end if;
             return value <> 4711;
         end $$",
    );
    setting.run("reset role");
    expect::settled(&mut setting.client);
    let documents = format!("select id, row_to_json(d) from {}_document d", setting.name);
    expect::documents_equal(&mut setting.client, &documents, &setting.engine, &setting.name);
    setting.no_code_ran_as_superuser();
}

#[test]
fn the_check_of_a_keys_domain_runs_as_the_tables_owner_only() {
    let mut setting = Setting::new();
    setting.run(DOMAIN);
    setting.run(
        "create table {T} (id {T}_checked primary key, divisor int);
         insert into {T} values (1, 1), (2, 2), (3, 0);
         select es_sync.attach('{T}', filter => '6 / divisor > 0')",
    );
    setting.run("reset role");
    wait::until("the row that cannot be read is a dead letter", wait::LONG, || {
        let query = "select count(*) from es_sync.dead_letters where kind = '22012' and key = '3'";
        setting.client.query_one(query, &[]).expect("dead letters").get::<_, i64>(0) == 1
    });
    setting.run("update {T} set divisor = 3 where id = 1");
    expect::settled(&mut setting.client);
    let documents = format!("select id, row_to_json(t) from {} t where id < 3", setting.name);
    expect::documents_equal(&mut setting.client, &documents, &setting.engine, &setting.name);
    setting.no_code_ran_as_superuser();
}

#[test]
fn a_superuser_who_syncs_rows_lends_no_right_to_the_check_of_their_keys_domain() {
    let mut setting = Setting::new();
    setting.run(DOMAIN);
    setting.run(
        "create table {T} (id {T}_checked primary key, other int);
         insert into {T} select i, i % 3 from generate_series(1, 9) i;
         create table {T}_root (id int primary key, k int);
         insert into {T}_root select i, i % 3 from generate_series(1, 9) i;
         create view {T}_document as
             select r.id, (select count(*) from {T} t where t.other = r.k) as others from {T}_root r;
         select es_sync.attach('{T}');
         select es_sync.attach('{T}_root', document => '{T}_document')",
    );
    setting.run("reset role");
    expect::settled(&mut setting.client);
    let name = setting.name.clone();
    for index in [format!("{name}/_doc/3"), format!("{name}_root/_doc/3")] {
        setting.engine.delete(&format!("/{index}?refresh=true"));
    }
    setting.run("select es_sync.sync('{T}', 1, 2); select es_sync.sync_full('{T}', 3)");
    expect::settled(&mut setting.client);
    setting.no_code_ran_as_superuser();
    for documents in [
        format!("select id, row_to_json(t) from {name} t"),
        format!("select id, row_to_json(d) from {name}_document d"),
    ] {
        let index = if documents.contains("_document") { format!("{name}_root") } else { name.clone() };
        expect::documents_equal(&mut setting.client, &documents, &setting.engine, &index);
    }
}

#[test]
fn functions_in_partition_keys_run_as_the_tables_owner_only() {
    let mut setting = Setting::new();
    setting.run(FOLDED);
    setting.run(
        "create table {T} (id int primary key, title text);
         insert into {T} select i, 'thing ' || i from generate_series(1, 20) i;
         create table {T}_part (root int, id int) partition by range ((id + {T}_one(0)));
         create table {T}_part_1 partition of {T}_part for values from (0) to (100);
         create table {T}_tree (root int, id int) partition by range (id);
         create table {T}_tree_1 partition of {T}_tree for values from (0) to (100)
             partition by range ((id + {T}_one(0)));
         create table {T}_tree_1_1 partition of {T}_tree_1 for values from (0) to (100);
         insert into {T}_part select i % 7, i from generate_series(1, 30) i;
         insert into {T}_tree select i % 5, i from generate_series(1, 30) i;
         create view {T}_document as
             select t.id, t.title, (select count(*) from {T}_part p where p.root = t.id) as parts,
                    (select count(*) from {T}_tree p where p.root = t.id) as leaves
             from {T} t",
    );
    // Not in the transaction that has made the tables: it knows their keys to its end.
    setting.run("select es_sync.attach('{T}', document => '{T}_document')");
    setting.no_code_ran_as_superuser();
    setting.run("reset role");
    expect::settled(&mut setting.client);
    setting.no_code_ran_as_superuser();

    // Whoever is given one of them later keeps its rights to himself, too.
    setting.run(
        "set role clerk;
         create table {T}_part_2 partition of {T}_part for values from (100) to (200)
             partition by range ((id + {T}_one(1)));
         create table {T}_part_2_1 partition of {T}_part_2 for values from (100) to (200);
         insert into {T}_part values (3, 150)",
    );
    setting.all_triggers_are_on(16);
    for statements in [
        "alter table {T}_part disable trigger all; alter table {T}_tree disable trigger all",
        "drop trigger es_sync_capture on {T}_part; drop trigger es_sync_capture on {T}_tree",
        "alter table {T}_part_2 disable trigger all; alter table {T}_tree_1 enable trigger all",
    ] {
        setting.run(statements);
        setting.run("insert into {T}_part values (3, 151); insert into {T}_tree values (4, 51)");
        setting.all_triggers_are_on(16);
        setting.no_code_ran_as_superuser();
    }
    setting.run("select es_sync.reindex('{T}'); reset role");
    expect::settled(&mut setting.client);
    // A superuser's own query would run the functions as well.
    setting.run("set role clerk");
    let documents = format!("select id, row_to_json(d) from {}_document d", setting.name);
    expect::documents_equal(&mut setting.client, &documents, &setting.engine, &setting.name);
    setting.run("select es_sync.detach('{T}'); reset role");
    expect::settled(&mut setting.client);
    setting.no_code_ran_as_superuser();
}

#[test]
fn a_superuser_who_attaches_a_table_lends_no_right_to_its_view() {
    let mut setting = Setting::new();
    setting.run(FOLDED);
    setting.run(
        "create table {T} (id int primary key, title text);
         insert into {T} select i, 'thing ' || i from generate_series(1, 20) i;
         create view {T}_document as select t.id, t.title from {T} t where t.id > {T}_one(0);
         reset role;
         select es_sync.mapping('{T}', document => '{T}_document', product => 'opensearch', filter => 'id < 9');
         select es_sync.attach('{T}', document => '{T}_document', filter => 'id < 9')",
    );
    expect::settled(&mut setting.client);
    setting.no_code_ran_as_superuser();
    setting.run("set role clerk");
    let documents = format!("select id, row_to_json(d) from {}_document d where id < 9", setting.name);
    expect::documents_equal(&mut setting.client, &documents, &setting.engine, &setting.name);
}

#[test]
fn the_callers_search_path_does_not_decide_who_owns_a_table() {
    let mut setting = Setting::new();
    setting.run(
        "create table {T} (id int primary key, title text);
         select es_sync.attach('{T}')",
    );
    setting.run(
        "reset role; grant create on database app to clerk; set role clerk;
         create schema evil;
         create table public.{T}_oids as select '{T}'::regclass::oid as mine, '{T}_victim'::regclass::oid as victim;
         create function evil.same(oid, oid) returns boolean language sql as
             'select $1 operator(pg_catalog.=) $2
                  or exists (select from public.{T}_oids o
                             where o.victim operator(pg_catalog.=) $2 and o.mine operator(pg_catalog.=) $1)
                  or exists (select from public.{T}_oids o
                             where o.victim operator(pg_catalog.=) $1 and o.mine operator(pg_catalog.=) $2)';
         create operator evil.= (leftarg = oid, rightarg = oid, function = evil.same);
         set search_path = evil, pg_catalog, public",
    );
    for statement in [
        "select es_sync.attach('public.{T}_victim', '{T}_stolen')",
        "select es_sync.mapping('public.{T}_victim', product => 'opensearch')",
        "select es_sync.detach('public.{T}_victim')",
        "select es_sync.sync_where('public.{T}_victim', 'true')",
        "select es_sync.verify('public.{T}_victim')",
        "select es_sync.reindex('public.{T}_victim')",
        "select es_sync.relate('public.{T}_victim', 'public.{T}', 'select related.id')",
    ] {
        assert_eq!(setting.refused(statement), "42501", "{statement}");
    }
    setting.run("reset search_path; reset role");
    expect::settled(&mut setting.client);
    assert!(!setting.engine.exists(&format!("{}_stolen", setting.name)));
}

#[test]
fn the_extension_is_not_installed_into_what_somebody_else_has_prepared() {
    let server = Server::builder().start();
    let mut client = server.create_empty_database("app");
    client.batch_execute("create role mallory; grant create on database app to mallory").expect("set up");
    for prepared in [
        "set role mallory; create schema es_sync",
        "create schema es_sync; grant create on schema es_sync to mallory",
        "create schema es_sync; grant all on schema es_sync to public",
        "set role mallory; create schema es_sync; create function es_sync.evil() returns int language sql return 1;
         reset role; alter schema es_sync owner to postgres",
        "set role mallory; create schema es_sync;
         alter default privileges in schema es_sync grant execute on functions to mallory;
         reset role; alter schema es_sync owner to postgres",
    ] {
        client.batch_execute(&format!("{prepared}; reset role")).expect(prepared);
        let error = client.batch_execute("create extension pg_es_sync").expect_err(prepared);
        let error = error.as_db_error().expect("the server refuses it");
        assert_eq!(error.code().code(), "55000", "{prepared}: {error:?}");
        assert!(error.detail().is_some() && error.hint().is_some(), "{prepared}: {error:?}");
        client.batch_execute("drop schema es_sync cascade").expect(prepared);
    }
    // As a dump does, and as DROP EXTENSION leaves it.
    client.batch_execute("create schema es_sync; grant usage on schema es_sync to mallory").expect("an empty schema");
    for _ in 0..2 {
        client.batch_execute("create extension pg_es_sync; drop extension pg_es_sync").expect("it is installed");
    }
}

#[test]
fn a_trigger_of_another_kind_that_calls_capture_fails_and_harms_nobody() {
    let mut setting = Setting::new();
    setting.run("create table {T} (id int primary key); select es_sync.attach('{T}')");
    for kind in ["after insert or update or delete on {T} for each statement", "before insert on {T} for each row"] {
        setting.run(&format!("create trigger another {kind} execute function es_sync.capture()"));
        assert_eq!(setting.refused("insert into {T} values (1)"), "39P01", "{kind}");
        setting.run("drop trigger another on {T}");
    }
    setting.run("insert into {T} values (2); reset role");
    let name = setting.name.clone();
    expect::table_equal(&mut setting.client, &name, "id", &setting.engine, &name);
    assert!(!setting.server.log().contains("terminated by signal"), "{}", setting.server.log());
}

#[test]
fn a_read_only_transaction_stays_so() {
    let mut setting = Setting::new();
    setting.run(
        "create table {T} (id int primary key, title text);
         create view {T}_document as select id, title from {T}",
    );
    let statements = "begin read only;
         select es_sync.mapping('{T}', document => '{T}_document', product => 'opensearch', filter => 'id > 0');
         insert into {T} values (1, 'written')";
    assert_eq!(setting.refused(statements), "25006");
}

#[test]
fn what_an_owners_code_sets_does_not_outlast_it() {
    let mut setting = Setting::new();
    setting.run(
        "create function {T}_closing(value int) returns int immutable language plpgsql as $$
         begin
             perform set_config('transaction_read_only', 'on', false), set_config('search_path', 'pg_temp', false);
             return value;
         end $$;
         create table {T} (id int primary key, title text);
         insert into {T} select i, 'thing ' || i from generate_series(1, 10) i",
    );
    setting.run(
        "begin; select es_sync.attach('{T}', filter => 'id > public.{T}_closing(3)');
         insert into {T} values (11, 'in the same transaction'); commit; reset role",
    );
    expect::settled(&mut setting.client);
    let documents = format!("select id, row_to_json(t) from {} t where id > 3", setting.name);
    expect::documents_equal(&mut setting.client, &documents, &setting.engine, &setting.name);
}

#[test]
fn ways_are_found_anew_although_the_owner_could_not_have_attached() {
    let mut setting = Setting::new();
    setting.run(
        "create table {T} (id int primary key, other int);
         insert into {T} select i, i from generate_series(1, 10) i;
         reset role;
         create table {T}_other (id int primary key, name text);
         insert into {T}_other select i, 'name ' || i from generate_series(1, 10) i;
         grant select on {T}_other to clerk;
         create view {T}_document as select t.id, o.name from {T} t left join {T}_other o on o.id = t.other;
         alter view {T}_document owner to clerk;
         select es_sync.attach('{T}', document => '{T}_document')",
    );
    expect::settled(&mut setting.client);
    setting
        .run("alter table {T}_other rename column name to label; update {T}_other set label = 'renamed' where id = 3");
    expect::settled(&mut setting.client);
    let query = "select id, row_to_json(d) from {T}_document d".replace("{T}", &setting.name);
    expect::documents_equal(&mut setting.client, &query, &setting.engine, &setting.name);
    let stale: bool = setting
        .client
        .query_one("select bool_or(stale is not null) from es_sync.attachment", &[])
        .expect("attachment")
        .get(0);
    assert!(!stale);
}

#[test]
fn an_alias_of_another_tables_index_gives_no_right_to_it() {
    let mut setting = Setting::new();
    setting.run("reset role; select es_sync.attach('{T}_victim')");
    expect::settled(&mut setting.client);
    let (name, victim) = (setting.name.clone(), format!("{}_victim", setting.name));
    let live = setting.engine.indexes_of(&victim).remove(0);
    let aliases = setting.engine.get(&format!("/{live}/_alias"));
    let aliases = aliases[&live]["aliases"].as_object().expect("aliases");
    let write = aliases.keys().find(|alias| alias.contains(".write-")).expect("a write alias").clone();
    let mut admin = setting.server.connect("app");
    let mut ended = |states: &[&str]| {
        let query = "select j.state, coalesce(j.error, '') from es_sync.jobs j order by j.id desc limit 1";
        wait::until("the last job has ended", wait::SHORT, || {
            let row = admin.query_one(query, &[]).expect("jobs");
            let (state, error): (String, String) = (row.get(0), row.get(1));
            if states.contains(&state.as_str()) { Ok(error) } else { Err((state, error)) }
        })
    };

    setting.run("set role clerk; create table {T} (id int primary key); insert into {T} values (7)");
    for index in [&write, "pg_es_sync-lease"] {
        assert_eq!(setting.refused(&format!("select es_sync.attach('{{T}}', index => '{index}')")), "42602");
    }

    // An alias that somebody has set by hand.
    setting.engine.put(&format!("/{live}/_alias/{name}-read"), json!({}));
    setting.run("select es_sync.attach('{T}', index => '{T}-read')");
    let error = ended(&["failed"]);
    assert!(error.contains(&format!("made for \"{victim}\"")), "{error}");
    setting.run("select es_sync.detach('{T}', drop_index => true)");
    ended(&["done"]);
    assert!(setting.engine.exists(&live));

    // It may be taken over, the index may not.
    setting.run("select es_sync.attach('{T}', index => '{T}-read', options => '{\"adopt\": true}')");
    ended(&["done"]);
    assert_eq!(setting.engine.search_ids(&format!("{name}-read"), json!({"match_all": {}})), ["7"]);
    setting.run("select es_sync.detach('{T}', drop_index => true)");
    ended(&["done"]);
    assert!(!setting.engine.exists(&format!("{name}-read")));
    setting.run(&format!("select es_sync.attach('{{T}}', index => '{live}', options => '{{\"adopt\": true}}')"));
    let error = ended(&["failed"]);
    assert!(error.contains(&format!("made for \"{victim}\"")), "{error}");
    setting.run("select es_sync.detach('{T}', drop_index => true)");
    ended(&["done"]);

    setting.run("reset role; insert into {T}_victim values (2, 'another')");
    expect::table_equal(&mut setting.client, &victim, "id", &setting.engine, &victim);
    assert_eq!(setting.engine.indexes_of(&victim), [live]);
}
