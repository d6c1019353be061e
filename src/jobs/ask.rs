//! Asking for jobs: their rows in `es_sync.job`, which the worker takes up.

use super::record;
use crate::attachment::catalog::{self, Attachment};
use crate::attachment::state;
use crate::postgres::spi;

/// Asks for a build of an attachment's index, unless one is under way; the job's id. 0 where the attachment is gone.
pub fn for_build(attachment: i32, kind: &str) -> i64 {
    let id = spi::parameter(attachment);
    loop {
        let made = spi::run(
            "insert into es_sync.job (kind, attachment, relation, index_name)
             select $2, a.id, a.relation::text, a.index_name from es_sync.attachment a where a.id = $1
             on conflict (attachment) where kind in ('load', 'reindex') and state in ('queued', 'running') do nothing
             returning id",
            &[id, spi::parameter(kind)],
        );
        if let Some(job) = made.first(1) {
            return job;
        }
        // A statement of its own: the one above may have waited for a job that its snapshot does not have. Where that has
        // ended by now another one is made.
        let known = spi::run(
            "select (select j.id from es_sync.job j
                     where j.attachment = a.id and j.kind in ('load', 'reindex') and j.state in ('queued', 'running'))
             from es_sync.attachment a where a.id = $1",
            &[id],
        );
        match known.first(1) {
            None if !known.is_empty() => {}
            job => return job.unwrap_or_default(),
        }
    }
}

/// Asks for a rebuild that somebody wants: it reads all rows, so a first load that was to read none begins again as one.
pub fn for_rebuild(attachment: &Attachment) -> i64 {
    if attachment.options.load == Some(false) {
        record::restart_load(attachment.id);
        return for_build_of_all_rows(attachment.id);
    }
    for_build(attachment.id, "reindex")
}

/// The same where changes are lost: a build of all rows, whether or not a load was wanted.
pub fn for_build_of_all_rows(attachment: i32) -> i64 {
    record::load_all_rows(attachment);
    for_build(attachment, "reindex")
}

/// Why an index is stale of which some changes asked for the whole table.
pub const NOT_CAPTURED: &str = "changes were not captured one by one";

/// Marks an index as stale and asks for what makes it equal to its table again: a comparison that mends, or a rebuild
/// where the engine does not give documents back as they were sent.
///
/// A build or repair that runs is followed by this one: if it began again, none would ever end where repairs are asked for
/// more often than it takes. What a build has read too early is mended once its index is live; its lane was open before
/// it read, so no change that was captured is missing there.
pub fn for_repair(attachment: i32, why: &str) {
    is_followed(attachment, "j.kind in ('load', 'reindex')");
    state::mark_stale(attachment, why);
    repair(attachment);
}

fn repair(attachment: i32) {
    match catalog::of_id(attachment) {
        Some(known) if known.live.is_none() => {
            for_build_of_all_rows(attachment);
        }
        Some(known) if !known.contents_comparable() || catalog::has_vectors(&known) => {
            for_build(attachment, "reindex");
        }
        _ if is_followed(attachment, "j.kind = 'verify' and j.repair and j.sample >= 1 and not j.orphans_only") => {}
        _ => {
            for_verify(attachment, true, 1.0);
        }
    }
}

/// Has a running job of this kind followed by a repair; false if there is none.
fn is_followed(attachment: i32, kind: &str) -> bool {
    let rows = spi::run(
        &format!(
            "update es_sync.job j set again = 'repair'
             where j.attachment = $1 and j.state = 'running' and {kind}
             returning true"
        ),
        &[spi::parameter(attachment)],
    );
    !rows.is_empty()
}

/// Asks for a comparison; one that is under way begins again, so that it sees what led to this call. The job's id.
pub fn for_verify(attachment: i32, repair: bool, sample: f32) -> i64 {
    comparison(attachment, repair, sample, false)
}

/// Asks for documents to be taken out whose rows went without being noted one by one. Until then the index is stale. A
/// comparison that is under way is followed by it: if that began again, it would never end where partitions are emptied
/// more often than it takes; and one that was to count only would mend.
pub fn for_sweep(attachment: i32) {
    state::mark_partitions(attachment);
    let follows = spi::run(
        "update es_sync.job j set again = coalesce(j.again, 'orphans')
         where j.attachment = $1 and j.kind = 'verify'
           and (j.state = 'running' or (j.state = 'queued' and not j.orphans_only))
         returning j.id",
        &[spi::parameter(attachment)],
    );
    if follows.is_empty() {
        comparison(attachment, true, 1.0, true);
    }
}

/// A build or comparison has ended: what was to follow it is asked for. True if that is a repair: until it has ended the
/// index is stale. Who cancels a job wants no repair to follow, and leaves the index stale.
pub fn for_what_follows(job: i64) -> bool {
    let rows = spi::run(
        "select j.attachment, j.again = 'repair' from es_sync.job j
         where j.id = $1 and (j.again = 'orphans' or (j.again = 'repair' and j.state = 'done'))",
        &[spi::parameter(job)],
    );
    let Some(attachment) = rows.first(1) else { return false };
    let is_repair = rows.get::<bool>(0, 2) == Some(true);
    if is_repair {
        // One that runs beside a build begins again anyhow, with the index that is live now: it is the one that follows.
        record::restart_comparison(attachment);
        state::remain_stale(attachment, NOT_CAPTURED);
        repair(attachment);
    } else {
        comparison(attachment, true, 1.0, true);
    }
    is_repair
}

fn comparison(attachment: i32, repair: bool, sample: f32, orphans_only: bool) -> i64 {
    let rows = spi::run(
        "insert into es_sync.job as j (kind, attachment, relation, index_name, repair, sample, orphans_only)
         select 'verify', a.id, a.relation::text, a.index_name, $2, $3, $4 from es_sync.attachment a where a.id = $1
         on conflict (attachment) where kind = 'verify' and state in ('queued', 'running') do update
         set state = 'queued',
             again = case
                         -- While there is no live index, or another one is built, it may end without looking for them.
                         when (j.orphans_only or j.again = 'orphans') and not excluded.orphans_only and exists (
                             select from es_sync.job b
                             where b.attachment = j.attachment and b.kind in ('load', 'reindex')
                               and b.state in ('queued', 'running')) then 'orphans'
                         -- Else it is what was to follow.
                         when not excluded.repair or excluded.sample < 1
                            or (excluded.orphans_only and j.again = 'repair') then j.again end,
             repair = j.repair or excluded.repair,
             sample = greatest(j.sample, excluded.sample), orphans_only = j.orphans_only and excluded.orphans_only,
             phase = null, target = null, position = null, done = 0, missing = null, different = null, orphaned = null
         returning j.id",
        &[spi::parameter(attachment), spi::parameter(repair), spi::parameter(sample), spi::parameter(orphans_only)],
    );
    rows.first(1).unwrap_or_default()
}
