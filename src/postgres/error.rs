//! One way to raise an error, in the shape that the Postgres style guide asks for.

use pgrx::pg_sys;
use pgrx::pg_sys::panic::{CaughtError, ErrorReport};
use pgrx::prelude::*;

/// An error or a warning as Postgres reports it.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    pub sqlstate: PgSqlErrorCode,
    /// Lower-case, no full stop, names in double quotes.
    pub message: String,
    /// Facts, in whole sentences.
    pub detail: Option<String>,
    /// The way out, in whole sentences.
    pub hint: Option<String>,
}

impl Report {
    pub fn new(sqlstate: PgSqlErrorCode, message: impl Into<String>) -> Self {
        Self { sqlstate, message: message.into(), detail: None, hint: None }
    }

    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Raises it as an ERROR.
    pub fn raise(self) -> ! {
        self.report(PgLogLevel::ERROR);
        unreachable!("an ERROR does not return")
    }

    /// Says it as a WARNING.
    pub fn warn(self) {
        self.report(PgLogLevel::WARNING);
    }

    fn report(self, level: PgLogLevel) {
        let mut report = ErrorReport::new(self.sqlstate, self.message, "");
        if let Some(detail) = self.detail {
            report = report.set_detail(detail);
        }
        if let Some(hint) = self.hint {
            report = report.set_hint(hint);
        }
        report.report(level);
    }
}

/// Unwraps a result, raising its error.
pub trait OrRaise<T> {
    fn or_raise(self) -> T;
}

impl<T> OrRaise<T> for Result<T, Report> {
    fn or_raise(self) -> T {
        self.unwrap_or_else(|report| report.raise())
    }
}

/// An error that was caught and whose transaction was rolled back.
#[derive(Debug, Clone)]
pub struct SqlError {
    pub sqlstate: PgSqlErrorCode,
    pub message: String,
}

impl SqlError {
    pub fn from_caught(caught: &CaughtError) -> Self {
        match caught {
            CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => {
                Self { sqlstate: report.sql_error_code(), message: report.message().to_owned() }
            }
            CaughtError::RustPanic { ereport, .. } => {
                Self { sqlstate: PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, message: ereport.message().to_owned() }
            }
        }
    }
}

impl SqlError {
    /// The five characters of the SQLSTATE (MAKE_SQLSTATE: six bits each, the first in the lowest).
    pub fn sqlstate(&self) -> String {
        let code = self.sqlstate as i32;
        (0..5).map(|place| char::from(((code >> (6 * place)) & 0x3f) as u8 + b'0')).collect()
    }

    /// True if a row's own values are to blame, as far as can be told: a division by zero, a cast, a function that raises
    /// whatever it likes, a library's internal error, a second row where there may be one; reading it takes longer than it
    /// may, or was cancelled by hand. Not what passes (a lock, a full
    /// disk, a stop of the server, a connection of a foreign table's, an index that must be built anew), nor what the
    /// statement is to blame for.
    pub fn is_in_the_data(&self) -> bool {
        let state = self.sqlstate();
        if self.was_cancelled() {
            return true;
        }
        let passes = ["08", "25", "28", "3D", "40", "53", "55", "57", "58", "72", "F0", "HV"];
        !(passes.contains(&&state[..2]) || state == "XX002" || self.is_in_the_statement())
    }

    /// True if it took longer than it may, or somebody has cancelled it by hand.
    pub fn was_cancelled(&self) -> bool {
        self.sqlstate == PgSqlErrorCode::ERRCODE_QUERY_CANCELED
    }

    /// True if a text is no value of a type: its input function refuses it, or a domain's check.
    pub fn refuses_a_value(&self) -> bool {
        matches!(&self.sqlstate()[..2], "21" | "22" | "23" | "38" | "39" | "P0" | "54")
    }

    /// True if the statement itself is to blame: it names what is not there, or must not be read.
    pub fn is_in_the_statement(&self) -> bool {
        matches!(&self.sqlstate()[..2], "3F" | "42")
    }

    /// True if the statement names an object that is not there; or a row does, as text that is cast to regconfig or regrole.
    pub fn is_of_a_name(&self) -> bool {
        self.sqlstate == PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT
    }

    /// True if somebody else holds a lock, or has just altered what is to be read, and the same works later.
    pub fn passes_soon(&self) -> bool {
        matches!(
            self.sqlstate,
            PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE
                | PgSqlErrorCode::ERRCODE_T_R_DEADLOCK_DETECTED
                | PgSqlErrorCode::ERRCODE_OBJECT_IN_USE
        )
    }
}

impl std::fmt::Display for SqlError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// With RUST_BACKTRACE in the postmaster's environment, pgrx sends backtraces, build paths included, to clients as
/// DETAIL of every error. This turns that off for library backtraces only.
pub fn keep_backtraces_from_clients() {
    // SAFETY: called from `_PG_init` in the postmaster, which has a single thread.
    unsafe { std::env::set_var("RUST_LIB_BACKTRACE", "0") };
}

/// Name of a relation for a message, without its schema; never fails.
pub fn relation_name(relation: pg_sys::Oid) -> String {
    // SAFETY: get_rel_name is a syscache lookup in a live transaction; the palloc'd copy outlives its use here.
    unsafe {
        let name = pg_sys::get_rel_name(relation);
        if name.is_null() {
            relation.to_u32().to_string()
        } else {
            std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    }
}
