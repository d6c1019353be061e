//! DDL on attached tables, and on everything that their documents are made of.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pg_es_sync_tests::{Engine, Fault, Proxy, Raise, Server, expect, process, unique, wait};
use postgres::Client;
use postgres::error::SqlState;
use serde_json::{Value, json};

/// A server of its own with a database, and an index of its own name.
struct Shop {
    engine: Engine,
    server: Server,
    client: Client,
    index: String,
    /// What the index should hold: id and document.
    rows: String,
}

impl Shop {
    fn new(sql: &str) -> Self {
        let engine = Engine::elasticsearch();
        let url = engine.url().to_owned();
        Self::behind(engine, &url, sql)
    }

    fn behind(engine: Engine, url: &str, sql: &str) -> Self {
        let server = Server::with_url(url);
        let client = server.create_database("shop");
        let rows = "select id, row_to_json(t) from root t".to_owned();
        let mut shop = Self { engine, server, client, index: unique("ddl"), rows };
        shop.run(sql);
        shop
    }

    /// Attaches `root`, with further arguments, and waits for the first load.
    #[track_caller]
    fn attach(mut self, arguments: &str) -> Self {
        let index = self.index.clone();
        self.run(&format!("select es_sync.attach('root', index => '{index}'{arguments})"));
        self.settle();
        self
    }

    /// The same with the view `document`.
    #[track_caller]
    fn attach_view(mut self) -> Self {
        self.rows = "select id, row_to_json(d) from document d".to_owned();
        self.attach(", document => 'document'")
    }

    #[track_caller]
    fn run(&mut self, sql: &str) {
        self.client.batch_execute(sql).unwrap_or_else(|error| panic!("{error:?} in: {sql}"));
    }

    fn refused(&mut self, sql: &str) -> String {
        let error = self.client.batch_execute(sql).expect_err("it is refused");
        let error = error.as_db_error().expect("the server refuses it");
        format!("{} {} {}", error.code().code(), error.message(), error.detail().unwrap_or_default())
    }

    /// All is searchable, no job runs, and the index is what it should be.
    #[track_caller]
    fn settle(&mut self) {
        expect::settled(&mut self.client);
        expect::documents_equal(&mut self.client, &self.rows, &self.engine, &self.index);
    }

    #[track_caller]
    fn each(&mut self, statements: &[&str]) {
        for statement in statements {
            self.run(statement);
            self.settle();
        }
    }

    fn text(&mut self, query: &str) -> String {
        self.client.query_one(query, &[]).unwrap().get::<_, Option<String>>(0).unwrap_or_default()
    }

    fn count(&mut self, query: &str) -> i64 {
        self.client.query_one(query, &[]).unwrap().get(0)
    }

    fn found(&self, query: Value) -> usize {
        self.engine.search_ids(&self.index, query).len()
    }

    fn rebuilds(&mut self) -> i64 {
        self.count("select count(*) from es_sync.jobs where kind = 'reindex'")
    }

    /// The statement makes the documents different: the index follows by itself, and says why it was built anew.
    #[track_caller]
    fn rebuilt_by(&mut self, statement: &str, cause: &str) {
        let before = self.rebuilds();
        self.run(statement);
        self.settle();
        assert!(self.rebuilds() > before, "no rebuild after: {statement}");
        let log = self.server.log();
        let said =
            log.lines().any(|line| line.contains(&self.index) && line.contains("built anew") && line.contains(cause));
        assert!(said, "nobody said {cause}");
    }

    /// The statement leaves all documents as they are: nothing is built, and changes arrive as before.
    #[track_caller]
    fn not_rebuilt_by(&mut self, statement: &str) {
        let before = self.rebuilds();
        self.run(statement);
        self.settle();
        assert_eq!(self.rebuilds(), before, "a rebuild after: {statement}");
    }

    /// Waits until status says so.
    #[track_caller]
    fn says(&mut self, cause: &str) {
        let query = "select state || ': ' || coalesce(cause, '') from es_sync.status";
        wait::until(&format!("status says: {cause}"), wait::LONG, || {
            let said = self.text(query);
            if said.contains(cause) { Ok(()) } else { Err(said) }
        });
    }

    /// Waits until the worker has noticed that the view was replaced and stands in line behind the writers, and asserts
    /// that no build has begun.
    #[track_caller]
    fn waits_for_writers(&mut self) {
        self.says("view public.document was replaced");
        let standing = "select count(*) from pg_locks l join es_sync.status s on s.worker_pid = l.pid
                        where l.locktype = 'relation' and l.mode = 'ShareRowExclusiveLock' and not l.granted";
        wait::until("the worker asks for a table's lock", wait::SHORT, || self.count(standing) > 0);
        assert_eq!(self.rebuilds(), 0);
        assert!(!self.engine.exists(&format!("{}-2", self.index)), "no index is built before the writer has ended");
    }

    #[track_caller]
    fn is_fine(&mut self) {
        self.settle();
        self.says("ok: ");
    }
}

const ROOT: &str = "
    create table root (id int primary key, title text, price int, secret text);
    insert into root select i, 'title ' || i, i, 'secret ' || i from generate_series(1, 50) i;";

const HOSTS: &str = "
    create table host (id int primary key, name text, note text);
    create table root (id int primary key, title text, host_id int references host);
    create index on root (host_id);
    create view document as
        select r.id, r.title, h.name as host from root r left join host h on h.id = r.host_id;
    insert into host values (1, 'one'), (2, 'two');
    insert into root select i, 'title ' || i, i % 2 + 1 from generate_series(1, 30) i;";

#[test]
fn an_added_column_is_searchable_from_its_first_document_on_both_products() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let url = engine.url().to_owned();
        let mut shop = Shop::behind(engine, &url, ROOT).attach("");
        shop.not_rebuilt_by("alter table root add column tag text; update root set tag = 'blue' where id <= 5");
        assert_eq!(shop.found(json!({"match": {"tag": "blue"}})), 5);
        shop.not_rebuilt_by(
            "begin; alter table root add column size int; update root set size = 3 where id <= 7; commit",
        );
        assert_eq!(shop.found(json!({"term": {"size": 3}})), 7);
        // Documents from before do not have the fields, which is no difference.
        shop.run("select es_sync.verify('root')");
        shop.settle();
        assert_eq!(
            shop.text("select sum(different + missing + orphaned)::text from es_sync.jobs where kind = 'verify'"),
            "0"
        );
    }
}

#[test]
fn a_column_added_with_a_default_is_in_every_document() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.rebuilt_by("alter table root add column size int default 7", "column \"size\" was added with values");
    assert_eq!(shop.found(json!({"term": {"size": 7}})), 50);
    shop.rebuilt_by(
        "alter table root add column mark text default 'x'; alter table root alter column mark drop default",
        "mark",
    );
    assert_eq!(shop.found(json!({"match": {"mark": "x"}})), 50);
}

#[test]
fn a_column_added_with_a_default_that_rewrites_the_table_is_in_every_document() {
    let mut shop = Shop::new(ROOT).attach("");
    for statement in [
        "alter table root add column u uuid not null default gen_random_uuid()",
        "alter table root add column s serial",
        "alter table root add column i int generated always as identity",
    ] {
        let before = shop.rebuilds();
        shop.run(statement);
        shop.settle();
        assert!(shop.rebuilds() > before, "{statement}");
    }
    assert_eq!(shop.found(json!({"exists": {"field": "u"}})), 50);
}

#[test]
fn a_generated_column_that_is_added_is_in_every_document() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.rebuilt_by("alter table root add column twice int generated always as (price * 2) stored", "twice");
    assert_eq!(shop.found(json!({"range": {"twice": {"gte": 60}}})), 21);
    shop.not_rebuilt_by("update root set price = 1000 where id = 1");
    assert_eq!(shop.found(json!({"term": {"twice": 2000}})), 1);
}

#[test]
fn a_generated_column_is_taken_for_the_same_whatever_the_session_s_notation() {
    for session in
        ["", "set intervalstyle = 'sql_standard'; set timezone = 'Asia/Tokyo'; set quote_all_identifiers = on;"]
    {
        let mut shop = Shop::new(&format!(
            "{session} create table root (
                 id int primary key, at timestamp, later timestamp generated always as (at + interval '36 hours') stored);
             insert into root select i, '2024-01-01' from generate_series(1, 10) i"
        ))
        .attach("");
        shop.not_rebuilt_by(
            "alter table root alter at set statistics 10; update root set at = '2024-01-02' where id = 3",
        );
        assert!(!shop.server.log().contains("built anew"), "after: {session}");
    }
}

#[test]
fn a_column_added_through_a_partitioned_root_is_in_every_document() {
    let mut shop = Shop::new(
        "create table root (id int primary key, title text) partition by range (id);
         create table low partition of root for values from (0) to (20);
         create table high partition of root for values from (20) to (100);
         insert into root select i, 'title ' || i from generate_series(1, 50) i;",
    )
    .attach("");
    shop.rebuilt_by("alter table root add column size int default 7", "size");
    shop.run("alter table root alter column size type text using 's' || size");
    shop.settle();
    shop.not_rebuilt_by("alter table root add column tag text; update root set tag = 'blue' where id < 30");
    assert_eq!(shop.found(json!({"match": {"tag": "blue"}})), 29);
}

#[test]
fn a_column_added_during_a_reindex_is_searchable_afterwards() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let url = proxy.url().to_owned();
    let mut shop = Shop::behind(engine, &url, ROOT).attach("");
    shop.run("insert into root select i, 't', i, 's' from generate_series(100, 20000) i");
    shop.settle();
    // The new index is there, and its load cannot go on.
    proxy.judge(|head, _| head.contains("_bulk").then(|| (503, "{}".to_owned())));
    shop.run("select es_sync.reindex('root')");
    wait::until("the load has begun", wait::LONG, || {
        shop.text("select max(phase) from es_sync.jobs where kind = 'reindex' and state = 'running'") == "load"
    });
    shop.run("alter table root add column tag text; update root set tag = 'blue' where id <= 5");
    proxy.judge(|_, _| None);
    shop.settle();
    assert_eq!(shop.found(json!({"match": {"tag": "blue"}})), 5);
}

#[test]
fn a_column_added_while_the_engine_is_down_is_searchable_afterwards() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let url = proxy.url().to_owned();
    let mut shop = Shop::behind(engine, &url, ROOT).attach("");
    proxy.set(Fault::Refuse);
    shop.run("alter table root add column tag text; update root set tag = 'blue' where id <= 5");
    shop.run("alter table root add column size int default 7");
    proxy.set(Fault::Pass);
    shop.settle();
    assert_eq!(shop.found(json!({"match": {"tag": "blue"}})), 5);
    assert_eq!(shop.found(json!({"term": {"size": 7}})), 50);
}

#[test]
fn a_column_added_while_no_worker_runs_is_noticed_by_the_next_one() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.run("select pg_terminate_backend(worker_pid) from es_sync.status");
    shop.run("alter table root add column tag text; update root set tag = 'blue' where id <= 5");
    shop.run("alter table root rename title to name");
    shop.settle();
    assert_eq!(shop.found(json!({"match": {"tag": "blue"}})), 5);
}

#[test]
fn a_column_whose_type_conflicts_with_a_field_of_the_index_is_indexed_anew() {
    // The engines' words for a conflict are not the same.
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        conflicting_types(engine);
    }
}

fn conflicting_types(engine: Engine) {
    let url = engine.url().to_owned();
    let mut shop = Shop::behind(engine, &url, ROOT).attach("");
    let concrete = shop.engine.indexes_of(&shop.index)[0].clone();
    shop.engine.put(&format!("/{concrete}/_mapping"), json!({"properties": {"tag": {"type": "integer"}}}));
    shop.run("alter table root add column tag text; update root set tag = 'blue' where id <= 5");
    shop.settle();
    assert_eq!(shop.found(json!({"match": {"tag": "blue"}})), 5);
    assert_eq!(shop.rebuilds(), 1);
    // The same name again with another type.
    shop.run("alter table root drop column tag; alter table root add column tag jsonb default '{\"a\": 1}'");
    shop.settle();
    assert_eq!(shop.count("select count(*) from es_sync.dead_letters"), 0);
}

#[test]
fn ddl_that_rolls_back_leaves_nothing() {
    let mut shop = Shop::new(ROOT);
    shop.rows = "select id, row_to_json(t) from (select id, title, price from root) t".to_owned();
    let mut shop = shop.attach(", exclude => '{secret}'");
    shop.not_rebuilt_by(
        "begin; alter table root add column size int default 7; alter table root rename title to name;
         alter table root alter column price type text; alter table root rename secret to hidden;
         alter table root rename id to key; update root set name = 'x'; truncate root; rollback;
         update root set title = 'y' where id = 1",
    );
    assert_eq!(shop.text("select key_columns::text || exclude::text from es_sync.status"), "{id}{secret}");
}

#[test]
fn a_dropped_column_leaves_every_document() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.rebuilt_by("alter table root drop column price", "column \"price\" was dropped");
}

#[test]
fn a_renamed_column_is_renamed_in_every_document() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.rebuilt_by("alter table root rename title to name", "column \"title\" was renamed to \"name\"");
    assert_eq!(shop.found(json!({"match": {"name": "title"}})), 50);
    shop.not_rebuilt_by("update root set name = 'other' where id = 3");
}

#[test]
fn an_excluded_column_stays_excluded_under_another_name() {
    let mut shop = Shop::new(ROOT);
    shop.rows = "select id, row_to_json(t) from (select id, title, price from root) t".to_owned();
    let mut shop = shop.attach(", exclude => '{secret}'");
    shop.not_rebuilt_by("alter table root rename secret to hidden; update root set title = title || '!'");
    assert_eq!(shop.text("select exclude::text from es_sync.status"), "{hidden}");
    shop.not_rebuilt_by("alter table root drop column hidden; update root set title = title || '!'");
}

#[test]
fn a_mapping_of_the_users_own_keeps_with_its_column_under_another_name() {
    let options = r#", options => '{"mappings": {"properties": {
        "title": {"type": "keyword"}, "price": {"type": "long"}, "picture": {"doc_values": true}}}}'"#;
    let document = "'title', title, 'price', price, 'secret', secret, 'picture', encode(picture, 'base64')";
    let mut shop = Shop::new(&format!("{ROOT} alter table root add column picture bytea default '\\x00ff'"));
    shop.rows = format!("select id, json_build_object('id', id, {document}) from root");
    let mut shop = shop.attach(options);
    let types = |shop: &Shop, fields: &[&str]| -> Vec<String> {
        let mapping = shop.engine.get(&format!("/{}/_mapping", shop.index));
        let index = mapping.as_object().and_then(|indexes| indexes.values().next()).cloned().unwrap_or_default();
        let kind = |field: &&str| index["mappings"]["properties"][*field]["type"].as_str().unwrap_or("none").to_owned();
        fields.iter().map(kind).collect()
    };
    assert_eq!(types(&shop, &["title", "price", "picture"]), ["keyword", "long", "binary"]);
    shop.rows = shop.rows.replace("'title', title", "'name', name").replace("picture", "image");
    shop.rebuilt_by(
        "begin; alter table root rename title to name; alter table root rename picture to image;
         update root set name = 'changed' where id = 1; commit",
        "column \"title\" was renamed to \"name\"",
    );
    assert_eq!(types(&shop, &["name", "price", "image", "title"]), ["keyword", "long", "binary", "none"]);
    // Two at once, each to the other's name.
    shop.rebuilt_by(
        "begin; alter table root rename name to t; alter table root rename price to name;
         alter table root rename t to price; commit",
        "was renamed",
    );
    assert_eq!(types(&shop, &["price", "name"]), ["keyword", "long"]);
    assert!(shop.text("select options::text from es_sync.attachment").contains(r#""image": {"doc_values""#));
}

#[test]
fn a_filter_whose_column_is_renamed_or_dropped_is_told_in_status_until_there_is_one_again() {
    let mut shop = Shop::new(ROOT);
    shop.rows = "select id, row_to_json(t) from root t where price > 10".to_owned();
    let mut shop = shop.attach(", filter => 'price > 10'");
    let told = "stale: its filter cannot be evaluated: column \"price\" does not exist";
    shop.run(
        "alter table root rename price to cost; update root set cost = 1 where id = 20;
         update root set cost = 99 where id = 1; delete from root where id = 30; insert into root values (60, 'new', 60)",
    );
    shop.says(told);
    let waited: bool = shop.client.query_one("select es_sync.wait(timeout => '1 s')", &[]).unwrap().get(0);
    assert!(!waited);
    assert_eq!(shop.engine.count(&shop.index), 40, "the index stays as it was");
    shop.run("alter table root rename cost to price");
    shop.is_fine();
    shop.run("alter table root drop column price; update root set title = 'x' where id = 3");
    shop.says(told);
    shop.run("alter table root add column price int default 20; update root set price = 5 where id < 10");
    shop.is_fine();
    assert_eq!(shop.count("select count(*) from es_sync.dead_letters"), 0);
}

#[test]
fn a_renamed_key_column_goes_on_identifying_documents() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.rows = "select key, row_to_json(t) from root t".to_owned();
    shop.rebuilt_by(
        "alter table root rename id to key; update root set title = 'changed' where key < 10; delete from root where key = 50",
        "column \"id\" was renamed to \"key\"",
    );
    assert_eq!(shop.text("select key_columns::text from es_sync.status"), "{key}");
    shop.run("begin; alter table root rename key to nr; update root set title = 'again' where nr > 40; commit; delete from root where nr = 1");
    shop.rows = "select nr, row_to_json(t) from root t".to_owned();
    shop.settle();
    shop.not_rebuilt_by("insert into root values (100, 'new'); update root set nr = 200 where nr = 2");
}

#[test]
fn rows_are_synced_in_the_transaction_that_renames_their_key_column() {
    let mut shop = Shop::new(HOSTS).attach("");
    let hosts = unique("hosts");
    shop.run(&format!(
        "create view shown as select h.id, (select min(r.title) from root r where r.id = h.id) as title from host h;
         select es_sync.attach('host', index => '{hosts}', document => 'shown')"
    ));
    shop.settle();
    for (former, now, sync) in [
        ("id", "key", "es_sync.sync('root', 3)"),
        ("key", "nr", "es_sync.sync_where('root', 'nr = 3')"),
        ("nr", "number", "es_sync.sync_full('root', 3)"),
    ] {
        let query = format!("/{}/_doc/3?refresh=true", shop.index);
        shop.engine.delete(&query);
        shop.rows = format!("select {now}, row_to_json(t) from root t");
        shop.run(&format!("begin; alter table root rename {former} to {now}; select {sync}; commit"));
        shop.settle();
    }
    let hosts_as_shown = "select id, row_to_json(s) from shown s";
    expect::documents_equal(&mut shop.client, hosts_as_shown, &shop.engine, &hosts);
}

#[test]
fn a_renamed_key_column_of_a_view_s_table_waits_for_the_view_and_loses_nothing() {
    let mut shop = Shop::new(HOSTS).attach_view();
    shop.run("alter table root rename id to key");
    shop.says("view public.document has no column \"key\"");
    shop.run("update root set title = 'changed' where key < 5; delete from root where key = 30; update host set name = 'uno' where id = 1");
    shop.run("alter view document rename column id to key");
    shop.rows = "select key, row_to_json(d) from document d".to_owned();
    shop.is_fine();
    // All at once, with a reindex that the worker has not heard of yet.
    shop.run(
        "begin; alter table root rename key to id; alter view document rename column key to id;
         select es_sync.reindex('root'); update root set title = 'at once' where id = 9; commit",
    );
    shop.rows = "select id, row_to_json(d) from document d".to_owned();
    shop.is_fine();
    shop.each(&["update host set name = 'eins' where id = 1", "update root set title = 'last' where id = 7"]);
}

#[test]
fn a_column_s_type_changed_with_a_rewrite_is_changed_in_every_document() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.rebuilt_by(
        "alter table root alter column price type text using 'EUR ' || price",
        "column \"price\" was altered",
    );
    assert_eq!(shop.found(json!({"match": {"price": "EUR"}})), 50);
    // The same type, other values: no trigger fires, and no column looks different.
    let before = shop.rebuilds();
    shop.run("alter table root alter column title type text using upper(title)");
    shop.settle();
    assert_eq!(shop.rebuilds(), before + 1);
    assert_eq!(shop.found(json!({"term": {"title.keyword": "TITLE 7"}})), 1);
}

#[test]
fn a_column_s_type_changed_without_a_rewrite_is_followed() {
    let mut shop = Shop::new(
        "set timezone = 'UTC';
         create table root (id int primary key, name varchar(10), at timestamptz);
         insert into root select i, 'name ' || i, '2024-01-01'::timestamptz + i * interval '1 hour' from generate_series(1, 40) i;",
    )
    .attach("");
    shop.not_rebuilt_by("alter table root alter column name type varchar(20)");
    shop.not_rebuilt_by(
        "alter table root alter column name type text; update root set name = repeat('long ', 10) where id = 1",
    );
    let file = "select pg_relation_filenode('root')::text";
    let before = shop.text(file);
    shop.rebuilt_by("alter table root alter column at type timestamp", "column \"at\" was altered");
    assert_eq!(shop.text(file), before, "it was no rewrite");
}

#[test]
fn a_key_column_s_type_may_change() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.rebuilt_by(
        "alter table root alter column id type bigint; update root set title = 'a' where id = 1",
        "column \"id\" was altered",
    );
    shop.rebuilt_by("alter table root alter column id type text using 'k' || id", "column \"id\" was altered");
    shop.not_rebuilt_by("insert into root values ('new', 'x'); delete from root where id = 'k3'; update root set id = 'other' where id = 'k4'");
    // What the queue holds is no key any more.
    shop.rebuilt_by(
        "begin; update root set title = 'x' where id = 'other'; delete from root where id in ('new', 'other');
         alter table root alter column id type int using substr(id, 2)::int; commit",
        "column \"id\" was altered",
    );
    assert_eq!(shop.count("select count(*) from es_sync.dead_letters"), 0);
}

/// The worker has made its statement and waits for the table's lock while that is altered. What it then reads may be of
/// another type than it knows of, where a number taken for a text's address would end the server; and to a snapshot from
/// before, the table is empty.
#[test]
fn a_table_that_is_altered_under_a_waiting_read_is_read_as_it_is_then() {
    for (from, column, to) in [
        ("id int primary key, value text", "value", "int using length(value)"),
        ("id int primary key, value int", "value", "int using value + 1"),
        ("id int primary key, value int", "value", "bigint using value * 10000000000"),
        ("id text primary key, value int", "id", "int using id::int"),
    ] {
        let mut shop = Shop::new(&format!(
            "create table root ({from}, note int); insert into root select i, i, 0 from generate_series(1, 50) i"
        ))
        // Time to begin before a change is read.
        .attach(", options => '{\"delay\": \"1s\"}'");
        // A change has been read: the statement is prepared.
        shop.run("update root set note = 1");
        shop.settle();
        let worker = "select string_agg(worker_pid::text, '') from es_sync.status";
        let pid = shop.text(worker);
        shop.run("select pg_advisory_lock(7); update root set note = 2");
        let mut other = shop.server.connect("shop");
        // It holds the table's lock while it waits for ours. No session hears of it before, since the new table has no
        // TOAST table.
        let to = to.replace("using ", "using case when pg_advisory_lock_shared(7) is not null then ");
        let alter = format!("alter table root alter column {column} type {to} end");
        let alteration = std::thread::spawn(move || other.batch_execute(&alter).expect("alter"));
        let waits = "select count(*) from pg_locks l join es_sync.status s on s.worker_pid = l.pid
                      where l.locktype = 'relation' and l.mode = 'AccessShareLock' and not l.granted";
        wait::until("the worker's read waits", wait::SHORT, || shop.count(waits) > 0);
        shop.run("select pg_advisory_unlock(7)");
        alteration.join().expect("the table is altered");
        shop.settle();
        assert_eq!(shop.text(worker), pid, "the worker was started anew after: {column} {to}");
        assert_eq!(shop.count("select count(*) from es_sync.dead_letters"), 0);
        // The rows were all there, all the time.
        assert_eq!(shop.count("select deleted from es_sync.status"), 0, "after: {column} {to}");
    }
}

#[test]
fn a_renamed_table_and_schema_are_followed() {
    let mut shop = Shop::new(&format!("{HOSTS} create schema other")).attach_view();
    shop.not_rebuilt_by("alter table root rename to moved; update moved set title = 'a' where id = 1");
    shop.not_rebuilt_by("alter table moved set schema other; update other.moved set title = 'b' where id = 2");
    shop.not_rebuilt_by("alter schema other rename to another; update another.moved set title = 'c' where id = 3");
    shop.not_rebuilt_by("alter table host rename to place; update place set name = 'uno' where id = 1");
    shop.not_rebuilt_by("alter view document rename to shown; alter view shown set schema another; create view document as table another.shown");
    shop.not_rebuilt_by("update place set name = 'due' where id = 2; delete from another.moved where id = 4");
    let note = shop.text("select note from es_sync.status");
    assert!(note.contains("attached as public.root"), "{note}");
    assert_eq!(shop.text("select relation::text from es_sync.status"), "another.moved");
}

#[test]
fn tables_swapped_by_rename_are_followed_as_the_tables_that_they_are_and_status_says_so() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.rows = "select id, row_to_json(t) from root_old t".to_owned();
    shop.not_rebuilt_by(
        "create table root_new (like root including all); insert into root_new values (1000, 'new');
         begin; alter table root rename to root_old; alter table root_new rename to root; commit;
         insert into root values (1001, 'not followed'); update root_old set title = 'followed' where id = 1",
    );
    assert_eq!(shop.text("select relation::text from es_sync.status"), "root_old");
    let note = shop.text("select note from es_sync.status");
    assert!(note.contains("attached as public.root"), "{note}");
}

#[test]
fn a_replaced_view_is_noticed_with_its_new_columns_and_tables() {
    let mut shop = Shop::new(&format!(
        "{HOSTS} create table city (id int primary key, name text); insert into city values (1, 'Bonn')"
    ))
    .attach_view();
    shop.rebuilt_by(
        "create or replace view document as
             select r.id, r.title, h.name as host, c.name as city
             from root r left join host h on h.id = r.host_id left join city c on c.id = r.host_id",
        "view public.document was replaced",
    );
    shop.each(&["update city set name = 'Rom'", "insert into city values (2, 'Oslo')", "update host set name = 'x'"]);
    // The same text again is no other view.
    shop.not_rebuilt_by(
        "create or replace view document as
             select r.id, r.title,   h.name as host, c.name as city
             from root r left join host h on h.id = r.host_id left join city c on c.id = r.host_id",
    );
}

#[test]
fn a_renamed_column_of_a_view_is_renamed_in_every_document_and_keeps_its_mapping() {
    let mut shop = Shop::new(HOSTS);
    shop.rows = "select id, row_to_json(d) from document d".to_owned();
    let mut shop = shop.attach(
        r#", document => 'document', options => '{"mappings": {"properties": {"host": {"type": "keyword"}}}}'"#,
    );
    shop.rebuilt_by("alter view document rename column host to owner", "column \"host\" was renamed to \"owner\"");
    assert_eq!(shop.found(json!({"term": {"owner": "one"}})), 15);
    shop.not_rebuilt_by("update host set name = 'uno' where id = 1; update root set title = 'x' where id = 1");
}

#[test]
fn a_replaced_inner_view_is_noticed() {
    let mut shop = Shop::new(
        "create table host (id int primary key, name text, note text);
         create table root (id int primary key, title text, host_id int);
         create view inner_hosts as select id, name from host;
         create view middle as select * from inner_hosts;
         create view document as select r.id, r.title, h.name as host from root r left join middle h on h.id = r.host_id;
         insert into host values (1, 'one', 'eins'), (2, 'two', 'zwei');
         insert into root select i, 'title ' || i, i % 2 + 1 from generate_series(1, 30) i;",
    )
    .attach_view();
    shop.rebuilt_by(
        "create or replace view inner_hosts as select id, note as name from host",
        "view public.inner_hosts was replaced",
    );
    shop.each(&["update host set note = 'uno' where id = 1"]);
}

#[test]
fn a_replaced_view_that_the_filter_reads_is_noticed() {
    let mut shop = Shop::new(&format!(
        "{ROOT} create view inner_dear as select id, price from root where price > 10;
         create view dear as select id from inner_dear"
    ));
    shop.rows = "select id, row_to_json(t) from root t where id in (select id from dear)".to_owned();
    let mut shop = shop.attach(", filter => 'id in (select d.id from public.dear d)'");
    shop.rebuilt_by(
        "create or replace view dear as select id from inner_dear where price < 40",
        "view public.dear was replaced",
    );
    shop.rebuilt_by(
        "create or replace view inner_dear as select id, price from root where price > 30",
        "view public.inner_dear was replaced",
    );
    shop.each(&["update root set price = 35 where id = 1"]);
}

#[test]
fn a_replaced_view_whose_tables_cannot_be_followed_is_told_in_status_until_it_is_mended() {
    let mut shop = Shop::new(&format!(
        "{HOSTS} create table city (id int primary key, name text); insert into city values (1, 'Bonn')"
    ))
    .attach_view();
    shop.run(
        "create or replace view document as
             select r.id, r.title, h.name as host, (select max(c.name) from city c) as city
             from root r left join host h on h.id = r.host_id",
    );
    shop.says("stale: its related tables cannot be followed: cannot follow table public.city");
    shop.run("select es_sync.relate('root', 'city', 'select id from public.root where related.id is not null')");
    shop.is_fine();
    shop.each(&["update city set name = 'Rom'"]);
}

#[test]
fn a_view_replaced_under_a_running_writer_misses_none_of_its_changes() {
    let mut shop = Shop::new(HOSTS).attach_view();
    let mut writer = shop.server.connect("shop");
    // By the rules of now, nobody shows the note.
    writer.batch_execute("begin; update host set note = 'written by the former rules' where id = 1").unwrap();
    shop.run(
        "create or replace view document as
             select r.id, r.title, h.name as host, h.note from root r left join host h on h.id = r.host_id",
    );
    shop.waits_for_writers();
    writer.batch_execute("commit").unwrap();
    shop.is_fine();
    shop.each(&["update host set note = 'new' where id = 2"]);
}

#[test]
fn a_view_replaced_beside_a_prepared_transaction_misses_none_of_its_changes() {
    let mut shop = Shop::new(HOSTS).attach_view();
    shop.run(
        "begin; update host set note = 'prepared by the former rules' where id = 1;
         update root set title = 'prepared' where id = 3; prepare transaction 'writer'",
    );
    shop.run(
        "create or replace view document as
             select r.id, r.title, h.name as host, h.note from root r left join host h on h.id = r.host_id",
    );
    shop.waits_for_writers();
    shop.run("commit prepared 'writer'");
    shop.is_fine();
    shop.each(&["update host set note = 'new' where id = 2"]);
}

#[test]
fn ddl_under_writers_ends_equal_and_searchable() {
    let mut shop = Shop::new(ROOT).attach("");
    let stop = AtomicBool::new(false);
    let (server, writes) = (&shop.server, AtomicUsize::new(0));
    let write = |number: usize| {
        let mut client = server.connect("shop");
        let mut round = number;
        while !stop.load(Ordering::Relaxed) {
            round += 3;
            let id = 1 + round % 60;
            for table in ["root", "moved"] {
                let outcome = client.batch_execute(&format!(
                    "begin; update {table} set title = 'written {round}' where id = {id};
                     insert into {table} (id, title) values ({}, 'new') on conflict do nothing;
                     delete from {table} where id = {}; commit",
                    1 + (round + 20) % 60,
                    1 + (round + 40) % 60
                ));
                match outcome {
                    Ok(()) => writes.fetch_add(1, Ordering::Relaxed),
                    Err(error) => {
                        // It has the other name, or a deadlock was broken.
                        let expected = [SqlState::UNDEFINED_TABLE, SqlState::T_R_DEADLOCK_DETECTED];
                        assert!(error.code().is_some_and(|code| expected.contains(code)), "{error:?}");
                        client.batch_execute("rollback").expect("rollback");
                        continue;
                    }
                };
            }
        }
    };
    let mut client = server.connect("shop");
    std::thread::scope(|scope| {
        // Also if this one fails.
        let _end = Raise(&stop);
        let writers: Vec<_> = (0..3).map(|number| scope.spawn(move || write(number))).collect();
        for round in 0..6 {
            for statement in [
                format!("alter table root add column c{round} int"),
                format!(
                    "begin; lock table root in share row exclusive mode;
                     update root set c{round} = id where id % 2 = 0; commit"
                ),
                format!("alter table root add column d{round} int default {round}"),
                format!("alter table root rename c{round} to e{round}"),
                "alter table root rename to moved".to_owned(),
                format!("alter table moved alter column e{round} type text using 'e' || e{round}"),
                format!("alter table moved drop column d{round}"),
                "alter table moved rename to root".to_owned(),
                // The last of it.
                format!(
                    "alter table root add column tag{round} text; update root set tag{round} = 'blue' where id <= 5"
                ),
            ] {
                let before = writes.load(Ordering::Relaxed);
                client.batch_execute(&statement).unwrap_or_else(|error| panic!("{error:?} in: {statement}"));
                wait::until("writers go on", wait::LONG, || {
                    writes.load(Ordering::Relaxed) > before || writers.iter().any(|writer| writer.is_finished())
                });
            }
        }
    });
    shop.run("insert into root (id, title, tag5) values (100, 'last', 'blue')");
    shop.settle();
    let tagged = shop.count("select count(*) from root where tag5 = 'blue'");
    assert_eq!(shop.found(json!({"match": {"tag5": "blue"}})), tagged as usize);
    assert_eq!(shop.count("select count(*) from es_sync.dead_letters"), 0);
}

#[test]
fn a_replaced_function_of_a_view_makes_every_document_anew() {
    let mut shop = Shop::new(
        "create function shown(text) returns text immutable language sql as 'select upper($1)';
         create table root (id int primary key, title text);
         create view document as select id, shown(title) as title from root;
         insert into root select i, 'title ' || i from generate_series(1, 30) i;",
    )
    .attach_view();
    shop.rebuilt_by(
        "create or replace function shown(text) returns text immutable language sql as 'select reverse($1)'",
        "function public.shown(text) was replaced",
    );
    shop.not_rebuilt_by("create function other(text) returns text immutable language sql as 'select $1'");
}

#[test]
fn a_replaced_aggregate_or_function_of_an_operator_makes_every_document_anew() {
    let mut shop = Shop::new(
        "create function joined(text, text) returns text immutable language sql as $$ select concat_ws(',', $1, $2) $$;
         create aggregate together(text) (sfunc = joined, stype = text, initcond = 'a');
         create function alike(text, text) returns boolean immutable language sql as 'select lower($1) = lower($2)';
         create operator === (function = alike, leftarg = text, rightarg = text);
         create table root (id int primary key, title text);
         create view document as
             select id, title === 'TITLE 3' as third,
                    (select together(word) from unnest(string_to_array(title, ' ')) word) as words
             from root;
         insert into root select i, 'title ' || i from generate_series(1, 30) i;",
    )
    .attach_view();
    for (statement, name) in [
        (
            "function joined(text, text) returns text immutable language sql as $$ select concat_ws('-', $1, $2) $$",
            "joined(text,text)",
        ),
        ("aggregate together(text) (sfunc = joined, stype = text, initcond = 'b')", "together(text)"),
        ("aggregate together(text) (sfunc = textcat, stype = text, initcond = '')", "together(text)"),
        ("function alike(text, text) returns boolean immutable language sql as 'select $1 <> $2'", "alike(text,text)"),
    ] {
        let cause = format!("function public.{name} was replaced");
        shop.rebuilt_by(&format!("create or replace {statement}"), &cause);
    }
    let document = shop.engine.source(&shop.index, "3").unwrap();
    assert!(document.contains("title3") && document.contains("true"), "{document}");
    // The same of a filter, which no dependency leads to.
    let filtered = unique("filtered");
    let filter = "title operator(public.===) 'title 3'
                  or id in (select max(t.id) from public.root t having public.together(t.title) = 'x')";
    shop.run(&format!("select es_sync.attach('root', index => '{filtered}', filter => $f${filter}$f$)"));
    shop.settle();
    for statement in [
        "function alike(text, text) returns boolean immutable language sql as 'select $1 = $2'",
        "aggregate together(text) (sfunc = text_larger, stype = text, initcond = 'x')",
    ] {
        shop.run(&format!("create or replace {statement}"));
        shop.settle();
        let rows = format!("select id, row_to_json(r) from root r where {filter}");
        expect::documents_equal(&mut shop.client, &rows, &shop.engine, &filtered);
    }
    assert_eq!(shop.engine.count(&filtered), 2);
}

#[test]
fn a_replaced_function_of_a_filter_is_noticed() {
    let mut shop = Shop::new(ROOT);
    shop.run("create function passes(int) returns boolean immutable language sql as 'select $1 > 10'");
    shop.rows = "select id, row_to_json(t) from root t where public.passes(price)".to_owned();
    let mut shop = shop.attach(", filter => 'public.passes(price)'");
    shop.rebuilt_by(
        "create or replace function passes(int) returns boolean immutable language sql as 'select $1 < 5'",
        "function public.passes(integer) was replaced",
    );
    shop.run("alter function passes(int) rename to passed");
    shop.says("its filter cannot be evaluated");
    shop.run("update root set price = 1 where id = 20; alter function passed(int) rename to passes");
    shop.is_fine();
}

#[test]
fn while_the_schema_of_a_filters_function_has_another_name_nothing_is_parked_or_built() {
    let mut shop = Shop::new(ROOT);
    shop.run(
        "create schema app; create function app.passes(int) returns boolean immutable language sql as 'select $1 > 10'",
    );
    shop.rows = "select id, row_to_json(t) from root t where app.passes(price)".to_owned();
    let mut shop = shop.attach(", filter => 'app.passes(price)'");
    shop.run("alter schema app rename to former; update root set price = 1 where id = 20");
    shop.says("schema \"app\" does not exist");
    shop.run("alter schema former rename to app");
    shop.is_fine();
    assert_eq!(shop.client.query("select key from es_sync.dead_letters", &[]).expect("letters").len(), 0);
}

#[test]
fn a_renamed_value_of_an_enum_is_renamed_in_every_document_and_a_new_one_costs_nothing() {
    let mut shop = Shop::new(
        "create type mood as enum ('sad', 'happy');
         create domain feeling as mood;
         create table root (id int primary key, mood mood, feelings mood[], feeling feeling);
         insert into root select i, 'sad', '{sad,happy}', 'happy' from generate_series(1, 30) i;",
    )
    .attach("");
    shop.not_rebuilt_by("alter type mood add value 'new'");
    shop.not_rebuilt_by("update root set mood = 'new' where id < 5");
    shop.rebuilt_by("alter type mood rename value 'sad' to 'blue'", "type public.mood was altered");
    assert_eq!(shop.found(json!({"term": {"mood": "blue"}})), 26);
}

#[test]
fn a_renamed_value_of_an_enum_that_another_table_has_is_renamed_in_every_document() {
    let mut shop = Shop::new(
        "create type mood as enum ('sad', 'happy');
         create table host (id int primary key, mood mood);
         create table root (id int primary key, host_id int);
         create view document as select r.id, h.mood::text as mood from root r left join host h on h.id = r.host_id;
         insert into host values (1, 'sad'), (2, 'happy');
         insert into root select i, i % 2 + 1 from generate_series(1, 30) i;",
    )
    .attach_view();
    shop.not_rebuilt_by("alter type mood add value 'new'");
    shop.rebuilt_by("alter type mood rename value 'sad' to 'blue'", "type public.mood was altered");
    assert_eq!(shop.found(json!({"match": {"mood": "blue"}})), 15);
    shop.not_rebuilt_by("update host set mood = 'new' where id = 2");
}

#[test]
fn an_altered_composite_type_makes_every_document_anew() {
    let mut shop = Shop::new(
        "create type place as (street text, town text);
         create table root (id int primary key, place place);
         insert into root select i, row('street', 'town')::place from generate_series(1, 20) i;",
    )
    .attach("");
    shop.rebuilt_by("alter type place rename attribute town to city", "type public.place was altered");
    shop.run("alter type place add attribute zip text; update root set place.zip = '1' where id = 1");
    shop.settle();
}

#[test]
fn a_dropped_table_is_let_go_with_its_view_or_without() {
    let mut shop = Shop::new(HOSTS).attach_view();
    let message = shop.refused("drop table root");
    assert!(message.contains("cannot drop table root because other objects depend on it"), "{message}");
    shop.run("drop table root cascade");
    wait::until("the attachment is gone", wait::LONG, || shop.count("select count(*) from es_sync.status") == 0);
    shop.run("update host set name = 'x'; drop table host");
    shop.run(&format!("{ROOT} select es_sync.attach('root', index => '{}')", unique("ddl")));
    expect::settled(&mut shop.client);
    shop.run("drop table root");
    wait::until("the attachment is gone", wait::LONG, || shop.count("select count(*) from es_sync.status") == 0);
    assert_eq!(
        shop.server.unexpected_log_lines(&["is detached, and stays as it is", "cannot drop table root"]),
        Vec::<String>::new()
    );
}

/// In one transaction, one after the other, and while the former table is still being loaded.
#[test]
fn a_table_that_is_dropped_and_created_anew_is_attached_anew() {
    let mut shop = Shop::new(ROOT).attach("");
    let (index, anew) = (shop.index.clone(), ROOT.replace("title", "anew"));
    let attach = format!("select es_sync.attach('root', index => '{index}')");
    let mut former = shop.engine.indexes_of(&index);
    shop.run(&format!(
        "begin; insert into root values (1000, 'lost'); drop table root; {anew} delete from root where id > 5; {attach};
         insert into root values (70, 'after'); commit"
    ));
    shop.settle();
    let worker = shop.server.workers().into_iter().find(|(.., database)| database == "shop").expect("a worker").0;
    process::signal(worker, "STOP");
    shop.run("drop table root");
    shop.run(ROOT);
    shop.run(&attach);
    process::signal(worker, "CONT");
    shop.settle();
    former.extend(shop.engine.indexes_of(&index));
    shop.run("insert into root select i, 'many' from generate_series(100, 30000) i");
    shop.run("select es_sync.reindex('root')");
    wait::until("it is being loaded", wait::LONG, || shop.count("select max(done) from es_sync.jobs") > 1000);
    shop.run(&format!("begin; drop table root; {anew} {attach}; commit; delete from root where id = 7"));
    shop.settle();
    assert_eq!(shop.count("select count(*) from es_sync.status"), 1);
    assert!(!former.iter().any(|former| shop.engine.exists(former)), "the next one replaces it");
    assert_eq!(shop.server.unexpected_log_lines(&[]), Vec::<String>::new());
}

#[test]
fn a_document_view_is_dropped_with_cascade_only_and_detached_then() {
    let mut shop = Shop::new(HOSTS).attach_view();
    let plain = unique("plain");
    shop.run(&format!("select es_sync.attach('root', index => '{plain}')"));
    shop.settle();
    let message = shop.refused("drop view document");
    assert!(message.contains("trigger es_sync_capture on table root depends on view document"), "{message}");
    shop.run("begin; drop view document cascade; rollback; update root set title = 'kept' where id = 1");
    shop.settle();
    shop.run(
        "drop view document cascade; update root set title = 'changed' where id < 10; update host set name = 'gone'",
    );
    // The other index of the table goes on, and misses nothing.
    wait::until("one index is left", wait::LONG, || shop.count("select count(*) from es_sync.status") == 1);
    expect::table_equal(&mut shop.client, "root", "id", &shop.engine, &plain);
    shop.run("insert into root values (100, 'new'); delete from root where id = 2");
    expect::table_equal(&mut shop.client, "root", "id", &shop.engine, &plain);
    let triggers = "select count(*) from pg_trigger where tgname like 'es_sync%' and tgrelid = 'host'::regclass";
    assert_eq!(shop.count(triggers), 0, "its related table is let go");
    assert!(shop.engine.exists(&shop.index));
    // Nothing depends on a view any more that is no longer read.
    shop.run("create view document as select id from root; drop view document");
}

#[test]
fn what_a_dropped_inner_view_or_schema_takes_along_is_let_go_and_the_rest_goes_on() {
    let mut shop = Shop::new(
        "create schema other;
         create table other.host (id int primary key, name text);
         create view other.hosts as select id, name from other.host;
         create table other.own (id int primary key);
         create table root (id int primary key, title text, host_id int);
         create view document as select r.id, h.name as host from root r left join other.hosts h on h.id = r.host_id;
         insert into other.host values (1, 'one');
         insert into root select i, 'title', 1 from generate_series(1, 20) i;",
    )
    .attach_view();
    let (plain, own) = (unique("plain"), unique("own"));
    shop.run(&format!(
        "select es_sync.attach('root', index => '{plain}'); select es_sync.attach('other.own', index => '{own}')"
    ));
    shop.settle();
    let message = shop.refused("drop view other.hosts");
    assert!(message.contains("view document depends on view other.hosts"), "{message}");
    let left = "select string_agg(relation::text, ' ' order by relation::text) from es_sync.status";
    for (statement, rest) in [
        ("drop view other.hosts cascade; update root set title = 'a' where id = 1", "other.own root"),
        ("drop schema other cascade; update root set title = 'b' where id = 2; delete from root where id = 3", "root"),
    ] {
        shop.run(statement);
        wait::until("what it took along is let go", wait::LONG, || {
            let is = shop.text(left);
            if is == rest { Ok(()) } else { Err(is) }
        });
        expect::table_equal(&mut shop.client, "root", "id", &shop.engine, &plain);
    }
    assert!(shop.engine.exists(&shop.index) && shop.engine.exists(&own), "the indexes stay");
}

#[test]
fn a_dropped_trigger_is_given_back_and_what_it_missed_is_mended() {
    let mut shop = Shop::new(HOSTS).attach_view();
    shop.run("drop trigger es_sync_capture on root; update root set title = 'missed' where id = 1");
    shop.run("drop trigger es_sync_capture on host; update host set name = 'missed'");
    let triggers = "select count(*) from pg_trigger where tgname like 'es_sync%'";
    wait::until("the triggers are back", wait::LONG, || shop.count(triggers) == 4);
    shop.settle();
    shop.each(&["update host set name = 'x' where id = 1", "update root set title = 'y' where id = 2"]);
}

#[test]
fn columns_of_a_related_table_may_be_renamed_and_dropped_where_no_document_shows_them() {
    let mut shop = Shop::new(HOSTS).attach_view();
    shop.not_rebuilt_by("alter table host drop column note");
    shop.not_rebuilt_by("alter table host rename name to label; update host set label = 'uno' where id = 1");
    shop.not_rebuilt_by("alter table root rename host_id to place_id; update root set place_id = 2 where id = 2");
    shop.not_rebuilt_by("alter table host rename id to nr; update host set label = 'due' where nr = 2");
    shop.not_rebuilt_by("insert into host values (3, 'three'); update root set place_id = 3 where id < 5");
    shop.not_rebuilt_by("alter table host add column u uuid default gen_random_uuid()");
    shop.not_rebuilt_by("update host set u = gen_random_uuid(), label = 'tre' where nr = 3");
    let message = shop.refused("alter table host drop column label");
    assert!(message.contains("other objects depend on it"), "{message}");
    shop.run("alter table host drop column label cascade");
    wait::until("the index is detached with its view", wait::LONG, || {
        shop.count("select count(*) from es_sync.status") == 0
    });
    shop.run("update root set title = 'x'; insert into host values (4)");
}

#[test]
fn a_lost_primary_key_is_told_in_status_until_there_is_one_again() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.run("alter table root drop constraint root_pkey");
    shop.says("stale: nothing keeps (id) of table public.root unique");
    shop.run("update root set title = 'still' where id = 1");
    shop.run("alter table root add primary key (id)");
    shop.is_fine();
    shop.not_rebuilt_by("alter table root replica identity nothing; update root set title = 'again' where id = 1");
    shop.not_rebuilt_by("alter table root replica identity full; delete from root where id = 2");
    // Another primary key: documents keep theirs as long as it identifies rows.
    shop.not_rebuilt_by("alter table root alter price set not null, drop constraint root_pkey, add primary key (price), add unique (id)");
    shop.not_rebuilt_by("update root set title = 'third', price = 1000 where id = 3");
    shop.run("alter table root drop constraint root_id_key");
    shop.says("stale: nothing keeps (id) of table public.root unique");
}

/// After DROP NOT NULL a key may be null, which no change of its row could name.
#[test]
fn a_row_whose_key_is_null_has_no_document_until_it_has_a_key() {
    let routed = r#", options => '{"routing": "title"}'"#;
    for (key, id, arguments) in [("id", "id", ""), ("id", "id", routed), ("id, part", "id || '|' || part", "")] {
        let mut shop = Shop::new(&format!(
            "create table root (id text, part text, title text, primary key ({key}));
             insert into root select i, i, 'title ' || i from generate_series(1, 50) i;"
        ));
        shop.rows = format!("select {id}, row_to_json(t) from root t where {id} is not null");
        let mut shop = shop.attach(arguments);
        shop.run(
            "alter table root drop constraint root_pkey;
             alter table root alter id drop not null, alter part drop not null;
             insert into root values (null, '51', 'without'), ('52', null, 'partly');
             select es_sync.reindex('root')",
        );
        let rebuilt = format!("{}-2", shop.index);
        wait::until("another index is live", wait::LONG, || shop.engine.indexes_of(&shop.index) == [&*rebuilt]);
        wait::until("rows without a key are not in it", wait::SHORT, || {
            expect::compare(&mut shop.client, &shop.rows, &shop.engine, &shop.index)
        });
        shop.run("update root set title = 'changed' where id is null or part is null; delete from root where id = '7'");
        shop.run(&format!(
            "update root set id = '51' where id is null; update root set part = '52' where part is null;
             alter table root add primary key ({key})"
        ));
        shop.is_fine();
    }
}

#[test]
fn a_lost_key_column_is_told_in_status_and_no_writer_fails() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.run("alter table root drop column id; update root set title = 'x'; delete from root where price = 1");
    shop.says("stale: table public.root has lost its key column \"id\": detach it and attach it anew");
    let waited: bool = shop.client.query_one("select es_sync.wait(timeout => '1 s')", &[]).unwrap().get(0);
    assert!(!waited);
    let index = shop.index.clone();
    shop.run(&format!(
        "alter table root add primary key (price); select es_sync.detach('root'); select es_sync.attach('root', index => '{index}')"
    ));
    shop.rows = "select price, row_to_json(t) from root t".to_owned();
    shop.settle();
}

#[test]
fn truncate_cascade_empties_every_index_of_the_tables_that_it_reaches() {
    let mut shop = Shop::new(HOSTS).attach_view();
    let hosts = unique("hosts");
    shop.run(&format!("select es_sync.attach('host', index => '{hosts}')"));
    expect::settled(&mut shop.client);
    shop.run("truncate host cascade; insert into host values (7, 'new'); insert into root values (8, 'new', 7)");
    shop.settle();
    expect::table_equal(&mut shop.client, "host", "id", &shop.engine, &hosts);
}

#[test]
fn rewrites_that_leave_the_rows_as_they_are_cost_no_rebuild() {
    let mut shop = Shop::new(HOSTS).attach_view();
    for statement in [
        "vacuum full root",
        "cluster root using root_pkey",
        "alter table root set (fillfactor = 50)",
        "alter table root set tablespace pg_default",
        "analyze root",
        "vacuum full host",
        "reindex table root",
    ] {
        shop.not_rebuilt_by(statement);
        shop.not_rebuilt_by("update root set title = title || '!' where id < 5; update host set name = name || '!'");
    }
    let mut shop = Shop::new(ROOT).attach("");
    for statement in ["alter table root set unlogged", "alter table root set logged"] {
        shop.not_rebuilt_by(statement);
        shop.not_rebuilt_by("update root set title = title || '!' where id < 5");
    }
}

#[test]
fn a_new_owner_of_the_table_reads_from_then_on() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.run("create role other");
    shop.not_rebuilt_by("alter table root owner to other; update root set title = 'x' where id = 1");
}

#[test]
fn an_owner_of_the_view_alone_lends_nobody_his_rights_and_status_says_so() {
    let mut shop = Shop::new(HOSTS).attach_view();
    shop.run("create role other; alter view document owner to other; update root set title = 'x' where id = 1");
    shop.says("view public.document has another owner than table public.root");
    let waited: bool = shop.client.query_one("select es_sync.wait(timeout => '1 s')", &[]).unwrap().get(0);
    assert!(!waited);
    let source = shop.engine.source(&shop.index, "1").unwrap();
    assert!(!source.contains('x'), "nothing was read with the rights of another: {source}");
    // At each build, too: a later job is done meanwhile, and this one has not begun.
    shop.run("select es_sync.reindex('root'); create table other (id int primary key)");
    let other = unique("other");
    shop.run(&format!("insert into other values (1); select es_sync.attach('other', index => '{other}')"));
    let loaded = format!("select count(*) from es_sync.jobs where index = '{other}' and state = 'done'");
    wait::until("the other table is loaded", wait::LONG, || shop.count(&loaded) == 1);
    assert_eq!(shop.text("select max(state) from es_sync.jobs where kind = 'reindex'"), "queued");
    assert!(!shop.engine.exists(&format!("{}-2", shop.index)));
    shop.run("select es_sync.detach('other'); alter view document owner to postgres");
    shop.is_fine();
}

#[test]
fn forced_row_level_security_is_told_in_status_and_hides_no_row() {
    let mut shop = Shop::new(ROOT);
    shop.run("create role owner; alter table root owner to owner");
    let mut shop = shop.attach("");
    shop.run(
        "alter table root enable row level security; create policy few on root using (id < 10);
         update root set title = 'not forced' where id = 40",
    );
    shop.settle();
    shop.run("alter table root force row level security; update root set title = 'forced'");
    shop.says("table public.root has forced row-level security");
    assert_eq!(shop.engine.count(&shop.index), 50);
    shop.run("alter table root no force row level security");
    shop.is_fine();
}

#[test]
fn a_filter_by_the_time_or_the_session_is_refused_and_what_a_filter_reads_elsewhere_is_listed() {
    let mut shop = Shop::new(&format!("{ROOT} create table allowed (id int primary key)"));
    for filter in [
        "title < now()::text",
        "current_date > date '2024-01-01'",
        "title < clock_timestamp()::text",
        "title < timeofday()",
        "age(timestamp '2024-01-01' + price * interval '1 day') > interval '1 year'",
        "age(timestamptz '2024-01-01' + price * interval '1 day') > interval '1 year'",
        // Read anew whenever the filter is.
        "timestamptz '2024-01-01' + price * interval '1 day' > 'now'",
        "date '2024-01-01' + price > date 'Yesterday'",
        "date '2024-01-01' + price <@ daterange '[today,)'",
        "date '2024-01-01' + price = any ('{2024-01-01,tomorrow}'::date[])",
        "timestamp '2024-01-01' + price * interval '1 day' > e'now'",
        "date '2024-01-01' + price > $q$today$q$",
        "date '2024-01-01' + price > 'today'::text::date",
    ] {
        let message = shop.refused(&format!("select es_sync.attach('root', index => 'x', filter => $f${filter}$f$)"));
        assert!(message.starts_with("22023 cannot filter by what changes with time"), "{filter}: {message}");
    }
    let message = shop.refused("select es_sync.attach('root', index => 'x', filter => 'title = current_user')");
    let expected = "22023 cannot filter by what changes with the session The filter uses current_user or the like, ";
    assert!(message.starts_with(expected), "{message}");
    // Names of the present that are none, and functions of other times.
    let fixed = "title <> 'today' and date '2024-01-01' + price > 'epoch' and age('2024-01-02', '2024-01-01') > '0'
                 and date_trunc('day', timestamptz '2024-01-01') < timestamptz '2024-02-01' + price * interval '1 day'";
    shop.rows = format!("select id, row_to_json(t) from root t where {fixed}");
    let index = unique("fixed");
    shop.run(&format!("select es_sync.attach('root', index => '{index}', filter => $f${fixed}$f$)"));
    expect::settled(&mut shop.client);
    expect::documents_equal(&mut shop.client, &shop.rows, &shop.engine, &index);
    shop.run("select es_sync.detach('root')");
    shop.rows = "select id, row_to_json(t) from root t where id in (select id from allowed)".to_owned();
    let mut shop = shop.attach(", filter => 'id in (select id from public.allowed)'");
    let listed = shop.text("select not_followed::text from es_sync.status");
    assert!(listed.contains("public.allowed: the filter reads it"), "{listed}");
}

#[test]
fn what_of_a_view_changes_with_time_is_listed_whenever_it_comes_and_as_long_as_it_is_there() {
    let mut shop = Shop::new(
        "create table root (id int primary key, at timestamptz);
         create view document as select id, at from root;
         insert into root select i, timestamptz '2024-01-01' + i * interval '1 day' from generate_series(1, 10) i;",
    )
    .attach_view();
    let listed = "select coalesce(not_followed::text, '') from es_sync.status";
    assert_eq!(shop.text(listed), "{}");
    for (expression, name) in [
        ("extract(year from age(at)) < 0", "pg_catalog.age"),
        ("at > now() + interval '1000 years'", "pg_catalog.now()"),
        ("at > clock_timestamp() + interval '1000 years'", "pg_catalog.clock_timestamp()"),
        ("at > current_date + 365000", "current_timestamp or the like"),
        ("at > 'today'::text::timestamptz + interval '1000 years'", "a text that names the present"),
        // That was when the view was made.
        ("at > 'tomorrow'::timestamptz", "{}"),
    ] {
        shop.run(&format!("create or replace view document as select id, at, {expression} as later from root"));
        shop.settle();
        wait::until(&format!("{name} is listed alone"), wait::SHORT, || {
            let said = shop.text(listed);
            let alone = said.contains(name) && !said.contains("; ") && !said.contains("\",\"");
            if alone { Ok(()) } else { Err(said) }
        });
    }
}

#[test]
fn what_a_before_trigger_sets_and_whole_rows_that_a_view_shows_count_as_changed() {
    let mut shop = Shop::new(
        "create table host (id int primary key, name text, note text, size int generated always as (length(note)) stored);
         create table root (id int primary key, title text, stamp int default 0, host_id int);
         create function stamp() returns trigger language plpgsql as 'begin new.stamp := new.stamp + 1; return new; end';
         create trigger stamp before update on root for each row execute function stamp();
         create view document as
             select r.id, r.stamp, to_jsonb(h) as host from root r left join host h on h.id = r.host_id;
         insert into host values (1, 'one', 'note');
         insert into root select i, 'title', 0, 1 from generate_series(1, 20) i;",
    )
    .attach_view();
    // No document shows the title, but the stamp that comes with it.
    shop.each(&[
        "update root set title = 'x' where id = 1",
        "update host set note = 'changed'",
        "update host set name = 'y'",
    ]);
    assert!(shop.text("select note from host").contains("changed"));
}

/// A whole row names no column: no rule of the view, and no dependency, tells of what is done to them.
#[test]
fn ddl_on_a_table_that_a_view_shows_as_a_whole_row_makes_every_document_anew() {
    let mut shop = Shop::new(&format!(
        "{HOSTS} alter table root add column extra text;
         create view place as select id, name as label from host;
         create or replace view document as
             select r.id, r.title, h.name as host, to_jsonb(h) as whole, to_jsonb(r) as own,
                    (select to_jsonb(p) from place p where p.id = h.id) as place
             from root r left join host h on h.id = r.host_id"
    ))
    .attach_view();
    for (table, column) in [("host", "note"), ("root", "extra")] {
        let cause = format!("type public.{table} was altered");
        shop.rebuilt_by(&format!("alter table {table} add column size int default 7"), &cause);
        shop.rebuilt_by(&format!("alter table {table} rename size to width"), &cause);
        shop.rebuilt_by(&format!("alter table {table} alter column width type text using 'w' || width"), &cause);
        shop.rebuilt_by(&format!("alter table {table} drop column width"), &cause);
        shop.not_rebuilt_by(&format!("alter table {table} rename to other; alter table other rename to {table}"));
        shop.not_rebuilt_by(&format!("update {table} set {column} = 'changed' where id < 3"));
    }
    shop.rebuilt_by("alter view place rename column label to title", "type public.place was altered");
    // Rows are written anew, and no trigger fires.
    shop.rebuilt_by("alter table host add column u uuid default gen_random_uuid()", "type public.host was altered");
    shop.not_rebuilt_by("alter table host alter column note type text using upper(name)");
    assert!(shop.engine.source(&shop.index, "1").unwrap().contains("TWO"));
}

#[test]
fn a_column_added_with_a_default_is_in_every_document_although_the_table_is_written_anew_at_once() {
    let mut shop = Shop::new(ROOT).attach("");
    let added = |column: &str| format!("column \"{column}\" was added");
    shop.rebuilt_by("alter table root add column a int default 5, set unlogged", &added("a"));
    shop.rebuilt_by(
        "begin; alter table root add column b int default 6; alter table root alter column b drop default;
         cluster root using root_pkey; commit",
        &added("b"),
    );
    shop.rebuilt_by(
        "begin; alter table root add column c text default 'x'; alter table root set logged; commit",
        &added("c"),
    );
    shop.not_rebuilt_by("cluster root; alter table root set unlogged");
    shop.not_rebuilt_by("alter table root add column d text; update root set d = 'y' where id < 5");
}

#[test]
fn a_renamed_value_of_an_enum_is_renamed_where_a_range_has_it() {
    let mut shop = Shop::new(
        "create type mood as enum ('sad', 'ok', 'happy');
         create type moods as range (subtype = mood);
         create table root (id int primary key, m moods, n moodmultirange);
         insert into root select i, '[sad,happy)', '{[sad,ok],[happy,happy]}' from generate_series(1, 5) i"
            .replace("moodmultirange", "moods_multirange")
            .as_str(),
    );
    shop = shop.attach("");
    shop.rebuilt_by("alter type mood rename value 'sad' to 'low'", "mood was altered");
}

#[test]
fn a_dropped_trigger_for_truncate_is_given_back_and_what_it_missed_is_mended() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.run("drop trigger es_sync_truncate on root; truncate root; insert into root values (7, 'new')");
    let triggers = "select count(*) from pg_trigger where tgname like 'es_sync%'";
    wait::until("the trigger is back", wait::LONG, || shop.count(triggers) == 2);
    shop.settle();
    shop.each(&["truncate root"]);
}

#[test]
fn a_column_renamed_in_the_transaction_that_excludes_it_stays_excluded() {
    let mut shop = Shop::new(ROOT);
    shop.rows = "select id, to_jsonb(t) - 'hidden' from root t".into();
    let index = shop.index.clone();
    shop.run(&format!(
        "begin; select es_sync.attach('root', index => '{index}', exclude => '{{secret}}');
         alter table root rename secret to hidden; commit"
    ));
    shop.settle();
    shop.is_fine();
}

#[test]
fn names_that_rotate_in_one_transaction_stay_with_their_columns() {
    let mut shop = Shop::new(ROOT);
    shop.rows = "select id, to_jsonb(t) - 'secret' from root t".into();
    let mut shop = shop.attach(", exclude => '{secret}'");
    shop.rows = "select nr, to_jsonb(t) - 'title' from root t".into();
    shop.run(
        "begin; update root set price = price + 1000 where id < 10;
         alter table root rename id to nr; alter table root rename price to id;
         alter table root rename secret to x; alter table root rename title to secret; alter table root rename x to title;
         update root set secret = 'swapped' where nr > 40; insert into root (nr, id, secret) values (1000, 3, 'k');
         delete from root where nr = 20; commit",
    );
    shop.settle();
    shop.each(&["update root set id = id + 7, title = 'hush' where nr % 3 = 0", "delete from root where nr = 1000"]);
    assert_eq!(shop.text("select exclude::text || key_columns::text from es_sync.status"), "{title}{nr}");
}

#[test]
fn an_excluded_columns_name_that_a_new_column_takes_hides_nothing_of_that_one() {
    let mut shop = Shop::new(ROOT);
    shop.rows = "select id, to_jsonb(t) - 'secret' from root t".into();
    let mut shop = shop.attach(", exclude => '{secret}'");
    shop.rows = "select id, to_jsonb(t) - 'former' from root t".into();
    shop.run(
        "begin; alter table root rename secret to former; alter table root add column secret text;
         update root set secret = 'shown ' || id; commit",
    );
    shop.is_fine();
    shop.each(&["update root set former = 'hidden'", "update root set secret = 'again' where id < 9"]);
    assert_eq!(shop.text("select exclude::text from es_sync.status"), "{former}");
}

#[test]
fn who_writes_before_the_worker_has_noted_that_names_have_passed_misses_nothing() {
    let mut shop = Shop::new(ROOT);
    shop.rows = "select id, to_jsonb(t) - 'secret' from root t".into();
    let mut shop = shop.attach(", exclude => '{secret}'");
    shop.rows = "select id, to_jsonb(t) - 'former' from root t".into();
    let mut writer = shop.server.connect("shop");
    shop.run("begin; alter table root rename secret to former; alter table root rename title to secret");
    std::thread::scope(|scope| {
        let in_line = scope.spawn(|| writer.batch_execute("begin; lock table root in row exclusive mode").unwrap());
        let waiting = "select count(*) from pg_locks where relation = 'root'::regclass and not granted";
        wait::until("the writer is first in line", wait::SHORT, || shop.count(waiting) == 1);
        shop.run("commit");
        in_line.join().unwrap();
    });
    // By the names of now it is the excluded column.
    writer.batch_execute("update root set secret = 'written' where id = 1").unwrap();
    shop.says("columns or tables that its documents are made of have other names");
    writer.batch_execute("commit").unwrap();
    shop.is_fine();
}

#[test]
fn ddl_beside_writes_in_savepoints_and_prepared_transactions_is_followed() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.run(
        "begin; savepoint a; alter table root rename title to t2; update root set t2 = 'x' where id = 1;
         rollback to a; update root set title = 'y' where id = 2;
         savepoint b; alter table root rename id to nr; update root set title = 'z' where nr = 3; rollback to b;
         update root set title = 'w' where id = 4; commit",
    );
    shop.settle();
    shop.run("begin; savepoint a; alter table root alter title type int using 3; rollback to a; commit");
    shop.settle();
    shop.run("begin; alter table root add column z int default 3; update root set z = 4 where id = 9; prepare transaction 'p'");
    shop.run("commit prepared 'p'");
    shop.settle();
    shop.run("begin; alter table root drop column price; alter table root add column price text default 'p'; commit");
    shop.settle();
    shop.run(
        "begin; alter table root add column new_id bigint; update root set new_id = id + 100;
         alter table root drop constraint root_pkey; alter table root drop column id;
         alter table root rename new_id to id; alter table root add primary key (id); commit",
    );
    shop.settle();
    shop.is_fine();
}

#[test]
fn what_an_inheriting_table_brought_along_goes_with_it() {
    let mut shop = Shop::new(ROOT).attach("");
    shop.run(
        "create table child (like root including all); insert into child values (1001, 'c'), (1002, 'd');
         alter table child inherit root",
    );
    shop.run("select es_sync.verify('root', repair => true)");
    shop.settle();
    shop.says("stale: other tables inherit from root");
    shop.rebuilt_by("alter table child no inherit root", "table public.child inherits from it no more");
    shop.run("alter table child inherit root");
    shop.run("create table grandchild () inherits (child); insert into grandchild values (2000, 'g')");
    shop.run("select es_sync.sync('root', 2000)");
    wait::until("it is there", wait::SHORT, || shop.engine.source(&shop.index, "2000").is_some());
    shop.rebuilt_by("drop table grandchild", "table public.grandchild inherits from it no more");
    shop.run("drop table child");
    shop.is_fine();
}

#[test]
fn what_is_altered_while_it_is_looked_at_for_the_first_time_is_noticed() {
    const DEEP: usize = 12;
    let mut shop = Shop::new(ROOT).attach("");
    for _ in 0..3 {
        let mut parent = "root".to_owned();
        for level in 1..=DEEP {
            // Each is heard of only by who listens to the one before.
            shop.run(&format!("create table level_{level} () inherits ({parent})"));
            parent = format!("level_{level}");
        }
        shop.settle();
        shop.rebuilt_by(&format!("drop table {parent}"), &format!("table public.{parent} inherits from it no more"));
        shop.run("drop table level_1 cascade");
        shop.settle();
    }
}

#[test]
fn a_vacuum_of_the_table_holds_up_nobody_who_waits() {
    let mut shop = Shop::new(ROOT).attach("");
    for _ in 0..3 {
        shop.run("vacuum analyze root");
        shop.run("update root set price = price + 1");
        assert_eq!(shop.count("select es_sync.wait('root', '4 s')::int::bigint"), 1);
    }
}

#[test]
fn ways_outlive_other_names_of_the_types_that_they_are_written_with() {
    let mut shop = Shop::new(
        "create extension citext; create schema ext; create domain place as text; create type mood as enum ('sad', 'happy');
         create table host (id place primary key, nick citext unique, mood mood, name text);
         create table root (id place, part citext, mood mood, host_id place, host_nick citext,
                            primary key (id, part, mood));
         create view document as
             select r.*, h.name as host, n.name as nick from root r
             left join host h on h.id = r.host_id left join host n on n.nick = r.host_nick and n.mood = r.mood;
         insert into host values ('a', 'An', 'sad', 'anna'), ('b', 'Bo', 'happy', 'bob');
         insert into root select 'r' || i, 'P', 'sad', chr(97 + i % 2), 'aN' from generate_series(1, 20) i",
    );
    shop.rows = "select id || '|' || part || '|' || mood, row_to_json(d) from document d".into();
    shop = shop.attach(", document => 'document'");
    for statement in [
        "alter domain place rename to spot",
        "alter type mood rename to feeling",
        "alter extension citext set schema ext; alter domain spot set schema ext",
    ] {
        // What was prepared before may go on under the former name; an index has everything prepared anew.
        shop.each(&[
            statement,
            "create index on root (host_id); create index on host (name)",
            "update host set name = name || '+'; update root set host_nick = 'BO', mood = 'happy' where id = 'r7'",
        ]);
    }
    assert_eq!(shop.count("select count(*) from es_sync.jobs where kind = 'verify'"), 0, "no way was lost");
}

/// A table of three columns, the view of two of them, and a table whose rows the documents gather by a key of theirs.
const NAMES: &str = "
    create table root (id int primary key, a text, b text);
    create table item (id int primary key, root_id int, other_id int, name text);
    create view document as
        select r.id, r.a, (select string_agg(i.name, ', ' order by i.id) from item i where i.root_id = r.id) as items
        from root r;
    insert into root select i, 'a ' || i, 'b ' || i from generate_series(1, 30) i;
    insert into item select i, i % 10 + 1, i % 5 + 20, 'item ' || i from generate_series(1, 40) i;";

const MISLED: &str = "stale: not taken in yet: columns or tables that its documents are made of have other names";

/// A view follows its columns, a way their names: until the worker has found it anew, the name means another column.
#[test]
fn a_name_that_passes_to_another_column_of_a_view_s_table_loses_no_change() {
    for passing in ["add column a text", "rename b to a"] {
        let mut shop = Shop::new(NAMES).attach_view();
        shop.not_rebuilt_by(&format!(
            "begin; alter table root rename a to a_old; alter table root {passing};
             update root set a_old = 'new' where id = 1; commit"
        ));
        shop.not_rebuilt_by("update root set a_old = 'newer' where id = 2");
        shop.says("ok: ");
    }
}

#[test]
fn a_name_that_passes_to_another_column_of_a_related_table_loses_no_change() {
    // The values of the column that has the name now are keys of other documents, or of none.
    let mut shop = Shop::new(NAMES).attach_view();
    shop.not_rebuilt_by(
        "begin; alter table item rename root_id to parent_id; alter table item rename other_id to root_id;
         update item set name = 'changed' where id = 1; update item set parent_id = 30 where id = 2;
         delete from item where id = 3; insert into item values (100, 29, 20, 'added'); commit",
    );
}

#[test]
fn a_name_that_passes_to_another_column_that_a_link_uses_loses_no_change() {
    // The link's own columns stay.
    let mut shop = Shop::new(HOSTS).attach_view();
    shop.not_rebuilt_by(
        "begin; alter table host rename name to label; alter table host rename note to name;
         update host set label = 'changed' where id = 1; commit",
    );
}

#[test]
fn links_that_swap_the_names_of_their_columns_lose_no_change() {
    // What the queue holds under each is the other's.
    let mut shop = Shop::new(
        "create table root (id int primary key, x int, y int);
         create table tie (id int primary key, a int, b int, note text);
         create view document as
             select r.id, (select string_agg(t.note, ', ' order by t.id) from tie t where t.a = r.x) as by_a,
                    (select string_agg(t.note, ', ' order by t.id) from tie t where t.b = r.y) as by_b
             from root r;
         insert into root select i, i, i + 1000 from generate_series(1, 30) i;
         insert into tie select i, i, i + 1010, 'note ' || i from generate_series(1, 20) i",
    )
    .attach_view();
    shop.not_rebuilt_by(
        "begin; update tie set note = 'changed' where id = 1; alter table tie rename a to c;
         alter table tie rename b to a; alter table tie rename c to b; commit",
    );
}

#[test]
fn a_name_that_passes_to_another_column_under_a_running_writer_misses_none_of_its_changes() {
    let mut shop = Shop::new(HOSTS).attach_view();
    shop.run("begin; alter table host rename name to label; alter table host rename note to name");
    let mut writer = shop.server.connect("shop");
    // It stands in line before the worker does.
    let writer = std::thread::spawn(move || {
        writer.batch_execute("begin; lock table host in row exclusive mode").expect("lock");
        writer.batch_execute("update host set label = 'written by the former rules' where id = 1").expect("update");
        writer
    });
    let standing = "select count(*) from pg_locks where mode = 'RowExclusiveLock' and not granted";
    wait::until("the writer stands in line", wait::SHORT, || shop.count(standing) > 0);
    shop.run("commit");
    let mut writer = writer.join().expect("the writer has its lock");
    shop.says(MISLED);
    writer.batch_execute("update host set label = 'and once more' where id = 2; commit").unwrap();
    shop.is_fine();
    shop.each(&["update host set label = 'new' where id = 2"]);
}

/// Countries lead to documents by way of cities: a view follows its tables, the query of a link their names. Where those
/// swap, it finds nothing until the worker has found it anew.
const CITIES: &str = "create table country (id int primary key, name text);
     create table city (id int primary key, country_id int, name text);
     create table city_new (like city including all);
     create table root (id int primary key, city_id int);
     create view document as
         select r.id, c.name as city, l.name as country
         from root r left join city c on c.id = r.city_id left join country l on l.id = c.country_id;
     insert into country values (1, 'one'), (2, 'two');
     insert into city select i, i % 2 + 1, 'city ' || i from generate_series(1, 10) i;
     insert into root select i, i % 10 + 1 from generate_series(1, 30) i;";

#[test]
fn tables_that_swap_their_names_while_their_view_is_somebody_elses_lose_no_change() {
    let mut shop = Shop::new(CITIES).attach_view();
    shop.run("create role stranger; grant create on schema public to stranger; alter view document owner to stranger");
    shop.says("another owner");
    shop.run("begin; alter table city rename to city_old; alter table city_new rename to city; commit");
    wait::until("the worker has looked", wait::SHORT, || {
        shop.count("select count(*) from es_sync.definition where facts::text like '%public.city_old%'") == 1
    });
    shop.run("update country set name = 'changed' where id = 1");
    wait::until("it was followed to the other table", wait::SHORT, || {
        shop.count("select count(*) from es_sync.queue") == 0
    });
    shop.run("alter view document owner to current_user");
    shop.is_fine();
    // Once more, and back before anything is in order again.
    shop.run("alter view document owner to stranger");
    shop.says("another owner");
    let swap = |shop: &mut Shop, looked: &str| {
        shop.run(
            "begin; alter table city rename to between; alter table city_old rename to city;
             alter table between rename to city_old; commit",
        );
        let seen = format!("select count(*) from es_sync.definition where facts::text like '%{looked}\"%'");
        wait::until("the worker has looked", wait::SHORT, || shop.count(&seen) == 1);
    };
    swap(&mut shop, "public.city");
    shop.run("update country set name = 'changed again' where id = 1");
    wait::until("it was followed to the other table", wait::SHORT, || {
        shop.count("select count(*) from es_sync.queue") == 0
    });
    swap(&mut shop, "public.city_old");
    shop.run("alter view document owner to current_user");
    shop.is_fine();
}

#[test]
fn tables_that_swap_their_names_under_a_running_writer_lose_no_change() {
    let mut shop = Shop::new(CITIES).attach_view();
    let mut writer = shop.server.connect("shop");
    // The worker needs this table, too.
    writer.batch_execute("begin; update root set city_id = 1 where id = 30").unwrap();
    shop.run("begin; alter table city rename to city_old; alter table city_new rename to city; commit");
    shop.says(MISLED);
    shop.run("update country set name = 'changed' where id = 1");
    wait::until("it was followed to the other table", wait::SHORT, || {
        shop.count("select count(*) from es_sync.queue") == 0
    });
    writer.batch_execute("commit").unwrap();
    shop.is_fine();
    shop.each(&["update country set name = 'new' where id = 2", "update city_old set name = 'new' where id = 3"]);
    // What was said of a name is true of a schema's, too.
    shop.not_rebuilt_by(
        "create schema former; alter table city_old set schema former; alter table former.city_old rename to city;
         update country set name = 'newer' where id = 1",
    );
}

#[test]
fn a_name_that_is_back_before_the_worker_could_act_loses_no_change() {
    let mut shop = Shop::new(HOSTS).attach_view();
    let mut writer = shop.server.connect("shop");
    // The worker needs this table, too.
    writer.batch_execute("begin; update root set title = 'x' where id = 30").unwrap();
    shop.run(
        "begin; alter table host rename name to label; alter table host rename note to name;
         update host set label = 'written by the former rules' where id = 1; commit",
    );
    shop.says(MISLED);
    shop.run("begin; alter table host rename name to note; alter table host rename label to name; commit");
    writer.batch_execute("commit").unwrap();
    shop.is_fine();
}

#[test]
fn a_view_that_is_back_before_the_worker_could_act_leaves_nothing_stale() {
    let mut shop = Shop::new(NAMES).attach_view();
    let mut writer = shop.server.connect("shop");
    // The worker needs this table, too.
    writer.batch_execute("begin; update item set name = 'x' where id = 30").unwrap();
    let view: String = shop.client.query_one("select pg_get_viewdef('document'::regclass)", &[]).unwrap().get(0);
    shop.run(
        "create or replace view document as
         select r.id, r.b as a, (select string_agg(i.name, ', ') from item i where i.other_id = r.id) as items
         from root r",
    );
    shop.says("stale: not taken in yet: view");
    shop.run(&format!("create or replace view document as {view}"));
    writer.batch_execute("commit").unwrap();
    shop.is_fine();
}

/// Rows are read in the order of the key: in another order, those before the place that was reached may have moved behind
/// it, and the others the other way.
#[test]
fn the_collation_of_the_key_may_change_while_its_rows_are_read() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let mut shop = Shop::behind(
        engine,
        proxy.url(),
        r#"create table root (id text collate "en-x-icu" primary key, title text);
           insert into root select chr(97 + i % 25) || i, repeat('first, or last in C', 20) from generate_series(1, 10000) i;
           insert into root select 'Z' || i, repeat('last, or first in C', 20) from generate_series(1, 3000) i"#,
    );
    // So that not all is read at once.
    shop.run("alter system set es_sync.connections = 1");
    shop.server.reload();
    proxy.set_for("_bulk", Fault::Hold);
    let index = shop.index.clone();
    shop.run(&format!("select es_sync.attach('root', index => '{index}')"));
    wait::until("the load waits for its first page", wait::LONG, || !proxy.seen("_bulk").is_empty());
    shop.run(r#"alter table root alter column id type text collate "C""#);
    proxy.set(Fault::Pass);
    shop.settle();
    // The same of a comparison.
    let concrete = shop.engine.indexes_of(&shop.index).remove(0);
    for id in ["a25", "y24", "Z26"] {
        shop.engine.delete(&format!("/{concrete}/_doc/{id}"));
    }
    proxy.set_for("_mget", Fault::Hold);
    shop.run("select es_sync.verify('root', repair => true)");
    wait::until("it waits for its first page", wait::LONG, || !proxy.seen("_mget").is_empty());
    shop.run(r#"alter table root alter column id type text collate "en-x-icu""#);
    proxy.set(Fault::Pass);
    shop.settle();
    shop.says("ok: ");
    // Nobody reads, and no index need be built anew. Another column's is no matter.
    let comparisons = |shop: &mut Shop| shop.count("select count(*) from es_sync.jobs where kind = 'verify'");
    let before = comparisons(&mut shop);
    shop.not_rebuilt_by(r#"alter table root alter column title type text collate "C""#);
    assert_eq!(comparisons(&mut shop), before);
    shop.not_rebuilt_by(r#"alter table root alter column id type text collate "C""#);
}
