//! Building an index beside the live one: create, load, settle, drain, swap. The first load is the same job.
//!
//! While it runs, live changes go to both indexes. Nothing is lost in between: the job's lane is open before the first
//! page's snapshot is taken, and whatever was claimed earlier was committed earlier, so the pages have it.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Instant;

use es::{Failure, FailureKind, Output, Standing};
use rustc_hash::FxHashSet;
use serde_json::json;

use super::step::{Context, LOCKED_REST, PROGRESS_EVERY, Step, UnderWay};
use super::{ask, record};
use crate::attachment::catalog::{self, Attachment};
use crate::attachment::state;
use crate::capture::{self, Changes};
use crate::document::shape::Shape;
use crate::postgres::error::SqlError;
use crate::postgres::transaction::{self, Scope};
use crate::queue::dead_letter;
use crate::queue::insert;
use crate::queue::table::Queue;
use crate::shared;
use crate::worker::delivery::Delivery;
use crate::worker::lane::{Lane, Page};

/// Pages that may be open at once, beyond one for each connection, where one takes longer than those after it: the engine
/// lets a request wait while it writes a segment, or some of its documents are sent once more.
const PAGES_AHEAD: usize = 16;
/// A page with a row that cannot be read is searched from this size down.
const MAX_FAILING_PAGE: usize = 1_024;

/// A build under way.
pub struct Build {
    pub job: i64,
    pub attachment: i32,
    phase: Phase,
    target: Option<String>,
    /// What was begun before: it is dropped before anything else is created, so that there is one at the most. Until then
    /// the job's row names it.
    former: Option<String>,
    lane: Option<u32>,
    filling: Filling,
    next_page: Page,
    written_down: Instant,
    failures: u32,
    /// The first build of an attachment, not a rebuild.
    first: bool,
    /// The fields that the target was created with; None for one that a former worker has created.
    mapping: Option<Rc<str>>,
    /// The other attachment of the table that the job says it waits for.
    awaited: Option<i32>,
}

/// How far one target is: another one begins without.
#[derive(Default)]
struct Filling {
    /// The last key read.
    after: Option<String>,
    exhausted: bool,
    pages: VecDeque<Sent>,
    /// Key of the last row of the last finished page, and how many rows that makes.
    position: Option<String>,
    done: i64,
    /// The call that settles the index while the last pages are under way: the engine writes its segments with whatever
    /// thread comes along then, and with one alone once all requests are answered.
    early: Option<u64>,
    /// It has the settings of a live index again.
    has_settings: bool,
    /// The live index took nothing, and gets no changes any more.
    has_left_live: bool,
    /// The engine has refused to swap: nothing is behind the alias yet.
    swap_refused: bool,
}

struct Sent {
    page: Page,
    left: usize,
    rows: usize,
    last: String,
}

/// What the engine is asked for on the way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Call {
    /// To drop what was begun before, as far as it is there.
    Drop,
    /// To create the index, under a name that is chosen now.
    Create,
    /// After a restart of the worker: whether the target still stands.
    Look,
    /// To give settings back, and to make searchable what was loaded.
    Settle,
    /// To put the index behind the alias.
    Swap,
}

#[derive(Debug)]
enum Phase {
    /// The engine is to be asked.
    To(Call),
    Asked(Call, u64),
    Load,
    /// Waits until everything below the mark has been delivered.
    Drain {
        mark: i64,
        due: Instant,
    },
    Pause {
        until: Instant,
        then: Box<Phase>,
    },
    Over,
}

/// The way to an attachment's concrete index.
pub fn target(attachment: &Attachment, index: &str, generation: i64) -> es::Target {
    es::Target { alias: es::write_alias(index, generation), pipeline: attachment.options.pipeline.clone() }
}

impl Build {
    pub fn new(job: &record::Job, attachment: i32) -> Self {
        let (target, former) = match job.state.as_str() {
            "queued" => (None, job.target.clone()),
            _ => (job.target.clone(), None),
        };
        Self {
            job: job.id,
            attachment,
            phase: Phase::To(if target.is_some() { Call::Look } else { Call::Create }),
            target,
            former,
            lane: None,
            filling: Filling {
                after: job.position.clone(),
                position: job.position.clone(),
                done: job.done,
                ..Filling::default()
            },
            next_page: 1,
            written_down: Instant::now(),
            failures: 0,
            first: job.kind == "load",
            mapping: None,
            awaited: None,
        }
    }

    /// Takes in that all rows are wanted after all.
    pub fn take(&mut self, job: &record::Job) {
        self.first &= job.kind == "load";
    }

    /// True once it has chosen its target.
    pub fn has_begun(&self) -> bool {
        self.target.is_some()
    }

    /// True once the live index gets no changes any more, because it took nothing.
    pub fn has_left_live(&self) -> bool {
        self.filling.has_left_live
    }

    /// True once the engine has been asked to put the new index behind the alias: too late to abandon it, whatever
    /// came of the answer.
    pub fn is_swapping(&self) -> bool {
        let phase = match &self.phase {
            Phase::Pause { then, .. } => then,
            phase => phase,
        };
        match phase {
            Phase::Asked(Call::Swap, _) => true,
            Phase::To(Call::Swap) => !self.filling.swap_refused,
            _ => false,
        }
    }

    /// Opens the lane of a build that a former worker began, before anything is claimed.
    pub fn open_lane(&mut self, delivery: &mut Delivery, attachment: &Attachment, generation: i64) {
        if let (None, Some(index)) = (self.lane, self.target.clone()) {
            // Two lanes to an index would each have a document of it outstanding, and nobody closes the other.
            let former = delivery.lanes.iter().filter(|lane| lane.index == index).map(|lane| lane.id);
            former.collect::<Vec<_>>().into_iter().for_each(|lane| delivery.close_lane(lane));
            let target = target(attachment, &index, generation);
            self.lane = Some(delivery.open_lane(attachment, index, true, target));
        }
    }
}

impl UnderWay for Build {
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
        match &self.phase {
            Phase::Pause { until, .. } if *until > now => Ok(Step::Wait(Some(*until))),
            Phase::Pause { .. } => {
                if let Phase::Pause { then, .. } = std::mem::replace(&mut self.phase, Phase::Over) {
                    self.phase = *then;
                }
                Ok(Step::Again)
            }
            Phase::To(Call::Drop) => {
                let Some(former) = self.former.clone() else {
                    self.phase = Phase::To(Call::Create);
                    return Ok(Step::Again);
                };
                self.phase = Phase::Asked(Call::Drop, drop_index(former, context));
                Ok(Step::Wait(None))
            }
            Phase::To(Call::Create) => self.create(context),
            Phase::To(Call::Look) => {
                let (index, owner, generation) = (self.index(), context.owner.to_owned(), context.generation);
                let look = context.engine.call(move |client| client.standing(&index, generation, &owner));
                self.phase = Phase::Asked(Call::Look, look);
                Ok(Step::Wait(None))
            }
            Phase::To(Call::Settle) => {
                let settle = self.settle(context, !self.filling.has_settings);
                self.phase = Phase::Asked(Call::Settle, settle);
                self.note_progress("settle")?;
                Ok(Step::Wait(None))
            }
            Phase::To(Call::Swap) => {
                let (index, alias, owner) = (self.index(), context.attachment.index.clone(), context.owner.to_owned());
                let adopt = context.attachment.options.adopt == Some(true);
                let swap = context.engine.call(move |client| {
                    client.swap(&alias, &index, &owner, adopt)?;
                    Ok(client.index(&index)?.map(|info| info.uuid))
                });
                self.phase = Phase::Asked(Call::Swap, swap);
                self.note_progress("swap")?;
                Ok(Step::Wait(None))
            }
            Phase::Asked(..) => Ok(Step::Wait(None)),
            Phase::Load => self.load(context, now),
            Phase::Drain { due, .. } if *due > now => Ok(Step::Wait(Some(*due))),
            Phase::Drain { mark, .. } => {
                let mark = *mark;
                let Some(due) = context.look(mark, now)? else {
                    self.phase = Phase::To(Call::Swap);
                    return Ok(Step::Again);
                };
                self.phase = Phase::Drain { mark, due };
                self.see_to_what_takes_nothing(context)?;
                Ok(Step::Wait(Some(due)))
            }
            Phase::Over => Ok(Step::Over),
        }
    }

    fn answered(
        &mut self,
        token: u64,
        result: &Result<Output, Failure>,
        context: &mut Context,
    ) -> Result<bool, SqlError> {
        if self.filling.early == Some(token) {
            // If it has failed, the settings are given back after the last document, and why they cannot be is said then.
            self.filling.has_settings = result.is_ok();
            return Ok(true);
        }
        let call = match self.phase {
            Phase::Asked(call, own) if own == token => call,
            _ => return Ok(false),
        };
        // Where the result cannot be written down, the engine is asked once more.
        self.phase = Phase::To(call);
        let noted = match result {
            Ok(output) => {
                // What is created and dropped in turns is tried less and less often, too.
                if call != Call::Drop {
                    self.failures = 0;
                }
                self.succeeded(call, output, context)
            }
            Err(failure) => self.failed(call, failure, context),
        };
        if noted.as_ref().is_err_and(SqlError::passes_soon) {
            self.phase = Phase::Pause { until: Instant::now() + LOCKED_REST, then: Box::new(Phase::To(call)) };
            return Ok(true);
        }
        noted.map(|()| true)
    }

    fn index_missing(&mut self, lane: u32, context: &mut Context) {
        if self.lane == Some(lane) {
            self.close_lane(context);
            self.lose_target();
        }
    }
}

impl Build {
    /// Numbers of pages are unique over all builds: the job's id comes first.
    fn page_number(&mut self) -> Page {
        self.next_page += 1;
        (self.job as u64) << 32 | self.next_page
    }

    /// The concrete index that is being built.
    fn index(&self) -> String {
        self.target.clone().unwrap_or_default()
    }

    /// Gives the index the settings of a live one, if it has not got them, and makes searchable what has arrived.
    fn settle(&self, context: &mut Context, with_settings: bool) -> u64 {
        let index = self.index();
        let settings = with_settings.then(|| Shape::live_settings(context.attachment));
        context.engine.call(move |client| {
            if let Some(settings) = settings {
                client.put_settings(&index, &settings)?;
            }
            client.refresh(&index)
        })
    }

    fn create(&mut self, context: &mut Context) -> Result<Step, SqlError> {
        let Some(dialect) = context.engine.dialect() else { return Ok(Step::Wait(None)) };
        self.close_lane(context);
        let (job, attachment, first) = (self.job, self.attachment, self.first);
        // Whatever became of the one before: the row has room for one name.
        self.former = self.target.take().or_else(|| self.former.take());
        if self.former.is_some() {
            transaction::run_without_waiting(|| {
                // A worker that went on with it would not know what was not delivered to it.
                transaction::set(c"synchronous_commit", c"on", Scope::Local);
                record::restart_build(job);
            })?;
            self.phase = Phase::To(Call::Drop);
            return Ok(Step::Again);
        }
        let estimate = context.reader.shape().estimated_rows;
        let target = transaction::run_without_waiting(|| {
            let total = if estimate >= 0.0 { Some(estimate as i64) } else { None };
            // After a crash the index must be known, and its number taken.
            transaction::set(c"synchronous_commit", c"on", Scope::Local);
            let target = record::next_target(attachment)?;
            record::begin(job, &target, total, first);
            Some(target)
        })?;
        let Some(target) = target else {
            self.phase = Phase::Over;
            return Ok(Step::Over);
        };
        let (index, alias) = (target.clone(), es::write_alias(&target, context.generation));
        self.target = Some(target);
        self.filling = Filling::default();
        self.mapping = Some(context.reader.mapping(context.attachment, dialect));
        let shape = context.reader.shape();
        let optional = shape.optional_types(context.attachment, dialect);
        let body = |reduced| {
            let mut body = shape.index_body(context.attachment, dialect, reduced, context.owner);
            body["aliases"] = json!({&alias: {"is_hidden": true}});
            body
        };
        let (body, reduced) = (body(false), body(true));
        let public = context.attachment.index.clone();
        let owner = context.owner.to_owned();
        let adopt = context.attachment.options.adopt == Some(true);
        let create = context.engine.call(move |client| {
            // A name that is somebody else's is refused before anything is loaded.
            client.make_room(&public, &index, &owner, adopt)?;
            match client.create_index(&index, &body) {
                // Modules and plugins bring these types, and no list of them is the same everywhere: it is tried.
                Err(failure) if failure.lacks(&optional) => {
                    client.create_index(&index, &reduced)?;
                    Ok(optional)
                }
                result => result.map(|()| Vec::new()),
            }
        });
        self.phase = Phase::Asked(Call::Create, create);
        Ok(Step::Wait(None))
    }

    fn load(&mut self, context: &mut Context, now: Instant) -> Result<Step, SqlError> {
        let Some(lane) = self.lane else {
            self.phase = Phase::To(Call::Look);
            return Ok(Step::Again);
        };
        while let Some(sent) = self.filling.pages.pop_front_if(|sent| sent.left == 0) {
            self.filling.done += sent.rows as i64;
            self.filling.position = Some(sent.last);
        }
        let mut stepped = false;
        if !self.filling.exhausted && !context.held {
            let busy = context.delivery.in_flight() > context.engine.sizing.concurrency();
            let open = context.delivery.may_send(lane, now);
            let room = self.filling.pages.len() < context.engine.sizing.concurrency() + PAGES_AHEAD;
            let Context { delivery, reader, attachment, engine, .. } = &mut *context;
            if !busy && open && room && delivery.fit_mapping(lane, reader, attachment, engine) {
                let page = self.page_number();
                let (after, left) = (self.filling.after.as_deref(), self.left(context.reader.shape().estimated_rows));
                let read = context.delivery.send_page(lane, context.reader, context.engine, after, left, page);
                let read = match read {
                    Ok(read) => read,
                    Err(error) => return self.page_failed(context, error, now),
                };
                self.filling.exhausted = read.exhausted;
                if let Some(last) = read.last.map(|last| last.to_string()) {
                    self.filling.after = Some(last.clone());
                    self.filling.pages.push_back(Sent { page, left: read.sent, rows: read.rows, last });
                }
                stepped = true;
            }
        }
        if self.filling.exhausted && self.filling.pages.is_empty() {
            self.phase = Phase::To(Call::Settle);
            return Ok(Step::Again);
        }
        if self.filling.exhausted && self.filling.early.is_none() {
            self.filling.early = Some(self.settle(context, true));
        }
        if now.duration_since(self.written_down) >= PROGRESS_EVERY {
            self.note_progress("load")?;
        }
        Ok(if stepped { Step::Again } else { Step::Wait(Some(now + PROGRESS_EVERY)) })
    }

    /// Rows that are still to be read, as far as the table's statistics tell.
    fn left(&self, estimated_rows: f64) -> Option<usize> {
        let read = self.filling.done as f64 + self.filling.pages.iter().map(|sent| sent.rows as f64).sum::<f64>();
        (estimated_rows > read).then_some((estimated_rows - read) as usize)
    }

    /// A row that cannot be read must not end the load: its page is read by ever smaller pages, and the row is left to the
    /// changes' way, which parks it.
    fn page_failed(&mut self, context: &mut Context, error: SqlError, now: Instant) -> Result<Step, SqlError> {
        let lane = self.lane.and_then(|lane| context.delivery.lane(lane));
        if let Some(lane) = lane.filter(|_| context.reader.blames_a_row(&error)) {
            if lane.max_operations > 1 {
                lane.max_operations = lane.max_operations.min(MAX_FAILING_PAGE).div_ceil(2);
                return Ok(Step::Again);
            }
            let page = self.page_number();
            let after = self.filling.after.as_deref();
            match transaction::run_without_waiting(|| context.reader.next_key(after))? {
                None => self.filling.exhausted = true,
                Some(last) => {
                    let lane = self.lane.and_then(|lane| context.delivery.lane(lane));
                    let left = lane.is_some_and(|lane| lane.backfill_alone(last.as_str().into(), page));
                    self.filling.after = Some(last.clone());
                    self.filling.pages.push_back(Sent { page, left: usize::from(left), rows: 1, last });
                }
            }
            return Ok(Step::Again);
        }
        let why = format!("could not read a page: {}", error.message);
        let until = context.pause(self.job, &mut self.failures, &why, now)?;
        self.phase = Phase::Pause { until, then: Box::new(Phase::Load) };
        Ok(Step::Again)
    }

    /// A document of one of its pages is done. False if the page is another job's.
    pub fn page_done(&mut self, page: Page) -> bool {
        if (page >> 32) as i64 != self.job {
            return false;
        }
        if let Some(sent) = self.filling.pages.iter_mut().find(|sent| sent.page == page) {
            sent.left = sent.left.saturating_sub(1);
        }
        true
    }

    /// What waits for an index that takes nothing is not delivered. If that is the one which is to be replaced, it is left
    /// behind, for it may never take anything again; if it is another one of the table, the job says so.
    fn see_to_what_takes_nothing(&mut self, context: &mut Context) -> Result<(), SqlError> {
        let (source, job) = (context.attachment.relation.to_u32(), self.job);
        let (own, others): (Vec<&Lane>, Vec<&Lane>) = context
            .delivery
            .lanes
            .iter()
            .filter(|lane| lane.source == source)
            .partition(|lane| Some(lane.id) == self.lane);
        // Where the new one takes nothing either, it is the engine that has no room.
        let takes = own.iter().all(|lane| lane.refusals == 0 && !lane.is_stuck());
        let stuck = || others.iter().filter(|lane| takes && lane.is_stuck());
        if let Some(live) = stuck().find(|lane| lane.attachment == self.attachment).map(|lane| lane.id) {
            transaction::run_without_waiting(|| {
                state::mark_stale(self.attachment, "it took no changes while it was rebuilt");
                // What it has found equal may change unnoticed now.
                record::restart_comparison(self.attachment);
                // Before anybody who waits is answered.
                capture::announce_catalog_change();
            })?;
            self.filling.has_left_live = true;
            context.delivery.close_lane(live);
            return Ok(());
        }
        let awaited = stuck().next().map(|lane| lane.attachment);
        if awaited != self.awaited {
            transaction::run(|| {
                let why = awaited.and_then(catalog::of_id).map(|known| {
                    let index = known.index;
                    format!("waits for index \"{index}\" of the same table, which takes nothing (es_sync.pause lets others go on)")
                });
                record::trouble(job, why.as_deref());
            })?;
            self.awaited = awaited;
        }
        Ok(())
    }

    fn note_progress(&mut self, phase: &str) -> Result<(), SqlError> {
        let (job, position, done) = (self.job, self.filling.position.clone(), self.filling.done);
        transaction::run(|| {
            record::progress(job, phase, position.as_deref(), done);
            record::trouble(job, None);
        })?;
        self.written_down = Instant::now();
        Ok(())
    }

    fn succeeded(&mut self, call: Call, output: &Output, context: &mut Context) -> Result<(), SqlError> {
        match call {
            Call::Drop => {
                self.former = None;
                self.phase = Phase::To(Call::Create);
            }
            Call::Create => {
                let lacking: &Vec<String> = output.get();
                if !lacking.is_empty() {
                    pgrx::warning!(
                        "index \"{}\" cannot search columns that would be {}: the engine has no such type",
                        context.attachment.index,
                        lacking.join(" or ")
                    );
                }
                self.open_lane(context.delivery, context.attachment, context.generation);
                if let Some(lane) = self.lane.and_then(|lane| context.delivery.lane(lane)) {
                    lane.mapping = self.mapping.take();
                }
                self.filling.exhausted = self.leaves_rows_out(context);
                self.phase = Phase::Load;
                self.note_progress("load")?;
            }
            Call::Look => match output.get() {
                Standing::Ready => {
                    self.open_lane(context.delivery, context.attachment, context.generation);
                    self.filling.exhausted |= self.leaves_rows_out(context);
                    self.phase = Phase::Load;
                }
                // Only the last note is missing.
                Standing::Live => self.complete(context, None)?,
                Standing::Gone => self.lose_target(),
            },
            Call::Settle => {
                if let Some(lane) = self.lane.and_then(|lane| context.delivery.lane(lane)) {
                    lane.is_loaded = true;
                }
                self.phase = Phase::Drain { mark: context.shared.queue_mark(), due: Instant::now() };
                self.note_progress("drain")?;
            }
            Call::Swap => self.complete(context, output.get::<Option<String>>().as_deref())?,
        }
        Ok(())
    }

    /// The new index is live: the old lane closes, this one stays.
    fn complete(&mut self, context: &mut Context, uuid: Option<&str>) -> Result<(), SqlError> {
        let index = self.index();
        let (job, attachment, done, first) = (self.job, self.attachment, self.filling.done, self.first);
        let source = context.attachment.relation.to_u32();
        let ended = transaction::run_without_waiting(|| {
            let ended = record::finish_build(job, &index, done);
            state::set_live(attachment, &index, uuid, ended == Some(true));
            if ask::for_what_follows(job) {
                // Before anybody who waits is answered.
                capture::announce_catalog_change();
            }
            if !first {
                // What the former index has refused, the new one may take.
                let texts: FxHashSet<Box<str>> =
                    dead_letter::keys_of(attachment).into_iter().map(String::into_boxed_str).collect();
                if !texts.is_empty() {
                    insert::write(Queue::Changes, vec![(source, Changes { texts, ..Changes::default() })], &[]);
                }
            }
            ended
        })?;
        context.delivery.enqueued |= !first;
        let old = context.delivery.lanes.iter().find(|lane| lane.attachment == attachment && !lane.building);
        if let Some(old) = old.map(|lane| lane.id) {
            context.delivery.close_lane(old);
        }
        self.open_lane(context.delivery, context.attachment, context.generation);
        // From here on the lane belongs to the attachment: this job's end must not close it.
        if let Some(lane) = self.lane.take().and_then(|lane| context.delivery.lane(lane)) {
            lane.building = false;
        }
        self.target = None;
        pgrx::log!("index \"{}\" is built: {done} rows in \"{index}\"", context.attachment.index);
        // Where somebody has asked for another beginning meanwhile, it begins again beside what is live now.
        self.phase = if ended.is_some() { Phase::Over } else { Phase::To(Call::Create) };
        self.first &= ended.is_some();
        Ok(())
    }

    fn failed(&mut self, call: Call, failure: &Failure, context: &mut Context) -> Result<(), SqlError> {
        let job = self.job;
        let passing = failure.kind.is_transient()
            || failure.kind.outcome_unknown()
            // The number was taken, by a request whose answer was lost or by somebody's index: take the next one.
            || failure.kind == FailureKind::Exists
            || (failure.kind == FailureKind::NotFound && call != Call::Create)
            // Whatever keeps it, a snapshot that is being taken for one, does not for ever.
            || call == Call::Drop;
        let message = failure.to_string();
        if call == Call::Swap {
            self.filling.swap_refused = failure.status.is_some_and(|status| (400..500).contains(&status));
        }
        if !passing {
            let done = self.filling.done;
            transaction::run_without_waiting(|| record::finish(job, "failed", done, Some(&message)))?;
            self.abandon(context);
            pgrx::warning!("could not build index \"{}\": {message}", context.attachment.index);
            shared::note_failure(self.attachment, &es::request_failure(&message));
            return Ok(());
        }
        let until = context.pause(job, &mut self.failures, &message, Instant::now())?;
        // An index that vanished while it was built is created anew.
        let then = if failure.kind == FailureKind::NotFound && call != Call::Drop { Call::Look } else { call };
        self.phase = Phase::Pause { until, then: Box::new(Phase::To(then)) };
        Ok(())
    }

    /// Begins anew, with another index: what was read so far is not to be relied on, see `record::restart`.
    pub fn restart(&mut self, context: &mut Context) {
        self.let_go(context);
        self.filling.has_left_live = false;
        self.lose_target();
    }

    /// Another index is to be filled.
    fn lose_target(&mut self) {
        if self.is_swapping() {
            // It may be behind the alias any moment: then the next swap drops it.
            self.target = None;
        }
        // What was delivered to the former one is there no more, whether or not a load was wanted.
        self.first = false;
        self.phase = Phase::To(Call::Create);
    }

    /// True if no row is to be read: all that is wanted comes by the queue.
    fn leaves_rows_out(&self, context: &Context) -> bool {
        self.first && context.attachment.options.load == Some(false)
    }

    /// Lets go of what was built; the live index stays as it is.
    pub fn abandon(&mut self, context: &mut Context) {
        self.let_go(context);
        self.phase = Phase::Over;
        for index in self.target.take().into_iter().chain(self.former.take()) {
            drop_index(index, context);
        }
    }

    fn let_go(&mut self, context: &mut Context) {
        self.close_lane(context);
        // The live index may have taken meanwhile what it had refused.
        context.delivery.check_parked(self.attachment);
    }

    fn close_lane(&mut self, context: &mut Context) {
        if let Some(lane) = self.lane.take() {
            context.delivery.close_lane(lane);
        }
    }
}

/// Asks the engine to drop an index that was begun. What is live by now, or somebody else's, stays.
fn drop_index(index: String, context: &mut Context) -> u64 {
    let (public, owner, generation) = (context.attachment.index.clone(), context.owner.to_owned(), context.generation);
    context.engine.call(move |client| client.drop_unless_live(&index, &public, &owner, generation))
}
