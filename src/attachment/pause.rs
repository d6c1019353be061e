//! Pausing: nothing is sent to an index, and letting it go on.
//!
//! While all indexes of a table are paused, its changes stay in the queue. While only some are, the queue cannot keep
//! changes for them: they are left behind, and a repair brings them up when they go on.

use pgrx::{PgSqlErrorCode, pg_sys};

use super::catalog::{self, Attachment};
use super::{attach, check, state};
use crate::capture;
use crate::jobs::{ask, record};
use crate::postgres::error::Report;
use crate::postgres::rights::as_extension;
use crate::postgres::spi;

/// Why an index differs from its table after it was left behind.
const LEFT_BEHIND: &str = "it was paused while other indexes of its table went on";

/// Pauses the caller's indexes: all, those of a table, or one.
///
/// # Errors
/// The table or index is not attached, or not the caller's.
pub fn pause(relation: Option<pg_sys::Oid>, index: Option<&str>) -> Result<(), Report> {
    switch(relation, index, true)
}

/// Lets them go on.
///
/// # Errors
/// As `pause`.
pub fn resume(relation: Option<pg_sys::Oid>, index: Option<&str>) -> Result<(), Report> {
    switch(relation, index, false)
}

fn switch(relation: Option<pg_sys::Oid>, index: Option<&str>, paused: bool) -> Result<(), Report> {
    let chosen = chosen(relation, index)?;
    as_extension(|| {
        let mut tables: Vec<pg_sys::Oid> = chosen.iter().map(|known| known.relation).collect();
        tables.sort_unstable_by_key(|table| table.to_u32());
        tables.dedup();
        lock(&tables);
        let ids: Vec<i32> = chosen.iter().map(|known| known.id).collect();
        let rows = spi::run(
            "update es_sync.attachment a set paused = $2 where a.id = any ($1) and a.paused <> $2
             returning a.id, a.stale",
            &[spi::parameter(ids), spi::parameter(paused)],
        );
        let changed: Vec<(i32, Option<String>)> =
            (0..rows.len()).filter_map(|row| Some((rows.get(row, 1)?, rows.get(row, 2)))).collect();
        settle(&tables);
        for (attachment, stale) in changed {
            if let (false, Some(why)) = (paused, stale) {
                ask::for_repair(attachment, &why);
            }
        }
        capture::announce_catalog_change();
    });
    Ok(())
}

/// Notes which paused indexes of these tables are left behind by others. Called whenever an index of theirs is added,
/// paused or resumed.
pub fn settle(tables: &[pg_sys::Oid]) {
    lock(tables);
    for attachment in state::mark_left_behind(tables, LEFT_BEHIND) {
        // What a build has read so far is left behind too: it begins again, when the index goes on.
        record::restart(Some(attachment));
    }
}

/// One after the other: who pauses one index must see whether another is just being resumed.
fn lock(tables: &[pg_sys::Oid]) {
    spi::run(
        "select a.id from es_sync.attachment a where a.relation = any ($1::pg_catalog.oid[]) order by a.id for no key update",
        &[spi::parameter(tables.to_vec())],
    );
}

fn chosen(relation: Option<pg_sys::Oid>, index: Option<&str>) -> Result<Vec<Attachment>, Report> {
    if let Some(relation) = relation {
        check::require_owner(relation)?;
        return as_extension(|| attach::attached(relation, index));
    }
    let all = as_extension(catalog::all);
    let Some(index) = index else {
        return Ok(all.into_iter().filter(|known| check::is_owner(known.relation)).collect());
    };
    let Some(found) = all.into_iter().find(|known| known.index == index) else {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
            format!("no table is attached to index \"{index}\""),
        )
        .hint("The view es_sync.status lists the indexes."));
    };
    check::require_owner(found.relation)?;
    Ok(vec![found])
}
