//! What is known of an attachment's index: which one is live, and whether it differs from its table and why.

use pgrx::pg_sys;

use crate::postgres::spi;
use crate::queue::marker;

/// The queue is closed, or was and its repair has not been asked for yet: then nothing can be said to be equal.
const QUEUE_MISSES_CHANGES: &str = marker::IS_MISSING;

/// Rows that came with a partition are not loaded yet, or documents whose rows went with one not yet taken out. No build
/// need begin again for that: its index gets the same changes, or is looked through when it is live.
const PARTITIONS_UNDER_WAY: &str = "exists (
    select from es_sync.job j
    where j.attachment = a.id and j.state in ('queued', 'running')
      and (j.kind = 'partition' or j.orphans_only or (j.kind = 'verify' and j.again is not null)))";

/// Why an index is stale while that is so.
const PARTITIONS: &str = "rows came or went with a partition";

/// A new index, with the engine's own id, is behind the alias. If its build `is_whole`, whatever was to be mended is
/// mended: what makes an index stale also sends its running build back to the beginning, or has it followed by a repair,
/// which marks the index again.
pub fn set_live(attachment: i32, index: &str, uuid: Option<&str>, is_whole: bool) {
    spi::run(
        &format!(
            "update es_sync.attachment a
         set live_index = $2, live_uuid = $3,
             stale = case when not $4 or a.paused or {QUEUE_MISSES_CHANGES} or not {IS_TAKEN_IN}
                              then a.stale
                          when {PARTITIONS_UNDER_WAY} then '{PARTITIONS}' end
         where a.id = $1"
        ),
        &[spi::parameter(attachment), spi::parameter(index), spi::parameter(uuid), spi::parameter(is_whole)],
    );
}

/// The engine's own id of the live index.
pub fn set_uuid(attachment: i32, uuid: &str) {
    spi::run(
        "update es_sync.attachment a set live_uuid = $2 where a.id = $1",
        &[spi::parameter(attachment), spi::parameter(uuid)],
    );
}

/// Index and table are equal, as far as is known.
pub fn clear_stale(attachment: i32) {
    spi::run(
        &format!(
            "update es_sync.attachment a set stale = case when {PARTITIONS_UNDER_WAY} then '{PARTITIONS}' end
             where a.id = $1 and not ({QUEUE_MISSES_CHANGES}) and {IS_TAKEN_IN}"
        ),
        &[spi::parameter(attachment)],
    );
}

/// Rows came or went with a partition: the index differs from its table until the jobs that see to it have ended.
pub fn mark_partitions(attachment: i32) {
    spi::run(
        "update es_sync.attachment a set stale = $2 where a.id = $1 and a.stale is null",
        &[spi::parameter(attachment), spi::parameter(PARTITIONS)],
    );
}

/// One of those jobs has ended. Whatever else makes the index stale is not its business.
pub fn settle_partitions(attachment: i32) {
    spi::run(
        &format!(
            "update es_sync.attachment a set stale = null
             where a.id = $1 and a.stale = $2 and not {PARTITIONS_UNDER_WAY} and not ({QUEUE_MISSES_CHANGES})"
        ),
        &[spi::parameter(attachment), spi::parameter(PARTITIONS)],
    );
}

/// An index is known to differ from its table until its repair has ended.
pub fn mark_stale(attachment: i32, why: &str) {
    spi::run(
        &format!("update es_sync.attachment a set stale = $2 where a.id = $1 and {IS_TAKEN_IN}"),
        &[spi::parameter(attachment), spi::parameter(why)],
    );
}

/// A repair follows what has just ended: whatever that has mended, the index is stale until the repair has ended, too.
pub fn remain_stale(attachment: i32, why: &str) {
    spi::run(
        "update es_sync.attachment a set stale = $2 where a.id = $1 and (a.stale is null or a.stale = $3)",
        &[spi::parameter(attachment), spi::parameter(why), spi::parameter(PARTITIONS)],
    );
}

/// What begins to tell why an index is stale whose definitions have changed and cannot be taken in yet.
const NOT_TAKEN_IN: &str = "not taken in yet: ";
/// Where it does not. While it does, no job that ends has mended what is missed until then, and nothing else that is wrong
/// with the index takes its place: who takes the definitions in must see it.
const IS_TAKEN_IN: &str = "(pg_catalog.starts_with(a.stale, 'not taken in yet: ') is not true)";

/// An index is known to differ from its table, or may, until its definitions can be taken in.
pub fn mark_not_taken_in(attachment: i32, why: &str) {
    spi::run(
        "update es_sync.attachment a set stale = $2 where a.id = $1",
        &[spi::parameter(attachment), spi::parameter(format!("{NOT_TAKEN_IN}{why}"))],
    );
}

/// They are taken in: what it has missed until now is for a repair.
pub fn mark_taken_in(attachment: i32) {
    spi::run(
        &format!("update es_sync.attachment a set stale = null where a.id = $1 and not {IS_TAKEN_IN}"),
        &[spi::parameter(attachment)],
    );
}

/// True while an index is marked so, for a reason that begins so.
pub fn is_not_taken_in(attachment: i32, why: &str) -> bool {
    let rows = spi::run(
        "select from es_sync.attachment a where a.id = $1 and pg_catalog.starts_with(a.stale, $2)",
        &[spi::parameter(attachment), spi::parameter(format!("{NOT_TAKEN_IN}{why}"))],
    );
    !rows.is_empty()
}

/// Tables go on without their indexes following.
pub fn mark_all_stale(why: &str) {
    spi::run(&format!("update es_sync.attachment a set stale = $1 where {IS_TAKEN_IN}"), &[spi::parameter(why)]);
}

/// So do these tables without those of their indexes that are paused, while others go on. Which those are.
pub fn mark_left_behind(tables: &[pg_sys::Oid], why: &str) -> Vec<i32> {
    let rows = spi::run(
        &format!(
            "update es_sync.attachment a set stale = case when {IS_TAKEN_IN} then $2 else a.stale end
             where a.relation = any ($1::pg_catalog.oid[]) and a.paused
               and exists (select from es_sync.attachment b where b.relation = a.relation and not b.paused)
             returning a.id"
        ),
        &[spi::parameter(tables.to_vec()), spi::parameter(why)],
    );
    (0..rows.len()).filter_map(|row| rows.get(row, 1)).collect()
}

/// The index behind the alias has vanished: until another is built there is none.
pub fn forget_live(attachment: i32) {
    spi::run(
        "update es_sync.attachment a set live_index = null, live_uuid = null where a.id = $1",
        &[spi::parameter(attachment)],
    );
}
