//! Option `routing`: a document lies where a column of its row says, and nowhere else. Every test compares ids, routings
//! and documents. And ingest pipelines, which documents go through on their way.

use std::time::Duration;

use pg_es_sync_tests::{Engine, Fault, Mode, Proxy, Server, expect, named, unique, wait};
use postgres::Client;
use serde_json::json;

struct Setting {
    engine: Engine,
    server: Server,
    client: Client,
    /// Table and index; `{T}` in statements.
    name: String,
}

const FOUR_SHARDS: &str = r#""settings": {"number_of_shards": 4}"#;

impl Setting {
    /// Table {T} (id, tenant, title) with rows 1 to 40 of five tenants, one of them null, attached and loaded.
    #[track_caller]
    fn new() -> Setting {
        Setting::on(Engine::elasticsearch(), FOUR_SHARDS)
    }

    #[track_caller]
    fn on(engine: Engine, settings: &str) -> Setting {
        Setting::attached(
            engine,
            "create table {T} (id int primary key, tenant text, title text);
             insert into {T} select i, nullif('tenant ' || i % 5, 'tenant 0'), 'thing ' || i from generate_series(1, 40) i",
            &format!("options => '{{\"routing\": \"tenant\", {settings}}}'"),
        )
    }

    #[track_caller]
    fn attached(engine: Engine, setup: &str, arguments: &str) -> Setting {
        let server = Server::with(&engine);
        Setting::at(engine, server, setup, arguments)
    }

    #[track_caller]
    fn at(engine: Engine, server: Server, setup: &str, arguments: &str) -> Setting {
        let client = server.create_database("app");
        let mut setting = Setting { engine, server, client, name: unique("routed") };
        setting.run(&format!("set timezone = 'UTC'; {setup}; select es_sync.attach('{{T}}', {arguments})"));
        expect::settled(&mut setting.client);
        setting
    }

    /// On a server of one's own, with so many rows of five tenants.
    #[track_caller]
    fn of_tenants(engine: Engine, server: Server, rows: u32) -> Setting {
        Setting::at(
            engine,
            server,
            &format!(
                "create table {{T}} (id int primary key, tenant text, title text);
                 insert into {{T}} select i, 'tenant ' || i % 5, 'thing' from generate_series(1, {rows}) i"
            ),
            &format!("options => '{{\"routing\": \"tenant\", {FOUR_SHARDS}}}'"),
        )
    }

    #[track_caller]
    fn run(&mut self, statements: &str) {
        named::run(&mut self.client, &self.name, statements);
    }

    #[track_caller]
    fn number(&mut self, query: &str) -> i64 {
        named::number(&mut self.client, &self.name, query)
    }

    /// Waits, and compares with the rows of the table.
    #[track_caller]
    fn equal(&mut self) {
        self.equal_to("select id, tenant, row_to_json(t) from {T} t");
    }

    #[track_caller]
    fn equal_to(&mut self, query: &str) {
        expect::settled(&mut self.client);
        expect::places_equal(&mut self.client, &query.replace("{T}", &self.name), &self.engine, &self.name);
    }

    /// Runs each statement and compares.
    #[track_caller]
    fn each(mut self, statements: &[&str]) {
        self.equal();
        for statement in statements {
            self.run(statement);
            self.equal();
        }
    }

    /// A verify; what it found: missing, different, orphaned.
    #[track_caller]
    fn verify(&mut self, repair: bool) -> (i64, i64, i64) {
        self.run(&format!("select es_sync.verify('{{T}}', repair => {repair})"));
        expect::settled(&mut self.client);
        let query =
            "select missing, different, orphaned from es_sync.jobs where kind = 'verify' order by id desc limit 1";
        let row = self.client.query_one(query, &[]).expect("job");
        (row.get(0), row.get(1), row.get(2))
    }

    /// The concrete index, written to by hand.
    fn concrete(&self) -> String {
        self.engine.indexes_of(&self.name).remove(0)
    }
}

#[test]
fn documents_lie_where_the_column_says_on_both_products() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let mut setting = Setting::on(engine, FOUR_SHARDS);
        setting.equal();
        setting.run("insert into {T} values (100, 'tenant 1', 'new'), (101, null, 'new'), (102, '', 'new'), (103, 'a,b|c\\\"ö', 'new')");
        setting.equal();
        // Found by whoever asks with the routing alone: the shards of others are not asked.
        let path = format!("/{}/_search?routing=tenant%201", setting.name);
        let query = json!({"query": {"term": {"tenant.keyword": "tenant 1"}}, "size": 100});
        let answer = setting.engine.post(&path, query);
        assert_eq!(answer["hits"]["total"]["value"], 9);
        assert_eq!(answer["_shards"]["total"], 1);
    }
}

#[test]
fn a_document_moves_when_its_routing_changes_on_both_products() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        Setting::on(engine, FOUR_SHARDS).each(&[
            "update {T} set tenant = 'moved ' || id where id <= 20",
            "update {T} set tenant = null where id <= 3",
            "update {T} set tenant = 'back' where id = 1",
            "update {T} set tenant = '' where id = 4",
            "update {T} set tenant = case tenant when 'tenant 1' then 'tenant 2' else 'tenant 1' end where tenant in ('tenant 1', 'tenant 2')",
            "begin; update {T} set tenant = 'a' where id = 8; update {T} set tenant = 'b' where id = 8; update {T} set tenant = 'c' where id = 8; commit",
            "begin; update {T} set tenant = 'there'; update {T} set tenant = 'and back'; commit",
            "begin; savepoint s; update {T} set tenant = 'never'; rollback to s; update {T} set tenant = 'kept' where id = 9; commit",
        ]);
    }
}

/// On one shard a document has one place, whatever its routing: deleting it under the former routing must not delete it.
#[test]
fn a_routing_that_changes_within_a_shard_keeps_the_document() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        Setting::on(engine, r#""settings": {"number_of_shards": 1}"#).each(&[
            "update {T} set tenant = 'moved ' || id",
            "update {T} set tenant = null",
            "update {T} set tenant = 'x', title = 'changed'",
            "begin; update {T} set tenant = 'y'; update {T} set tenant = 'x'; commit",
            "delete from {T} where id > 20",
        ]);
    }
}

#[test]
fn a_deleted_rows_document_leaves_its_shard() {
    Setting::new().each(&[
        "delete from {T} where id in (1, 2, 3, 4, 5)",
        "begin; update {T} set tenant = 'for a moment' where id = 6; delete from {T} where id = 6; commit",
        "delete from {T} where tenant = 'tenant 2' or tenant is null",
        "truncate {T}",
        "insert into {T} values (1, 'x', 'again')",
    ]);
}

#[test]
fn a_key_used_again_with_another_routing_has_one_document() {
    Setting::new().each(&[
        "begin; delete from {T} where id = 1; insert into {T} values (1, 'elsewhere', 'again'); commit",
        "delete from {T} where id = 2",
        "insert into {T} values (2, 'elsewhere', 'again')",
        "update {T} set id = id + 1000",
        "update {T} set id = -id, tenant = 'both changed' where id > 1020",
        "begin; update {T} set id = 0 where id = 1003; update {T} set id = 1003 where id = 1004; update {T} set id = 1004 where id = 0; commit",
    ]);
}

#[test]
fn a_routing_that_no_document_shows_counts_all_the_same() {
    let mut setting = Setting::attached(
        Engine::elasticsearch(),
        "create table {T} (id int primary key, tenant text, title text, note text);
         insert into {T} select i, 't' || i % 3, 'thing' from generate_series(1, 30) i",
        r#"exclude => '{tenant, note}', options => '{"routing": "tenant", "settings": {"number_of_shards": 3}}'"#,
    );
    let documents = "select id, tenant, json_build_object('id', id, 'title', title) from {T}";
    setting.equal_to(documents);
    let counted = "select (indexed + deleted)::int8 from es_sync.status";
    let before = setting.number(counted);
    setting.run("update {T} set note = 'nothing of it is shown'");
    setting.equal_to(documents);
    assert_eq!(setting.number(counted), before, "nothing was sent");
    setting.run("update {T} set tenant = 'other' where id <= 10");
    setting.equal_to(documents);
    assert_eq!(setting.number(counted), before + 10);
}

#[test]
fn keys_and_routings_of_every_kind_are_told_apart() {
    let server = Server::with(&Engine::elasticsearch());
    for (kind, values) in [
        ("int", ["1", "-7", "2000000000"]),
        ("text", ["a|b", r"\", "ünï \"quoted\""]),
        (
            "uuid",
            [
                "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
                "00000000-0000-0000-0000-000000000000",
                "ffffffff-ffff-ffff-ffff-ffffffffffff",
            ],
        ),
        ("date", ["2024-02-29", "1999-12-31", "0044-03-15 BC"]),
        ("timestamptz", ["2024-01-01 00:00:00+00", "2024-07-01 12:00:00.000001+00", "1999-12-31 23:59:59+00"]),
        ("numeric", ["1.0", "1.00", "1e20"]),
        ("bytea", [r"\x00ff", r"\x", r"\x7c5c"]),
        ("boolean", ["true", "false", "false"]),
    ] {
        let engine = Engine::elasticsearch();
        let mut client = server.create_database(&format!("app_{kind}"));
        let name = unique("kinds");
        let inserts: Vec<String> = values
            .iter()
            .enumerate()
            .flat_map(|(n, value)| [format!("('x|{n}', '\\', '{value}')"), format!("('x', '|{n}', '{value}')")])
            .collect();
        client
            .batch_execute(&format!(
                "set timezone = 'UTC'; set bytea_output = 'hex';
                 create table {name} (a text, b text, place {kind}, note text, primary key (a, b));
                 insert into {name} values {};
                 select es_sync.attach('{name}', exclude => array['place'], options => '{{\"routing\": \"place\", {FOUR_SHARDS}}}')",
                inserts.join(", ")
            ))
            .expect(kind);
        let query = format!(
            r"select replace(replace(a, '\', '\\'), '|', '\|') || '|' || replace(replace(b, '\', '\\'), '|', '\|'), place,
                     json_build_object('a', a, 'b', b, 'note', note) from {name}"
        );
        // Another session's settings do not count.
        let mut other = server.connect(&format!("app_{kind}"));
        other
            .batch_execute("set datestyle = 'German'; set timezone = 'Asia/Tokyo'; set bytea_output = 'escape'")
            .expect("settings");
        for change in [
            String::new(),
            format!("update {name} set note = 'changed'"),
            format!("update {name} set place = '{}' where a = 'x'", values[2]),
            format!("update {name} set place = null where b = '|0'"),
            format!("update {name} set a = a || '|', place = '{}' where b = '|1'", values[0]),
            format!("delete from {name} where a like 'x|%'"),
        ] {
            other.batch_execute(&change).unwrap_or_else(|error| panic!("{error:?} in: {change}"));
            expect::settled(&mut client);
            println!("{kind}: {change}");
            expect::places_equal(&mut client, &query, &engine, &name);
        }
    }
}

#[test]
fn a_filter_takes_documents_out_of_their_shards_and_back() {
    let mut setting = Setting::attached(
        Engine::elasticsearch(),
        "create table {T} (id int primary key, tenant text, title text);
         insert into {T} select i, 't' || i % 4, case when i % 2 = 0 then 'hidden' else 'shown' end from generate_series(1, 40) i",
        &format!("filter => 'title <> ''hidden''', options => '{{\"routing\": \"tenant\", {FOUR_SHARDS}}}'"),
    );
    let shown = "select id, tenant, row_to_json(t) from {T} t where title <> 'hidden'";
    setting.equal_to(shown);
    for change in [
        "update {T} set title = 'hidden' where id <= 5",
        "update {T} set tenant = 'moved while hidden' where id <= 5",
        "update {T} set title = 'shown again' where id <= 10",
        "update {T} set title = 'hidden', tenant = 'moved and hidden at once' where id in (7, 8, 9)",
        "update {T} set title = null where id in (1, 2)",
        "delete from {T} where title = 'hidden'",
        // Asked for by hand: the row is there, and its document must not be.
        "insert into {T} values (100, 't1', 'hidden'); select es_sync.sync('{T}', 100)",
    ] {
        setting.run(change);
        setting.equal_to(shown);
    }
    assert_eq!(setting.verify(false), (0, 0, 0));
}

#[test]
fn documents_from_a_view_are_routed_by_a_column_of_the_table() {
    let mut setting = Setting::attached(
        Engine::elasticsearch(),
        "create table {T}_parent (id int primary key, name text, private boolean default false);
         insert into {T}_parent select i, 'parent ' || i from generate_series(1, 4) i;
         create table {T} (id int primary key, tenant text, parent_id int, title text);
         create index on {T} (parent_id);
         insert into {T} select i, 't' || i % 5, i % 4 + 1, 'thing' from generate_series(1, 40) i;
         create view {T}_documents as select t.id, t.title, p.name as parent, p.private
         from {T} t left join {T}_parent p on p.id = t.parent_id",
        &format!(
            "document => '{{T}}_documents', filter => 'private is not true', options => '{{\"routing\": \"tenant\", {FOUR_SHARDS}}}'"
        ),
    );
    let documents =
        "select d.id, t.tenant, row_to_json(d) from {T}_documents d join {T} t using (id) where d.private is not true";
    setting.equal_to(documents);
    for change in [
        "update {T}_parent set name = 'renamed' where id = 1",
        "update {T} set tenant = 'moved' where id <= 8",
        "update {T}_parent set private = true where id = 2",
        "update {T} set tenant = 'moved while hidden' where parent_id = 2",
        "update {T}_parent set private = false where id = 2",
        "begin; update {T}_parent set private = true where id = 3; update {T} set tenant = 'both at once' where parent_id = 3; commit",
        "delete from {T} where id > 30; delete from {T}_parent where id = 3",
    ] {
        setting.run(change);
        setting.equal_to(documents);
    }
    assert_eq!(setting.verify(false), (0, 0, 0));
}

#[test]
fn rows_that_move_between_partitions_take_their_documents_along() {
    Setting::attached(
        Engine::elasticsearch(),
        "create table {T} (id int, tenant text, title text, primary key (tenant, id)) partition by list (tenant);
         create table {T}_a partition of {T} for values in ('a');
         create table {T}_b (title text, tenant text not null, id int not null);
         alter table {T} attach partition {T}_b for values in ('b', 'c');
         insert into {T} select i, (array['a', 'b', 'c'])[i % 3 + 1], 'thing' from generate_series(1, 30) i",
        &format!("options => '{{\"routing\": \"title\", {FOUR_SHARDS}}}'"),
    )
    .each_as(
        "select tenant || '|' || id, title, row_to_json(t) from {T} t",
        &[
            "update {T} set tenant = 'a' where tenant = 'b' and id > 10",
            "update {T} set tenant = 'c', title = 'moved' where tenant = 'a'",
            "update {T}_b set title = 'by itself' where id = 2",
            "delete from {T}_b where id <= 5",
        ],
    );
}

impl Setting {
    #[track_caller]
    fn each_as(mut self, query: &str, statements: &[&str]) {
        self.equal_to(query);
        for statement in statements {
            self.run(statement);
            self.equal_to(query);
        }
    }
}

#[test]
fn indexes_of_one_table_are_routed_each_in_its_own_way() {
    let mut setting = Setting::new();
    let (by_title, plain) = (format!("{}-title", setting.name), format!("{}-plain", setting.name));
    setting.run(&format!(
        "select es_sync.attach('{{T}}', index => '{by_title}', options => '{{\"routing\": \"title\", {FOUR_SHARDS}}}');
         select es_sync.attach('{{T}}', index => '{plain}', options => '{{{FOUR_SHARDS}}}')"
    ));
    for change in [
        "",
        "update {T} set tenant = 'moved' where id <= 10",
        "update {T} set title = 'moved' where id between 5 and 15",
        "update {T} set title = 'again', tenant = 'again' where id between 12 and 25",
        "delete from {T} where id > 30",
    ] {
        setting.run(change);
        setting.equal();
        let name = &setting.name;
        let query = format!("select id, title, row_to_json(t) from {name} t");
        expect::places_equal(&mut setting.client, &query, &setting.engine, &by_title);
        let query = format!("select id, null, row_to_json(t) from {name} t");
        expect::places_equal(&mut setting.client, &query, &setting.engine, &plain);
    }
    // What is let go needs nothing any more, and the number that stood for it may be used again.
    setting.run(&format!(
        "select es_sync.detach('{{T}}', index => '{by_title}');
         select es_sync.attach('{{T}}', index => '{by_title}-2', options => '{{\"routing\": \"id\", {FOUR_SHARDS}}}');
         update {{T}} set title = 'after', tenant = 'after' where id < 5"
    ));
    setting.equal();
    let query = format!("select id, id, row_to_json(t) from {} t", setting.name);
    expect::places_equal(&mut setting.client, &query, &setting.engine, &format!("{by_title}-2"));
}

#[test]
fn verify_finds_and_mends_documents_that_lie_elsewhere() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let mut setting = Setting::on(engine, FOUR_SHARDS);
        assert_eq!(setting.verify(false), (0, 0, 0));
        let index = setting.concrete();
        let document = |id: i32, tenant: &str| json!({"id": id, "tenant": tenant, "title": format!("thing {id}")});
        // Gone, changed, one besides under another routing, one without a row under a routing and one under none.
        setting.engine.delete(&format!("/{index}/_doc/1?routing=tenant%201"));
        setting.engine.put(&format!("/{index}/_doc/2?routing=tenant%202"), document(2, "changed by hand"));
        for n in 0..8 {
            setting.engine.put(&format!("/{index}/_doc/3?routing=elsewhere%20{n}"), document(3, "tenant 3"));
        }
        setting.engine.put(&format!("/{index}/_doc/900?routing=x"), document(900, "x"));
        setting.engine.put(&format!("/{index}/_doc/901"), document(901, ""));
        setting.engine.put(&format!("/{index}/_doc/no%20number?routing=x"), document(0, "x"));
        setting.engine.refresh(&index);
        let found = setting.engine.places(&setting.name);
        let expected =
            expect::rows(&mut setting.client, &format!("select id, tenant, row_to_json(t) from {} t", setting.name));
        let missing = expected.keys().filter(|place| !found.contains_key(place)).count() as i64;
        let orphaned = found.keys().filter(|place| !expected.contains_key(place)).count() as i64;
        // Eight routings on four shards: some of them on one, and one on that of the right one.
        assert!(missing == 2 && orphaned >= 3 + 2, "{missing} {orphaned}");
        assert_eq!(setting.verify(false), (missing, 1, orphaned));
        // What is mended first may replace another one on the same shard.
        let mended = setting.verify(true);
        assert!(mended.0 == missing && mended.1 == 1 && mended.2 > 0, "{mended:?}");
        setting.equal();
        assert_eq!(setting.verify(false), (0, 0, 0));
    }
}

/// What was not noted one by one is repaired by a comparison: moves and deletes are found there.
#[test]
fn moves_that_nobody_noted_are_repaired() {
    let mut setting = Setting::new();
    setting.run(
        "set es_sync.capture = off;
         begin; update {T} set tenant = 'moved' where id <= 20; delete from {T} where id > 35; commit;
         set es_sync.capture = on",
    );
    setting.equal();
    setting.run("update {T} set tenant = 'moved again' where id <= 20");
    setting.equal();
}

#[test]
fn moves_that_a_crash_lost_are_repaired() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let mut setting = Setting::of_tenants(engine, Server::with_url(proxy.url()), 40);
    proxy.set_for("_bulk", Fault::Refuse);
    setting.run("update {T} set tenant = 'moved' where id <= 20; delete from {T} where id > 35");
    setting.server.restart(Mode::Immediate);
    setting.client = setting.server.connect("app");
    proxy.set(Fault::Pass);
    setting.equal();
}

#[test]
fn a_prepared_transaction_that_moves_documents_is_delivered() {
    Setting::new().each(&[
        "begin; update {T} set tenant = 'prepared' where id <= 20; delete from {T} where id > 30; prepare transaction 'moves'",
        "commit prepared 'moves'",
    ]);
}

#[test]
fn a_move_whose_answer_was_lost_is_done_again() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let mut setting = Setting::of_tenants(engine, Server::with_url(proxy.url()), 40);
    for (round, fault) in [Fault::LoseAnswer, Fault::Reset, Fault::ResetAfterRequest].into_iter().enumerate() {
        proxy.forget_seen();
        proxy.set_for("_bulk", fault);
        setting.run(&format!("update {{T}} set tenant = 'moved {round}' where id % 3 = {round}"));
        wait::until("a move has failed", wait::LONG, || !proxy.seen("_bulk").is_empty());
        setting.run(&format!(
            "update {{T}} set tenant = 'moved again {round}' where id % 2 = 0; delete from {{T}} where id = {round} + 1"
        ));
        proxy.set(Fault::Pass);
        setting.equal();
    }
}

/// A request for the former shard arrives after the document has moved, and the engine has forgotten that.
#[test]
fn a_request_that_arrives_after_the_move_that_overtook_it_brings_nothing_back() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::builder()
        .conf("es_sync.url", proxy.url())
        .conf("es_sync.request_timeout", "1s")
        .conf("es_sync.retry_max_delay", "100ms")
        .start();
    let mut setting = Setting::at(
        engine,
        server,
        "create table {T} (id int primary key, tenant text, title text)",
        r#"options => '{"routing": "tenant", "settings": {"number_of_shards": 4, "gc_deletes": "0s"}}'"#,
    );
    proxy.forget_seen();
    proxy.set_for("_bulk", Fault::Delay(Duration::from_millis(2500)));
    setting.run("insert into {T} select i, 'former ' || i, 'late' from generate_series(1, 8) i");
    wait::until("the insert is on its way", wait::SHORT, || !proxy.seen("_bulk").is_empty());
    proxy.set(Fault::Pass);
    setting.run("update {T} set tenant = 'later'; delete from {T} where id > 6");
    expect::settled(&mut setting.client);
    let (engine, name) = (&setting.engine, &setting.name);
    wait::until("the late request has arrived", wait::SHORT, || engine.places(name).len() > 6);
    let expected = expect::rows(&mut setting.client, &format!("select id, tenant, row_to_json(t) from {name} t"));
    wait::until("it was taken back", wait::SHORT, || engine.places(name) == expected);
}

#[test]
fn a_shard_that_refuses_a_delete_is_asked_again_until_it_is_a_dead_letter() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let server = Server::builder()
        .conf("es_sync.url", proxy.url())
        .conf("es_sync.max_attempts", 4)
        .conf("es_sync.retry_max_delay", "100ms")
        .start();
    let mut setting = Setting::of_tenants(engine, server, 40);
    // Only the delete under the former routing fails; the document is taken where it belongs.
    proxy.spoil(r#""delete":{"_id":"9","routing":"tenant 4""#, 503);
    setting.run("update {T} set tenant = 'moved' where id = 9");
    let letters = "select count(*) from es_sync.dead_letters where key = '9' and kind = 'max_attempts'";
    wait::until("it is parked", wait::LONG, || {
        setting.run("update {T} set title = title || '.' where id <> 9");
        setting.number(letters) == 1
    });
    proxy.spoil("", 0);
    // As if the shard had been away: the document is still there.
    let index = setting.concrete();
    let former = json!({"id": 9, "tenant": "tenant 4", "title": "thing"});
    let put_back = || setting.engine.put(&format!("/{index}/_doc/9?routing=tenant%204"), former.clone());
    put_back();
    setting.run("select es_sync.retry_dead_letters()");
    setting.equal();
    assert_eq!(setting.number(letters), 0);
    // A later change of the document that knows nothing of the former routing clears the letter, and forgets nothing.
    proxy.spoil(r#""delete":{"_id":"9","routing":"moved""#, 503);
    setting.run("update {T} set tenant = 'moved again' where id = 9");
    wait::until("it is parked", wait::LONG, || {
        setting.run("update {T} set title = title || '.' where id <> 9");
        setting.number(letters) == 1
    });
    proxy.spoil("", 0);
    setting.engine.put(&format!("/{index}/_doc/9?routing=moved"), former);
    setting.run("update {T} set title = 'another change' where id = 9");
    wait::until("the letter is cleared", wait::LONG, || setting.number(letters) == 0);
    setting.equal();
}

#[test]
fn a_refused_document_that_moves_is_a_dead_letter_until_it_is_taken() {
    let mut setting = Setting::attached(
        Engine::elasticsearch(),
        "create table {T} (id int primary key, tenant text, doc jsonb);
         insert into {T} select i, 'tenant ' || i % 5, '{\"a\": 1}' from generate_series(1, 20) i",
        &format!(
            "options => '{{\"routing\": \"tenant\", \"mappings\": {{\"properties\": {{\"doc\": {{\"type\": \"object\"}}}}}}, {FOUR_SHARDS}}}'"
        ),
    );
    setting.equal();
    setting
        .run("update {T} set tenant = 'moved', doc = '7' where id = 3; update {T} set tenant = 'moved' where id = 4");
    expect::settled(&mut setting.client);
    assert_eq!(setting.number("select count(*) from es_sync.dead_letters where key = '3'"), 1);
    setting.equal_to("select id, tenant, row_to_json(t) from {T} t where id <> 3");
    setting.run("update {T} set doc = '{\"a\": 2}' where id = 3");
    setting.equal();
    assert_eq!(setting.number("select count(*) from es_sync.dead_letters"), 0);
    // And one whose row is deleted while it is parked.
    setting.run("update {T} set tenant = 'moved again', doc = '7' where id = 3");
    expect::settled(&mut setting.client);
    setting.run("delete from {T} where id = 3");
    setting.equal();
    assert_eq!(setting.number("select count(*) from es_sync.dead_letters"), 0);
}

#[test]
fn changes_during_a_rebuild_move_documents_in_both_indexes() {
    let engine = Engine::elasticsearch();
    let proxy = Proxy::to(engine.url());
    let mut setting = Setting::of_tenants(engine, Server::with_url(proxy.url()), 2000);
    // Pages are read before the changes and arrive after them.
    proxy.forget_seen();
    proxy.set_for("_bulk", Fault::Delay(Duration::from_millis(500)));
    setting.run("select es_sync.reindex('{T}')");
    wait::until("a page is on its way", wait::LONG, || !proxy.seen("_bulk").is_empty());
    setting.run("update {T} set tenant = 'moved' where id % 3 = 0; delete from {T} where id % 7 = 0");
    setting.run("update {T} set tenant = 'moved again' where id % 6 = 0");
    proxy.set(Fault::Pass);
    setting.equal();
}

#[test]
fn a_paused_table_keeps_its_moves() {
    let mut setting = Setting::new();
    let before = setting.engine.places(&setting.name);
    setting.run("select es_sync.pause('{T}')");
    setting.run("update {T} set tenant = 'moved' where id <= 20");
    setting.run("delete from {T} where id > 30");
    wait::until("the worker knows of the pause", wait::SHORT, || {
        setting.number("select count(*) from es_sync.status where state = 'paused' and pending > 0") == 1
    });
    assert_eq!(setting.engine.places(&setting.name), before, "nothing is sent meanwhile");
    setting.run("select es_sync.resume('{T}')");
    setting.equal();
}

#[test]
fn a_routing_column_is_followed_under_its_new_name() {
    let mut setting = Setting::new();
    setting.run("alter table {T} rename tenant to customer");
    setting.run("update {T} set customer = 'moved' where id <= 20; delete from {T} where id > 30");
    setting.equal_to("select id, customer, row_to_json(t) from {T} t");
}

#[test]
fn a_routing_column_of_another_type_routes_by_its_new_text() {
    Setting::new().each(&[
        "begin; update {T} set tenant = 'tenant 9' where id < 10; delete from {T} where id = 40;
         alter table {T} alter tenant type int using substr(tenant, 8)::int; update {T} set tenant = 7 where id = 11; commit",
        "update {T} set tenant = 3 where id = 12; delete from {T} where id = 13; insert into {T} values (100, 1, 'new')",
        // The same type, another text.
        "alter table {T} alter tenant type numeric(10, 0)",
        "alter table {T} alter tenant type numeric(10, 2)",
        "update {T} set tenant = 5 where id = 14; delete from {T} where id = 15",
    ]);
}

#[test]
fn a_dropped_routing_column_is_told_in_status_until_there_is_one_again() {
    let mut setting = Setting::new();
    setting.run(
        "alter table {T} drop column tenant; update {T} set title = 'x' where id < 5; delete from {T} where id = 7;
         insert into {T} values (100, 'new')",
    );
    let told = "has lost column \"tenant\", by which its documents are routed";
    wait::until("status says so", wait::LONG, || {
        let said = cause(&mut setting.client);
        if said.contains(told) { Ok(()) } else { Err(said) }
    });
    let waited: bool = setting.client.query_one("select es_sync.wait(timeout => '1 s')", &[]).expect("wait").get(0);
    assert!(!waited);
    setting.run("alter table {T} add column tenant text; update {T} set tenant = 'tenant ' || id % 3 where id > 5");
    setting.equal();
    setting.run("update {T} set tenant = 'other' where id = 8; delete from {T} where id in (1, 9)");
    setting.equal();
    assert_eq!(cause(&mut setting.client), "");
}

#[test]
fn a_routing_column_that_is_not_there_is_refused() {
    let server = Server::with(&Engine::elasticsearch());
    let mut client = server.create_database("app");
    client.batch_execute("create table plain (id int primary key)").expect("set up");
    for (options, code) in [(r#"{"routing": "tenant"}"#, "42703"), (r#"{"routing": 1}"#, "22023")] {
        let attach = format!("select es_sync.attach('plain', options => '{options}')");
        let error = client.batch_execute(&attach).expect_err(options);
        assert_eq!(error.code().map(postgres::error::SqlState::code), Some(code), "{options}");
    }
}

fn cause(client: &mut Client) -> String {
    let query = "select coalesce(cause, '') || coalesce((select string_agg(error, ' ') from es_sync.jobs), '') from es_sync.status";
    client.query_one(query, &[]).expect("status").get(0)
}

#[test]
fn documents_wait_for_a_pipeline_that_is_missing_and_the_status_names_it() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let server = Server::with(&engine);
        let mut client = server.create_database("app");
        let name = unique("piped");
        client
            .batch_execute(&format!(
                "create table {name} (id int primary key, title text);
                 insert into {name} select i, 'thing' from generate_series(1, 50) i;
                 select es_sync.attach('{name}', options => '{{\"pipeline\": \"{name}\"}}')"
            ))
            .expect("set up");
        let missing = format!("pipeline with id [{name}] does not exist");
        wait::until("the load says what it waits for", wait::LONG, || {
            let cause = cause(&mut client);
            if cause.contains(&missing) { Ok(()) } else { Err(cause) }
        });
        engine.put(&format!("/_ingest/pipeline/{name}"), json!({"processors": []}));
        expect::table_equal(&mut client, &name, "id", &engine, &name);
        // Deleted later, it holds changes up, and loses none.
        engine.delete(&format!("/_ingest/pipeline/{name}"));
        client
            .batch_execute(&format!(
                "update {name} set title = 'changed' where id <= 10; insert into {name} values (99, 'new')"
            ))
            .expect("changes");
        wait::until("the changes wait for it", wait::LONG, || {
            let cause = cause(&mut client);
            if cause.contains(&missing) { Ok(()) } else { Err(cause) }
        });
        engine.put(&format!("/_ingest/pipeline/{name}"), json!({"processors": []}));
        expect::table_equal(&mut client, &name, "id", &engine, &name);
        let letters: i64 = client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("letters").get(0);
        assert_eq!(letters, 0);
        engine.delete(&format!("/_ingest/pipeline/{name}"));
    }
}

/// The pipeline writes into the object `doc` of each document, and fails where `doc` is none.
#[test]
fn documents_go_through_their_pipeline_on_both_products() {
    for (engine, processor) in [
        // The one processor that the tests' Elasticsearch has: it says who writes.
        (Engine::secured(), json!({"set_security_user": {"field": "doc.stamp", "properties": ["username"]}})),
        (Engine::opensearch(), json!({"set": {"field": "doc.stamp", "value": {"username": "anyone"}}})),
        // The same, and what it fails for is refused in words of one's own.
        (
            Engine::opensearch(),
            json!({"set": {"field": "doc.stamp", "value": {"username": "anyone"},
                           "on_failure": [{"fail": {"message": "doc is no object"}}]}}),
        ),
    ] {
        let pipeline = unique("pipeline");
        engine.put(&format!("/_ingest/pipeline/{pipeline}"), json!({"processors": [processor]}));
        let mut setting = Setting::attached(
            engine,
            "create table {T} (id int primary key, tenant text, doc jsonb);
             insert into {T} select i, 'tenant ' || i % 5, jsonb_build_object('n', i) from generate_series(1, 40) i;
             update {T} set doc = '7' where id = 7",
            &format!(
                r#"options => '{{"pipeline": "{pipeline}", "routing": "tenant", {FOUR_SHARDS},
                                "mappings": {{"properties": {{"doc": {{"type": "object", "enabled": false}}}}}}}}'"#
            ),
        );
        let stamped = "select id, tenant, to_jsonb(t) || jsonb_build_object('doc', doc || '{\"stamp\": {\"username\": \"anyone\"}}')
                       from {T} t where jsonb_typeof(doc) = 'object'";
        let letters = "select array_agg(key::int order by key::int) from es_sync.dead_letters";
        let parked = |setting: &mut Setting, keys: &[i32]| {
            let found: Option<Vec<i32>> = setting.client.query_one(letters, &[]).expect("letters").get(0);
            assert_eq!(found.unwrap_or_default(), keys);
        };
        setting.equal_to(stamped);
        parked(&mut setting, &[7]);
        for statement in [
            "update {T} set doc = '{\"n\": 0}' where id between 10 and 20",
            "update {T} set tenant = 'moved' where id > 35",
            "insert into {T} values (100, 'new', '{}')",
            "insert into {T} select i, 'some', case when i % 7 = 0 then '7' else '{}' end::jsonb from generate_series(101, 111) i",
            "update {T} set id = 200 where id = 6; delete from {T} where id < 5",
            "select es_sync.sync('{T}', 9, 10)",
            "select es_sync.sync_where('{T}', 'id > 30')",
            "select es_sync.reindex('{T}')",
        ] {
            setting.run(statement);
            setting.equal_to(stamped);
        }
        parked(&mut setting, &[7, 105]);
        setting.run("update {T} set doc = '{}' where id in (7, 105)");
        setting.equal_to(stamped);
        parked(&mut setting, &[]);
        setting.run("truncate {T}; insert into {T} values (1, 'after', '{}')");
        setting.equal_to(stamped);
        setting.engine.request("DELETE", &format!("/_ingest/pipeline/{pipeline}"), None);
    }
}

/// A pipeline may give back something else than it was sent: contents are not compared then, presence is.
#[test]
fn with_a_pipeline_verify_compares_presence_and_routing_only() {
    let engine = Engine::elasticsearch();
    let pipeline = unique("pipeline");
    engine.put(&format!("/_ingest/pipeline/{pipeline}"), json!({"processors": []}));
    let mut setting = Setting::on(engine, &format!(r#""pipeline": "{pipeline}", {FOUR_SHARDS}"#));
    setting.equal();
    let index = setting.concrete();
    let document = json!({"id": 1, "tenant": "tenant 1", "title": "as a pipeline might have made it"});
    setting.engine.put(&format!("/{index}/_doc/1?routing=tenant%201"), document.clone());
    setting.engine.delete(&format!("/{index}/_doc/2?routing=tenant%202"));
    setting.engine.put(&format!("/{index}/_doc/900?routing=x"), document.clone());
    setting.engine.refresh(&index);
    assert_eq!(setting.verify(true), (1, 0, 1));
    setting.equal_to(
        "select id, tenant, case id when 1 then json_build_object('id', 1, 'tenant', 'tenant 1', 'title',
             'as a pipeline might have made it') else row_to_json(t) end from {T} t",
    );
    setting.run("update {T} set title = 'changed' where id = 1");
    setting.equal();
    setting.engine.delete(&format!("/_ingest/pipeline/{pipeline}"));
}
