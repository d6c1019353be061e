//! DROP DATABASE, CREATE DATABASE ... TEMPLATE, ALTER DATABASE ... RENAME TO and SET TABLESPACE want a database without
//! connections: its worker stops for them, and the launcher starts none until they are over. For DROP EXTENSION too.
//!
//! The hold is noted in shared memory under this process's id and ends with the transaction, however that ends: the
//! locks that keep a new worker waiting last as long. A hold whose process is gone does not count.

use std::cell::Cell;
use std::time::{Duration, Instant};

use pgrx::pg_sys;

use crate::postgres::{latch, process};
use crate::shared;

/// How long the worker is waited for; then the statement runs and says itself who is in its way.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the worker's end is looked for: nobody is told of it.
const LOOK_EVERY: Duration = Duration::from_millis(5);

thread_local! {
    static LISTENING: Cell<bool> = const { Cell::new(false) };
    static HOLDING: Cell<bool> = const { Cell::new(false) };
}

/// Returns when no worker is left in the database, or after `PATIENCE`.
pub fn until_the_transaction_ends(database: pg_sys::Oid) {
    let Some(shared) = shared::shared() else { return };
    if !LISTENING.replace(true) {
        // SAFETY: once per backend; the library is never unloaded.
        unsafe { pg_sys::RegisterXactCallback(Some(on_transaction), std::ptr::null_mut()) };
    }
    HOLDING.set(true);
    // Where all places are taken the statement goes on all the same: at worst Postgres refuses it.
    shared.holds.take(database.to_u32(), process::my_id(), process::is_alive);
    let Some(entry) = shared.database(database) else { return };
    let Some(worker) = entry.worker_pid() else { return };
    // SAFETY: a signal to a process of this server, of the same user; the worker takes its pid back before it ends.
    unsafe { libc::kill(worker, libc::SIGTERM) };
    let start = Instant::now();
    // It has given up its place before its connection to the database is gone, and Postgres counts connections.
    while (entry.worker_pid() == Some(worker) || process::is_alive(worker)) && start.elapsed() < PATIENCE {
        latch::wait_my_latch(LOOK_EVERY);
    }
}

/// Nothing here may raise: it also runs after the commit record is written, and while the process ends.
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn on_transaction(event: pg_sys::XactEvent::Type, _argument: *mut std::ffi::c_void) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PREPARE};
    if matches!(event, XACT_EVENT_COMMIT | XACT_EVENT_ABORT | XACT_EVENT_PREPARE)
        && HOLDING.replace(false)
        && let Some(shared) = shared::shared()
    {
        shared.holds.release(process::my_id());
        shared.nudge_launcher();
    }
}
