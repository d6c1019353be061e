//! The event trigger function: a table whose rows ALTER TABLE writes anew fires no row triggers.

use pgrx::{FromDatum, pg_sys};

use super::transaction;
use crate::attachment::captures::{self, Part};
use crate::postgres::error::Report;
use crate::postgres::relation;

/// ALTER TABLE ... SET LOGGED or UNLOGGED, SET ACCESS METHOD (event_trigger.h): the rows stay what they are.
const ROWS_STAY: i32 = 0x01 | 0x08;

/// `es_sync.rewritten()`: ON table_rewrite.
///
/// # Safety
/// Called by Postgres' function manager.
#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub unsafe extern "C-unwind" fn es_sync_rewritten(call: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: the function manager hands over a valid call. Inside of an event trigger for table_rewrite, both functions
    // return what the statement at hand does; they ignore their arguments.
    unsafe {
        let context = (*call).context;
        if context.is_null() || (*context).type_ != pg_sys::NodeTag::T_EventTriggerData {
            Report::new(
                pgrx::PgSqlErrorCode::ERRCODE_E_R_I_E_EVENT_TRIGGER_PROTOCOL_VIOLATED,
                "es_sync.rewritten() can only be called as an event trigger",
            )
            .raise();
        }
        let reason = pg_sys::pg_event_trigger_table_rewrite_reason(call);
        let table = pg_sys::pg_event_trigger_table_rewrite_oid(call);
        if let (Some(reason), Some(table)) = (i32::from_datum(reason, false), pg_sys::Oid::from_datum(table, false))
            && reason & !ROWS_STAY != 0
        {
            note(table);
        }
    }
    pg_sys::Datum::from(0usize)
}

/// The function manager's version mark for `es_sync_rewritten`.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_es_sync_rewritten() -> &'static pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

fn note(table: pg_sys::Oid) {
    let mut tables = vec![table];
    tables.extend(relation::partition_ancestors(table));
    for capture in captures::of(&tables).captures {
        match capture.part {
            Part::Root => transaction::note_whole_table(capture.source),
            Part::Related { .. } => transaction::note_unnoted(capture.source),
        }
    }
}
