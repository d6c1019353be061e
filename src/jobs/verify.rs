//! Comparing an index with its table: contents, not counts; and mending what differs.
//!
//! First the rows, page by page in the order of their keys, against the documents with those ids; then all ids of the
//! index against the table, for documents that should not be there. Whatever differs is looked at a second time, once
//! all changes that were committed before have been delivered: only then it counts, and if the row has not changed since;
//! else it is looked at once more. A repair enqueues the keys that
//! differ, and they take every change's way.

use std::hash::BuildHasher;
use std::time::Instant;

use es::{Compare, Compared, Failure, FailureKind, Ids, Output, Wanted};
use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};

use super::ask;
use super::record::{self, Counts, Extent};
use super::step::{Context, LOCKED_REST, PROGRESS_EVERY, Step, UnderWay};
use crate::attachment::key::{self, is_too_long};
use crate::attachment::{routing, state};
use crate::capture::Changes;
use crate::document::read::Row;
use crate::postgres::error::SqlError;
use crate::postgres::transaction;
use crate::queue::dead_letter;
use crate::queue::insert;
use crate::queue::table::Queue;
use crate::worker::lane::Lane;

/// Rows and bytes of documents compared at once.
const PAGE_ROWS: i64 = 2_000;
const PAGE_BYTES: usize = 2 * 1024 * 1024;
/// Ids taken from the engine at once.
const PAGE_IDS: usize = 2_000;
/// Suspects gathered before they are looked at again.
const MAX_SUSPECTS: usize = 2_000;
/// A row that has changed so often from one look to the next, and was never seen on its way, is judged all the same.
const MAX_CHANGES: u8 = 100;

/// A comparison under way.
pub struct Verify {
    pub job: i64,
    pub attachment: i32,
    extent: Extent,
    phase: Phase,
    /// The concrete index that is compared; None before the first step.
    index: Option<String>,
    /// The last key whose row was read.
    position: Option<String>,
    done: i64,
    /// The same when nothing was in doubt: rows up to there are compared, and what differed is counted and mended. A
    /// comparison that is interrupted goes on from here.
    settled: (Option<String>, i64),
    counts: Counts,
    /// What differed at first sight.
    suspects: Vec<Suspect>,
    rows_at_once: i64,
    /// Fewer after each request that failed: the documents that the index has may be larger than those that it should have.
    compared_at_once: usize,
    written_down: Instant,
    failures: u32,
}

/// A key whose row and document may differ.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Suspect {
    key: String,
    /// Of a routed index: where a document was found; None for a row.
    found: Option<Option<String>>,
    /// What its row said when it was last compared, and how often that was something else than before.
    text: Option<u64>,
    changes: u8,
}

impl Suspect {
    fn row(key: String, text: Option<u64>, changes: u8) -> Self {
        Self { key, found: None, text, changes }
    }
}

/// A suspect's row that is compared.
struct Again {
    key: String,
    text: u64,
    /// As of the suspect.
    former: Option<u64>,
    changes: u8,
}

enum Phase {
    Rows,
    Comparing {
        call: u64,
        rows: Vec<(String, u64)>,
        last: bool,
    },
    /// What was written before must be searchable, or a deleted document is taken for an orphan.
    Refresh,
    Refreshing(u64),
    Ids(Option<String>),
    Listing(u64),
    /// The second look waits until everything below the mark has been delivered.
    Await {
        mark: i64,
        due: Instant,
        then: Box<Phase>,
    },
    Again(Box<Phase>),
    ComparingAgain {
        call: u64,
        present: Vec<Again>,
        /// Documents that have no row.
        absent: Vec<Suspect>,
        then: Box<Phase>,
    },
    /// What was enqueued for mending is on its way.
    Drain,
    Pause {
        until: Instant,
        then: Box<Phase>,
    },
    Finish,
    Over,
}

impl Phase {
    /// True while the engine is asked for documents.
    fn compares(&self) -> bool {
        matches!(self, Phase::Comparing { .. } | Phase::ComparingAgain { .. })
    }
}

impl Verify {
    pub fn new(job: &record::Job, attachment: i32) -> Self {
        Self {
            job: job.id,
            attachment,
            extent: job.extent,
            // The ids are gone through from the beginning again: the engine forgets a scroll.
            phase: if job.extent.orphans_only || job.phase.as_deref() == Some("documents") {
                Phase::Refresh
            } else {
                Phase::Rows
            },
            index: None,
            position: job.position.clone(),
            done: job.done,
            settled: (job.position.clone(), job.done),
            counts: Counts { orphaned: 0, ..job.counts },
            suspects: Vec::new(),
            rows_at_once: PAGE_ROWS,
            compared_at_once: PAGE_ROWS as usize,
            written_down: Instant::now(),
            failures: 0,
        }
    }

    /// Takes in that somebody asked for more: a repair, or a new beginning.
    pub fn take(&mut self, job: &record::Job) {
        self.extent.repair |= job.extent.repair;
        // Also before its first step: it may have become another one, of all rows instead of the orphans.
        if job.state == "queued" {
            *self = Self::new(job, self.attachment);
        }
    }
}

impl UnderWay for Verify {
    fn job(&self) -> i64 {
        self.job
    }

    fn attachment(&self) -> i32 {
        self.attachment
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    fn step(&mut self, context: &mut Context, now: Instant) -> Result<Step, SqlError> {
        let live = context.attachment.live.clone();
        let waits =
            |lane: &Lane| lane.attachment == self.attachment && (lane.building || live.as_ref() != Some(&lane.index));
        let is_left = |live: &String| !context.delivery.lanes.iter().any(|lane| &lane.index == live);
        if live.as_ref().is_some_and(is_left) {
            // A build has left it behind: what would mend it would not arrive.
            return Ok(Step::Wait(Some(now + PROGRESS_EVERY)));
        }
        if self.extent.orphans_only && context.delivery.lanes.iter().any(waits) {
            // A build may have read rows before they went. Its index is looked through once it is known to be live.
            return Ok(Step::Wait(Some(now + PROGRESS_EVERY)));
        }
        let Some(live) = live else {
            // It is being built: then it will be as the table is.
            return self.finish(context, "the index is being built anew").map(|()| Step::Over);
        };
        if self.index.as_ref() != Some(&live) {
            if self.index.is_some() {
                // Another index was swapped in.
                self.position = None;
                self.done = 0;
                self.settled = (None, 0);
                self.counts = Counts::default();
                self.suspects.clear();
                self.phase = if self.extent.orphans_only { Phase::Refresh } else { Phase::Rows };
            }
            if !self.begin(context, &live)? {
                // Sent back to its beginning, or cancelled: that is known as soon as the jobs have been read.
                return Ok(Step::Wait(Some(now + LOCKED_REST)));
            }
            let attachment = self.attachment;
            let letters = transaction::run_without_waiting(|| dead_letter::keys_of(attachment))?;
            context.delivery.set_parked(attachment, letters);
            // What is on its way was read before whatever led to this comparison, maybe; and what is passed over later
            // because it is on its way must have been read after.
            let then = Box::new(std::mem::replace(&mut self.phase, Phase::Over));
            self.phase = Phase::Await { mark: context.shared.queue_mark(), due: now, then };
            self.index = Some(live);
        }
        match &self.phase {
            Phase::Comparing { .. } | Phase::Refreshing(_) | Phase::Listing(_) | Phase::ComparingAgain { .. } => {
                return Ok(Step::Wait(None));
            }
            Phase::Pause { until, .. } if *until > now => return Ok(Step::Wait(Some(*until))),
            _ if context.held => return Ok(Step::Wait(None)),
            Phase::Await { due, .. } if *due > now => return Ok(Step::Wait(Some(*due))),
            Phase::Over => return Ok(Step::Over),
            _ => {}
        }
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Pause { then, .. } => self.phase = *then,
            Phase::Rows => self.rows(context, now)?,
            Phase::Refresh => {
                self.settle_position();
                let index = self.index.clone().unwrap_or_default();
                self.phase = Phase::Refreshing(context.engine.call(move |client| client.refresh(&index)));
                self.note_progress("documents")?;
            }
            Phase::Ids(scroll) => {
                let index = self.index.clone().unwrap_or_default();
                self.phase = Phase::Listing(context.engine.call(move |client| {
                    let page = match &scroll {
                        None => client.first_ids(&index, PAGE_IDS)?,
                        Some(scroll) => client.next_ids(scroll)?,
                    };
                    if page.ids.is_empty() {
                        client.end_scroll(&page.scroll);
                    }
                    Ok(page)
                }));
            }
            Phase::Await { mark, then, .. } => {
                if let Some(due) = context.look(mark, now)? {
                    self.phase = Phase::Await { mark, due, then };
                    return Ok(Step::Wait(Some(due)));
                }
                self.phase = *then;
            }
            Phase::Again(then) => self.look_again(context, *then, now)?,
            Phase::Drain => {
                self.note_progress("drain")?;
                let mark = context.shared.queue_mark();
                self.phase = Phase::Await { mark, due: now, then: Box::new(Phase::Finish) };
            }
            Phase::Finish => {
                self.phase = Phase::Finish;
                self.finish(context, "")?;
            }
            waiting => self.phase = waiting,
        }
        if now.duration_since(self.written_down) >= PROGRESS_EVERY {
            let phase = if matches!(self.phase, Phase::Ids(_) | Phase::Listing(_)) { "documents" } else { "rows" };
            self.note_progress(phase)?;
        }
        Ok(if self.is_over() { Step::Over } else { Step::Again })
    }

    fn answered(
        &mut self,
        token: u64,
        result: &Result<Output, Failure>,
        context: &mut Context,
    ) -> Result<bool, SqlError> {
        let now = Instant::now();
        let own = match &self.phase {
            Phase::Comparing { call, .. } | Phase::ComparingAgain { call, .. } => *call,
            Phase::Refreshing(call) | Phase::Listing(call) => *call,
            _ => return Ok(false),
        };
        if own != token {
            return Ok(false);
        }
        let phase = std::mem::replace(&mut self.phase, Phase::Over);
        let output = match result {
            Ok(output) => output,
            Err(failure) => {
                self.failed(phase, failure, context, now)?;
                return Ok(true);
            }
        };
        self.failures = 0;
        if phase.compares() {
            self.compared_at_once = (self.compared_at_once * 2).min(PAGE_ROWS as usize);
        }
        match phase {
            Phase::Comparing { rows, last, .. } => {
                for ((key, text), compared) in rows.into_iter().zip(output.get::<Vec<Compared>>()) {
                    if *compared != Compared::Equal {
                        self.suspects.push(Suspect::row(key, Some(text), 0));
                    }
                }
                self.phase = Phase::Rows;
                if last {
                    match self.after_rows() {
                        Phase::Again(then) => self.await_then_again(context, now, *then),
                        phase => self.phase = phase,
                    }
                }
            }
            Phase::Refreshing(_) => self.phase = Phase::Ids(None),
            Phase::Listing(_) => self.listed(output.get(), context, now)?,
            Phase::ComparingAgain { present, absent, then, .. } => {
                let (mut differing, mut orphans) = (Vec::new(), Vec::new());
                let (rows, documents): &(Vec<Compared>, Vec<Compared>) = output.get();
                let index = self.index.clone().unwrap_or_default();
                let mut in_flux = false;
                for (Again { key, text, former, changes }, compared) in present.into_iter().zip(rows) {
                    let has_changed = former != Some(text);
                    match compared {
                        Compared::Equal => {}
                        // Its dead letter says so already.
                        _ if !self.extent.repair && context.delivery.is_parked(self.attachment, &key) => {}
                        // Its last change may have been on its way: that is nobody's fault.
                        _ if has_changed && Self::is_under_way(context, &index, &key) => {}
                        _ if has_changed && changes < MAX_CHANGES => {
                            in_flux = true;
                            self.suspects.push(Suspect::row(key, Some(text), changes + 1));
                        }
                        Compared::Missing => {
                            self.counts.missing += 1;
                            differing.push(key);
                        }
                        Compared::Different => {
                            self.counts.different += 1;
                            differing.push(key);
                        }
                    }
                }
                for (orphan, compared) in absent.into_iter().zip(documents) {
                    if *compared == Compared::Equal {
                        self.counts.orphaned += 1;
                        orphans.push(orphan);
                    }
                }
                self.mend(differing, orphans, context)?;
                match self.suspects.is_empty() {
                    _ if in_flux => self.await_then_again(context, now, *then),
                    true => self.phase = *then,
                    false => self.phase = Phase::Again(then),
                }
            }
            other => self.phase = other,
        }
        Ok(true)
    }
}

impl Verify {
    fn begin(&self, context: &Context, index: &str) -> Result<bool, SqlError> {
        let estimate = context.reader.shape().estimated_rows;
        let total = (estimate >= 0.0).then_some(estimate as i64);
        let (position, done) = &self.settled;
        transaction::run_without_waiting(|| {
            record::resume(self.job, Some(index), total, position.as_deref(), *done, Some(self.extent))
        })
    }

    fn is_sampled(&self, key: &str) -> bool {
        self.extent.sample >= 1.0
            || (FxBuildHasher.hash_one(key) >> 40) as f32 / (1u64 << 24) as f32 <= self.extent.sample
    }

    /// What is on its way to the index differs for a moment, and is nobody's fault.
    fn is_under_way(context: &Context, index: &str, key: &str) -> bool {
        context.delivery.lanes.iter().any(|lane| lane.index == index && lane.contains(key))
    }

    fn rows(&mut self, context: &mut Context, now: Instant) -> Result<(), SqlError> {
        if self.suspects.len() >= MAX_SUSPECTS {
            self.await_then_again(context, now, Phase::Rows);
            return Ok(());
        }
        self.settle_position();
        let limit = self.rows_at_once.min(self.compared_at_once as i64);
        let mut page: Vec<Document> = Vec::new();
        let (mut rows, mut bytes, mut last) = (0, 0, None::<String>);
        let after = self.position.clone();
        let read = transaction::run_without_waiting(|| {
            context.reader.lock();
            context.reader.page(after.as_deref(), limit, |row| {
                rows += 1;
                page.extend(Document::of(row));
                bytes += row.document.map_or(0, <[u8]>::len);
                last = Some(row.key.to_owned());
                bytes < PAGE_BYTES
            })
        });
        let uninterrupted = match read {
            Ok(uninterrupted) => uninterrupted,
            Err(error) if context.reader.blames_a_row(&error) => return self.skip_unreadable(context),
            Err(error) if error.passes_soon() => {
                self.phase = Phase::Pause { until: now + LOCKED_REST, then: Box::new(Phase::Rows) };
                return Ok(());
            }
            Err(error) => return self.could_not_read(&error, Phase::Rows, context, now),
        };
        self.rows_at_once = (self.rows_at_once * 2).min(PAGE_ROWS);
        let ended = uninterrupted && rows < limit;
        if let Some(last) = last {
            self.position = Some(last);
        }
        self.done += rows;
        let index = self.index.clone().unwrap_or_default();
        page.retain(|Document { key, .. }| {
            self.is_sampled(key) && !is_too_long(key) && !Self::is_under_way(context, &index, key)
        });
        let rows = page.iter().map(|document| (document.key.clone(), document.hash())).collect();
        let how = how(context);
        let call = context.engine.call(move |client| client.compare(&index, &wanted(page), how));
        self.phase = Phase::Comparing { call, rows, last: ended };
        Ok(())
    }

    fn could_not_read(
        &mut self,
        error: &SqlError,
        then: Phase,
        context: &mut Context,
        now: Instant,
    ) -> Result<(), SqlError> {
        self.rest(&format!("could not read rows: {}", error.message), then, context, now)
    }

    /// Goes on with `then` after a while, which grows with each failure in a row.
    fn rest(&mut self, why: &str, then: Phase, context: &mut Context, now: Instant) -> Result<(), SqlError> {
        let until = context.pause(self.job, &mut self.failures, why, now)?;
        self.phase = Phase::Pause { until, then: Box::new(then) };
        Ok(())
    }

    /// A row that cannot be read is left to the changes' way: its page is read by ever smaller pages.
    fn skip_unreadable(&mut self, context: &mut Context) -> Result<(), SqlError> {
        self.phase = Phase::Rows;
        if self.rows_at_once > 1 {
            self.rows_at_once /= 2;
            return Ok(());
        }
        let after = self.position.clone();
        match transaction::run_without_waiting(|| context.reader.next_key(after.as_deref()))? {
            None => self.phase = self.after_rows(),
            Some(key) => {
                self.park(vec![key.clone()], context)?;
                self.position = Some(key);
            }
        }
        Ok(())
    }

    /// Enqueues rows that cannot be read, so that they get their dead letters: what the index has of them is old.
    fn park(&mut self, keys: Vec<String>, context: &mut Context) -> Result<(), SqlError> {
        let keys = keys.into_iter().filter(|key| !context.delivery.is_parked(self.attachment, key)).collect();
        self.mend(keys, Vec::new(), context)
    }

    /// Called where no answer is awaited.
    fn settle_position(&mut self) {
        if self.suspects.is_empty() {
            self.settled = (self.position.clone(), self.done);
        }
    }

    fn after_rows(&self) -> Phase {
        if self.suspects.is_empty() { Phase::Refresh } else { Phase::Again(Box::new(Phase::Refresh)) }
    }

    fn await_then_again(&mut self, context: &Context, now: Instant, then: Phase) {
        let again = Box::new(Phase::Again(Box::new(then)));
        self.phase = Phase::Await { mark: context.shared.queue_mark(), due: now, then: again };
    }

    /// Reads the suspects' rows anew and has them compared; what does not fit into one request stays a suspect.
    fn look_again(&mut self, context: &mut Context, then: Phase, now: Instant) -> Result<(), SqlError> {
        if self.suspects.is_empty() {
            self.phase = then;
            return Ok(());
        }
        let index = self.index.clone().unwrap_or_default();
        let (under_way, mut suspects): (Vec<_>, Vec<_>) = std::mem::take(&mut self.suspects)
            .into_iter()
            .partition(|suspect| Self::is_under_way(context, &index, &suspect.key));
        // What is on its way puts right where the row says, and need not know of any other place.
        self.mend(Vec::new(), under_way.into_iter().filter(|suspect| suspect.found.is_some()).collect(), context)?;
        self.suspects = suspects.split_off(suspects.len().min(self.compared_at_once));
        let mut keys: Vec<String> = suspects.iter().map(|suspect| suspect.key.clone()).collect();
        keys.sort_unstable();
        keys.dedup();
        let read = match read_keys(context, keys) {
            Ok(read) => read,
            Err(error) => {
                self.suspects.extend(suspects);
                return self.could_not_read(&error, Phase::Again(Box::new(then)), context, now);
            }
        };
        if read.is_too_much {
            self.compared_at_once = suspects.len().min(self.compared_at_once).div_ceil(2);
        }
        let unread: FxHashSet<&str> = read.unread.iter().map(String::as_str).collect();
        let unreadable: FxHashSet<&str> = read.unreadable.iter().map(String::as_str).collect();
        let how = how(context);
        let (mut rows, mut absent) = (FxHashMap::default(), Vec::new());
        let documents: FxHashMap<&str, &Document> =
            read.present.iter().map(|document| (document.key.as_str(), document)).collect();
        for suspect in suspects {
            match (documents.get(suspect.key.as_str()), &suspect.found) {
                _ if unread.contains(suspect.key.as_str()) => self.suspects.push(suspect),
                _ if unreadable.contains(suspect.key.as_str()) => {}
                (Some(_), None) => drop(rows.insert(suspect.key, (suspect.text, suspect.changes))),
                (Some(document), Some(found)) if document.routing == *found => {
                    rows.entry(suspect.key).or_insert((suspect.text, suspect.changes));
                }
                // A row that is gone by now: where its document lies is known only when all are listed.
                (None, None) if how.routed => {}
                _ => absent.push(suspect),
            }
        }
        self.park(read.unreadable, context)?;
        let mut documents = read.present;
        documents.retain(|document| rows.contains_key(&document.key));
        let again = |document: &Document| {
            let (former, changes) = rows.get(&document.key).copied().unwrap_or_default();
            Again { key: document.key.clone(), text: document.hash(), former, changes }
        };
        let present = documents.iter().map(again).collect();
        let places = absent.clone();
        let call = context.engine.call(move |client| {
            let place =
                |suspect: Suspect| Document { key: suspect.key, routing: suspect.found.flatten(), text: Vec::new() };
            let places = wanted(places.into_iter().map(place).collect());
            let present = client.compare(&index, &wanted(documents), how)?;
            Ok((present, client.compare(&index, &places, Compare { contents: false, ..how })?))
        });
        self.phase = Phase::ComparingAgain { call, present, absent, then: Box::new(then) };
        Ok(())
    }

    fn listed(&mut self, page: &Ids, context: &mut Context, now: Instant) -> Result<(), SqlError> {
        if page.ids.is_empty() {
            let end = Phase::Drain;
            if self.suspects.is_empty() {
                self.phase = end;
            } else {
                self.await_then_again(context, now, end);
            }
            return Ok(());
        }
        let index = self.index.clone().unwrap_or_default();
        let routed = how(context).routed;
        let found: Vec<Suspect> = page
            .ids
            .iter()
            .map(|(id, routing)| {
                let found = routed.then(|| routing.clone());
                Suspect { found, ..Suspect::row(key::of_document_id(id), None, 0) }
            })
            .filter(|found| self.is_sampled(&found.key))
            .filter(|found| found.found.is_some() || !Self::is_under_way(context, &index, &found.key))
            .collect();
        let (suspects, unreadable) = match without_rows(context, found) {
            Ok(found) => found,
            Err(error) => {
                // The scroll would be forgotten while this waits.
                let scroll = page.scroll.clone();
                context.engine.call(move |client| {
                    client.end_scroll(&scroll);
                    Ok(())
                });
                let then = self.list_anew();
                return self.could_not_read(&error, then, context, now);
            }
        };
        self.suspects.extend(suspects);
        self.park(unreadable, context)?;
        let next = Phase::Ids(Some(page.scroll.clone()));
        if self.suspects.len() >= MAX_SUSPECTS {
            self.await_then_again(context, now, next);
        } else {
            self.phase = next;
        }
        Ok(())
    }

    fn mend(&mut self, keys: Vec<String>, orphans: Vec<Suspect>, context: &mut Context) -> Result<(), SqlError> {
        if !self.extent.repair || (keys.is_empty() && orphans.is_empty()) {
            return Ok(());
        }
        let (mut rows, mut moves) = (Changes::default(), Changes::default());
        rows.texts.extend(keys.into_iter().map(String::into_boxed_str));
        for orphan in orphans {
            match orphan.found {
                None => drop(rows.texts.insert(orphan.key.into_boxed_str())),
                Some(routing) => {
                    let mut noted = String::new();
                    routing::push(&mut noted, &orphan.key, routing.as_deref());
                    moves.texts.insert(noted.into_boxed_str());
                }
            }
        }
        let mut changes = vec![(context.attachment.relation.to_u32(), rows)];
        changes.extend(context.attachment.routing_source.map(|source| (source, moves)));
        transaction::run(|| {
            insert::write(Queue::Changes, changes, &[]);
        })?;
        context.delivery.enqueued = true;
        Ok(())
    }

    fn failed(&mut self, phase: Phase, failure: &Failure, context: &mut Context, now: Instant) -> Result<(), SqlError> {
        let job = self.job;
        let message = failure.to_string();
        let then = match (phase, failure.kind) {
            // The scroll has expired: the ids from the beginning.
            (Phase::Listing(_), FailureKind::NotFound) => self.list_anew(),
            (phase, FailureKind::NotFound) => {
                let index = self.index.clone();
                let lane = context.delivery.lanes.iter().find(|lane| Some(&lane.index) == index.as_ref());
                if let Some(lane) = lane.map(|lane| lane.id) {
                    context.delivery.missing.push(lane);
                }
                self.retried(phase)
            }
            (phase, kind) if kind.is_transient() || kind.outcome_unknown() => self.retried(phase),
            _ => {
                let done = self.done;
                transaction::run_without_waiting(|| record::finish(job, "failed", done, Some(&message)))?;
                pgrx::warning!("could not compare index \"{}\": {message}", context.attachment.index);
                return Ok(());
            }
        };
        self.rest(&message, then, context, now)
    }

    /// The phase whose request failed, to be taken again.
    fn retried(&mut self, phase: Phase) -> Phase {
        if phase.compares() {
            self.compared_at_once = self.compared_at_once.div_ceil(2);
        }
        match phase {
            Phase::Comparing { rows, last, .. } => {
                // Seen again at the second look, which is the first that compares them.
                self.suspects.extend(rows.into_iter().map(|(key, _)| Suspect::row(key, None, 0)));
                if last { self.after_rows() } else { Phase::Rows }
            }
            Phase::ComparingAgain { present, absent, then, .. } => {
                let present = present.into_iter().map(|row| Suspect::row(row.key, row.former, row.changes));
                self.suspects.extend(present.chain(absent));
                Phase::Again(then)
            }
            _ => self.list_anew(),
        }
    }

    /// The ids are gone through from the beginning again. What was orphaned and not mended is found once more.
    fn list_anew(&mut self) -> Phase {
        if !self.extent.repair {
            self.counts.orphaned = 0;
        }
        self.suspects.clear();
        Phase::Refresh
    }

    fn note_progress(&mut self, phase: &str) -> Result<(), SqlError> {
        let (job, (position, done), counts) = (self.job, self.settled.clone(), self.counts);
        transaction::run(|| {
            record::progress(job, phase, position.as_deref(), done);
            record::counts(job, &counts);
            record::trouble(job, None);
        })?;
        self.written_down = Instant::now();
        Ok(())
    }

    fn finish(&mut self, context: &Context, why: &str) -> Result<(), SqlError> {
        let (job, attachment, done, counts, repair) =
            (self.job, self.attachment, self.done, self.counts, self.extent.repair && why.is_empty());
        let whole = repair && self.extent.sample >= 1.0;
        let everything = whole && !self.extent.orphans_only && context.contents_comparable();
        let over = transaction::run_without_waiting(|| {
            let over = if why.is_empty() {
                record::finish_running(job, done)
            } else {
                record::finish(job, "done", done, Some(why));
                true
            };
            if !over {
                return false;
            }
            record::counts(job, &counts);
            let is_repaired_again = ask::for_what_follows(job);
            if everything && !is_repaired_again {
                state::clear_stale(attachment);
            } else if whole {
                state::settle_partitions(attachment);
            }
            true
        })?;
        self.phase = Phase::Over;
        if !over {
            // Cancelled, or sent back to its beginning by somebody who has just committed.
            return Ok(());
        }
        let Counts { missing, different, orphaned } = counts;
        pgrx::log!(
            "index \"{}\" was compared with its table: {done} rows, {missing} documents missing, {different} different, {orphaned} orphaned{}",
            context.attachment.index,
            if repair { "; mended" } else { "" }
        );
        Ok(())
    }
}

/// A document as its row says.
struct Document {
    key: String,
    routing: Option<String>,
    text: Vec<u8>,
}

impl Document {
    /// Stands for what the row says.
    fn hash(&self) -> u64 {
        FxBuildHasher.hash_one((&self.text, &self.routing))
    }

    /// None where the row has no document.
    fn of(row: Row) -> Option<Self> {
        let text = row.document?.to_vec();
        Some(Self { key: row.key.to_owned(), routing: row.routing.map(str::to_owned), text })
    }
}

fn how(context: &Context) -> Compare {
    let routed = context.attachment.routing_source.is_some();
    Compare { contents: context.contents_comparable(), routed }
}

fn wanted(documents: Vec<Document>) -> Vec<Wanted> {
    let wanted =
        |Document { key, routing, text }| Wanted { id: key::document_id(&key).into_owned(), routing, document: text };
    documents.into_iter().map(wanted).collect()
}

#[derive(Default)]
struct Read {
    present: Vec<Document>,
    absent: Vec<String>,
    /// Did not fit.
    unread: Vec<String>,
    /// The row is there, and Postgres cannot make a document of it.
    unreadable: Vec<String>,
    /// So many at once take longer than they may.
    is_too_much: bool,
}

/// Reads the rows of `keys`. Keys that no row can have are absent.
fn read_keys(context: &mut Context, keys: Vec<String>) -> Result<Read, SqlError> {
    let mut present: Vec<Document> = Vec::new();
    let mut bytes = 0;
    let read = transaction::run_without_waiting(|| {
        let texts: Vec<&str> = keys.iter().map(String::as_str).collect();
        context.reader.lock();
        context.reader.by_keys(&texts, |row| {
            present.extend(Document::of(row));
            bytes += row.document.map_or(0, <[u8]>::len);
            bytes < PAGE_BYTES
        })
    });
    match read {
        Ok(complete) => {
            let wanted: FxHashSet<&str> = keys.iter().map(String::as_str).collect();
            // A row under another text (1.00 for 1.0) is not the one that was asked for.
            present.retain(|document| wanted.contains(document.key.as_str()));
            let seen: FxHashSet<&str> = present.iter().map(|document| document.key.as_str()).collect();
            let others: Vec<String> = keys.iter().filter(|key| !seen.contains(key.as_str())).cloned().collect();
            let (absent, unread) = if complete { (others, Vec::new()) } else { (Vec::new(), others) };
            Ok(Read { present, absent, unread, ..Read::default() })
        }
        Err(error) if !context.reader.blames_a_row(&error) => Err(error),
        Err(_) if keys.len() == 1 => {
            let possible = context.reader.is_key(&keys[0])?;
            let (absent, unreadable) = if possible { (Vec::new(), keys) } else { (keys, Vec::new()) };
            Ok(Read { absent, unreadable, ..Read::default() })
        }
        // Each try takes long: the worker has other work in between.
        Err(error) if error.was_cancelled() => Ok(Read { unread: keys, is_too_much: true, ..Read::default() }),
        Err(_) => {
            let mut keys = keys;
            let rest = keys.split_off(keys.len() / 2);
            let (mut one, two) = (read_keys(context, keys)?, read_keys(context, rest)?);
            one.present.extend(two.present);
            one.absent.extend(two.absent);
            one.unread.extend(two.unread);
            one.unreadable.extend(two.unreadable);
            one.is_too_much |= two.is_too_much;
            Ok(one)
        }
    }
}

/// Those of the documents that have no row, or one that leads elsewhere; and keys whose rows cannot be read.
fn without_rows(context: &mut Context, documents: Vec<Suspect>) -> Result<(Vec<Suspect>, Vec<String>), SqlError> {
    let (mut left, mut places, mut unreadable) = (Vec::new(), FxHashMap::default(), Vec::new());
    for document in documents {
        left.push(document.key.clone());
        places.entry(document.key.clone()).or_insert_with(Vec::new).push(document);
    }
    left.sort_unstable();
    left.dedup();
    while !left.is_empty() {
        let read = read_keys(context, left)?;
        for document in read.present {
            if let Some(found) = places.get_mut(&document.key) {
                found.retain(|found| found.found.as_ref().is_some_and(|found| *found != document.routing));
            }
        }
        for key in &read.unreadable {
            places.remove(key);
        }
        unreadable.extend(read.unreadable);
        // Not known now; as suspects they are looked at again, a few at a time.
        left = if read.is_too_much { Vec::new() } else { read.unread };
    }
    Ok((places.into_values().flatten().collect(), unreadable))
}
