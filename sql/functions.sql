-- What users call. Each function is thin; src/functions/ says what it does.

create function es_sync.capture()
returns trigger
language c
as 'MODULE_PATHNAME', 'es_sync_capture';

comment on function es_sync.capture() is
    'API: private. Trigger function of attached tables; notes the keys of changed rows.';

create function es_sync.rewritten()
returns event_trigger
language c
as 'MODULE_PATHNAME', 'es_sync_rewritten';

comment on function es_sync.rewritten() is
    'API: private. Notes attached tables that ALTER TABLE writes anew, for which no row trigger fires.';

create event trigger es_sync_rewritten on table_rewrite execute function es_sync.rewritten();

-- Whoever alters a table as a replica alters it all the same.
alter event trigger es_sync_rewritten enable always;

create function es_sync.attach(
    relation regclass,
    index text default null,
    document regclass default null,
    filter text default null,
    exclude text[] default '{}',
    options jsonb default '{}'
)
returns bigint
language c volatile
as 'MODULE_PATHNAME', 'attach_wrapper';

comment on function es_sync.attach(regclass, text, regclass, text, text[], jsonb) is
    'API: public. Attaches a table to an index and loads it; returns the job.';

create function es_sync.mapping(
    relation regclass,
    index text default null,
    document regclass default null,
    filter text default null,
    exclude text[] default '{}',
    options jsonb default '{}',
    product text default null
)
returns jsonb
language c volatile
as 'MODULE_PATHNAME', 'mapping_wrapper';

comment on function es_sync.mapping(regclass, text, regclass, text, text[], jsonb, text) is
    'API: public. Settings and mappings of the index that attach would create, with the same arguments.';

create function es_sync.detach(
    relation regclass,
    index text default null,
    drop_index boolean default false
)
returns void
language c volatile
as 'MODULE_PATHNAME', 'detach_wrapper';

comment on function es_sync.detach(regclass, text, boolean) is
    'API: public. Detaches a table from one index or all, and drops the index where asked to.';

create function es_sync.relate(
    relation regclass,
    related regclass,
    via text
)
returns void
language c volatile
as 'MODULE_PATHNAME', 'relate_wrapper';

comment on function es_sync.relate(regclass, regclass, text) is
    'API: public. Declares which documents of a table show a row of another one, where its view does not say so; null takes that back.';

create function es_sync.reindex(
    relation regclass,
    index text default null
)
returns bigint
language c volatile
as 'MODULE_PATHNAME', 'reindex_wrapper';

comment on function es_sync.reindex(regclass, text) is
    'API: public. Builds an index anew beside the live one and swaps it in; returns the job.';

create function es_sync.verify(
    relation regclass,
    index text default null,
    repair boolean default false,
    sample real default 1
)
returns bigint
language c volatile
as 'MODULE_PATHNAME', 'verify_wrapper';

comment on function es_sync.verify(regclass, text, boolean, real) is
    'API: public. Compares an index with its table, document by document, and mends what differs where asked to; returns the job.';

create function es_sync.take_over()
returns void
language c volatile
as 'MODULE_PATHNAME', 'take_over_wrapper';

comment on function es_sync.take_over() is
    'API: public. Lets this database write to its indexes although another one does, which is fenced off.';

create function es_sync.sync(
    relation regclass,
    variadic keys anycompatiblearray
)
returns bigint
language c volatile strict
as 'MODULE_PATHNAME', 'sync_wrapper';

comment on function es_sync.sync(regclass, anycompatiblearray) is
    'API: public. Indexes the rows of these keys that are there and deletes the documents of those that are not.';

create function es_sync.sync_full(
    relation regclass,
    variadic keys anycompatiblearray
)
returns bigint
language c volatile strict
as 'MODULE_PATHNAME', 'sync_full_wrapper';

comment on function es_sync.sync_full(regclass, anycompatiblearray) is
    'API: public. As es_sync.sync(), and every document elsewhere that shows these rows is indexed again, too.';

create function es_sync.sync_where(
    relation regclass,
    condition text
)
returns bigint
language c volatile strict
as 'MODULE_PATHNAME', 'sync_where_wrapper';

comment on function es_sync.sync_where(regclass, text) is
    'API: public. Indexes the rows that match a condition again; returns how many there are.';

create function es_sync.retry_dead_letters(
    ids bigint[] default null,
    relation regclass default null
)
returns bigint
language c volatile
as 'MODULE_PATHNAME', 'retry_dead_letters_wrapper';

comment on function es_sync.retry_dead_letters(bigint[], regclass) is
    'API: public. Sends the rows of dead letters again; a letter goes when its document is taken.';

create function es_sync.discard_dead_letters(
    ids bigint[] default null,
    relation regclass default null
)
returns bigint
language c volatile
as 'MODULE_PATHNAME', 'discard_dead_letters_wrapper';

comment on function es_sync.discard_dead_letters(bigint[], regclass) is
    'API: public. Forgets dead letters; the documents stay as they are.';

create function es_sync.cancel(job bigint)
returns void
language c volatile strict
as 'MODULE_PATHNAME', 'cancel_wrapper';

comment on function es_sync.cancel(bigint) is
    'API: public. Cancels a job that is queued or running; the live index stays as it is.';

create procedure es_sync.watch(job bigint)
language c
as 'MODULE_PATHNAME', 'watch_wrapper';

comment on procedure es_sync.watch(bigint) is
    'API: public. Shows how far a job is, as notices, until it has ended.';

create function es_sync.pause(
    relation regclass default null,
    index text default null
)
returns void
language c volatile
as 'MODULE_PATHNAME', 'pause_wrapper';

comment on function es_sync.pause(regclass, text) is
    'API: public. Sends nothing to an index, all of a table, or all, until es_sync.resume().';

create function es_sync.resume(
    relation regclass default null,
    index text default null
)
returns void
language c volatile
as 'MODULE_PATHNAME', 'resume_wrapper';

comment on function es_sync.resume(regclass, text) is
    'API: public. Lets paused indexes go on.';

create function es_sync.wait(
    relation regclass default null,
    timeout interval default '30 seconds'
)
returns boolean
language c volatile
as 'MODULE_PATHNAME', 'wait_wrapper';

comment on function es_sync.wait(regclass, interval) is
    'API: public. Waits until all that was committed before the call is searchable; false if it took too long.';

create function es_sync.index_statistics(
    attachment integer,
    out pending bigint,
    out oldest timestamptz,
    out indexed bigint,
    out deleted bigint,
    out refused bigint,
    out retried bigint,
    out batches bigint,
    out latency_p50_ms double precision,
    out latency_p95_ms double precision,
    out latency_p99_ms double precision,
    out latency_p999_ms double precision,
    out cause text,
    out since timestamptz
)
returns setof record
language c volatile strict
as 'MODULE_PATHNAME', 'index_statistics_wrapper';

comment on function es_sync.index_statistics(integer) is
    'API: private. Counters of one index, from shared memory; see the view es_sync.status.';

create function es_sync.worker_state(
    out pid integer,
    out trouble text,
    out since timestamptz,
    out engine text,
    out breaker text,
    out next_try timestamptz,
    out latency_p50_ms double precision,
    out latency_p99_ms double precision
)
returns setof record
language c volatile strict
as 'MODULE_PATHNAME', 'worker_state_wrapper';

comment on function es_sync.worker_state() is
    'API: private. The worker of this database, from shared memory; see the view es_sync.status.';

create function es_sync.failures(
    out at timestamptz,
    out attachment integer,
    out text text
)
returns setof record
language c volatile strict
as 'MODULE_PATHNAME', 'failures_wrapper';

comment on function es_sync.failures() is
    'API: private. The last failures of this database, from shared memory; see es_sync.health().';

-- Functions are executable by everybody unless told otherwise. The trigger function must stay so: CREATE TABLE ...
-- PARTITION OF checks the right of whoever creates the partition.
revoke execute on all routines in schema es_sync from public;
grant execute on function es_sync.capture() to public;
