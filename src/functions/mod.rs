//! What users call from SQL: thin, one file per family. Their signatures are in sql/functions.sql.
//! Runs in: users' backends.
//! May touch: schema es_sync through `attachment`, the pending set through `capture`, shared memory. No network.

use std::ffi::CStr;

use pgrx::pg_sys;

mod attach;
mod dead_letters;
mod install;
mod jobs;
mod pause;
mod status;
mod sync;
mod wait;

/// Refuses a call that writes on a standby or in a read-only transaction, as Postgres refuses its own commands there.
fn primary_only(call: &CStr) {
    // SAFETY: both only read variables of this process, and raise.
    unsafe {
        pg_sys::PreventCommandDuringRecovery(call.as_ptr());
        pg_sys::PreventCommandIfReadOnly(call.as_ptr());
    }
}
