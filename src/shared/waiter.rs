//! Callers of `es_sync.wait()`, and what the worker answers them.

use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, Ordering};

use pgrx::pg_sys;

use super::Shared;
use crate::postgres::latch;

const FREE: u32 = 0;
const FILLING: u32 = 1;
const WAITING: u32 = 2;
const DONE: u32 = 3;

/// A call of `es_sync.wait()`.
#[repr(C)]
pub struct Waiter {
    state: AtomicU32,
    /// Grows with each use of the place, so that a late answer cannot reach the next caller.
    serial: AtomicU32,
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
        let take = |waiter: &Waiter, from| {
            let taken = waiter.state.compare_exchange(from, FILLING, Ordering::AcqRel, Ordering::Acquire).is_ok();
            if taken {
                // Before its fields change.
                waiter.serial.fetch_add(1, Ordering::AcqRel);
            }
            taken
        };
        self.waiters.iter().find(|waiter| take(waiter, FREE)).or_else(|| {
            self.waiters.iter().find(|waiter| {
                let state = waiter.state.load(Ordering::Acquire);
                state != FILLING && !is_alive(waiter.pid.load(Ordering::Relaxed)) && take(waiter, state)
            })
        })
    }

    /// Requests of `es_sync.wait()` in a database that are not answered yet.
    pub fn waiting(&self, database: pg_sys::Oid) -> impl Iterator<Item = &Waiter> {
        self.waiters.iter().filter(move |waiter| {
            waiter.state.load(Ordering::Acquire) == WAITING
                && waiter.database.load(Ordering::Relaxed) == database.to_u32()
        })
    }
}

impl Waiter {
    /// Publishes the request, once its fields are filled.
    pub fn publish(&self) {
        self.state.store(WAITING, Ordering::Release);
    }

    /// True once the worker has answered.
    pub fn is_done(&self) -> bool {
        self.state.load(Ordering::Acquire) == DONE
    }

    pub fn serial(&self) -> u32 {
        self.serial.load(Ordering::Acquire)
    }

    /// Answers request `serial` and wakes the caller, unless he has given up meanwhile.
    pub fn answer(&self, serial: u32) {
        if self.serial() == serial
            && self.state.compare_exchange(WAITING, DONE, Ordering::AcqRel, Ordering::Acquire).is_ok()
        {
            latch::wake(self.procno.load(Ordering::Relaxed));
        }
    }

    /// Gives the place back.
    pub fn release(&self) {
        self.state.store(FREE, Ordering::Release);
    }
}
