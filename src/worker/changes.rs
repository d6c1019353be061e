//! The changes' way through the worker: claimed, read and sent, acknowledged.

use std::time::{Duration, Instant};

use es::Permit;
use pgrx::pg_sys;

use super::answers::set_cause;
use super::catalog::reader_of;
use super::database::{REST, Worker};
use super::delivery::MAX_OUTSTANDING;
use crate::attachment::attach;
use crate::jobs::record;
use crate::postgres::error::SqlError;
use crate::postgres::transaction;
use crate::queue::claim;
use crate::queue::dead_letter;

impl Worker {
    pub(super) fn may_claim(&self) -> bool {
        self.delivery.room() > 0
            // What cannot be written down must not grow without end.
            && self.delivery.outbox.finished.len() < MAX_OUTSTANDING
            && self.may_write(Instant::now())
            && self
                .engine
                .as_ref()
                .is_some_and(|engine| engine.dialect().is_some() && engine.breaker.state() == es::State::Closed)
    }

    /// Claims changes: at once after a quiet time, at most every few milliseconds while commits keep coming.
    pub(super) fn claim(&mut self) -> Result<(), SqlError> {
        let now = Instant::now();
        let (held, changed) = self.delivery.hold(now);
        // Whoever is held no longer has changes waiting that woke nobody again.
        self.more |= changed || self.claims.iter().any(|claims| claims.due().is_some_and(|due| due <= now));
        if !self.more || !self.may_claim() || now.duration_since(self.last_claim) < self.linger() {
            return Ok(());
        }
        self.more = false;
        self.work = Duration::ZERO;
        self.seen_commits = self.database.commits();
        for claims in &mut self.claims {
            let room = self.delivery.room();
            if room == 0 {
                self.more = true;
                break;
            }
            let delivery = &self.delivery;
            let (rows, more) = transaction::run(|| {
                claims.claim(room, &held.sources, &held.spooled, |place| delivery.is_known(place))
            })?;
            self.more |= more;
            if !rows.is_empty() {
                // A table that was attached since the catalog was read: read it again before its rows are let go.
                let unknown = rows.iter().any(|row| {
                    !self.attachments.iter().any(|known| Some(known.relation.to_u32()) == delivery.root_of(row.source))
                });
                self.delivery.accept_later(rows);
                if unknown {
                    self.catalog_due = now;
                }
            }
        }
        self.last_claim = Instant::now();
        if self.delivery.has_later() {
            self.read_catalog()?;
            self.delivery.accept_now();
        }
        Ok(())
    }

    pub(super) fn can_send(&mut self, now: Instant) -> bool {
        let Some(engine) = self.engine.as_mut() else { return false };
        engine.dialect().is_some()
            && engine.breaker.state() == es::State::Closed
            && self.delivery.in_flight() <= engine.sizing.concurrency()
            && self.delivery.next_ready(now).0.is_some()
    }

    /// Reads and sends what is ready while connections are free; true if the breaker holds everything back.
    pub(super) fn send(&mut self, due: &mut Vec<Instant>) -> bool {
        let now = Instant::now();
        let Some(engine) = self.engine.as_mut() else { return true };
        if engine.dialect().is_none() {
            due.extend(engine.identify(now));
            return true;
        }
        loop {
            // One more than there are connections, so that none waits for the next body.
            if self.delivery.in_flight() > engine.sizing.concurrency() {
                return false;
            }
            let (lane, earliest) = self.delivery.next_ready(now);
            due.extend(earliest);
            let Some(lane) = lane else {
                if engine.breaker.state() == es::State::Closed {
                    return false;
                }
                // Nothing is claimed while the breaker is open: without a document to try, a question is the probe.
                match engine.permit(now) {
                    Permit::No(until) => due.push(until),
                    _ => engine.probe(now),
                }
                return true;
            };
            let probe = match engine.permit(now) {
                Permit::Normal => false,
                Permit::Probe => true,
                Permit::No(until) => {
                    due.push(until);
                    return true;
                }
            };
            let Some(attachment) = self.delivery.lane(lane).map(|lane| lane.attachment) else { continue };
            let in_flight = self.delivery.in_flight();
            let found = self.attachments.iter().find(|known| known.id == attachment);
            match found.and_then(|found| Some((found, reader_of(&mut self.readers, found)?))) {
                Some((attachment, reader)) => {
                    if self.delivery.fit_mapping(lane, reader, attachment, engine) {
                        self.delivery.send_changes(lane, reader, engine, probe);
                    }
                }
                None => {
                    // The table or its key is gone or locked, or its view is: look again soon.
                    set_cause(
                        attachment,
                        "could not read documents: the table or its view is gone, locked, or has another owner",
                    );
                    if let Some(lane) = self.delivery.lane(lane) {
                        lane.failures += 1;
                        // Counted from now on: it may have taken long to find out.
                        lane.blocked_until = Some(Instant::now() + REST);
                    }
                    self.catalog_due = now + REST;
                }
            }
            if probe {
                // Nothing went out: the table is gone or locked, or the row is one that cannot be read or sent.
                if self.delivery.in_flight() == in_flight {
                    engine.probe(now);
                }
                return true;
            }
        }
    }

    /// Writes down what is done: queue rows, dead letters, requests for rebuilds. One transaction.
    pub(super) fn acknowledge(&mut self) -> Result<(), SqlError> {
        if self.delivery.outbox.is_empty() {
            return Ok(());
        }
        let outbox = &self.delivery.outbox;
        let places: Vec<_> = outbox
            .finished
            .iter()
            .chain(outbox.rebuilds.iter().chain(&outbox.repairs).chain(&outbox.sweeps).map(|(_, place)| place))
            .copied()
            .collect();
        let attachments = &self.attachments;
        let enqueued = transaction::run(|| {
            for letter in &outbox.letters {
                dead_letter::park(letter);
            }
            let mut enqueued = false;
            for (attachment, key) in &outbox.cleared {
                enqueued |= dead_letter::clear(*attachment, key);
            }
            for (source, _) in &outbox.rebuilds {
                for attachment in attachments.iter().filter(|known| known.relation.to_u32() == *source) {
                    record::restart(Some(attachment.id));
                    record::mark_stale(attachment.id, "the table was truncated or rewritten");
                    attach::create_build(attachment.id, "reindex");
                }
            }
            for (source, _) in &outbox.repairs {
                for attachment in attachments.iter().filter(|known| known.relation.to_u32() == *source) {
                    // A build that runs may have read pages that changed since.
                    record::restart(Some(attachment.id));
                    attach::create_repair(attachment.id, "changes were not captured one by one");
                }
            }
            for (attachment, building, why) in &outbox.misfits {
                if *building {
                    record::restart(Some(*attachment));
                }
                record::mark_stale(*attachment, why);
                attach::create_build(*attachment, "reindex");
            }
            for (source, _) in &outbox.sweeps {
                for attachment in attachments.iter().filter(|known| known.relation.to_u32() == *source) {
                    attach::create_sweep(attachment.id);
                }
            }
            claim::acknowledge(&places);
            enqueued
        })?;
        self.more |= enqueued;
        let stale = !outbox.rebuilds.is_empty()
            || !outbox.repairs.is_empty()
            || !outbox.misfits.is_empty()
            || !outbox.sweeps.is_empty();
        self.delivery.outbox = Default::default();
        self.delivery.forget_places(places);
        // SAFETY: outside a transaction, as it must be; it is what makes autovacuum see the queue's dead rows.
        unsafe { pg_sys::pgstat_report_stat(false) };
        if stale {
            // Before anybody who waits is answered.
            self.catalog_due = Instant::now();
            self.read_catalog()?;
        }
        Ok(())
    }
}
