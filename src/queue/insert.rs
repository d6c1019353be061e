//! Writing to the queue, below SQL: no planner, no executor, no privileges of the writer's role needed.

use std::cell::Cell;
use std::ffi::{CStr, c_int, c_void};

use pgrx::pg_sys;

use super::keys::Keys;
use crate::capture::Changes;
use crate::shared;

/// Which queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Queue {
    /// `es_sync.queue`, unlogged.
    Changes,
    /// `es_sync.prepared_queue`, logged: a prepared transaction outlives a crash, an unlogged row does not.
    Prepared,
}

impl Queue {
    pub const ALL: [Queue; 2] = [Queue::Changes, Queue::Prepared];

    /// As `table`, for Postgres' own functions.
    fn name(self) -> &'static CStr {
        match self {
            Queue::Changes => c"queue",
            Queue::Prepared => c"prepared_queue",
        }
    }

    /// The table's name in schema es_sync.
    pub fn table(self) -> &'static str {
        match self {
            Queue::Changes => "queue",
            Queue::Prepared => "prepared_queue",
        }
    }
}

const COLUMNS: usize = 5;

/// What a row without keys asks for, in its column `count`.
pub(super) const REBUILD: i32 = 0;
const REPAIR: i32 = 1;
pub(super) const SWEEP: i32 = 2;

/// Writes the changes of `tables`, and a request to repair each table in `repair`. True if anything was written;
/// nothing is where the extension was dropped.
pub fn write(queue: Queue, tables: Vec<(u32, Changes)>, repair: &[u32]) -> bool {
    if tables.is_empty() && repair.is_empty() {
        return false;
    }
    let Some(mut writer) = Writer::open(queue) else { return false };
    for (source, mut changes) in tables {
        if changes.whole_table {
            writer.insert(source, Err(REBUILD));
        } else if changes.unnoted && !repair.contains(&source) {
            writer.insert(source, Err(REPAIR));
        } else if changes.part_emptied && !repair.contains(&source) {
            writer.insert(source, Err(SWEEP));
        }
        // In order: neighbours take less room, and the worker reads them together.
        changes.sort();
        for key in changes.integers {
            writer.make_room(source, 0);
            writer.keys.push_integer(key);
        }
        writer.flush(source);
        for key in changes.texts {
            writer.make_room(source, key.len());
            writer.keys.push_text(&key);
        }
        writer.flush(source);
    }
    for source in repair {
        writer.insert(*source, Err(REPAIR));
    }
    writer.close();
    true
}

thread_local! {
    /// The queues' tables as last found, to be spared the look-up at each commit.
    static KNOWN: Cell<[pg_sys::Oid; 2]> = const { Cell::new([pg_sys::InvalidOid; 2]) };
}

/// Opens the table if it still is this queue; a dropped table's OID may be another's by now.
fn open(oid: pg_sys::Oid, queue: Queue) -> Option<pg_sys::Relation> {
    if oid == pg_sys::InvalidOid {
        return None;
    }
    // SAFETY: an open in a live transaction; null for a table that is gone.
    unsafe {
        let relation = pg_sys::try_table_open(oid, pg_sys::RowExclusiveLock as i32);
        if relation.is_null() {
            return None;
        }
        // Another version's table has other columns; its own library is not loaded in this process.
        if (*(*relation).rd_att).natts as usize == COLUMNS
            && CStr::from_ptr((*(*relation).rd_rel).relname.data.as_ptr()) == queue.name()
        {
            return Some(relation);
        }
        pg_sys::table_close(relation, pg_sys::NoLock as i32);
        None
    }
}

unsafe extern "C-unwind" {
    // Declared anew because pgrx guards each of its calls against an ERROR with sigsetjmp, and this is done for every
    // transaction. The last two raise none; one guard stands around all the others together.
    fn palloc(size: usize) -> *mut c_void;
    fn pfree(pointer: *mut c_void);
    fn heap_form_tuple(row: pg_sys::TupleDesc, values: *mut pg_sys::Datum, nulls: *mut bool) -> pg_sys::HeapTuple;
    fn heap_insert(
        relation: pg_sys::Relation,
        tuple: pg_sys::HeapTuple,
        command: pg_sys::CommandId,
        options: c_int,
        state: *mut pg_sys::BulkInsertStateData,
    );
    fn heap_freetuple(tuple: pg_sys::HeapTuple);
    fn GetCurrentCommandId(used: bool) -> pg_sys::CommandId;
    fn GetCurrentTimestamp() -> pg_sys::TimestampTz;
    fn table_close(relation: pg_sys::Relation, lock: pg_sys::LOCKMODE);
}

struct Writer {
    relation: pg_sys::Relation,
    keys: Keys,
    now: pg_sys::TimestampTz,
}

impl Writer {
    fn open(queue: Queue) -> Option<Self> {
        let relation = open(KNOWN.get()[queue as usize], queue).or_else(|| {
            // SAFETY: syscache lookups in a live transaction.
            let oid = unsafe {
                let schema = pg_sys::get_namespace_oid(c"es_sync".as_ptr(), true);
                if schema == pg_sys::InvalidOid {
                    return None;
                }
                pg_sys::get_relname_relid(queue.name().as_ptr(), schema)
            };
            let mut known = KNOWN.get();
            known[queue as usize] = oid;
            KNOWN.set(known);
            open(oid, queue)
        })?;
        // SAFETY: reads the clock; it cannot raise.
        Some(Self { relation, keys: Keys::default(), now: unsafe { GetCurrentTimestamp() } })
    }

    fn make_room(&mut self, source: u32, length: usize) {
        if self.keys.is_full_for(length) {
            self.flush(source);
        }
    }

    fn flush(&mut self, source: u32) {
        if !self.keys.is_empty() {
            let mut keys = std::mem::take(&mut self.keys);
            self.insert(source, Ok(&keys));
            keys.clear();
            self.keys = keys;
        }
    }

    fn insert(&mut self, source: u32, keys: Result<&Keys, i32>) {
        let id = shared::shared().map_or(self.now, |shared| shared.next_queue_id());
        let (count, bytes) = match keys {
            Ok(keys) => (keys.count() as i32, Some(keys.bytes())),
            Err(request) => (request, None),
        };
        let (relation, now) = (self.relation, self.now);
        // SAFETY: nothing in it has a destructor, so an ERROR may leave it anywhere. Five values for five columns, by the
        // definition in sql/tables.sql; keys and tuple are copies that are freed here. The context is restored, or by the
        // abort after an ERROR.
        unsafe {
            pg_sys::ffi::pg_guard_ffi_boundary(|| {
                // A savepoint's own context stays, with its first 8 kB, as soon as anything was allocated in it: in a
                // loop of savepoints that would add up.
                let context = pg_sys::MemoryContextSwitchTo(pg_sys::TopTransactionContext);
                let keys = bytes.map_or(std::ptr::null_mut(), |bytes| {
                    let length = pg_sys::VARHDRSZ + bytes.len();
                    let datum = palloc(length).cast::<u8>();
                    pgrx::set_varsize_4b(datum.cast(), length as i32);
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), datum.add(pg_sys::VARHDRSZ), bytes.len());
                    datum
                });
                let mut values = [
                    pg_sys::Datum::from(id),
                    pg_sys::Datum::from(source),
                    pg_sys::Datum::from(count),
                    pg_sys::Datum::from(now),
                    pg_sys::Datum::from(keys),
                ];
                let mut nulls = [false, false, false, false, keys.is_null()];
                let tuple = heap_form_tuple((*relation).rd_att, values.as_mut_ptr(), nulls.as_mut_ptr());
                heap_insert(relation, tuple, GetCurrentCommandId(true), 0, std::ptr::null_mut());
                heap_freetuple(tuple);
                if !keys.is_null() {
                    pfree(keys.cast());
                }
                pg_sys::MemoryContextSwitchTo(context);
            });
        }
    }

    fn close(self) {
        // SAFETY: opened by `open`; to give a reference back cannot raise. The lock stays until the commit: a truncation of
        // the queue must not come between.
        unsafe { table_close(self.relation, pg_sys::NoLock as i32) };
    }
}
