//! With whose rights a piece of work runs, and which names its SQL finds.

use pgrx::pg_sys;

use super::spi;
use super::transaction::{Scope, set, with_nested_settings};

/// Runs `work` as `owner`: no right of the worker's own is lent to a table's expressions and views.
///
/// Writes are impossible inside, and row-level security is off (it raises where it would filter).
pub fn as_owner<T>(owner: pg_sys::Oid, work: impl FnOnce() -> T) -> T {
    let mut user = pg_sys::InvalidOid;
    let mut context = 0;
    // SAFETY: user, security context and settings are restored below, or by the abort if `work` raises.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        pg_sys::SetUserIdAndSecContext(
            owner,
            context | (pg_sys::SECURITY_RESTRICTED_OPERATION | pg_sys::SECURITY_LOCAL_USERID_CHANGE) as i32,
        );
        let level = pg_sys::NewGUCNestLevel();
        set(c"row_security", c"off", Scope::Nested);
        let read_only = pg_sys::XactReadOnly;
        pg_sys::XactReadOnly = true;
        let result = work();
        pg_sys::AtEOXact_GUC(false, level);
        // Last: what the owner's code has set transaction_read_only to goes back to what it is inside.
        pg_sys::XactReadOnly = read_only;
        pg_sys::SetUserIdAndSecContext(user, context);
        result
    }
}

/// Runs `work` as the superuser whom each cluster begins with, whoever calls: the caller's own rights were checked before.
pub fn as_extension<T>(work: impl FnOnce() -> T) -> T {
    let mut user = pg_sys::InvalidOid;
    let mut context = 0;
    // SAFETY: the user is restored below, or by the abort if `work` raises.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        pg_sys::SetUserIdAndSecContext(
            pg_sys::Oid::from(pg_sys::BOOTSTRAP_SUPERUSERID),
            context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32,
        );
        let result = with_pinned_path(work);
        pg_sys::SetUserIdAndSecContext(user, context);
        result
    }
}

/// Runs `work` with SPI, as who runs now, under the search path that filters are read with.
pub fn with_pinned_path<T>(work: impl FnOnce() -> T) -> T {
    with_nested_settings(|| {
        set(c"search_path", c"pg_catalog, pg_temp", Scope::Nested);
        with_spi(work)
    })
}

/// Runs `work` with SPI, as the caller.
fn with_spi<T>(work: impl FnOnce() -> T) -> T {
    spi::connect();
    let result = work();
    spi::finish();
    result
}
