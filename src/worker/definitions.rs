//! DDL on what documents are made of: noticed here, and acted upon before the next document is read.

use std::time::Instant;

use rustc_hash::{FxHashMap, FxHashSet};

use super::answers::set_cause;
use super::database::REST;
use super::process::{TRACKED, Thing, take_changed};
use crate::attachment::catalog::Attachment;
use crate::attachment::definition::{self, Difference};
use crate::attachment::{attach, check, follow, pin, state, triggers};
use crate::jobs::{ask, record};
use crate::postgres::error::SqlError;
use crate::postgres::relation;
use crate::postgres::transaction;

/// What the worker knows of definitions, by attachment.
#[derive(Default)]
pub(super) struct Definitions {
    /// What the documents depend on, where that was looked at.
    tracked: FxHashMap<i32, FxHashSet<Thing>>,
    /// To be looked at, or not to be looked at or acted upon for the moment.
    pub(super) doubtful: FxHashSet<i32>,
    /// Those where that was an error, which the status shows.
    failed: FxHashSet<i32>,
    /// When the doubtful ones are looked at.
    pub(super) due: Option<Instant>,
}

/// What came of looking at an attachment's definitions.
enum Looked {
    /// They are known; true where something was written down that is to be read again.
    Known(bool),
    /// Something was written down that has to be read before the rest can be looked at.
    Again,
    /// Somebody holds a lock that is needed.
    Later,
}

impl Definitions {
    /// Notes whose may have changed since the last look; true if anybody's are to be looked at now.
    pub(super) fn are_due(&mut self, attachments: &[Attachment], now: Instant) -> bool {
        let changed = take_changed();
        for attachment in attachments {
            let doubtful = match self.tracked.get(&attachment.id) {
                None => true,
                Some(tracked) => {
                    changed.anything
                        || !tracked.is_disjoint(&changed.tracked)
                        // A function that was missing may be there.
                        || (changed.functions && attachment.stale)
                }
            };
            if doubtful && self.doubtful.insert(attachment.id) {
                self.due = Some(now);
            }
        }
        self.due.is_some_and(|due| due <= now)
    }

    /// Looks at those that are in doubt; true if something was written down that is to be read again.
    pub(super) fn look(&mut self, attachments: &[Attachment]) -> bool {
        self.due = None;
        let mut written = false;
        for id in std::mem::take(&mut self.doubtful) {
            let Some(attachment) = attachments.iter().find(|known| known.id == id) else { continue };
            // Before, so that what is altered from now on is heard of; after, for there may be more to hear of.
            let looked = self
                .track(attachment)
                .and_then(|_| look(attachment))
                .and_then(|looked| self.track(attachment).map(|more| (looked, more)));
            match looked {
                Ok((Looked::Known(news), more)) => {
                    written |= news;
                    if self.failed.remove(&id) {
                        set_cause(id, "");
                        written = true;
                    }
                    // What was seen for the first time may have been altered before it was listened for.
                    if more {
                        self.doubt(id, Instant::now());
                    }
                }
                Ok((Looked::Again, _)) => {
                    written = true;
                    self.doubt(id, Instant::now());
                }
                Ok((Looked::Later, _)) => self.doubt(id, Instant::now() + REST),
                // An index that somebody is just pausing, for instance.
                Err(error) if error.passes_soon() => self.doubt(id, Instant::now() + REST),
                Err(error) => {
                    set_cause(id, &format!("could not look at the definitions of what its documents show: {error}"));
                    self.failed.insert(id);
                    self.doubt(id, Instant::now() + REST);
                }
            }
        }
        let known: FxHashSet<i32> = attachments.iter().map(|attachment| attachment.id).collect();
        self.tracked.retain(|id, _| known.contains(id));
        TRACKED.with_borrow_mut(|tracked| {
            tracked.clear();
            tracked.extend(self.tracked.values().flatten());
        });
        written
    }

    /// Has an attachment's definitions looked at, no later than `due`: another one's may be due sooner.
    fn doubt(&mut self, attachment: i32, due: Instant) {
        self.doubtful.insert(attachment);
        self.due = Some(self.due.map_or(due, |known| known.min(due)));
    }

    /// Lets changes of what an attachment depends on be heard of; true if of more than before.
    fn track(&mut self, attachment: &Attachment) -> Result<bool, SqlError> {
        let mut things: FxHashSet<Thing> = transaction::run_without_waiting(|| {
            let thing = |(kind, oid): (&str, u32)| match kind {
                "view" | "table" | "branch" | "child" | "type" => Some(Thing::Relation(oid)),
                "function" => Some(Thing::function(oid)),
                "schema" => Some(Thing::schema(oid)),
                _ => None,
            };
            definition::seen(attachment.id).iter().flat_map(|facts| facts.objects()).filter_map(thing).collect()
        })?;
        let own = [Some(attachment.relation), attachment.document];
        things.extend(own.into_iter().flatten().map(|relation| Thing::Relation(relation.to_u32())));
        TRACKED.with_borrow_mut(|tracked| tracked.extend(&things));
        let before = self.tracked.insert(attachment.id, things);
        let now = &self.tracked[&attachment.id];
        Ok(before.is_none_or(|before| !now.is_subset(&before)))
    }
}

fn look(attachment: &Attachment) -> Result<Looked, SqlError> {
    let id = attachment.id;
    if transaction::run_without_waiting(|| definition::view_is_gone(attachment))? {
        return let_go(attachment);
    }
    if transaction::run_without_waiting(|| definition::rename(attachment))? {
        return Ok(Looked::Again);
    }
    // Whoever alters a table is not waited for: the worker comes back.
    let called = transaction::run_waiting_shortly(|| definition::called(attachment));
    let called = match called {
        Ok(called) => called,
        Err(error) if error.passes_soon() => return Ok(Looked::Later),
        Err(error) => {
            // What it depends on is not known then; looked at once it is mended.
            let obstacle = format!("its filter cannot be evaluated: {}", error.message);
            return Ok(Looked::Known(transaction::run_without_waiting(|| {
                definition::set_obstacle(id, Some(&obstacle))
            })?));
        }
    };
    let (old, new, obstacle, obstructed, misled) = transaction::run_without_waiting(|| {
        let new = definition::gather(attachment, &called);
        let misled = state::is_not_taken_in(id, follow::MISLED);
        (definition::seen(id), new, definition::obstacle(attachment), definition::is_obstructed(id), misled)
    })?;
    let Difference { causes, ways, names, order } = old.as_ref().map(|old| old.compare(&new)).unwrap_or_default();
    let cause = causes.join("; ");
    let mut obstacle = obstacle;
    // What kept the ways from being found before may be over; names that changed meanwhile are known already.
    let differs = ways || names;
    let (ways, names) = ((ways || obstructed) && obstacle.is_none(), names || obstructed);
    if ways {
        match renew_ways(attachment, names, !cause.is_empty()) {
            Ok(()) => {}
            Err(error) if error.passes_soon() => {
                // Only the ways are missing: what is known to be wrong by then is shown.
                let misled = misled || (cause.is_empty() && is_misled(attachment, names)?);
                let cause = if misled { follow::MISLED } else { &cause };
                if !cause.is_empty() {
                    transaction::run_without_waiting(|| state::mark_not_taken_in(id, cause))?;
                }
                return Ok(Looked::Later);
            }
            Err(error) => obstacle = Some(format!("its related tables cannot be followed: {}", error.message)),
        }
    }
    if misled {
        // Who skipped an UPDATE because he took one column for another has ended then: what is asked for below reads it.
        match transaction::run_waiting_shortly(|| triggers::lock(&check::table_of(attachment), "share row exclusive")) {
            Err(error) if error.passes_soon() => return Ok(Looked::Later),
            locked => locked?,
        }
    }
    let written = transaction::run_without_waiting(|| {
        if !misled && state::is_not_taken_in(id, follow::MISLED) {
            // Since it was asked above.
            return None;
        }
        if old.as_ref() != Some(&new) {
            definition::remember(id, &new);
        }
        if let Some(view) = attachment.document {
            pin::hold(attachment.relation, view);
        }
        let news = definition::set_obstacle(id, obstacle.as_deref());
        // All is as it was before it could be taken in: nobody has mended what was missed meanwhile.
        let missed = obstacle.is_none() && state::is_not_taken_in(id, "");
        if obstacle.is_some() && differs {
            // All may be as it was once the obstacle is gone, and tells of nothing then.
            state::mark_not_taken_in(id, follow::MISLED);
        }
        if !cause.is_empty() {
            definition::rebuild(id, &cause);
        } else if missed {
            record::restart(Some(id));
            state::mark_taken_in(id);
            ask::for_repair(id, "its definitions were others for a while");
        } else if order {
            // Who pages through the rows has passed over some. He may also have ended by now.
            record::restart(Some(id));
            ask::for_repair(id, "the collation of its key was altered");
        }
        Some(news || missed || order || !cause.is_empty())
    })?;
    let Some(written) = written else { return Ok(Looked::Again) };
    if !cause.is_empty() {
        pgrx::log!("index \"{}\" is built anew: {cause}", attachment.index);
    }
    if let Some(obstacle) = obstacle.filter(|_| written) {
        pgrx::warning!("index \"{}\" cannot be kept right: {obstacle}", attachment.index);
    }
    Ok(Looked::Known(written || ways))
}

/// `renamed`: tables have other names. `rebuilt`: the index is built anew after this.
fn renew_ways(attachment: &Attachment, renamed: bool, rebuilt: bool) -> Result<(), SqlError> {
    transaction::run_waiting_shortly(|| {
        let owner = relation::owner(attachment.relation);
        if owner == pgrx::pg_sys::InvalidOid {
            return;
        }
        let table = check::table_of(attachment);
        if let Err(report) = follow::renew_where_changed(&table, attachment, owner, renamed, rebuilt) {
            report.raise();
        }
    })
}

/// True if changes are missed until the ways are found anew; false as well where that cannot be told now.
fn is_misled(attachment: &Attachment, renamed: bool) -> Result<bool, SqlError> {
    let told = transaction::run_without_waiting(|| {
        follow::is_misled(&check::table_of(attachment), attachment, renamed).unwrap_or_else(|report| report.raise())
    });
    match told {
        Err(error) if error.passes_soon() => Ok(false),
        told => told,
    }
}

/// The view was dropped with CASCADE: there is nothing to make documents of any more.
fn let_go(attachment: &Attachment) -> Result<Looked, SqlError> {
    let gone = transaction::run_waiting_shortly(|| {
        attach::let_go(&check::table_of(attachment), std::slice::from_ref(attachment), false);
    });
    match gone {
        Ok(()) => {
            pgrx::warning!(
                "index \"{}\" is detached, and stays as it is: the view that its documents were read from was dropped",
                attachment.index
            );
            Ok(Looked::Known(true))
        }
        Err(error) if error.passes_soon() => Ok(Looked::Later),
        Err(error) => Err(error),
    }
}
