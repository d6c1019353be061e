//! What follows in the database from the lease's coming and going: what is remembered, and what is to be repaired.

use pgrx::pg_sys;

use super::lease::Note;
use crate::attachment::{catalog, definition, partitions};
use crate::jobs::{ask, record};
use crate::postgres::process::my_database;
use crate::postgres::spi;
use crate::postgres::transaction::{self, Scope};
use crate::queue::marker;
use crate::shared;

/// Bits of a version below the generation.
pub const GENERATION_SHIFT: u32 = 39;

/// What this database remembers of its lease.
pub fn note() -> Note {
    let rows = spi::run(
        "select l.generation, l.holder, l.standing_off, l.take_over, l.queue_closed, v.last_value
         from es_sync.lease l cross join es_sync.version v",
        &[],
    );
    if rows.is_empty() {
        return Note::default();
    }
    Note {
        generation: rows.get(0, 1).unwrap_or_default(),
        holder: rows.get(0, 2).unwrap_or_default(),
        standing_off: rows.get(0, 3),
        take_over: rows.get(0, 4).unwrap_or_default(),
        queue_closed: rows.get(0, 5),
        version: rows.get(0, 6).unwrap_or_default(),
    }
}

/// True while a dump is being restored here: it brings the attachments before the rows of their tables, and these before
/// the triggers, each in a transaction of its own. It brings neither a generation nor the marker, which the first `attach`
/// writes in the transaction that creates its triggers.
pub fn is_being_restored(note: &Note) -> bool {
    note.generation == 0
        && note.standing_off.is_none()
        && !note.take_over
        && !marker::is_there()
        && (catalog::all().is_empty()
            || !definition::without_trigger().is_empty()
            || !partitions::unwatched().is_empty())
}

/// Writes down that this database holds the lease from now on, and asks for the repairs that this makes necessary.
pub fn take(generation: i64, holder: &str, gap: Option<&str>, taken_over: bool) {
    transaction::set(c"synchronous_commit", c"on", Scope::Local);
    if taken_over {
        // What was copied along belongs to the original: its targets are filled by it.
        record::cancel_all();
    }
    // Versions never run backwards, whatever the engine or the clock said.
    spi::run(
        "select pg_catalog.setval('es_sync.version', $1) from es_sync.version v where v.last_value < $1",
        &[spi::parameter(generation << GENERATION_SHIFT)],
    );
    spi::run(
        "update es_sync.lease l
         set generation = $1, holder = $2, standing_off = null, take_over = false,
             changed_at = pg_catalog.clock_timestamp()",
        &[spi::parameter(generation), spi::parameter(holder)],
    );
    if let Some(gap) = gap {
        repair_everything(gap);
    }
}

/// Nothing is left to be taken over.
pub fn forget_take_over() {
    spi::run("update es_sync.lease l set take_over = false", &[]);
}

/// Writes down that this database stays off until an administrator decides otherwise. What it has in its queue, and
/// all that follows, is covered by the repair that comes with its taking over.
pub fn stand_off(why: &str) {
    transaction::set(c"synchronous_commit", c"on", Scope::Local);
    spi::run(
        "update es_sync.lease l set standing_off = $1, take_over = false, changed_at = pg_catalog.clock_timestamp()",
        &[spi::parameter(why)],
    );
    marker::remove();
}

/// Writes down, until the repair is asked for that this makes necessary, why the queue takes nothing.
pub fn note_queue_closed(why: Option<&str>) {
    transaction::set(c"synchronous_commit", c"on", Scope::Local);
    spi::run("update es_sync.lease l set queue_closed = $1", &[spi::parameter(why)]);
}

/// Changes may have passed the queue by: every index is compared with its table and mended, in the transaction that
/// writes the marker back. Builds that run have read pages whose later changes are lost: they begin again.
pub fn repair_everything(why: &str) {
    let attachments = catalog::all();
    if !attachments.is_empty() {
        pgrx::log!("es_sync repairs all indexes: {why}");
    }
    record::restart(None);
    for attachment in attachments {
        if attachment.live.is_some() {
            ask::for_repair(attachment.id, why);
        } else {
            ask::for_build_of_all_rows(attachment.id);
        }
    }
    partitions::remember(None);
    marker::write();
}

/// As whom this database holds the lease: a nonce of this server's run, and the database.
pub fn holder() -> String {
    format!("{:016x}-{}", shared::server_nonce(), my_database().to_u32())
}

/// Where this database is, for people: host, port, name. Needs a transaction.
pub fn address() -> String {
    let mut host = [0u8; 256];
    // SAFETY: the buffer is as long as is said, and its last byte stays zero.
    unsafe { libc::gethostname(host.as_mut_ptr().cast(), host.len() - 1) };
    let host = host.split(|byte| *byte == 0).next().map(String::from_utf8_lossy).unwrap_or_default();
    let database = spi::run("select pg_catalog.current_database()::text", &[]).get::<String>(0, 1).unwrap_or_default();
    // SAFETY: reads a variable of this process.
    format!("{host}:{}/{database}", unsafe { pg_sys::PostPortNumber })
}
