//! The queue's tables below SQL: rows are written, read and deleted in place. A small transaction's row costs less than
//! a statement about it would, on both sides.

use std::cell::Cell;
use std::ffi::{CStr, c_int, c_void};

use pgrx::{PgSqlErrorCode, pg_sys};

use crate::postgres::error::Report;

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

    /// The table's name in schema es_sync.
    pub(super) fn name(self) -> &'static CStr {
        match self {
            Queue::Changes => c"queue",
            Queue::Prepared => c"prepared_queue",
        }
    }
}

/// The columns, by the definition in sql/tables.sql.
const ID: usize = 0;
const SOURCE: usize = 1;
const COUNT: usize = 2;
const ENQUEUED_AT: usize = 3;
const KEYS: usize = 4;
const COLUMNS: usize = 5;

/// A queue that is open. Its lock stays until the transaction ends: a truncation must not come between.
pub(super) struct Table {
    relation: pg_sys::Relation,
}

/// A row as it is written.
pub(super) struct NewRow<'a> {
    pub id: i64,
    pub source: u32,
    pub count: i32,
    pub enqueued_at: pg_sys::TimestampTz,
    pub keys: Option<&'a [u8]>,
}

/// A row where it lies. Nothing of it lasts.
pub(super) struct Found {
    /// Block and offset, `block << 16 | offset`.
    pub ctid: u64,
    pub id: i64,
    pub source: u32,
    pub count: i32,
    pub enqueued_at: i64,
    /// A bytea.
    pub keys: Option<pg_sys::Datum>,
    /// The transaction that wrote it.
    pub writer: u32,
}

thread_local! {
    /// The tables as last found, to be spared the look-up at each commit.
    static KNOWN: Cell<[pg_sys::Oid; 2]> = const { Cell::new([pg_sys::InvalidOid; 2]) };
}

unsafe extern "C-unwind" {
    // Declared anew because pgrx guards each of its calls against an ERROR with sigsetjmp, and this is done for every
    // row. One guard stands around all those that can raise one; the last three cannot.
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
    fn heap_fetch(
        relation: pg_sys::Relation,
        snapshot: pg_sys::Snapshot,
        tuple: pg_sys::HeapTuple,
        buffer: *mut pg_sys::Buffer,
        keep: bool,
    ) -> bool;
    fn heap_delete(
        relation: pg_sys::Relation,
        place: pg_sys::ItemPointer,
        command: pg_sys::CommandId,
        crosscheck: pg_sys::Snapshot,
        wait: bool,
        failure: *mut pg_sys::TM_FailureData,
        changes_partition: bool,
    ) -> pg_sys::TM_Result::Type;
    fn GetCurrentCommandId(used: bool) -> pg_sys::CommandId;
    fn ReleaseBuffer(buffer: pg_sys::Buffer);
    fn heap_freetuple(tuple: pg_sys::HeapTuple);
    fn table_close(relation: pg_sys::Relation, lock: pg_sys::LOCKMODE);
}

impl Table {
    /// Opens a queue, under the lock that writing takes; None where the extension was dropped.
    pub fn open(queue: Queue) -> Option<Self> {
        Self::open_known(KNOWN.get()[queue as usize], queue).or_else(|| {
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
            Self::open_known(oid, queue)
        })
    }

    /// The same; raises where it is not there.
    pub fn require(queue: Queue) -> Self {
        Self::open(queue).unwrap_or_else(|| {
            let message = format!("could not open relation \"es_sync.{}\"", queue.name().to_string_lossy());
            Report::new(PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE, message)
                .detail("It is missing, or that of another version of the extension.")
                .raise()
        })
    }

    /// Opens the table if it still is this queue; a dropped table's OID may be another's by now.
    fn open_known(oid: pg_sys::Oid, queue: Queue) -> Option<Self> {
        if oid == pg_sys::InvalidOid {
            return None;
        }
        // SAFETY: an open in a live transaction; null for a table that is gone.
        unsafe {
            let relation = pg_sys::try_table_open(oid, pg_sys::RowExclusiveLock as i32);
            if relation.is_null() {
                return None;
            }
            let table = Self { relation };
            // Another version's table has other columns; its own library is not loaded in this process.
            if (*(*relation).rd_att).natts as usize == COLUMNS
                && CStr::from_ptr((*(*relation).rd_rel).relname.data.as_ptr()) == queue.name()
            {
                return Some(table);
            }
            table.close();
            None
        }
    }

    pub fn close(self) {
        // SAFETY: opened by `open`; to give a reference back cannot raise.
        unsafe { table_close(self.relation, pg_sys::NoLock as i32) };
    }

    pub fn insert(&self, row: &NewRow) {
        let relation = self.relation;
        // SAFETY: nothing in it has a destructor, so an ERROR may leave it anywhere, and nothing panics. Five values for
        // five columns; keys and tuple are copies that are freed here. The context is restored, or by the abort after an
        // ERROR.
        unsafe {
            pg_sys::ffi::pg_guard_ffi_boundary(|| {
                // A savepoint's own context stays, with its first 8 kB, as soon as anything was allocated in it: in a
                // loop of savepoints that would add up.
                let context = pg_sys::MemoryContextSwitchTo(pg_sys::TopTransactionContext);
                let keys = row.keys.map_or(std::ptr::null_mut(), |bytes| {
                    let length = pg_sys::VARHDRSZ + bytes.len();
                    let datum = palloc(length).cast::<u8>();
                    pgrx::set_varsize_4b(datum.cast(), length as i32);
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), datum.add(pg_sys::VARHDRSZ), bytes.len());
                    datum
                });
                let mut values = [pg_sys::Datum::from(0usize); COLUMNS];
                values[ID] = pg_sys::Datum::from(row.id);
                values[SOURCE] = pg_sys::Datum::from(row.source);
                values[COUNT] = pg_sys::Datum::from(row.count);
                values[ENQUEUED_AT] = pg_sys::Datum::from(row.enqueued_at);
                values[KEYS] = pg_sys::Datum::from(keys);
                let mut nulls = [false; COLUMNS];
                nulls[KEYS] = keys.is_null();
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

    /// Hands over the rows that the active snapshot shows and that lie behind the place `after`, in the order of their
    /// places, until `take` returns false. True if all were handed over.
    pub fn scan(&self, after: u64, mut take: impl FnMut(&Found) -> bool) -> bool {
        let mut first = item_pointer(after + 1);
        let mut last = item_pointer(u64::MAX >> 16);
        let options = pg_sys::ScanOptions::SO_TYPE_TIDRANGESCAN | pg_sys::ScanOptions::SO_ALLOW_PAGEMODE;
        // SAFETY: the relation is open, and a heap (sql/tables.sql). Scan and slot end here, or with the transaction after
        // an ERROR. The slot is of the kind that holds a heap tuple in its buffer; its arrays have COLUMNS values once they
        // are taken out, of the columns' types.
        unsafe {
            let slot =
                pg_sys::MakeSingleTupleTableSlot((*self.relation).rd_att, &raw const pg_sys::TTSOpsBufferHeapTuple);
            let snapshot = pg_sys::GetActiveSnapshot();
            let scan =
                pg_sys::heap_beginscan(self.relation, snapshot, 0, std::ptr::null_mut(), std::ptr::null_mut(), options);
            pg_sys::heap_set_tidrange(scan, &raw mut first, &raw mut last);
            let mut is_wanted = true;
            while is_wanted
                && pg_sys::heap_getnextslot_tidrange(scan, pg_sys::ScanDirection::ForwardScanDirection, slot)
            {
                pg_sys::slot_getsomeattrs_int(slot, COLUMNS as c_int);
                let values = std::slice::from_raw_parts((*slot).tts_values, COLUMNS);
                let tuple = (*slot.cast::<pg_sys::BufferHeapTupleTableSlot>()).base.tuple;
                is_wanted = take(&Found {
                    ctid: ctid_of(&(*slot).tts_tid),
                    id: values[ID].value() as i64,
                    source: values[SOURCE].value() as u32,
                    count: values[COUNT].value() as i32,
                    enqueued_at: values[ENQUEUED_AT].value() as i64,
                    keys: (!*(*slot).tts_isnull.add(KEYS)).then_some(values[KEYS]),
                    writer: (*(*tuple).t_data).t_choice.t_heap.t_xmin.into_inner(),
                });
            }
            pg_sys::heap_endscan(scan);
            pg_sys::ExecDropSingleTupleTableSlot(slot);
            is_wanted
        }
    }

    /// Deletes the rows with these places and ids; those that lie there no more are passed over.
    pub fn delete(&self, rows: &[(u64, i64)]) {
        let relation = self.relation;
        let blocks = self.blocks();
        // SAFETY: reads a variable of this process; it lives as long as the transaction.
        let snapshot = unsafe { pg_sys::GetActiveSnapshot() };
        // SAFETY: nothing in it has a destructor, so an ERROR may leave it anywhere, and nothing panics; the buffer is given
        // back then by the abort. `heap_fetch` reads a place only if it lies in the table and holds a row that the snapshot
        // shows: its first column is never null, so the id is the first thing after the header.
        unsafe {
            pg_sys::ffi::pg_guard_ffi_boundary(|| {
                let command = GetCurrentCommandId(true);
                for (ctid, id) in rows {
                    if ctid >> 16 >= blocks {
                        continue;
                    }
                    let mut tuple = pg_sys::HeapTupleData { t_self: item_pointer(*ctid), ..Default::default() };
                    let mut buffer = 0;
                    if !heap_fetch(relation, snapshot, &raw mut tuple, &raw mut buffer, false) {
                        continue;
                    }
                    let begin = tuple.t_data.cast::<u8>().add((*tuple.t_data).t_hoff as usize);
                    let is_same = begin.cast::<i64>().read() == *id;
                    ReleaseBuffer(buffer);
                    if is_same {
                        let mut failure = pg_sys::TM_FailureData::default();
                        // Whatever comes of it: what somebody has deleted by hand is gone, and what he has updated is
                        // claimed again.
                        heap_delete(
                            relation,
                            &raw mut tuple.t_self,
                            command,
                            std::ptr::null_mut(),
                            true,
                            &raw mut failure,
                            false,
                        );
                    }
                }
            });
        }
    }

    pub fn blocks(&self) -> u64 {
        // SAFETY: the relation is open.
        let blocks =
            unsafe { pg_sys::RelationGetNumberOfBlocksInFork(self.relation, pg_sys::ForkNumber::MAIN_FORKNUM) };
        u64::from(blocks)
    }
}

fn ctid_of(pointer: &pg_sys::ItemPointerData) -> u64 {
    let (block, offset) = pgrx::itemptr::item_pointer_get_both(*pointer);
    u64::from(block) << 16 | u64::from(offset)
}

fn item_pointer(ctid: u64) -> pg_sys::ItemPointerData {
    let mut pointer = pg_sys::ItemPointerData::default();
    pgrx::itemptr::item_pointer_set_all(&mut pointer, (ctid >> 16) as u32, (ctid & 0xffff) as u16);
    pointer
}
