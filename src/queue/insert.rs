//! Writing to the queue: which rows a transaction's changes become. No privileges of the writer's role are needed.

use pgrx::pg_sys;

use super::keys::Keys;
use super::table::{NewRow, Queue, Table};
use crate::capture::Changes;
use crate::shared;

/// What a row without keys asks for; in its column `count`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Whole {
    /// The table was emptied: its indexes are built anew.
    Rebuild = 0,
    /// Changes were not captured one by one: its indexes are compared with it and mended.
    Repair = 1,
    /// Rows went with a partition: its indexes may have documents without one.
    Sweep = 2,
}

impl Whole {
    pub(super) fn of(count: i32) -> Self {
        match count {
            0 => Whole::Rebuild,
            2 => Whole::Sweep,
            // Whatever it was, a comparison makes up for it.
            _ => Whole::Repair,
        }
    }
}

/// Writes the changes of `tables`, and a request to repair each table in `repair`. True if anything was written;
/// nothing is where the extension was dropped.
pub fn write(queue: Queue, tables: Vec<(u32, Changes)>, repair: &[u32]) -> bool {
    if tables.is_empty() && repair.is_empty() {
        return false;
    }
    let Some(mut writer) = Writer::open(queue) else { return false };
    for (source, mut changes) in tables {
        if changes.whole_table {
            writer.ask(source, Whole::Rebuild);
        } else if changes.unnoted && !repair.contains(&source) {
            writer.ask(source, Whole::Repair);
        } else if changes.part_emptied && !repair.contains(&source) {
            writer.ask(source, Whole::Sweep);
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
        writer.ask(*source, Whole::Repair);
    }
    writer.close();
    true
}

unsafe extern "C-unwind" {
    // Declared anew because it raises nothing, and pgrx guards each of its calls with sigsetjmp.
    fn GetCurrentTimestamp() -> pg_sys::TimestampTz;
}

struct Writer {
    table: Table,
    keys: Keys,
    now: pg_sys::TimestampTz,
}

impl Writer {
    fn open(queue: Queue) -> Option<Self> {
        let table = Table::open(queue)?;
        // SAFETY: reads the clock.
        Some(Self { table, keys: Keys::default(), now: unsafe { GetCurrentTimestamp() } })
    }

    fn make_room(&mut self, source: u32, length: usize) {
        if self.keys.is_full_for(length) {
            self.flush(source);
        }
    }

    fn flush(&mut self, source: u32) {
        if !self.keys.is_empty() {
            let mut keys = std::mem::take(&mut self.keys);
            self.insert(source, keys.count() as i32, Some(keys.bytes()));
            keys.clear();
            self.keys = keys;
        }
    }

    fn ask(&mut self, source: u32, what: Whole) {
        self.insert(source, what as i32, None);
    }

    fn insert(&mut self, source: u32, count: i32, keys: Option<&[u8]>) {
        let id = shared::shared().map_or(self.now, |shared| shared.next_queue_id());
        self.table.insert(&NewRow { id, source, count, enqueued_at: self.now, keys });
    }

    fn close(self) {
        self.table.close();
    }
}
