//! A time limit for what a worker runs for somebody else: it has other tables to serve.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use pgrx::{PgSqlErrorCode, PgTryBuilder, pg_sys};

use super::error::Report;
use crate::settings;

/// Postgres' STATEMENT_TIMEOUT (utils/timeout.h). Only the main loop of a client's backend arms it; its handler is there
/// in each process with a database.
const STATEMENT_TIMEOUT: i32 = 3;

unsafe extern "C-unwind" {
    // Not in pgrx' bindings.
    fn enable_timeout_after(id: i32, delay_ms: i32);
    fn disable_timeout(id: i32, keep_indicator: bool);
    fn get_timeout_active(id: i32) -> bool;
    fn get_timeout_indicator(id: i32, reset_indicator: bool) -> bool;
}

/// Ends the limit, however the work ended.
struct Armed;

impl Drop for Armed {
    fn drop(&mut self) {
        // SAFETY: on the main thread, which armed it. Where it struck too late, its cancel is not for what follows.
        unsafe {
            disable_timeout(STATEMENT_TIMEOUT, true);
            if get_timeout_indicator(STATEMENT_TIMEOUT, true) {
                std::ptr::write_volatile(&raw mut pg_sys::QueryCancelPending, 0);
            }
        }
    }
}

/// Runs `work` for `es_sync.read_timeout` at the most. In users' backends, which have their own limit, as long as it takes.
///
/// # Errors
/// Raises query_canceled when the time is over.
pub fn within_read_timeout<T>(work: impl FnOnce() -> T) -> T {
    let limit = settings::read_timeout();
    // SAFETY: reads variables of this process.
    let is_free = unsafe { !pg_sys::MyBgworkerEntry.is_null() && !get_timeout_active(STATEMENT_TIMEOUT) };
    if limit.is_zero() || !is_free {
        return work();
    }
    let started = std::time::Instant::now();
    // SAFETY: a background worker with a database, whose handler for it Postgres has set up.
    unsafe { enable_timeout_after(STATEMENT_TIMEOUT, limit.as_millis() as i32) };
    let armed = Armed;
    PgTryBuilder::new(AssertUnwindSafe(|| {
        let result = work();
        drop(armed);
        result
    }))
    .catch_when(PgSqlErrorCode::ERRCODE_QUERY_CANCELED, |caught| {
        if started.elapsed() < limit {
            caught.rethrow();
        }
        too_long(limit).raise()
    })
    .execute()
}

fn too_long(limit: Duration) -> Report {
    Report::new(
        PgSqlErrorCode::ERRCODE_QUERY_CANCELED,
        format!("reading took longer than es_sync.read_timeout ({} ms)", limit.as_millis()),
    )
}
