//! Delivery: claimed changes become operations, and operations become requests. `answers` has what becomes of those.
//!
//! Holds only what is in flight. The queue itself is the durable state, so all of this may be forgotten at any time.

use std::cell::Cell;
use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::rc::Rc;
use std::time::{Duration, Instant};

use es::Body;
use pgrx::PgSqlErrorCode;
use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};
use smallvec::{SmallVec, smallvec};

use super::answers::set_cause;
use super::batch::{Batch, Operation};
use super::engine::{Engine, SLOW};
use super::fan::Fans;
use super::hold::Hold;
use super::lane::{Change, Finished, Key, Lane, MAX_OPERATIONS, Page, Ticket};
use super::mapping::PutMapping;
use super::outbox::Outbox;
use super::process::RELATIONS_CHANGED;
use crate::attachment::catalog::Attachment;
use crate::attachment::definition;
use crate::attachment::key;
use crate::attachment::link;
use crate::attachment::routing::{self, Routing};
use crate::document::read::Reader;
use crate::postgres::error::{Report, SqlError};
use crate::postgres::process::now_micros;
use crate::postgres::spi::Plan;
use crate::postgres::transaction;
use crate::queue::claim::{Asked, Place, Row};
use crate::queue::insert::Whole;
use crate::settings;

/// How long a table rests that somebody has locked, or is altering.
/// How many rows a page of a filtered table has at the least, however large its documents are.
const FILTERED_ROWS: usize = 1_000;
const TABLE_REST: Duration = Duration::from_millis(500);

/// Documents on their way over all lanes, beyond which nothing more is claimed.
pub(super) const MAX_OUTSTANDING: usize = 40_000;

thread_local! {
    /// The last version that was taken, for the word that is left behind at a clean stop.
    pub static LAST_VERSION: Cell<i64> = const { Cell::new(0) };
}

/// Everything on its way.
#[derive(Default)]
pub struct Delivery {
    pub lanes: Vec<Lane>,
    pub(super) claimed: FxHashMap<Ticket, Claimed>,
    pub(super) places: FxHashSet<Place>,
    pub(super) hold: Hold,
    pub(super) fans: Fans,
    /// Sources under which the queue holds where documents lay before: attached table and attachment of each.
    moves: FxHashMap<u32, (u32, i32)>,
    pub(super) flights: FxHashMap<u64, Flight>,
    pub(super) mappings: Vec<PutMapping>,
    later: Vec<Row>,
    bodies: Vec<Body>,
    version_plan: Option<Plan>,
    next_ticket: Ticket,
    next_lane: u32,
    turn: usize,
    pub(super) parked: FxHashSet<(i32, Key)>,
    /// The queue survives a crash, so nothing may be sent that would not.
    pub durable: bool,
    /// Index operations whose outcome is not known, and when they are looked at once more.
    pub(super) doubtful: VecDeque<(Instant, u32, Key, Option<Routing>)>,
    /// Keys were enqueued by the worker itself: there is something to claim.
    pub enqueued: bool,
    /// What the next transaction writes down.
    pub outbox: Outbox,
    /// Pages of which a document was finished, once for each.
    pub pages: Vec<Page>,
    /// Lanes whose index is gone.
    pub missing: Vec<u32>,
    /// What went wrong with the engine as a whole, for status and log; None when it answers.
    pub trouble: Option<String>,
    /// A later generation that documents were met with: somebody else writes.
    pub met_generation: Option<i64>,
}

pub(super) struct Claimed {
    /// One row, but for related rows' values that are looked for together.
    pub(super) places: SmallVec<[Place; 1]>,
    /// The attached table.
    pub(super) source: u32,
    /// Operations that it still waits for; one more while a fan-out adds to them.
    pub(super) left: usize,
    enqueued_at: i64,
}

pub(super) struct Flight {
    pub(super) lane: u32,
    pub(super) operations: Vec<Operation>,
    pub(super) version: i64,
    /// Rows that were read for it.
    pub(super) rows: usize,
    pub(super) sent_at: Instant,
}

/// What became of reading a page.
pub struct PageRead {
    /// Documents that were sent under the page's number.
    pub sent: usize,
    pub rows: usize,
    pub last: Option<Key>,
    /// No row follows.
    pub exhausted: bool,
}

impl Delivery {
    /// Starts with what is parked already.
    pub fn new(parked: Vec<(i32, String)>) -> Self {
        let parked = parked.into_iter().map(|(attachment, key)| (attachment, Rc::from(key))).collect();
        Self { parked, ..Self::default() }
    }

    pub fn lane(&mut self, id: u32) -> Option<&mut Lane> {
        self.lanes.iter_mut().find(|lane| lane.id == id)
    }

    /// Opens a lane to a concrete index; its number.
    pub fn open_lane(&mut self, attachment: &Attachment, index: String, building: bool, target: es::Target) -> u32 {
        self.next_lane += 1;
        let source = attachment.relation.to_u32();
        let mut lane = Lane::new(self.next_lane, attachment.id, source, index, building, target);
        lane.paused = self.hold.is_paused(source);
        lane.set_delay(attachment.options.delay());
        self.lanes.push(lane);
        self.share_delays();
        self.next_lane
    }

    /// Takes in under which sources the queue holds where documents lay before.
    pub fn take_moves(&mut self, attachments: &[Attachment]) {
        let moves = attachments.iter().filter_map(|known| Some((known.routing_source?, known)));
        self.moves = moves.map(|(source, known)| (source, (known.relation.to_u32(), known.id))).collect();
    }

    /// The attached table whose documents a source of the queue is about; None for a link that is gone.
    pub fn root_of(&self, source: u32) -> Option<u32> {
        if !link::is_link(source) {
            return Some(source);
        }
        self.moves.get(&source).map(|(root, _)| *root).or_else(|| self.fans.root_of(source))
    }

    /// All sources of the queue that are about a table's documents.
    pub fn sources_of(&self, root: u32) -> Vec<u32> {
        let moves = self.moves.iter().filter(|(_, (its, _))| *its == root).map(|(source, _)| *source);
        self.fans.links_of(root).chain(moves).chain([root]).collect()
    }

    /// Adds to the tables that are not claimed for now what else is about their documents.
    pub(super) fn hold_moves(&self, held: &mut Vec<u32>) {
        let moves = self.moves.iter().filter(|(_, (root, _))| held.contains(root)).map(|(source, _)| *source);
        let moves: Vec<u32> = moves.collect();
        held.extend(moves);
    }

    /// Closes a lane; what was on its way counts as done there.
    pub fn close_lane(&mut self, id: u32) {
        if let Some(place) = self.lanes.iter().position(|lane| lane.id == id) {
            for finished in self.lanes.swap_remove(place).dissolve() {
                self.give_back(finished);
            }
        }
        self.share_delays();
    }

    /// Forgets all lanes and claims; the queue still has them.
    pub fn forget(&mut self) {
        self.lanes.clear();
        self.claimed.clear();
        self.places.clear();
        self.flights.clear();
        self.mappings.clear();
        self.later.clear();
        self.missing.clear();
        self.doubtful.clear();
        self.fans.clear();
        // Not written down: they are dead letters as before.
        self.parked.extend(std::mem::take(&mut self.outbox).cleared);
        self.pages.clear();
    }

    /// True if the document is a dead letter.
    pub fn is_parked(&self, attachment: i32, key: &str) -> bool {
        !self.parked.is_empty() && self.parked.contains(&(attachment, Key::from(key)))
    }

    /// Takes in which documents of an attachment have dead letters: some may have been discarded.
    pub fn set_parked(&mut self, attachment: i32, letters: Vec<String>) {
        self.parked.retain(|(of, _)| *of != attachment);
        let unwritten = self.outbox.letters.iter().filter(|letter| letter.attachment == attachment);
        let unwritten = unwritten.map(|letter| letter.key.as_str());
        let keys = letters.iter().map(String::as_str).chain(unwritten).map(|key| (attachment, Key::from(key)));
        self.parked.extend(keys.filter(|parked| !self.outbox.cleared.contains(parked)));
    }

    /// How many more keys may be claimed.
    pub fn room(&self) -> usize {
        let outstanding: usize = self.lanes.iter().map(Lane::outstanding).sum();
        MAX_OUTSTANDING.saturating_sub(outstanding.max(self.claimed.len()))
    }

    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Lets go of all claims, where the queue's rows were moved. What is in flight, or finished and not yet written
    /// down, is sent once more.
    pub fn unclaim_all(&mut self) {
        let sources: FxHashSet<u32> = self.claimed.values().map(|row| row.source).collect();
        for source in sources {
            self.unclaim(source, 0);
        }
        // These places mean other rows by now, or none.
        self.later.clear();
        self.places.clear();
        self.outbox.finished.clear();
        self.outbox.requests.clear();
    }

    /// True if changes of a table (0: of any) that were enqueued below a mark are on their way, which need not be asked of
    /// the queue then. They gather no longer: somebody waits for them.
    pub fn awaits(&mut self, table: u32, mark: i64) -> bool {
        self.hurry(table, mark);
        let is_below = |row: &Claimed| row.places.iter().any(|place| place.id < mark);
        self.claimed.values().any(|row| (table == 0 || row.source == table) && is_below(row))
    }

    pub fn is_known(&self, place: &Place) -> bool {
        self.places.contains(place)
    }

    /// Keeps claimed rows until the catalog has been read again.
    pub fn accept_later(&mut self, rows: Vec<Row>) {
        self.places.extend(rows.iter().map(|row| row.place));
        self.later.extend(rows);
    }

    pub fn has_later(&self) -> bool {
        !self.later.is_empty()
    }

    /// Takes in what `accept_later` kept.
    pub fn accept_now(&mut self) {
        let rows = std::mem::take(&mut self.later);
        self.accept(rows);
    }

    /// Takes claimed rows in: each key becomes, or joins, one operation in each lane of its table.
    fn accept(&mut self, rows: Vec<Row>) {
        let (now, now_instant) = (now_micros(), Instant::now());
        for row in rows {
            let Some(root) = self.root_of(row.source) else {
                // A link that is gone, with the attachment that it was made for.
                self.outbox.finished.push(row.place);
                continue;
            };
            if self.is_held(root) {
                // Since it was claimed, or until its index is there: it stays in the queue.
                self.places.remove(&row.place);
                continue;
            }
            let keys = match row.asked {
                Asked::Keys(keys) => keys,
                Asked::Whole(what) => {
                    self.outbox.ask(root, what, vec![row.place]);
                    continue;
                }
            };
            self.next_ticket += 1;
            let ticket = self.next_ticket;
            let age = Duration::from_micros(u64::try_from(now - row.enqueued_at).unwrap_or_default());
            let enqueued = now_instant.checked_sub(age).unwrap_or(now_instant);
            let mut change = Change { ticket, id: row.place.id, enqueued, values: None };
            let moved = self.moves.get(&row.source).map(|(_, attachment)| *attachment);
            if row.source != root && moved.is_none() {
                change.values = Some(FxBuildHasher.hash_one((row.source, &keys)));
                let joined = self.accept_values(row.source, root, &keys, change);
                match joined.and_then(|ticket| self.claimed.get_mut(&ticket)) {
                    Some(claimed) => claimed.places.push(row.place),
                    None => {
                        let (places, enqueued_at) = (smallvec![row.place], row.enqueued_at);
                        self.claimed.insert(ticket, Claimed { places, source: root, left: 1, enqueued_at });
                    }
                }
                continue;
            }
            let mut left = 0;
            for key in keys {
                if let Some(attachment) = moved {
                    let Some((key, routing)) = routing::pair(&key) else { continue };
                    let key: Key = Rc::from(key);
                    for lane in self.lanes.iter_mut().filter(|lane| lane.attachment == attachment) {
                        lane.moved(&key, change, routing.clone());
                        left += 1;
                    }
                    continue;
                }
                for lane in self.lanes.iter_mut().filter(|lane| lane.source == row.source) {
                    left += usize::from(lane.change(&key, change));
                }
            }
            if left == 0 {
                // No index follows this table (detached), or its first load has not begun and will read these rows; or
                // another row stands for this one.
                self.outbox.finished.push(row.place);
            } else {
                self.claimed.insert(
                    ticket,
                    Claimed { places: smallvec![row.place], source: root, left, enqueued_at: row.enqueued_at },
                );
            }
        }
    }

    /// Has documents read and sent once more whose earlier request may have arrived late; when the next ones are due.
    pub fn look_at_doubtful(&mut self, now: Instant) -> Option<Instant> {
        while let Some((due, ..)) = self.doubtful.front() {
            if *due > now {
                return Some(*due);
            }
            if let Some((_, lane, key, routing)) = self.doubtful.pop_front()
                && let Some(lane) = self.lane(lane)
            {
                lane.check(key, routing);
            }
        }
        None
    }

    /// Rows were deleted from the queue: their places may be used again.
    pub fn forget_places(&mut self, places: impl IntoIterator<Item = Place>) {
        for place in places {
            self.places.remove(&place);
        }
    }

    /// The next open lane with documents ready, in turn; the lanes that are waited for come with the earliest time.
    pub fn next_ready(&mut self, now: Instant) -> (Option<u32>, Option<Instant>) {
        let mut earliest: Option<Instant> = None;
        let mut found = None;
        let count = self.lanes.len();
        for step in 0..count {
            let place = (self.turn + step) % count;
            let lane = &mut self.lanes[place];
            let due = lane.wake(now);
            if let Some(due) = due {
                earliest = Some(earliest.map_or(due, |earliest| earliest.min(due)));
            }
            if lane.ready() == 0 || found.is_some() {
                continue;
            }
            if lane.is_open(now) {
                if may_have_another(lane, &self.flights, now) {
                    found = Some((place, lane.id));
                }
            } else if let Some(until) = lane.blocked_until.filter(|until| *until > now) {
                earliest = Some(earliest.map_or(until, |earliest| earliest.min(until)));
            }
        }
        if let Some((place, _)) = found {
            self.turn = place + 1;
        }
        (found.map(|(_, id)| id), earliest)
    }

    /// Whether a lane may send now.
    pub fn may_send(&self, lane: u32, now: Instant) -> bool {
        let lane = self.lanes.iter().find(|known| known.id == lane);
        lane.is_some_and(|lane| lane.is_open(now) && may_have_another(lane, &self.flights, now))
    }

    /// Reads what is ready in a lane and sends it.
    pub fn send_changes(
        &mut self,
        lane: u32,
        attachment: &Attachment,
        reader: &mut Reader,
        engine: &mut Engine,
        probe: bool,
    ) {
        let target_bytes = engine.sizing.target_bytes();
        let max_content = engine.max_content;
        let in_flight = self.in_flight();
        let routed = reader.shape().routing.is_some();
        let Some((keys, elsewhere)) = self.lane(lane).map(|lane| {
            let share = engine.sizing.documents(lane.average_bytes, in_flight, Some(lane.ready()));
            let keys = lane.take(if probe { 1 } else { share });
            let elsewhere = |key: &Key| if routed { lane.elsewhere(key).to_vec() } else { Vec::new() };
            let elsewhere: Vec<Vec<Routing>> = keys.iter().map(elsewhere).collect();
            (keys, elsewhere)
        }) else {
            return;
        };
        let mut batch = self.batch(routed);
        batch.rows = keys.len();
        let mut seen = vec![false; keys.len()];
        let complete = transaction::run_waiting_shortly(|| {
            reader.lock();
            require_names(attachment);
            if elsewhere.iter().any(|routings| !routings.is_empty()) {
                batch.former = self.next_version();
            }
            batch.version = self.next_version();
            let place: FxHashMap<&str, usize> = keys.iter().enumerate().map(|(place, key)| (&**key, place)).collect();
            let texts: Vec<&str> = keys.iter().map(|key| &**key).collect();
            let complete = reader.by_keys(&texts, |row| {
                // A row under another text (1.00 for 1.0) is not the one that was asked for.
                if let Some(&place) = place.get(row.key)
                    && (row.document.is_some() || routed)
                    && !std::mem::replace(&mut seen[place], true)
                {
                    batch.put(&keys[place], row, &elsewhere[place], max_content);
                }
                batch.body.len() < target_bytes
            });
            drop(place);
            self.flush_what_was_read();
            complete
        });
        match complete {
            Ok(complete) => {
                let mut unread = Vec::new();
                for ((key, seen), elsewhere) in keys.into_iter().zip(seen).zip(&elsewhere) {
                    match (seen, complete) {
                        (true, _) => {}
                        (false, true) => batch.remove(&key, elsewhere),
                        (false, false) => unread.push(key),
                    }
                }
                if let Some(lane) = self.lane(lane) {
                    lane.put_back(unread.into_iter());
                }
                self.send(lane, batch, engine);
            }
            // No row can have such a key: what stands under it in the index is nobody's.
            Err(error)
                if keys.len() == 1 && reader.blames_a_row(&error) && reader.is_key(&keys[0]).is_ok_and(|is| !is) =>
            {
                batch.body.clear();
                batch.operations.clear();
                batch.remove(&keys[0], &elsewhere[0]);
                self.send(lane, batch, engine);
            }
            Err(error) => self.read_failed(lane, keys, &error, reader.blames_a_row(&error), engine),
        }
    }

    /// Reads a page of a table that follows the key `after`, and sends it to a lane; documents that are on their way
    /// in that lane are left out, for they are read later than this. `left`: rows that follow, as far as that is known.
    ///
    /// # Errors
    /// What Postgres said; nothing was sent.
    pub fn send_page(
        &mut self,
        lane: u32,
        reader: &mut Reader,
        engine: &mut Engine,
        after: Option<&str>,
        left: Option<usize>,
        page: Page,
    ) -> Result<PageRead, SqlError> {
        let target_bytes = engine.sizing.target_bytes();
        let max_content = engine.max_content;
        let in_flight = self.in_flight();
        let limit = self.lane(lane).map_or(1, |lane| {
            let documents = engine.sizing.documents(lane.average_bytes, in_flight, left);
            // Rows that the filter leaves out cost next to nothing; the body has its own limit.
            let rows = if reader.shape().is_filtered() { documents.max(FILTERED_ROWS) } else { documents };
            rows.min(lane.max_operations)
        });
        let mut batch = self.batch(reader.shape().routing.is_some());
        let mut read = PageRead { sent: 0, rows: 0, last: None, exhausted: false };
        let place = self.lanes.iter().position(|candidate| candidate.id == lane);
        let result = transaction::run_without_waiting(|| {
            reader.lock();
            batch.version = self.next_version();
            let lane = place.map(|place| &self.lanes[place]);
            let mut last = String::new();
            let uninterrupted = reader.page(after, limit as i64, |row| {
                read.rows += 1;
                last.clear();
                last.push_str(row.key);
                if row.document.is_some() && lane.is_some_and(|lane| !lane.contains(row.key)) {
                    batch.put(&Rc::from(row.key), row, &[], max_content);
                }
                batch.body.len() < target_bytes
            });
            read.exhausted = uninterrupted && read.rows < limit;
            read.last = (read.rows > 0).then(|| Rc::from(last));
            self.flush_what_was_read();
        });
        if let Err(error) = result {
            self.recycle(batch.body);
            return Err(error);
        }
        read.sent = batch.operations.len() + batch.unfit.len();
        batch.rows = read.rows;
        if let Some(lane) = self.lane(lane) {
            if read.sent == 0 && read.rows == lane.max_operations {
                // No answer comes that would have it grow.
                lane.max_operations = (lane.max_operations * 2).min(MAX_OPERATIONS);
            }
            let unfit = batch.unfit.iter().map(|(key, ..)| key);
            for key in batch.operations.iter().map(|operation| &operation.key).chain(unfit) {
                lane.backfill(key.clone(), page);
            }
        }
        self.send(lane, batch, engine);
        Ok(read)
    }

    /// Takes the version of a batch, makes it durable, and renews the snapshot: in this order, so that a batch with a
    /// higher version has read later. The tables are locked before.
    fn next_version(&mut self) -> i64 {
        let plan =
            self.version_plan.get_or_insert_with(|| Plan::prepare("select pg_catalog.nextval('es_sync.version')", &[]));
        let version = plan.execute(&[], 1).get::<i64>(0, 1).unwrap_or_default();
        LAST_VERSION.set(version);
        transaction::flush_wal();
        transaction::new_snapshot();
        version
    }

    /// An asynchronous commit can be read before it is on disk. A lost queue would mend what a crash takes back; one that
    /// survives does not.
    fn flush_what_was_read(&self) {
        if self.durable {
            transaction::flush_all_wal();
        }
    }

    fn batch(&mut self, routed: bool) -> Batch {
        let body = self.bodies.pop().unwrap_or_default();
        Batch { body, operations: Vec::new(), unfit: Vec::new(), version: 0, former: 0, routed, rows: 0 }
    }

    pub(super) fn recycle(&mut self, mut body: Body) {
        body.clear();
        // One that held a single huge document is not kept for the usual ones.
        if self.bodies.len() < 8 && body.capacity() <= 2 * settings::bulk_bytes() {
            self.bodies.push(body);
        }
    }

    fn send(&mut self, lane: u32, batch: Batch, engine: &mut Engine) {
        let Batch { body, operations, unfit, version, rows, .. } = batch;
        for (key, kind, reason) in unfit {
            self.park(lane, &key, None, kind, reason);
        }
        let operations = self.without_bodiless(lane, operations);
        if operations.is_empty() {
            self.recycle(body);
            return;
        }
        let Some(target) = self.lane(lane).map(|lane| {
            let average = body.len() / operations.len();
            lane.average_bytes = (lane.average_bytes + average * 3) / 4;
            lane.target.clone()
        }) else {
            return;
        };
        let token = engine.token();
        self.flights.insert(token, Flight { lane, operations, version, rows, sent_at: Instant::now() });
        engine.senders.send(es::Delivery { token, target, body });
    }

    /// Takes out what has nothing in the body: ids that the engine refuses, which would take their whole request along,
    /// and rows that are gone while nobody says where their documents lay (then another change does).
    fn without_bodiless(&mut self, lane: u32, operations: Vec<Operation>) -> Vec<Operation> {
        let (kept, bodiless): (Vec<_>, Vec<_>) = operations.into_iter().partition(|operation| operation.items > 0);
        for operation in bodiless {
            if operation.delete {
                if let Some(attachment) = self.lane(lane).map(|lane| lane.attachment) {
                    self.clear(attachment, &operation.key);
                }
                self.finish(lane, &operation.key);
            } else {
                let reason = format!(
                    "document id of {} bytes is longer than {} bytes",
                    key::document_id(&operation.key).len(),
                    key::MAX_ID_BYTES
                );
                self.park(lane, &operation.key, None, "id_too_long", reason);
            }
        }
        kept
    }

    fn read_failed(&mut self, lane: u32, keys: Vec<Key>, error: &SqlError, in_the_data: bool, engine: &mut Engine) {
        // Data that cannot be read is found by halving.
        if in_the_data && keys.len() == 1 {
            let key = keys[0].clone();
            self.park(lane, &key, None, &error.sqlstate(), error.message.clone());
            return;
        }
        let Some(state) = self.lane(lane) else { return };
        let attachment = state.attachment;
        if in_the_data {
            state.max_operations = keys.len().div_ceil(2);
            state.put_back(keys.into_iter());
            return;
        }
        if error.passes_soon() {
            // In trouble until something of it was taken: else what waits in the queue would be claimed and given back again
            // and again.
            state.failures = state.failures.max(1);
            state.blocked_until = Some(Instant::now() + TABLE_REST);
            state.put_back(keys.into_iter());
        } else {
            self.rest(lane, keys.into_iter(), engine);
        }
        set_cause(attachment, &format!("could not read documents: {error}"));
    }

    /// A document is done; when its oldest change was enqueued.
    pub(super) fn finish(&mut self, lane: u32, key: &Key) -> Option<i64> {
        let finished = self.lane(lane)?.finish(key);
        self.give_back(finished)
    }

    fn give_back(&mut self, finished: Finished) -> Option<i64> {
        self.pages.extend(finished.page);
        let mut oldest: Option<i64> = None;
        for ticket in finished.tickets {
            let Some(claimed) = self.claimed.get(&ticket) else { continue };
            oldest = Some(oldest.map_or(claimed.enqueued_at, |oldest| oldest.min(claimed.enqueued_at)));
            self.finish_ticket(ticket);
        }
        oldest
    }

    /// One of the operations that a claimed row waits for is done, or its fan-out.
    pub(super) fn finish_ticket(&mut self, ticket: Ticket) {
        let Some(claimed) = self.claimed.get_mut(&ticket) else { return };
        claimed.left -= 1;
        if claimed.left == 0
            && let Some(claimed) = self.claimed.remove(&ticket)
        {
            self.outbox.finished.extend(claimed.places);
        }
    }

    /// Operations that a claimed row still waits for.
    pub(super) fn left(&self, ticket: Ticket) -> usize {
        self.claimed.get(&ticket).map_or(0, |claimed| claimed.left)
    }

    /// Where claimed rows lie, and when the oldest was enqueued.
    pub(super) fn places_of(&self, ticket: Ticket) -> Option<(Vec<Place>, i64)> {
        self.claimed.get(&ticket).map(|claimed| (claimed.places.to_vec(), claimed.enqueued_at))
    }

    /// Forgets claimed rows of which nothing is on its way, and which were replaced in the queue.
    pub(super) fn forget_ticket(&mut self, ticket: Ticket) {
        if let Some(claimed) = self.claimed.remove(&ticket) {
            self.forget_places(claimed.places);
        }
    }

    /// Gives up on what claimed rows ask for: the table's indexes are compared with it instead.
    pub(super) fn repair_instead(&mut self, ticket: Ticket, root: u32) {
        if let Some(claimed) = self.claimed.remove(&ticket) {
            self.outbox.ask(root, Whole::Repair, claimed.places.into_vec());
        }
    }
}

/// An index that took nothing the last time, or gave no answer, is tried with one request: each may keep a connection for
/// long. So may one that has not answered for a while; the others are for those that answer.
fn may_have_another(lane: &Lane, flights: &FxHashMap<u64, Flight>, now: Instant) -> bool {
    let in_trouble = lane.refusals > 0 || lane.failures > 0;
    !flights
        .values()
        .any(|flight| flight.lane == lane.id && (in_trouble || now.saturating_duration_since(flight.sent_at) > SLOW))
}

/// Raises where columns have other names since the reader was made, which looked at them then: an excluded one would be
/// sent under the name of another. Its tables are locked.
fn require_names(attachment: &Attachment) {
    if RELATIONS_CHANGED.get() && !definition::names_hold(attachment) {
        Report::new(PgSqlErrorCode::ERRCODE_OBJECT_IN_USE, "could not read a table whose columns were just renamed")
            .raise();
    }
}
