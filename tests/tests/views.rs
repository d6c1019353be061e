//! Documents from views: every table that a view reads is followed to the documents that show its rows.

use pg_es_sync_tests::shop::{HOSTS, PRICES, Shop};
use pg_es_sync_tests::{Engine, Mode, Server, expect, process, unique, wait};
use serde_json::json;
use std::time::{Duration, Instant};

#[test]
fn a_joined_row_refreshes_the_documents_that_show_it_on_both_products() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let mut shop = Shop::on(engine, HOSTS);
        shop.attach();
        shop.each(&[
            "update host set name = 'uno' where id = 1",
            "update root set host_id = 1 where id = 1",
            "insert into host values (3, 'three'); update root set host_id = 3 where id % 2 = 0",
            "update host set name = upper(name)",
            "update root set title = 'renamed' where id = 5",
            "update root set host_id = null where host_id = 3; delete from host where id = 3",
            "delete from root where id = 2",
            "update root set id = 100 where id = 1",
        ]);
    }
}

#[test]
fn a_row_that_a_correlated_sub_select_reads_refreshes_its_document() {
    let mut shop = Shop::new(
        "create table root (id int primary key, title text);
        create table item (id int primary key, root_id int, name text, price int, note text);
        create view document as
            select r.id, r.title,
                   (select coalesce(jsonb_agg(jsonb_build_object('id', i.id, 'name', i.name) order by i.id), '[]')
                    from item i where i.root_id = r.id) as items,
                   (select sum(i.price) from item i where r.id = i.root_id) as total,
                   exists (select from item i where i.root_id = r.id and i.price > 100) as dear
            from root r;
        insert into root select i, 'title ' || i from generate_series(1, 20) i;
        insert into item select i, i % 20 + 1, 'item ' || i, i from generate_series(1, 60) i;",
    );
    shop.attach();
    shop.each(&[
        "insert into item values (100, 7, 'new', 5)",
        "update item set name = 'changed' where id = 100",
        "update item set price = 1000 where id = 100",
        "update item set root_id = 8 where id = 100",
        "delete from item where id = 100",
        "delete from item where root_id < 5",
    ]);
}

#[test]
fn a_row_several_hops_away_refreshes_its_documents() {
    let mut shop = Shop::new(
        "create table country (code text primary key, name text);
        create table city (id int primary key, country text, name text);
        create table venue (id int primary key, city_id bigint, name text);
        create table root (id int primary key, venue_id int);
        create view document as
            select r.id, v.name as venue, c.name as city, k.name as country
            from root r
            left join venue v on v.id = r.venue_id
            left join city c on c.id = v.city_id
            left join country k on k.code = c.country;
        insert into country values ('d|e', 'Germany'), ('fr\\', 'France');
        insert into city values (1, 'd|e', 'Berlin'), (2, 'fr\\', 'Paris');
        insert into venue values (1, 1, 'a'), (2, 1, 'b'), (3, 2, 'c');
        insert into root select i, i % 3 + 1 from generate_series(1, 30) i;",
    );
    shop.attach();
    shop.each(&[
        "update country set name = 'Deutschland' where code = 'd|e'",
        "update city set name = 'Lyon' where id = 2",
        "update venue set city_id = 2 where id = 1",
        "update city set country = 'd|e' where id = 2",
        "update country set code = 'x' where code = 'd|e'",
        "delete from city where id = 1",
        "delete from venue where id = 2",
    ]);
}

#[test]
fn rows_of_a_join_table_and_behind_it_refresh_documents() {
    let mut shop = Shop::new(
        "create table root (id uuid primary key, title text);
        create table tag (id int primary key, name text);
        create table tagging (root_id uuid, tag_id int, primary key (root_id, tag_id));
        create view document as
            select r.id, r.title, t.names
            from root r
            left join lateral (
                select array_agg(tag.name order by tag.id) as names
                from tagging join tag on tag.id = tagging.tag_id
                where tagging.root_id = r.id) t on true;
        insert into root select md5(i::text)::uuid, 'title ' || i from generate_series(1, 10) i;
        insert into tag select i, 'tag ' || i from generate_series(1, 5) i;
        insert into tagging select md5(i::text)::uuid, i % 4 + 1 from generate_series(1, 10) i;",
    );
    shop.attach();
    shop.each(&[
        "update tag set name = 'changed' where id = 2",
        "insert into tagging select id, 5 from root",
        "update tag set name = 'five' where id = 5",
        "update tagging set root_id = md5('2')::uuid where root_id = md5('1')::uuid and tag_id = 2",
        "delete from tagging where tag_id = 5",
        "delete from tag where id = 1",
    ]);
}

#[test]
fn a_table_that_shows_itself_is_followed() {
    let mut shop = Shop::new(
        "create table root (id int primary key, parent_id int, name text, private boolean not null default false);
        create view document as
            select r.id, r.name, p.name as parent, g.name as grandparent,
                   (select count(*) from root c where c.parent_id = r.id and not c.private) as children
            from root r left join root p on p.id = r.parent_id left join root g on g.id = p.parent_id
            where not r.private and coalesce(not p.private, true);
        insert into root select i, nullif(i / 3, 0), 'name ' || i from generate_series(1, 40) i;",
    );
    shop.attach();
    shop.each(&[
        "update root set name = 'top' where id = 1",
        "update root set private = true where id = 4",
        "update root set private = false where id = 4",
        "update root set parent_id = 2 where id = 12",
        "delete from root where id = 13",
        "insert into root values (50, 3, 'new')",
        "update root set id = 60 where id = 5",
        "update root set id = 5 where id = 60",
    ]);
}

#[test]
fn tables_behind_a_view_within_the_view_are_followed() {
    let mut shop = Shop::new(&format!(
        "{HOSTS}
        create view named_host as select id as number, name, secret from host;
        create or replace view document as
            with shown as (select * from named_host)
            select r.id, r.title, s.name as host from root r left join shown s on s.number = r.host_id;"
    ));
    shop.attach();
    shop.each(&[
        "update host set name = 'uno' where id = 1",
        "update root set host_id = null; delete from host where id = 2",
    ]);
}

#[test]
fn rows_that_an_aggregation_counts_refresh_its_document() {
    let mut shop = Shop::new(
        "create table root (id int primary key, title text);
        create table sale (id int primary key, root_id int, amount numeric);
        create view document as
            select r.id, r.title, coalesce(s.total, 0) as total, x.rank
            from root r
            left join (select root_id, sum(amount) as total, count(*) from sale group by root_id) s on s.root_id = r.id
            left join (select root_id, id, row_number() over (partition by root_id order by amount) as rank from sale) x
                on x.root_id = r.id and x.rank = 1;
        insert into root select i, 'title ' || i from generate_series(1, 20) i;
        insert into sale select i, i % 20 + 1, i from generate_series(1, 100) i;",
    );
    shop.attach();
    shop.each(&[
        "update sale set amount = 1000 where id = 50",
        "insert into sale values (1000, 1, 5)",
        "update sale set root_id = 2 where root_id = 1",
        "delete from sale where root_id = 2",
    ]);
}

#[test]
fn a_union_is_followed_through_each_branch() {
    let mut shop = Shop::new(
        "create table root (id int primary key);
        create table mail (id int primary key, root_id int, text text);
        create table note (id int primary key, about int, text text);
        create view document as
            select r.id, (select string_agg(a.text, ',' order by a.text) from (
                select root_id, text from mail union all select about, text from note) a
                where a.root_id = r.id) as activity
            from root r;
        insert into root select generate_series(1, 10);
        insert into mail select i, i, 'mail ' || i from generate_series(1, 10) i;
        insert into note select i, i, 'note ' || i from generate_series(1, 10) i;",
    );
    shop.attach();
    shop.each(&[
        "update mail set text = 'x' where id = 3",
        "update note set about = 4 where id = 5",
        "delete from note where id = 4",
    ]);
}

#[test]
fn an_array_of_keys_is_followed_both_ways() {
    let mut shop = Shop::new(
        "create table root (id int primary key, tag_ids int[]);
        create table tag (id int primary key, name text);
        create table list (id int primary key, members int[], name text);
        create view document as
            select r.id,
                   (select array_agg(t.name order by t.id) from tag t where t.id = any (r.tag_ids)) as tags,
                   (select array_agg(l.name order by l.id) from list l where r.id = any (l.members)) as lists
            from root r;
        insert into root select i, array[i % 5, i % 7] from generate_series(1, 30) i;
        insert into tag select i, 'tag ' || i from generate_series(0, 6) i;
        insert into list values (1, '{1,2,3}', 'a'), (2, '{3,4}', 'b');",
    );
    shop.attach();
    shop.each(&[
        "update tag set name = 'changed' where id = 6",
        "update list set members = '{4,5,null}' where id = 1",
        "update list set name = 'c' where id = 2",
        "delete from tag where id = 2",
        "delete from list",
    ]);
}

#[test]
fn keys_of_several_columns_lead_to_their_documents() {
    let mut shop = Shop::new(
        "create table root (tenant int, number text, title text, primary key (tenant, number));
        create table line (tenant int, number text, place int, text text, primary key (tenant, number, place));
        create table tenant (id int primary key, name text);
        create view document as
            select r.tenant, r.number, r.tenant || '|' || replace(r.number, '|', '\\|') as id, r.title, t.name as tenant_name,
                   (select string_agg(l.text, ',' order by l.place) from line l
                    where l.tenant = r.tenant and l.number = r.number) as lines
            from root r join tenant t on t.id = r.tenant;
        insert into tenant values (1, 'one'), (2, 'two');
        insert into root select t, n, 'title' from generate_series(1, 2) t, unnest(array['a', 'a|b', '']) n;
        insert into line select tenant, number, p, 'line ' || p from root, generate_series(1, 3) p;",
    );
    shop.attach();
    shop.each(&[
        "update line set text = 'x' where number = 'a|b' and tenant = 2",
        "update line set tenant = 2, place = 4 where tenant = 1 and number = '' and place = 3",
        "update tenant set name = 'uno' where id = 1",
        "delete from line where tenant = 1",
        "delete from tenant where id = 2",
    ]);
}

#[test]
fn moving_a_row_to_another_parent_refreshes_both() {
    let mut shop = Shop::new(
        "create table root (id int primary key);
        create table item (id int primary key, root_id int);
        create view document as
            select r.id, count(i.id) as items from root r left join item i on i.root_id = r.id group by r.id;
        insert into root select generate_series(1, 10);
        insert into item select i, i from generate_series(1, 10) i;",
    );
    shop.attach();
    shop.each(&[
        "update item set root_id = 2 where id = 1",
        "update item set root_id = null where id = 3",
        "update item set root_id = 4 where id = 3",
        "begin; update item set root_id = 5 where id = 3; savepoint a; update item set root_id = 6 where id = 3;
         rollback to a; commit",
    ]);
}

#[test]
fn a_view_that_does_not_determine_a_way_is_refused() {
    let mut shop = Shop::new(
        "create table root (id int primary key, tags text);
        create table other (id int primary key, root_id int, low int, high int, name text);",
    );
    for (what, view, why) in [
        (
            "a range",
            "select r.id, o.name from root r left join other o on r.id between o.low and o.high",
            "does not compare its columns for equality",
        ),
        (
            "a set-returning function",
            "select r.id, (select array_agg(o.name) from regexp_split_to_table(r.tags, ',') t join other o on o.name = t)
             from root r",
            "the result of a set-returning function",
        ),
        (
            "an outer condition",
            "select r.id, o.name from other o left join root r on r.id = o.root_id",
            "the condition of an outer join",
        ),
        ("or", "select r.id, o.name from root r join other o on o.root_id = r.id or o.low = r.id", "for equality"),
        (
            "limit",
            "select r.id, o.name from root r left join (select * from other order by low limit 5) o on o.root_id = r.id",
            "below a LIMIT",
        ),
        (
            "distinct on",
            "select r.id, o.name from root r
             left join (select distinct on (low) * from other order by low, high) o on o.root_id = r.id",
            "DISTINCT ON",
        ),
        (
            "a window over other rows",
            "select r.id, o.n from root r
             left join (select root_id, row_number() over (order by low) as n from other) o on o.root_id = r.id",
            "window function",
        ),
        (
            "recursion",
            "select r.id, (with recursive up as (
                select id, root_id from other where root_id = r.id
                union all select o.id, o.root_id from up join other o on o.id = up.root_id)
                select count(*) from up) from root r",
            "recursive query",
        ),
        ("a full join", "select r.id, o.name from root r full join other o on o.root_id = r.id", "outer join"),
        ("not in", "select r.id from root r where (r.id not in (select root_id from other)) is not false", "for equality"),
    ] {
        shop.run(&format!("create view document as {view}"));
        let (message, detail, hint) = shop.refused("select es_sync.attach('root', document => 'document')");
        assert_eq!(message, "cannot follow table public.other, which view public.document reads", "{what}");
        assert!(detail.contains("public.other: ") && detail.contains(why), "{what}: {detail}");
        assert!(hint.contains("es_sync.relate('public.root', 'public.other'"), "{what}: {hint}");
        shop.run("drop view document");
    }
    assert_eq!(shop.count("select count(*) from pg_trigger where tgname like 'es_sync%'"), 0, "nothing is left behind");
}

#[test]
fn a_declared_way_is_followed() {
    let mut shop = Shop::new(
        "create table root (id int primary key, at int);
        create table season (id int primary key, low int, high int, name text, note text);
        create view document as
            select r.id, r.at, (select string_agg(s.name, ',' order by s.id) from season s where r.at between s.low and s.high)
                as seasons
            from root r;
        insert into root select i, i from generate_series(1, 50) i;
        insert into season values (1, 1, 10, 'a'), (2, 5, 20, 'b'), (3, 40, null, 'open');
        select es_sync.relate('root', 'season',
            'select r.id from public.root r where r.at >= related.low and (related.high is null or r.at <= related.high)');",
    );
    shop.attach();
    shop.each(&[
        "update season set name = 'changed' where id = 2",
        "update season set high = 30 where id = 1",
        "update season set high = 45 where id = 3",
        "update season set high = null where id = 3; update season set name = 'still open' where id = 3",
        "delete from season where id = 1",
        "insert into season values (4, 10, 12, 'c')",
    ]);
    // A view that needs it does not let it be taken back.
    let (message, ..) = shop.refused("select es_sync.relate('root', 'season', null)");
    assert!(message.contains("cannot follow table public.season"), "{message}");
    for (via, expected) in [
        ("select 1", "uses no column"),
        ("select related.id, 2", "returns 2 columns"),
        ("select related.nothing", "does not exist"),
    ] {
        let (message, ..) = shop.refused(&format!("select es_sync.relate('root', 'season', '{via}')"));
        assert!(message.contains(expected), "{via}: {message}");
    }
    shop.settle();
}

#[test]
fn a_way_declared_later_is_followed_from_then_on_and_what_was_missed_is_mended() {
    let mut shop = Shop::new(PRICES);
    shop.attach();
    let unfollowed = shop.text("select array_to_string(not_followed, ';') from es_sync.status");
    assert!(unfollowed.contains("price_of") && unfollowed.contains("function"), "{unfollowed}");
    shop.run("update price set amount = 100 where id = 1");
    shop.run("select es_sync.relate('root', 'price', 'select related.root_id')");
    shop.settle();
    shop.each(&[
        "update price set amount = 200 where id = 1",
        "update price set root_id = 3 where id = 2; update price set root_id = 2 where id = 3",
    ]);
}

#[test]
fn what_cannot_be_followed_is_listed() {
    let mut shop = Shop::new(&format!(
        "{HOSTS}
        create materialized view ranked as select id, count(*) as rank from root group by id;
        create extension file_fdw; create server files foreign data wrapper file_fdw;
        create table note (root_id int, text text); create table old_note () inherits (note);
        insert into note values (3, 'three'); insert into old_note values (4, 'four');
        create function secret_of(int) returns text stable language sql as 'select secret from public.host where id = $1';
        create function twice(text) returns text immutable language sql as 'select $1 || $1';
        create function above(int, int) returns boolean stable language sql as 'select $1 > $2';
        create operator >>> (function = above, leftarg = int, rightarg = int);
        create function counted(int, int) returns int stable language sql as 'select $1 + $2';
        create function told(int) returns int stable language sql as 'select $1';
        create aggregate total(int) (sfunc = counted, stype = int, finalfunc = told, initcond = '0');"
    ));
    // A file that every server has; what it says stays the same.
    shop.run(
        "do $$ begin execute format('create foreign table abroad (version text) server files options (filename %L)',
             current_setting('data_directory') || '/PG_VERSION'); end $$;
        create or replace view document as
            select r.id, r.title, h.name as host, m.rank, t.typname, n.text as note, o.text as old_note, a.version,
                   now() > '2000-01-01' as later, current_user <> '' as somebody, random() < 2 as chance,
                   public.secret_of(r.host_id) as secret, public.twice(r.title) as twice, r.id >>> 1 as above,
                   (select total(v.id) from (values (r.id)) v (id)) as total,
                   (select count(*) from host s tablesample bernoulli (100) where s.id = r.host_id) as hosts
            from root r left join host h on h.id = r.host_id left join ranked m on m.id = r.id
            left join pg_catalog.pg_type t on t.oid = r.id cross join abroad a
            left join note n on n.root_id = r.id left join only old_note o on o.root_id = r.id",
    );
    shop.attach();
    let (followed, unfollowed) = (
        shop.text("select followed::text from es_sync.status"),
        shop.text("select array_to_string(not_followed, ';') from es_sync.status"),
    );
    assert_eq!(followed, "{host,old_note}");
    let mut listed = [
        "public.ranked: it is a materialized view",
        "pg_catalog.pg_type: it is a system catalog",
        "public.abroad: it is a foreign table",
        "public.note: other tables inherit from it",
        "public.host: which of its rows a sample has depends on where they lie",
        "pg_catalog.now(): its result changes with time",
        "current_user or the like: its result changes with the session",
        "pg_catalog.random(): its result changes without",
        "public.secret_of(integer): tables that a function reads are not known",
        "public.above(integer,integer): tables that a function reads are not known",
        "public.counted(integer,integer): tables that a function reads are not known",
        "public.told(integer): tables that a function reads are not known",
    ];
    listed.sort_unstable();
    for why in listed {
        assert!(unfollowed.contains(why), "{why}: {unfollowed}");
    }
    assert_eq!(unfollowed.split(';').count(), listed.len(), "{unfollowed}");
    // What nobody hears of is mended by a comparison.
    shop.run(
        "insert into old_note values (5, 'five'); insert into note values (6, 'six'); insert into root values (30, 'new');
         refresh materialized view ranked; update host set secret = 'new'",
    );
    expect::settled(&mut shop.client);
    let query = "select id, row_to_json(d) from document d";
    assert!(expect::compare(&mut shop.client, query, &shop.engine, &shop.index).is_err(), "nobody has heard of it");
    shop.run("select es_sync.verify('root', repair => true)");
    shop.settle();
}

#[test]
fn an_update_of_a_column_that_the_view_does_not_use_enqueues_nothing() {
    let mut shop = Shop::new(&format!("alter database shop set client_min_messages = warning; {HOSTS}"));
    shop.run("alter table root add other int; alter table host add more text");
    shop.attach();
    shop.run("select es_sync.pause()");
    wait::until("it is paused", wait::SHORT, || shop.text("select state from es_sync.status") == "paused");
    shop.run("update host set secret = 'changed', more = 'x'; update root set other = 5");
    assert_eq!(shop.count("select count(*) from es_sync.queue"), 0);
    shop.run("update host set name = name || '!' where id = 1");
    assert_eq!(shop.count("select count(*) from es_sync.queue"), 1);
    shop.run("select es_sync.resume()");
    shop.settle();
}

#[test]
fn a_related_row_that_100_000_documents_show_holds_back_no_other_change_and_costs_its_writer_nothing() {
    const BEYOND: std::ops::Range<i32> = 200_000..200_050;
    let mut shop = Shop::new(
        "create table host (id int primary key, name text);
        create table root (id int primary key, title text, host_id int);
        create index on root (host_id);
        create table small (id int primary key, name text);
        create view document as select r.id, r.title, h.name as host from root r join host h on h.id = r.host_id;
        insert into host values (1, 'shown'), (2, 'not shown');
        insert into root select i, 'title', 1 from generate_series(1, 100000) i;
        insert into host select i, 'host' from generate_series(200000, 200049) i;
        insert into root select id, 'title', id from host where id >= 200000;
        insert into small select id from host where id >= 200000",
    );
    shop.attach();
    let (index, small) = (shop.index.clone(), unique("small"));
    shop.run(&format!("select es_sync.attach('small', index => '{small}')"));
    expect::settled(&mut shop.client);

    let mut writer = |id: i32| {
        let started = Instant::now();
        shop.run(&format!("update host set name = 'name ' || clock_timestamp() where id = {id}"));
        started.elapsed()
    };
    let nothing = (0..5).map(|_| writer(2)).min().unwrap_or_default();
    let everything = writer(1);
    assert!(
        everything < nothing * 5 + Duration::from_millis(500),
        "{everything:?}, {nothing:?} where nothing is shown"
    );

    wait::until("the fan-out is under way", wait::SHORT, || shop.count("select count(*) from es_sync.queue") > 10);
    let others = [
        (&index, "update root set title = 'changed' where id = ID", "title"),
        (&index, "update host set name = 'changed' where id = ID", "host"),
        (&small, "update small set name = 'changed' where id = ID", "name"),
    ];
    let started = Instant::now();
    for id in BEYOND {
        for (_, statement, _) in others {
            shop.run(&statement.replace("ID", &id.to_string()));
        }
    }
    for (index, statement, field) in others {
        for id in BEYOND {
            // Read by id, which needs no refresh.
            wait::until("the change has arrived", wait::SHORT, || {
                let source = shop.engine.source(index, &id.to_string());
                source.filter(|source| source.contains(&format!("\"{field}\":\"changed\"")))
            });
        }
        println!("{statement}: 50 had arrived after {:?}", started.elapsed());
    }
    let took = started.elapsed();
    // That the fan-out is still under way shows that nobody waited for its end.
    let left = shop.count("select coalesce(sum(count), 0)::int8 from es_sync.queue");
    println!("{left} of the fan-out were left");
    assert!(left > 0, "others waited for the fan-out, {took:?}");
    shop.settle();
    expect::table_equal(&mut shop.client, "small", "id", &shop.engine, &small);
}

#[test]
fn a_fan_out_survives_the_death_of_its_worker_and_of_the_server() {
    let mut shop = Shop::new(
        "create table host (id int primary key, name text);
        create table root (id int primary key, host_id int);
        create index on root (host_id);
        create view document as select r.id, h.name as host from root r join host h on h.id = r.host_id;
        insert into host values (1, 'one');
        insert into root select i, 1 from generate_series(1, 50000) i;",
    );
    shop.attach();
    for round in 0..3 {
        shop.run(&format!("update host set name = 'round {round}'"));
        wait::until("the fan-out is under way", wait::SHORT, || shop.count("select count(*) from es_sync.queue") > 10);
        if round < 2 {
            let killed = shop.server.kill_worker("shop") as i32;
            shop.reconnect(Some(killed));
        } else {
            shop.server.restart(Mode::Fast);
            shop.reconnect(None);
        }
        shop.settle();
    }
}

#[test]
fn sync_full_mends_a_row_and_every_document_that_shows_it() {
    let mut shop = Shop::new(&format!(
        "{HOSTS}
        create table item (id int primary key, root_id int, name text);
        insert into item values (1, 2, 'a'), (2, 4, 'b');
        create or replace view document as
            select r.id, r.title, h.name as host, (select min(name) from item i where i.root_id = r.id) as item
            from root r left join host h on h.id = r.host_id;"
    ));
    shop.attach();
    let index = unique("hosts");
    shop.run(&format!("select es_sync.attach('host', index => '{index}')"));
    expect::settled(&mut shop.client);
    for document in ["2", "4", "7"] {
        shop.engine.request(
            "PUT",
            &format!("/{}/_doc/{document}?refresh=true", shop.index),
            Some(json!({"broken": true})),
        );
    }
    shop.engine.request("PUT", &format!("/{index}/_doc/1?refresh=true"), Some(json!({"broken": true})));
    let count = shop.count("select es_sync.sync_full('item', 1, 2)");
    assert_eq!(count, 2);
    expect::settled(&mut shop.client);
    let documents = shop.engine.documents(&shop.index);
    assert_eq!((&documents["2"]["item"], &documents["4"]["item"]), (&json!("a"), &json!("b")));
    assert_eq!(documents["7"]["broken"], json!(true), "it shows neither");
    shop.run("select es_sync.sync_full('host', 1)");
    shop.settle();
    let hosts = "select id, row_to_json(h) from host h";
    expect::documents_equal(&mut shop.client, hosts, &shop.engine, &index);
    shop.engine.request("PUT", &format!("/{}/_doc/2?refresh=true", shop.index), Some(json!({"broken": true})));
    shop.run("select es_sync.sync_full('root', 2)");
    shop.settle();
    let (message, ..) = shop.refused("create table alone (id int primary key); select es_sync.sync_full('alone', 1)");
    assert!(message.contains("is not attached"), "{message}");
    shop.run("alter table item drop constraint item_pkey");
    let (message, _, hint) = shop.refused("select es_sync.sync_full('item', 1)");
    assert_eq!(message, "table public.item has no primary key");
    assert!(hint.contains("es_sync.sync()"), "{hint}");
}

#[test]
fn a_filter_on_a_related_column_takes_documents_out_and_back() {
    let mut shop = Shop::new(
        "create table parent (id int primary key, private boolean, name text);
        create table root (id int primary key, parent_id int, deleted_at timestamptz);
        create view everything as
            select r.id, r.deleted_at, p.private, p.name from root r left join parent p on p.id = r.parent_id;
        create view document as select * from everything where private is not true and deleted_at is null;
        insert into parent values (1, false, 'a'), (2, true, 'b');
        insert into root select i, i % 3 from generate_series(1, 30) i;",
    );
    let index = shop.index.clone();
    shop.run(&format!(
        "select es_sync.attach('root', index => '{index}', document => 'everything',
                               filter => 'private is not true and deleted_at is null')"
    ));
    shop.settle();
    shop.each(&[
        "update parent set private = true where id = 1",
        "update parent set private = false",
        "update root set deleted_at = now() where id < 10",
        "update root set deleted_at = null where id < 5",
        "update root set parent_id = 2 where id = 1",
    ]);
    let (message, ..) = shop
        .refused("select es_sync.attach('root', index => 'x', document => 'everything', filter => 'parent_id = 1')");
    assert!(message.contains("parent_id"), "{message}");
}

#[test]
fn truncating_a_related_table_refreshes_all_documents() {
    let mut shop = Shop::new(&format!(
        "{HOSTS} create table city (id int primary key, host_id int, name text);
        create or replace view document as
            select r.id, r.title, h.name as host, c.name as city
            from root r left join host h on h.id = r.host_id left join city c on c.id = r.id;
        alter table root drop constraint root_host_id_fkey;
        insert into city select i, 1, 'city ' || i from generate_series(1, 10) i;"
    ));
    shop.attach();
    shop.each(&["truncate city", "insert into city values (5, 1, 'again')", "truncate host"]);
}

#[test]
fn changes_of_a_related_table_that_were_not_captured_are_repaired() {
    let mut shop = Shop::new(HOSTS);
    shop.attach();
    shop.each(&["set es_sync.capture = off; update host set name = 'quietly'; reset es_sync.capture"]);
    shop.run("alter table host disable trigger all; update host set name = 'switched off'; alter table host enable trigger all");
    wait::until("the repair has ended", wait::LONG, || {
        expect::settled(&mut shop.client);
        let query = "select id, row_to_json(d) from document d";
        expect::compare(&mut shop.client, query, &shop.engine, &shop.index)
    });
}

/// The queue carries no value of more than 1 MB: the documents are compared instead, whether it lies compressed or not.
#[test]
fn a_related_row_that_a_very_long_value_leads_from_has_all_documents_compared() {
    let mut shop = Shop::new(
        "create table host (id int primary key, code text, name text);
         create table root (id int primary key, code text);
         create view document as select r.id, h.name as host from root r left join host h on h.code = r.code;
         insert into host values
             (1, 'short', 'one'), (2, repeat('long', 300000), 'two'),
             (3, (select string_agg(md5(i::text), '') from generate_series(1, 40000) i), 'three'),
             (4, 'unused', 'four');
         insert into root select id, code from host where id < 4;",
    );
    shop.attach();
    let compared = "select count(*) from es_sync.job where kind = 'verify'";
    shop.each(&["update host set name = 'uno' where id = 1"]);
    assert_eq!(shop.count(compared), 0, "the value of this one was noted");
    shop.each(&[
        "update host set name = 'due' where id = 2",
        "update host set name = 'tre' where id = 3",
        "update host set code = 'short' where id = 4; update host set code = 'unused' where id = 1",
        "update host set code = 'left' where id = 2",
        "update root set code = (select code from root where id = 3) where id = 1",
        "delete from host where id = 3",
    ]);
    assert!(shop.count(compared) > 0);
}

#[test]
fn a_partition_with_a_very_long_value_that_leads_from_it_is_loaded_once() {
    let mut shop = Shop::new(
        "create table root (id int primary key, code text);
         create table item (id int, code text, name text) partition by range (id);
         create table item_1 partition of item for values from (0) to (100);
         create view document as
             select r.id, (select string_agg(i.name, ',' order by i.id) from item i where i.code = r.code) as items from root r;
         insert into root values (1, 'short'), (2, repeat('long', 300000));
         insert into item values (1, 'short', 'one')",
    );
    shop.attach();
    shop.each(&[
        "create table item_2 (id int, code text, name text); insert into item_2 select 100 + id, code, 'more' from root;
         alter table item attach partition item_2 for values from (100) to (200)",
    ]);
}

#[test]
fn partitions_of_a_related_table_are_followed() {
    let mut shop = Shop::new(
        "create table root (id int primary key);
        create table item (id int, root_id int, name text) partition by range (id);
        create table item_1 partition of item for values from (0) to (100);
        create view document as
            select r.id, (select string_agg(i.name, ',' order by i.id) from item i where i.root_id = r.id) as items from root r;
        insert into root select generate_series(1, 10);
        insert into item select i, i, 'item ' || i from generate_series(1, 10) i;",
    );
    shop.attach();
    shop.each(&[
        "create table item_2 (name text, root_id int, id int);
         alter table item attach partition item_2 for values from (100) to (200);
         insert into item values (100, 3, 'in the new one')",
        "update item set id = id + 100, name = 'moved' where id = 7",
        "update item_1 set name = 'through the leaf' where id = 5",
        "delete from item_2",
    ]);
}

/// Below a partition, too. What a program prints stands for a table elsewhere.
#[test]
fn a_foreign_partition_of_a_related_table_is_listed_and_what_it_brings_and_takes_along_is_shown() {
    let mut shop = Shop::new(
        "create extension file_fdw; create server elsewhere foreign data wrapper file_fdw;
        create foreign table far (id int, root_id int, name text) server elsewhere
            options (program 'echo 100,3,far', format 'csv');
        create table root (id int primary key);
        create table item (id int, root_id int, name text) partition by range (id);
        create table item_1 partition of item for values from (0) to (100);
        create table item_2 partition of item for values from (100) to (200) partition by range (id);
        create view document as
            select r.id, (select string_agg(i.name, ',' order by i.id) from item i where i.root_id = r.id) as items from root r;
        insert into root select generate_series(1, 10);
        insert into item select i, i, 'item ' || i from generate_series(1, 10) i;",
    );
    let listed = |shop: &mut Shop, expected: &str| {
        wait::until(&format!("not_followed begins with {expected:?}"), wait::SHORT, || {
            let said = shop.text("select array_to_string(not_followed, ';') from es_sync.status");
            let is = if expected.is_empty() { said.is_empty() } else { said.starts_with(expected) };
            if is { Ok(()) } else { Err(said) }
        });
    };
    shop.attach();
    listed(&mut shop, "");
    shop.each(&["alter table item_2 attach partition far for values from (100) to (200)"]);
    listed(&mut shop, "public.far: it is a foreign table");
    shop.each(&["update item set name = 'changed' where id = 5"]);
    shop.run("select es_sync.detach('root')");
    shop.attach();
    listed(&mut shop, "public.far: it is a foreign table");
    shop.each(&["alter table item_2 detach partition far"]);
    listed(&mut shop, "");
}

#[test]
fn two_rows_for_one_key_are_a_dead_letter() {
    let mut shop = Shop::new(
        "create table root (id int primary key);
        create table item (id int primary key, root_id int, name text);
        create view document as select r.id, i.name from root r left join item i on i.root_id = r.id;
        insert into root select generate_series(1, 10);
        insert into item values (1, 1, 'a'), (2, 2, 'b'), (3, 2, 'c');",
    );
    let index = shop.index.clone();
    shop.run(&format!("select es_sync.attach('root', index => '{index}', document => 'document')"));
    expect::settled(&mut shop.client);
    let letter = shop.text("select key || ' ' || kind || ' ' || reason from es_sync.dead_letters");
    assert!(letter.starts_with("2 21000 more than one row"), "{letter}");
    shop.run("delete from item where id = 3");
    shop.settle();
    assert_eq!(shop.count("select count(*) from es_sync.dead_letters"), 0);
}

#[test]
fn a_second_row_for_a_key_that_comes_later_parks_that_key_alone_whatever_is_compared_or_built() {
    let mut shop = Shop::new(
        "create table root (id int primary key);
        create table item (id int primary key, root_id int, name text);
        create view document as select r.id, i.name from root r left join item i on i.root_id = r.id;
        insert into root select generate_series(1, 100);
        insert into item select i, i, 'item ' || i from generate_series(1, 100) i;",
    );
    shop.attach();
    shop.run("insert into item values (1000, 2, 'twice'); update item set name = 'changed' where id in (1, 3)");
    let letters = |shop: &mut Shop| {
        expect::settled(&mut shop.client);
        shop.text("select string_agg(key || ' ' || kind, ', ') from es_sync.dead_letters")
    };
    assert_eq!(letters(&mut shop), "2 21000");
    // It stays as it was, until the index is built anew.
    let others = "select id, row_to_json(d) from document d where id <> 2";
    let stays = format!("{others} union all select 2, '{{\"id\": 2, \"name\": \"item 2\"}}'");
    for (call, expected) in [
        ("select es_sync.verify('root')", stays.as_str()),
        ("select es_sync.verify('root', repair => true)", stays.as_str()),
        ("select es_sync.sync('root', 2)", stays.as_str()),
        ("select es_sync.reindex('root')", others),
        ("select es_sync.verify('root', repair => true)", others),
    ] {
        shop.run(&format!("{call}; update item set name = name || '.' where id = 4"));
        assert_eq!(letters(&mut shop), "2 21000", "{call}");
        expect::documents_equal(&mut shop.client, expected, &shop.engine, &shop.index);
    }
    shop.run("update item set root_id = null where id = 1000");
    shop.settle();
    assert_eq!(letters(&mut shop), "");
}

/// As many kinds of errors as there are authors of functions. A code of somebody's own is shown as an internal error.
#[test]
fn an_error_of_any_kind_in_a_view_parks_that_key_alone_and_keeps_no_load_or_comparison_from_ending() {
    let mut shop = Shop::new(
        "create table root (id int primary key, amount numeric, lang text default 'simple', code text);
         create function checked(code text) returns text language plpgsql as $$
         begin
             if code is not null then raise exception 'no such thing' using errcode = code; end if;
             return code;
         end $$;
         create view document as
             select id, amount::int as amount, to_tsvector(lang::regconfig, 'word')::text as words, checked(code) from root;
         insert into root select i, i from generate_series(1, 500) i;
         update root set amount = 'NaN' where id = 7; update root set lang = 'none' where id = 300;
         update root set code = '45000' where id = 301; update root set code = 'XX000' where id = 500",
    );
    let expected = "300 42704, 301 XX000, 500 XX000, 7 0A000";
    let letters = "select string_agg(key || ' ' || kind, ', ' order by key) from es_sync.dead_letters";
    let others = "select id, row_to_json(d) from document d where id not in (7, 300, 301, 500)";
    shop.run(&format!("select es_sync.attach('root', index => '{}', document => 'document')", shop.index.clone()));
    for call in [
        "update root set amount = -amount",
        "select es_sync.verify('root', repair => true)",
        "select es_sync.reindex('root')",
    ] {
        shop.run(call);
        expect::settled(&mut shop.client);
        assert_eq!(shop.text(letters), expected, "{call}");
        expect::documents_equal(&mut shop.client, others, &shop.engine, &shop.index);
    }
    shop.run("update root set amount = 7, lang = 'simple', code = null where id in (7, 300, 301, 500)");
    shop.settle();
    assert_eq!(shop.text(letters), "");
}

#[test]
fn an_error_in_a_view_parks_that_key_alone_on_both_products() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let mut shop = Shop::on(engine, HOSTS);
        shop.run(
            "alter table root add ratio int not null default 1;
             create or replace view document as
                 select r.id, r.title, h.name as host, 100 / r.ratio as share, (h.name || r.ratio)::text as both
                 from root r left join host h on h.id = r.host_id;
             insert into root select i, 'more', 1 + i % 2, 1 from generate_series(100, 1500) i",
        );
        shop.attach();
        shop.run(
            "insert into root values (2000, 'bad', 1, 0); update root set ratio = 4 where id in (999, 1001);
             update host set name = 'uno' where id = 1",
        );
        expect::settled(&mut shop.client);
        let letters = "select string_agg(key || ' ' || kind || ' ' || reason, ', ') from es_sync.dead_letters";
        assert_eq!(shop.text(letters), "2000 22012 division by zero");
        let others = "select id, row_to_json(d) from document d where id <> 2000";
        expect::documents_equal(&mut shop.client, others, &shop.engine, &shop.index);
        shop.run("update root set ratio = 5 where id = 2000");
        shop.settle();
        assert_eq!(shop.text(letters), "");
    }
}

#[test]
fn a_related_table_locked_by_ddl_keeps_no_other_table_waiting() {
    let mut shop = Shop::new(&format!("{HOSTS} create table other (id int primary key, title text)"));
    shop.attach();
    let other = unique("other");
    shop.run(&format!("insert into other values (1, 'first'); select es_sync.attach('other', index => '{other}')"));
    expect::settled(&mut shop.client);
    let mut ddl = shop.server.connect("shop");
    ddl.batch_execute("begin; lock table host in access exclusive mode").expect("lock");
    shop.run("update root set title = 'waits' where id < 10");
    shop.run("update other set title = 'passes'");
    wait::until("the other table's change has arrived", wait::SHORT, || {
        shop.engine.source(&other, "1").is_some_and(|source| source.contains("passes"))
    });
    wait::until("the status says what is waited for", wait::SHORT, || {
        let cause = shop.text(&format!("select cause from es_sync.status where index = '{}'", shop.index));
        if cause.contains("lock") { Ok(()) } else { Err(cause) }
    });
    assert!(!shop.engine.source(&shop.index, "3").is_some_and(|source| source.contains("waits")));
    ddl.batch_execute("update host set name = 'locked' where id = 2; commit").expect("commit");
    shop.settle();
    expect::table_equal(&mut shop.client, "other", "id", &shop.engine, &other);
}

#[test]
fn a_fan_out_in_pages_reaches_every_document_on_both_products() {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        let mut shop = Shop::on(
            engine,
            "create table host (id int primary key, name text);
            create table root (id int primary key, host_id int);
            create index on root (host_id);
            create view document as select r.id, h.name as host from root r join host h on h.id = r.host_id;
            insert into host values (1, 'one'), (2, 'two');
            insert into root select i, 1 + (i > 9000)::int from generate_series(1, 18500) i;",
        );
        shop.attach();
        // More than are found at once for the first, together with a few; then some on their way turn to another host.
        shop.each(&[
            "update host set name = name || '!'",
            "update host set name = 'uno' where id = 1; update root set host_id = 2 where id % 1000 = 0",
        ]);
    }
}

#[test]
fn detaching_lets_related_tables_go() {
    let mut shop = Shop::new(HOSTS);
    shop.attach();
    let second = unique("second");
    shop.run(&format!("select es_sync.attach('root', index => '{second}', document => 'document')"));
    expect::settled(&mut shop.client);
    let triggers = "select count(*) from pg_trigger where tgname like 'es_sync%'";
    assert_eq!(shop.count(triggers), 4);
    shop.run(&format!("select es_sync.detach('root', index => '{second}')"));
    assert_eq!(shop.count(triggers), 4);
    shop.each(&["update host set name = 'still' where id = 1"]);
    shop.run("select es_sync.detach('root')");
    assert_eq!(shop.count(triggers), 0);
    shop.run("update host set name = 'gone'; drop view document; drop table root, host");
}

#[test]
fn a_reindex_follows_a_view_that_was_replaced() {
    let mut shop = Shop::new(&format!("{HOSTS} create table city (id int primary key, name text)"));
    shop.attach();
    shop.run(
        "create or replace view document as
             select r.id, r.title, h.name as host, c.name as city
             from root r left join host h on h.id = r.host_id left join city c on c.id = r.host_id;
         insert into city values (1, 'Berlin');
         select es_sync.reindex('root')",
    );
    shop.settle();
    shop.each(&["update city set name = 'Bonn'", "insert into city values (2, 'Rom')", "update host set name = 'x'"]);
}

#[test]
fn a_view_that_does_not_fit_is_refused() {
    let mut shop = Shop::new(HOSTS);
    shop.run("create role other; create view no_key as select title from root; create view text_key as select id::text from root;
        create view foreign_owner as select id from root; alter view foreign_owner owner to other");
    for (view, expected) in [
        ("no_key", "has no column \"id\""),
        ("text_key", "has another type"),
        ("foreign_owner", "has another owner"),
        ("host", "is not a view"),
    ] {
        let (message, ..) = shop.refused(&format!("select es_sync.attach('root', index => 'x', document => '{view}')"));
        assert!(message.contains(expected), "{view}: {message}");
    }
    shop.run(
        "grant create on schema public to other; grant usage on schema es_sync to other;
        grant execute on all functions in schema es_sync to other;
        grant select on host to other; set role other;
        create table root2 (id int primary key, host_id int);
        create view document2 as select r.id, h.name from root2 r join host h on h.id = r.host_id",
    );
    let (message, _, hint) = shop.refused("select es_sync.attach('root2', index => 'x', document => 'document2')");
    assert_eq!(message, "permission denied to follow table public.host");
    assert!(hint.contains("GRANT TRIGGER"), "{hint}");
}

/// It runs with the rights of the table's owner, in a read-only transaction: that is a wall around tables only.
#[test]
fn what_a_view_calls_writes_no_row_and_reaches_out_only_where_a_superuser_owns_the_table() {
    let engine = Engine::elasticsearch();
    let server = Server::with(&engine);
    let mut client = server.create_database("app");
    let folder = process::server_folder("outside");
    let file = folder.path().join("made");
    client
        .batch_execute("create role clerk; create table written (id int); grant insert on written to clerk")
        .expect("set up");
    let write = "insert into public.written values (1)".to_owned();
    let reach = format!("copy (select 1) to program 'touch {}'", file.display());
    for (owner, body, told) in [
        ("clerk", &write, Some("read-only transaction")),
        ("postgres", &write, Some("read-only transaction")),
        ("clerk", &reach, Some("pg_execute_server_program")),
        ("postgres", &reach, None),
    ] {
        let name = unique("reaching");
        // A function that says it is immutable may still call one that is not.
        client
            .batch_execute(&format!(
                "create function {name}_does() returns void language plpgsql as $$ begin {body}; end $$;
                 create function {name}_shown(text) returns text language plpgsql immutable as
                     $$ begin perform public.{name}_does(); return $1; end $$;
                 create table {name} (id int primary key, title text);
                 create view {name}_document as select id, {name}_shown(title) as title from {name};
                 alter table {name} owner to {owner}; alter view {name}_document owner to {owner};
                 select es_sync.attach('{name}', document => '{name}_document')"
            ))
            .expect("attach");
        expect::settled(&mut client);
        client.batch_execute(&format!("insert into {name} values (1, 'thing')")).expect("insert");
        if let Some(told) = told {
            let cause = format!("select coalesce(cause, '') from es_sync.status where index = '{name}'");
            wait::until("the status says why it is not read", wait::SHORT, || {
                let cause: String = client.query_one(&cause, &[]).expect("status").get(0);
                if cause.contains(told) { Ok(()) } else { Err(cause) }
            });
            client
                .batch_execute(&format!(
                    "create or replace function {name}_shown(text) returns text language sql immutable as 'select $1'"
                ))
                .expect("mend");
        }
        expect::table_equal(&mut client, &name, "id", &engine, &name);
        assert_eq!(file.exists(), told.is_none(), "{owner}: {body}");
    }
    let written: i64 = client.query_one("select count(*) from written", &[]).expect("written").get(0);
    assert_eq!(written, 0);
}
