//! What jobs have in common: what the worker lends them, and what comes of a step.

use std::time::{Duration, Instant};

use es::{Failure, Output};

use super::record;
use crate::attachment::catalog::Attachment;
use crate::document::read::Reader;
use crate::postgres::error::SqlError;
use crate::postgres::transaction;
use crate::queue::claim;
use crate::shared::Shared;
use crate::worker::delivery::Delivery;
use crate::worker::engine::Engine;

/// How often progress is written down.
pub(super) const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// How long a job rests that finds something locked: a job cancelled, or an index paused, and not yet committed.
pub const LOCKED_REST: Duration = Duration::from_millis(100);
/// How often the queue is looked at for what a job waits for.
const DRAIN_EVERY: Duration = Duration::from_millis(20);

/// A job under way.
pub trait UnderWay {
    fn job(&self) -> i64;

    fn attachment(&self) -> i32;

    /// True once there is nothing left to do.
    fn is_over(&self) -> bool;

    /// Goes as far as it can without waiting.
    ///
    /// # Errors
    /// What Postgres said; the step is taken again.
    fn step(&mut self, context: &mut Context, now: Instant) -> Result<Step, SqlError>;

    /// Takes the answer to one of its calls; false if it is not its own.
    ///
    /// # Errors
    /// What Postgres said while the result was written down.
    fn answered(
        &mut self,
        token: u64,
        result: &Result<Output, Failure>,
        context: &mut Context,
    ) -> Result<bool, SqlError>;

    /// A lane's index has vanished from the engine: what fills it begins anew.
    fn index_missing(&mut self, _lane: u32, _context: &mut Context) {}
}

/// What a job needs from the worker.
pub struct Context<'a> {
    pub engine: &'a mut Engine,
    pub delivery: &'a mut Delivery,
    pub reader: &'a mut Reader,
    pub attachment: &'a Attachment,
    pub shared: &'static Shared,
    /// The installation's token: the mark of ownership.
    pub owner: &'a str,
    pub generation: i64,
    /// The engine takes no bulk requests for the moment.
    pub held: bool,
}

/// What came of a step.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// There may be more to do at once.
    Again,
    /// Nothing to do before this, or before an event.
    Wait(Option<Instant>),
    /// The job is over and its row says how; attachments are to be read again.
    Over,
}

impl Context<'_> {
    /// Looks whether all changes of the table below the mark are delivered; when to look again if not.
    pub(super) fn look(&mut self, mark: i64, now: Instant) -> Result<Option<Instant>, SqlError> {
        let table = self.attachment.relation.to_u32();
        let sources = self.delivery.sources_of(table);
        let clear = !self.delivery.awaits(table, mark) && transaction::run(|| claim::is_clear(mark, &sources))?;
        Ok((!clear).then(|| claim::next_look(now, DRAIN_EVERY)))
    }

    /// False where documents can only be counted as there or not.
    pub(super) fn contents_comparable(&self) -> bool {
        self.attachment.contents_comparable() && !self.reader.shape().has_vectors()
    }

    /// Notes why a job does not go on; until when it rests, which grows with each failure in a row.
    pub(super) fn pause(&mut self, job: i64, failures: &mut u32, why: &str, now: Instant) -> Result<Instant, SqlError> {
        transaction::run(|| record::trouble(job, Some(why)))?;
        *failures += 1;
        Ok(now + self.engine.backoff.delay((*failures).min(10), &mut self.engine.random))
    }
}
