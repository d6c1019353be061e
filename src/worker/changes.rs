//! The changes' way through the worker: claimed, read and sent, acknowledged.

use std::time::{Duration, Instant};

use es::Permit;
use pgrx::pg_sys;

use super::answers::set_cause;
use super::catalog::reader_of;
use super::database::{REST, Worker};
use super::delivery::MAX_OUTSTANDING;
use crate::attachment::{partitions, state};
use crate::jobs::step::LOCKED_REST;
use crate::jobs::{ask, record};
use crate::postgres::error::SqlError;
use crate::postgres::transaction;
use crate::queue::claim;
use crate::queue::dead_letter;
use crate::queue::insert::Whole;

/// How long documents are read and sent before the worker looks at all else again.
const TURN: Duration = Duration::from_secs(1);

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
        self.claimed_rows = 0;
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
            self.claimed_rows += rows.len();
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
            // Reading may take long where it fails. Whatever else there is has its turn first.
            if now.elapsed() > TURN {
                return false;
            }
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
            let Some((attachment, failures)) = self.delivery.lane(lane).map(|lane| (lane.attachment, lane.failures))
            else {
                continue;
            };
            if probe && failures > 0 {
                // Its answer may never come, and nothing of others is sent until then: a question is the probe.
                engine.probe(now);
                return true;
            }
            let in_flight = self.delivery.in_flight();
            let found = self.attachments.iter().find(|known| known.id == attachment);
            match found.and_then(|found| Some((found, reader_of(&mut self.readers, found)?))) {
                Some((attachment, reader)) => {
                    if self.delivery.fit_mapping(lane, reader, attachment, engine) {
                        self.delivery.send_changes(lane, attachment, reader, engine, probe);
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

    /// Writes down what is done: queue rows and dead letters in one transaction, then each request for a table as a whole
    /// in its own. What meets a row that somebody has locked, by a pause or a cancel that is not committed, is tried again
    /// later, and keeps nothing else waiting.
    pub(super) fn acknowledge(&mut self, due: &mut Vec<Instant>) -> Result<(), SqlError> {
        if self.delivery.outbox.is_empty() {
            return Ok(());
        }
        self.acknowledge_documents()?;
        let asked = self.acknowledge_requests()?;
        // SAFETY: outside a transaction, as it must be; it is what makes autovacuum see the queue's dead rows.
        unsafe { pg_sys::pgstat_report_stat(false) };
        if !self.delivery.outbox.is_empty() {
            due.push(Instant::now() + LOCKED_REST);
        }
        if asked {
            // Before anybody who waits is answered.
            self.catalog_due = Instant::now();
            self.read_catalog()?;
        }
        Ok(())
    }

    fn acknowledge_documents(&mut self) -> Result<(), SqlError> {
        let outbox = &mut self.delivery.outbox;
        if outbox.finished.is_empty() && outbox.letters.is_empty() && outbox.cleared.is_empty() {
            return Ok(());
        }
        let written = transaction::run_without_waiting(|| {
            outbox.letters.iter().for_each(dead_letter::park);
            let enqueued =
                outbox.cleared.iter().filter(|(attachment, key)| dead_letter::clear(*attachment, key)).count();
            claim::acknowledge(&outbox.finished);
            enqueued > 0
        });
        match written {
            Ok(enqueued) => {
                self.more |= enqueued;
                outbox.letters.clear();
                outbox.cleared.clear();
            }
            // Somebody is discarding one of the letters. That one waits for him, and all others do not.
            Err(error) if error.passes_soon() => {
                let (letters, parked) = each(std::mem::take(&mut outbox.letters), dead_letter::park);
                let (cleared, forgotten) = each(std::mem::take(&mut outbox.cleared), |(attachment, key)| {
                    dead_letter::clear(*attachment, key);
                });
                self.more |= !cleared.done.is_empty();
                (outbox.letters, outbox.cleared) = (letters.left, cleared.left);
                parked.and(forgotten)?;
                transaction::run_without_waiting(|| claim::acknowledge(&outbox.finished))?;
            }
            Err(error) => return Err(error),
        }
        let finished = std::mem::take(&mut outbox.finished);
        self.delivery.forget_places(finished);
        Ok(())
    }

    /// True if jobs were made or sent back to their beginning.
    fn acknowledge_requests(&mut self) -> Result<bool, SqlError> {
        let attachments = &self.attachments;
        let (requests, requested) = each(std::mem::take(&mut self.delivery.outbox.requests), |request| {
            let table = pg_sys::Oid::from(request.root);
            let attachments = attachments.iter().filter(|known| known.relation == table).map(|known| known.id);
            match request.what {
                Whole::Rebuild => attachments.for_each(|attachment| {
                    record::restart(Some(attachment));
                    state::mark_stale(attachment, "the table was truncated or rewritten");
                    ask::for_build(attachment, "reindex");
                }),
                Whole::Repair => attachments.for_each(|attachment| ask::for_repair(attachment, ask::NOT_CAPTURED)),
                Whole::Sweep => partitions::emptied(table),
            }
            claim::acknowledge(&request.places);
        });
        let (misfits, rebuilt) =
            each(std::mem::take(&mut self.delivery.outbox.misfits), |(attachment, building, why)| {
                if *building {
                    record::restart(Some(*attachment));
                }
                state::mark_stale(*attachment, why);
                ask::for_build(*attachment, "reindex");
            });
        let asked = !requests.done.is_empty() || !misfits.done.is_empty();
        self.delivery.forget_places(requests.done.into_iter().flat_map(|request| request.places));
        (self.delivery.outbox.requests, self.delivery.outbox.misfits) = (requests.left, misfits.left);
        requested.and(rebuilt).map(|()| asked)
    }
}

struct Written<T> {
    done: Vec<T>,
    left: Vec<T>,
}

/// Writes each in a transaction of its own, and passes over those that meet a lock; nothing more after another error.
fn each<T>(items: Vec<T>, write: impl Fn(&T)) -> (Written<T>, Result<(), SqlError>) {
    let (mut written, mut result) = (Written { done: Vec::new(), left: Vec::new() }, Ok(()));
    for item in items {
        if result.is_err() {
            written.left.push(item);
            continue;
        }
        match transaction::run_without_waiting(|| write(&item)) {
            Ok(()) => written.done.push(item),
            Err(error) => {
                written.left.push(item);
                if !error.passes_soon() {
                    result = Err(error);
                }
            }
        }
    }
    (written, result)
}
