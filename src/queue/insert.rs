//! Writing to the queue, below SQL: no planner, no executor, no privileges of the writer's role needed.

use std::cell::Cell;
use std::ffi::CStr;

use pgrx::{IntoDatum, pg_sys};

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

/// Largest array of keys in one row, in bytes: with its header the row still fits a page, so nothing is toasted.
const MAX_ARRAY_BYTES: usize = 7_900;
const COLUMNS: usize = 5;

/// What a row without keys asks for, in its column `count`.
const REBUILD: i32 = 0;
const REPAIR: i32 = 1;
const SWEEP: i32 = 2;

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
        // In order, because the worker then reads neighbours together.
        changes.sort();
        let mut text = itoa::Buffer::new();
        for key in changes.integers {
            writer.push(source, text.format(key));
        }
        for key in changes.texts {
            writer.push(source, &key);
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

struct Writer {
    relation: pg_sys::Relation,
    array: TextArray,
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
        // SAFETY: reads the clock.
        Some(Self { relation, array: TextArray::new(), now: unsafe { pg_sys::GetCurrentTimestamp() } })
    }

    fn push(&mut self, source: u32, key: &str) {
        if !self.array.is_empty() && self.array.length_with(key) > MAX_ARRAY_BYTES {
            self.flush(source);
        }
        self.array.push(key);
    }

    fn flush(&mut self, source: u32) {
        if !self.array.is_empty() {
            let mut array = std::mem::replace(&mut self.array, TextArray::new());
            self.insert(source, Ok(&mut array));
            self.array = array.cleared();
        }
    }

    fn insert(&mut self, source: u32, keys: Result<&mut TextArray, i32>) {
        let (count, array) = match keys {
            Ok(keys) => (keys.count, Some(pg_sys::Datum::from(keys.finished()))),
            Err(request) => (request, None),
        };
        let id = shared::shared().map_or(self.now, |shared| shared.next_queue_id());
        let mut values = [
            pg_sys::Datum::from(id),
            pg_sys::Oid::from(source).into_datum().unwrap_or(pg_sys::Datum::from(0usize)),
            pg_sys::Datum::from(count),
            pg_sys::Datum::from(self.now),
            array.unwrap_or(pg_sys::Datum::from(0usize)),
        ];
        let mut nulls = [false, false, false, false, array.is_none()];
        // SAFETY: five values for five columns, by the definition in sql/tables.sql; the array outlives the call, and
        // the tuple is a copy that is freed here. The context is restored, or by the abort if this raises.
        unsafe {
            // A savepoint's own context stays, with its first 8 kB, as soon as anything was allocated in it: in a loop
            // of savepoints that would add up.
            let context = pg_sys::MemoryContextSwitchTo(pg_sys::TopTransactionContext);
            let tuple = pg_sys::heap_form_tuple((*self.relation).rd_att, values.as_mut_ptr(), nulls.as_mut_ptr());
            pg_sys::heap_insert(self.relation, tuple, pg_sys::GetCurrentCommandId(true), 0, std::ptr::null_mut());
            pg_sys::heap_freetuple(tuple);
            pg_sys::MemoryContextSwitchTo(context);
        }
    }

    fn close(self) {
        // SAFETY: opened by `open`. The lock stays until the commit: a truncation of the queue must not come between.
        unsafe { pg_sys::table_close(self.relation, pg_sys::NoLock as i32) };
    }
}

/// A one-dimensional `text[]` as Postgres stores it, built in place: a palloc per key would dominate a large flush.
struct TextArray {
    /// In 8-byte units, because a varlena must be aligned.
    words: Vec<u64>,
    length: usize,
    count: i32,
}

/// vl_len_, ndim, dataoffset, elemtype, one dimension, one lower bound: six int4.
const ARRAY_HEADER: usize = 24;

impl TextArray {
    fn new() -> Self {
        Self { words: Vec::new(), length: ARRAY_HEADER, count: 0 }
    }

    fn cleared(mut self) -> Self {
        self.length = ARRAY_HEADER;
        self.count = 0;
        self
    }

    fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn length_with(&self, key: &str) -> usize {
        (self.length + 4 + key.len()).next_multiple_of(4)
    }

    fn push(&mut self, key: &str) {
        let end = self.length_with(key);
        if self.words.len() * 8 < end {
            // Twice as much each time, up to a page: most transactions change a row or two.
            let most = end.max(MAX_ARRAY_BYTES);
            self.words.resize((end * 2).clamp(256, most.max(256)).div_ceil(8), 0);
        }
        let start = self.length;
        let bytes = self.bytes();
        // An element is a text with a four-byte header: its length, header included, shifted left by two.
        bytes[start..start + 4].copy_from_slice(&varlena_header(4 + key.len()));
        bytes[start + 4..start + 4 + key.len()].copy_from_slice(key.as_bytes());
        bytes[start + 4 + key.len()..end].fill(0);
        self.length = end;
        self.count += 1;
    }

    fn bytes(&mut self) -> &mut [u8] {
        let length = self.words.len() * 8;
        // SAFETY: u64 has no padding and any bytes are valid.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), length) }
    }

    /// The array with its header; valid until the next change.
    fn finished(&mut self) -> *const std::ffi::c_void {
        let (length, count) = (self.length, self.count);
        let bytes = self.bytes();
        bytes[..4].copy_from_slice(&varlena_header(length));
        let header: [i32; 5] = [1, 0, pg_sys::TEXTOID.to_u32() as i32, count, 1];
        for (index, field) in header.iter().enumerate() {
            bytes[4 + index * 4..8 + index * 4].copy_from_slice(&field.to_ne_bytes());
        }
        self.words.as_ptr().cast()
    }
}

/// SET_VARSIZE for a four-byte header.
fn varlena_header(length: usize) -> [u8; 4] {
    let length = length as u32;
    if cfg!(target_endian = "little") { (length << 2).to_ne_bytes() } else { length.to_ne_bytes() }
}
