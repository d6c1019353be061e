//! A text that one process writes and any reads.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering, fence};

/// A sentence of at most 500 bytes, written by one process and read by any.
///
/// A sequence lock: odd while it is being written. Readers try again; a writer never waits.
#[repr(C)]
pub struct Sentence {
    sequence: AtomicU32,
    length: AtomicU32,
    bytes: [AtomicU8; Sentence::BYTES],
}

impl Sentence {
    pub(super) const BYTES: usize = 500;

    pub fn set(&self, text: &str) {
        let length = text.floor_char_boundary(Sentence::BYTES);
        self.sequence.fetch_add(1, Ordering::AcqRel);
        for (cell, byte) in self.bytes.iter().zip(&text.as_bytes()[..length]) {
            cell.store(*byte, Ordering::Relaxed);
        }
        self.length.store(length as u32, Ordering::Relaxed);
        self.sequence.fetch_add(1, Ordering::AcqRel);
    }

    /// The sentence; empty if it changes so fast, or its writer died so, that no whole one can be read.
    pub fn get(&self) -> String {
        for _ in 0..100 {
            let before = self.sequence.load(Ordering::Acquire);
            let length = self.length.load(Ordering::Relaxed) as usize;
            let bytes = self.bytes.iter().take(length).map(|cell| cell.load(Ordering::Relaxed)).collect();
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && before == self.sequence.load(Ordering::Relaxed) {
                return String::from_utf8(bytes).unwrap_or_default();
            }
            std::hint::spin_loop();
        }
        String::new()
    }
}
