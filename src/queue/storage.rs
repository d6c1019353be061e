//! The queues as tables: their size, durability and truncation.

use super::table::Queue;
use crate::postgres::spi;
use crate::postgres::transaction;

/// Bytes of a queue's rows on disk, those out of line included: a single long text is. 0 after a truncation, which
/// `pg_table_size` never is, for the index of what is out of line has a page then, too.
pub fn size(queue: Queue) -> u64 {
    let rows = spi::run(
        "select pg_catalog.pg_relation_size(c.oid) + coalesce(pg_catalog.pg_relation_size(c.reltoastrelid), 0)
         from pg_catalog.pg_class c where c.oid = $1::pg_catalog.regclass",
        &[spi::parameter(name(queue))],
    );
    rows.get::<i64>(0, 1).unwrap_or_default().max(0) as u64
}

/// Empties a queue's file if no row is left and it has grown, so that a forgotten idle transaction, whose snapshot keeps
/// dead rows, does not make each poll slower. True if it did. Never waits for a lock.
///
/// # Errors
/// Raises lock_not_available while anybody writes to the queue, and while a transaction is prepared that has; the caller
/// tries again some other time.
pub fn truncate_if_empty(queue: Queue) -> bool {
    let is_empty = || spi::run(&format!("select from {} limit 1", name(queue)), &[]).is_empty();
    if size(queue) <= 1 << 20 || !is_empty() {
        return false;
    }
    lock(queue);
    transaction::new_snapshot();
    // Again, under the lock: a commit may have come between.
    if is_empty() {
        truncate(queue);
        return true;
    }
    false
}

/// Empties a queue, whatever is in it. True if there was anything. Never waits for a lock.
///
/// # Errors
/// As `truncate_if_empty`.
pub fn discard_all(queue: Queue) -> bool {
    if size(queue) == 0 {
        return false;
    }
    lock(queue);
    truncate(queue);
    true
}

fn lock(queue: Queue) {
    spi::run(&format!("lock table {} in access exclusive mode nowait", name(queue)), &[]);
}

fn truncate(queue: Queue) {
    spi::run(&format!("truncate {}", name(queue)), &[]);
}

fn name(queue: Queue) -> String {
    format!("es_sync.{}", queue.name().to_string_lossy())
}

/// True if the queue survives a crash, and if the marker does.
pub fn are_logged() -> (bool, bool) {
    let rows = spi::run(
        "select q.relpersistence = 'p', m.relpersistence = 'p'
         from pg_catalog.pg_class q, pg_catalog.pg_class m
         where q.oid = 'es_sync.queue'::pg_catalog.regclass and m.oid = 'es_sync.marker'::pg_catalog.regclass",
        &[],
    );
    (rows.get::<bool>(0, 1) == Some(true), rows.get::<bool>(0, 2) == Some(true))
}

/// Makes queue and marker, which are logged as `is` says, logged or unlogged as `wanted` says. Rewrites the queue: its
/// rows lie elsewhere afterwards.
///
/// # Errors
/// Raises lock_not_available while somebody holds the queue; the caller tries again some other time.
pub fn set_logged(is: (bool, bool), wanted: (bool, bool)) {
    // Together: a marker that outlives a lost queue would say that nothing was lost.
    for (table, is, wanted) in [("es_sync.queue", is.0, wanted.0), ("es_sync.marker", is.1, wanted.1)] {
        if is != wanted {
            spi::run(&format!("alter table {table} set {}", if wanted { "logged" } else { "unlogged" }), &[]);
        }
    }
}

/// A transaction id that no transaction has reached that has begun to write. It is used up for that: the upper end of
/// a snapshot is only the last id that has ended, and others that run may be above it.
pub fn next_transaction() -> i64 {
    let rows = spi::run("select pg_catalog.pg_current_xact_id()::text::pg_catalog.int8", &[]);
    rows.get(0, 1).unwrap_or_default()
}

/// True if every transaction with a lower id has ended, prepared ones included.
pub fn have_ended(below: i64) -> bool {
    let rows = spi::run(
        "select pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text::pg_catalog.int8 >= $1",
        &[spi::parameter(below)],
    );
    rows.get::<bool>(0, 1) == Some(true)
}
