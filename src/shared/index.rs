//! What the views show of an index.

use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, AtomicU64, Ordering};

use pgrx::pg_sys;

use super::Shared;
use super::histogram::Histogram;
use super::sentence::Sentence;
use crate::postgres::process::now_micros;

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

impl Shared {
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
