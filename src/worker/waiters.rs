//! Answers `es_sync.wait()`: a caller goes on when all that was committed before its call is searchable.

use std::time::{Duration, Instant};

use es::{Failure, Output};
use rustc_hash::FxHashSet;

use super::delivery::Delivery;
use super::engine::Engine;
use super::lane::Lane;
use super::process::{RELATIONS_CHANGED, definitions_changed};
use crate::attachment::catalog::Attachment;
use crate::postgres::error::SqlError;
use crate::postgres::process::{is_alive, my_database};
use crate::postgres::transaction;
use crate::queue::{claim, marker};
use crate::shared::{Database, Shared, Waiter};

/// How often the queue is looked at for a waiting caller.
const LOOK_EVERY: Duration = Duration::from_millis(3);

/// Callers whose changes are delivered and whose indexes are being refreshed.
#[derive(Default)]
pub struct Waiters {
    refreshing: Vec<Refreshing>,
    next_look: Option<Instant>,
}

/// What the worker knows when it answers.
pub struct Known<'a> {
    pub attachments: &'a [Attachment],
    /// Attachments whose definitions are still to be looked at: nobody who waits is told that all is well.
    pub doubtful: &'a FxHashSet<i32>,
    /// Changes of the catalog that were announced before it was read.
    pub catalog_changes: u32,
}

struct Refreshing {
    token: u64,
    waiter: &'static Waiter,
    request: u64,
}

impl Waiters {
    /// Looks whether anybody's changes are all delivered; when to look again.
    ///
    /// # Errors
    /// What Postgres said.
    pub fn serve(
        &mut self,
        shared: &'static Shared,
        announced: &Database,
        known: &Known,
        delivery: &mut Delivery,
        engine: &mut Engine,
    ) -> Result<Option<Instant>, SqlError> {
        let now = Instant::now();
        use std::sync::atomic::Ordering::Relaxed;
        let database = my_database();
        let mut waiting = shared
            .waiting(database)
            // One that was terminated has not given its place back.
            .filter(|(waiter, _)| is_alive(waiter.pid.load(Relaxed)))
            .filter(|(waiter, request)| {
                !self.refreshing.iter().any(|r| r.request == *request && std::ptr::eq(r.waiter, *waiter))
            })
            .peekable();
        if waiting.peek().is_none() {
            return Ok(None);
        }
        if let Some(due) = self.next_look.filter(|due| *due > now) {
            return Ok(Some(due));
        }
        let waiting: Vec<_> = waiting.collect();
        // What the caller has altered before he asked must be known first.
        if definitions_changed() {
            return Ok(Some(now));
        }
        if announced.catalog_changes.load(std::sync::atomic::Ordering::Acquire) != known.catalog_changes {
            // What the caller has attached or resumed just before must be known first.
            return Ok(Some(now));
        }
        // Unless the queue is read, one may look as soon as there is an answer.
        let mut every = Duration::ZERO;
        for (waiter, request) in waiting {
            let (source, mark) = (waiter.source.load(Relaxed), waiter.mark.load(Relaxed));
            let is_concerned = |a: &&Attachment| !a.paused && (source == 0 || a.relation.to_u32() == source);
            let mut concerned = known.attachments.iter().filter(is_concerned).peekable();
            // Its first load has not ended, or not all that was committed went through the queue, as far as is known.
            let not_yet = |a: &Attachment| a.live.is_none() || a.stale || known.doubtful.contains(&a.id);
            if concerned.clone().any(not_yet) {
                continue;
            }
            if delivery.awaits(source, mark) {
                continue;
            }
            every = LOOK_EVERY;
            // Without its marker the queue is closed or was lost, and a build that has ended since proves nothing. Where
            // nothing is attached there may be none yet, and nothing to wait for.
            let sources = if source == 0 { Vec::new() } else { delivery.sources_of(source) };
            let waits = !known.attachments.is_empty();
            if waits && !transaction::run(|| marker::is_there() && claim::is_clear(mark, &sources))? {
                continue;
            }
            if RELATIONS_CHANGED.get() {
                // Heard of at the latest with the transaction above: the caller may have attached a partition.
                return Ok(Some(now));
            }
            if concerned.peek().is_none() {
                waiter.answer(request);
                continue;
            }
            let mut indexes: Vec<String> = concerned.clone().filter_map(|known| known.live.clone()).collect();
            // What is searchable now must be so when another index is swapped in, too.
            let next = |lane: &&Lane| lane.is_loaded && concerned.clone().any(|known| known.id == lane.attachment);
            indexes
                .extend(delivery.lanes.iter().filter(|lane| lane.building).filter(next).map(|lane| lane.index.clone()));
            let token = engine.call(move |client| indexes.iter().try_for_each(|index| client.refresh(index)));
            self.refreshing.push(Refreshing { token, waiter, request });
        }
        let due = claim::next_look(now, every);
        self.next_look = Some(due);
        Ok(Some(due.max(now + LOOK_EVERY)))
    }

    /// Takes the answer to a refresh; false if it is not one of ours. A failed one is tried again by `serve`.
    pub fn answered(&mut self, token: u64, result: &Result<Output, Failure>) -> bool {
        let Some(place) = self.refreshing.iter().position(|refreshing| refreshing.token == token) else {
            return false;
        };
        let refreshing = self.refreshing.swap_remove(place);
        match result {
            Ok(_) => refreshing.waiter.answer(refreshing.request),
            Err(_) => self.next_look = Some(Instant::now() + Duration::from_millis(100)),
        }
        true
    }
}
