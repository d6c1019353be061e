//! Which tables' changes are left in the queue for now: those that are paused, and those whose index takes nothing, so
//! that they do not use up the room of all others.

use std::time::Instant;

use rustc_hash::FxHashSet;

use super::delivery::{Delivery, MAX_OUTSTANDING};
use super::fan::Held;
use super::lane::Ticket;
use crate::attachment::catalog::Attachment;

/// Tables that are passed over.
#[derive(Default)]
pub struct Hold {
    /// All their indexes are paused.
    paused: FxHashSet<u32>,
    /// Attachments, with their table, that are not loaded: what changes before their index is there would be in none.
    unread: Vec<(i32, u32)>,
    /// An index takes nothing, and its share of the room is used up.
    blocked: FxHashSet<u32>,
    /// Both, and what follows from them, when this was last asked.
    last: Held,
}

impl Hold {
    pub fn is_paused(&self, source: u32) -> bool {
        self.paused.contains(&source)
    }
}

impl Delivery {
    /// Takes in which attachments are built without reading the table.
    pub fn apply_unread(&mut self, unread: Vec<(i32, u32)>) {
        self.hold.unread = unread;
    }

    /// True while a table's changes stay in the queue.
    pub fn is_held(&self, source: u32) -> bool {
        self.hold.is_paused(source) || self.awaiting_lanes().any(|awaiting| awaiting == source)
    }

    /// Tables of which an index that nothing is loaded into has no lane yet.
    fn awaiting_lanes(&self) -> impl Iterator<Item = u32> {
        let has_lane = |attachment: i32| self.lanes.iter().any(|lane| lane.attachment == attachment);
        self.hold.unread.iter().filter(move |(attachment, _)| !has_lane(*attachment)).map(|(_, source)| *source)
    }

    /// True if nothing would be claimed, whatever is committed.
    pub fn holds_all(&self) -> bool {
        self.lanes.iter().all(|lane| self.hold.last.sources.binary_search(&lane.source).is_ok())
    }

    /// True for an index that is paused while others of its table go on: it has no lane, and misses what changes.
    pub fn is_left_out(&self, attachment: &Attachment) -> bool {
        attachment.paused && !self.hold.is_paused(attachment.relation.to_u32())
    }

    /// Takes in which indexes are paused. A table of which all are goes back to the queue with all that is not in
    /// flight; an index paused alone loses its lanes.
    pub fn apply_pauses(&mut self, attachments: &[Attachment]) {
        let goes_on = |source: u32| attachments.iter().any(|known| known.relation.to_u32() == source && !known.paused);
        self.hold.paused = attachments
            .iter()
            .filter(|known| known.paused)
            .map(|known| known.relation.to_u32())
            .filter(|source| !goes_on(*source))
            .collect();
        for attachment in attachments.iter().filter(|known| known.paused) {
            let source = attachment.relation.to_u32();
            if self.hold.is_paused(source) {
                self.unclaim(source, 0);
            } else {
                let lanes: Vec<u32> =
                    self.lanes.iter().filter(|lane| lane.attachment == attachment.id).map(|lane| lane.id).collect();
                lanes.into_iter().for_each(|lane| self.close_lane(lane));
            }
        }
        for lane in &mut self.lanes {
            lane.paused = self.hold.is_paused(lane.source);
        }
    }

    /// What is not claimed for now; true if that is something else than the last time.
    ///
    /// All tables in trouble together keep a quarter of the room; what they have claimed beyond that goes back.
    pub fn hold(&mut self, now: Instant) -> (Held, bool) {
        let mut troubled: Vec<u32> =
            self.lanes.iter().filter(|lane| lane.in_trouble(now)).map(|lane| lane.source).collect();
        troubled.sort_unstable();
        troubled.dedup();
        let share = MAX_OUTSTANDING / 4 / troubled.len().max(1);
        let mut blocked = FxHashSet::default();
        for source in troubled {
            let lanes = self.lanes.iter().filter(|lane| lane.source == source);
            let outstanding = lanes.map(|lane| lane.outstanding()).max().unwrap_or_default();
            // Once held, until the trouble is over: giving back and claiming again would alternate.
            if outstanding >= share || (self.hold.blocked.contains(&source) && outstanding > 0) {
                self.unclaim(source, share);
                blocked.insert(source);
            }
        }
        let mut held = Held { sources: self.hold.paused.union(&blocked).copied().collect(), ..Held::default() };
        held.sources.extend(self.awaiting_lanes());
        self.hold_moves(&mut held.sources);
        self.hold_links(&mut held);
        held.sources.sort_unstable();
        held.spooled.sort_unstable();
        self.hold.blocked = blocked;
        let changed = held != self.hold.last;
        self.hold.last.clone_from(&held);
        (held, changed)
    }

    /// Gives claimed rows of a table back to the queue until about `keep` of its operations are left: the newest first.
    pub(super) fn unclaim(&mut self, source: u32, keep: usize) {
        let mut claimed: Vec<(Ticket, usize)> = self
            .claimed
            .iter()
            .filter(|(_, row)| row.source == source)
            .map(|(ticket, row)| (*ticket, row.left))
            .collect();
        claimed.sort_unstable();
        let mut kept = 0;
        let mut given_back = FxHashSet::default();
        for (ticket, operations) in claimed {
            if kept >= keep {
                given_back.insert(ticket);
            }
            kept += operations;
        }
        if given_back.is_empty() {
            return;
        }
        for ticket in &given_back {
            if let Some(row) = self.claimed.remove(ticket) {
                for place in row.places {
                    self.places.remove(&place);
                }
            }
        }
        self.fans.retain(|ticket| !given_back.contains(&ticket));
        for lane in self.lanes.iter_mut().filter(|lane| lane.source == source) {
            lane.unclaim(&given_back);
        }
    }
}
