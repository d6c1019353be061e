//! A database's worker: what it knows, and its loop. The parts of a turn have files of their own.

use std::time::{Duration, Instant};

use es::Event;
use pgrx::pg_sys;
use rustc_hash::FxHashMap;

use super::catalog::NOT_READ;
use super::definitions::Definitions;
use super::delivery::Delivery;
use super::engine::Engine;
use super::lease::{Keeper, Note};
use super::ownership::Wiring;
use super::process::{CLIENT, has_extension, stop_requested};
use super::tasks::Jobs;
use super::upkeep::Upkeep;
use super::waiters::{Known, Waiters};
use crate::attachment::catalog::Attachment;
use crate::attachment::link::Link;
use crate::document::read::Reader;
use crate::document::related::Finder;
use crate::postgres::error::SqlError;
use crate::postgres::latch::{self, WaitSet};
use crate::postgres::process::cpu_time;
use crate::postgres::transaction;
use crate::queue::claim::Claims;
use crate::queue::table::Queue;
use crate::settings;
use crate::shared::{self, Database, Shared};

/// How long the worker rests after an error of its own.
pub(super) const REST: Duration = Duration::from_secs(1);
/// Changes gather for so many times the processor time that the last claim's work took as it found rows, within these
/// bounds.
const GATHER: std::ops::RangeInclusive<usize> = 9..=40;
/// How long changes gather at the most, however much work they make.
const MAX_LINGER: Duration = Duration::from_millis(50);

/// Everything that a worker knows. All of it may be forgotten: the tables have what counts.
pub struct Worker {
    pub(super) shared: &'static Shared,
    pub(super) database: &'static Database,
    pub(super) engine: Option<Engine>,
    pub(super) engine_due: Instant,
    pub(super) delivery: Delivery,
    pub(super) attachments: Vec<Attachment>,
    pub(super) readers: FxHashMap<i32, Reader>,
    pub(super) links: Vec<Link>,
    pub(super) finders: FxHashMap<u32, Finder>,
    pub(super) jobs: Jobs,
    /// Jobs of which a step failed, and until when they rest.
    pub(super) resting_jobs: FxHashMap<i64, Instant>,
    pub(super) waiters: Waiters,
    pub(super) claims: [Claims; 2],
    /// The installation's token; empty before the first attachment.
    pub(super) owner: String,
    pub(super) generation: i64,
    pub(super) note: Note,
    pub(super) keeper: Option<Keeper>,
    pub(super) wiring: Wiring,
    pub(super) catalog_was_read: bool,
    /// A dump is being restored here: nothing is done before it is whole.
    pub(super) being_restored: bool,
    pub(super) seen_changes: u32,
    pub(super) catalog_due: Instant,
    pub(super) definitions: Definitions,
    /// There may be partitions without a TRUNCATE trigger, or triggers that were switched off.
    pub(super) triggers_in_doubt: bool,
    /// Partitions may have come or gone.
    pub(super) partitions_in_doubt: bool,
    /// Somebody committed, or there may be more than was claimed.
    pub(super) more: bool,
    /// Commits that were announced before the last claim.
    pub(super) seen_commits: u64,
    pub(super) last_claim: Instant,
    /// Processor time spent on turns since the last claim.
    pub(super) work: Duration,
    /// Rows of the queue that the last claim found: one for a small transaction.
    pub(super) claimed_rows: usize,
    pub(super) poll_due: Instant,
    pub(super) count_due: Instant,
    pub(super) upkeep: Upkeep,
    pub(super) socket: Option<WaitSet>,
    pub(super) reported: Option<String>,
    pub(super) reported_error: Option<String>,
}

/// Reads the configuration where that is due; true then.
fn reload_configuration() -> bool {
    // SAFETY: reads and resets a flag of this process; reading the configuration is due right then.
    unsafe {
        let is_due = pg_sys::ConfigReloadPending != 0;
        if is_due {
            pg_sys::ConfigReloadPending = 0;
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
        is_due
    }
}

impl Worker {
    pub(super) fn new(shared: &'static Shared, database: &'static Database) -> Self {
        let now = Instant::now();
        Self {
            shared,
            database,
            engine: None,
            engine_due: now,
            delivery: Delivery::default(),
            attachments: Vec::new(),
            readers: FxHashMap::default(),
            links: Vec::new(),
            finders: FxHashMap::default(),
            jobs: Jobs::default(),
            resting_jobs: FxHashMap::default(),
            waiters: Waiters::default(),
            claims: [Claims::new(Queue::Changes), Claims::new(Queue::Prepared)],
            owner: String::new(),
            generation: 0,
            note: Note::default(),
            keeper: None,
            wiring: Wiring::new(),
            catalog_was_read: false,
            being_restored: false,
            seen_changes: NOT_READ,
            catalog_due: now,
            definitions: Definitions::default(),
            triggers_in_doubt: true,
            partitions_in_doubt: true,
            more: true,
            seen_commits: 0,
            last_claim: now,
            work: Duration::ZERO,
            claimed_rows: 0,
            poll_due: now,
            count_due: now,
            upkeep: Upkeep::new(now),
            socket: None,
            reported: None,
            reported_error: None,
        }
    }

    pub(super) fn run(&mut self) {
        while !stop_requested() {
            if reload_configuration() {
                self.disconnect_if_outdated();
            }
            let started = cpu_time();
            let turn = self.turn();
            self.work += cpu_time().saturating_sub(started);
            // Whatever came of it: what it met may be why it could not go on.
            self.publish_engine();
            match turn {
                Ok(timeout) => {
                    if self.reported_error.take().is_some() {
                        self.database.set_state(self.reported.as_deref().unwrap_or_default());
                    }
                    self.wait(timeout);
                }
                Err(error) => {
                    if matches!(transaction::run(has_extension), Ok(false)) {
                        self.database.set_has_extension(false);
                        pgrx::log!("es_sync worker ends: the extension was dropped");
                        return;
                    }
                    let message = format!("es_sync worker could not go on for the moment: {error}");
                    self.database.set_state(&message);
                    if self.reported_error.as_ref() != Some(&message) {
                        pgrx::warning!("{message}");
                        shared::note_failure(0, &message);
                        self.reported_error = Some(message);
                    }
                    self.wait(REST);
                }
            }
        }
        pgrx::log!("es_sync worker stops");
    }

    /// Everything that can be done without waiting; how long there is nothing to do then.
    fn turn(&mut self) -> Result<Duration, SqlError> {
        let connected = self.connect();
        self.read_catalog()?;
        if !connected {
            self.look_after_queue()?;
            return Ok(settings::poll_interval());
        }
        self.hear()?;
        let mut due = vec![Instant::now() + settings::poll_interval()];
        self.keep_lease(&mut due)?;
        self.show_state();
        let mut again = false;
        if self.may_write(Instant::now()) {
            self.delivery.durable = self.upkeep.logged;
            due.extend(self.delivery.look_at_doubtful(Instant::now()));
            self.claim()?;
            again = self.fan_out(&mut due)?;
            let held = self.send(&mut due);
            // Dead letters before a job's progress: its position must not run ahead of what became of its documents.
            self.acknowledge(&mut due)?;
            again |= self.work_on_jobs(held, &mut due)?;
        } else if let Some(engine) = self.engine.as_mut() {
            due.extend(engine.identify(Instant::now()));
        }
        // What the jobs have let go of, and what was answered although nothing more may be sent.
        self.acknowledge(&mut due)?;
        if let Some(engine) = self.engine.as_mut() {
            let known = Known {
                attachments: &self.attachments,
                doubtful: &self.definitions.doubtful,
                catalog_changes: self.seen_changes,
            };
            due.extend(self.waiters.serve(self.shared, self.database, &known, &mut self.delivery, engine)?);
        }
        self.publish()?;
        self.look_after_queue()?;
        due.push(self.catalog_due);
        due.extend(self.definitions.due.filter(|_| !self.being_restored));
        let now = Instant::now();
        if self.more && self.may_claim() {
            due.push(self.last_claim + self.linger());
        }
        due.extend(self.claims.iter().filter_map(Claims::due).filter(|_| self.may_claim()));
        if again || (self.may_write(now) && self.can_send(now)) {
            return Ok(Duration::ZERO);
        }
        Ok(due.into_iter().min().unwrap_or(now).saturating_duration_since(now))
    }

    fn wait(&mut self, timeout: Duration) {
        if timeout.is_zero() {
            // There is more to do at once, and maybe always is: who has committed meanwhile must not wait for its end.
            self.more |= latch::take_my_latch() | self.has_news();
            pgrx::check_for_interrupts!();
            return;
        }
        // A commit need not wake a worker that comes back by itself in a moment, or that would leave what was written
        // where it is.
        let interested = !self.more && self.may_claim() && !self.delivery.holds_all();
        let rest = self.linger().saturating_sub(self.last_claim.elapsed());
        let timeout = if interested && !rest.is_zero() { timeout.min(rest) } else { timeout };
        let listens = interested && rest.is_zero();
        self.database.listen(listens);
        if !(listens && self.has_news()) {
            let latched = match &self.socket {
                Some(set) => set.wait(timeout),
                None => WaitSet::new(None).wait(timeout),
            };
            self.more |= latched;
        }
        self.database.listen(false);
        self.more |= self.has_news();
        let now = Instant::now();
        if now >= self.poll_due {
            self.poll_due = now + settings::poll_interval();
            self.more = true;
        }
        // SAFETY: any transaction is over; what other backends changed is taken in here too.
        unsafe { pg_sys::AcceptInvalidationMessages() };
        pgrx::check_for_interrupts!();
    }

    /// How long changes gather after a claim while commits keep coming: the more work a claim made, the longer, for a
    /// claim of many changes takes little more than one of a few, and the writers want the processor too. So the worker
    /// takes a tenth of a core, or what the changes take if that is more. Where commits follow each other closely it takes
    /// less: there the writers feel it most.
    pub(super) fn linger(&self) -> Duration {
        let least = settings::linger();
        let factor = self.claimed_rows.clamp(*GATHER.start(), *GATHER.end()) as u32;
        if least.is_zero() { least } else { least.max((self.work * factor).min(MAX_LINGER)) }
    }

    /// True if somebody has committed changes since the last claim.
    fn has_news(&self) -> bool {
        self.database.commits() != self.seen_commits
    }

    /// Lets go of the engine if its settings are others now; `connect` starts anew.
    fn disconnect_if_outdated(&mut self) {
        if self.engine.as_ref().is_some_and(|engine| !engine.is_current()) {
            if let Some(engine) = self.engine.take() {
                engine.stop();
            }
            self.socket = None;
            // What was in flight is still in the queue, and jobs in their rows.
            self.forget();
            // Its calls are numbered anew.
            self.wiring = Wiring::new();
            self.keeper = None;
        }
    }

    /// Connects to the engine; false while that is not possible.
    fn connect(&mut self) -> bool {
        let now = Instant::now();
        if self.engine.is_none() && self.engine_due <= now {
            self.engine_due = now + REST;
            match Engine::start() {
                Ok(engine) => {
                    CLIENT.set(Some(engine.senders.client().clone()));
                    self.socket = Some(WaitSet::new(Some(engine.senders.wake_fd())));
                    self.engine = Some(engine);
                    self.reported = None;
                    self.database.set_state("connecting to the engine");
                }
                Err(error) => self.report(&error),
            }
        }
        if let Some(engine) = self.engine.as_mut() {
            engine.identify(now);
        }
        self.engine.is_some()
    }

    pub(super) fn forget(&mut self) {
        self.delivery.forget();
        self.jobs.forget();
        self.waiters = Waiters::default();
        self.rewind_claims();
        self.seen_changes = NOT_READ;
        self.catalog_due = Instant::now();
        self.more = true;
    }

    pub(super) fn rewind_claims(&mut self) {
        for claims in &mut self.claims {
            claims.rewind();
        }
    }

    /// Takes what the sender threads have finished.
    fn hear(&mut self) -> Result<(), SqlError> {
        let Some(engine) = self.engine.as_mut() else { return Ok(()) };
        engine.senders.clear_wake();
        let now = Instant::now();
        while let Some(event) = self.engine.as_mut().and_then(Engine::next_event) {
            let Some(engine) = self.engine.as_mut() else { break };
            match event {
                Event::Delivered { token, body, result, took } => {
                    self.delivery.delivered(token, body, result, took, engine);
                }
                Event::Called { token, result } => {
                    if let Some(identified) = engine.identified(token, &result, now) {
                        match identified {
                            Ok(product) => {
                                pgrx::log!("es_sync is connected to {product}");
                                self.database.engine.set(&product);
                                self.delivery.trouble = None;
                            }
                            Err(error) => self.delivery.trouble = Some(error),
                        }
                    } else if self.lease_answered(token, &result)?
                        || self.wiring_answered(token, &result)?
                        || self
                            .engine
                            .as_mut()
                            .is_some_and(|engine| self.delivery.mapping_answered(token, &result, engine))
                    {
                        // Heard.
                    } else if !self.waiters.answered(token, &result) {
                        self.job_answered(token, &result)?;
                    }
                }
            }
        }
        for page in std::mem::take(&mut self.delivery.pages) {
            for build in &mut self.jobs.builds {
                if build.page_done(page) {
                    break;
                }
            }
        }
        Ok(())
    }
}
