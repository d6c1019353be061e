//! The process of a database's worker: its start, its session, its end.

use std::cell::{Cell, RefCell};

use pgrx::{IntoDatum, pg_sys};
use rustc_hash::FxHashSet;

use super::database::Worker;
use super::launcher;
use super::ownership;
use super::version;
use crate::attachment::{captures, definition};
use crate::postgres::process::is_alive;
use crate::postgres::spi;
use crate::postgres::transaction::{self, Scope};
use crate::shared;

thread_local! {
    /// For the exit callback only: a FATAL does not unwind, so nothing is dropped.
    pub(super) static CLIENT: RefCell<Option<es::Client>> = const { RefCell::new(None) };
    pub(super) static RELATIONS_CHANGED: Cell<bool> = const { Cell::new(false) };
    /// Somebody has attached or detached: whoever does says so with his commit, also when that was prepared.
    pub(super) static ATTACHMENTS_CHANGED: Cell<bool> = const { Cell::new(false) };
    /// What documents depend on.
    pub(super) static TRACKED: RefCell<FxHashSet<Thing>> = RefCell::default();
    static CHANGED: RefCell<Changed> = RefCell::default();
}

/// What may have been altered since it was last asked.
#[derive(Default)]
pub(super) struct Changed {
    pub anything: bool,
    /// A function, though maybe none that is tracked.
    pub functions: bool,
    pub tracked: FxHashSet<Thing>,
}

/// A relation by its OID, or an entry of another system cache by its hash: invalidations tell no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Thing {
    Relation(u32),
    Cached(i32, u32),
}

impl Thing {
    pub(super) fn function(oid: u32) -> Self {
        Self::cached(pg_sys::SysCacheIdentifier::PROCOID as i32, oid)
    }

    pub(super) fn schema(oid: u32) -> Self {
        Self::cached(pg_sys::SysCacheIdentifier::NAMESPACEOID as i32, oid)
    }

    fn cached(cache: i32, oid: u32) -> Self {
        let none = pg_sys::Datum::from(0usize);
        let key = pg_sys::Datum::from(pg_sys::Oid::from(oid));
        // SAFETY: both caches have an OID as their only key; in a transaction.
        Self::Cached(cache, unsafe { pg_sys::GetSysCacheHashValue(cache, key, none, none, none) })
    }
}

/// True if a definition that documents depend on may have changed.
pub(super) fn definitions_changed() -> bool {
    // SAFETY: takes in what others have committed; the worker is between transactions.
    unsafe { pg_sys::AcceptInvalidationMessages() };
    CHANGED.with_borrow(|changed| changed.anything || !changed.tracked.is_empty())
}

/// What may have been altered; the next call says what has been since this one.
pub(super) fn take_changed() -> Changed {
    CHANGED.take()
}

unsafe extern "C-unwind" {
    // Declared anew because pgrx's own are Rust wrappers and no signal handlers. `die` ends a query in 5 ms; a flag
    // would wait for the query's end.
    fn die(signal: std::ffi::c_int);
    fn SignalHandlerForConfigReload(signal: std::ffi::c_int);
}

/// # Safety
/// Called by Postgres as the main function of a background worker.
#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub unsafe extern "C-unwind" fn es_sync_worker_main(argument: pg_sys::Datum) {
    let oid = launcher::database_argument(argument);
    let Some(shared) = shared::shared() else { return };
    let Some(database) = shared.take_database(oid) else { return };
    // SAFETY: registered before the state that it cleans is set; it lasts as long as the process.
    unsafe { pg_sys::before_shmem_exit(Some(on_exit), oid.into_datum().unwrap_or(pg_sys::Datum::from(0usize))) };
    // Before it connects, so that whoever needs the database empty knows whom to wait for.
    if !database.set_worker(is_alive) || shared.holds.is_held(oid.to_u32(), is_alive) {
        return;
    }
    // SAFETY: a background worker's main thread, at its start.
    unsafe {
        pg_sys::pqsignal(pg_sys::SIGTERM as i32, Some(die));
        pg_sys::pqsignal(pg_sys::SIGHUP as i32, Some(SignalHandlerForConfigReload));
        pg_sys::BackgroundWorkerUnblockSignals();
        pg_sys::BackgroundWorkerInitializeConnectionByOid(oid, pg_sys::InvalidOid, 0);
    }
    pin_session();
    match transaction::run(has_extension) {
        Ok(true) => {}
        Ok(false) => {
            database.set_has_extension(false);
            return;
        }
        Err(error) => {
            pgrx::warning!("could not look for the extension: {error}");
            return;
        }
    }
    // SAFETY: the callback lasts as long as the process.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), pg_sys::Datum::from(0usize));
        use pg_sys::SysCacheIdentifier::{ENUMOID, NAMESPACEOID, PROCOID};
        for cache in [ENUMOID, NAMESPACEOID, PROCOID] {
            pg_sys::CacheRegisterSyscacheCallback(cache as i32, Some(something_changed), pg_sys::Datum::from(0usize));
        }
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, std::ptr::null());
    }
    pgrx::log!("es_sync worker started");
    if !version::wait_until_objects_fit(database) {
        return;
    }
    let mut worker = Worker::new(shared, database);
    worker.run();
    if let Some(engine) = worker.engine.take() {
        engine.stop();
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn on_exit(_code: i32, argument: pg_sys::Datum) {
    let oid = launcher::database_argument(argument);
    if let Some(database) = shared::shared().and_then(|shared| shared.database(oid)) {
        database.clear_worker();
    }
    // Requests under way fail soon, so that no thread is inside one when the process ends.
    CLIENT.with(|client| {
        if let Some(client) = client.try_borrow_mut().ok().and_then(|mut client| client.take()) {
            client.shutdown();
        }
    });
    ownership::release();
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn relation_changed(_argument: pg_sys::Datum, relation: pg_sys::Oid) {
    RELATIONS_CHANGED.set(true);
    if relation == pg_sys::InvalidOid || captures::is_attachment_table(relation) {
        ATTACHMENTS_CHANGED.set(true);
    }
    note_change((relation != pg_sys::InvalidOid).then_some(Thing::Relation(relation.to_u32())));
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn something_changed(_argument: pg_sys::Datum, cache: i32, hash: u32) {
    use pg_sys::SysCacheIdentifier::{ENUMOID, PROCOID};
    // A label that was added is not tracked yet, and could be renamed.
    note_change((hash != 0 && cache != ENUMOID as i32).then_some(Thing::Cached(cache, hash)));
    if cache == PROCOID as i32 {
        CHANGED.with(|changed| changed.try_borrow_mut().map(|mut changed| changed.functions = true).ok());
    }
}

/// Notes a change; None for one that may be of anything. Nobody holds these sets while invalidations are taken in.
fn note_change(thing: Option<Thing>) {
    CHANGED.with(|changed| {
        let Ok(mut changed) = changed.try_borrow_mut() else { return };
        match thing {
            None => changed.anything = true,
            Some(thing) => {
                if TRACKED.with(|tracked| tracked.try_borrow().is_ok_and(|tracked| tracked.contains(&thing))) {
                    changed.tracked.insert(thing);
                }
            }
        }
    });
}

/// Database and role defaults must not reach the worker, and no session setting may change what is indexed.
fn pin_session() {
    let pinned = transaction::run_without_database(|| {
        for (name, value) in [
            (c"role", c"none"),
            (c"search_path", c"pg_catalog, pg_temp"),
            (c"default_transaction_isolation", c"read committed"),
            (c"default_transaction_read_only", c"off"),
            (c"default_transaction_deferrable", c"off"),
            (c"statement_timeout", c"0"),
            (c"idle_in_transaction_session_timeout", c"0"),
            (c"idle_session_timeout", c"0"),
            (c"lock_timeout", c"2s"),
            (c"plan_cache_mode", c"force_generic_plan"),
            (c"jit", c"off"),
            // What must be durable is flushed by name (versions); the rest is found again.
            (c"synchronous_commit", c"off"),
            (c"row_security", c"on"),
            // As a replica its own foreign keys would not cascade.
            (c"session_replication_role", c"origin"),
            (c"standard_conforming_strings", c"on"),
            (c"client_min_messages", c"warning"),
        ] {
            transaction::set(name, value, Scope::Session);
        }
        definition::pin_notation(Scope::Session);
    });
    if let Err(error) = pinned {
        pgrx::error!("could not set the worker's session up: {error}");
    }
}

pub(super) fn has_extension() -> bool {
    !spi::run("select from pg_catalog.pg_extension e where e.extname = 'pg_es_sync'", &[]).is_empty()
}

pub(super) fn stop_requested() -> bool {
    // SAFETY: reads a flag that `die` sets.
    unsafe { std::ptr::read_volatile(&raw const pg_sys::ProcDiePending) != 0 }
}
