//! A lane: the documents of one concrete index that are on their way. Plain data, no Postgres.
//!
//! Each document has at most one operation outstanding. What changes meanwhile is noted as late and goes next, read
//! anew: so no old body is ever sent after a newer one.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustc_hash::{FxHashMap, FxHashSet};
use smallvec::{SmallVec, smallvec};

use crate::attachment::routing::Routing;
pub use crate::queue::keys::Key;

/// Identifies a claimed queue row in the worker's memory.
pub type Ticket = u64;
/// Identifies a page of a job.
pub type Page = u64;
/// As a rule one or two.
pub type Tickets = SmallVec<[Ticket; 2]>;

/// A claimed row of the queue, as far as the documents that it is about need to know.
#[derive(Debug, Clone, Copy)]
pub struct Change {
    pub ticket: Ticket,
    /// The row's id in the queue.
    pub id: i64,
    pub enqueued: Instant,
    /// Of a row that holds values of a related table: stands for these values. None for a row that names its documents.
    pub values: Option<u64>,
}

impl Change {
    /// True if whoever reads this row once more is led to whatever document of it `later` leads to. One that holds values
    /// may lead nowhere by then, because the document's own row has gone or points elsewhere.
    fn stands_for(&self, later: &Change) -> bool {
        self.id < later.id && (self.values.is_none() || self.values == later.values)
    }
}

/// One concrete index and the documents on their way to it.
pub struct Lane {
    pub id: u32,
    pub attachment: i32,
    pub source: u32,
    /// The concrete index.
    pub index: String,
    /// Not yet behind its public alias.
    pub building: bool,
    /// Of a build: all rows are in it, and it may be live any moment.
    pub is_loaded: bool,
    pub target: es::Target,
    /// The fields that the index is known to have; None where that is not known.
    pub mapping: Option<Rc<str>>,
    /// The engine is asked to give it fields: documents wait until it has them.
    pub awaits_mapping: bool,
    documents: FxHashMap<Key, Document>,
    ready: VecDeque<Key>,
    /// Ready, too, and sent after those: what a change with very many documents leads to.
    behind: VecDeque<Key>,
    waiting: BinaryHeap<Reverse<(Instant, Key)>>,
    /// How long a document's changes gather before it is read.
    delay: Duration,
    /// Documents whose changes gather, and until when.
    gathering: BTreeSet<(Instant, Key)>,
    /// More documents than this do not gather: the oldest go at once.
    pub max_gathering: usize,
    /// Until when nothing is read or sent, after an error of the lane as a whole.
    pub blocked_until: Option<Instant>,
    pub failures: u32,
    /// Requests in a row of which the index took nothing, though the engine had room.
    pub refusals: u32,
    /// Nothing is read or sent until es_sync.resume().
    pub paused: bool,
    /// Largest number of operations in one request: halved to find the one that spoils all, doubled by each success.
    pub max_operations: usize,
    /// Average size of a document, in bytes.
    pub average_bytes: usize,
}

#[derive(Default)]
struct Document {
    in_flight: bool,
    /// It waits in `behind`.
    behind: bool,
    /// Queue rows that the next or outstanding operation finishes.
    tickets: Tickets,
    /// Queue rows claimed after the outstanding operation was read.
    late: Tickets,
    /// Where changes gather, the claimed rows that no operation has been read for yet: until one was, they stay in the
    /// queue, and so can stand for rows after them.
    unread: Vec<Change>,
    page: Option<Page>,
    /// Of a routed index: where the document may lie besides, and must not.
    elsewhere: Vec<Routing>,
    /// The same, heard of after the outstanding operation was read.
    late_elsewhere: Vec<Routing>,
    /// To be sent although nobody waits for it.
    check: bool,
    /// Failures that may be its own.
    attempts: u32,
    /// How often it has waited to be sent once more.
    waits: u32,
}

impl Document {
    fn is_wanted(&self) -> bool {
        self.check || self.page.is_some() || !self.tickets.is_empty()
    }
}

/// What a finished document gives back.
#[derive(Default)]
pub struct Finished {
    pub tickets: Tickets,
    pub page: Option<Page>,
}

/// With more rows than this, which cannot stand for each other, a document gathers no longer: queue and memory would grow
/// with them.
const MAX_UNREAD: usize = 8;
/// More operations than this are never put into one request.
pub const MAX_OPERATIONS: usize = 10_000;
/// More documents than this wait to be sent once more only where something is wrong with their index.
const MANY_WAITING: usize = 2_000;
/// Requests in a row, and attempts at one document, after which an index is not expected to take them soon.
const STUCK_REFUSALS: u32 = 3;
const STUCK_WAITS: u32 = 8;
/// With so many an index is tried that has taken nothing.
pub const TRIAL_OPERATIONS: usize = 100;

impl Lane {
    pub fn new(id: u32, attachment: i32, source: u32, index: String, building: bool, target: es::Target) -> Self {
        Self {
            id,
            attachment,
            source,
            index,
            building,
            is_loaded: false,
            target,
            mapping: None,
            awaits_mapping: false,
            documents: FxHashMap::default(),
            ready: VecDeque::new(),
            behind: VecDeque::new(),
            waiting: BinaryHeap::new(),
            delay: Duration::ZERO,
            gathering: BTreeSet::new(),
            max_gathering: usize::MAX,
            blocked_until: None,
            failures: 0,
            refusals: 0,
            paused: false,
            max_operations: MAX_OPERATIONS,
            average_bytes: 512,
        }
    }

    /// Documents on their way, in whatever state.
    pub fn outstanding(&self) -> usize {
        self.documents.len()
    }

    /// Documents that can be read and sent now.
    pub fn ready(&self) -> usize {
        self.ready.len() + self.behind.len()
    }

    /// True if a document is on its way.
    pub fn contains(&self, key: &str) -> bool {
        self.documents.contains_key(key)
    }

    /// A change was claimed. False if the row need not wait for the document, because a row before it does.
    ///
    /// Only where changes gather: then a document that changes all the time does not fill queue and memory. The row that
    /// stands for others must have a lower id, for `wait` asks for what was enqueued before a certain id, and must lead to
    /// the document for ever.
    pub fn change(&mut self, key: &Key, change: Change) -> bool {
        self.note(key, change, false)
    }

    /// The same for one document of very many: it lets others go first.
    pub fn change_behind(&mut self, key: &Key, change: Change) -> bool {
        self.note(key, change, true)
    }

    fn note(&mut self, key: &Key, change: Change, behind: bool) -> bool {
        let gathers = self.is_delayed();
        let Some(document) = self.documents.get_mut(key) else {
            self.begin(key, smallvec![change.ticket], self.unread(change), behind);
            return true;
        };
        if gathers && document.unread.iter().any(|unread| unread.stands_for(&change)) {
            return false;
        }
        if !behind && std::mem::take(&mut document.behind) {
            // Its place behind is passed over then.
            self.ready.push_back(key.clone());
        }
        if document.in_flight {
            document.late.push(change.ticket);
        } else {
            document.tickets.push(change.ticket);
        }
        if gathers {
            document.unread.push(change);
            if document.unread.len() > MAX_UNREAD {
                self.hasten(key);
            }
        }
        true
    }

    /// What a document begins with.
    fn unread(&self, change: Change) -> Vec<Change> {
        if self.is_delayed() { vec![change] } else { Vec::new() }
    }

    /// A document gathers no longer.
    fn hasten(&mut self, key: &Key) {
        let before = self.gathering.len();
        self.gathering.retain(|(_, gathering)| gathering != key);
        if self.gathering.len() < before {
            self.ready.push_back(key.clone());
        }
    }

    /// A document that was not on its way is to be read: now, or when its changes have gathered.
    fn begin(&mut self, key: &Key, tickets: Tickets, unread: Vec<Change>, behind: bool) {
        let behind = behind && !self.is_delayed();
        let gathers = self.is_delayed() && unread.len() <= MAX_UNREAD;
        let first = unread.iter().map(|change| change.enqueued).min().filter(|_| gathers);
        self.documents.insert(key.clone(), Document { tickets, unread, behind, ..Document::default() });
        match first {
            Some(first) => drop(self.gathering.insert((first + self.delay, key.clone()))),
            None if behind => self.behind.push_back(key.clone()),
            None => self.ready.push_back(key.clone()),
        }
    }

    /// Sets how long changes gather. What gathers already goes at once.
    pub fn set_delay(&mut self, delay: Duration) {
        if std::mem::replace(&mut self.delay, delay) != delay {
            self.hurry(i64::MAX);
        }
    }

    /// True if changes gather before a document is read.
    pub fn is_delayed(&self) -> bool {
        !self.delay.is_zero()
    }

    /// Documents that gather changes of which the first was enqueued before `mark` go at once.
    pub fn hurry(&mut self, mark: i64) {
        let (documents, ready) = (&self.documents, &mut self.ready);
        self.gathering.retain(|(_, key)| {
            let first = documents.get(key).and_then(|document| document.unread.iter().map(|change| change.id).min());
            let stays = first.is_some_and(|first| first >= mark);
            if !stays {
                ready.push_back(key.clone());
            }
            stays
        });
    }

    /// A claimed row says that a document may lie elsewhere. It is waited for always: no other row says where.
    pub fn moved(&mut self, key: &Key, change: Change, routing: Routing) {
        match self.documents.get_mut(key) {
            None => self.begin(key, smallvec![change.ticket], self.unread(change), false),
            Some(document) if document.in_flight => document.late.push(change.ticket),
            Some(document) => document.tickets.push(change.ticket),
        }
        self.note_elsewhere(key, routing);
    }

    fn note_elsewhere(&mut self, key: &str, routing: Routing) {
        let Some(document) = self.documents.get_mut(key) else { return };
        let known = if document.in_flight { &mut document.late_elsewhere } else { &mut document.elsewhere };
        if !known.contains(&routing) {
            known.push(routing);
        }
    }

    /// Where a document may lie besides.
    pub fn elsewhere(&self, key: &str) -> &[Routing] {
        self.documents.get(key).map_or(&[], |document| &document.elsewhere)
    }

    /// A document was read by a job and is being sent.
    pub fn backfill(&mut self, key: Key, page: Page) {
        self.documents.insert(key, Document { in_flight: true, page: Some(page), ..Document::default() });
    }

    /// A document of a job's page is left to the changes' way; false if it is on its way already.
    pub fn backfill_alone(&mut self, key: Key, page: Page) -> bool {
        if self.contains(&key) {
            return false;
        }
        self.documents.insert(key.clone(), Document { page: Some(page), ..Document::default() });
        self.ready.push_back(key);
        true
    }

    /// A document is to be read and sent although no change asked for it. One with a routing may lie there.
    pub fn check(&mut self, key: Key, routing: Option<Routing>) {
        if !self.contains(&key) {
            self.documents.insert(key.clone(), Document { check: true, ..Document::default() });
            self.ready.push_back(key.clone());
        }
        if let Some(routing) = routing {
            self.note_elsewhere(&key, routing);
            if let Some(document) = self.documents.get_mut(&key) {
                document.check = true;
            }
        }
    }

    /// Takes up to `count` documents to read and send. Those behind get a quarter, so that they arrive at all.
    pub fn take(&mut self, count: usize) -> Vec<Key> {
        let count = count.min(self.max_operations);
        let first = (count - (count / 4).min(self.behind.len())).min(self.ready.len());
        let mut keys: Vec<Key> = self.ready.drain(..first).collect();
        while keys.len() < count
            && let Some(key) = self.behind.pop_front()
        {
            // Not one that went first after all.
            if self.documents.get_mut(&key).is_some_and(|document| std::mem::take(&mut document.behind)) {
                keys.push(key);
            }
        }
        for key in &keys {
            if let Some(document) = self.documents.get_mut(key) {
                document.in_flight = true;
                document.unread.clear();
            }
        }
        keys
    }

    /// Puts documents back that were taken and not sent, or whose request failed as a whole: they are read anew.
    pub fn put_back(&mut self, keys: impl DoubleEndedIterator<Item = Key>) {
        for key in keys.rev() {
            if self.land(&key) {
                self.ready.push_front(key);
            }
        }
    }

    /// A single document failed, which `counts` if that may be its own fault. It is tried again at `due`, which is told how
    /// often it has waited.
    pub fn retry(&mut self, key: &Key, counts: bool, due: impl FnOnce(u32) -> Instant) {
        if self.land(key)
            && let Some(document) = self.documents.get_mut(key)
        {
            document.attempts += u32::from(counts);
            document.waits += 1;
            self.waiting.push(Reverse((due(document.waits), key.clone())));
        }
    }

    /// Attempts that a document has had, those left out that say nothing of it.
    pub fn attempts(&self, key: &str) -> u32 {
        self.documents.get(key).map_or(0, |document| document.attempts)
    }

    fn land(&mut self, key: &str) -> bool {
        match self.documents.get_mut(key) {
            Some(document) => {
                document.in_flight = false;
                let late = std::mem::take(&mut document.late);
                document.tickets.extend(late);
                for routing in std::mem::take(&mut document.late_elsewhere) {
                    if !document.elsewhere.contains(&routing) {
                        document.elsewhere.push(routing);
                    }
                }
                if !document.is_wanted() {
                    // Its rows went back to the queue while it was in flight.
                    self.documents.remove(key);
                    return false;
                }
                true
            }
            None => false,
        }
    }

    /// A document's operation is done, one way or the other. What came late goes next.
    pub fn finish(&mut self, key: &Key) -> Finished {
        let Some(mut document) = self.documents.remove(key) else { return Finished::default() };
        let finished = Finished { tickets: std::mem::take(&mut document.tickets), page: document.page.take() };
        let (late, elsewhere) = (document.late, document.late_elsewhere);
        if !late.is_empty() || !elsewhere.is_empty() {
            self.begin(key, late, document.unread, false);
            if let Some(next) = self.documents.get_mut(key) {
                next.check = !elsewhere.is_empty();
                next.elsewhere = elsewhere;
            }
        }
        finished
    }

    /// Moves documents whose wait is over to the ready ones; when the next one is due.
    pub fn wake(&mut self, now: Instant) -> Option<Instant> {
        while let Some((until, _)) = self.gathering.first() {
            if *until > now && self.gathering.len() <= self.max_gathering {
                break;
            }
            self.ready.extend(self.gathering.pop_first().map(|(_, key)| key));
        }
        let gathered = self.gathering.first().map(|(until, _)| *until);
        let retried = self.wake_retries(now);
        gathered.into_iter().chain(retried).min()
    }

    fn wake_retries(&mut self, now: Instant) -> Option<Instant> {
        while let Some(Reverse((due, _))) = self.waiting.peek() {
            if *due > now {
                return Some(*due);
            }
            if let Some(Reverse((_, key))) = self.waiting.pop()
                && self.documents.get(&key).is_some_and(|document| !document.in_flight)
            {
                self.ready.push_back(key);
            }
        }
        None
    }

    /// Whether the lane may read and send now.
    pub fn is_open(&self, now: Instant) -> bool {
        !self.paused && !self.awaits_mapping && self.blocked_until.is_none_or(|until| until <= now)
    }

    /// True while its index takes nothing, or leaves much.
    pub fn in_trouble(&self, now: Instant) -> bool {
        self.failures > 0 || self.waiting.len() > MANY_WAITING || self.blocked_until.is_some_and(|until| until > now)
    }

    /// True while documents wait to be sent once more.
    pub fn is_retrying(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// True if its index has taken nothing for a while, or not some of its documents: it is blocked, or has lost a shard.
    pub fn is_stuck(&self) -> bool {
        self.refusals >= STUCK_REFUSALS || self.documents.values().any(|document| document.waits >= STUCK_WAITS)
    }

    /// Lets go of claimed rows that go back to the queue. What is in flight stays, and what a job's page waits for.
    pub fn unclaim(&mut self, tickets: &FxHashSet<Ticket>) {
        self.documents.retain(|_, document| {
            document.tickets.retain(|ticket| !tickets.contains(ticket));
            document.late.retain(|ticket| !tickets.contains(ticket));
            // What they stood for is in good hands: they are claimed again. They stand for nothing any more.
            document.unread.retain(|change| !tickets.contains(&change.ticket));
            document.in_flight || document.is_wanted()
        });
        let documents = &self.documents;
        self.ready.retain(|key| documents.contains_key(key));
        self.behind.retain(|key| documents.contains_key(key));
        self.gathering.retain(|(_, key)| documents.contains_key(key));
        self.waiting.retain(|Reverse((_, key))| documents.contains_key(key));
    }

    /// Gives everything back, when the index is gone or replaced.
    pub fn dissolve(self) -> Vec<Finished> {
        self.documents
            .into_values()
            .map(|mut document| {
                document.tickets.append(&mut document.late);
                Finished { tickets: document.tickets, page: document.page }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn lane() -> Lane {
        Lane::new(1, 1, 1, "i-1".into(), false, es::Target { alias: "i-1.w".into(), pipeline: None })
    }

    fn key(text: &str) -> Key {
        Rc::from(text)
    }

    fn at(ticket: Ticket) -> Change {
        Change { ticket, id: ticket as i64, enqueued: Instant::now(), values: None }
    }

    fn of_values(ticket: Ticket, values: u64) -> Change {
        Change { values: Some(values), ..at(ticket) }
    }

    fn delayed() -> Lane {
        let mut lane = lane();
        lane.set_delay(Duration::from_secs(5));
        lane
    }

    #[test]
    fn one_of_very_many_documents_lets_others_go_first_and_arrives_all_the_same() {
        let mut lane = lane();
        let taken = |lane: &mut Lane, count| lane.take(count).iter().map(|key| key.to_string()).collect::<String>();
        for text in ["a", "b", "c", "d", "e", "f"] {
            lane.change_behind(&key(text), at(1));
        }
        lane.change(&key("x"), at(2));
        lane.change(&key("e"), at(3));
        assert_eq!(taken(&mut lane, 3), "xea");
        for text in ["1", "2", "3", "4", "5"] {
            lane.change(&key(text), at(4));
        }
        assert_eq!(taken(&mut lane, 4), "123b", "a quarter is theirs");
        assert_eq!(taken(&mut lane, 10), "45cdf");
        assert_eq!(lane.ready(), 0);
        for text in ["a", "b", "c", "d", "e", "f"] {
            let finished = lane.finish(&key(text));
            assert_eq!(finished.tickets.to_vec(), if text == "e" { vec![1, 3] } else { vec![1] });
        }
    }

    #[test]
    fn many_changes_of_a_document_become_one_operation() {
        let mut lane = lane();
        for ticket in 1..=3 {
            lane.change(&key("a"), at(ticket));
        }
        assert_eq!(lane.take(10).len(), 1);
        assert_eq!(lane.finish(&key("a")).tickets[..], [1, 2, 3]);
        assert_eq!(lane.outstanding(), 0);
    }

    #[test]
    fn a_change_is_acknowledged_only_by_an_operation_claimed_after_it() {
        let mut lane = lane();
        lane.change(&key("a"), at(1));
        lane.take(10);
        lane.change(&key("a"), at(2));
        assert_eq!(lane.ready(), 0, "at most one operation outstanding");
        assert_eq!(lane.finish(&key("a")).tickets[..], [1]);
        assert_eq!(lane.take(10).len(), 1);
        assert_eq!(lane.finish(&key("a")).tickets[..], [2]);
    }

    #[test]
    fn a_failed_request_is_read_anew_with_what_came_late() {
        let mut lane = lane();
        lane.change(&key("a"), at(1));
        lane.change(&key("b"), at(2));
        let keys = lane.take(10);
        lane.change(&key("a"), at(3));
        lane.put_back(keys.into_iter());
        assert_eq!(lane.take(10), [key("a"), key("b")], "in their order");
        assert_eq!(lane.finish(&key("a")).tickets[..], [1, 3]);
    }

    #[test]
    fn a_retry_waits_and_keeps_its_page() {
        let mut lane = lane();
        lane.backfill(key("a"), 7);
        let now = Instant::now();
        lane.retry(&key("a"), true, |waits| now + Duration::from_secs(waits.into()));
        assert!(lane.wake(now).is_some());
        assert_eq!(lane.ready(), 0);
        assert_eq!(lane.wake(now + Duration::from_secs(2)), None);
        assert_eq!(lane.take(1), [key("a")]);
        assert_eq!(lane.finish(&key("a")).page, Some(7));
    }

    #[test]
    fn rows_that_go_back_to_the_queue_leave_what_is_in_flight_and_what_a_page_waits_for() {
        let mut lane = lane();
        lane.change(&key("flying"), at(1));
        lane.change(&key("failing"), at(6));
        lane.take(2);
        lane.change(&key("flying"), at(2));
        lane.backfill_alone(key("page"), 7);
        lane.change(&key("page"), at(3));
        lane.change(&key("both"), at(4));
        lane.change(&key("both"), at(5));
        lane.change(&key("gone"), at(5));
        lane.unclaim(&FxHashSet::from_iter([2, 3, 5, 6]));
        assert_eq!(lane.outstanding(), 4);
        lane.put_back([key("failing")].into_iter());
        assert!(!lane.contains("failing"), "nobody waits for it any more");
        assert_eq!(lane.finish(&key("flying")).tickets[..], [1]);
        assert!(!lane.contains("flying"), "what came late is claimed again later");
        assert_eq!(lane.take(10), [key("page"), key("both")]);
        let page = lane.finish(&key("page"));
        assert_eq!((page.page, page.tickets.len()), (Some(7), 0));
        assert_eq!(lane.finish(&key("both")).tickets[..], [4]);
    }

    #[test]
    fn a_check_lasts_until_it_is_done() {
        let mut lane = lane();
        lane.check(key("a"), None);
        lane.unclaim(&FxHashSet::default());
        let keys = lane.take(1);
        lane.put_back(keys.into_iter());
        assert_eq!(lane.take(1), [key("a")], "its request failed");
        lane.finish(&key("a"));
        assert_eq!(lane.outstanding(), 0);
    }

    #[test]
    fn where_a_document_may_lie_is_remembered_until_an_operation_that_was_read_later_is_done() {
        let mut lane = lane();
        let (x, y) = (Some(Rc::from("x")), Some(Rc::from("y")));
        lane.moved(&key("a"), at(1), x.clone());
        lane.moved(&key("a"), at(2), x.clone());
        lane.take(1);
        lane.moved(&key("a"), at(3), y.clone());
        lane.moved(&key("a"), at(4), None);
        assert_eq!(lane.elsewhere("a"), std::slice::from_ref(&x));
        lane.put_back([key("a")].into_iter());
        assert_eq!(lane.elsewhere("a"), [x.clone(), y.clone(), None], "it failed, and all of it is to be done");
        lane.take(1);
        lane.check(key("a"), Some(y.clone()));
        assert_eq!(lane.finish(&key("a")).tickets[..], [1, 2, 3, 4]);
        assert_eq!(lane.take(1), [key("a")], "what was heard of late");
        assert_eq!(lane.elsewhere("a"), [y]);
        lane.finish(&key("a"));
        assert_eq!(lane.outstanding(), 0);
    }

    #[test]
    fn a_dissolved_lane_gives_back_every_ticket() {
        let mut lane = lane();
        lane.change(&key("a"), at(1));
        lane.take(1);
        lane.change(&key("a"), at(2));
        lane.change(&key("b"), at(3));
        let mut tickets: Vec<_> = lane.dissolve().into_iter().flat_map(|finished| finished.tickets).collect();
        tickets.sort_unstable();
        assert_eq!(tickets, [1, 2, 3]);
    }

    #[test]
    fn changes_gather_until_the_first_is_as_old_as_the_delay() {
        let mut lane = delayed();
        let first = at(1);
        assert!(lane.change(&key("a"), first));
        assert!(!lane.change(&key("a"), at(2)), "the first stands for it");
        let due = first.enqueued + Duration::from_secs(5);
        assert_eq!(lane.wake(first.enqueued), Some(due));
        assert_eq!(lane.ready(), 0);
        assert_eq!(lane.wake(due), None);
        assert_eq!(lane.take(10), [key("a")]);
        assert!(lane.change(&key("a"), at(3)), "the operation was read before it");
        assert!(!lane.change(&key("a"), at(4)));
        assert_eq!(lane.finish(&key("a")).tickets[..], [1]);
        assert_eq!(lane.ready(), 0, "what came late gathers again");
        lane.hurry(i64::MAX);
        lane.take(10);
        assert_eq!(lane.finish(&key("a")).tickets[..], [3]);
        assert_eq!(lane.outstanding(), 0);
    }

    #[test]
    fn a_row_stands_for_those_with_higher_ids_only() {
        let mut lane = delayed();
        lane.change(&key("a"), at(5));
        assert!(lane.change(&key("a"), at(3)));
        assert!(!lane.change(&key("a"), at(4)));
        lane.hurry(3);
        assert_eq!(lane.ready(), 0, "whoever waits does not wait for it");
        lane.hurry(4);
        assert_eq!(lane.take(10), [key("a")]);
        assert_eq!(lane.finish(&key("a")).tickets[..], [5, 3]);
    }

    #[test]
    fn a_row_of_values_stands_for_those_of_the_same_values_only() {
        let mut lane = delayed();
        assert!(lane.change(&key("a"), of_values(1, 7)));
        assert!(!lane.change(&key("a"), of_values(2, 7)));
        assert!(
            lane.change(&key("a"), of_values(3, 8)),
            "the first may lead nowhere by the time that it is read again"
        );
        assert!(lane.change(&key("a"), at(4)));
        assert!(!lane.change(&key("a"), of_values(5, 9)), "a row that names the document stands for all");
        lane.hurry(2);
        assert_eq!(lane.take(10), [key("a")]);
        assert_eq!(lane.finish(&key("a")).tickets[..], [1, 3, 4]);
    }

    #[test]
    fn a_document_with_many_rows_that_do_not_stand_for_each_other_gathers_no_longer() {
        let mut lane = delayed();
        for ticket in 1..=MAX_UNREAD as Ticket {
            assert!(lane.change(&key("a"), of_values(ticket, ticket)));
        }
        assert_eq!(lane.ready(), 0);
        assert!(lane.change(&key("a"), of_values(100, 100)));
        assert_eq!(lane.take(10), [key("a")]);
        assert_eq!(lane.finish(&key("a")).tickets.len(), MAX_UNREAD + 1);
        assert_eq!(lane.outstanding(), 0);
    }

    #[test]
    fn a_row_that_went_back_to_the_queue_stands_for_nothing() {
        let mut lane = delayed();
        lane.change(&key("a"), at(1));
        lane.change(&key("b"), at(2));
        lane.unclaim(&FxHashSet::from_iter([1]));
        assert!(lane.change(&key("a"), at(3)));
        lane.hurry(i64::MAX);
        assert_eq!(lane.take(10), [key("b"), key("a")]);
        lane.change(&key("b"), at(4));
        lane.unclaim(&FxHashSet::from_iter([4]));
        assert!(lane.change(&key("b"), at(5)));
    }

    #[test]
    fn documents_beyond_the_limit_do_not_gather() {
        let mut lane = delayed();
        lane.max_gathering = 1;
        let (first, second) = (at(1), at(2));
        lane.change(&key("a"), first);
        lane.change(&key("b"), Change { enqueued: first.enqueued + Duration::from_secs(1), ..second });
        assert!(lane.wake(first.enqueued).is_some());
        assert_eq!(lane.take(10), [key("a")]);
    }

    #[test]
    fn a_retry_takes_along_what_came_meanwhile_and_a_new_delay_lets_all_go() {
        let mut lane = delayed();
        lane.change(&key("a"), at(1));
        lane.hurry(i64::MAX);
        let keys = lane.take(1);
        lane.change(&key("a"), at(2));
        lane.put_back(keys.into_iter());
        assert_eq!(lane.take(1), [key("a")]);
        assert_eq!(lane.finish(&key("a")).tickets[..], [1, 2]);
        lane.change(&key("b"), at(3));
        lane.set_delay(Duration::ZERO);
        assert_eq!(lane.take(1), [key("b")]);
    }
}
