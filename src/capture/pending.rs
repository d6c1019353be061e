//! The pending set: which keys the current transaction changed, by savepoint. Plain data, no Postgres.
//!
//! A savepoint that rolls back takes its keys along and no others; one that is released hands them to its parent. What
//! is spilled to the queue early is only ever the innermost level's, because a queue row belongs to the
//! subtransaction that writes it.

use rustc_hash::FxHashSet;

/// Keys of one table. Integers, the usual case, are only appended: looking each up would cost a bulk statement more than
/// sorting them once. So a key may be there several times, until `sort` or `Pending::compact`.
#[derive(Debug, Default, PartialEq)]
pub struct Changes {
    pub integers: Vec<i64>,
    pub texts: FxHashSet<Box<str>>,
    /// The whole table changed (TRUNCATE).
    pub whole_table: bool,
    /// Rows changed that were not noted one by one.
    pub unnoted: bool,
    /// A partition of the table was emptied.
    pub part_emptied: bool,
}

impl Changes {
    /// Puts the integers in order, each once.
    pub fn sort(&mut self) {
        self.integers.sort_unstable();
        self.integers.dedup();
    }

    /// Takes in another's keys; returns the bytes of those that were here already.
    fn absorb(&mut self, mut other: Changes) -> usize {
        // Small into large: a loop of savepoints must not copy a growing parent again and again.
        if other.integers.len() > self.integers.len() {
            std::mem::swap(&mut self.integers, &mut other.integers);
        }
        self.integers.append(&mut other.integers);
        if other.texts.len() > self.texts.len() {
            std::mem::swap(&mut self.texts, &mut other.texts);
        }
        self.whole_table |= other.whole_table;
        self.unnoted |= other.unnoted;
        self.part_emptied |= other.part_emptied;
        let mut known = 0;
        for text in other.texts {
            let bytes = text_bytes(&text);
            if !self.texts.insert(text) {
                known += bytes;
            }
        }
        known
    }
}

#[derive(Debug)]
struct Level {
    subtransaction: u32,
    tables: Vec<(u32, Changes)>,
    bytes: usize,
    /// Tables of which keys went to the queue before the commit.
    spilled: Vec<u32>,
}

impl Level {
    fn new(subtransaction: u32) -> Self {
        Self { subtransaction, tables: Vec::new(), bytes: 0, spilled: Vec::new() }
    }

    fn table(&mut self, source: u32) -> &mut Changes {
        // Few tables a transaction: a search from the last one on beats a map.
        let found = self.tables.iter().rposition(|(oid, _)| *oid == source);
        let index = found.unwrap_or_else(|| {
            self.tables.push((source, Changes::default()));
            self.tables.len() - 1
        });
        &mut self.tables[index].1
    }
}

/// Everything the current transaction has noted and not yet written.
#[derive(Debug, Default)]
pub struct Pending {
    levels: Vec<Level>,
    /// Bytes that all levels held when they were last compacted.
    compacted: usize,
}

const INTEGER_BYTES: usize = size_of::<i64>();

/// What a key takes in a set, about.
fn text_bytes(key: &str) -> usize {
    48 + key.len()
}

impl Pending {
    /// Notes an integer key; returns the bytes that the innermost level holds now.
    pub fn note_integer(&mut self, subtransaction: u32, source: u32, key: i64) -> usize {
        let level = self.level(subtransaction);
        let integers = &mut level.table(source).integers;
        if integers.last() != Some(&key) {
            integers.push(key);
            level.bytes += INTEGER_BYTES;
        }
        level.bytes
    }

    /// Drops what was noted more than once; returns the bytes that the innermost level holds now.
    pub fn compact(&mut self) -> usize {
        for level in &mut self.levels {
            for (_, changes) in &mut level.tables {
                let before = changes.integers.len();
                changes.sort();
                level.bytes -= (before - changes.integers.len()) * INTEGER_BYTES;
            }
        }
        self.levels.last().map_or(0, |level| level.bytes)
    }

    /// Notes a key of any other type; returns the bytes that the innermost level holds now.
    pub fn note_text(&mut self, subtransaction: u32, source: u32, key: &str) -> usize {
        let level = self.level(subtransaction);
        let changes = level.table(source);
        if !changes.texts.contains(key) {
            changes.texts.insert(key.into());
            level.bytes += text_bytes(key);
        }
        level.bytes
    }

    /// A table's changes, to set their marks. Keys have functions of their own, which count bytes.
    pub fn changes(&mut self, subtransaction: u32, source: u32) -> &mut Changes {
        self.level(subtransaction).table(source)
    }

    /// A savepoint is released: its keys are its parent's now.
    pub fn release(&mut self, subtransaction: u32, parent: u32) {
        if self.levels.last().is_none_or(|level| level.subtransaction != subtransaction) {
            return;
        }
        let below = self.levels.len().checked_sub(2).map(|index| self.levels[index].subtransaction);
        if below != Some(parent) {
            if let Some(level) = self.levels.last_mut() {
                level.subtransaction = parent;
            }
            return;
        }
        if let (Some(child), Some(into)) = (self.levels.pop(), self.levels.last_mut()) {
            into.bytes += child.bytes;
            for (source, changes) in child.tables {
                into.bytes -= into.table(source).absorb(changes);
            }
            for source in child.spilled {
                if !into.spilled.contains(&source) {
                    into.spilled.push(source);
                }
            }
        }
    }

    /// A savepoint is rolled back: its keys never were.
    pub fn roll_back(&mut self, subtransaction: u32) {
        while self.levels.last().is_some_and(|level| level.subtransaction >= subtransaction) {
            self.levels.pop();
        }
    }

    /// Bytes held by all levels.
    pub fn bytes(&self) -> usize {
        self.levels.iter().map(|level| level.bytes).sum()
    }

    /// True if all levels hold more than `limit` bytes, not counting what was noted more than once.
    pub fn is_beyond(&mut self, limit: usize) -> bool {
        if self.bytes() <= limit {
            return false;
        }
        // Not for each savepoint: it takes the longer the more there is.
        if self.bytes() >= self.compacted + limit / 4 {
            self.compact();
            self.compacted = self.bytes();
        }
        // Compacting pays only where it makes room for a good while.
        self.bytes() > limit / 2
    }

    /// Takes what `subtransaction` itself noted, to be written under its id.
    pub fn spill(&mut self, subtransaction: u32) -> Vec<(u32, Changes)> {
        let Some(level) = self.levels.last_mut().filter(|level| level.subtransaction == subtransaction) else {
            return Vec::new();
        };
        level.bytes = 0;
        let tables = std::mem::take(&mut level.tables);
        for (source, _) in &tables {
            if !level.spilled.contains(source) {
                level.spilled.push(*source);
            }
        }
        tables
    }

    /// Takes everything, at the end of the transaction: what was noted, and the tables that had spilled before.
    pub fn take(&mut self) -> (Vec<(u32, Changes)>, Vec<u32>) {
        self.compacted = 0;
        let mut levels = self.levels.drain(..);
        let Some(mut all) = levels.next() else { return (Vec::new(), Vec::new()) };
        for level in levels {
            for (source, changes) in level.tables {
                all.table(source).absorb(changes);
            }
            all.spilled.extend(level.spilled);
        }
        all.spilled.sort_unstable();
        all.spilled.dedup();
        (all.tables, all.spilled)
    }

    /// True if nothing was noted since the last flush or spill.
    pub fn is_empty(&self) -> bool {
        self.levels.iter().all(|level| level.tables.is_empty())
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.levels.clear();
        self.compacted = 0;
    }

    fn level(&mut self, subtransaction: u32) -> &mut Level {
        if self.levels.last().is_none_or(|level| level.subtransaction != subtransaction) {
            self.levels.push(Level::new(subtransaction));
        }
        self.levels.last_mut().expect("a level was pushed if there was none")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: u32 = 100;

    fn integers(tables: &[(u32, Changes)]) -> Vec<i64> {
        let mut keys: Vec<_> = tables.iter().flat_map(|(_, changes)| changes.integers.iter().copied()).collect();
        keys.sort_unstable();
        keys
    }

    #[test]
    fn a_key_noted_twice_is_flushed_once() {
        let mut pending = Pending::default();
        pending.note_integer(1, T, 7);
        pending.note_integer(1, T, 7);
        pending.note_text(1, T, "a");
        pending.note_text(1, T, "a");
        pending.note_integer(1, T, 8);
        pending.note_integer(1, T, 7);
        let bytes = pending.bytes();
        assert_eq!(pending.compact(), bytes - INTEGER_BYTES);
        pending.note_integer(1, T, 7);
        let (mut tables, _) = pending.take();
        assert_eq!(tables.len(), 1);
        tables[0].1.sort();
        assert_eq!((tables[0].1.integers.len(), tables[0].1.texts.len()), (2, 1));
        assert!(pending.is_empty());
    }

    #[test]
    fn a_savepoint_s_keys_count_once() {
        let mut pending = Pending::default();
        pending.note_text(1, T, "a");
        let bytes = pending.bytes();
        for savepoint in 2..10 {
            pending.note_text(savepoint, T, "a");
            pending.release(savepoint, 1);
        }
        assert_eq!(pending.bytes(), bytes);
        pending.note_text(10, T, "b");
        pending.note_text(10, T, "c");
        pending.note_text(10, T, "a");
        pending.release(10, 1);
        assert_eq!(pending.bytes(), 3 * bytes);
    }

    #[test]
    fn what_is_beyond_the_limit_is_compacted_now_and_then_only() {
        let limit = 100 * INTEGER_BYTES;
        let mut pending = Pending::default();
        let note_twice = |pending: &mut Pending, key| {
            for _ in 0..2 {
                pending.note_integer(1, T, key);
                pending.note_integer(1, T, -1);
            }
        };
        (0..60).for_each(|key| note_twice(&mut pending, key));
        assert!(pending.is_beyond(limit));
        assert_eq!(pending.bytes(), 61 * INTEGER_BYTES, "each key once");
        (60..75).for_each(|key| note_twice(&mut pending, key));
        let bytes = pending.bytes();
        assert!(bytes > limit && pending.is_beyond(limit));
        assert!(pending.bytes() < bytes, "there was a quarter more");
        let compacted = pending.bytes();
        pending.note_integer(2, T, 1);
        (100..115).for_each(|key| {
            pending.note_integer(2, T, key);
        });
        pending.note_integer(2, T, 1);
        let bytes = pending.bytes();
        assert!(bytes > limit / 2 && bytes < compacted + limit / 4);
        pending.is_beyond(limit);
        assert_eq!(pending.bytes(), bytes, "and not a quarter more");
    }

    #[test]
    fn a_savepoint_that_rolls_back_takes_only_its_own_keys() {
        let mut pending = Pending::default();
        pending.note_integer(1, T, 1);
        pending.note_integer(2, T, 2);
        pending.note_integer(3, T, 3);
        pending.release(3, 2);
        pending.roll_back(2);
        assert_eq!(integers(&pending.take().0), [1]);
    }

    #[test]
    fn rows_that_were_not_noted_belong_to_their_savepoint_too() {
        let mut pending = Pending::default();
        pending.note_integer(1, T, 1);
        pending.changes(2, T).unnoted = true;
        pending.roll_back(2);
        pending.changes(3, T + 1).unnoted = true;
        pending.release(3, 1);
        let tables = pending.take().0;
        assert_eq!(
            tables.iter().map(|(source, changes)| (*source, changes.unnoted)).collect::<Vec<_>>(),
            [(T, false), (T + 1, true)]
        );
    }

    #[test]
    fn a_released_savepoint_hands_its_keys_to_its_parent() {
        let mut pending = Pending::default();
        pending.note_integer(3, T, 3); // levels 1 and 2 noted nothing
        pending.release(3, 2);
        pending.release(2, 1);
        pending.note_integer(1, T, 1);
        pending.roll_back(4);
        assert_eq!(integers(&pending.take().0), [1, 3]);
    }

    #[test]
    fn a_spill_takes_only_the_innermost_level() {
        let mut pending = Pending::default();
        pending.note_integer(1, T, 1);
        pending.note_integer(2, T, 2);
        assert_eq!(integers(&pending.spill(2)), [2]);
        assert!(pending.spill(7).is_empty());
        pending.roll_back(2);
        let (tables, spilled) = pending.take();
        assert_eq!(integers(&tables), [1]);
        assert!(spilled.is_empty(), "the level that had spilled is gone");
    }

    #[test]
    fn a_released_spill_is_remembered() {
        let mut pending = Pending::default();
        pending.note_integer(1, T, 1);
        pending.note_integer(2, T, 2);
        pending.spill(2);
        pending.release(2, 1);
        assert_eq!(pending.take().1, [T]);
    }

    #[test]
    fn a_loop_of_savepoints_costs_each_key_once() {
        let mut pending = Pending::default();
        for key in 0..100_000 {
            pending.note_integer(key as u32 + 2, T, key);
            pending.release(key as u32 + 2, 1);
        }
        assert_eq!(pending.bytes(), 100_000 * INTEGER_BYTES);
        assert_eq!(pending.take().0[0].1.integers.len(), 100_000);
    }
}
