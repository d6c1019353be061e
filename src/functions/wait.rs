//! es_sync.wait: returns when all that was committed before the call is searchable.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pgrx::prelude::*;

use crate::attachment::attach as attachments;
use crate::postgres::error::OrRaise;
use crate::postgres::latch;
use crate::postgres::process::is_alive;
use crate::shared::Waiter;

/// How often a caller looks by itself; the worker's wake-up comes first as a rule.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// True if it became so within `timeout`.
///
/// The worker answers, not a read of the queue: so it does not depend on the caller's snapshot or isolation, and a
/// serializable caller does not conflict with writers.
#[pg_extern(sql = false)]
fn wait(relation: Option<pg_sys::Oid>, timeout: Option<pgrx::datum::Interval>) -> bool {
    let shared = super::require_preload();
    if let Some(relation) = relation {
        attachments::as_extension(|| attachments::attached(relation, None)).or_raise();
    }
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

/// Gives the place back however the call ends: a cancel unwinds as a panic.
struct Place(&'static Waiter);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.release();
    }
}
