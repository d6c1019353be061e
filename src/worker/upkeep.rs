//! The worker's care for the queue itself: its size, its durability, and whether it takes changes at all.
//!
//! A queue that is closed takes nothing: it has reached its limit, or another database does the writing. Its marker is
//! gone before it closes, so whatever happens then, everything is compared and mended before it is trusted again: once
//! it is open, and every transaction that may have found it closed has ended.

use std::time::{Duration, Instant};

use super::database::Worker;
use super::succession;
use crate::attachment::{partitions, state};
use crate::postgres::error::SqlError;
use crate::postgres::transaction;
use crate::queue::table::Queue;
use crate::queue::{marker, storage};
use crate::settings;
use crate::shared::QueueState;

/// How often the queue is looked after.
const EVERY: Duration = Duration::from_secs(1);

/// Whether the queue takes changes, as this worker sees it.
#[derive(Debug, Default)]
pub enum Intake {
    #[default]
    Open,
    /// Closed: why.
    Closed(String),
    /// Open again. A repair follows once every transaction below `barrier` has ended.
    Reopening { barrier: i64, why: String },
}

/// What the worker keeps for looking after the queue.
pub struct Upkeep {
    due: Instant,
    pub intake: Intake,
    /// The queue is logged: what is read must be on disk before it is sent.
    pub logged: bool,
}

impl Upkeep {
    pub fn new(now: Instant) -> Self {
        Self { due: now, intake: Intake::Open, logged: false }
    }
}

impl Worker {
    /// True if a missing marker is explained by a queue that is closed or being opened.
    pub fn is_closed(&self) -> bool {
        !matches!(self.upkeep.intake, Intake::Open)
    }

    /// A former worker, of this server's run or before it, may have left the queue closed: it opens, and a repair follows.
    pub fn inherit_intake(&mut self) -> Result<(), SqlError> {
        let stands_off = self.note.standing_off.is_some();
        let was_closed = self.database.queue_state() != QueueState::Open;
        // Where it is to stay closed after a restart, `close_queue` does that.
        let noted = self.note.queue_closed.clone().filter(|_| was_closed || !stands_off);
        if self.is_closed() || !(was_closed || noted.is_some()) {
            return Ok(());
        }
        let why = noted.unwrap_or_else(|| "changes were not captured while the queue was closed".into());
        self.upkeep.intake = Intake::Closed(why);
        if stands_off { Ok(()) } else { self.open_queue() }
    }

    /// Closes the queue: the marker first, so that no crash can make it look complete.
    pub fn close_queue(&mut self, why: &str) -> Result<(), SqlError> {
        if !matches!(self.upkeep.intake, Intake::Closed(_)) {
            transaction::run(|| {
                marker::remove();
                state::mark_all_stale(why);
                succession::note_queue_closed(Some(why));
            })?;
            self.database.set_queue_state(QueueState::Closed);
            // Before anybody who waits is answered.
            self.catalog_due = Instant::now();
            self.upkeep.intake = Intake::Closed(why.to_owned());
        }
        Ok(())
    }

    /// Opens the queue again. What was missed is repaired by `look_after_queue`.
    pub fn open_queue(&mut self) -> Result<(), SqlError> {
        if let Intake::Closed(why) = &self.upkeep.intake {
            let why = why.clone();
            self.database.set_queue_state(QueueState::Reopening);
            // Whoever has found it closed has a transaction id below this one.
            let barrier = transaction::run(storage::next_transaction)?;
            self.upkeep.intake = Intake::Reopening { barrier, why };
        }
        Ok(())
    }

    /// Truncates, closes, opens, and changes the durability of the queue, as is due.
    pub fn look_after_queue(&mut self) -> Result<(), SqlError> {
        let now = Instant::now();
        if now < self.upkeep.due {
            return Ok(());
        }
        self.upkeep.due = now + EVERY;
        if let Intake::Reopening { barrier, why } = &self.upkeep.intake
            && transaction::run(|| storage::have_ended(*barrier))?
        {
            transaction::run(|| {
                succession::repair_everything(why);
                succession::note_queue_closed(None);
            })?;
            self.note.queue_closed = None;
            self.upkeep.intake = Intake::Open;
            self.database.set_queue_state(QueueState::Open);
            self.catalog_due = now;
        }
        if let Some(why) = self.note.standing_off.clone() {
            self.close_queue(&why)?;
            // Nothing of it will be sent from here; a repair comes with taking over.
            self.truncate(storage::discard_all);
            return Ok(());
        }
        if !self.more && self.delivery.in_flight() == 0 {
            self.truncate(storage::truncate_if_empty);
        }
        let limit = settings::queue_limit();
        let wants_log = settings::queue_is_logged();
        // A crash also empties unlogged tables of the users': while one is followed, the marker goes with them.
        let (size, logged, unlogged_too) = transaction::run(|| {
            (
                Queue::ALL.map(storage::size).iter().sum::<u64>(),
                storage::are_logged(),
                wants_log && partitions::any_is_unlogged(),
            )
        })?;
        self.upkeep.logged = logged.0;
        match self.upkeep.intake {
            Intake::Open if limit > 0 && size > limit => {
                pgrx::warning!(
                    "the queue has reached es_sync.queue_limit: changes are no longer noted one by one, and a repair follows when it is empty"
                );
                self.close_queue("the queue had reached es_sync.queue_limit")?;
            }
            Intake::Closed(_) if limit == 0 || size <= limit / 2 => self.open_queue()?,
            // The engine takes documents again: the repair covers what is in the queue, so that goes, or rows that nobody
            // can deliver (of a table that is paused) would keep it closed.
            Intake::Closed(_) if self.may_write(now) => self.truncate(storage::discard_all),
            _ => {}
        }
        self.settle_durability(logged, (wants_log, wants_log && !unlogged_too));
        Ok(())
    }

    fn truncate(&mut self, how: fn(Queue) -> bool) {
        for queue in Queue::ALL {
            // An error only says that somebody is writing: there will be another time.
            if let Ok(true) = transaction::run(|| how(queue)) {
                self.rewind_claims();
            }
        }
    }

    /// Makes the queue and its marker logged or unlogged, as es_sync.queue_durability wants them.
    fn settle_durability(&mut self, is: (bool, bool), wanted: (bool, bool)) {
        // Where somebody is writing just now: goes on, and tries again in a second.
        if is != wanted
            && transaction::run_waiting_shortly(|| storage::set_logged(is, wanted)).is_ok()
            && is.0 != wanted.0
        {
            pgrx::log!("the queue of es_sync is {} now", if wanted.0 { "logged" } else { "unlogged" });
            self.upkeep.logged = wanted.0;
            // What is claimed lies elsewhere now: it is claimed anew, in whatever trouble its index is.
            self.delivery.unclaim_all();
            self.rewind_claims();
            self.more = true;
        }
    }
}
