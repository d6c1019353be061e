//! Statements of Postgres that must not meet a worker or a writer halfway, and what is done before they run.
//! Runs in: users' backends.
//! May touch: shared memory, locks of tables; it tells a database's worker to stop.
//!
//! `keep_empty` stops the worker of a database that has to have no connections; `drop_extension` lets writers finish
//! first, and stops the worker too.

mod drop_extension;
mod keep_empty;

use std::ffi::{CStr, c_char};

use pgrx::{PgList, pg_sys};

use crate::postgres::process::my_database;

static mut NEXT: pg_sys::ProcessUtility_hook_type = None;

unsafe extern "C-unwind" {
    // Declared anew because pgrx catches each ERROR on its way; see `on_statement`.
    fn standard_ProcessUtility(
        planned: *mut pg_sys::PlannedStmt,
        text: *const c_char,
        read_only: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        parameters: pg_sys::ParamListInfo,
        environment: *mut pg_sys::QueryEnvironment,
        receiver: *mut pg_sys::DestReceiver,
        completion: *mut pg_sys::QueryCompletion,
    );
}

/// Called from `_PG_init` in the postmaster.
pub fn install_hook() {
    // SAFETY: the postmaster has a single thread; the hook that was there is called by ours.
    unsafe {
        NEXT = pg_sys::ProcessUtility_hook;
        pg_sys::ProcessUtility_hook = Some(on_statement);
    }
}

/// Runs for every utility statement, so for all but ours it compares a number and calls on.
///
/// Not guarded, on purpose: an ERROR of the statement passes through as it does without us, with all that it carries.
/// So nothing in this frame may need to be dropped, and nothing here can panic; our own work is in `prepare`.
#[allow(clippy::too_many_arguments)] // Postgres' own signature
unsafe extern "C-unwind" fn on_statement(
    planned: *mut pg_sys::PlannedStmt,
    text: *const c_char,
    read_only: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    parameters: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    receiver: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: a hook of Postgres, called with a planned utility statement; all arguments are handed on unchanged.
    unsafe {
        let statement = (*planned).utilityStmt;
        if is_ours((*statement).type_) {
            prepare(statement, context);
        }
        match NEXT {
            Some(next) => {
                next(planned, text, read_only, context, parameters, environment, receiver, completion);
            }
            None => standard_ProcessUtility(
                planned,
                text,
                read_only,
                context,
                parameters,
                environment,
                receiver,
                completion,
            ),
        }
    }
}

fn is_ours(tag: pg_sys::NodeTag) -> bool {
    use pg_sys::NodeTag::{T_AlterDatabaseStmt, T_CreatedbStmt, T_DropStmt, T_DropdbStmt, T_RenameStmt};
    matches!(tag, T_DropStmt | T_DropdbStmt | T_CreatedbStmt | T_AlterDatabaseStmt | T_RenameStmt)
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn prepare(statement: *mut pg_sys::Node, context: pg_sys::ProcessUtilityContext::Type) {
    // SAFETY: the tag says which struct a node is; names in it are NUL-terminated or null.
    unsafe {
        if (*statement).type_ == pg_sys::NodeTag::T_DropStmt {
            let drop = statement.cast::<pg_sys::DropStmt>();
            if drops_extension(drop) && drop_extension::let_writers_finish() {
                // The worker reads tables that are about to be locked one after the other, in an order of its own.
                keep_empty::until_the_transaction_ends(my_database());
            }
        } else if let Some(database) = database_to_empty(statement, context) {
            keep_empty::until_the_transaction_ends(database);
        }
    }
}

/// True for a statement that drops the extension, or its schema, with which it goes.
///
/// # Safety
/// `drop` is a valid node.
unsafe fn drops_extension(drop: *const pg_sys::DropStmt) -> bool {
    // SAFETY: the caller's; the objects of these two kinds are names.
    unsafe {
        let name = match (*drop).removeType {
            pg_sys::ObjectType::OBJECT_EXTENSION => c"pg_es_sync",
            pg_sys::ObjectType::OBJECT_SCHEMA if (*drop).behavior == pg_sys::DropBehavior::DROP_CASCADE => c"es_sync",
            _ => return false,
        };
        let names = PgList::<pg_sys::String>::from_pg((*drop).objects);
        names.iter_ptr().any(|dropped| CStr::from_ptr((*dropped).sval) == name)
    }
}

/// The database in which nobody may be connected while the statement runs; None where there is none, or where the
/// statement is going to be refused: nobody can stop a worker with a statement that he has no right to.
///
/// # Safety
/// `statement` is a valid node.
unsafe fn database_to_empty(
    statement: *mut pg_sys::Node,
    context: pg_sys::ProcessUtilityContext::Type,
) -> Option<pg_sys::Oid> {
    // SAFETY: as in `prepare`; the rest are lookups in a live transaction.
    unsafe {
        // As PreventInTransactionBlock sees it. Only a database's name may be changed inside a transaction.
        let alone = context == pg_sys::ProcessUtilityContext::PROCESS_UTILITY_TOPLEVEL
            && !pg_sys::IsTransactionBlock()
            && !pg_sys::IsSubTransaction();
        match (*statement).type_ {
            pg_sys::NodeTag::T_CreatedbStmt if alone => {
                let options = (*statement.cast::<pg_sys::CreatedbStmt>()).options;
                let template = match option(options, c"template") {
                    Some(template) => find(pg_sys::defGetString(template))?,
                    None => find(c"template1".as_ptr())?,
                };
                (pg_sys::have_createdb_privilege() && (is_template(template) || is_owner(template))).then_some(template)
            }
            pg_sys::NodeTag::T_DropdbStmt if alone => others(find((*statement.cast::<pg_sys::DropdbStmt>()).dbname)?),
            pg_sys::NodeTag::T_AlterDatabaseStmt if alone => {
                let alter = statement.cast::<pg_sys::AlterDatabaseStmt>();
                option((*alter).options, c"tablespace")?;
                others(find((*alter).dbname)?)
            }
            pg_sys::NodeTag::T_RenameStmt => {
                let rename = statement.cast::<pg_sys::RenameStmt>();
                if (*rename).renameType != pg_sys::ObjectType::OBJECT_DATABASE {
                    return None;
                }
                others(find((*rename).subname)?).filter(|_| pg_sys::have_createdb_privilege())
            }
            _ => None,
        }
    }
}

/// An option that has a value.
///
/// # Safety
/// `options` is a list of DefElem, or null.
unsafe fn option(options: *mut pg_sys::List, name: &CStr) -> Option<*mut pg_sys::DefElem> {
    // SAFETY: the caller's.
    unsafe {
        PgList::<pg_sys::DefElem>::from_pg(options)
            .iter_ptr()
            .find(|option| CStr::from_ptr((**option).defname) == name && !(**option).arg.is_null())
    }
}

/// # Safety
/// `name` is NUL-terminated, or null.
unsafe fn find(name: *const c_char) -> Option<pg_sys::Oid> {
    if name.is_null() {
        return None;
    }
    // SAFETY: the caller's.
    Some(unsafe { pg_sys::get_database_oid(name, true) }).filter(|oid| *oid != pg_sys::InvalidOid)
}

/// A database of the user's that is not the one he is in, which none of these statements takes.
fn others(database: pg_sys::Oid) -> Option<pg_sys::Oid> {
    Some(database).filter(|database| *database != my_database() && is_owner(*database))
}

fn is_owner(database: pg_sys::Oid) -> bool {
    // SAFETY: a lookup in a live transaction; a database that is gone raises, as it does later.
    unsafe { pg_sys::pg_database_ownercheck(database, pg_sys::GetUserId()) }
}

fn is_template(database: pg_sys::Oid) -> bool {
    // SAFETY: the tuple is a pg_database row, and released here.
    unsafe {
        let key = pg_sys::Datum::from(database);
        let tuple = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::DATABASEOID as i32, key);
        if tuple.is_null() {
            return false;
        }
        let template = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>()).datistemplate;
        pg_sys::ReleaseSysCache(tuple);
        template
    }
}
