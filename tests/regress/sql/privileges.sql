-- Who may do what: nothing of a row or a credential is open to everybody.
create extension pg_es_sync;
\set SHOW_CONTEXT never

-- Everybody may execute the trigger function, because CREATE TABLE ... PARTITION OF asks for it, and nothing else.
select p.proname
from pg_proc p
where p.pronamespace = 'es_sync'::regnamespace and has_function_privilege('public', p.oid, 'execute')
order by 1;

select c.relname
from pg_class c
where c.relnamespace = 'es_sync'::regnamespace and c.relkind in ('r', 'v', 'S')
  and (case when c.relkind = 'S' then has_sequence_privilege('public', c.oid, 'usage, select, update')
       else has_table_privilege('public', c.oid, 'select, insert, update, delete, truncate') end)
order by 1;

create role regress_clerk;
create table mine (id int primary key);
create table theirs (id int primary key);
alter table theirs owner to regress_clerk;
set role regress_clerk;
select * from es_sync.status;
select es_sync.attach('theirs');
reset role;

-- With the rights granted, a role attaches its own tables and nobody else's.
grant usage on schema es_sync to regress_clerk;
grant execute on all functions in schema es_sync to regress_clerk;
set role regress_clerk;
begin;
select es_sync.attach('theirs', index => 'regress-theirs') > 0 as attached;
rollback;
select es_sync.attach('mine');
select es_sync.reindex('mine');
select es_sync.verify('mine');
select es_sync.take_over();
select es_sync.sync('mine', 1);
select es_sync.detach('mine');
select es_sync.sync_where('mine', 'true');
select es_sync.sync_full('mine', 1);
select es_sync.mapping('mine', product => 'elasticsearch');
select es_sync.mapping('theirs', index => 'regress-theirs', product => 'elasticsearch') ->> 'index' as index;
select es_sync.relate('mine', 'theirs', 'select related.id');
-- Whoever declares a way needs to be allowed to put triggers on the related table.
select es_sync.relate('theirs', 'mine', 'select related.id');
select es_sync.pause('mine');
select es_sync.resume('mine');
select es_sync.retry_dead_letters(relation => 'mine');
select es_sync.discard_dead_letters(relation => 'mine');
-- Without arguments they are about his own tables; health is open to whoever may execute it.
select es_sync.pause(), es_sync.resume(), es_sync.retry_dead_letters(), es_sync.discard_dead_letters();
select es_sync.health() ? 'state' as answered;
set es_sync.url = 'http://elsewhere:9200';
set es_sync.password_file = '/etc/shadow';
reset role;

-- Every public object says what it is.
select p.proname
from pg_proc p
where p.pronamespace = 'es_sync'::regnamespace and obj_description(p.oid, 'pg_proc') is null;

-- Every setting has a sentence, and only a superuser may change it.
select name, context, short_desc
from pg_settings
where name like 'es\_sync.%'
order by name;

drop owned by regress_clerk;
drop role regress_clerk;
