//! Fan-out: changes of related rows become changes of the documents that show them.
//!
//! A claimed row of a link has values; for these, keys are found, and each becomes an operation as if it had been in the
//! queue itself. Only so many documents of a table are on their way for this at a time: then other changes find room. A
//! row leaves the queue when all that it led to is done. Where a single value leads to more documents than that, its row
//! is replaced, page by page, by the keys that were found and a note of how far it has come.
//!
//! A change that has led to many documents is large: what it leads to from then on lets all other changes go first,
//! those of the same table and of the same link, too.

use std::collections::VecDeque;
use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

use super::answers::set_cause;
use super::database::{REST, Worker};
use super::delivery::Delivery;
use super::lane::{Change, Key, Ticket};
use crate::attachment::link::Link;
use crate::attachment::link::{self, Content};
use crate::document::related::Finder;
use crate::postgres::error::SqlError;
use crate::postgres::transaction;
use crate::queue::spool;

/// Documents of a table on their way beyond which no more are added to them for large changes; twice as many for others.
const MAX_DOCUMENTS: usize = 8_000;
/// Documents that a change may lead to before it is large.
const LARGE: usize = 1_000;
/// Keys of a single value that are found, and written to the queue, in one transaction.
const PAGE: usize = 20_000;
/// Values that are looked for together.
const MAX_VALUES: usize = 1_000;
/// Values and keys in memory beyond which no more rows of links are claimed. One that is long counts as several, so that
/// together they take 64 MB.
const MAX_CLAIMED: usize = 20_000;
/// Bytes for which one counts.
const USUAL_BYTES: usize = (64 << 20) / MAX_CLAIMED;
/// Failures of a way's query, not of the data, after which it is given up.
const PATIENCE: u32 = 2;
/// A turn finds no more keys after this time: others want to be served.
const TURN: Duration = Duration::from_millis(50);

/// What is left to do for claimed rows of a link.
pub struct Fan {
    /// The claimed row, the first one where there are several.
    change: Change,
    link: u32,
    root: u32,
    /// Where to go on with the first value.
    after: Option<String>,
    values: VecDeque<String>,
    found: VecDeque<String>,
    /// Bytes of what was claimed for it.
    bytes: usize,
    /// Values to look for together: halved where they lead to too many keys.
    at_once: usize,
    /// A value of it leads to so many keys that they go to the queue. Nothing else of it may be on its way then.
    spools: bool,
    /// Documents that it has led to.
    fed: usize,
    /// Failures of looking for its values that are not in the data.
    failures: u32,
}

/// Rows of links that were claimed, and the links.
#[derive(Default)]
pub struct Fans {
    fans: VecDeque<Fan>,
    /// The attached table of each link.
    roots: FxHashMap<u32, u32>,
    /// Attached tables of which many documents are on their way: what large changes have left in the queue is not claimed
    /// until half of them are done.
    full: Vec<u32>,
    /// The same for all rows of their links.
    crowded: Vec<u32>,
    /// Links whose values could not be looked for, and until when they are let be.
    resting: FxHashMap<u32, Instant>,
}

/// What is not claimed for now.
#[derive(Default, Clone, PartialEq)]
pub struct Held {
    /// Sources of the queue.
    pub sources: Vec<u32>,
    /// Links of which only what they have spooled is left there.
    pub spooled: Vec<u32>,
}

impl Fans {
    pub fn clear(&mut self) {
        self.fans.clear();
        self.full.clear();
        self.crowded.clear();
        self.resting.clear();
    }

    /// Forgets what was claimed for tickets that are given back.
    pub fn retain(&mut self, keep: impl Fn(Ticket) -> bool) {
        self.fans.retain(|fan| keep(fan.change.ticket));
    }

    /// The attached table of a link; None if it is gone.
    pub fn root_of(&self, link: u32) -> Option<u32> {
        self.roots.get(&link).copied()
    }

    /// The links that lead to a table's documents.
    pub fn links_of(&self, root: u32) -> impl Iterator<Item = u32> {
        self.roots.iter().filter(move |(_, its)| **its == root).map(|(source, _)| *source)
    }

    /// How much there is in memory of large changes, or of others: values and keys, or what their bytes count for.
    fn claimed(&self, large: bool) -> usize {
        let counted = self.fans.iter().filter(|fan| fan.is_large() == large && !self.resting.contains_key(&fan.link));
        let (count, bytes) =
            counted.fold((0, 0), |(count, bytes), fan| (count + fan.values.len() + fan.found.len(), bytes + fan.bytes));
        count.max(bytes / USUAL_BYTES)
    }
}

impl Delivery {
    /// Adds the links that are not claimed for now to the tables that are not.
    pub(super) fn hold_links(&mut self, held: &mut Held) {
        let mut roots: Vec<u32> = self.fans.roots.values().copied().collect();
        roots.sort_unstable();
        roots.dedup();
        let beyond = |former: &[u32], limit: usize, less: usize| -> Vec<u32> {
            let limit = |root: u32| if former.contains(&root) { less } else { limit };
            roots.iter().copied().filter(|root| self.outstanding(*root) >= limit(*root)).collect()
        };
        let full = beyond(&self.fans.full, MAX_DOCUMENTS, MAX_DOCUMENTS / 2);
        let crowded = beyond(&self.fans.crowded, MAX_DOCUMENTS * 2, MAX_DOCUMENTS * 3 / 2);
        let [too_many, too_much] = [false, true].map(|large| self.fans.claimed(large) >= MAX_CLAIMED);
        for (link, root) in &self.fans.roots {
            if too_many || crowded.contains(root) || held.sources.contains(root) || self.fans.resting.contains_key(link)
            {
                held.sources.push(*link);
            } else if too_much || full.contains(root) {
                held.spooled.push(*link);
            }
        }
        (self.fans.full, self.fans.crowded) = (full, crowded);
    }

    /// Documents of a table on their way, in the lane that has most of them.
    fn outstanding(&self, root: u32) -> usize {
        self.lanes.iter().filter(|lane| lane.source == root).map(|lane| lane.outstanding()).max().unwrap_or_default()
    }

    /// Takes in a claimed row of a link; the ticket that it joins, if its values are looked for with others'.
    pub(super) fn accept_values(&mut self, source: u32, root: u32, texts: &[Key], change: Change) -> Option<Ticket> {
        let mut fan = Fan {
            change,
            link: source,
            root,
            after: None,
            values: VecDeque::new(),
            found: VecDeque::new(),
            bytes: texts.iter().map(|text| text.len()).sum(),
            at_once: MAX_VALUES,
            spools: false,
            fed: 0,
            failures: 0,
        };
        match Content::of(texts.iter().map(|text| text.to_string()).collect()) {
            Content::Found(keys) => {
                fan.found = keys.into();
                fan.fed = LARGE;
            }
            Content::Values { after, values } => {
                if let Some(last) = self.fans.fans.iter_mut().rev().find(|fan| !fan.is_large())
                    && after.is_none()
                    && last.link == source
                    && last.change.id < change.id
                    && last.can_join(values.len())
                {
                    // Small transactions that change neighbours lead to the same documents.
                    last.values.extend(values);
                    last.bytes += fan.bytes;
                    return Some(last.change.ticket);
                }
                fan.spools = after.is_some();
                fan.after = after;
                fan.values = values.into();
            }
        }
        self.fans.fans.push_back(fan);
        None
    }

    /// Adds operations for keys that were found, as long as there is room; true if none is left.
    fn feed(&mut self, fan: &mut Fan) -> bool {
        let mut outstanding = self.outstanding(fan.root);
        while outstanding < fan.limit() {
            let Some(key) = fan.found.pop_front() else { return true };
            let key = Key::from(key);
            let large = fan.is_large();
            let mut operations = 0;
            for lane in self.lanes.iter_mut().filter(|lane| lane.source == fan.root) {
                let waits = if large { lane.change_behind(&key, fan.change) } else { lane.change(&key, fan.change) };
                operations += usize::from(waits);
            }
            if let Some(claimed) = self.claimed.get_mut(&fan.change.ticket) {
                claimed.left += operations;
            }
            fan.fed += 1;
            outstanding += 1;
        }
        fan.found.is_empty()
    }
}

impl Fan {
    fn can_join(&self, values: usize) -> bool {
        self.at_once == MAX_VALUES
            && !self.is_large()
            && self.found.is_empty()
            && self.values.len() + values <= MAX_VALUES
    }

    fn is_large(&self) -> bool {
        self.spools || self.fed >= LARGE
    }

    /// Documents of its table on their way beyond which it adds no more.
    fn limit(&self) -> usize {
        if self.is_large() { MAX_DOCUMENTS } else { MAX_DOCUMENTS * 2 }
    }

    fn is_done(&self) -> bool {
        self.values.is_empty() && self.found.is_empty()
    }
}

impl Worker {
    /// Takes the links in as they are now.
    pub(super) fn take_links(&mut self, links: Vec<Link>) {
        if links == self.links {
            return;
        }
        self.finders.clear();
        self.delivery.fans.roots = links.iter().map(|link| (link.source, link.root.to_u32())).collect();
        self.links = links;
        // Whoever has a row of a link that is gone has nothing left to do for it.
        let fans = std::mem::take(&mut self.delivery.fans.fans);
        for fan in fans {
            if self.delivery.fans.roots.get(&fan.link) == Some(&fan.root) {
                self.delivery.fans.fans.push_back(fan);
            } else {
                self.delivery.finish_ticket(fan.change.ticket);
            }
        }
    }

    /// Finds documents for claimed values and puts them on their way; true if there is more to do at once.
    pub(super) fn fan_out(&mut self, due: &mut Vec<Instant>) -> Result<bool, SqlError> {
        let began = Instant::now();
        self.delivery.fans.resting.retain(|_, until| *until > began);
        self.delivery.fans.fans.make_contiguous().sort_by_key(Fan::is_large);
        let mut waiting = VecDeque::new();
        let mut again = false;
        while let Some(mut fan) = self.delivery.fans.fans.pop_front() {
            if began.elapsed() > TURN {
                self.delivery.fans.fans.push_front(fan);
                again = true;
                break;
            }
            let others = self.delivery.left(fan.change.ticket).saturating_sub(1);
            if fan.spools && others > 0 {
                // It cannot go on before they are done.
                self.delivery.hurry(fan.root, fan.change.id + 1);
            }
            if !self.delivery.feed(&mut fan)
                || self.delivery.outstanding(fan.root) >= fan.limit()
                || (fan.spools && others > 0)
            {
                waiting.push_back(fan);
                continue;
            }
            if fan.is_done() {
                self.delivery.finish_ticket(fan.change.ticket);
                continue;
            }
            if self.delivery.fans.resting.contains_key(&fan.link) {
                waiting.push_back(fan);
                continue;
            }
            match self.find(&mut fan) {
                Ok(Found::Keys) => self.delivery.fans.fans.push_front(fan),
                Ok(Found::Spooled) => self.more = true,
                Err(error) if error.is_in_the_data() && fan.at_once > 1 => {
                    fan.at_once = fan.at_once.min(fan.values.len()).div_ceil(2).max(1);
                    self.delivery.fans.fans.push_front(fan);
                }
                Err(error) if error.is_in_the_data() || (error.is_in_the_statement() && fan.failures >= PATIENCE) => {
                    // What it would have led to is not known: all documents are compared instead.
                    let why = match error.is_in_the_data() {
                        // Its message may quote a value.
                        true => format!("SQLSTATE {}", error.sqlstate()),
                        false => error.message,
                    };
                    pgrx::warning!("could not follow a change of a related row: {why}");
                    self.delivery.repair_instead(fan.change.ticket, fan.root);
                }
                Err(error) => {
                    let attachments = self.attachments.iter().filter(|known| known.relation.to_u32() == fan.root);
                    for attachment in attachments {
                        let cause = format!("could not follow changes of related rows: {error}");
                        set_cause(attachment.id, &cause);
                    }
                    // Once more, and as the catalog is by then: a table on the way may just have been renamed.
                    self.finders.remove(&fan.link);
                    self.delivery.fans.resting.insert(fan.link, Instant::now() + REST);
                    fan.failures += 1;
                    waiting.push_back(fan);
                }
            }
        }
        waiting.append(&mut self.delivery.fans.fans);
        self.delivery.fans.fans = waiting;
        due.extend(self.delivery.fans.resting.values());
        Ok(again)
    }

    /// Finds keys for the next values of a fan.
    fn find(&mut self, fan: &mut Fan) -> Result<Found, SqlError> {
        let Some(link) = self.links.iter().find(|link| link.source == fan.link) else { return Ok(Found::Keys) };
        let finder = match self.finders.entry(fan.link) {
            Entry::Occupied(finder) => finder.into_mut(),
            Entry::Vacant(place) => match transaction::run_waiting_shortly(|| Finder::of(link))? {
                Some(finder) => place.insert(finder),
                None => {
                    // The table is gone, and soon its attachment.
                    fan.values.clear();
                    return Ok(Found::Keys);
                }
            },
        };
        let count = if fan.spools { 1 } else { fan.at_once.min(fan.values.len()) };
        let values: Vec<String> = fan.values.iter().take(count).cloned().collect();
        if !fan.spools {
            let mut found = transaction::run_waiting_shortly(|| finder.find(&values, None, MAX_DOCUMENTS + 1))?;
            if found.len() <= MAX_DOCUMENTS {
                fan.found = std::mem::take(&mut found).into();
                fan.values.drain(..count);
            } else if count > 1 {
                fan.at_once = count.div_ceil(2);
            } else {
                fan.spools = true;
            }
            return Ok(Found::Keys);
        }
        let Some((places, enqueued_at)) = self.delivery.places_of(fan.change.ticket) else { return Ok(Found::Spooled) };
        transaction::run_waiting_shortly(|| {
            let found = finder.find(&values, fan.after.as_deref(), PAGE);
            let mut rest: Vec<String> = fan.values.iter().cloned().collect();
            match found.last().filter(|_| found.len() == PAGE) {
                Some(last) => rest.insert(0, link::after(last)),
                None => drop(rest.remove(0)),
            }
            let rest = (!rest.is_empty()).then_some(rest);
            spool::replace(&places, fan.link, enqueued_at, &found, rest.as_deref());
        })?;
        self.delivery.forget_ticket(fan.change.ticket);
        Ok(Found::Spooled)
    }
}

enum Found {
    /// In memory.
    Keys,
    /// In the queue; the fan is over.
    Spooled,
}
