//! A row trigger in Rust that does nothing, exported as es_sync.capture() is: what make bench compares capture with.

use std::ffi::{c_char, c_int, c_void};

/// Called by Postgres' function manager.
#[unsafe(no_mangle)]
pub extern "C" fn empty_trigger(_call: *mut c_void) -> usize {
    0
}

/// `Pg_finfo_record`.
#[repr(C)]
pub struct FunctionInfo {
    api_version: c_int,
}

/// The function manager's version mark for `empty_trigger`.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_empty_trigger() -> &'static FunctionInfo {
    &FunctionInfo { api_version: 1 }
}

/// `Pg_magic_struct`: what the library was built for.
#[repr(C)]
pub struct Magic {
    len: c_int,
    version: c_int,
    max_arguments: c_int,
    max_index_keys: c_int,
    name_length: c_int,
    float8_by_value: c_int,
    abi_extra: [c_char; 32],
}

const VERSION: c_int = if cfg!(feature = "pg15") { 15 } else { 0 };

const fn abi_extra() -> [c_char; 32] {
    let name = b"PostgreSQL";
    let mut padded = [0; 32];
    let mut place = 0;
    while place < name.len() {
        padded[place] = name[place] as c_char;
        place += 1;
    }
    padded
}

/// Asked for when the library is loaded.
#[unsafe(no_mangle)]
#[allow(non_snake_case)] // the name that Postgres looks for
pub extern "C" fn Pg_magic_func() -> &'static Magic {
    const MAGIC: Magic = Magic {
        len: size_of::<Magic>() as c_int,
        version: VERSION * 100,
        max_arguments: 100,
        max_index_keys: 32,
        name_length: 64,
        float8_by_value: 1,
        abi_extra: abi_extra(),
    };
    &MAGIC
}
