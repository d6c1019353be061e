//! Which processes of this server run, and what this one has used.

use std::time::Duration;

use pgrx::pg_sys;

pub fn my_id() -> i32 {
    std::process::id() as i32
}

/// True while a process of this server with this id is connected.
pub fn is_alive(pid: i32) -> bool {
    // SAFETY: looks the process up in the process array, under its lock.
    unsafe { !pg_sys::BackendPidGetProc(pid).is_null() }
}

/// Processor time that this thread has used.
pub fn cpu_time() -> Duration {
    // SAFETY: writes to a value of our own; this clock always exists on Linux, and elsewhere the time stays zero.
    unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }
}
