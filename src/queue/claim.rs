//! The worker's side of the queue: claiming, acknowledging, counting.
//!
//! A claim only reads. A row leaves the queue when all it asked for is done, so whatever the worker forgets (it died,
//! it let an index wait) is claimed again.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use pgrx::pg_sys;

use super::insert::{Queue, REBUILD, SWEEP};
use super::keys;
use super::spool::LAST_SPOOLED;
use crate::postgres::spi::{self, Plan};
use crate::postgres::transaction::{self, Scope};

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
    Keys(Vec<String>),
    /// The whole table was emptied: its indexes are built anew.
    Rebuild,
    /// Changes of the table were not captured one by one: its indexes are compared with it and mended.
    Repair,
    /// A partition was emptied: documents without a row are looked for.
    Sweep,
}

/// Walks through a queue in the order of its blocks, again and again.
///
/// Where a walk takes long, because rows are passed over (a paused table's, say), only a third of the time goes into
/// whole walks; in between it looks at the end, where new rows are as a rule.
pub struct Claims {
    queue: Queue,
    plan: Option<Plan>,
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

/// Whoever wrote a row longer ago than this has ended, unless it was prepared.
const ENDING: Duration = Duration::from_secs(60);

/// Rows taken from the cursor at once.
const FETCH: i64 = 200;

impl Claims {
    pub fn new(queue: Queue) -> Self {
        Self { queue, plan: None, after: 0, walked: Duration::ZERO, end: 0, next_walk: None, owed: false }
    }

    /// Claims rows until `max_keys` keys are found; rows that are `known`, and those of the sources in `held`, are passed
    /// over, and of those in `held_spooled` what the worker itself has written. True with the rows if there may be more.
    pub fn claim(
        &mut self,
        max_keys: usize,
        held: &[u32],
        held_spooled: &[u32],
        known: impl Fn(&Place) -> bool,
    ) -> (Vec<Row>, bool) {
        prefer_tid_scans();
        let plan = self.plan.get_or_insert_with(|| {
            Plan::prepare(
                &format!(
                    "select q.ctid, q.id, q.source, q.keys, q.enqueued_at, q.count, q.xmin
                     from es_sync.{} q
                     where q.ctid > $1 and q.source <> all ($2) and (q.id > {LAST_SPOOLED} or q.source <> all ($3))",
                    self.queue.table()
                ),
                &[pg_sys::TIDOID, pg_sys::OIDARRAYOID, pg_sys::OIDARRAYOID],
            )
        });
        let started = Instant::now();
        if self.after == 0 {
            if self.next_walk.is_some_and(|next| next > started) {
                self.after = self.end;
                self.owed = true;
            } else {
                self.walked = Duration::ZERO;
                self.owed = false;
                // Before the scan: what is written while it runs must lie behind this.
                self.end = if self.next_walk.is_some() { last_block(self.queue) } else { 0 };
            }
        }
        let mut rows = Vec::new();
        let mut found = 0;
        let mut last_writer = 0;
        // SAFETY: reads the clock.
        let recent = unsafe { pg_sys::GetCurrentTimestamp() } - ENDING.as_micros() as i64;
        let from_start = self.after == 0;
        // A look at the end ends there.
        let at_end = self.owed;
        let mut pointer = item_pointer(self.after);
        let oids =
            |sources: &[u32]| -> Vec<pg_sys::Oid> { sources.iter().map(|source| pg_sys::Oid::from(*source)).collect() };
        let held = [held, held_spooled].map(|sources| spi::value(oids(sources)));
        let cursor = plan.open(&[Some(pg_sys::Datum::from(&raw mut pointer)), held[0], held[1]]);
        loop {
            let fetched = cursor.fetch(FETCH);
            let ended = (fetched.len() as i64) < FETCH;
            for row in 0..fetched.len() {
                let Some(ctid) = fetched.datum(row, 1).map(ctid_of) else { continue };
                self.after = ctid;
                let (Some(id), Some(source)) = (fetched.get::<i64>(row, 2), fetched.get::<pg_sys::Oid>(row, 3)) else {
                    continue;
                };
                let place = Place { queue: self.queue, ctid, id };
                if known(&place) {
                    continue;
                }
                let enqueued_at = fetched.datum(row, 5).map_or(0, |datum| datum.value() as i64);
                let writer = fetched.datum(row, 7).map_or(0, |datum| datum.value() as u32);
                if writer != last_writer && (self.queue == Queue::Prepared || enqueued_at > recent) {
                    let_end(writer);
                }
                last_writer = writer;
                let row_keys = fetched.with_bytes(row, 4, keys::decode);
                found += row_keys.iter().flatten().map(Vec::len).next().unwrap_or(1);
                let asked = match row_keys {
                    Some(Some(keys)) => Asked::Keys(keys),
                    // Nobody writes what cannot be read; whatever it was, a comparison makes up for it.
                    Some(None) => Asked::Repair,
                    None => match fetched.get::<i32>(row, 6) {
                        Some(REBUILD) => Asked::Rebuild,
                        Some(SWEEP) => Asked::Sweep,
                        _ => Asked::Repair,
                    },
                };
                rows.push(Row { place, source: source.to_u32(), asked, enqueued_at });
                if found >= max_keys {
                    // The rest of what was fetched is found again by the next claim.
                    cursor.close();
                    self.walked += in_vain(started, rows.len(), found);
                    return (rows, true);
                }
            }
            fetched.free();
            if ended {
                cursor.close();
                // Rows may have been written into free space before this place: the next claim starts over.
                self.after = 0;
                if at_end {
                    return (rows, false);
                }
                self.walked += in_vain(started, rows.len(), found);
                self.next_walk = (self.walked > LONG_WALK).then(|| Instant::now() + self.walked * 2);
                return (rows, !from_start);
            }
        }
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

thread_local! {
    /// The statements that delete finished rows, kept prepared: to plan one costs more than to run it.
    static DELETES: RefCell<[Option<Plan>; 2]> = const { RefCell::new([None, None]) };
}

/// Deletes finished rows.
pub fn acknowledge(places: &[Place]) {
    prefer_tid_scans();
    for queue in Queue::ALL {
        let mine = || places.iter().filter(move |place| place.queue == queue);
        let ctids: Vec<String> =
            mine().map(|place| format!("({},{})", place.ctid >> 16, place.ctid & 0xffff)).collect();
        if ctids.is_empty() {
            continue;
        }
        let ids: Vec<i64> = mine().map(|place| place.id).collect();
        // Taken out while it runs: an ERROR must not find it borrowed. It then is prepared anew.
        let plan = DELETES.with_borrow_mut(|plans| plans[queue as usize].take()).unwrap_or_else(|| {
            Plan::prepare(
                &format!(
                    "delete from es_sync.{} q
                     using rows from (pg_catalog.unnest($1::pg_catalog.tid[]), pg_catalog.unnest($2)) a (ctid, id)
                     where q.ctid = a.ctid and q.id = a.id",
                    queue.table()
                ),
                &[pg_sys::TEXTARRAYOID, pg_sys::INT8ARRAYOID],
            )
        });
        plan.execute(&[spi::value(ctids), spi::value(ids)], 0);
        DELETES.with_borrow_mut(|plans| plans[queue as usize] = Some(plan));
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
        &[(pg_sys::INT8OID, spi::value(mark)), (pg_sys::OIDARRAYOID, spi::value(sources))],
    );
    rows.get::<bool>(0, 1) == Some(false)
}

/// When to ask `is_clear` again: it reads the queue, and with a large backlog that may take no more than a tenth of the
/// time.
pub fn next_look(started: Instant, every: Duration) -> Instant {
    let ended = Instant::now();
    ended + every.max((ended - started) * 10)
}

/// True if the queue holds every change since the marker was written: a crash or a promotion empties an unlogged
/// queue and its marker with it; a promotion or a recovery to some point leaves a logged one behind the time.
pub fn has_marker() -> bool {
    !spi::run("select from es_sync.marker m where m.timeline = $1", &[(pg_sys::INT8OID, spi::value(timeline()))])
        .is_empty()
}

fn timeline() -> i64 {
    // SAFETY: reads a variable in shared memory; the server is not in recovery where a worker runs.
    i64::from(unsafe { pg_sys::GetWALInsertionTimeLine() })
}

/// Writes the marker, in the transaction that asked for everything to be repaired.
pub fn write_marker() {
    spi::run(
        "insert into es_sync.marker as m (timeline) values ($1)
         on conflict (only_one) do update set timeline = excluded.timeline, written_at = excluded.written_at",
        &[(pg_sys::INT8OID, spi::value(timeline()))],
    );
}

/// Removes the marker: from here on the queue is not trusted to hold every change.
pub fn remove_marker() {
    spi::run("delete from es_sync.marker", &[]);
}

/// What a scan took beyond what its rows and keys account for.
fn in_vain(started: Instant, rows: usize, keys: usize) -> Duration {
    started.elapsed().saturating_sub(Duration::from_micros(20 * rows as u64 + keys as u64))
}

/// Where the last block of a queue begins, as `Place::ctid` counts.
fn last_block(queue: Queue) -> u64 {
    let rows = spi::run(
        &format!(
            "select pg_catalog.pg_relation_size('es_sync.{}') / pg_catalog.current_setting('block_size')::pg_catalog.int8",
            queue.table()
        ),
        &[],
    );
    let blocks = rows.get::<i64>(0, 1).unwrap_or_default().max(0) as u64;
    blocks.saturating_sub(1) << 16
}

/// A sequential scan reads dead rows from the beginning each time: draining a large backlog would be quadratic.
fn prefer_tid_scans() {
    transaction::set(c"enable_seqscan", c"off", Scope::Local);
}

fn ctid_of(datum: pg_sys::Datum) -> u64 {
    // SAFETY: a tid datum points to an ItemPointerData.
    let (block, offset) =
        pgrx::itemptr::item_pointer_get_both(unsafe { *datum.cast_mut_ptr::<pg_sys::ItemPointerData>() });
    u64::from(block) << 16 | u64::from(offset)
}

fn item_pointer(ctid: u64) -> pg_sys::ItemPointerData {
    let mut pointer = pg_sys::ItemPointerData::default();
    pgrx::itemptr::item_pointer_set_all(&mut pointer, (ctid >> 16) as u32, (ctid & 0xffff) as u16);
    pointer
}
