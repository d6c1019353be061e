//! Which columns a document holds, and that a change of any other one costs nothing.

use pg_es_sync_tests::{Engine, Server, expect, named, unique, wait};
use postgres::Client;

struct Setting {
    engine: Engine,
    _server: Server,
    client: Client,
    /// Table and index; `{T}` in statements.
    name: String,
}

impl Setting {
    /// Table {T}, of the setup's making, attached with these arguments and loaded.
    #[track_caller]
    fn new(setup: &str, arguments: &str) -> Setting {
        Setting::on(Engine::elasticsearch(), setup, arguments)
    }

    #[track_caller]
    fn on(engine: Engine, setup: &str, arguments: &str) -> Setting {
        let server = Server::with(&engine);
        let client = server.create_database("app");
        let mut setting = Setting { engine, _server: server, client, name: unique("columns") };
        setting.run("set timezone = 'UTC'");
        setting.run(setup);
        setting.run(&format!("select es_sync.attach('{{T}}'{arguments})"));
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

    /// Waits, and compares every document with what the query says.
    #[track_caller]
    fn equal(&mut self, query: &str) {
        expect::settled(&mut self.client);
        expect::documents_equal(&mut self.client, &query.replace("{T}", &self.name), &self.engine, &self.name);
    }

    /// Runs a statement after which so many documents are sent, and compares.
    #[track_caller]
    fn sends(&mut self, count: i64, statement: &str, query: &str) {
        let counter = "select (indexed + deleted)::int8 from es_sync.status";
        expect::settled(&mut self.client);
        let before = self.number(counter);
        self.run(statement);
        self.equal(query);
        assert_eq!(self.number(counter) - before, count, "{statement}");
    }
}

impl Setting {
    /// A number from Postgres' statistics, with all that this session and the worker have done until now. A process
    /// tells the last of it when it ends.
    #[track_caller]
    fn counted(&mut self, query: &str) -> i64 {
        expect::settled(&mut self.client);
        let pid = "select coalesce(min(worker_pid), 0)::int8 from es_sync.status";
        let worker = self.number(pid);
        self.run(&format!("select pg_terminate_backend({worker}); select pg_stat_force_next_flush()"));
        wait::until("another worker runs", wait::LONG, || ![0, worker].contains(&self.number(pid)));
        self.number(query)
    }
}

const ROWS: &str = "select id, row_to_json(t) from {T} t";

#[test]
fn an_update_of_excluded_columns_alone_enqueues_nothing() {
    let shown = "select id, json_build_object('id', id, 'title', title) from {T}";
    let mut setting = Setting::new(
        "create table {T} (pin text, id int primary key, counter int default 0, title text);
         insert into {T} select 'secret', i, 0, 'thing ' || i from generate_series(1, 20) i",
        ", exclude => '{pin, counter}'",
    );
    setting.equal(shown);
    setting.sends(0, "update {T} set counter = counter + 1, pin = null", shown);
    setting.sends(0, "update {T} set counter = counter + 1, title = title where id < 5", shown);
    setting.sends(3, "update {T} set counter = counter + 1, title = 'changed' where id <= 3", shown);
    setting.sends(2, "update {T} set pin = 'x', id = 100 where id = 1; delete from {T} where id = 100", shown);
}

#[test]
fn an_update_of_columns_that_no_document_holds_enqueues_nothing() {
    let shown = "select id, json_build_object('id', id, 'title', title) from {T}";
    let mut setting = Setting::new(
        "create table {T} (id int primary key, title text, picture bytea, pictures bytea[], words tsvector);
         insert into {T} select i, 'thing ' || i, '\\x00', null, to_tsvector('simple', 'thing') from generate_series(1, 20) i",
        "",
    );
    setting.equal(shown);
    setting.sends(
        0,
        "update {T} set words = to_tsvector('simple', 'other'), picture = '\\xff', pictures = '{a,b}'",
        shown,
    );
    setting.sends(2, "update {T} set words = null, title = 'changed' where id <= 2", shown);
}

#[test]
fn a_view_renames_columns_and_an_update_of_any_other_enqueues_nothing() {
    let shown = "select id, row_to_json(d) from {T}_documents d";
    let mut setting = Setting::new(
        "create table {T} (id int primary key, ttl text, note text);
         insert into {T} select i, 'thing ' || i, 'x' from generate_series(1, 20) i;
         create view {T}_documents as select id, ttl as title, upper(ttl) as \"TITLE in capitals\" from {T}",
        ", document => '{T}_documents'",
    );
    setting.equal(shown);
    assert_eq!(setting.engine.documents(&setting.name)["7"]["TITLE in capitals"], "THING 7");
    setting.sends(0, "update {T} set note = 'changed'", shown);
    setting.sends(4, "update {T} set ttl = 'changed' where id <= 4", shown);
}

/// The row as a whole is shown: every column of it counts.
#[test]
fn a_view_that_shows_whole_rows_is_refreshed_by_every_column() {
    let shown = "select id, row_to_json(d) from {T}_documents d";
    let mut setting = Setting::new(
        "create table {T} (id int primary key, title text, note text);
         insert into {T} select i, 'thing ' || i, 'x' from generate_series(1, 20) i;
         create view {T}_documents as select t.id, to_jsonb(t) as whole from {T} t",
        ", document => '{T}_documents'",
    );
    setting.equal(shown);
    setting.sends(20, "update {T} set note = 'changed'", shown);
}

/// Which columns a condition reads behind a function is not known.
#[test]
fn with_a_filter_every_update_counts() {
    let shown = "select id, json_build_object('id', id, 'title', title) from {T} where secret > 10";
    let mut setting = Setting::new(
        "create table {T} (id int primary key, title text, secret int);
         insert into {T} select i, 'thing ' || i, i from generate_series(1, 20) i;
         create function {T}_passes(int) returns boolean language plpgsql as
             $$ begin return (select secret from public.{T} where id = $1) > 10; end $$",
        ", filter => 'public.{T}_passes(id)', exclude => '{secret}'",
    );
    setting.equal(shown);
    setting.run("update {T} set secret = 21 - secret");
    setting.equal(shown);
}

/// A view says what it reads, and its columns are all that the filter sees.
#[test]
fn with_a_filter_over_a_view_an_update_of_a_column_that_the_view_does_not_read_enqueues_nothing() {
    let shown = "select id, json_build_object('id', id, 'title', title) from {T} where hidden is not true";
    let mut setting = Setting::new(
        "create table {T} (id int primary key, title text, hidden boolean, note text);
         insert into {T} select i, 'thing ' || i from generate_series(1, 20) i;
         create view {T}_documents as select id, title, hidden from {T}",
        ", document => '{T}_documents', filter => 'hidden is not true', exclude => '{hidden}'",
    );
    setting.equal(shown);
    setting.sends(0, "update {T} set note = 'changed'", shown);
    setting.sends(5, "update {T} set hidden = true where id <= 5", shown);
    setting.sends(3, "update {T} set hidden = false, note = 'back' where id <= 3", shown);
}

#[test]
fn a_stored_generated_column_is_in_the_document_although_its_base_is_not() {
    let shown = "select id, json_build_object('id', id, 'total', total) from {T}";
    let mut setting = Setting::new(
        "create table {T} (id int primary key, price int, total int generated always as (price / 10 * 10) stored);
         insert into {T} select i, i * 10 from generate_series(1, 20) i",
        ", exclude => '{price}'",
    );
    setting.equal(shown);
    setting.sends(20, "update {T} set price = price + 10", shown);
    setting.sends(0, "update {T} set price = price + 1", shown);
}

#[test]
#[cfg_attr(not(virtual_columns), ignore = "this Postgres has no virtual generated columns")]
fn a_virtual_generated_column_is_in_the_document_although_its_base_is_not() {
    let shown = "select id, json_build_object('id', id, 'total', total) from {T}";
    let mut setting = Setting::new(
        "create table {T} (id int primary key, price int, total int generated always as (price * 2) virtual);
         insert into {T} select i, i from generate_series(1, 20) i",
        ", exclude => '{price}'",
    );
    setting.equal(shown);
    setting.run("update {T} set price = price + 1 where id <= 10");
    setting.equal(shown);
}

#[test]
fn a_before_trigger_that_changes_an_excluded_column_enqueues_nothing_and_one_that_changes_a_shown_column_does() {
    let shown = "select id, json_build_object('id', id, 'title', title) from {T}";
    let mut setting = Setting::new(
        "create table {T} (id int primary key, title text, touched int default 0, wish text);
         insert into {T} select i, 'thing ' || i from generate_series(1, 20) i;
         create function {T}_touch() returns trigger language plpgsql as $$ begin
             new.touched := new.touched + 1;
             if new.wish is distinct from old.wish then new.title := new.wish; end if;
             return new; end $$;
         create trigger touch before update on {T} for each row execute function {T}_touch()",
        ", exclude => '{touched, wish}'",
    );
    setting.equal(shown);
    setting.sends(0, "update {T} set id = id", shown);
    setting.sends(5, "update {T} set wish = 'granted' where id <= 5", shown);
}

/// Postgres' operators call these values equal; whoever reads the document sees another one.
#[test]
fn a_value_that_is_equal_but_not_identical_is_a_change() {
    const CASES: [(&str, &str, &str); 8] = [
        ("numeric", "1.0", "1.00"),
        ("numeric[]", "{1.0}", "{1.00}"),
        ("float8", "0", "-0"),
        ("citext", "a", "A"),
        ("text collate any_case", "a", "A"),
        ("interval", "1 day", "24 hours"),
        ("jsonb", r#"{"n": 1.0}"#, r#"{"n": 1.00}"#),
        ("pair", "(1.0,a)", "(1.00,a)"),
    ];
    let names: Vec<String> = (0..CASES.len()).map(|place| format!("c{place}")).collect();
    let columns: Vec<String> = names.iter().zip(CASES).map(|(name, (kind, ..))| format!("{name} {kind}")).collect();
    let values: Vec<String> = CASES.iter().map(|(_, value, _)| format!("'{value}'")).collect();
    let mut setting = Setting::new(
        &format!(
            "set intervalstyle = 'iso_8601'; create extension citext; create type pair as (a numeric, b text);
             create collation any_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
             create table {{T}} (id int primary key, {});
             insert into {{T}} select i, {} from generate_series(1, 9) i",
            columns.join(", "),
            values.join(", ")
        ),
        "",
    );
    for (name, (kind, value, other)) in names.iter().zip(CASES) {
        assert_eq!(
            setting.number(&format!("select count(*) from {{T}} where {name} = '{other}'::{kind}")),
            9,
            "{kind}"
        );
        setting.sends(1, &format!("update {{T}} set {name} = '{other}' where id = 3"), ROWS);
        setting.sends(0, &format!("update {{T}} set {name} = '{value}' where id <> 3"), ROWS);
        // Numbers are compared as such; here each digit counts.
        let text =
            format!("select row_to_json(t) ->> '{name}' from {{T}} t where id = 3").replace("{T}", &setting.name);
        let wanted: String = setting.client.query_one(&text, &[]).expect("row").get(0);
        let source = setting.engine.source(&setting.name, "3").expect("a document");
        let found = serde_json::from_str::<serde_json::Value>(&source).expect("JSON")[name].clone();
        if found.is_string() {
            assert_eq!(found.as_str(), Some(wanted.as_str()), "{kind}");
        } else {
            assert!(source.contains(&format!("\"{name}\":{wanted}")), "{kind}: {wanted} in {source}");
        }
    }
}

#[test]
fn columns_dropped_before_and_after_the_attach_are_in_no_document() {
    let mut setting = Setting::on(
        Engine::opensearch(),
        "create table {T} (gone_first int, id int, gone text, title text, later int, note text, primary key (id));
         insert into {T} select 1, i, 'gone', 'thing ' || i, 2, 'note' from generate_series(1, 20) i;
         alter table {T} drop column gone_first, drop column gone",
        "",
    );
    setting.equal(ROWS);
    setting.sends(3, "update {T} set title = 'changed' where id <= 3", ROWS);
    setting.run(
        "alter table {T} drop column later; update {T} set note = 'changed';
         insert into {T} values (100, 'new', 'note'); delete from {T} where id = 20",
    );
    setting.equal(ROWS);
    setting.sends(2, "update {T} set note = null where id <= 2; update {T} set title = title", ROWS);
}

/// A value of 5 MB lies in the TOAST table. Whether it has changed is seen by where it lies, without reading it.
#[test]
fn large_values_that_an_update_leaves_alone_are_not_read_by_the_writer() {
    let mut setting = Setting::new(
        "create table {T} (id int primary key, title text, body text, counter int);
         alter table {T} alter column body set storage external;
         insert into {T} select i, 'thing ' || i, repeat(md5(i::text), 5 * 1024 * 32) from generate_series(1, 4) i",
        ", exclude => '{counter}'",
    );
    let shown = "select id, json_build_object('id', id, 'title', title, 'body', body) from {T}";
    setting.equal(shown);
    setting.sends(0, "update {T} set counter = 1", shown);
    let chunks = "select toast_blks_hit + toast_blks_read + tidx_blks_hit + tidx_blks_read from pg_statio_all_tables where relid = '{T}'::regclass";
    let before = setting.counted(chunks);
    assert!(before > 0, "blocks are counted");
    // It reads them when it sends them.
    setting.run("select es_sync.pause('{T}')");
    for round in 0..20 {
        setting.run(&format!("update {{T}} set counter = {round}; update {{T}} set title = 'changed {round}'"));
    }
    setting.run("update {T} set id = id + 10 where id = 1");
    setting.run("select pg_stat_force_next_flush()");
    assert_eq!(setting.number(chunks) - before, 0, "blocks of the TOAST table that the writer has read");
    setting.run("select es_sync.resume('{T}')");
    setting.equal(shown);
    // A change of the value itself is seen, and so is one that leaves it as long as it was.
    setting.sends(1, "update {T} set body = overlay(body placing 'x' from 4000000) where id = 2", shown);
}

/// A view that groups is evaluated for the documents that are read, not for all.
#[test]
fn reading_one_document_of_a_grouping_view_does_not_read_all_groups() {
    let mut setting = Setting::new(
        "create table {T} (id int primary key, name text);
         create table {T}_item (id int primary key, owner int, amount int);
         create index on {T}_item (owner);
         insert into {T} select i, 'owner ' || i from generate_series(1, 2000) i;
         insert into {T}_item select i, i % 2000 + 1, i from generate_series(1, 40000) i;
         analyze {T}; analyze {T}_item;
         create view {T}_documents as select o.id, o.name, s.items, s.total from {T} o
         left join (select owner, count(*) as items, sum(amount) as total from {T}_item group by owner) s on s.owner = o.id",
        ", document => '{T}_documents'",
    );
    let documents = "select id, row_to_json(d) from {T}_documents d";
    setting.equal(documents);
    let reads =
        "select seq_tup_read + coalesce(idx_tup_fetch, 0) from pg_stat_all_tables where relid = '{T}_item'::regclass";
    let before = setting.counted(reads);
    assert!(before >= 40_000, "the load and the comparison have read all of them");
    for id in 1..=10 {
        setting.run(&format!("update {{T}} set name = 'renamed' where id = {id}"));
        expect::settled(&mut setting.client);
    }
    let read = setting.counted(reads) - before;
    assert!((200..2_000).contains(&read), "{read} rows were read for ten documents of 20 items each");
    setting.equal(documents);
}
