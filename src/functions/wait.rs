//! es_sync.wait: returns when all that was committed before the call is searchable.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use pgrx::prelude::*;
use pgrx::{PgSqlErrorCode, pg_sys};

use crate::attachment::{attach, catalog};
use crate::postgres::error::{OrRaise, Report};
use crate::postgres::latch;
use crate::postgres::process::is_alive;
use crate::postgres::rights::as_extension;
use crate::shared::Waiter;

/// How often a caller looks by itself; the worker's wake-up comes first as a rule.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// True if it became so within `timeout`.
///
/// The worker answers, not a read of the queue: so it does not depend on the caller's snapshot or isolation, and a
/// serializable caller does not conflict with writers.
#[pg_extern(sql = false)]
fn wait(relation: Option<pg_sys::Oid>, timeout: Option<pgrx::datum::Interval>) -> bool {
    // SAFETY: only reads a variable of this process, and raises.
    unsafe { pg_sys::PreventCommandDuringRecovery(c"es_sync.wait()".as_ptr()) };
    let shared = super::require_preload();
    refuse_paused(relation).or_raise();
    let timeout = timeout.map_or(Duration::from_secs(30), |timeout| {
        Duration::from_micros(u64::try_from(timeout.as_micros()).unwrap_or(0))
    });
    let deadline = Instant::now() + timeout;
    let place = loop {
        if let Some(waiter) = shared.take_waiter(is_alive) {
            break Place(waiter);
        }
        if Instant::now() >= deadline {
            return false;
        }
        latch::wait_my_latch(LOOK_EVERY);
    };
    let waiter = place.0;
    // SAFETY: reads a variable of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    waiter.database.store(database.to_u32(), Relaxed);
    waiter.source.store(relation.map_or(0, |relation| relation.to_u32()), Relaxed);
    waiter.mark.store(shared.queue_mark(), Relaxed);
    waiter.procno.store(latch::my_procno(), Relaxed);
    waiter.pid.store(std::process::id() as i32, Relaxed);
    waiter.publish();
    loop {
        if waiter.is_done() {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        if let Some(database) = shared.database(database) {
            database.wake_worker();
        }
        latch::wait_my_latch(left.min(LOOK_EVERY));
    }
}

/// The changes of a table that is paused altogether stay in the queue: waiting for them would only take time. An index
/// paused beside others of its table is not waited for.
fn refuse_paused(relation: Option<pg_sys::Oid>) -> Result<(), Report> {
    let known = as_extension(|| match relation {
        Some(relation) => attach::attached(relation, None),
        None => Ok(catalog::all()),
    })?;
    let goes_on = |table| known.iter().any(|other| other.relation == table && !other.paused);
    let Some(paused) = known.iter().find(|known| known.paused && !goes_on(known.relation)) else { return Ok(()) };
    let name = crate::postgres::error::relation_name(paused.relation);
    Err(Report::new(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, format!("table \"{name}\" is paused"))
        .detail("Its changes stay in the queue until it goes on.")
        .hint("Call es_sync.resume(), or name another table."))
}

/// Gives the place back however the call ends: a cancel unwinds as a panic.
struct Place(&'static Waiter);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.release();
    }
}
