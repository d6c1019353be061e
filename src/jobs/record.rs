//! The rows of `es_sync.job`.

use pgrx::pg_sys;

use crate::postgres::spi;

/// A job that is queued or running.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub id: i64,
    pub kind: String,
    pub attachment: Option<i32>,
    /// Set once the job has begun to fill it; of a queued build, what it had begun to fill.
    pub target: Option<String>,
    pub position: Option<String>,
    pub done: i64,
    pub phase: Option<String>,
    pub state: String,
    /// Of a verify: what was asked for, and what it has found so far.
    pub extent: Extent,
    pub counts: Counts,
    /// Of a partition's load: the partition.
    pub part: Option<pg_sys::Oid>,
}

/// What a comparison is to do.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Extent {
    /// Mend what differs.
    pub repair: bool,
    /// Which share of the keys it looks at, 0 to 1.
    pub sample: f32,
    /// Rows went without being noted: only documents without one are looked for.
    pub orphans_only: bool,
}

/// What a comparison found.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counts {
    pub missing: i64,
    pub different: i64,
    pub orphaned: i64,
}

/// Jobs that are queued or running, oldest first.
pub fn open_jobs() -> Vec<Job> {
    let rows = spi::run(
        "select j.id, j.kind, j.attachment, j.target, j.position, j.done, j.phase, j.state,
                j.repair, j.sample, j.missing, j.different, j.orphaned, j.orphans_only, j.part::oid
         from es_sync.job j where j.state in ('queued', 'running') order by j.id",
        &[],
    );
    (0..rows.len())
        .filter_map(|row| {
            Some(Job {
                id: rows.get(row, 1)?,
                kind: rows.get(row, 2)?,
                attachment: rows.get(row, 3),
                target: rows.get(row, 4),
                position: rows.get(row, 5),
                done: rows.get(row, 6)?,
                phase: rows.get(row, 7),
                state: rows.get(row, 8)?,
                extent: Extent {
                    repair: rows.get(row, 9)?,
                    sample: rows.get(row, 10)?,
                    orphans_only: rows.get(row, 14)?,
                },
                counts: Counts {
                    missing: rows.get(row, 11).unwrap_or_default(),
                    different: rows.get(row, 12).unwrap_or_default(),
                    orphaned: rows.get(row, 13).unwrap_or_default(),
                },
                part: rows.get(row, 15),
            })
        })
        .collect()
}

/// The name of the next concrete index of an attachment: its alias, a hyphen, a number. No number is used again, by a
/// later attachment of that name neither: a request for the former one's index may still be under way.
pub fn next_target(attachment: i32) -> Option<String> {
    let rows = spi::run(
        "insert into es_sync.build_number as n (index_name, last)
         select a.index_name, 1 from es_sync.attachment a where a.id = $1
         on conflict (index_name) do update set last = n.last + 1
         returning n.index_name || '-' || n.last",
        &[spi::parameter(attachment)],
    );
    rows.first(1)
}

/// A build begins, or begins again, to fill a new target. From then on it is a first load only if `first`. One that reads all
/// rows need not be followed by a repair for what happened before; a first load may have none to read.
pub fn begin(job: i64, target: &str, total: Option<i64>, first: bool) {
    spi::run(
        "update es_sync.job j
         set state = 'running', phase = 'create', target = $2, position = null, done = 0, total = $3,
             again = case when $4 then j.again end,
             kind = case when $4 then j.kind else 'reindex' end,
             error = null, started_at = coalesce(j.started_at, pg_catalog.clock_timestamp())
         where j.id = $1 and j.state in ('queued', 'running')",
        &[spi::parameter(job), spi::parameter(target), spi::parameter(total), spi::parameter(first)],
    );
}

/// A first load that has not begun is to read all rows, whether or not a load was wanted.
pub fn load_all_rows(attachment: i32) {
    spi::run(
        "update es_sync.job j set kind = 'reindex'
         where j.attachment = $1 and j.kind = 'load' and j.state = 'queued'",
        &[spi::parameter(attachment)],
    );
}

/// Another job begins, or goes on where it was. False if somebody has sent it back to its beginning since that was read,
/// asked for another `comparison`, or cancelled it: then nothing is written.
pub fn resume(
    job: i64,
    target: Option<&str>,
    total: Option<i64>,
    position: Option<&str>,
    done: i64,
    comparison: Option<Extent>,
) -> bool {
    let Extent { repair, sample, orphans_only } = comparison.unwrap_or_default();
    let rows = spi::run(
        "update es_sync.job j
         set state = 'running', phase = 'rows', target = $2, total = $3, position = $4, done = $5,
             error = null, started_at = coalesce(j.started_at, pg_catalog.clock_timestamp())
         where j.id = $1
           and (j.state = 'running' or (j.state = 'queued' and j.position is not distinct from $4))
           and (j.kind <> 'verify' or (j.repair = $6 and j.sample = $7 and j.orphans_only = $8))
         returning true",
        &[
            spi::parameter(job),
            spi::parameter(target),
            spi::parameter(total),
            spi::parameter(position),
            spi::parameter(done),
            spi::parameter(repair),
            spi::parameter(sample),
            spi::parameter(orphans_only),
        ],
    );
    !rows.is_empty()
}

/// An UPDATE of job $1 while it is in one of these states. A note of how far it is must not wait for somebody who cancels it
/// and does not commit: the next one will do.
fn note(set: &str, states: &str) -> String {
    format!(
        "update es_sync.job j set {set}
         where j.id = (select x.id from es_sync.job x
                       where x.id = $1 and x.state in ({states})
                       for no key update skip locked)"
    )
}

/// The job has come so far. One that somebody has sent back to its beginning stays there.
pub fn progress(job: i64, phase: &str, position: Option<&str>, done: i64) {
    spi::run(
        &note("phase = $2, position = $3, done = $4", "'running'"),
        &[spi::parameter(job), spi::parameter(phase), spi::parameter(position), spi::parameter(done)],
    );
}

/// What a comparison has found so far.
pub fn counts(job: i64, counts: &Counts) {
    spi::run(
        &note("missing = $2, different = $3, orphaned = $4", "'running', 'done'"),
        &[
            spi::parameter(job),
            spi::parameter(counts.missing),
            spi::parameter(counts.different),
            spi::parameter(counts.orphaned),
        ],
    );
}

/// Why the job does not go on for the moment; None when it does.
pub fn trouble(job: i64, error: Option<&str>) {
    spi::run(&note("error = $2", "'queued', 'running'"), &[spi::parameter(job), spi::parameter(error)]);
}

/// The job has ended. One that was cancelled meanwhile stays so, unless it was done all the same.
pub fn finish(job: i64, state: &str, done: i64, error: Option<&str>) {
    spi::run(
        "update es_sync.job j
         set state = $2, phase = null, done = $3, total = case when $2 = 'done' then $3 else j.total end, error = $4,
             finished_at = pg_catalog.clock_timestamp()
         where j.id = $1 and (j.state in ('queued', 'running') or $2 = 'done')",
        &[spi::parameter(job), spi::parameter(state), spi::parameter(done), spi::parameter(error)],
    );
}

/// A build that has filled `target` is done, although it may have been cancelled meanwhile: then with false. None if
/// somebody has sent it back to its beginning.
pub fn finish_build(job: i64, target: &str, done: i64) -> Option<bool> {
    let rows = spi::run(
        "update es_sync.job j
         set state = 'done', phase = null, done = $3, total = $3, error = null,
             finished_at = pg_catalog.clock_timestamp()
         from (select x.state from es_sync.job x where x.id = $1 for no key update) former
         where j.id = $1 and j.target = $2 and former.state <> 'queued'
         returning former.state = 'running'",
        &[spi::parameter(job), spi::parameter(target), spi::parameter(done)],
    );
    rows.first(1)
}

/// A running job is done; false if it was cancelled, or sent back to its beginning meanwhile.
pub fn finish_running(job: i64, done: i64) -> bool {
    let rows = spi::run(
        "update es_sync.job j
         set state = 'done', finished_at = pg_catalog.clock_timestamp(),
             phase = null, position = null, done = $2, total = $2, error = null
         where j.id = $1 and j.state = 'running'
         returning true",
        &[spi::parameter(job), spi::parameter(done)],
    );
    !rows.is_empty()
}

/// Sends running builds and comparisons of the given attachments (None: of all) back to their beginning, because what
/// they have read is not to be relied on: after TRUNCATE, DDL, partitions, a pause, a lost queue and the like. A build
/// reads all rows then: what was delivered to its former target is there no more, whether or not a load was wanted.
/// That target stays in the row, to be dropped; but not one that may be behind the alias any moment, which the next
/// swap drops.
pub fn restart(attachment: Option<i32>) {
    restart_where("j.kind <> 'drop'", attachment);
}

/// The same for an attachment's comparison alone.
pub fn restart_comparison(attachment: i32) {
    restart_where("j.kind = 'verify'", Some(attachment));
}

/// The same for an attachment's first load alone.
pub fn restart_load(attachment: i32) {
    restart_where("j.kind = 'load'", Some(attachment));
}

/// The same for one build that has lost its target. In its phase `create` it is at its beginning.
pub fn restart_build(job: i64) {
    restart_where(&format!("j.id = {job} and j.phase is distinct from 'create'"), None);
}

fn restart_where(condition: &str, attachment: Option<i32>) {
    spi::run(
        &format!(
            "update es_sync.job j
             set state = 'queued', phase = null, position = null, done = 0,
                 missing = null, different = null, orphaned = null,
                 target = case when j.kind in ('load', 'reindex') and j.phase is distinct from 'swap' then j.target end,
                 kind = case j.kind when 'load' then 'reindex' else j.kind end
             where j.state = 'running' and ($1 is null or j.attachment = $1) and {condition}"
        ),
        &[spi::parameter(attachment)],
    );
}

/// Ends every open job unfinished.
pub fn cancel_all() {
    spi::run(
        "update es_sync.job j
         set state = 'cancelled', phase = null, finished_at = pg_catalog.clock_timestamp()
         where j.state in ('queued', 'running')",
        &[],
    );
}

/// A job that somebody asks about.
pub struct Asked {
    /// Its table; None where that is gone.
    pub relation: Option<pg_sys::Oid>,
    /// Its table's name when it was made.
    pub name: String,
    pub state: String,
}

/// A job in whatever state; None if there is none.
pub fn find(job: i64) -> Option<Asked> {
    let rows = spi::run(
        "select c.oid, j.relation, j.state
         from es_sync.job j
         left join es_sync.attachment a on a.id = j.attachment
         left join pg_catalog.pg_class c on c.oid = coalesce(a.relation, j.detached)
         where j.id = $1",
        &[spi::parameter(job)],
    );
    (!rows.is_empty())
        .then(|| Some(Asked { relation: rows.get(0, 1), name: rows.get(0, 2)?, state: rows.get(0, 3)? }))
        .flatten()
}

/// Cancels a job; false if it has ended already.
pub fn cancel(job: i64) -> bool {
    let rows = spi::run(
        "update es_sync.job j
         set state = 'cancelled', phase = null, error = null, finished_at = pg_catalog.clock_timestamp()
         where j.id = $1 and j.state in ('queued', 'running')
         returning j.id",
        &[spi::parameter(job)],
    );
    !rows.is_empty()
}

/// How far a job is, in a line; true with it if it has ended. None if there is no such job.
pub fn describe(job: i64) -> Option<(String, bool)> {
    let rows = spi::run(
        "select case
                when j.state = 'queued' and a.paused then 'waits: the index is paused'
                when j.state = 'queued' then 'waits'
                when j.state = 'running' then pg_catalog.concat(
                    coalesce(j.phase, 'begins'), ': ', j.done, coalesce(' of about ' || j.total, ''), ' rows', ', ' || j.rate || ' rows/s', ', ' || pg_catalog.date_trunc('second', j.eta) || ' left',
                    '; ' || j.error, case when a.paused then '; the index is paused' end)
                when j.state = 'done' then pg_catalog.concat(
                    'done', ', ' || j.done || ' rows in ' || pg_catalog.date_trunc('second', j.finished_at - j.started_at),
                    ', ' || j.missing || ' missing', ', ' || j.different || ' different', ', ' || j.orphaned || ' orphaned',
                    '; ' || j.error)
                else pg_catalog.concat(j.state, ': ' || j.error)
                end,
                j.state not in ('queued', 'running')
         from es_sync.jobs j
         join es_sync.job own on own.id = j.id
         left join es_sync.attachment a on a.id = own.attachment
         where j.id = $1",
        &[spi::parameter(job)],
    );
    Some((rows.first(1)?, rows.first(2)?))
}
