//! Callers of `es_sync.wait()`, and what the worker answers them.

use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, AtomicU64, Ordering};

use pgrx::pg_sys;

use super::Shared;
use crate::postgres::latch;

const FREE: u64 = 0;
const FILLING: u64 = 1;
const WAITING: u64 = 2;
const DONE: u64 = 3;
/// The bits of these.
const STATE: u64 = 3;

/// A call of `es_sync.wait()`.
#[repr(C)]
pub struct Waiter {
    /// How far it is, and above that which use of the place it is: in one word, so that a late answer cannot reach the
    /// next caller.
    state: AtomicU64,
    pub database: AtomicU32,
    /// 0 for all sources.
    pub source: AtomicU32,
    /// Queue rows with a lower id must be gone.
    pub mark: AtomicI64,
    pub procno: AtomicI32,
    pub pid: AtomicI32,
}

impl Shared {
    /// Takes a place to wait; None while all are taken. `is_alive` tells whether a process still runs: one that was
    /// terminated could not give its place back.
    pub fn take_waiter(&self, is_alive: impl Fn(i32) -> bool) -> Option<&Waiter> {
        let take = |waiter: &&Waiter, is_left: &dyn Fn(u64) -> bool| {
            let state = waiter.state.load(Ordering::Acquire);
            let next = (state & !STATE).wrapping_add(STATE + 1) | FILLING;
            is_left(state & STATE)
                && waiter.state.compare_exchange(state, next, Ordering::AcqRel, Ordering::Acquire).is_ok()
        };
        self.waiters.iter().find(|waiter| take(waiter, &|state| state == FREE)).or_else(|| {
            self.waiters
                .iter()
                .find(|waiter| take(waiter, &|state| state != FILLING && !is_alive(waiter.pid.load(Ordering::Relaxed))))
        })
    }

    /// Requests of `es_sync.wait()` in a database that are not answered yet, each with what `Waiter::answer` needs. What is
    /// read of it may be the next caller's already; then the answer reaches nobody.
    pub fn waiting(&self, database: pg_sys::Oid) -> impl Iterator<Item = (&Waiter, u64)> {
        self.waiters.iter().filter_map(move |waiter| {
            let request = waiter.state.load(Ordering::Acquire);
            let is_meant = request & STATE == WAITING && waiter.database.load(Ordering::Relaxed) == database.to_u32();
            is_meant.then_some((waiter, request))
        })
    }
}

impl Waiter {
    /// Publishes the request, once its fields are filled.
    pub fn publish(&self) {
        self.set(WAITING);
    }

    /// True once the worker has answered.
    pub fn is_done(&self) -> bool {
        self.state.load(Ordering::Acquire) & STATE == DONE
    }

    /// Answers a request and wakes the caller, unless he has given up meanwhile.
    pub fn answer(&self, request: u64) {
        let done = request & !STATE | DONE;
        if self.state.compare_exchange(request, done, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            latch::wake(self.procno.load(Ordering::Relaxed));
        }
    }

    /// Gives the place back.
    pub fn release(&self) {
        self.set(FREE);
    }

    /// Only who has the place goes on with it.
    fn set(&self, state: u64) {
        self.state.store(self.state.load(Ordering::Relaxed) & !STATE | state, Ordering::Release);
    }
}
