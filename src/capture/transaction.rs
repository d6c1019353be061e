//! The current transaction's pending set, and the callbacks through which it hears of its end.
//!
//! One callback of our own per backend: closures registered through pgrx are not cleared by PREPARE TRANSACTION and
//! would fire at a later, unrelated commit.

use std::cell::RefCell;

use pgrx::pg_sys;

use super::pending::{Changes, Pending};
use crate::postgres::process::my_database;
use crate::postgres::transaction;
use crate::queue::insert;
use crate::queue::table::Queue;
use crate::shared;

/// Bytes of keys that one savepoint level holds before it spills to the queue.
const SPILL_BYTES: usize = 1 << 20;
/// Most bytes of a text that is noted: values by which others find documents, and routings, are of any column. No key that
/// an index keeps unique has as many, however well it can be compressed.
pub const LONGEST: usize = 1 << 20;
/// Bytes of a buffer that is kept for the next key.
const BUFFER_BYTES: usize = 64 << 10;
/// Bytes held by all levels from which on each savepoint that is released writes its own keys.
const RELEASE_SPILL_BYTES: usize = 16 << 20;

#[derive(Default)]
struct State {
    pending: Pending,
    /// Set once the transaction's set was flushed: what is noted later is written at once, to the same queue.
    flushed: Option<Queue>,
    /// Rows were written to the queue: the worker is to be woken.
    wrote: bool,
    catalog_changed: bool,
    extension_changed: bool,
    key: String,
    part: String,
}

thread_local! {
    static STATE: RefCell<State> = RefCell::default();
}

unsafe extern "C-unwind" {
    // Declared anew because pgrx guards each of its calls against an ERROR with sigsetjmp; this one only reads a
    // variable, and runs for every changed row.
    fn GetCurrentSubTransactionId() -> pg_sys::SubTransactionId;
}

fn subtransaction() -> u32 {
    // SAFETY: reads a variable of this process; it cannot raise.
    unsafe { GetCurrentSubTransactionId() }
}

/// Notes an integer key of a table.
pub fn note_integer(source: u32, key: i64) {
    let level = subtransaction();
    let full = STATE.with_borrow_mut(|state| {
        let bytes = state.pending.note_integer(level, source, key);
        // Compacting pays only where it makes room for a good while.
        (bytes > SPILL_BYTES && state.pending.compact() > SPILL_BYTES / 2) || state.flushed.is_some()
    });
    if full {
        spill(level);
    }
}

/// Notes a key, in the text that `attachment::key` makes. Where it is too long, the whole table is compared instead.
pub fn note_key(source: u32, key: &str) {
    if key.len() > LONGEST {
        return note_unnoted(source);
    }
    let level = subtransaction();
    let full = STATE.with_borrow_mut(|state| {
        let bytes = state.pending.note_text(level, source, key);
        bytes > SPILL_BYTES || state.flushed.is_some()
    });
    if full {
        spill(level);
    }
}

/// Notes that a whole table changed.
pub fn note_whole_table(source: u32) {
    mark(source, |changes| changes.whole_table = true);
}

/// Notes that rows of a table changed, without saying which: the worker compares the whole table.
pub fn note_unnoted(source: u32) {
    mark(source, |changes| changes.unnoted = true);
}

/// Notes that a partition of a table was emptied: the worker looks for documents without a row.
pub fn note_part_emptied(source: u32) {
    mark(source, |changes| changes.part_emptied = true);
}

fn mark(source: u32, set: impl FnOnce(&mut Changes)) {
    let level = subtransaction();
    let late = STATE.with_borrow_mut(|state| {
        set(state.pending.changes(level, source));
        state.flushed.is_some()
    });
    if late {
        spill(level);
    }
}

/// Lends two buffers for making a key's text. One that a long text has made large is not kept: sessions last.
pub fn with_buffer(make: impl FnOnce(&mut String, &mut String)) {
    let (mut key, mut part) =
        STATE.with_borrow_mut(|state| (std::mem::take(&mut state.key), std::mem::take(&mut state.part)));
    key.clear();
    make(&mut key, &mut part);
    for buffer in [&mut key, &mut part] {
        if buffer.capacity() > BUFFER_BYTES {
            *buffer = String::new();
        }
    }
    STATE.with_borrow_mut(|state| (state.key, state.part) = (key, part));
}

/// Tells the worker, once this transaction has committed, that attachments or jobs changed.
pub fn announce_catalog_change() {
    STATE.with_borrow_mut(|state| {
        state.catalog_changed = true;
    });
}

/// Tells the launcher, once this transaction has committed, that the extension came or went.
pub fn announce_extension_change() {
    STATE.with_borrow_mut(|state| {
        state.extension_changed = true;
    });
}

/// Has this process, and those forked from it, hear of their transactions' ends. To be called once, when the library is
/// loaded: who registers within a transaction, and in another's callback at that, may not hear of its end.
pub fn register() {
    // SAFETY: the library is never unloaded, and the functions last as long as it does.
    unsafe {
        pg_sys::RegisterXactCallback(Some(on_transaction), std::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(on_subtransaction), std::ptr::null_mut());
    }
}

impl State {
    /// After the end of a transaction, however it ended.
    fn clear(&mut self) {
        self.pending.clear();
        self.flushed = None;
        self.wrote = false;
        self.catalog_changed = false;
        self.extension_changed = false;
    }
}

/// True where the queue takes nothing at the moment: its worker repairs everything when it does again, after every
/// transaction that has asked this has ended.
fn is_closed() -> bool {
    shared::mine().is_some_and(|database| database.queue_state() == shared::QueueState::Closed)
}

/// Writes to the queue. A writer must not fail because that is just being truncated or written anew.
fn write(queue: Queue, tables: Vec<(u32, Changes)>, repair: &[u32]) -> bool {
    transaction::without_lock_timeout(|| insert::write(queue, tables, repair))
}

/// Writes what the current savepoint level itself noted; the rows are rolled back with it.
fn spill(level: u32) {
    let (tables, queue) =
        STATE.with_borrow_mut(|state| (state.pending.spill(level), state.flushed.unwrap_or(Queue::Changes)));
    if !is_closed() && write(queue, tables, &[]) {
        STATE.with_borrow_mut(|state| state.wrote = true);
    }
}

/// Writes everything, before the transaction ends.
fn flush(queue: Queue) {
    let (tables, spilled) = STATE.with_borrow_mut(|state| {
        state.flushed = Some(queue);
        state.pending.take()
    });
    // Spilled rows lie in the unlogged queue, which a crash empties, while a prepared transaction outlives it: such a
    // transaction asks for its tables as a whole.
    let whole = if queue == Queue::Prepared { &spilled[..] } else { &[] };
    if (!tables.is_empty() || !whole.is_empty()) && !is_closed() && write(queue, tables, whole) {
        STATE.with_borrow_mut(|state| state.wrote = true);
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn on_transaction(event: pg_sys::XactEvent::Type, _argument: *mut std::ffi::c_void) {
    match event {
        pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT => flush(Queue::Changes),
        pg_sys::XactEvent::XACT_EVENT_PRE_PREPARE => flush(Queue::Prepared),
        pg_sys::XactEvent::XACT_EVENT_COMMIT => committed(),
        pg_sys::XactEvent::XACT_EVENT_ABORT | pg_sys::XactEvent::XACT_EVENT_PREPARE => {
            STATE.with(|state| state.try_borrow_mut().map(|mut state| state.clear()).ok());
        }
        _ => {}
    }
}

/// The commit record is written: nothing here may raise.
fn committed() {
    STATE.with(|state| {
        let Ok(mut state) = state.try_borrow_mut() else { return };
        let lost = !state.pending.is_empty();
        let has_news = lost || state.wrote || state.catalog_changed || state.extension_changed;
        if has_news && let Some(shared) = shared::shared() {
            let database = shared.database(my_database());
            if let Some(database) = database {
                use std::sync::atomic::Ordering;
                if lost {
                    database.note_lost();
                }
                if state.catalog_changed {
                    database.catalog_changes.fetch_add(1, Ordering::AcqRel);
                }
                if state.catalog_changed || lost {
                    database.wake_worker();
                } else if state.wrote {
                    database.announce_commit();
                }
            }
            if state.extension_changed || (state.catalog_changed && database.is_none()) {
                shared.wake_launcher();
            }
        }
        state.clear();
    });
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn on_subtransaction(
    event: pg_sys::SubXactEvent::Type,
    subtransaction: pg_sys::SubTransactionId,
    parent: pg_sys::SubTransactionId,
    _argument: *mut std::ffi::c_void,
) {
    match event {
        // A loop of savepoints cannot spill its parent's keys: from here on each writes its own.
        pg_sys::SubXactEvent::SUBXACT_EVENT_PRE_COMMIT_SUB
            if STATE.with_borrow_mut(|state| state.pending.is_beyond(RELEASE_SPILL_BYTES)) =>
        {
            spill(subtransaction);
        }
        pg_sys::SubXactEvent::SUBXACT_EVENT_COMMIT_SUB => {
            STATE.with_borrow_mut(|state| state.pending.release(subtransaction, parent));
        }
        pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB => {
            STATE.with(|state| state.try_borrow_mut().map(|mut state| state.pending.roll_back(subtransaction)).ok());
        }
        _ => {}
    }
}
