//! Waking another process, and waiting for a latch, a socket and the postmaster at once.

use std::os::fd::RawFd;
use std::time::Duration;

use pgrx::pg_sys;

/// Sets the latch of the process in slot `procno` of the process array, if there is such a slot.
///
/// A slot that was recycled only gets a spurious wake-up, which every latch loop tolerates. Unlike ProcSendSignal this
/// cannot raise, so it may run after the commit record is written.
pub fn wake(procno: i32) {
    // SAFETY: ProcGlobal is set up before any backend runs; the index is checked against its bound.
    unsafe {
        let procs = pg_sys::ProcGlobal;
        if procs.is_null() || procno < 0 || procno as u32 >= (*procs).allProcCount {
            return;
        }
        pg_sys::SetLatch(&raw mut (*(*procs).allProcs.add(procno as usize)).procLatch);
    }
}

/// This process's slot in the process array.
pub fn my_procno() -> i32 {
    // SAFETY: MyProc is set in every process that is connected to shared memory.
    unsafe { (*pg_sys::MyProc).pgprocno }
}

/// Waits for this process's latch at the most `timeout`, then resets it and serves interrupts.
pub fn wait_my_latch(timeout: Duration) {
    // SAFETY: a backend's main thread waits on its own latch.
    unsafe {
        pg_sys::WaitLatch(
            pg_sys::MyLatch,
            (pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH) as i32,
            timeout.as_millis() as _,
            pg_sys::PG_WAIT_EXTENSION,
        );
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    pgrx::check_for_interrupts!();
}

/// Resets this process's latch; true if it was set.
pub fn take_my_latch() -> bool {
    // SAFETY: a process may look at its own latch at any time.
    unsafe {
        let set = std::ptr::read_volatile(&raw const (*pg_sys::MyLatch).is_set) != 0;
        if set {
            pg_sys::ResetLatch(pg_sys::MyLatch);
        }
        set
    }
}

/// A kept wait set on this process's latch and one socket: building one at each wait costs 5 us.
pub struct WaitSet {
    set: *mut pg_sys::WaitEventSet,
}

impl WaitSet {
    pub fn new(socket: Option<RawFd>) -> Self {
        // SAFETY: allocated for the life of the process or until drop; latch and socket outlive it.
        unsafe {
            let set = pg_sys::CreateWaitEventSet(pg_sys::TopMemoryContext, 3);
            let (no_latch, no_data) = (std::ptr::null_mut(), std::ptr::null_mut());
            pg_sys::AddWaitEventToSet(set, pg_sys::WL_LATCH_SET, pg_sys::PGINVALID_SOCKET, pg_sys::MyLatch, no_data);
            pg_sys::AddWaitEventToSet(set, pg_sys::WL_EXIT_ON_PM_DEATH, pg_sys::PGINVALID_SOCKET, no_latch, no_data);
            if let Some(socket) = socket {
                pg_sys::AddWaitEventToSet(set, pg_sys::WL_SOCKET_READABLE, socket, no_latch, no_data);
            }
            Self { set }
        }
    }

    /// Waits for the latch or the socket at the most `timeout`; resets the latch. True if the latch was set.
    pub fn wait(&self, timeout: Duration) -> bool {
        // SAFETY: one event struct is enough for one returned event.
        unsafe {
            let mut event = std::mem::zeroed::<pg_sys::WaitEvent>();
            // Round up: a wait of less than a millisecond must not become a busy loop.
            let millis = timeout.as_micros().div_ceil(1000);
            let events = pg_sys::WaitEventSetWait(self.set, millis as _, &mut event, 1, pg_sys::PG_WAIT_EXTENSION);
            let latched = events > 0 && event.events & pg_sys::WL_LATCH_SET != 0;
            if latched {
                pg_sys::ResetLatch(pg_sys::MyLatch);
            }
            latched
        }
    }
}

impl Drop for WaitSet {
    fn drop(&mut self) {
        // SAFETY: created by `new`, freed once.
        unsafe { pg_sys::FreeWaitEventSet(self.set) };
    }
}
