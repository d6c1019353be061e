//! What is to be written down in Postgres: `changes` does that.

use super::lane::Key;
use crate::queue::claim::Place;
use crate::queue::dead_letter::DeadLetter;
use crate::queue::insert::Whole;

/// What the next transactions write down.
#[derive(Default)]
pub struct Outbox {
    pub finished: Vec<Place>,
    pub letters: Vec<DeadLetter>,
    pub cleared: Vec<(i32, Key)>,
    /// What is to be done for a table as a whole, with the queue rows that asked for it.
    pub requests: Vec<Request>,
    /// Indexes that cannot have the fields that documents have by now: attachment, whether it is still being built, why.
    pub misfits: Vec<(i32, bool, String)>,
}

/// One of those requests.
pub struct Request {
    /// The attached table.
    pub root: u32,
    pub what: Whole,
    pub places: Vec<Place>,
}

impl Outbox {
    pub fn is_empty(&self) -> bool {
        self.finished.is_empty()
            && self.letters.is_empty()
            && self.cleared.is_empty()
            && self.requests.is_empty()
            && self.misfits.is_empty()
    }

    /// The same request twice is one.
    pub fn ask(&mut self, root: u32, what: Whole, places: Vec<Place>) {
        match self.requests.iter_mut().find(|known| known.root == root && known.what == what) {
            Some(known) => known.places.extend(places),
            None => self.requests.push(Request { root, what, places }),
        }
    }
}
