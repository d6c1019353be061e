//! The triggers of attached tables and of those that their documents follow.

use pgrx::{PgRelation, PgSqlErrorCode, pg_sys};

use super::check::{Table, named};
use super::{captures, partitions};
use crate::postgres::error::Report;
use crate::postgres::rights::as_owner;
use crate::postgres::spi;
use crate::postgres::transaction::{self, Scope};
use crate::settings;

/// Waits until no other transaction of a user's attaches, detaches or relates tables: what decides about each is read from
/// the catalog, and has to hold until it has committed. Comes before the tables' locks, behind which writers would wait
/// meanwhile. The worker asks nobody: it looks again at what it has done.
pub fn take_turn() {
    within_lock_timeout(
        "could not attach, detach or relate within es_sync.lock_timeout",
        "One transaction at a time does that in a database, and another one has not ended.",
        &who_holds(&named(captures::turns()), "share update exclusive"),
        wait_for_turn,
    );
}

/// The same without a limit, and without a word to whoever waits.
pub fn wait_for_turn() {
    // SAFETY: waits as LOCK TABLE does: it can be cancelled, and lock_timeout counts. The mode keeps out its like only, and
    // whoever vacuums that table.
    unsafe { pg_sys::LockRelationOid(captures::turns(), pg_sys::ShareUpdateExclusiveLock as i32) };
}

/// Takes the lock that changing triggers needs, or says who stands in the way.
pub fn lock(table: &Table, mode: &str) {
    let name = &table.name;
    let statement = format!("lock table {name} in {mode} mode");
    within_lock_timeout(&not_locked(name), QUIET, &who_holds(table, mode), || spi::run(&statement, &[]));
}

/// What to do where a lock of this mode is not there in time.
fn who_holds(table: &Table, mode: &str) -> String {
    let holders = spi::run(
        "select pg_catalog.string_agg(distinct l.pid::text, ', ')
         from pg_catalog.pg_locks l
         where l.locktype = 'relation' and l.relation = $1 and l.granted
           and l.database = (select d.oid from pg_catalog.pg_database d
                             where d.datname = pg_catalog.current_database())
           and ($2 = 'access exclusive' or l.mode not in ('AccessShareLock', 'RowShareLock'))
           and l.pid is distinct from pg_catalog.pg_backend_pid()",
        &[spi::parameter(table.oid), spi::parameter(mode)],
    )
    .get::<String>(0, 1);
    match holders {
        Some(pids) => format!("Its transactions in process {pids} hold a lock: let them end, then try again."),
        None => "Try again, or raise es_sync.lock_timeout.".to_owned(),
    }
}

/// Runs `work`, which looks at a table and at what its documents show, and waits no longer than that for whoever has locked
/// one of them.
///
/// # Errors
/// Raises lock_not_available.
pub fn patiently<T>(name: &str, work: impl FnOnce() -> T) -> T {
    let hint = "It is locked, or a table that its documents show: let the transaction that holds the lock end, or raise es_sync.lock_timeout.";
    within_lock_timeout(&not_locked(name), QUIET, hint, work)
}

fn not_locked(name: &str) -> String {
    format!("could not lock table {name} within es_sync.lock_timeout")
}

const QUIET: &str = "The table must be quiet for a moment while its triggers change.";

/// Runs `work`, in which no wait for a lock may last longer than `es_sync.lock_timeout`. A worker has its own, shorter limit
/// by now (`transaction::run_waiting_shortly`): writers queue up behind whoever waits for such a lock.
///
/// # Errors
/// Raises lock_not_available, with this message, and what is to be done.
fn within_lock_timeout<T>(message: &str, detail: &str, hint: &str, work: impl FnOnce() -> T) -> T {
    // SAFETY: reads a variable of this process, null in users' backends.
    let is_worker = unsafe { !pg_sys::MyBgworkerEntry.is_null() };
    // A user's own time-out holds again afterwards.
    let former = (!is_worker).then(|| {
        let former = transaction::setting(c"lock_timeout");
        let timeout = std::ffi::CString::new(settings::lock_timeout()).unwrap_or_default();
        transaction::set(c"lock_timeout", &timeout, Scope::Nested);
        former
    });
    let result = pgrx::PgTryBuilder::new(std::panic::AssertUnwindSafe(work))
        .catch_when(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE, |_| {
            Report::new(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE, message).detail(detail).hint(hint).raise()
        })
        .execute();
    if let Some(former) = former {
        transaction::set(c"lock_timeout", &former, Scope::Nested);
    }
    result
}

/// The table and all its partitions, schema-qualified; the table first.
fn tree(table: &Table) -> Vec<(pg_sys::Oid, String)> {
    let rows = spi::run(
        "select c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname)
         from (select $1::oid as oid, 0 as level
               union
               select t.relid, t.level from pg_catalog.pg_partition_tree($1) t) t
         join pg_catalog.pg_class c on c.oid = t.oid
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         where c.relkind in ('r', 'p')
         order by t.level",
        &[spi::parameter(table.oid)],
    );
    (0..rows.len()).filter_map(|row| Some((rows.get(row, 1)?, rows.get(row, 2)?))).collect()
}

/// True if the table has this trigger now: in REPEATABLE READ, a query would see the catalog as it was.
fn is_on(table: pg_sys::Oid, trigger: &std::ffi::CStr) -> bool {
    // SAFETY: in a transaction; the catalog is read as it is now.
    unsafe { pg_sys::get_trigger_oid(table, trigger.as_ptr(), true) != pg_sys::InvalidOid }
}

/// The partitioned tables of a tree, kept open with their keys.
///
/// Whatever goes on from a table to its partitions needs the key. Postgres builds it when it is first needed, which calls
/// functions in its expressions with the rights of whoever runs then. Here each table's owner does, and as long as the
/// table is open the key stays as it is, whatever else of the table is read anew.
fn with_known_keys(table: pg_sys::Oid) -> Vec<PgRelation> {
    let mut open = vec![table];
    let mut known = Vec::new();
    while let Some(oid) = open.pop() {
        // SAFETY: a syscache lookup in a live transaction.
        if unsafe { pg_sys::get_rel_relkind(oid) } as u8 != pg_sys::RELKIND_PARTITIONED_TABLE {
            continue;
        }
        // SAFETY: opened with a lock that lasts as long as the reference. No partition comes or goes while it is held,
        // so those that are found are those that the trigger is cloned to.
        let relation = unsafe { PgRelation::with_lock(oid, pg_sys::ShareRowExclusiveLock as i32) };
        // SAFETY: an open relation has its row of pg_class.
        let owner = unsafe { (*relation.rd_rel).relowner };
        as_owner(owner, || {
            // SAFETY: a partitioned table. What is returned lasts as long as it is open; its key is built before. One
            // that is being detached counts: it may still be seen.
            unsafe {
                let parts = &*pg_sys::RelationGetPartitionDesc(relation.as_ptr(), false);
                open.extend((0..parts.nparts as usize).map(|place| *parts.oids.add(place)));
            }
        });
        known.push(relation);
    }
    known
}

/// Creates a table's row trigger. That of a partitioned table is cloned to its partitions, present and future.
///
/// By number, not by a statement: a name may have become another table's, whose keys nobody has built.
fn create_for_rows(table: pg_sys::Oid) {
    let function = spi::run("select pg_catalog.to_regprocedure('es_sync.capture()')::oid", &[]).first::<pg_sys::Oid>(1);
    let known = with_known_keys(table);
    let mut statement = pg_sys::CreateTrigStmt {
        type_: pg_sys::NodeTag::T_CreateTrigStmt,
        trigname: c"es_sync_capture".as_ptr().cast_mut(),
        row: true,
        timing: pg_sys::TRIGGER_TYPE_AFTER as i16,
        events: (pg_sys::TRIGGER_TYPE_INSERT | pg_sys::TRIGGER_TYPE_UPDATE | pg_sys::TRIGGER_TYPE_DELETE) as i16,
        ..Default::default()
    };
    let none = pg_sys::InvalidOid;
    // SAFETY: in a transaction; the statement is complete, is only read, and outlives the call.
    unsafe {
        pg_sys::CreateTriggerFiringOn(
            &raw mut statement,
            std::ptr::null(),
            table,
            none,
            none,
            none,
            function.unwrap_or(none),
            none,
            std::ptr::null_mut(),
            false,
            false,
            // Logical replication applies its changes as a replica.
            pg_sys::TRIGGER_FIRES_ALWAYS as std::ffi::c_char,
        );
        pg_sys::CommandCounterIncrement();
    }
    // No longer: Postgres alters no table that is open.
    drop(known);
}

/// Gives a table its triggers, and its partitions theirs; it is locked for that.
pub fn create(table: &Table) {
    for (place, (oid, name)) in tree(table).into_iter().enumerate() {
        // What was a partition a moment ago has the one for TRUNCATE only.
        if place == 0 && !is_on(oid, c"es_sync_capture") {
            create_for_rows(oid);
            // So that DROP EXTENSION needs no CASCADE.
            spi::run(&format!("alter trigger es_sync_capture on {name} depends on extension pg_es_sync"), &[]);
        }
        if is_on(oid, c"es_sync_truncate") {
            continue;
        }
        if place > 0 {
            // It may have come while the table's own was switched off.
            spi::run(&format!("alter table only {name} enable always trigger es_sync_capture"), &[]);
        }
        create_for_truncate(&name);
    }
    if !partitions::are_known(table.oid) {
        partitions::remember(Some(table.oid));
    }
}

/// Truncate triggers are not cloned: one for each partition.
pub fn create_for_truncate(name: &str) {
    for statement in [
        format!(
            "create trigger es_sync_truncate after truncate on {name}
             for each statement execute function es_sync.capture()"
        ),
        // A statement that went on to partitions would need their keys.
        format!("alter table only {name} enable always trigger es_sync_truncate"),
        format!("alter trigger es_sync_truncate on {name} depends on extension pg_es_sync"),
    ] {
        spi::run(&statement, &[]);
    }
}

/// Gives a table, where it has lost one of its triggers, both of them.
pub fn renew(table: pg_sys::Oid) {
    let table = named(table);
    drop_from(&table);
    create(&table);
}

pub fn drop_from(table: &Table) {
    for (place, (_, name)) in tree(table).into_iter().enumerate() {
        if place == 0 {
            spi::run(&format!("drop trigger if exists es_sync_capture on {name}"), &[]);
        }
        spi::run(&format!("drop trigger if exists es_sync_truncate on {name}"), &[]);
    }
    partitions::forget(table.oid);
}
