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

use pgrx::PgSqlErrorCode;

use crate::postgres::error::Report;
use crate::shared::{self, Shared};

/// The shared memory.
///
/// # Errors
/// Raises where the library was loaded late: what only a worker can do is refused, while writers' triggers go on.
fn require_preload() -> &'static Shared {
    shared::shared().unwrap_or_else(|| {
        Report::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "pg_es_sync must be loaded via shared_preload_libraries",
        )
        .detail("Its worker and its shared memory are set up when the server starts.")
        .hint("Add pg_es_sync to shared_preload_libraries and restart the server.")
        .raise()
    })
}

/// Refuses a call that writes on a standby or in a read-only transaction, as Postgres refuses its own commands there.
fn primary_only(call: &CStr) {
    // SAFETY: both only read variables of this process, and raise.
    unsafe {
        pg_sys::PreventCommandDuringRecovery(call.as_ptr());
        pg_sys::PreventCommandIfReadOnly(call.as_ptr());
    }
}
