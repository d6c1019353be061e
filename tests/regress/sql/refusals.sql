-- What cannot be attached is refused at once, with an SQLSTATE and a hint, and changes nothing.
create extension pg_es_sync;
\set SHOW_CONTEXT never

create table good (id int primary key, title text);
create table keyless (title text);
create table parent (id int primary key);
create table child () inherits (parent);
create table reserved (id int primary key, _source text);
create table "We?rd" (id int primary key);
create table forced (id int primary key);
alter table forced force row level security;
create view looking as select * from good;
create materialized view stored as select * from good;
create sequence counted;
create function helper(text) returns text language sql immutable as $$ select lower($1) $$;
create function label(text) returns text language sql immutable as $$ select helper($1) $$;
create view unpinned as select id, label(title) as title from good;
create temporary table passing (id int primary key);
create table tree (id int primary key) partition by range (id);
create table leaf partition of tree for values from (0) to (10);

select es_sync.attach(null);
select es_sync.attach('keyless');
select es_sync.attach('looking');
select es_sync.attach('stored');
select es_sync.attach('counted');
select es_sync.attach('good_pkey');
select es_sync.attach('passing');
select es_sync.attach('pg_class');
select es_sync.attach('es_sync.queue');
select es_sync.attach('parent');
select es_sync.attach('forced');
select es_sync.attach('reserved');
select es_sync.attach('"We?rd"');
select es_sync.attach('good', index => 'Upper');
select es_sync.attach('good', index => '_under');
select es_sync.attach('good', index => 'a,b');
select es_sync.attach('good', index => '..');
select es_sync.attach('good', exclude => '{id}');
select es_sync.attach('good', exclude => '{nothing}');
select es_sync.attach('good', filter => 'titel is null');
select es_sync.attach('good', filter => 'title');
select es_sync.attach('good', filter => 'true) or (true');
select es_sync.attach('good', options => '[]');
select es_sync.attach('good', options => '{"mapings": {}}');
select es_sync.attach('good', options => '{"load": "no"}');
select es_sync.attach('good', options => '{"routing": "nothing"}');
select es_sync.attach('good', options => '{"mappings": {"_meta": "v1"}}');
select es_sync.attach('good', options => '{"settings": {"index": 5}}');
select es_sync.attach('good', document => 'stored');
-- The worker would not find it: a function that names another without its schema.
select es_sync.attach('good', document => 'unpinned');
-- A setting that is misspelt.
set es_sync.queue_limt = '1GB';
select es_sync.reindex('good');
select es_sync.verify('good');
select es_sync.verify('good', sample => 0);
select es_sync.verify(null);
select es_sync.detach('good');
select es_sync.sync('good', 1);
select es_sync.wait('good');
select es_sync.sync_where('good', 'true');
select es_sync.pause('good');
select es_sync.resume('good');
select es_sync.pause(index => 'nothing');
select es_sync.retry_dead_letters(relation => 'good');
select es_sync.discard_dead_letters(relation => 'good');
select es_sync.cancel(1);
call es_sync.watch(1);
begin;
call es_sync.watch(1);
rollback;
select es_sync.attach('no_such_table');

begin;
select es_sync.attach('good', index => 'refusals-good');
savepoint s;
select es_sync.attach('tree', index => 'refusals-good');
rollback to s;
select es_sync.attach('tree', index => 'refusals-tree');
select es_sync.attach('leaf', index => 'refusals-leaf');
rollback;

begin;
select es_sync.attach('good', index => 'refusals-good') as job \gset
select es_sync.sync_where('good', 'titel is null');
rollback;
begin;
select es_sync.attach('good', index => 'refusals-good') as job \gset
select es_sync.sync_where('good', 'title');
rollback;
begin;
select es_sync.attach('good', index => 'refusals-good') as job \gset
select es_sync.sync_where('good', 'true) or (true');
rollback;
begin;
select es_sync.attach('good', index => 'refusals-good') as job \gset
select es_sync.pause('good');
select index, paused from es_sync.status;
select es_sync.wait('good');
rollback;
begin read only;
select es_sync.pause();
rollback;

begin;
set local es_sync.url = '';
select es_sync.attach('good');
rollback;
begin;
set local es_sync.url = 'ftp://somewhere';
select es_sync.attach('good');
rollback;
begin;
set local es_sync.url = 'http://user:password@somewhere';
select es_sync.attach('good');
rollback;

-- Nothing is left of any of it.
select count(*) from es_sync.status;
select count(*) from es_sync.jobs;
select count(*) from pg_trigger where tgname like 'es_sync%';
