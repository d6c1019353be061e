//! A database that has a worker: whom to wake, whether its queue takes changes, what is in its worker's way.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use crossbeam_utils::CachePadded;
use pgrx::pg_sys;

use super::sentence::Sentence;
use super::{Shared, mine};
use crate::postgres::latch;
use crate::postgres::process::{my_id, now_micros};

/// Failures of a database that `es_sync.health()` remembers.
const MAX_FAILURES: usize = 10;

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
    lost_notes: AtomicU32,
    /// So many of them are covered by a repair.
    repaired_notes: AtomicU32,
    /// Grows with each commit that wrote to the queue. Apart, as `Shared::queue_ids` is.
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

impl Shared {
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
}

impl Database {
    /// Makes this process the database's worker, until `clear_worker`; false while another process is.
    pub fn set_worker(&self, is_alive: impl Fn(i32) -> bool) -> bool {
        let old = self.worker_pid.load(Ordering::Acquire);
        if (old != 0 && is_alive(old))
            || self.worker_pid.compare_exchange(old, my_id(), Ordering::AcqRel, Ordering::Acquire).is_err()
        {
            return false;
        }
        self.worker.store(latch::my_procno() + 1, Ordering::Release);
        fence(Ordering::SeqCst);
        true
    }

    /// Only where this process is the worker.
    pub fn clear_worker(&self) {
        if self.worker_pid() == Some(my_id()) {
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

    /// A note came too late to be flushed.
    pub fn note_lost(&self) {
        self.lost_notes.fetch_add(1, Ordering::AcqRel);
    }

    /// How many notes were lost so far; None where a repair covers them all.
    pub fn lost_notes(&self) -> Option<u32> {
        let lost = self.lost_notes.load(Ordering::Acquire);
        (lost != self.repaired_notes.load(Ordering::Acquire)).then_some(lost)
    }

    /// A repair covers the first so many of them.
    pub fn note_repaired(&self, lost: u32) {
        self.repaired_notes.store(lost, Ordering::Release);
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
    if let Some(database) = mine() {
        database.note_failure(attachment, text);
    }
}
