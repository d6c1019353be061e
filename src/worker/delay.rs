//! Option `delay`: the changes of a document gather in its lane for so long, then it is read and sent once.
//!
//! The first of them stays in the queue meanwhile and stands for the others, which are acknowledged at once: so neither
//! queue nor memory grows with the number of changes, and whatever becomes of the worker, none is lost. Whoever waits for
//! changes (`es_sync.wait`, the end of a build, a comparison's second look) has them sent at once.

use super::delivery::{Delivery, MAX_OUTSTANDING};
use crate::attachment::catalog::Attachment;

/// Documents of one index that gather changes at the most. Less than what keeps changes of related rows waiting (`fan`),
/// and few enough that walking over their rows in the queue takes little time.
const MAX_GATHERING: usize = 3_000;

impl Delivery {
    /// Takes in how long changes of each index gather.
    pub fn apply_delays(&mut self, attachments: &[Attachment]) {
        for lane in &mut self.lanes {
            if let Some(attachment) = attachments.iter().find(|known| known.id == lane.attachment) {
                lane.set_delay(attachment.options.delay());
            }
        }
        self.share_delays();
    }

    /// All indexes whose changes gather together keep at the most a quarter of the room.
    pub(super) fn share_delays(&mut self) {
        let delayed = self.lanes.iter().filter(|lane| lane.is_delayed()).count();
        let share = MAX_GATHERING.min(MAX_OUTSTANDING / 4 / delayed.max(1));
        for lane in &mut self.lanes {
            lane.max_gathering = share;
        }
    }

    /// Changes of a table (0: of all) that were enqueued below a mark gather no longer: somebody waits for them.
    pub(super) fn hurry(&mut self, table: u32, mark: i64) {
        for lane in self.lanes.iter_mut().filter(|lane| table == 0 || lane.source == table) {
            lane.hurry(mark);
        }
    }
}
