//! What the worker shows in shared memory, for the views: what is pending, and what stands in the way.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::database::Worker;
use super::lease::Keeper;
use crate::postgres::error::SqlError;
use crate::postgres::process::{my_database, now_micros};
use crate::postgres::transaction;
use crate::queue::claim;
use crate::shared;

/// How often the views' counts of pending changes are renewed at the most.
const COUNT_EVERY: Duration = Duration::from_millis(250);

impl Worker {
    /// Says once in the log, and always in the status, what stands in the way.
    pub(super) fn report(&mut self, trouble: &str) {
        let trouble = &*es::request_failure(trouble);
        self.database.set_state(trouble);
        if self.reported.as_deref() != Some(trouble) {
            shared::note_failure(0, trouble);
            if self.reported.is_none() {
                pgrx::log!("es_sync waits: {trouble}");
            }
            self.reported = Some(trouble.to_owned());
        }
    }

    /// Says in the status what stands in the way of all work, if anything.
    pub(super) fn show_state(&mut self) {
        let now = Instant::now();
        if let Some(why) = &self.note.standing_off {
            let why = format!("{why}; es_sync.take_over() lets this database write");
            return self.report(&why);
        }
        if let Some(trouble) = self.delivery.trouble.clone() {
            return self.report(&trouble);
        }
        if self.being_restored && !self.attachments.is_empty() {
            return self.report(
                "attached tables have no triggers, as while a dump is restored: waiting until they have; \
                 es_sync.take_over() lets this database write as it is",
            );
        }
        if let Some(obstacle) = self.keeper.as_ref().and_then(|keeper| keeper.obstacle(now)) {
            // Taking a free lease is a matter of milliseconds, and no news.
            return if self.keeper.as_ref().is_some_and(Keeper::is_watching) {
                self.report(&obstacle);
            } else {
                self.database.set_state(&obstacle);
            };
        }
        if self.keeper.is_some() && !self.may_write(now) {
            // Likewise.
            return self.database.set_state("the indexes are being told who writes to them");
        }
        if self.engine.as_ref().is_some_and(|engine| engine.dialect().is_some()) {
            if self.reported.take().is_some() {
                pgrx::log!("es_sync goes on");
            }
            self.database.set_state("");
        }
    }

    /// Renews what the views show.
    pub(super) fn publish(&mut self) -> Result<(), SqlError> {
        let now = Instant::now();
        if now < self.count_due {
            return Ok(());
        }
        let started = now;
        let backlog = transaction::run(claim::backlog)?;
        let database = my_database();
        for attachment in &self.attachments {
            if let Some(counters) = self.shared.index(database, attachment.id) {
                let root = attachment.relation.to_u32();
                let mine = || backlog.iter().filter(|backlog| self.delivery.root_of(backlog.source) == Some(root));
                counters.pending.store(mine().map(|mine| mine.keys).sum(), Ordering::Relaxed);
                counters.oldest.store(mine().map(|mine| mine.oldest).min().unwrap_or_default(), Ordering::Relaxed);
            }
        }
        // Counting a large backlog takes long: never more than a hundredth of the time.
        self.count_due = now + COUNT_EVERY.max(started.elapsed() * 100);
        Ok(())
    }

    /// Shows whether the engine is asked, and when it is asked again.
    pub(super) fn publish_engine(&self) {
        let breaker = match self.engine.as_ref().map(|engine| engine.breaker.state()) {
            Some(es::State::Open { .. }) => shared::Breaker::Open,
            Some(es::State::HalfOpen { .. }) => shared::Breaker::HalfOpen,
            _ => shared::Breaker::Closed,
        };
        self.database.set_breaker(breaker);
        let due = match &self.engine {
            // The lease is asked for more often than documents are tried.
            Some(engine) => self.keeper.as_ref().and_then(Keeper::next_try).or_else(|| engine.next_try()),
            None => Some(self.engine_due),
        };
        let micros =
            due.map_or(0, |due| now_micros() + due.saturating_duration_since(Instant::now()).as_micros() as i64);
        self.database.next_try.store(micros, Ordering::Relaxed);
    }
}
