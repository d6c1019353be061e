//! Answers: what the engine said of a request becomes what is to be written down of its documents, or sent once more.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use es::{Body, Cause, Failure, FailureKind, Outcome};

use super::delivery::{Delivery, Flight};
use super::engine::Engine;
use super::lane::{Key, MAX_OPERATIONS, TRIAL_OPERATIONS};
use super::succession::GENERATION_SHIFT;
use crate::postgres::process::{my_database, now_micros};
use crate::queue::dead_letter::DeadLetter;
use crate::settings;
use crate::shared::{self, Index};

/// Versions that we issue are multiples of this; an edit by hand adds one.
const VERSION_STEP: i64 = 256;
/// From here on too few generations are left to go beyond: a version like that is nobody's but an edit's by hand.
const HIGHEST_VERSION: i64 = ((1 << (63 - GENERATION_SHIFT)) - (1 << 16)) << GENERATION_SHIFT;

/// A document that is to be sent once more.
struct Again {
    key: Key,
    reason: String,
    /// It may be the document's own fault.
    counts: bool,
}

impl Again {
    fn new(key: Key, reason: &str) -> Self {
        Self { key, reason: reason.to_owned(), counts: true }
    }
}

impl Delivery {
    /// Takes a request's answer.
    pub fn delivered(
        &mut self,
        token: u64,
        body: Body,
        result: Result<Vec<Outcome>, Failure>,
        took: Duration,
        engine: &mut Engine,
    ) {
        let bytes = body.len();
        self.recycle(body);
        let was_probe = matches!(engine.breaker.state(), es::State::HalfOpen { .. });
        // In any case, for this may have been the breaker's probe: of a request that was forgotten meanwhile, too.
        self.heard(result.as_ref().err(), engine);
        let Some(flight) = self.flights.remove(&token) else { return };
        match result {
            Ok(outcomes) => {
                engine.sizing.on_success(bytes, took);
                self.answered(flight, outcomes, engine);
            }
            Err(failure) => self.request_failed(flight, &failure, bytes, was_probe, engine),
        }
    }

    /// Takes in what an answer says of the engine as a whole. Who finds fault with a request is there.
    fn heard(&mut self, failure: Option<&Failure>, engine: &mut Engine) {
        match failure.map(|failure| failure.kind) {
            None | Some(FailureKind::TooLarge | FailureKind::BadRequest | FailureKind::NotFound) => {
                engine.breaker.success();
                self.trouble = None;
            }
            Some(FailureKind::TooManyRequests) => engine.breaker.failure(Instant::now()),
            Some(_) => {
                engine.breaker.failure(Instant::now());
                self.trouble = failure.map(Failure::to_string);
            }
        }
    }

    fn answered(&mut self, flight: Flight, outcomes: Vec<Outcome>, engine: &mut Engine) {
        let lane_id = flight.lane;
        let Some(lane) = self.lane(lane_id) else { return };
        let attachment = lane.attachment;
        // A few that went well, a probe's one above all, say nothing about many.
        if flight.rows * 2 > lane.max_operations {
            lane.max_operations = (lane.max_operations * 2).min(MAX_OPERATIONS);
        }
        let counters = counters(attachment);
        let now_micros = now_micros();
        let (mut indexed, mut deleted, mut retried) = (0, 0, 0_u64);
        let (mut taken, mut judged, mut busy) = (false, false, false);
        let mut missing = None;
        let mut retries = Vec::new();
        let mut outcomes = outcomes.into_iter();
        for operation in flight.operations {
            // A document is done when all of its items are.
            let items = outcomes.by_ref().take(operation.items);
            let outcome = items.max_by_key(|outcome| weight(outcome, flight.version)).unwrap_or(Outcome::Done);
            match outcome {
                Outcome::Done => {
                    taken = true;
                    if operation.delete {
                        deleted += 1;
                    } else {
                        indexed += 1;
                    }
                    self.succeed(lane_id, attachment, &operation.key, now_micros, counters);
                }
                Outcome::Newer { version } if version >= HIGHEST_VERSION => {
                    let reason = format!("the document has version {version}, and none of ours can be higher");
                    self.park(lane_id, &operation.key, None, "version_too_high", reason);
                }
                Outcome::Newer { version } if version >> GENERATION_SHIFT > flight.version >> GENERATION_SHIFT => {
                    // Somebody with a later generation has written this index: the lease says whether that goes on.
                    self.met_generation = self.met_generation.max(Some(version >> GENERATION_SHIFT));
                    retries.push(Again::new(operation.key, "a later generation writes this index"));
                }
                Outcome::Newer { version } if version % VERSION_STEP == 0 => {
                    taken = true;
                    self.succeed(lane_id, attachment, &operation.key, now_micros, counters);
                }
                // An edit by hand raised the version by one: a later version of ours goes over it.
                Outcome::Newer { .. } => retries.push(Again::new(operation.key, "the document was changed by hand")),
                Outcome::Retry { cause, reason } => {
                    busy |= cause == Cause::Busy;
                    retries.push(Again { key: operation.key, reason, counts: cause == Cause::Unclear });
                }
                Outcome::Refused { status, kind, reason } => {
                    judged = true;
                    self.park(lane_id, &operation.key, Some(i32::from(status)), &kind, reason);
                }
                Outcome::IndexMissing { reason } => {
                    missing.get_or_insert(reason);
                    retries.push(Again::new(operation.key, ""));
                }
            }
        }
        if busy {
            engine.sizing.on_too_many();
        }
        if let Some(reason) = missing {
            set_cause(attachment, &reason);
            if !self.missing.contains(&lane_id) {
                self.missing.push(lane_id);
            }
            let delay = engine.backoff.delay(5, &mut engine.random);
            if let Some(lane) = self.lane(lane_id) {
                lane.blocked_until = Some(Instant::now() + delay);
                lane.put_back(retries.into_iter().map(|again| again.key));
            }
            return;
        }
        retried += retries.len() as u64;
        if let Some(lane) = self.lane(lane_id) {
            match taken || judged {
                true => (lane.failures, lane.refusals) = (0, 0),
                false => lane.refusals += u32::from(!busy && !retries.is_empty()),
            }
        }
        if taken {
            for again in retries {
                self.retry(lane_id, attachment, again, engine);
            }
        } else if let Some(Again { reason, .. }) = retries.first() {
            // Nothing was taken: the index is read-only, or the engine has no room. That is no document's own failure,
            // so it does not count as an attempt.
            set_cause(attachment, reason);
            self.rest(lane_id, retries.into_iter().map(|again| again.key), engine);
        }
        // Why some documents wait is told until the last of them has been taken or refused.
        let waits = self.lane(lane_id).is_some_and(|lane| lane.is_retrying());
        if let Some(counters) = counters {
            counters.indexed.fetch_add(indexed, Relaxed);
            counters.deleted.fetch_add(deleted, Relaxed);
            counters.retried.fetch_add(retried, Relaxed);
            counters.batches.fetch_add(1, Relaxed);
            if !waits && (taken || (judged && retried == 0)) {
                counters.set_cause("");
            }
        }
    }

    /// Puts documents back and lets their lane rest for a while that grows with each failure in a row.
    pub(super) fn rest(&mut self, lane: u32, keys: impl DoubleEndedIterator<Item = Key>, engine: &mut Engine) {
        let Some(lane) = self.lane(lane) else { return };
        lane.failures += 1;
        // A few documents show as well as many whether the index takes any again.
        lane.max_operations = lane.max_operations.min(TRIAL_OPERATIONS);
        let delay = engine.backoff.delay(lane.failures.min(10), &mut engine.random);
        lane.blocked_until = Some(Instant::now() + delay);
        lane.put_back(keys);
    }

    fn retry(&mut self, lane: u32, attachment: i32, again: Again, engine: &mut Engine) {
        let Again { key, reason, counts } = again;
        let Some(state) = self.lane(lane) else { return };
        if counts && state.attempts(&key) + 1 >= settings::max_attempts() {
            self.park(lane, &key, None, "max_attempts", reason);
            return;
        }
        let (backoff, random) = (&engine.backoff, &mut engine.random);
        state.retry(&key, counts, |waits| Instant::now() + backoff.delay(waits, random));
        set_cause(attachment, &reason);
    }

    fn request_failed(
        &mut self,
        flight: Flight,
        failure: &Failure,
        bytes: usize,
        was_probe: bool,
        engine: &mut Engine,
    ) {
        let Some(lane) = self.lane(flight.lane) else { return };
        let attachment = lane.attachment;
        let count = flight.operations.len();
        match failure.kind {
            FailureKind::TooLarge | FailureKind::BadRequest if count == 1 => {
                let status = failure.status.map(i32::from);
                let kind = if failure.kind == FailureKind::TooLarge { "too_large" } else { "bad_request" };
                let key = flight.operations[0].key.clone();
                self.park(flight.lane, &key, status, kind, failure.reason.clone());
                return;
            }
            FailureKind::TooLarge => {
                engine.sizing.on_too_large(bytes);
                lane.max_operations = count.div_ceil(2);
            }
            // One operation spoils the request for all: halve until it stands alone.
            FailureKind::BadRequest => lane.max_operations = count.div_ceil(2),
            FailureKind::NotFound => {
                lane.blocked_until = Some(Instant::now() + Duration::from_secs(1));
                let id = lane.id;
                self.missing.push(id);
            }
            FailureKind::TooManyRequests => engine.sizing.on_too_many(),
            // An engine that is too slow for so many answers fewer; one that is not there loses nothing by it.
            FailureKind::Timeout => lane.max_operations = lane.max_operations.min(count.div_ceil(2)),
            _ => {}
        }
        if failure.kind.outcome_unknown() {
            // It may still arrive: after a delete that overtook it, once the engine has forgotten that delete.
            let again = Instant::now() + 2 * settings::request_timeout();
            let indexed = flight.operations.iter().filter(|operation| !operation.delete);
            self.doubtful.extend(
                indexed.map(|operation| (again, flight.lane, operation.key.clone(), operation.routing.clone())),
            );
        }
        let told = match failure.kind {
            // It may quote any of the documents.
            FailureKind::BadRequest => es::document_failure("the engine refused a request", &failure.reason),
            _ => failure.to_string(),
        };
        set_cause(attachment, &told);
        let keys = flight.operations.into_iter().map(|operation| operation.key);
        // A gateway's word may be about this index alone, and for good.
        let is_refused = failure.kind == FailureKind::BadAnswer && failure.status.is_some_and(|status| status < 500);
        let hangs = failure.kind == FailureKind::Timeout;
        if is_refused || hangs || (was_probe && failure.kind.is_transient()) {
            // Maybe it is this index alone that gets no answer: while it rests, and before it is tried again, the engine
            // itself is asked, and the others go on if it answers.
            self.rest(flight.lane, keys, engine);
        } else if let Some(lane) = self.lane(flight.lane) {
            lane.put_back(keys);
        }
    }

    /// A document is no longer refused: its dead letter goes. Not while an index is being built beside the live one: what
    /// the one has taken the other may have refused. All of them are sent once more when one index is left.
    pub(super) fn clear(&mut self, attachment: i32, key: &Key) {
        // As a rule there is none, and this is asked of every document.
        if self.parked.is_empty() {
            return;
        }
        let is_single = self.lanes.iter().filter(|lane| lane.attachment == attachment).nth(1).is_none();
        if is_single && self.parked.remove(&(attachment, key.clone())) {
            self.outbox.cleared.push((attachment, key.clone()));
        }
    }

    /// Has an attachment's refused documents sent once more.
    pub fn check_parked(&mut self, attachment: i32) {
        let parked = self.parked.iter().filter(|(of, _)| *of == attachment);
        for lane in self.lanes.iter_mut().filter(|lane| lane.attachment == attachment) {
            parked.clone().for_each(|(_, key)| lane.check(key.clone(), None));
        }
    }

    fn succeed(&mut self, lane: u32, attachment: i32, key: &Key, now_micros: i64, counters: Option<&Index>) {
        self.clear(attachment, key);
        let oldest = self.finish(lane, key);
        if let (Some(counters), Some(enqueued_at)) = (counters, oldest) {
            counters.latency.record((now_micros - enqueued_at).max(0) as u64, 1);
        }
    }

    pub(super) fn park(&mut self, lane: u32, key: &Key, status: Option<i32>, kind: &str, reason: String) {
        let Some(state) = self.lane(lane) else { return };
        let (attachment, attempts) = (state.attachment, state.attempts(key) as i32 + 1);
        let routings = state.elsewhere(key).to_vec();
        if let Some(counters) = counters(attachment) {
            counters.refused.fetch_add(1, Relaxed);
        }
        shared::note_failure(attachment, &format!("document refused: {}", es::document_failure(kind, &reason)));
        // One that was taken in this very turn, and then refused in a newer state, is refused.
        self.outbox.cleared.retain(|(cleared, taken)| (*cleared, taken) != (attachment, key));
        self.outbox.letters.push(DeadLetter {
            attachment,
            key: key.to_string(),
            status,
            kind: kind.to_owned(),
            // Postgres' text knows no NUL.
            reason: reason.replace('\0', "\u{fffd}"),
            attempts,
            routings: routings.iter().map(|routing| routing.as_deref().map(str::to_owned)).collect(),
        });
        self.parked.insert((attachment, key.clone()));
        self.finish(lane, key);
    }
}

/// Of a document's items, the one with the highest weight decides what becomes of it.
fn weight(outcome: &Outcome, version: i64) -> u8 {
    match outcome {
        Outcome::Done => 0,
        Outcome::Newer { version: held }
            if held % VERSION_STEP == 0 && held >> GENERATION_SHIFT <= version >> GENERATION_SHIFT =>
        {
            1
        }
        Outcome::Refused { .. } => 2,
        Outcome::Newer { .. } => 3,
        Outcome::Retry { .. } => 4,
        Outcome::IndexMissing { .. } => 5,
    }
}

fn counters(attachment: i32) -> Option<&'static Index> {
    shared::shared()?.index(my_database(), attachment)
}

/// Says why an index does not go on. What is shown here is shown to whoever may watch: no document is quoted.
pub(super) fn set_cause(attachment: i32, cause: &str) {
    let cause = es::request_failure(cause);
    if counters(attachment).is_some_and(|counters| counters.set_cause(&cause)) && !cause.is_empty() {
        shared::note_failure(attachment, &cause);
    }
}
