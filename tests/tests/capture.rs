//! Every way in which a row changes arrives, and nothing arrives that was rolled back.

use pg_es_sync_tests::{Engine, Server, expect, unique, wait};
use postgres::Client;

/// A server, a database, an attached and loaded table of 10 rows.
fn table(engine: &Engine) -> (Server, Client, String) {
    let server = Server::with(engine);
    let mut client = server.create_database("app");
    let name = unique("goods");
    client
        .batch_execute(&format!(
            "set timezone = 'UTC';
             create table {name} (id bigint primary key, title text, price numeric, at timestamptz default now());
             insert into {name} select i, 'thing ' || i, i / 7.0 from generate_series(1, 10) i;
             select es_sync.attach('{name}')"
        ))
        .expect("set up");
    expect::settled(&mut client);
    (server, client, name)
}

fn equal(client: &mut Client, engine: &Engine, name: &str) {
    expect::table_equal(client, name, "id", engine, name);
}

#[test]
fn every_statement_that_changes_rows_is_captured() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(&engine);
    for statement in [
        "insert into T values (11, 'new', 1), (12, 'newer', 2)",
        "update T set title = 'changed' where id <= 3",
        "delete from T where id = 4",
        "insert into T values (5, 'conflict'), (13, 'none') on conflict (id) do update set title = excluded.title",
        "merge into T using (values (6, 'merged'), (14, 'merged')) m (id, title) on T.id = m.id
             when matched then update set title = m.title when not matched then insert values (m.id, m.title)",
        "update T set id = id + 100 where id = 7",
        "begin; delete from T where id = 8; insert into T values (8, 'again'); commit",
        "begin; update T set id = -1 where id = 1; update T set id = 1 where id = 2; update T set id = 2 where id = -1; commit",
        "do $$ begin for i in 20..29 loop insert into T values (i, 'loop'); commit; end loop; end $$",
        "do $$ begin for i in 30..39 loop
             begin insert into T values (i, 'block'); if i % 2 = 0 then raise 'no'; end if;
             exception when others then null; end; end loop; end $$",
        "with gone as (delete from T where id in (9, 10) returning *) insert into T select id + 1000, title from gone",
        "set session_replication_role = replica; insert into T values (50, 'as a replica'); reset session_replication_role",
    ] {
        client
            .batch_execute(&statement.replace("T ", &format!("{name} ")).replace("T.", &format!("{name}.")))
            .expect(statement);
        equal(&mut client, &engine, &name);
    }
    let mut copy = client.copy_in(&format!("copy {name} (id, title) from stdin")).expect("copy");
    std::io::Write::write_all(&mut copy, b"60\tcopied\n61\tcopied too\n").expect("copy");
    copy.finish().expect("copy");
    equal(&mut client, &engine, &name);
}

#[test]
fn truncate_empties_the_index() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(&engine);
    client
        .batch_execute(&format!("begin; truncate {name}; insert into {name} values (1, 'after'); commit"))
        .expect("truncate");
    wait::until("the truncation has arrived", wait::LONG, || {
        expect::compare(&mut client, &format!("select id, row_to_json(t) from {name} t"), &engine, &name)
    });
    equal(&mut client, &engine, &name);
}

#[test]
fn rolled_back_work_never_arrives() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(&engine);
    client
        .batch_execute(&format!(
            "begin; insert into {name} values (100, 'rolled back'); rollback;
             begin; insert into {name} values (101, 'kept');
                 savepoint a; insert into {name} values (102, 'rolled back'); rollback to a;
                 savepoint b; insert into {name} values (103, 'kept');
                     savepoint c; insert into {name} values (104, 'rolled back'); rollback to c;
                 release b;
             commit;
             begin; insert into {name} values (105, 'rolled back'); prepare transaction 'p1'"
        ))
        .expect("work");
    client.batch_execute("rollback prepared 'p1'").expect("roll back prepared");
    equal(&mut client, &engine, &name);
    // Not only absent, but never asked for: beside the first ten only 101 and 103 were.
    assert_eq!(indexed(&mut client), 10 + 2);
}

fn indexed(client: &mut Client) -> i64 {
    client.query_one("select (indexed + deleted)::int8 from es_sync.status", &[]).expect("status").get(0)
}

#[test]
fn a_spilled_savepoint_that_rolls_back_takes_only_its_own_keys() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(&engine);
    // 1 MB of keys at 16 bytes each spills at 65,536.
    client
        .batch_execute(&format!(
            "begin;
             insert into {name} select i, 'outer' from generate_series(1000, 1999) i;
             savepoint s;
             insert into {name} select i, 'inner' from generate_series(100000, 199999) i;
             rollback to s;
             insert into {name} select i, 'after' from generate_series(300000, 370000) i;
             commit"
        ))
        .expect("work");
    equal(&mut client, &engine, &name);
    let documents: i64 = client.query_one(&format!("select count(*) from {name}"), &[]).expect("count").get(0);
    assert_eq!(documents, 10 + 1000 + 70_001);
    assert_eq!(indexed(&mut client), documents, "no key of the savepoint was delivered");
}

#[test]
fn a_prepared_transaction_arrives_after_commit_prepared() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(&engine);
    client
        .batch_execute(&format!(
            "begin; update {name} set title = 'prepared' where id = 1; delete from {name} where id = 2;
             prepare transaction 'p2';
             insert into {name} values (200, 'unrelated')"
        ))
        .expect("prepare");
    expect::settled(&mut client);
    equal(&mut client, &engine, &name);
    client.batch_execute("commit prepared 'p2'").expect("commit prepared");
    equal(&mut client, &engine, &name);
}

#[test]
fn a_role_without_any_right_on_the_extension_may_write() {
    let engine = Engine::elasticsearch();
    let (server, mut client, name) = table(&engine);
    client
        .batch_execute(&format!("create role clerk login; grant select, insert, update, delete on {name} to clerk"))
        .expect("role");
    let mut clerk = server.connect_as("clerk", "app");
    clerk
        .batch_execute(&format!(
            "insert into {name} values (300, 'by a clerk'); update {name} set title = 'clerk' where id = 1;
             begin; delete from {name} where id = 2; prepare transaction 'p3'"
        ))
        .expect("a clerk writes");
    clerk.batch_execute("commit prepared 'p3'").expect("a clerk commits what was prepared");
    assert!(clerk.query("select * from es_sync.queue", &[]).is_err(), "and sees nothing of ours");
    equal(&mut client, &engine, &name);
}

#[test]
fn an_update_that_changes_nothing_enqueues_nothing() {
    let engine = Engine::elasticsearch();
    let (_server, mut client, name) = table(&engine);
    let before = indexed(&mut client);
    client
        .batch_execute(&format!("update {name} set title = title; update {name} set title = 'one' where id = 1"))
        .expect("update");
    equal(&mut client, &engine, &name);
    assert_eq!(indexed(&mut client), before + 1);
}

#[test]
fn partitions_are_followed_through_the_root_and_by_themselves() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let name = unique("parts");
    client
        .batch_execute(&format!(
            "set timezone = 'UTC';
             create table {name} (id int, region text, title text, primary key (region, id)) partition by list (region);
             create table {name}_a partition of {name} for values in ('a');
             create table {name}_b (title text, id int not null, region text not null);
             alter table {name} attach partition {name}_b for values in ('b');
             insert into {name} select i, case when i % 2 = 0 then 'a' else 'b' end, 'x' from generate_series(1, 100) i;
             select es_sync.attach('{name}');
             create table {name}_c partition of {name} for values in ('c')"
        ))
        .expect("set up");
    client
        .batch_execute(&format!(
            "insert into {name} values (1000, 'c', 'in a later partition');
             update {name} set title = 'through the root' where id <= 10;
             update {name}_b set title = 'by itself' where id = 21;
             update {name} set region = 'a' where id = 31;
             delete from {name}_a where id = 40"
        ))
        .expect("changes");
    expect::table_equal(&mut client, &name, "region || '|' || id", &engine, &name);
    client.batch_execute(&format!("truncate {name}_a")).expect("truncate a leaf");
    wait::until("the truncation has arrived", wait::LONG, || {
        let rows = format!("select region || '|' || id, row_to_json(t) from {name} t");
        expect::compare(&mut client, &rows, &engine, &name)
    });
}
