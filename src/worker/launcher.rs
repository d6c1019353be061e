//! The launcher: keeps one worker in every database that has the extension, and none elsewhere.
//!
//! It belongs to no database, so it can see which there are but not what is in them: a worker is started to look, says
//! so in shared memory, and ends at once where there is nothing to do. The launcher works by state: at any moment it
//! can be killed and started again.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pgrx::bgworkers::{
    BackgroundWorker, BackgroundWorkerBuilder, BgWorkerStartTime, DynamicBackgroundWorker, SignalWakeFlags,
};
use pgrx::{FromDatum, IntoDatum, PgSqlErrorCode, pg_sys};
use rustc_hash::FxHashMap;

use crate::postgres::error::{Report, SqlError};
use crate::postgres::process::{is_alive, my_id};
use crate::postgres::transaction;
use crate::shared::{self, MAX_DATABASES, Shared};

const LIBRARY: &str = "pg_es_sync";
/// How long a worker that died is not started again.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// How long nothing is started where the server had no place for a worker, unless one ends before.
const NO_PLACE_DELAY: Duration = Duration::from_secs(5);
/// How often databases without the extension are looked at although nothing was announced.
const LOOK_AGAIN: Duration = Duration::from_secs(300);
/// How often new databases are looked for.
const INTERVAL: Duration = Duration::from_secs(10);

/// Registers the launcher. Called from `_PG_init` in the postmaster.
pub fn register() {
    BackgroundWorkerBuilder::new("es_sync launcher")
        .set_type("es_sync launcher")
        .set_library(LIBRARY)
        .set_function("es_sync_launcher_main")
        // Not on a standby: there is nothing to write, and an unlogged queue cannot be read.
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(Some(Duration::from_secs(1)))
        .enable_spi_access()
        .load();
}

enum State {
    /// A worker runs or is being started.
    Started {
        worker: DynamicBackgroundWorker,
        /// Announcements there had been by then: it need not have seen what a later one is about.
        announced: u32,
    },
    /// No extension when last looked.
    Absent { looked: Instant, until: Instant },
    /// A statement needs the database without connections.
    Held,
    /// The worker ended by itself or could not be started.
    Resting { until: Instant },
}

/// # Safety
/// Called by Postgres as the main function of a background worker.
#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub unsafe extern "C-unwind" fn es_sync_launcher_main(_argument: pg_sys::Datum) {
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP | SignalWakeFlags::SIGTERM);
    // SAFETY: a background worker's main thread; no database: shared catalogs only.
    unsafe { pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0) };
    let Some(shared) = shared::shared() else { return };
    // SAFETY: registered before the state that it cleans is set.
    unsafe { pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::from(0usize)) };
    shared.set_launcher();

    let mut states: FxHashMap<pg_sys::Oid, State> = FxHashMap::default();
    let mut seen_changes = u32::MAX;
    let mut complained = false;
    loop {
        let changes = shared.extension_changes.load(Ordering::Acquire);
        let announced = changes != seen_changes;
        seen_changes = changes;
        let timeout = match databases() {
            Ok(databases) => tend(shared, &mut states, &databases, announced, &mut complained),
            Err(error) => {
                pgrx::warning!("could not read the list of databases: {error}");
                INTERVAL
            }
        };
        // It also takes in SIGTERM, and says so.
        if !BackgroundWorker::wait_latch(Some(timeout.max(Duration::from_millis(10)))) {
            // Not 0, which would tell the postmaster never to start it again: it may have been terminated by hand.
            // SAFETY: outside any transaction, on the main thread.
            unsafe { pg_sys::proc_exit(1) };
        }
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn on_exit(_code: i32, _argument: pg_sys::Datum) {
    if let Some(shared) = shared::shared() {
        shared.clear_launcher();
    }
}

/// Starts what should run, notes what has ended; how long there is nothing to do.
fn tend(
    shared: &'static Shared,
    states: &mut FxHashMap<pg_sys::Oid, State>,
    databases: &[pg_sys::Oid],
    announced: bool,
    complained: &mut bool,
) -> Duration {
    let now = Instant::now();
    states.retain(|oid, state| {
        databases.contains(oid) || matches!(state, State::Started { worker, .. } if worker.pid().is_ok())
    });
    shared.keep_databases(|oid| {
        states.contains_key(&pg_sys::Oid::from(oid)) || databases.contains(&pg_sys::Oid::from(oid))
    });
    if announced {
        for state in states.values_mut() {
            if let State::Absent { until, .. } | State::Resting { until } = state {
                *until = now;
            }
        }
    }
    let mut timeout = INTERVAL;
    let mut places = Ok(());
    let mut turn = databases.to_vec();
    turn.sort_by_key(|oid| turn_of(states.get(oid)));
    for oid in turn {
        let next = match states.remove(&oid) {
            Some(State::Started { worker, announced }) => Some(after_start(shared, oid, worker, announced, now)),
            Some(State::Absent { looked, until }) if now < until => Some(State::Absent { looked, until }),
            Some(State::Resting { until }) if now < until => Some(State::Resting { until }),
            former if places.is_err() => former,
            former => start(shared, oid, now).map(Some).unwrap_or_else(|none| {
                places = Err(none);
                former
            }),
        };
        match &next {
            Some(State::Resting { until }) if places.is_ok() => {
                timeout = timeout.min(until.saturating_duration_since(now));
            }
            // Its end wakes the launcher; only a process that was killed says nothing.
            Some(State::Held) => timeout = timeout.min(RESTART_DELAY),
            _ => {}
        }
        states.extend(next.map(|next| (oid, next)));
    }
    match places {
        Ok(()) => *complained = false,
        Err(none) => {
            timeout = timeout.min(NO_PLACE_DELAY);
            if !std::mem::replace(complained, true) {
                none.warn();
            }
        }
    }
    timeout
}

/// Who gets what places there are before others: a database that has the extension, one that was not looked at yet, and
/// then that which was looked at longest ago.
fn turn_of(state: Option<&State>) -> (u8, Option<Instant>) {
    match state {
        Some(State::Absent { looked, .. }) => (2, Some(*looked)),
        None => (1, None),
        Some(_) => (0, None),
    }
}

fn after_start(
    shared: &Shared,
    oid: pg_sys::Oid,
    worker: DynamicBackgroundWorker,
    announced: u32,
    now: Instant,
) -> State {
    use pgrx::bgworkers::BackgroundWorkerStatus;
    match worker.pid() {
        Ok(_) | Err(BackgroundWorkerStatus::NotYetStarted) => State::Started { worker, announced },
        Err(_) if shared.holds.is_held(oid.to_u32(), is_alive) => State::Held,
        Err(_) if shared.database(oid).is_some_and(|database| database.has_extension()) => {
            State::Resting { until: now + RESTART_DELAY }
        }
        Err(_) if shared.extension_changes.load(Ordering::Acquire) != announced => State::Resting { until: now },
        Err(_) => {
            shared.release_database(oid);
            State::Absent { looked: now, until: now + LOOK_AGAIN }
        }
    }
}

/// Starts a worker, unless something else has to happen first.
///
/// # Errors
/// The server has no place for one.
fn start(shared: &Shared, oid: pg_sys::Oid, now: Instant) -> Result<State, Report> {
    if shared.holds.is_held(oid.to_u32(), is_alive) {
        return Ok(State::Held);
    }
    if shared.database(oid).and_then(|database| database.worker_pid()).is_some_and(is_alive) {
        // Started by a launcher that is gone.
        return Ok(State::Resting { until: now + RESTART_DELAY });
    }
    let is_new = shared.database(oid).is_none();
    let database = shared.take_database(oid).ok_or_else(|| {
        Report::new(PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES, "too many databases have the extension")
            .detail(format!("At most {MAX_DATABASES} databases of a server can be synced."))
    })?;
    let announced = shared.extension_changes.load(Ordering::Acquire);
    // Until the worker has looked, it counts as there: one that dies before is started again.
    database.set_has_extension(true);
    let worker = BackgroundWorkerBuilder::new(&format!("es_sync worker for database {}", oid.to_u32()))
        .set_type("es_sync worker")
        .set_library(LIBRARY)
        .set_function("es_sync_worker_main")
        .set_argument(oid.into_datum())
        // The launcher starts it again, by state.
        .set_restart_time(None)
        .set_notify_pid(my_id())
        .enable_spi_access()
        .load_dynamic();
    match worker {
        Ok(worker) => Ok(State::Started { worker, announced }),
        Err(_) => {
            if is_new {
                shared.release_database(oid);
            }
            Err(Report::new(PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES, "could not start a worker")
                .hint("Raise max_worker_processes."))
        }
    }
}

/// Databases that take connections and are no templates.
fn databases() -> Result<Vec<pg_sys::Oid>, SqlError> {
    transaction::run_without_database(|| {
        let mut databases = Vec::new();
        // SAFETY: pg_database is a shared catalog and can be read without a database; the scan is ended and the table
        // closed here, or by the abort.
        unsafe {
            let table = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as i32);
            let scan = pg_sys::table_beginscan_catalog(table, 0, std::ptr::null_mut());
            loop {
                let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
                if tuple.is_null() {
                    break;
                }
                let row = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>();
                // Less than -1: DROP DATABASE was interrupted, and nobody can connect.
                if (*row).datallowconn && !(*row).datistemplate && (*row).datconnlimit >= -1 {
                    databases.push((*row).oid);
                }
            }
            pg_sys::table_endscan(scan);
            pg_sys::table_close(table, pg_sys::AccessShareLock as i32);
        }
        databases
    })
}

/// The database that a worker was started for.
pub fn database_argument(argument: pg_sys::Datum) -> pg_sys::Oid {
    // SAFETY: `start` passes an OID.
    unsafe { pg_sys::Oid::from_datum(argument, false) }.unwrap_or(pg_sys::InvalidOid)
}
