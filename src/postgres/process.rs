//! Which processes of this server run.

use pgrx::pg_sys;

pub fn my_id() -> i32 {
    std::process::id() as i32
}

/// True while a process of this server with this id is connected.
pub fn is_alive(pid: i32) -> bool {
    // SAFETY: looks the process up in the process array, under its lock.
    unsafe { !pg_sys::BackendPidGetProc(pid).is_null() }
}
