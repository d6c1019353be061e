//! The worker's jobs: each goes a step at a time, between deliveries.

use std::time::Instant;

use super::catalog::reader_of;
use super::database::Worker;
use crate::jobs::build::{self, Context, Step};
use crate::jobs::record;
use crate::postgres::error::SqlError;
use crate::postgres::transaction;

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
        for (job, index) in std::mem::take(&mut self.queued_drops) {
            if let Some(engine) = self.engine.as_mut() {
                let owner = self.owner.clone();
                let token = engine.call(move |client| build::drop_public(client, &index, &owner));
                self.drops.push((token, job));
            }
        }
        let missing = std::mem::take(&mut self.delivery.missing);
        let mut builds = std::mem::take(&mut self.builds);
        let mut result = Ok(());
        for build in &mut builds {
            if self.attachments.iter().any(|known| known.id == build.attachment && known.paused) {
                continue;
            }
            let step = self.with_context(build.attachment, held, |context| {
                for lane in &missing {
                    build.index_missing(*lane, context);
                }
                build.step(context, now)
            });
            match step {
                Some(Ok(Step::Again)) => again = true,
                Some(Ok(Step::Wait(until))) => due.extend(until),
                Some(Ok(Step::Over)) => self.catalog_due = now,
                Some(Err(error)) => result = Err(error),
                None => {}
            }
        }
        builds.retain(|build| !build.is_over());
        self.builds = builds;
        let mut verifies = std::mem::take(&mut self.verifies);
        for verify in &mut verifies {
            if self.attachments.iter().any(|known| known.id == verify.attachment && known.paused) {
                continue;
            }
            match self.with_context(verify.attachment, held, |context| verify.step(context, now)) {
                Some(Ok(Step::Again)) => again = true,
                Some(Ok(Step::Wait(until))) => due.extend(until),
                Some(Ok(Step::Over)) => self.catalog_due = now,
                Some(Err(error)) => result = Err(error),
                None => {}
            }
        }
        verifies.retain(|verify| !verify.is_over());
        self.verifies = verifies;
        self.more |= std::mem::take(&mut self.delivery.enqueued);
        if missing.iter().any(|lane| self.delivery.lane(*lane).is_some_and(|lane| !lane.building)) {
            // Gone, or only its write alias is: the engine is asked.
            self.wiring.look_again(now);
        }
        result?;
        Ok(again)
    }

    pub(super) fn job_answered(
        &mut self,
        token: u64,
        result: &Result<serde_json::Value, es::Failure>,
    ) -> Result<(), SqlError> {
        if let Some(place) = self.drops.iter().position(|(own, _)| *own == token) {
            let (_, job) = self.drops.swap_remove(place);
            if result.as_ref().is_err_and(|failure| failure.kind.is_transient()) {
                // The job stays queued: the next reading of the catalog takes it up again.
                return Ok(());
            }
            let error = result.as_ref().err().map(ToString::to_string);
            let state = if error.is_none() { "done" } else { "failed" };
            return transaction::run(|| record::finish(job, state, 0, error.as_deref()));
        }
        // Put back whatever happens: a job that is forgotten here is begun a second time.
        let mut result_of_all = Ok(());
        let mut builds = std::mem::take(&mut self.builds);
        for build in &mut builds {
            let taken = self.with_context(build.attachment, false, |context| build.answered(token, result, context));
            match taken.transpose() {
                Ok(Some(true)) => break,
                Ok(_) => {}
                Err(error) => result_of_all = Err(error),
            }
        }
        self.builds = builds;
        let mut verifies = std::mem::take(&mut self.verifies);
        for verify in &mut verifies {
            let taken = self.with_context(verify.attachment, false, |context| verify.answered(token, result, context));
            match taken.transpose() {
                Ok(Some(true)) => break,
                Ok(_) => {}
                Err(error) => result_of_all = Err(error),
            }
        }
        self.verifies = verifies;
        result_of_all
    }
}
