//! The worker's jobs: each goes a step at a time, between deliveries.

use std::time::Instant;

use es::{Failure, Output};

use super::catalog::reader_of;
use super::database::{REST, Worker};
use crate::jobs::build::Build;
use crate::jobs::partition::Load;
use crate::jobs::record;
use crate::jobs::step::{Context, LOCKED_REST, Step, UnderWay};
use crate::jobs::verify::Verify;
use crate::postgres::error::SqlError;
use crate::postgres::transaction;

/// The jobs that this worker has taken up.
#[derive(Default)]
pub(super) struct Jobs {
    pub(super) builds: Vec<Build>,
    pub(super) verifies: Vec<Verify>,
    /// Rows of partitions that came.
    pub(super) loads: Vec<Load>,
    /// Those that drop an index and have not begun, with its public name.
    pub(super) queued_drops: Vec<(i64, String)>,
    /// Drops under way: token and job.
    pub(super) drops: Vec<(u64, i64)>,
}

impl Jobs {
    fn all(&mut self) -> impl Iterator<Item = &mut dyn UnderWay> {
        let builds = self.builds.iter_mut().map(|build| build as &mut dyn UnderWay);
        let verifies = self.verifies.iter_mut().map(|verify| verify as &mut dyn UnderWay);
        builds.chain(verifies).chain(self.loads.iter_mut().map(|load| load as &mut dyn UnderWay))
    }

    /// Keeps those that fill, compare or mend an index, where this says so.
    pub(super) fn retain(&mut self, keep: impl Fn(&dyn UnderWay) -> bool) {
        self.builds.retain(|build| keep(build));
        self.verifies.retain(|verify| keep(verify));
        self.loads.retain(|load| keep(load));
    }

    /// Forgets what is under way: it goes on from its row.
    pub(super) fn forget(&mut self) {
        self.retain(|_| false);
        self.drops.clear();
    }
}

impl Worker {
    /// Lends a job what it needs; None where its attachment or table is gone.
    pub(super) fn with_context<T>(
        &mut self,
        attachment: i32,
        held: bool,
        work: impl FnOnce(&mut Context) -> T,
    ) -> Option<T> {
        let found = self.attachments.iter().find(|known| known.id == attachment)?.clone();
        let reader = reader_of(&mut self.readers, &found)?;
        let mut context = Context {
            engine: self.engine.as_mut()?,
            delivery: &mut self.delivery,
            reader,
            attachment: &found,
            shared: self.shared,
            owner: &self.owner,
            generation: self.generation,
            held,
        };
        Some(work(&mut context))
    }

    /// Takes jobs a step further; true if there is more to do at once.
    pub(super) fn work_on_jobs(&mut self, held: bool, due: &mut Vec<Instant>) -> Result<bool, SqlError> {
        let now = Instant::now();
        let mut again = false;
        for (job, index) in std::mem::take(&mut self.jobs.queued_drops) {
            if self.attachments.iter().any(|known| known.index == index) {
                // Attached anew: what is to go is replaced by its build, and what is behind the name may be that already.
                match transaction::run_without_waiting(|| record::finish(job, "done", 0, None)) {
                    Err(error) if !error.passes_soon() => return Err(error),
                    // Else it stays queued, and the next reading of the catalog takes it up again.
                    _ => {}
                }
            } else if let Some(engine) = self.engine.as_mut() {
                let owner = self.owner.clone();
                let token = engine.call(move |client| client.drop_public(&index, &owner));
                self.jobs.drops.push((token, job));
            }
        }
        let missing = std::mem::take(&mut self.delivery.missing);
        // Put back whatever happens: a job that is forgotten here is begun a second time.
        let mut jobs = std::mem::take(&mut self.jobs);
        let mut result = Ok(());
        for job in jobs.all() {
            if self.attachments.iter().any(|known| known.id == job.attachment() && known.paused) {
                continue;
            }
            if let Some(until) = self.resting_jobs.get(&job.job()).filter(|until| **until > now) {
                due.push(*until);
                continue;
            }
            let step = self.with_context(job.attachment(), held, |context| {
                for lane in &missing {
                    job.index_missing(*lane, context);
                }
                job.step(context, now)
            });
            match step {
                Some(Ok(Step::Again)) => again = true,
                Some(Ok(Step::Wait(until))) => due.extend(until),
                Some(Ok(Step::Over)) => self.catalog_due = now,
                Some(Err(error)) if error.passes_soon() => due.push(now + LOCKED_REST),
                Some(Err(error)) => {
                    due.push(now + REST);
                    self.resting_jobs.retain(|_, until| *until > now);
                    self.resting_jobs.insert(job.job(), now + REST);
                    result = result.and(note_trouble(job.job(), &error));
                }
                None => {}
            }
        }
        jobs.retain(|job| !job.is_over());
        self.jobs = jobs;
        self.more |= std::mem::take(&mut self.delivery.enqueued);
        if missing.iter().any(|lane| self.delivery.lane(*lane).is_some_and(|lane| !lane.building)) {
            // Gone, or only its write alias is: the engine is asked.
            self.wiring.look_again(now);
        }
        result?;
        Ok(again)
    }

    pub(super) fn job_answered(&mut self, token: u64, result: &Result<Output, Failure>) -> Result<(), SqlError> {
        if let Some(place) = self.jobs.drops.iter().position(|(own, _)| *own == token) {
            let (_, job) = self.jobs.drops.swap_remove(place);
            if result.as_ref().is_err_and(|failure| failure.kind.is_transient()) {
                // The job stays queued: the next reading of the catalog takes it up again.
                return Ok(());
            }
            let error = result.as_ref().err().map(ToString::to_string);
            let state = if error.is_none() { "done" } else { "failed" };
            // One that somebody is just cancelling stays queued likewise.
            return match transaction::run_without_waiting(|| record::finish(job, state, 0, error.as_deref())) {
                Err(error) if error.passes_soon() => Ok(()),
                result => result,
            };
        }
        // Put back as above.
        let mut jobs = std::mem::take(&mut self.jobs);
        let mut result_of_all = Ok(());
        for job in jobs.all() {
            let taken = self.with_context(job.attachment(), false, |context| job.answered(token, result, context));
            match taken.transpose() {
                Ok(Some(true)) => break,
                Ok(_) => {}
                // Its table is being altered: its row says from where it goes on, when the catalog is read again.
                Err(error) if error.passes_soon() => {}
                Err(error) => result_of_all = result_of_all.and(note_trouble(job.job(), &error)),
            }
        }
        self.jobs = jobs;
        result_of_all
    }
}

/// What a job could not read or write is its own trouble: other indexes go on.
fn note_trouble(job: i64, error: &SqlError) -> Result<(), SqlError> {
    transaction::run_without_waiting(|| record::trouble(job, Some(&error.message)))
}
