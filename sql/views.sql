-- What is going on: one row per index, per job, per refused document.

create view es_sync.status as
select
    a.relation,
    a.index_name as index,
    case
        when w.pid is null then 'no worker'
        when w.trouble is not null then 'waiting'
        when j.state = 'failed' and a.live_index is null then 'failed'
        when a.live_index is null then 'loading'
        when j.state in ('queued', 'running') then 'reindexing'
        when s.cause is not null then 'retrying'
        else 'ok'
    end as state,
    coalesce(w.trouble, s.cause, case when j.state = 'failed' then j.error end) as cause,
    s.since,
    s.pending,
    s.oldest,
    s.indexed,
    s.deleted,
    s.refused,
    s.retried,
    s.batches,
    (select pg_catalog.count(*) from es_sync.dead_letter d where d.attachment = a.id) as dead_letters,
    s.latency_p50_ms,
    s.latency_p99_ms,
    a.live_index,
    a.key_columns,
    a.exclude,
    a.filter,
    a.options,
    a.attached_at,
    w.pid as worker_pid
from es_sync.attachment a
cross join lateral es_sync.index_statistics(a.id) s
cross join es_sync.worker_state() w
left join lateral (
    select x.state, x.error
    from es_sync.job x
    where x.attachment = a.id and x.kind in ('load', 'reindex')
    order by x.id desc
    limit 1
) j on true;

comment on view es_sync.status is
    'API: public. Each attached index: state, cause, what is pending, what was done, how fast.';

create view es_sync.jobs as
select
    j.id,
    j.kind,
    j.relation,
    j.index_name as index,
    j.state,
    j.phase,
    j.done,
    j.total,
    r.rate,
    case
        when j.state = 'running' and r.rate > 0 and j.total > j.done
        then pg_catalog.make_interval(secs => (j.total - j.done) / r.rate)
    end as eta,
    j.error,
    j.target,
    j.created_at,
    j.started_at,
    j.finished_at
from es_sync.job j
cross join lateral (
    select pg_catalog.round((j.done / nullif(
        extract(epoch from coalesce(j.finished_at, pg_catalog.clock_timestamp()) - j.started_at), 0))::numeric, 1) as rate
) r;

comment on view es_sync.jobs is
    'API: public. Loads, reindexes and drops: how far they are (rows, rows per second, time left) and how they ended.';

create view es_sync.dead_letters as
select
    d.id,
    a.relation,
    a.index_name as index,
    d.key,
    d.document_id,
    d.status,
    d.kind,
    d.reason,
    d.attempts,
    d.first_failed_at,
    d.last_failed_at
from es_sync.dead_letter d
join es_sync.attachment a on a.id = d.attachment;

comment on view es_sync.dead_letters is
    'API: public. Documents that were refused for good, with the reason; a later success of the document clears it.';

-- A reason can quote the document.
revoke all on all tables in schema es_sync from public;
