//! DROP EXTENSION locks the queue before it locks the tables whose triggers it drops; a writer has its table locked and
//! comes to the queue at its commit. So that they cannot deadlock, the tables are locked first; and before them whoever
//! attaches is waited for, who has locked tables of ours and comes to the users' after that.

use pgrx::{PgSqlErrorCode, pg_sys};

use crate::attachment::check::owns_extension;
use crate::attachment::triggers;
use crate::postgres::error::Report;
use crate::postgres::rights::as_extension;
use crate::postgres::spi;

const MODE: pg_sys::LOCKMODE = pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE;
/// How often all tables are tried. Each time a writer is waited for that had one of them.
const ROUNDS: usize = 100;

/// Returns with every table locked that has a trigger of ours; at once, and false, where there is no extension or the
/// user may not drop it.
///
/// While it waits for one table it holds no other of the users': a writer that uses several of them in whatever order cannot
/// deadlock with it.
pub fn let_writers_finish() -> bool {
    if !owns_extension() {
        return false;
    }
    triggers::wait_for_turn();
    let mut awaited = None;
    for _ in 0..ROUNDS {
        if let Some(table) = awaited {
            // SAFETY: waits as LOCK TABLE does: it can be cancelled, and lock_timeout counts.
            unsafe { pg_sys::LockRelationOid(table, MODE) };
        }
        let busy = lock_without_waiting(&tables());
        if let Some(table) = awaited.take()
            && busy.is_some()
        {
            // SAFETY: locked above.
            unsafe { pg_sys::UnlockRelationOid(table, MODE) };
        }
        match busy {
            None => return true,
            Some(table) => awaited = Some(table),
        }
    }
    Report::new(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE, "could not lock all attached tables at the same time")
        .detail("Their triggers can only be dropped while nobody writes to any of them.")
        .hint("Try again when there are fewer writers, or detach the tables one by one first.")
        .raise()
}

/// Locks all or none of them; the first that somebody uses.
fn lock_without_waiting(tables: &[pg_sys::Oid]) -> Option<pg_sys::Oid> {
    for (count, table) in tables.iter().enumerate() {
        // SAFETY: heavyweight locks by OID, given back here or by the transaction's end.
        unsafe {
            if !pg_sys::ConditionalLockRelationOid(*table, MODE) {
                for locked in &tables[..count] {
                    pg_sys::UnlockRelationOid(*locked, MODE);
                }
                return Some(*table);
            }
        }
    }
    None
}

/// Attached tables and their partitions.
fn tables() -> Vec<pg_sys::Oid> {
    as_extension(|| {
        let rows = spi::run(
            "select distinct t.tgrelid
             from pg_catalog.pg_trigger t
             join pg_catalog.pg_proc p on p.oid = t.tgfoid
             join pg_catalog.pg_namespace n on n.oid = p.pronamespace
             where n.nspname = 'es_sync' and p.proname = 'capture'
             order by 1",
            &[],
        );
        (0..rows.len()).filter_map(|row| rows.get(row, 1)).collect()
    })
}
