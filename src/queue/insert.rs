//! Writing to the queue: which rows a transaction's changes become. No privileges of the writer's role are needed.

use pgrx::pg_sys;

use super::keys::Keys;
use super::table::{NewRow, Queue, Table};
use crate::capture::Changes;
use crate::shared;

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
            self.insert(source, Ok(&keys));
            keys.clear();
            self.keys = keys;
        }
    }

    fn insert(&mut self, source: u32, keys: Result<&Keys, i32>) {
        let (count, keys) = match keys {
            Ok(keys) => (keys.count() as i32, Some(keys.bytes())),
            Err(request) => (request, None),
        };
        let id = shared::shared().map_or(self.now, |shared| shared.next_queue_id());
        self.table.insert(&NewRow { id, source, count, enqueued_at: self.now, keys });
    }

    fn close(self) {
        self.table.close();
    }
}
