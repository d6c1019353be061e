//! A database's worker: its start, its loop, its end. Who may write is `ownership`'s part.

use std::cell::{Cell, RefCell};
use std::collections::hash_map::Entry;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use es::{Event, Permit};
use pgrx::{IntoDatum, pg_sys};
use rustc_hash::FxHashMap;

use super::delivery::Delivery;
use super::engine::Engine;
use super::launcher;
use super::lease::{Keeper, Note};
use super::ownership::{self, Wiring};
use super::succession;
use super::upkeep::Upkeep;
use super::version;
use super::waiters::Waiters;
use crate::attachment::attach;
use crate::attachment::catalog::{self, Attachment};
use crate::attachment::key;
use crate::attachment::partitions;
use crate::document::read::Reader;
use crate::document::shape::Shape;
use crate::jobs::build::{self, Build, Context, Step};
use crate::jobs::record;
use crate::jobs::verify::Verify;
use crate::postgres::error::SqlError;
use crate::postgres::latch::WaitSet;
use crate::postgres::process::is_alive;
use crate::postgres::spi;
use crate::postgres::transaction::{self, Scope};
use crate::queue::claim::{self, Claims};
use crate::queue::dead_letter;
use crate::queue::insert::Queue;
use crate::settings;
use crate::shared::{self, Database, QueueState, Shared};

/// How often attachments and jobs are read although nothing was announced (COMMIT PREPARED announces nothing).
const CATALOG_EVERY: Duration = Duration::from_secs(5);
/// How often the views' counts of pending changes are renewed at the most.
const COUNT_EVERY: Duration = Duration::from_millis(250);
/// How long the worker rests after an error of its own.
const REST: Duration = Duration::from_secs(1);

/// No count of catalog changes.
const NOT_READ: u32 = u32::MAX;

thread_local! {
    /// For the exit callback only: a FATAL does not unwind, so nothing is dropped.
    static CLIENT: RefCell<Option<es::Client>> = const { RefCell::new(None) };
    static RELATIONS_CHANGED: Cell<bool> = const { Cell::new(false) };
}

unsafe extern "C-unwind" {
    // Declared anew because pgrx's own are Rust wrappers and no signal handlers. `die` ends a query in 5 ms; a flag
    // would wait for the query's end.
    fn die(signal: std::ffi::c_int);
    fn SignalHandlerForConfigReload(signal: std::ffi::c_int);
}

/// # Safety
/// Called by Postgres as the main function of a background worker.
#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub unsafe extern "C-unwind" fn es_sync_worker_main(argument: pg_sys::Datum) {
    let oid = launcher::database_argument(argument);
    let Some(shared) = shared::shared() else { return };
    let Some(database) = shared.take_database(oid) else { return };
    // SAFETY: registered before the state that it cleans is set; it lasts as long as the process.
    unsafe { pg_sys::before_shmem_exit(Some(on_exit), oid.into_datum().unwrap_or(pg_sys::Datum::from(0usize))) };
    // Before it connects, so that whoever needs the database empty knows whom to wait for.
    if !database.set_worker(is_alive) || shared.holds.is_held(oid.to_u32(), is_alive) {
        return;
    }
    // SAFETY: a background worker's main thread, at its start.
    unsafe {
        pg_sys::pqsignal(pg_sys::SIGTERM as i32, Some(die));
        pg_sys::pqsignal(pg_sys::SIGHUP as i32, Some(SignalHandlerForConfigReload));
        pg_sys::BackgroundWorkerUnblockSignals();
        pg_sys::BackgroundWorkerInitializeConnectionByOid(oid, pg_sys::InvalidOid, 0);
    }
    pin_session();
    match transaction::run(has_extension) {
        Ok(true) => {}
        Ok(false) => {
            database.set_has_extension(false);
            return;
        }
        Err(error) => {
            pgrx::warning!("could not look for the extension: {error}");
            return;
        }
    }
    // SAFETY: the callback lasts as long as the process.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), pg_sys::Datum::from(0usize));
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, std::ptr::null());
    }
    pgrx::log!("es_sync worker started");
    if !version::wait_until_objects_fit(database) {
        return;
    }
    let mut worker = Worker::new(shared, database);
    worker.run();
    if let Some(engine) = worker.engine.take() {
        engine.stop();
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn on_exit(_code: i32, argument: pg_sys::Datum) {
    let oid = launcher::database_argument(argument);
    if let Some(database) = shared::shared().and_then(|shared| shared.database(oid)) {
        database.clear_worker();
    }
    // Requests under way fail soon, so that no thread is inside one when the process ends.
    CLIENT.with(|client| {
        if let Some(client) = client.try_borrow_mut().ok().and_then(|mut client| client.take()) {
            client.shutdown();
        }
    });
    ownership::release();
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn relation_changed(_argument: pg_sys::Datum, _relation: pg_sys::Oid) {
    RELATIONS_CHANGED.set(true);
}

/// Database and role defaults must not reach the worker, and no session setting may change what is indexed.
fn pin_session() {
    let pinned = transaction::run_without_database(|| {
        for (name, value) in [
            (c"role", c"none"),
            (c"search_path", c"pg_catalog, pg_temp"),
            (c"default_transaction_isolation", c"read committed"),
            (c"default_transaction_read_only", c"off"),
            (c"default_transaction_deferrable", c"off"),
            (c"statement_timeout", c"0"),
            (c"idle_in_transaction_session_timeout", c"0"),
            (c"idle_session_timeout", c"0"),
            (c"lock_timeout", c"2s"),
            (c"plan_cache_mode", c"force_generic_plan"),
            (c"jit", c"off"),
            // What must be durable is flushed by name (versions); the rest is found again.
            (c"synchronous_commit", c"off"),
            (c"row_security", c"on"),
            // As a replica its own foreign keys would not cascade.
            (c"session_replication_role", c"origin"),
            (c"standard_conforming_strings", c"on"),
            (c"client_min_messages", c"warning"),
        ] {
            transaction::set(name, value, Scope::Session);
        }
        key::pin_output_settings(Scope::Session);
    });
    if let Err(error) = pinned {
        pgrx::error!("could not set the worker's session up: {error}");
    }
}

fn has_extension() -> bool {
    !spi::run("select from pg_catalog.pg_extension e where e.extname = 'pg_es_sync'", &[]).is_empty()
}

pub struct Worker {
    shared: &'static Shared,
    pub(super) database: &'static Database,
    pub(super) engine: Option<Engine>,
    engine_due: Instant,
    pub(super) delivery: Delivery,
    pub(super) attachments: Vec<Attachment>,
    readers: FxHashMap<i32, Reader>,
    builds: Vec<Build>,
    verifies: Vec<Verify>,
    /// Drops under way: token and job.
    drops: Vec<(u64, i64)>,
    /// Jobs that drop an index, not yet begun.
    queued_drops: Vec<(i64, String)>,
    waiters: Waiters,
    claims: [Claims; 2],
    /// The installation's token; empty before the first attachment.
    pub(super) owner: String,
    pub(super) generation: i64,
    pub(super) note: Note,
    pub(super) keeper: Option<Keeper>,
    pub(super) wiring: Wiring,
    catalog_was_read: bool,
    seen_changes: u32,
    pub(super) catalog_due: Instant,
    /// There may be partitions without a TRUNCATE trigger.
    partitions_changed: bool,
    /// Somebody committed, or there may be more than was claimed.
    pub(super) more: bool,
    last_claim: Instant,
    poll_due: Instant,
    count_due: Instant,
    pub(super) upkeep: Upkeep,
    socket: Option<WaitSet>,
    quiet_socket: Option<WaitSet>,
    reported: Option<String>,
    reported_error: Option<String>,
}

impl Worker {
    fn new(shared: &'static Shared, database: &'static Database) -> Self {
        let now = Instant::now();
        Self {
            shared,
            database,
            engine: None,
            engine_due: now,
            delivery: Delivery::default(),
            attachments: Vec::new(),
            readers: FxHashMap::default(),
            builds: Vec::new(),
            verifies: Vec::new(),
            drops: Vec::new(),
            queued_drops: Vec::new(),
            waiters: Waiters::default(),
            claims: [Claims::new(Queue::Changes), Claims::new(Queue::Prepared)],
            owner: String::new(),
            generation: 0,
            note: Note::default(),
            keeper: None,
            wiring: Wiring::new(),
            catalog_was_read: false,
            seen_changes: NOT_READ,
            catalog_due: now,
            partitions_changed: true,
            more: true,
            last_claim: now,
            poll_due: now,
            count_due: now,
            upkeep: Upkeep::new(now),
            socket: None,
            quiet_socket: None,
            reported: None,
            reported_error: None,
        }
    }

    fn run(&mut self) {
        while !stop_requested() {
            // SAFETY: reads and resets a flag of this process; reading the configuration is due right then.
            unsafe {
                if pg_sys::ConfigReloadPending != 0 {
                    pg_sys::ConfigReloadPending = 0;
                    pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
                }
            }
            match self.turn() {
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
        self.publish_engine();
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
            let held = self.send(&mut due);
            again = self.work_on_jobs(held, &mut due)?;
        } else if let Some(engine) = self.engine.as_mut() {
            due.extend(engine.identify(Instant::now()));
        }
        self.publish_engine();
        self.acknowledge()?;
        if let Some(engine) = self.engine.as_mut() {
            due.extend(self.waiters.serve(self.shared, &self.attachments, engine, Instant::now())?);
        }
        self.publish()?;
        self.look_after_queue()?;
        due.push(self.catalog_due);
        let now = Instant::now();
        if self.more && self.may_claim() {
            due.push(self.last_claim + settings::linger());
        }
        due.extend(self.claims.iter().filter_map(Claims::due).filter(|_| self.may_claim()));
        if again || self.can_send(now) {
            return Ok(Duration::ZERO);
        }
        Ok(due.into_iter().min().unwrap_or(now).saturating_duration_since(now))
    }

    fn wait(&mut self, timeout: Duration) {
        if timeout.is_zero() {
            pgrx::check_for_interrupts!();
            return;
        }
        // While changes gather, the latch stays set: writers then find it so and need no system call.
        let gathering = self.more && self.may_claim() && self.last_claim.elapsed() < settings::linger();
        let set = if gathering { &self.quiet_socket } else { &self.socket };
        let latched = match set {
            Some(set) => set.wait(timeout),
            None => WaitSet::new(None).wait(timeout),
        };
        if latched {
            self.more = true;
        }
        let now = Instant::now();
        if now >= self.poll_due {
            self.poll_due = now + settings::poll_interval();
            self.more = true;
        }
        // SAFETY: any transaction is over; what other backends changed is taken in here too.
        unsafe { pg_sys::AcceptInvalidationMessages() };
        pgrx::check_for_interrupts!();
    }

    /// Connects to the engine, or again when settings changed; false while that is not possible.
    fn connect(&mut self) -> bool {
        if self.engine.as_ref().is_some_and(|engine| !engine.is_current()) {
            if let Some(engine) = self.engine.take() {
                engine.stop();
            }
            // What was in flight is still in the queue, and jobs in their rows.
            self.forget();
            self.keeper = None;
        }
        let now = Instant::now();
        if self.engine.is_none() && self.engine_due <= now {
            self.engine_due = now + REST;
            match Engine::start() {
                Ok(engine) => {
                    CLIENT.set(Some(engine.senders.client().clone()));
                    self.socket = Some(WaitSet::new(Some(engine.senders.wake_fd())));
                    self.quiet_socket = Some(WaitSet::without_latch(engine.senders.wake_fd()));
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
        self.socket = None;
        self.quiet_socket = None;
        self.delivery.forget();
        self.builds.clear();
        self.verifies.clear();
        self.drops.clear();
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

    /// Says once in the log, and always in the status, what stands in the way.
    fn report(&mut self, trouble: &str) {
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
                    } else if self.lease_answered(token, &result)? || self.wiring_answered(token, &result)? {
                        // Heard.
                    } else if !self.waiters.answered(token, &result) {
                        self.job_answered(token, &result)?;
                    }
                }
            }
        }
        for page in std::mem::take(&mut self.delivery.pages) {
            for build in &mut self.builds {
                if build.page_done(page) {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Says in the status what stands in the way of all work, if anything.
    fn show_state(&mut self) {
        let now = Instant::now();
        if let Some(why) = &self.note.standing_off {
            let why = format!("{why}; es_sync.take_over() lets this database write");
            return self.report(&why);
        }
        if let Some(trouble) = self.delivery.trouble.clone() {
            return self.report(&trouble);
        }
        if let Some(obstacle) = self.keeper.as_ref().and_then(|keeper| keeper.obstacle(now)) {
            // Taking a free lease is a matter of milliseconds, and no news.
            return if self.keeper.as_ref().is_some_and(Keeper::is_watching) {
                self.report(&obstacle);
            } else {
                self.database.set_state(&obstacle);
            };
        }
        if self.engine.as_ref().is_some_and(|engine| engine.dialect().is_some()) {
            if self.reported.take().is_some() {
                pgrx::log!("es_sync goes on");
            }
            self.database.set_state("");
        }
    }

    fn job_answered(&mut self, token: u64, result: &Result<serde_json::Value, es::Failure>) -> Result<(), SqlError> {
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
        let mut builds = std::mem::take(&mut self.builds);
        for build in &mut builds {
            let taken = self.with_context(build.attachment, false, |context| build.answered(token, result, context));
            if taken.transpose()? == Some(true) {
                break;
            }
        }
        self.builds = builds;
        let mut verifies = std::mem::take(&mut self.verifies);
        for verify in &mut verifies {
            let taken = self.with_context(verify.attachment, false, |context| verify.answered(token, result, context));
            if taken.transpose()? == Some(true) {
                break;
            }
        }
        self.verifies = verifies;
        Ok(())
    }

    /// Lends a job what it needs; None where its attachment or table is gone.
    fn with_context<T>(&mut self, attachment: i32, held: bool, work: impl FnOnce(&mut Context) -> T) -> Option<T> {
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

    /// Reads attachments and jobs when they have changed.
    fn read_catalog(&mut self) -> Result<(), SqlError> {
        if RELATIONS_CHANGED.replace(false) {
            // A column was added, a table altered: statements are made anew.
            self.readers.clear();
            self.partitions_changed = true;
            self.catalog_due = self.catalog_due.min(Instant::now() + REST);
        }
        let changes = self.database.catalog_changes.load(Ordering::Acquire);
        let lost = self.database.lost_note.swap(false, Ordering::AcqRel);
        if changes == self.seen_changes && Instant::now() < self.catalog_due && !lost {
            return Ok(());
        }
        let first = !self.catalog_was_read;
        let closed = self.is_closed() || self.database.queue_state() != QueueState::Open;
        let (attachments, jobs, parked) = transaction::run(|| {
            forget_dropped_tables();
            self.note = succession::note();
            if self.note.standing_off.is_none() && !closed && (lost || !claim::has_marker()) {
                let why = if lost { "a change could not be noted" } else { "the queue was lost" };
                succession::repair_everything(why);
            }
            let rows = spi::run("select i.token::text from es_sync.installation i", &[]);
            self.owner = if rows.is_empty() { String::new() } else { rows.get(0, 1).unwrap_or_default() };
            let parked = if first { dead_letter::all() } else { Vec::new() };
            (catalog::all(), record::open_jobs(), parked)
        })
        .inspect_err(|_| {
            if lost {
                self.database.lost_note.store(true, Ordering::Release);
            }
        })?;
        if first {
            self.delivery = Delivery::new(parked);
            self.catalog_was_read = true;
        }
        self.seen_changes = changes;
        self.catalog_due = Instant::now() + CATALOG_EVERY;
        self.take_attachments(attachments);
        self.take_jobs(jobs)?;
        self.inherit_intake()?;
        self.watch_partitions()
    }

    /// True if attachments and jobs were read since everything was forgotten.
    pub(super) fn has_read_catalog(&self) -> bool {
        self.seen_changes != NOT_READ
    }

    /// Gives the partitions that came since they were last looked at their TRUNCATE triggers.
    fn watch_partitions(&mut self) -> Result<(), SqlError> {
        if !std::mem::take(&mut self.partitions_changed) {
            return Ok(());
        }
        for partition in transaction::run(partitions::unwatched)? {
            match transaction::run(|| partitions::watch(&partition)) {
                Ok(repair) => {
                    if repair {
                        self.catalog_due = Instant::now();
                    }
                }
                Err(error) => {
                    // Somebody writes to it, or it is gone: looked at again when the catalog is.
                    pgrx::debug1!("could not watch partition {} yet: {error}", partition.name);
                    self.partitions_changed = true;
                }
            }
        }
        Ok(())
    }

    fn take_attachments(&mut self, attachments: Vec<Attachment>) {
        let old = std::mem::replace(&mut self.attachments, attachments);
        for gone in old.iter().filter(|old| !self.attachments.iter().any(|new| new.id == old.id)) {
            let lanes: Vec<u32> =
                self.delivery.lanes.iter().filter(|l| l.attachment == gone.id).map(|l| l.id).collect();
            lanes.into_iter().for_each(|lane| self.delivery.close_lane(lane));
            self.builds.retain(|build| build.attachment != gone.id);
            self.verifies.retain(|verify| verify.attachment != gone.id);
        }
        for attachment in &self.attachments {
            if old.iter().find(|old| old.id == attachment.id) != Some(attachment) {
                self.readers.remove(&attachment.id);
            }
            // SAFETY: reads a variable of this process.
            self.shared.take_index(unsafe { pg_sys::MyDatabaseId }, attachment.id);
        }
        self.delivery.apply_pauses(&self.attachments);
        self.open_lanes();
        let known: Vec<i32> = self.attachments.iter().map(|attachment| attachment.id).collect();
        // SAFETY: reads a variable of this process.
        self.shared.free_indexes(unsafe { pg_sys::MyDatabaseId }.to_u32(), |id| known.contains(&id));
    }

    /// Opens the lanes of live indexes that have none: a change without a lane would be let go.
    fn open_lanes(&mut self) {
        for attachment in &self.attachments {
            if let Some(live) = &attachment.live
                && !self.delivery.is_left_out(attachment)
                && !self.delivery.lanes.iter().any(|lane| lane.attachment == attachment.id && lane.index == *live)
            {
                let target = build::target(attachment, live, self.generation);
                let source = attachment.relation.to_u32();
                self.delivery.open_lane(attachment.id, source, live.clone(), false, target);
            }
        }
    }

    fn take_jobs(&mut self, jobs: Vec<record::Job>) -> Result<(), SqlError> {
        let mut builds = std::mem::take(&mut self.builds);
        for build in builds.iter_mut().filter(|build| !build.is_over()) {
            match jobs.iter().find(|job| job.id == build.job) {
                // Cancelled too late: what is behind the alias must be written down.
                None if build.is_swapping() => {}
                // Cancelled, or its attachment is gone.
                None => drop(self.with_context(build.attachment, false, |context| build.abandon(context))),
                // Sent back to its beginning by a TRUNCATE.
                Some(job) if job.target.is_none() && build.has_begun() => {
                    self.with_context(build.attachment, false, |context| build.restart(context));
                }
                Some(_) => {}
            }
        }
        // One whose table cannot be read now is abandoned the next time: its lane must not stay behind.
        builds.retain(|build| !build.is_over() || jobs.iter().any(|job| job.id == build.job));
        self.queued_drops.retain(|(id, _)| jobs.iter().any(|job| job.id == *id));
        self.builds = builds;
        self.verifies.retain(|verify| jobs.iter().any(|job| job.id == verify.job));
        for job in jobs {
            match (job.kind.as_str(), job.attachment) {
                ("drop", _) => {
                    let under_way = self.drops.iter().any(|(_, id)| *id == job.id)
                        || self.queued_drops.iter().any(|(id, _)| *id == job.id);
                    if let (false, Some(target)) = (under_way, job.target) {
                        self.queued_drops.push((job.id, target));
                    }
                }
                ("verify", Some(attachment)) => match self.verifies.iter_mut().find(|known| known.job == job.id) {
                    Some(verify) => verify.take(&job),
                    None => self.verifies.push(Verify::new(&job, attachment)),
                },
                (_, Some(attachment)) if !self.builds.iter().any(|build| build.job == job.id) => {
                    let mut build = Build::new(&job, attachment);
                    // Before anything is claimed: what is claimed now must reach the index that is being built.
                    if let Some(known) = self.attachments.iter().find(|known| known.id == attachment) {
                        build.open_lane(&mut self.delivery, known, self.generation);
                    }
                    self.builds.push(build);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn may_claim(&self) -> bool {
        self.delivery.room() > 0
            && self.may_write(Instant::now())
            && self
                .engine
                .as_ref()
                .is_some_and(|engine| engine.dialect().is_some() && engine.breaker.state() == es::State::Closed)
    }

    /// Claims changes: at once after a quiet time, at most every few milliseconds while commits keep coming.
    fn claim(&mut self) -> Result<(), SqlError> {
        let now = Instant::now();
        let (held, changed) = self.delivery.hold(now);
        // Whoever is held no longer has changes waiting that woke nobody again.
        self.more |= changed || self.claims.iter().any(|claims| claims.due().is_some_and(|due| due <= now));
        if !self.more || !self.may_claim() || now.duration_since(self.last_claim) < settings::linger() {
            return Ok(());
        }
        self.more = false;
        for claims in &mut self.claims {
            let room = self.delivery.room();
            if room == 0 {
                self.more = true;
                break;
            }
            let delivery = &self.delivery;
            let (rows, more) = transaction::run(|| claims.claim(room, &held, |place| delivery.is_known(place)))?;
            self.more |= more;
            if !rows.is_empty() {
                // A table that was attached since the catalog was read: read it again before its rows are let go.
                let unknown = rows
                    .iter()
                    .any(|row| !self.attachments.iter().any(|attachment| attachment.relation.to_u32() == row.source));
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

    fn can_send(&mut self, now: Instant) -> bool {
        let Some(engine) = self.engine.as_mut() else { return false };
        engine.dialect().is_some()
            && engine.breaker.state() == es::State::Closed
            && self.delivery.in_flight() <= engine.sizing.concurrency()
            && self.delivery.next_ready(now).0.is_some()
    }

    /// Reads and sends what is ready while connections are free; true if the breaker holds everything back.
    fn send(&mut self, due: &mut Vec<Instant>) -> bool {
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
            let found = self.attachments.iter().find(|known| known.id == attachment).cloned();
            match found.and_then(|attachment| reader_of(&mut self.readers, &attachment)) {
                Some(reader) => self.delivery.send_changes(lane, reader, engine, probe),
                None => {
                    // The table or its key is gone or locked: look again soon.
                    if let Some(lane) = self.delivery.lane(lane) {
                        lane.failures += 1;
                        lane.blocked_until = Some(now + REST);
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

    /// Takes jobs a step further; true if there is more to do at once.
    fn work_on_jobs(&mut self, held: bool, due: &mut Vec<Instant>) -> Result<bool, SqlError> {
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

    /// Writes down what is done: queue rows, dead letters, requests for rebuilds. One transaction.
    fn acknowledge(&mut self) -> Result<(), SqlError> {
        if self.delivery.outbox.is_empty() {
            return Ok(());
        }
        let outbox = &self.delivery.outbox;
        let places: Vec<_> = outbox
            .finished
            .iter()
            .chain(outbox.rebuilds.iter().chain(&outbox.repairs).map(|(_, place)| place))
            .copied()
            .collect();
        let attachments = &self.attachments;
        transaction::run(|| {
            for letter in &outbox.letters {
                dead_letter::park(letter);
            }
            for (attachment, key) in &outbox.cleared {
                dead_letter::clear(*attachment, key);
            }
            for (source, _) in &outbox.rebuilds {
                for attachment in attachments.iter().filter(|known| known.relation.to_u32() == *source) {
                    record::restart(Some(attachment.id));
                    record::mark_stale(attachment.id, "the table was truncated");
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
            claim::acknowledge(&places);
        })?;
        let stale = !outbox.rebuilds.is_empty() || !outbox.repairs.is_empty();
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

    /// Renews what the views show.
    fn publish(&mut self) -> Result<(), SqlError> {
        let now = Instant::now();
        if now < self.count_due {
            return Ok(());
        }
        let started = now;
        let backlog = transaction::run(claim::backlog)?;
        // SAFETY: reads a variable of this process.
        let database = unsafe { pg_sys::MyDatabaseId };
        for attachment in &self.attachments {
            if let Some(counters) = self.shared.index(database, attachment.id) {
                let mine = backlog.iter().find(|backlog| backlog.source == attachment.relation.to_u32());
                counters.pending.store(mine.map_or(0, |mine| mine.keys), Ordering::Relaxed);
                counters.oldest.store(mine.map_or(0, |mine| mine.oldest), Ordering::Relaxed);
            }
        }
        // Counting a large backlog takes long: never more than a twentieth of the time.
        self.count_due = now + COUNT_EVERY.max(started.elapsed() * 20);
        Ok(())
    }

    /// Shows whether the engine is asked, and when it is asked again.
    fn publish_engine(&self) {
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
        let micros = due.map_or(0, |due| {
            // SAFETY: reads the clock.
            let now = unsafe { pg_sys::GetCurrentTimestamp() };
            now + due.saturating_duration_since(Instant::now()).as_micros() as i64
        });
        self.database.next_try.store(micros, Ordering::Relaxed);
    }
}

/// The attachment's reader, made if there is none; None where the table cannot be read now.
fn reader_of<'a>(readers: &'a mut FxHashMap<i32, Reader>, attachment: &Attachment) -> Option<&'a mut Reader> {
    match readers.entry(attachment.id) {
        Entry::Occupied(reader) => Some(reader.into_mut()),
        Entry::Vacant(place) => {
            let shape = transaction::run(|| Shape::of(attachment)).ok().flatten()?;
            Some(place.insert(Reader::new(shape)))
        }
    }
}

fn stop_requested() -> bool {
    // SAFETY: reads a flag that `die` sets.
    unsafe { std::ptr::read_volatile(&raw const pg_sys::ProcDiePending) != 0 }
}

/// DROP TABLE leaves its attachment behind: the table's owner need not know of us.
fn forget_dropped_tables() {
    spi::run(
        "delete from es_sync.attachment a
         where not exists (select from pg_catalog.pg_class c where c.oid = a.relation)",
        &[],
    );
}
