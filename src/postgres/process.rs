//! Which processes of this server run, and what this one is and has used.

use std::time::Duration;

use pgrx::pg_sys;

pub fn my_id() -> i32 {
    std::process::id() as i32
}

/// The database that this process is connected to; invalid in the launcher.
pub fn my_database() -> pg_sys::Oid {
    // SAFETY: reads a variable that is written once, before the process runs anything of ours that asks.
    unsafe { pg_sys::MyDatabaseId }
}

/// Postgres' clock: microseconds since 2000.
pub fn now_micros() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
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
