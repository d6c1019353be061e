//! A row trigger in Rust that does nothing, exported as es_sync.capture() is: what make bench compares capture with.

use pgrx::pg_sys;

pgrx::pg_module_magic!();

/// Called by Postgres' function manager.
#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub extern "C-unwind" fn empty_trigger(_call: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    pg_sys::Datum::from(0usize)
}

/// The function manager's version mark for `empty_trigger`.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_empty_trigger() -> &'static pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}
