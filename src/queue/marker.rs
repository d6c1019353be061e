//! The marker, a row in a table of its own that is lost with the queue: where it is missing, the queue does not hold every
//! change.

use pgrx::pg_sys;

use crate::postgres::spi;

/// True in SQL where it was removed or lost; which timeline it was written on does not count.
pub const IS_MISSING: &str = "not exists (select from es_sync.marker)";

/// True if the queue holds every change since the marker was written: a crash or a promotion empties an unlogged
/// queue and its marker with it; a promotion or a recovery to some point leaves a logged one behind the time.
pub fn is_there() -> bool {
    !spi::run("select from es_sync.marker m where m.timeline = $1", &[spi::parameter(timeline())]).is_empty()
}

fn timeline() -> i64 {
    // SAFETY: reads a variable in shared memory; the server is not in recovery where a worker runs.
    i64::from(unsafe { pg_sys::GetWALInsertionTimeLine() })
}

/// Writes the marker, in the transaction that asked for everything to be repaired.
pub fn write() {
    spi::run(
        "insert into es_sync.marker as m (timeline) values ($1)
         on conflict (only_one) do update set timeline = excluded.timeline, written_at = excluded.written_at",
        &[spi::parameter(timeline())],
    );
}

/// Removes the marker: from here on the queue is not trusted to hold every change.
pub fn remove() {
    spi::run("delete from es_sync.marker", &[]);
}
