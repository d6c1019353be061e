//! The worker's part about who may write: it keeps the lease, and with each generation makes itself the only one that
//! can write to its indexes.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use es::{Failure, Output, Wired};

use super::answers::set_cause;
use super::database::Worker;
use super::delivery::LAST_VERSION;
use super::lease::{Keeper, Verdict};
use super::succession;
use crate::attachment::state;
use crate::jobs::ask;
use crate::postgres::error::SqlError;
use crate::postgres::transaction;
use crate::settings;

/// How long a stopping worker may take to let go of the lease.
const LAST_WORD: Duration = Duration::from_secs(1);
/// After what time indexes that could not be looked at are looked at again.
const WIRE_AGAIN: Duration = Duration::from_secs(1);

thread_local! {
    /// What to leave behind at the process's end: a FATAL does not unwind, so the worker itself cannot.
    static PARTING: RefCell<Option<Parting>> = const { RefCell::new(None) };
}

struct Parting {
    config: es::Config,
    installation: String,
    lease: es::Lease,
    over: es::Mark,
}

/// Lets go of the lease, so that the next holder need not wait. Called at the end of the process, after the requests
/// under way were given up.
pub fn release() {
    let Some(parting) = PARTING.take() else { return };
    let Parting { config, installation, mut lease, over } = parting;
    lease.version = lease.version.max(LAST_VERSION.get());
    let config = es::Config { connect_timeout: LAST_WORD, request_timeout: LAST_WORD, ..config };
    // What cannot be said in time is found out by the next holder, who waits for the lease's time-out then.
    let _ = es::run_apart(LAST_WORD, move || {
        let _ = es::Client::new(config).map(|client| client.write_lease(&installation, &lease, Some(over)));
    });
}

/// Which indexes this generation can write to.
pub struct Wiring {
    call: Option<u64>,
    /// At least once since the lease was taken, all were looked at.
    pub done: bool,
    /// When to look at them (again); None while there is no reason to.
    due: Option<Instant>,
    /// The last word from the engine about the lease was a failure.
    outage: bool,
    /// Decided, and not yet written down in the database: nothing is sent before it is.
    verdict: Option<Verdict>,
}

impl Wiring {
    pub fn new() -> Self {
        Self { call: None, done: false, due: None, outage: false, verdict: None }
    }

    pub fn look_again(&mut self, at: Instant) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }
}

impl Worker {
    /// True while this database holds the lease and its indexes know its generation.
    pub fn may_write(&self, now: Instant) -> bool {
        self.wiring.done
            && self.wiring.verdict.is_none()
            && self.keeper.as_ref().is_some_and(|keeper| keeper.may_send(now))
    }

    /// Takes, renews or watches the lease, as is due.
    pub fn keep_lease(&mut self, due: &mut Vec<Instant>) -> Result<(), SqlError> {
        let now = Instant::now();
        let Some(engine) = self.engine.as_mut().filter(|engine| engine.may_be_there()) else { return Ok(()) };
        if self.owner.is_empty() || self.being_restored {
            // Nothing has been attached yet, or to half of a table every document would look like one without a row.
            return Ok(());
        }
        if self.keeper.as_ref().is_none_or(|keeper| keeper.installation() != self.owner) {
            let address = transaction::run(succession::address)?;
            let timeout = settings::lease_timeout();
            self.keeper = Some(Keeper::new(self.owner.clone(), succession::holder(), address, timeout));
            self.wiring = Wiring::new();
        }
        let Some(keeper) = self.keeper.as_mut() else { return Ok(()) };
        if let Some(generation) = self.delivery.met_generation.take() {
            keeper.met_generation(generation, now);
        }
        if self.note.take_over && keeper.may_send(now) {
            // It is this database's already. A copy made from now on must not find the wish.
            transaction::run(succession::forget_take_over)?;
            self.note.take_over = false;
        }
        let version = LAST_VERSION.get().max(self.note.version);
        due.extend(keeper.step(engine, &self.note, version, now));
        self.keep_parting(now);
        self.execute_verdict()?;
        // Which lanes there are is known only once the catalog has been read since they were forgotten.
        if self.has_read_catalog() && self.keeper.as_ref().is_some_and(|keeper| keeper.may_send(now)) {
            self.wire(now, due);
        }
        Ok(())
    }

    fn keep_parting(&self, now: Instant) {
        let parting = self.keeper.as_ref().zip(self.engine.as_ref()).and_then(|(keeper, engine)| {
            let (lease, over) = keeper.parting(self.note.version, now)?;
            let installation = keeper.installation().to_owned();
            Some(Parting { config: engine.config().clone(), installation, lease, over })
        });
        PARTING.set(parting);
    }

    /// Takes the answer to a call about the lease; false if it is none.
    pub fn lease_answered(&mut self, token: u64, result: &Result<Output, Failure>) -> Result<bool, SqlError> {
        let now = Instant::now();
        let (Some(keeper), Some(engine)) = (self.keeper.as_mut(), self.engine.as_mut()) else { return Ok(false) };
        let Some(verdict) = keeper.answered(token, result, engine, &self.note, now) else { return Ok(false) };
        match result {
            // The engine is back: whatever waits for that goes on at once.
            Ok(_) if std::mem::take(&mut self.wiring.outage) => {
                engine.breaker.success();
                self.delivery.trouble = None;
                self.wiring.look_again(now);
            }
            Ok(_) => {}
            Err(failure) if failure.kind.is_transient() => {
                self.wiring.outage = true;
                engine.breaker.failure(now);
                self.delivery.trouble = Some(failure.to_string());
            }
            Err(_) => {}
        }
        if verdict.is_some() {
            self.wiring.verdict = verdict;
            self.execute_verdict()?;
        }
        self.keep_parting(now);
        Ok(true)
    }

    /// Writes down what was decided. Somebody may hold a row that it needs: then it is tried again until it is done,
    /// for the engine's side of it is done already and nobody decides a second time.
    fn execute_verdict(&mut self) -> Result<(), SqlError> {
        match self.wiring.verdict.clone() {
            None => Ok(()),
            Some(Verdict::Taken { generation, gap }) => self.taken(generation, gap),
            Some(Verdict::StandOff(why)) => self.stand_off(&why),
        }
    }

    fn taken(&mut self, generation: i64, gap: Option<&'static str>) -> Result<(), SqlError> {
        let holder = succession::holder();
        let taken_over = self.note.take_over;
        // A queue that was closed is repaired once it is open and nobody is left who found it closed.
        let gap = gap.filter(|_| !self.is_closed());
        let note = transaction::run(|| {
            succession::take(generation, &holder, gap, taken_over);
            succession::note()
        })?;
        self.note = note;
        self.generation = generation;
        LAST_VERSION.set(self.note.version);
        self.open_queue()?;
        pgrx::log!("es_sync holds the lease, generation {generation}");
        // What an earlier generation has on its way is not waited for: its aliases are about to go.
        self.forget();
        self.wiring = Wiring::new();
        self.wiring.look_again(Instant::now());
        Ok(())
    }

    fn stand_off(&mut self, why: &str) -> Result<(), SqlError> {
        transaction::run(|| succession::stand_off(why))?;
        self.close_queue(why)?;
        self.note.standing_off = Some(why.to_owned());
        self.note.take_over = false;
        pgrx::warning!("es_sync does not write to the engine: {why}");
        self.forget();
        self.wiring = Wiring::new();
        Ok(())
    }

    /// Has this generation's write aliases set on all indexes, in one call.
    fn wire(&mut self, now: Instant, due: &mut Vec<Instant>) {
        match self.wiring.due {
            _ if self.wiring.call.is_some() => return,
            None => return,
            Some(at) if at > now => return due.push(at),
            Some(_) => self.wiring.due = None,
        }
        // Those under construction too: changes go there as soon as their lane is open.
        let live = self.attachments.iter().filter_map(|known| Some((known.id, known.live.clone()?)));
        let building = self.delivery.lanes.iter().filter(|lane| lane.building);
        let indexes: Vec<(i32, String)> =
            live.chain(building.map(|lane| (lane.attachment, lane.index.clone()))).collect();
        if indexes.is_empty() {
            self.wiring.done = true;
            return;
        }
        let (generation, owner) = (self.generation, self.owner.clone());
        let Some(engine) = self.engine.as_mut() else { return };
        self.wiring.call = Some(engine.call(move |client| {
            let wire = |(attachment, index): (i32, String)| {
                let wired = client.wire(&index, generation, &owner)?;
                Ok((attachment, index, wired))
            };
            indexes.into_iter().map(wire).collect::<Result<Vec<_>, Failure>>()
        }));
    }

    /// Takes the answer about the live indexes; false if it is another call's.
    pub fn wiring_answered(&mut self, token: u64, result: &Result<Output, Failure>) -> Result<bool, SqlError> {
        if self.wiring.call != Some(token) {
            return Ok(false);
        }
        self.wiring.call = None;
        let now = Instant::now();
        let taken = self.take_wiring(result, now);
        if taken.is_err() {
            // Somebody holds a row that was needed: nothing else asks again.
            self.wiring.look_again(now + WIRE_AGAIN);
        }
        taken.map(|()| true)
    }

    fn take_wiring(&mut self, result: &Result<Output, Failure>, now: Instant) -> Result<(), SqlError> {
        let found = match result {
            Ok(output) => output.get::<Vec<(i32, String, Wired)>>(),
            Err(failure) => {
                self.delivery.trouble = Some(failure.to_string());
                self.wiring.look_again(now + WIRE_AGAIN);
                return Ok(());
            }
        };
        for (attachment, index, wired) in found {
            let attachment = *attachment;
            let Some(known) = self.attachments.iter().find(|known| known.id == attachment) else { continue };
            if known.live.as_ref() != Some(index) {
                // A build looks after its own.
                continue;
            }
            let lane = self.delivery.lanes.iter().find(|lane| lane.index == *index).map(|lane| lane.id);
            match wired {
                Wired::Missing => self.rebuild(attachment, index)?,
                Wired::Refused { reason, blocked } => {
                    set_cause(attachment, reason);
                    if let Some(lane) = lane.and_then(|lane| self.delivery.lane(lane)) {
                        lane.blocked_until = Some(now + 2 * WIRE_AGAIN);
                        lane.refusals += u32::from(*blocked);
                    }
                    self.wiring.look_again(now + WIRE_AGAIN);
                }
                Wired::Set(alias) => {
                    self.compare_uuid(attachment, index, &alias.uuid)?;
                    if let Some(lane) = lane.and_then(|lane| self.delivery.lane(lane)) {
                        if lane.blocked_until.take().is_some() {
                            set_cause(attachment, "");
                        }
                        lane.refusals = 0;
                    }
                    if !alias.taken_from.is_empty() {
                        let others = alias.taken_from.join(", ");
                        pgrx::warning!(
                            "the write alias of index \"{index}\" stood for {others} as well, and is taken from there"
                        );
                    }
                    if !alias.found && self.wiring.done {
                        pgrx::warning!("index \"{index}\" had lost its write alias, which is set again");
                    }
                }
            }
        }
        if !std::mem::replace(&mut self.wiring.done, true) {
            self.delivery.trouble = None;
        }
        self.more = true;
        Ok(())
    }

    /// The index bears another id than the one that was filled: it was restored or replaced by hand.
    fn compare_uuid(&mut self, attachment: i32, index: &str, uuid: &str) -> Result<(), SqlError> {
        let Some(known) = self.attachments.iter_mut().find(|known| known.id == attachment) else { return Ok(()) };
        if known.uuid.as_deref() == Some(uuid) {
            return Ok(());
        }
        let replaced = known.uuid.is_some();
        known.uuid = Some(uuid.to_owned());
        if replaced {
            pgrx::warning!("index \"{index}\" was restored or replaced in the engine, and is compared with its table");
            self.catalog_due = Instant::now();
        }
        transaction::run(|| {
            state::set_uuid(attachment, uuid);
            if replaced {
                ask::for_repair(attachment, "the index was restored or replaced in the engine");
            }
        })
    }

    /// A live index has vanished from the engine: build it anew. Its lane closes: what was on its way there is read
    /// by the build, which begins later.
    fn rebuild(&mut self, attachment: i32, index: &str) -> Result<(), SqlError> {
        pgrx::warning!("index \"{index}\" is missing in the engine and is built anew");
        transaction::run(|| {
            state::forget_live(attachment);
            ask::for_build(attachment, "reindex");
        })?;
        if let Some(known) = self.attachments.iter_mut().find(|known| known.id == attachment) {
            known.live = None;
        }
        if let Some(lane) = self.delivery.lanes.iter().find(|lane| lane.index == index).map(|lane| lane.id) {
            self.delivery.close_lane(lane);
        }
        self.catalog_due = Instant::now();
        Ok(())
    }
}
