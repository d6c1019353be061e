//! Shared memory: who to wake, counters, and what the views show without reading the queue.
//! Runs in: every process; the postmaster sets it up.
//! May touch: atomics and latches only. No locks, so that it may be used after a commit record is written.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use crossbeam_utils::CachePadded;
use pgrx::pg_sys;

use crate::postgres::latch;

/// Databases that can have the extension at the same time on one server.
pub const MAX_DATABASES: usize = 64;
/// Indexes, over all databases, whose counters the views show.
pub const MAX_INDEXES: usize = 512;
/// Statements that can keep workers out of a database at the same time.
const MAX_HOLDS: usize = 64;
/// Calls of `es_sync.wait()` that can wait at the same time.
pub const MAX_WAITERS: usize = 64;
/// Failures of a database that `es_sync.health()` remembers.
const MAX_FAILURES: usize = 10;

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

/// Databases that must stay without a worker for a moment, and the processes that want it so: the OID in the high half
/// of a place, the process id in the low one; 0 for a free place.
#[repr(C)]
pub struct Holds {
    places: [AtomicU64; MAX_HOLDS],
}

/// One database with a worker.
#[repr(C)]
pub struct Database {
    oid: AtomicU32,
    /// Slot in the process array plus one; 0 where no worker runs.
    worker: AtomicI32,
    worker_pid: AtomicI32,
    /// Whether the last worker that looked found the extension.
    has_extension: AtomicBool,
    /// Raised when attachments or jobs changed.
    pub catalog_changes: AtomicU32,
    /// Notes that came too late to be flushed; the worker then repairs everything.
    pub lost_notes: AtomicU32,
    /// So many of them are covered by a repair.
    pub repaired_notes: AtomicU32,
    /// Grows with each commit that wrote to the queue. Apart, for the same reason.
    commits: CachePadded<AtomicU64>,
    /// The worker sleeps, and a commit is to wake it.
    listening: AtomicBool,
    /// A `QueueState`.
    queue_state: AtomicU32,
    /// Why the worker does not go on: a sentence; empty when it does.
    state: Sentence,
    /// Since when there has been something in the way, Postgres' microseconds.
    since: AtomicI64,
    /// Product and version of the engine, once it has said so.
    pub engine: Sentence,
    breaker: AtomicU8,
    /// When the worker asks the engine again, Postgres' microseconds; 0 while nothing holds it back.
    pub next_try: AtomicI64,
    failures: [FailureNote; MAX_FAILURES],
}

/// One of the last failures.
#[repr(C)]
struct FailureNote {
    /// Postgres' microseconds; 0 while it is free or being written.
    at: AtomicI64,
    /// 0 for what concerns no single index.
    attachment: AtomicI32,
    text: Sentence,
}

/// A failure as it is shown.
pub struct Failure {
    pub at: i64,
    pub attachment: i32,
    pub text: String,
}

/// Whether the worker asks the engine: its breaker's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breaker {
    Closed,
    Open,
    HalfOpen,
}

/// Whether the queue takes changes. Written by the worker, read by writers.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(u32)]
pub enum QueueState {
    Open = 0,
    Closed = 1,
    /// Takes changes again, but may have missed some.
    Reopening = 2,
}

/// Counters of one index.
#[repr(C)]
pub struct Index {
    database: AtomicU32,
    attachment: AtomicI32,
    pub pending: AtomicU64,
    /// When the oldest pending change was enqueued, Postgres' microseconds; 0 for none.
    pub oldest: AtomicI64,
    pub indexed: AtomicU64,
    pub deleted: AtomicU64,
    pub refused: AtomicU64,
    pub retried: AtomicU64,
    pub batches: AtomicU64,
    pub latency: Histogram,
    /// Why the last request or document failed: a sentence; empty when all is well.
    pub cause: Sentence,
    /// When the cause came up, Postgres' microseconds.
    pub since: AtomicI64,
}

/// A call of `es_sync.wait()`.
#[repr(C)]
pub struct Waiter {
    state: AtomicU32,
    /// Grows with each use of the place, so that a late answer cannot reach the next caller.
    serial: AtomicU32,
    pub database: AtomicU32,
    /// 0 for all sources.
    pub source: AtomicU32,
    /// Queue rows with a lower id must be gone.
    pub mark: AtomicI64,
    pub procno: AtomicI32,
    pub pid: AtomicI32,
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
            (*memory).queue_ids.store(pg_sys::GetCurrentTimestamp(), Ordering::Relaxed);
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

    /// The entry of a database, if a worker has ever run in it.
    pub fn database(&self, oid: pg_sys::Oid) -> Option<&Database> {
        self.databases.iter().find(|database| database.oid.load(Ordering::Acquire) == oid.to_u32())
    }

    /// The entry of a database, taken if there is none yet; None when all are taken.
    pub fn take_database(&self, oid: pg_sys::Oid) -> Option<&Database> {
        // Its own first: a place before it may have become free, and two entries would tell different things.
        self.database(oid).or_else(|| {
            let take = |database: &&Database| {
                database.oid.compare_exchange(0, oid.to_u32(), Ordering::AcqRel, Ordering::Acquire).is_ok()
            };
            self.databases.iter().find(take)
        })
    }

    /// Frees the entry of a database that does not have the extension.
    pub fn release_database(&self, oid: pg_sys::Oid) {
        if let Some(database) = self.database(oid) {
            self.free(database);
        }
    }

    /// Frees the entries of databases that are gone.
    pub fn keep_databases(&self, exists: impl Fn(u32) -> bool) {
        for database in &self.databases {
            let oid = database.oid.load(Ordering::Acquire);
            if oid != 0 && !exists(oid) {
                self.free(database);
            }
        }
    }

    /// Frees an entry, unless a worker has it.
    fn free(&self, database: &Database) {
        if database.worker.load(Ordering::Acquire) == 0 {
            database.forget();
            let oid = database.oid.swap(0, Ordering::AcqRel);
            self.free_indexes(oid, |_| false);
        }
    }

    /// The counters of an attachment's index, if its worker has published any.
    pub fn index(&self, database: pg_sys::Oid, attachment: i32) -> Option<&Index> {
        self.indexes.iter().find(|index| index.is(database.to_u32(), attachment))
    }

    /// The counters of an attachment's index, taken if there are none yet. Only the database's worker calls this.
    pub fn take_index(&self, database: pg_sys::Oid, attachment: i32) -> Option<&Index> {
        let oid = database.to_u32();
        self.index(database, attachment).or_else(|| {
            let free = self
                .indexes
                .iter()
                .find(|index| index.database.compare_exchange(0, oid, Ordering::AcqRel, Ordering::Acquire).is_ok())?;
            free.reset();
            free.attachment.store(attachment, Ordering::Release);
            Some(free)
        })
    }

    /// The latency that a share `quantile` of all changes of a database kept to, in microseconds.
    pub fn latency(&self, database: pg_sys::Oid, quantile: f64) -> Option<u64> {
        let oid = database.to_u32();
        let indexes = self.indexes.iter().filter(|index| index.database.load(Ordering::Acquire) == oid);
        let mut counts = vec![0; Histogram::BUCKETS];
        for index in indexes {
            counts.iter_mut().zip(index.latency.counts()).for_each(|(sum, count)| *sum += count);
        }
        Histogram::quantile_of(&counts, quantile)
    }

    /// Frees the counters of a database's attachments that are gone.
    pub fn free_indexes(&self, database: u32, keep: impl Fn(i32) -> bool) {
        for index in &self.indexes {
            if index.database.load(Ordering::Acquire) == database && !keep(index.attachment.load(Ordering::Acquire)) {
                index.database.store(0, Ordering::Release);
            }
        }
    }

    /// Takes a place to wait; None while all are taken. `is_alive` tells whether a process still runs: one that was
    /// terminated could not give its place back.
    pub fn take_waiter(&self, is_alive: impl Fn(i32) -> bool) -> Option<&Waiter> {
        let take = |waiter: &Waiter, from| {
            let taken = waiter.state.compare_exchange(from, FILLING, Ordering::AcqRel, Ordering::Acquire).is_ok();
            if taken {
                // Before its fields change.
                waiter.serial.fetch_add(1, Ordering::AcqRel);
            }
            taken
        };
        self.waiters.iter().find(|waiter| take(waiter, FREE)).or_else(|| {
            self.waiters.iter().find(|waiter| {
                let state = waiter.state.load(Ordering::Acquire);
                state != FILLING && !is_alive(waiter.pid.load(Ordering::Relaxed)) && take(waiter, state)
            })
        })
    }

    /// Requests of `es_sync.wait()` in a database that are not answered yet.
    pub fn waiting(&self, database: pg_sys::Oid) -> impl Iterator<Item = &Waiter> {
        self.waiters.iter().filter(move |waiter| {
            waiter.state.load(Ordering::Acquire) == WAITING
                && waiter.database.load(Ordering::Relaxed) == database.to_u32()
        })
    }
}

impl Holds {
    /// Keeps workers out of `database` until `release`, or the end of process `owner`. False if there is no place left.
    pub fn take(&self, database: u32, owner: i32, is_alive: impl Fn(i32) -> bool) -> bool {
        let hold = u64::from(database) << 32 | u64::from(owner as u32);
        let taken = self.places.iter().any(|place| {
            let old = place.load(Ordering::Acquire);
            (old == 0 || !is_alive(old as u32 as i32))
                && place.compare_exchange(old, hold, Ordering::AcqRel, Ordering::Acquire).is_ok()
        });
        // Paired with the one in `set_worker`: either the owner sees the worker, or the worker sees the hold.
        fence(Ordering::SeqCst);
        taken
    }

    /// Gives back what process `owner` has taken.
    pub fn release(&self, owner: i32) {
        for place in &self.places {
            if place.load(Ordering::Acquire) as u32 == owner as u32 {
                place.store(0, Ordering::Release);
            }
        }
    }

    /// True while a process that is alive keeps workers out of `database`.
    pub fn is_held(&self, database: u32, is_alive: impl Fn(i32) -> bool) -> bool {
        self.places.iter().any(|place| {
            let hold = place.load(Ordering::Acquire);
            (hold >> 32) as u32 == database && hold != 0 && is_alive(hold as u32 as i32)
        })
    }
}

impl Database {
    /// Makes this process the database's worker, until `clear_worker`; false while another process is.
    pub fn set_worker(&self, is_alive: impl Fn(i32) -> bool) -> bool {
        let old = self.worker_pid.load(Ordering::Acquire);
        let mine = std::process::id() as i32;
        if (old != 0 && is_alive(old))
            || self.worker_pid.compare_exchange(old, mine, Ordering::AcqRel, Ordering::Acquire).is_err()
        {
            return false;
        }
        self.worker.store(latch::my_procno() + 1, Ordering::Release);
        fence(Ordering::SeqCst);
        true
    }

    /// Only where this process is the worker.
    pub fn clear_worker(&self) {
        if self.worker_pid() == Some(std::process::id() as i32) {
            self.worker.store(0, Ordering::Release);
            self.worker_pid.store(0, Ordering::Release);
        }
    }

    /// The worker says whether it found the extension.
    pub fn set_has_extension(&self, found: bool) {
        self.has_extension.store(found, Ordering::Release);
    }

    pub fn has_extension(&self) -> bool {
        self.has_extension.load(Ordering::Acquire)
    }

    /// Process id of the worker; None where none runs.
    pub fn worker_pid(&self) -> Option<i32> {
        Some(self.worker_pid.load(Ordering::Acquire)).filter(|pid| *pid != 0)
    }

    pub fn queue_state(&self) -> QueueState {
        match self.queue_state.load(Ordering::Acquire) {
            1 => QueueState::Closed,
            2 => QueueState::Reopening,
            _ => QueueState::Open,
        }
    }

    pub fn set_queue_state(&self, state: QueueState) {
        self.queue_state.store(state as u32, Ordering::Release);
    }

    /// Tells the worker of a commit that wrote to the queue. A system call only where the worker sleeps and wants to
    /// hear of it: a signal for each commit would cost a writer more than all of capture.
    pub fn announce_commit(&self) {
        self.commits.fetch_add(1, Ordering::SeqCst);
        if self.listening.load(Ordering::SeqCst) && self.listening.swap(false, Ordering::SeqCst) {
            self.wake_worker();
        }
    }

    /// How many commits were announced. What they wrote is in every snapshot taken after this.
    pub fn commits(&self) -> u64 {
        self.commits.load(Ordering::SeqCst)
    }

    /// The worker says whether the next commit is to wake it. To be followed by a look at `commits`: who commits sees
    /// either this, or is seen there.
    pub fn listen(&self, listening: bool) {
        self.listening.store(listening, Ordering::SeqCst);
    }

    /// Sets the worker's latch.
    pub fn wake_worker(&self) {
        latch::wake(self.worker.load(Ordering::Acquire) - 1);
    }

    /// Says what stands in the worker's way; empty for nothing.
    pub fn set_state(&self, state: &str) {
        if state.is_empty() {
            self.since.store(0, Ordering::Relaxed);
        } else if self.since.load(Ordering::Relaxed) == 0 {
            self.since.store(now_micros(), Ordering::Relaxed);
        }
        self.state.set(state);
    }

    /// What stands in the worker's way, and since when; None for nothing.
    pub fn state(&self) -> Option<(String, i64)> {
        Some(self.state.get())
            .filter(|state| !state.is_empty())
            .map(|state| (state, self.since.load(Ordering::Relaxed)))
    }

    pub fn set_breaker(&self, breaker: Breaker) {
        self.breaker.store(breaker as u8, Ordering::Relaxed);
    }

    pub fn breaker(&self) -> Breaker {
        match self.breaker.load(Ordering::Relaxed) {
            1 => Breaker::Open,
            2 => Breaker::HalfOpen,
            _ => Breaker::Closed,
        }
    }

    /// Remembers a failure, in the place of the oldest; one that was there already is only renewed. Only the worker
    /// calls this.
    fn note_failure(&self, attachment: i32, text: &str) {
        let text = &text[..text.floor_char_boundary(Sentence::BYTES)];
        let same =
            |note: &&FailureNote| note.attachment.load(Ordering::Relaxed) == attachment && note.text.get() == text;
        let oldest = || self.failures.iter().min_by_key(|note| note.at.load(Ordering::Relaxed));
        if let Some(note) = self.failures.iter().find(same).or_else(oldest) {
            note.at.store(0, Ordering::Release);
            note.attachment.store(attachment, Ordering::Relaxed);
            note.text.set(text);
            note.at.store(now_micros(), Ordering::Release);
        }
    }

    /// The last failures, the latest first.
    pub fn failures(&self) -> Vec<Failure> {
        let mut failures: Vec<Failure> = self
            .failures
            .iter()
            .map(|note| {
                let at = note.at.load(Ordering::Acquire);
                let (attachment, text) = (note.attachment.load(Ordering::Relaxed), note.text.get());
                // Written anew meanwhile: not shown this time.
                let whole = note.at.load(Ordering::Acquire) == at;
                Failure { at: if whole { at } else { 0 }, attachment, text }
            })
            .filter(|failure| failure.at != 0)
            .collect();
        failures.sort_by_key(|failure| std::cmp::Reverse(failure.at));
        failures
    }

    /// The next database in this place must not show what happened in this one.
    fn forget(&self) {
        self.set_queue_state(QueueState::Open);
        self.set_state("");
        self.engine.set("");
        self.set_breaker(Breaker::Closed);
        self.next_try.store(0, Ordering::Relaxed);
        for note in &self.failures {
            note.at.store(0, Ordering::Release);
            note.text.set("");
        }
    }
}

/// Remembers a failure of an index of this database (0: of none in particular) for `es_sync.health()`. The text must
/// quote no document. Only the worker calls this.
pub fn note_failure(attachment: i32, text: &str) {
    // SAFETY: reads a variable of this process.
    let database = shared().and_then(|shared| shared.database(unsafe { pg_sys::MyDatabaseId }));
    if let Some(database) = database {
        database.note_failure(attachment, text);
    }
}

fn now_micros() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

impl Index {
    fn is(&self, database: u32, attachment: i32) -> bool {
        self.database.load(Ordering::Acquire) == database && self.attachment.load(Ordering::Acquire) == attachment
    }

    fn reset(&self) {
        for counter in [&self.pending, &self.indexed, &self.deleted, &self.refused, &self.retried, &self.batches] {
            counter.store(0, Ordering::Relaxed);
        }
        self.oldest.store(0, Ordering::Relaxed);
        self.since.store(0, Ordering::Relaxed);
        self.latency.reset();
        self.cause.set("");
    }

    /// Notes why work on this index does not go on; an empty cause when it does. True if that is new.
    pub fn set_cause(&self, cause: &str) -> bool {
        let new = self.cause.get() != cause;
        if new {
            self.cause.set(cause);
            self.since.store(now_micros(), Ordering::Relaxed);
        }
        new
    }
}

const FREE: u32 = 0;
const FILLING: u32 = 1;
const WAITING: u32 = 2;
const DONE: u32 = 3;

impl Waiter {
    /// Publishes the request, once its fields are filled.
    pub fn publish(&self) {
        self.state.store(WAITING, Ordering::Release);
    }

    /// True once the worker has answered.
    pub fn is_done(&self) -> bool {
        self.state.load(Ordering::Acquire) == DONE
    }

    pub fn serial(&self) -> u32 {
        self.serial.load(Ordering::Acquire)
    }

    /// Answers request `serial` and wakes the caller, unless he has given up meanwhile.
    pub fn answer(&self, serial: u32) {
        if self.serial() == serial
            && self.state.compare_exchange(WAITING, DONE, Ordering::AcqRel, Ordering::Acquire).is_ok()
        {
            latch::wake(self.procno.load(Ordering::Relaxed));
        }
    }

    /// Gives the place back.
    pub fn release(&self) {
        self.state.store(FREE, Ordering::Release);
    }
}

/// A sentence of at most 500 bytes, written by one process and read by any.
///
/// A sequence lock: odd while it is being written. Readers try again; a writer never waits.
#[repr(C)]
pub struct Sentence {
    sequence: AtomicU32,
    length: AtomicU32,
    bytes: [AtomicU8; Sentence::BYTES],
}

impl Sentence {
    const BYTES: usize = 500;

    pub fn set(&self, text: &str) {
        let length = text.floor_char_boundary(Sentence::BYTES);
        self.sequence.fetch_add(1, Ordering::AcqRel);
        for (cell, byte) in self.bytes.iter().zip(&text.as_bytes()[..length]) {
            cell.store(*byte, Ordering::Relaxed);
        }
        self.length.store(length as u32, Ordering::Relaxed);
        self.sequence.fetch_add(1, Ordering::AcqRel);
    }

    /// The sentence; empty if it changes so fast, or its writer died so, that no whole one can be read.
    pub fn get(&self) -> String {
        for _ in 0..100 {
            let before = self.sequence.load(Ordering::Acquire);
            let length = self.length.load(Ordering::Relaxed) as usize;
            let bytes = self.bytes.iter().take(length).map(|cell| cell.load(Ordering::Relaxed)).collect();
            std::sync::atomic::fence(Ordering::Acquire);
            if before.is_multiple_of(2) && before == self.sequence.load(Ordering::Relaxed) {
                return String::from_utf8(bytes).unwrap_or_default();
            }
            std::hint::spin_loop();
        }
        String::new()
    }
}

/// Latencies in microseconds, sixteen buckets to a power of two, up to six days. Within a bucket a quantile is
/// interpolated, so that it errs by a sixteenth at most, and as a rule by far less.
#[repr(C)]
pub struct Histogram {
    buckets: [AtomicU64; Histogram::BUCKETS],
}

impl Histogram {
    const STEPS: usize = 16;
    const BUCKETS: usize = 36 * Histogram::STEPS;

    fn reset(&self) {
        for bucket in &self.buckets {
            bucket.store(0, Ordering::Relaxed);
        }
    }

    /// Counts `count` changes that took so long.
    pub fn record(&self, micros: u64, count: u64) {
        self.buckets[Self::bucket(micros)].fetch_add(count, Ordering::Relaxed);
    }

    /// The latency, in microseconds, that a share `quantile` (0 to 1) of all changes kept to; None without any.
    pub fn quantile(&self, quantile: f64) -> Option<u64> {
        Self::quantile_of(&self.counts(), quantile)
    }

    fn counts(&self) -> Vec<u64> {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect()
    }

    fn quantile_of(counts: &[u64], quantile: f64) -> Option<u64> {
        let total: u64 = counts.iter().sum();
        let wanted = ((total as f64 * quantile).ceil() as u64).max(1);
        let mut seen = 0;
        let bucket = counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        })?;
        let (first, last) = (Self::lower_bound(bucket), Self::lower_bound(bucket + 1) - 1);
        let share = (wanted + counts[bucket] - seen) as f64 / counts[bucket] as f64;
        Some(first + ((last - first) as f64 * share) as u64)
    }

    fn bucket(micros: u64) -> usize {
        let steps = Self::STEPS as u64;
        let shift = micros.checked_ilog2().unwrap_or(0).saturating_sub(steps.ilog2());
        // The steps of a power of two are numbered from 16 to 31: its highest bit stands in for the power's own.
        (shift as usize * Self::STEPS + (micros >> shift) as usize).min(Self::BUCKETS - 1)
    }

    fn lower_bound(bucket: usize) -> u64 {
        if bucket < Self::STEPS {
            return bucket as u64;
        }
        let shift = bucket / Self::STEPS - 1;
        ((Self::STEPS + bucket % Self::STEPS) as u64) << shift
    }
}

#[cfg(test)]
mod tests {
    use super::Histogram;

    #[test]
    fn a_latency_falls_into_the_bucket_whose_bounds_hold_it() {
        for micros in (0..64).chain([100, 999, 1_000, 65_535, 65_536, 1_000_000, 86_400_000_000]) {
            let bucket = Histogram::bucket(micros);
            assert!(Histogram::lower_bound(bucket) <= micros, "{micros}");
            assert!(Histogram::lower_bound(bucket + 1) > micros, "{micros}");
        }
        assert_eq!(Histogram::bucket(u64::MAX), Histogram::BUCKETS - 1);
    }

    #[test]
    fn a_quantile_is_read_within_a_sixteenth() {
        let mut counts = vec![0; Histogram::BUCKETS];
        (1..=10_000).for_each(|micros| counts[Histogram::bucket(micros)] += 1);
        for (quantile, exact) in [(0.0001, 1.0), (0.5, 5_000.0), (0.99, 9_900.0), (0.999, 9_990.0), (1.0, 10_000.0)] {
            let read = Histogram::quantile_of(&counts, quantile).expect("there are latencies") as f64;
            assert!((read - exact).abs() <= exact / 16.0, "{quantile}: {read}");
        }
        assert_eq!(Histogram::quantile_of(&[0; Histogram::BUCKETS], 0.5), None);
    }
}
