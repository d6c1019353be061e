-- What is going on: one row per index, per job, per refused document.

create view es_sync.status as
select
    a.relation,
    a.index_name as index,
    case
        when pg_catalog.pg_is_in_recovery() then 'standby'
        when w.pid is null then 'no worker'
        when l.standing_off is not null then 'standing off'
        when a.paused then 'paused'
        when w.trouble is not null then 'waiting'
        when a.live_index is null and j.state in ('failed', 'cancelled') then j.state
        when a.live_index is null then 'loading'
        when a.obstacle is not null then 'stale'
        when j.state in ('queued', 'running') then 'reindexing'
        when s.cause is not null then 'retrying'
        when a.stale is not null or c.inherits then 'stale'
        else 'ok'
    end as state,
    coalesce(
        w.trouble,
        a.obstacle,
        s.cause,
        case when j.state = 'failed' then j.error end,
        a.stale,
        case when c.inherits then 'other tables inherit from ' || a.relation::text || ', whose changes are not noticed' end
    ) as cause,
    coalesce(w.since, s.since) as since,
    s.pending,
    pg_catalog.clock_timestamp() - s.oldest as oldest_age,
    s.indexed,
    s.deleted,
    s.refused,
    s.retried,
    s.batches,
    (select pg_catalog.count(*) from es_sync.dead_letter d where d.attachment = a.id) as dead_letters,
    s.latency_p50_ms,
    s.latency_p95_ms,
    s.latency_p99_ms,
    s.latency_p999_ms,
    w.next_try,
    a.stale,
    a.obstacle,
    a.paused,
    a.live_index,
    a.key_columns,
    a.exclude,
    a.filter,
    a.document,
    (select pg_catalog.array_agg(distinct w.related order by w.related)
     from es_sync.way w where w.attachment = a.id and w.related <> a.relation) as followed,
    a.not_followed,
    a.options,
    a.attached_as,
    case when a.attached_as <> n.name
         then pg_catalog.format('the table was attached as %s; it was renamed, and its index follows it', a.attached_as)
    end as note,
    a.attached_at,
    w.pid as worker_pid
from es_sync.attachment a
cross join lateral es_sync.index_statistics(a.id) s
cross join es_sync.worker_state() w
cross join es_sync.lease l
cross join lateral (
    select exists (
        select from pg_catalog.pg_inherits i
        join pg_catalog.pg_class t on t.oid = i.inhparent and t.relkind = 'r'
        where i.inhparent = a.relation) as inherits
) c
left join lateral (
    select pg_catalog.format('%I.%I', ns.nspname, c.relname) as name
    from pg_catalog.pg_class c join pg_catalog.pg_namespace ns on ns.oid = c.relnamespace
    where c.oid = a.relation
) n on true
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
    j.repair,
    j.orphans_only,
    j.part as partition,
    j.missing,
    j.different,
    j.orphaned,
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
    'API: public. Loads, reindexes, comparisons and drops: how far they are (rows, rows per second, time left) and how they ended.';

create view es_sync.dead_letters as
select
    d.id,
    a.relation,
    a.index_name as index,
    d.key,
    d.document_id,
    d.status,
    d.kind,
    -- It can quote the document: for those who may read the table anyway.
    case when pg_catalog.pg_has_role(c.relowner, 'usage') then d.reason end as reason,
    d.attempts,
    d.first_failed_at,
    d.last_failed_at
from es_sync.dead_letter d
join es_sync.attachment a on a.id = d.attachment
left join pg_catalog.pg_class c on c.oid = a.relation;

comment on view es_sync.dead_letters is
    'API: public. Documents that were refused for good, with the reason; a later success of the document clears it.';

revoke all on all tables in schema es_sync from public;

-- Runs as the extension's owner: whoever may execute it needs no right on the views.
create function es_sync.health()
returns jsonb
language sql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
    select pg_catalog.jsonb_build_object(
        'state', case
            when pg_catalog.pg_is_in_recovery() then 'standby'
            when w.pid is null then 'no worker'
            when l.standing_off is not null then 'standing off'
            when w.trouble is not null then 'waiting'
            else coalesce(worst.state, 'ok')
        end,
        'cause', coalesce(w.trouble, worst.cause),
        'since', coalesce(w.since, worst.since),
        'engine', w.engine,
        'breaker', w.breaker,
        'next_try', w.next_try,
        'worker_pid', w.pid,
        'lease', pg_catalog.jsonb_build_object(
            'generation', l.generation, 'since', l.changed_at, 'standing_off', l.standing_off),
        'indexes', total.indexes,
        'pending', total.pending,
        'oldest_age_s', total.oldest_age_s,
        'latency_p50_ms', w.latency_p50_ms,
        'latency_p99_ms', w.latency_p99_ms,
        'dead_letters', total.dead_letters,
        'jobs', (select pg_catalog.count(*) from es_sync.job j where j.state in ('queued', 'running')),
        'failures', (
            select coalesce(
                pg_catalog.jsonb_agg(
                    pg_catalog.jsonb_build_object('at', f.at, 'index', a.index_name, 'text', f.text) order by f.at desc),
                '[]')
            from es_sync.failures() f
            left join es_sync.attachment a on a.id = f.attachment
        )
    )
    from es_sync.worker_state() w
    cross join es_sync.lease l
    cross join (
        select
            pg_catalog.count(*) as indexes,
            -- Indexes of one table share its changes.
            (select coalesce(pg_catalog.sum(t.pending), 0)::bigint
             from (select pg_catalog.max(s.pending) as pending from es_sync.status s group by s.relation) t) as pending,
            pg_catalog.round(extract(epoch from pg_catalog.max(s.oldest_age)), 3) as oldest_age_s,
            coalesce(pg_catalog.sum(s.dead_letters), 0)::bigint as dead_letters
        from es_sync.status s
    ) total
    left join lateral (
        select s.state, s.cause, s.since
        from es_sync.status s
        order by
            pg_catalog.array_position(
                array['failed', 'retrying', 'stale', 'cancelled', 'loading', 'reindexing', 'paused', 'ok'], s.state),
            s.since
        limit 1
    ) worst on true
$$;

comment on function es_sync.health() is
    'API: public. All of it at a glance: state, cause, engine, lag, dead letters, jobs, the last ten failures.';

revoke execute on function es_sync.health() from public;
