//! Shared memory: who to wake, counters, and what the views show without reading the queue.
//! Runs in: every process; the postmaster sets it up.
//! May touch: atomics and latches only. No locks, so that it may be used after a commit record is written.
//!
//! A `database` with its worker, the counters of an `index`, a `waiter` in `es_sync.wait()`, and the `holds` that keep
//! workers away; all made of atomics, some of which are a `sentence` or a `histogram`. The memory itself is here.

mod database;
mod histogram;
mod holds;
mod index;
mod sentence;
mod waiter;

use std::sync::atomic::{AtomicI32, AtomicI64, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use crossbeam_utils::CachePadded;
use pgrx::pg_sys;

pub use database::{Breaker, Database, QueueState, note_failure};
use holds::Holds;
pub use index::Index;
pub use waiter::Waiter;

use crate::postgres::latch;
use crate::postgres::process::{my_database, now_micros};

/// Databases that can have the extension at the same time on one server.
pub const MAX_DATABASES: usize = 64;
/// Indexes, over all databases, whose counters the views show.
pub const MAX_INDEXES: usize = 512;
/// Calls of `es_sync.wait()` that can wait at the same time.
pub const MAX_WAITERS: usize = 64;

/// All of it. Zeroed memory is a valid value: each field is an atomic.
#[repr(C)]
pub struct Shared {
    launcher: AtomicI32,
    /// Raised when the extension may have come or gone somewhere.
    pub extension_changes: AtomicU32,
    /// Apart, as each commit writes it while others read what is beside it.
    queue_ids: CachePadded<AtomicI64>,
    pub holds: Holds,
    databases: [Database; MAX_DATABASES],
    indexes: [Index; MAX_INDEXES],
    waiters: [Waiter; MAX_WAITERS],
}

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());
/// Drawn by the postmaster and inherited by its children: it survives a crash of theirs, and no copy of the server has it.
static NONCE: AtomicU64 = AtomicU64::new(0);
static mut PREVIOUS_REQUEST: pg_sys::shmem_request_hook_type = None;
static mut PREVIOUS_STARTUP: pg_sys::shmem_startup_hook_type = None;

/// The shared memory; None where the library was not preloaded.
pub fn shared() -> Option<&'static Shared> {
    // SAFETY: either null or set at start to memory that lasts as long as the server, holding only atomics.
    unsafe { SHARED.load(Ordering::Relaxed).as_ref() }
}

/// The entry of this process's database; None where no worker has ever run in it.
pub fn mine() -> Option<&'static Database> {
    shared()?.database(my_database())
}

/// Tells this server's run from every other server's, and from any other run of its own.
pub fn server_nonce() -> u64 {
    NONCE.load(Ordering::Relaxed)
}

/// Asks for the memory. Called from `_PG_init` in the postmaster.
pub fn install_hooks() {
    NONCE.store(fastrand::u64(1..), Ordering::Relaxed);
    // SAFETY: the postmaster has a single thread, and hooks are chained as Postgres expects.
    unsafe {
        PREVIOUS_REQUEST = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(request);
        PREVIOUS_STARTUP = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(startup);
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn request() {
    // SAFETY: called by the postmaster once, at the time when memory may be requested.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST {
            previous();
        }
        pg_sys::RequestAddinShmemSpace(size_of::<Shared>());
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn startup() {
    // SAFETY: called by the postmaster at start and after each crash, before any other process can see the memory.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP {
            previous();
        }
        let mut found = false;
        let memory: *mut Shared =
            pg_sys::ShmemInitStruct(c"pg_es_sync".as_ptr(), size_of::<Shared>(), &mut found).cast();
        if !found {
            memory.write_bytes(0, 1);
            // Ids must not repeat among rows that survived a clean restart: start from the clock.
            (*memory).queue_ids.store(now_micros(), Ordering::Relaxed);
        }
        SHARED.store(memory, Ordering::Release);
    }
}

impl Shared {
    /// A new id for a queue row: unique among the rows that exist, growing, not in commit order.
    pub fn next_queue_id(&self) -> i64 {
        self.queue_ids.fetch_add(1, Ordering::Relaxed)
    }

    /// Ids begin behind this one, at the least: rows may lie in a queue from before the clock was set back.
    pub fn raise_queue_ids(&self, highest: i64) {
        self.queue_ids.fetch_max(highest + 1, Ordering::SeqCst);
    }

    /// An id that no row committed before this call has reached.
    pub fn queue_mark(&self) -> i64 {
        self.queue_ids.fetch_add(1, Ordering::SeqCst)
    }

    /// Makes this process the launcher, until `clear_launcher`.
    pub fn set_launcher(&self) {
        self.launcher.store(latch::my_procno() + 1, Ordering::Release);
    }

    pub fn clear_launcher(&self) {
        self.launcher.store(0, Ordering::Release);
    }

    /// Tells the launcher that the extension may have come or gone in some database.
    pub fn wake_launcher(&self) {
        self.extension_changes.fetch_add(1, Ordering::AcqRel);
        self.nudge_launcher();
    }

    /// Has the launcher look at what should run.
    pub fn nudge_launcher(&self) {
        latch::wake(self.launcher.load(Ordering::Acquire) - 1);
    }
}
