//! Transactions of the worker: each is short, and none spans a wait for the network.

use std::panic::AssertUnwindSafe;

use pgrx::PgTryBuilder;
use pgrx::pg_sys;

use super::error::SqlError;

/// Runs `work` in a transaction of its own with SPI connected and a snapshot set; rolls back and returns the error if
/// it raises one.
///
/// # Errors
/// Any ERROR raised by `work` or by the commit. A FATAL (the worker was told to stop) does not come back.
pub fn run<T>(work: impl FnOnce() -> T) -> Result<T, SqlError> {
    run_without_database(|| {
        super::spi::connect();
        let result = work();
        super::spi::finish();
        result
    })
}

/// As `run`, but waits for no lock: what somebody else has locked raises lock_not_available at once.
///
/// # Errors
/// As `run`.
pub fn run_without_waiting<T>(work: impl FnOnce() -> T) -> Result<T, SqlError> {
    run(|| {
        set(c"lock_timeout", c"1ms", Scope::Local);
        work()
    })
}

/// As `run`, but waits 100 ms at the most for a lock: all else that the worker has to do waits with it. It does wait, so
/// that it stands in line where a table is locked by one after the other.
///
/// # Errors
/// As `run`.
pub fn run_waiting_shortly<T>(work: impl FnOnce() -> T) -> Result<T, SqlError> {
    run(|| {
        set(c"lock_timeout", c"100ms", Scope::Local);
        work()
    })
}

/// As `run`, but without SPI, which needs a database.
///
/// # Errors
/// As `run`.
pub fn run_without_database<T>(work: impl FnOnce() -> T) -> Result<T, SqlError> {
    PgTryBuilder::new(AssertUnwindSafe(|| {
        // SAFETY: the worker's main thread, outside any transaction: each call here leaves it so, by commit or, in
        // the handler below, by abort.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
            let result = work();
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
            Ok(result)
        }
    }))
    .catch_others(|caught| {
        // SAFETY: an ERROR left a transaction to abort; aborting also closes SPI and restores user and settings.
        unsafe { pg_sys::AbortCurrentTransaction() };
        Err(SqlError::from_caught(&caught))
    })
    .execute()
}

/// Replaces the active snapshot by one taken now (READ COMMITTED).
pub fn new_snapshot() {
    // SAFETY: `run` has pushed exactly one snapshot, and no query is running.
    unsafe {
        pg_sys::PopActiveSnapshot();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        // No statement may be older than the snapshot: an attached partition would be in the one and not in the other.
        pg_sys::AcceptInvalidationMessages();
    }
}

/// Makes sure that the WAL written so far by this transaction is on disk.
pub fn flush_wal() {
    // SAFETY: reads a variable of this process and calls a function that only waits for the disk.
    unsafe {
        if pg_sys::XactLastRecEnd != 0 {
            pg_sys::XLogFlush(pg_sys::XactLastRecEnd);
        }
    }
}

/// Makes sure that everything that anybody has written to the WAL so far is on disk.
pub fn flush_all_wal() {
    // SAFETY: both functions may be called at any time outside recovery; the second only waits for the disk.
    unsafe { pg_sys::XLogFlush(last_end(pg_sys::GetXLogInsertRecPtr(), pg_sys::wal_segment_size as u64)) };
}

/// Where the last record ended, if the next one begins at `next`. Behind a page's header that is the page's beginning: the
/// header is written with the next record, and a flush up to it would be an error.
fn last_end(next: u64, segment: u64) -> u64 {
    /// Bytes of a page's header, and of that of a segment's first page: MAXALIGN of their structs.
    const HEADER: u64 = 24;
    const FIRST_HEADER: u64 = 40;
    let page = next - next % pg_sys::XLOG_BLCKSZ as u64;
    let header = if page.is_multiple_of(segment) { FIRST_HEADER } else { HEADER };
    if next - page == header { page } else { next }
}

/// Runs `work`, in which locks are waited for as long as it takes, whatever the user's lock_timeout says.
pub fn without_lock_timeout<T>(work: impl FnOnce() -> T) -> T {
    struct Former(std::ffi::c_int);
    impl Drop for Former {
        fn drop(&mut self) {
            // SAFETY: the value that belongs to the setting; after an ERROR, too, which unwinds through here.
            unsafe { pg_sys::LockTimeout = self.0 }
        }
    }
    // SAFETY: a variable of this process, that is read when a wait begins. Setting the setting itself would cost more than
    // all the rest of a small transaction's capture.
    let _former = Former(unsafe { std::ptr::replace(&raw mut pg_sys::LockTimeout, 0) });
    work()
}

/// How long a changed setting lasts.
#[derive(Clone, Copy, PartialEq)]
pub enum Scope {
    /// Until this process ends, whatever the database's or role's defaults say.
    Session,
    /// Until the transaction ends.
    Local,
    /// Until the innermost level of settings ends, as `with_nested_settings` makes one.
    Nested,
}

/// Runs `work`, after which what it has set with `Scope::Nested` is again what it was.
pub fn with_nested_settings<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: the level is left below, or by the abort if `work` raises.
    unsafe {
        let level = pg_sys::NewGUCNestLevel();
        let result = work();
        pg_sys::AtEOXact_GUC(true, level);
        result
    }
}

/// A setting of Postgres, in the form that `set` takes.
pub fn setting(name: &std::ffi::CStr) -> std::ffi::CString {
    // SAFETY: the name is NUL-terminated; the value is copied before anything can change it.
    unsafe {
        let value = pg_sys::GetConfigOption(name.as_ptr(), true, false);
        if value.is_null() { std::ffi::CString::default() } else { std::ffi::CStr::from_ptr(value).to_owned() }
    }
}

/// Sets a setting of Postgres by name.
pub fn set(name: &std::ffi::CStr, value: &std::ffi::CStr, scope: Scope) {
    let action = match scope {
        Scope::Session => pg_sys::GucAction::GUC_ACTION_SET,
        Scope::Local => pg_sys::GucAction::GUC_ACTION_LOCAL,
        Scope::Nested => pg_sys::GucAction::GUC_ACTION_SAVE,
    };
    // SAFETY: both strings are NUL-terminated and copied by Postgres.
    unsafe {
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_SESSION,
            action,
            true,
            0,
            false,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wal_ends_before_a_page_header_that_nothing_follows() {
        const SEGMENT: u64 = 16 << 20;
        const PAGE: u64 = pg_sys::XLOG_BLCKSZ as u64;
        for (next, end) in [
            (5 * PAGE + 24, 5 * PAGE),
            (5 * PAGE + 40, 5 * PAGE + 40),
            (3 * SEGMENT + 40, 3 * SEGMENT),
            (3 * SEGMENT + 24, 3 * SEGMENT + 24),
            (5 * PAGE + 32, 5 * PAGE + 32),
            (6 * PAGE - 8, 6 * PAGE - 8),
        ] {
            assert_eq!(last_end(next, SEGMENT), end);
        }
    }
}
