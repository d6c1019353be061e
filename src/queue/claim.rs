//! The worker's side of the queue: claiming, acknowledging, counting.
//!
//! A claim only reads. A row leaves the queue when all it asked for is done, so whatever the worker forgets (it died,
//! it let an index wait) is claimed again.

use std::time::{Duration, Instant};

use pgrx::pg_sys;
use smallvec::SmallVec;

use super::insert::Whole;
use super::keys::{self, Key};
use super::spool::LAST_SPOOLED;
use super::table::{Found, Queue, Table};
use crate::postgres::process::now_micros;
use crate::postgres::spi;

/// Where a row lies. The id guards against a slot that was used again (VACUUM FULL).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    pub queue: Queue,
    /// Block and offset, `block << 16 | offset`.
    pub ctid: u64,
    pub id: i64,
}

/// A claimed row.
#[derive(Debug)]
pub struct Row {
    pub place: Place,
    pub source: u32,
    pub asked: Asked,
    /// Postgres' microseconds.
    pub enqueued_at: i64,
}

/// What a row asks for.
#[derive(Debug)]
pub enum Asked {
    Keys(SmallVec<[Key; 1]>),
    Whole(Whole),
}

/// Walks through a queue in the order of its blocks, again and again.
///
/// Where a walk takes long, because rows are passed over (a paused table's, say), only a third of the time goes into
/// whole walks; in between it looks at the end, where new rows are as a rule.
pub struct Claims {
    queue: Queue,
    after: u64,
    /// How long this walk has taken so far, without what was claimed.
    walked: Duration,
    /// The last block's beginning when the last whole walk began; rows that came later are behind it, or in free space.
    end: u64,
    /// No whole walk before this.
    next_walk: Option<Instant>,
    /// Only the end was looked at since the last whole walk.
    owed: bool,
}

/// A walk that takes longer is not begun again at once.
const LONG_WALK: Duration = Duration::from_millis(10);

/// A claim ends with the row that brings it beyond so many bytes of keys: those of a link are values of any column.
const MAX_BYTES: usize = 64 << 20;

/// Whoever wrote a row longer ago than this has ended, unless it was prepared.
const ENDING: Duration = Duration::from_secs(60);

impl Claims {
    pub fn new(queue: Queue) -> Self {
        Self { queue, after: 0, walked: Duration::ZERO, end: 0, next_walk: None, owed: false }
    }

    /// Claims rows until `max_keys` keys are found, or what takes much memory; rows that are `known`, and those of the
    /// sources in `held`, are passed over, and of those in `held_spooled` what the worker itself has written. True with the
    /// rows if there may be more.
    pub fn claim(
        &mut self,
        max_keys: usize,
        held: &[u32],
        held_spooled: &[u32],
        known: impl Fn(&Place) -> bool,
    ) -> (Vec<Row>, bool) {
        let table = Table::require(self.queue);
        let started = Instant::now();
        if self.after == 0 {
            if self.next_walk.is_some_and(|next| next > started) {
                self.after = self.end;
                self.owed = true;
            } else {
                self.walked = Duration::ZERO;
                self.owed = false;
                // Before the scan: what is written while it runs must lie behind this.
                self.end = table.blocks().saturating_sub(1) << 16;
            }
        }
        let mut rows = Vec::new();
        let (mut keys_found, mut bytes_found) = (0, 0);
        let mut last_writer = 0;
        let recent = now_micros() - ENDING.as_micros() as i64;
        let from_start = self.after == 0;
        let mut after = self.after;
        let ended = table.scan(after, |found| {
            after = found.ctid;
            let place = Place { queue: self.queue, ctid: found.ctid, id: found.id };
            if held.contains(&found.source)
                || (found.id <= LAST_SPOOLED && held_spooled.contains(&found.source))
                || known(&place)
            {
                return true;
            }
            if found.writer != last_writer && (self.queue == Queue::Prepared || found.enqueued_at > recent) {
                let_end(found.writer);
            }
            last_writer = found.writer;
            let asked = Asked::of(found);
            keys_found += if let Asked::Keys(keys) = &asked { keys.len() } else { 1 };
            bytes_found += asked.bytes();
            rows.push(Row { place, source: found.source, asked, enqueued_at: found.enqueued_at });
            keys_found < max_keys && bytes_found < MAX_BYTES
        });
        table.close();
        if !ended {
            self.after = after;
            self.walked += in_vain(started, rows.len(), keys_found);
            return (rows, true);
        }
        // Rows may have been written into free space before this place: the next claim starts over.
        self.after = 0;
        if self.owed {
            // A look at the end ends there.
            return (rows, false);
        }
        self.walked += in_vain(started, rows.len(), keys_found);
        self.next_walk = (self.walked > LONG_WALK).then(|| Instant::now() + self.walked * 2);
        (rows, !from_start)
    }

    /// When a whole walk is due because only the end was looked at; None if it is not.
    pub fn due(&self) -> Option<Instant> {
        self.next_walk.filter(|_| self.owed)
    }

    /// Starts over, after a truncation.
    pub fn rewind(&mut self) {
        self.after = 0;
        self.next_walk = None;
        self.owed = false;
    }
}

/// A transaction is seen as committed a moment before it has told others which definitions it changed. Rows read in
/// between would be read by an old plan: without the partition that it attached, say.
fn let_end(writer: u32) {
    let writer = pg_sys::TransactionId::from(writer);
    // SAFETY: waits for a lock that the transaction gives up last; it has committed, and waits for nobody.
    unsafe {
        pg_sys::XactLockTableWait(writer, std::ptr::null_mut(), std::ptr::null_mut(), pg_sys::XLTW_Oper::XLTW_None)
    };
}

impl Asked {
    fn of(row: &Found) -> Self {
        match row.keys {
            // SAFETY: the column is a bytea.
            Some(keys) => match unsafe { spi::with_bytes(keys, keys::decode) } {
                Some(keys) => Asked::Keys(keys),
                // Nobody writes what cannot be read; whatever it was, a comparison makes up for it.
                None => Asked::Whole(Whole::Repair),
            },
            None => Asked::Whole(Whole::of(row.count)),
        }
    }

    /// Bytes of its keys.
    fn bytes(&self) -> usize {
        match self {
            Asked::Keys(keys) => keys.iter().map(|key| key.len()).sum(),
            Asked::Whole(_) => 0,
        }
    }
}

/// Deletes finished rows.
pub fn acknowledge(places: &[Place]) {
    for queue in Queue::ALL {
        let mine = places.iter().filter(|place| place.queue == queue);
        let mut rows: Vec<(u64, i64)> = mine.map(|place| (place.ctid, place.id)).collect();
        if !rows.is_empty() {
            // Neighbours share a page.
            rows.sort_unstable();
            let table = Table::require(queue);
            table.delete(&rows);
            table.close();
        }
    }
}

/// What waits for one table.
pub struct Backlog {
    pub source: u32,
    /// Keys in the queue, those in flight included.
    pub keys: u64,
    /// When the oldest of them was enqueued, Postgres' microseconds.
    pub oldest: i64,
}

/// Counts what the queues hold. Reads them whole.
pub fn backlog() -> Vec<Backlog> {
    let rows = spi::run(
        "select q.source, pg_catalog.sum(q.count)::pg_catalog.int8, pg_catalog.min(q.enqueued_at)
         from (select source, count, enqueued_at from es_sync.queue
               union all
               select source, count, enqueued_at from es_sync.prepared_queue) q
         group by q.source",
        &[],
    );
    (0..rows.len())
        .filter_map(|row| {
            Some(Backlog {
                source: rows.get::<pg_sys::Oid>(row, 1)?.to_u32(),
                keys: rows.get::<i64>(row, 2)?.max(0) as u64,
                oldest: rows.datum(row, 3)?.value() as i64,
            })
        })
        .collect()
}

/// True if no row with an id below `mark` is left of the given sources (none: of any).
pub fn is_clear(mark: i64, sources: &[u32]) -> bool {
    let sources: Vec<pg_sys::Oid> = sources.iter().map(|source| pg_sys::Oid::from(*source)).collect();
    let rows = spi::run(
        "select exists (select from es_sync.queue q where q.id < $1 and ($2 = '{}' or q.source = any ($2)))
             or exists (select from es_sync.prepared_queue q where q.id < $1 and ($2 = '{}' or q.source = any ($2)))",
        &[spi::parameter(mark), spi::parameter(sources)],
    );
    rows.get::<bool>(0, 1) == Some(false)
}

/// The highest id in the queues; 0 where they are empty. Reads them whole.
pub fn highest_id() -> i64 {
    let rows = spi::run(
        "select greatest((select max(q.id) from es_sync.queue q), (select max(q.id) from es_sync.prepared_queue q), 0)",
        &[],
    );
    rows.first(1).unwrap_or_default()
}

/// When to ask `is_clear` again: it reads the queue, and with a large backlog that may take no more than a tenth of the
/// time.
pub fn next_look(started: Instant, every: Duration) -> Instant {
    let ended = Instant::now();
    ended + every.max((ended - started) * 10)
}

/// What a scan took beyond what its rows and keys account for.
fn in_vain(started: Instant, rows: usize, keys: usize) -> Duration {
    started.elapsed().saturating_sub(Duration::from_micros(20 * rows as u64 + keys as u64))
}
