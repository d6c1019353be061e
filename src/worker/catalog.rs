//! The worker's view of attachments and jobs: read again when something was announced, and every few seconds.

use std::collections::hash_map::Entry;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

use super::database::{REST, Worker};
use super::delivery::Delivery;
use super::process::{ATTACHMENTS_CHANGED, RELATIONS_CHANGED, definitions_changed};
use super::succession;
use crate::attachment::catalog::{self, Attachment};
use crate::attachment::{captures, definition, link, partitions, switched};
use crate::document::read::Reader;
use crate::document::shape::Shape;
use crate::jobs::build::{self, Build};
use crate::jobs::partition::Load;
use crate::jobs::record;
use crate::jobs::step::UnderWay;
use crate::jobs::verify::Verify;
use crate::postgres::error::SqlError;
use crate::postgres::process::my_database;
use crate::postgres::spi;
use crate::postgres::transaction;
use crate::queue::{claim, dead_letter, marker};
use crate::shared::QueueState;

/// How often attachments and jobs are read although nothing was announced (COMMIT PREPARED announces no jobs).
const CATALOG_EVERY: Duration = Duration::from_secs(5);
/// How often definitions are looked at in a row while what they are goes on changing.
const MAX_LOOKS: usize = 3;
/// No count of catalog changes.
pub(super) const NOT_READ: u32 = u32::MAX;

impl Worker {
    /// Reads attachments and jobs when they have changed.
    pub(super) fn read_catalog(&mut self) -> Result<(), SqlError> {
        // Who has committed what is read next has told before what he altered.
        let altered = definitions_changed();
        if RELATIONS_CHANGED.replace(false) || altered {
            // A column was added, a table altered: statements are made anew.
            self.readers.clear();
            self.finders.clear();
            self.triggers_in_doubt = true;
            self.partitions_in_doubt = true;
            self.catalog_due = self.catalog_due.min(Instant::now() + REST);
        }
        if ATTACHMENTS_CHANGED.replace(false) {
            // What was claimed after a COMMIT PREPARED is for its index, too, though nothing else announces that.
            self.catalog_due = Instant::now();
        }
        let in_doubt = self.definitions.are_due(&self.attachments, Instant::now()) && !self.being_restored;
        let waited_for = self.shared.waiting(my_database()).next().is_some();
        if self.partitions_in_doubt && !self.being_restored && (waited_for || Instant::now() >= self.catalog_due) {
            self.notice_partitions()?;
        }
        let changes = self.database.catalog_changes.load(Ordering::Acquire);
        if changes == self.seen_changes
            && Instant::now() < self.catalog_due
            && !in_doubt
            && self.database.lost_notes().is_none()
        {
            return Ok(());
        }
        self.take_catalog()?;
        if self.being_restored {
            // What is created here before the dump creates it makes the restore fail.
            return Ok(());
        }
        for _ in 0..MAX_LOOKS {
            if !self.definitions.are_due(&self.attachments, Instant::now()) {
                break;
            }
            if self.definitions.look(&self.attachments) {
                self.take_catalog()?;
            }
        }
        self.inherit_intake()?;
        self.mend_triggers()
    }

    fn take_catalog(&mut self) -> Result<(), SqlError> {
        let changes = self.database.catalog_changes.load(Ordering::Acquire);
        let lost = self.database.lost_notes();
        let first = !self.catalog_was_read;
        match transaction::run_without_waiting(|| catalog::forget_dropped_tables(None)) {
            // Somebody is just pausing or cancelling what is to go: it goes the next time.
            Err(error) if !error.passes_soon() => return Err(error),
            _ => {}
        }
        let (attachments, links, jobs, parked) = transaction::run(|| {
            captures::listen();
            self.note = succession::note();
            let closed =
                self.is_closed() || self.database.queue_state() != QueueState::Open || self.note.queue_closed.is_some();
            self.being_restored = !closed && succession::is_being_restored(&self.note);
            let repairs = self.note.standing_off.is_none() && !closed && !self.being_restored;
            if repairs && (lost.is_some() || !marker::is_there()) {
                let why = if lost.is_some() { "a change could not be noted" } else { "the queue was lost" };
                succession::repair_everything(why);
            }
            let rows = spi::run("select i.token::text from es_sync.installation i", &[]);
            self.owner = rows.first(1).unwrap_or_default();
            if first {
                self.shared.raise_queue_ids(claim::highest_id());
            }
            let parked = if first { dead_letter::all() } else { Vec::new() };
            (catalog::all(), link::links(), record::open_jobs(), parked)
        })?;
        if let Some(lost) = lost {
            self.database.note_repaired(lost);
        }
        if first {
            self.delivery = Delivery::new(parked);
            self.catalog_was_read = true;
        }
        self.seen_changes = changes;
        self.catalog_due = Instant::now() + CATALOG_EVERY;
        self.take_attachments(attachments);
        self.take_links(links);
        self.take_jobs(jobs);
        self.open_lanes();
        Ok(())
    }

    /// True if attachments and jobs were read since everything was forgotten.
    pub(super) fn has_read_catalog(&self) -> bool {
        self.seen_changes != NOT_READ
    }

    /// Sees to partitions that came or went since they were written down. What meets a row of an index that somebody is
    /// just pausing, or of a job that he cancels, is seen to later.
    fn notice_partitions(&mut self) -> Result<(), SqlError> {
        let differences = transaction::run(partitions::differences)?;
        self.partitions_in_doubt = false;
        for difference in differences {
            // Where somebody alters it just now: its load finds out.
            let filled = transaction::run_waiting_shortly(|| difference.is_filled()).unwrap_or(true);
            match transaction::run_without_waiting(|| difference.take(filled)) {
                Ok(()) => self.catalog_due = Instant::now(),
                Err(error) => {
                    self.partitions_in_doubt = true;
                    if !error.passes_soon() {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives partitions that came since they were last looked at their TRUNCATE triggers, and lets triggers that were
    /// switched off fire again.
    fn mend_triggers(&mut self) -> Result<(), SqlError> {
        if !self.triggers_in_doubt {
            return Ok(());
        }
        let mut in_doubt = false;
        for partition in transaction::run(partitions::unwatched)? {
            let what = format!("watch partition {}", partition.name);
            if when_quiet(&mut in_doubt, &what, || partitions::watch(&partition)) == Some(true) {
                self.catalog_due = Instant::now();
            }
        }
        for (table, name) in transaction::run(definition::without_trigger)? {
            let what = format!("give {name} its trigger back");
            if when_quiet(&mut in_doubt, &what, || definition::give_trigger_back(table, &name)).is_some() {
                pgrx::warning!("table {name} had lost its trigger: it has it again, and is compared with its indexes");
                self.catalog_due = Instant::now();
            }
        }
        for stray in transaction::run(partitions::strays)? {
            let what = format!("drop a trigger of {}", stray.name);
            when_quiet(&mut in_doubt, &what, || partitions::unwatch(&stray));
        }
        for trigger in transaction::run(switched::off)? {
            let name = &trigger.table_name;
            let what = format!("switch a trigger of {name} on");
            if when_quiet(&mut in_doubt, &what, || switched::mend(&trigger)).is_some() {
                pgrx::warning!(
                    "triggers of {name} were switched off: they fire again, and the table is compared with its indexes"
                );
                self.catalog_due = Instant::now();
            }
        }
        self.triggers_in_doubt = in_doubt;
        Ok(())
    }

    fn take_attachments(&mut self, attachments: Vec<Attachment>) {
        // While what they need is still known: a half-built index must not stay behind.
        let mut jobs = std::mem::take(&mut self.jobs);
        for build in jobs.builds.iter_mut().filter(|build| !attachments.iter().any(|new| new.id == build.attachment)) {
            self.with_context(build.attachment, false, |context| build.abandon(context));
        }
        self.jobs = jobs;
        let old = std::mem::replace(&mut self.attachments, attachments);
        for gone in old.iter().filter(|old| !self.attachments.iter().any(|new| new.id == old.id)) {
            let lanes: Vec<u32> =
                self.delivery.lanes.iter().filter(|l| l.attachment == gone.id).map(|l| l.id).collect();
            lanes.into_iter().for_each(|lane| self.delivery.close_lane(lane));
            self.jobs.retain(|job| job.attachment() != gone.id);
        }
        for attachment in &self.attachments {
            if old.iter().find(|old| old.id == attachment.id) != Some(attachment) {
                self.readers.remove(&attachment.id);
            }
            self.shared.take_index(my_database(), attachment.id);
        }
        self.delivery.take_moves(&self.attachments);
        self.delivery.apply_pauses(&self.attachments);
        self.delivery.apply_delays(&self.attachments);
        let known: Vec<i32> = self.attachments.iter().map(|attachment| attachment.id).collect();
        self.shared.free_indexes(my_database().to_u32(), |id| known.contains(&id));
    }

    /// Opens the lanes of live indexes that have none: a change without a lane would be let go. So it shall be where a
    /// build has left its live index behind.
    fn open_lanes(&mut self) {
        let unread = |known: &&Attachment| {
            known.options.load == Some(false)
                && known.live.is_none()
                && self.jobs.builds.iter().any(|build| build.attachment == known.id && !build.is_over())
        };
        let unread = self.attachments.iter().filter(unread).map(|known| (known.id, known.relation.to_u32())).collect();
        self.delivery.apply_unread(unread);
        for attachment in &self.attachments {
            let is_left =
                self.jobs.builds.iter().any(|build| build.attachment == attachment.id && build.has_left_live());
            if let Some(live) = &attachment.live
                && !is_left
                && !self.delivery.is_left_out(attachment)
                && !self.delivery.lanes.iter().any(|lane| lane.attachment == attachment.id && lane.index == *live)
            {
                let target = build::target(attachment, live, self.generation);
                self.delivery.open_lane(attachment, live.clone(), false, target);
            }
        }
    }

    fn take_jobs(&mut self, rows: Vec<record::Job>) {
        let mut jobs = std::mem::take(&mut self.jobs);
        for build in jobs.builds.iter_mut().filter(|build| !build.is_over()) {
            match rows.iter().find(|row| row.id == build.job) {
                // Cancelled too late: what is behind the alias must be written down.
                None if build.is_swapping() => {}
                // Cancelled, or its attachment is gone.
                None => drop(self.with_context(build.attachment, false, |context| build.abandon(context))),
                // Sent back to its beginning, see `record::restart`.
                Some(row) if row.state == "queued" && build.has_begun() => {
                    self.with_context(build.attachment, false, |context| build.restart(context));
                }
                Some(row) => build.take(row),
            }
        }
        // A build whose table cannot be read now is abandoned the next time: its lane must not stay behind.
        let is_open = |job: i64| rows.iter().any(|row| row.id == job);
        jobs.builds.retain(|build| !build.is_over() || is_open(build.job));
        jobs.verifies.retain(|verify| is_open(verify.job));
        jobs.loads.retain(|load| is_open(load.job));
        jobs.queued_drops.retain(|(job, _)| is_open(*job));
        for row in rows {
            match (row.kind.as_str(), row.attachment) {
                ("drop", _) => {
                    let under_way = jobs.drops.iter().any(|(_, job)| *job == row.id)
                        || jobs.queued_drops.iter().any(|(job, _)| *job == row.id);
                    if let (false, Some(target)) = (under_way, row.target) {
                        jobs.queued_drops.push((row.id, target));
                    }
                }
                ("verify", Some(attachment)) => match jobs.verifies.iter_mut().find(|known| known.job == row.id) {
                    Some(verify) => verify.take(&row),
                    None => jobs.verifies.push(Verify::new(&row, attachment)),
                },
                ("partition", Some(attachment)) => match jobs.loads.iter_mut().find(|known| known.job == row.id) {
                    Some(load) => load.take(&row),
                    None => jobs.loads.extend(Load::new(&row, attachment)),
                },
                ("load" | "reindex", Some(attachment)) if !jobs.builds.iter().any(|build| build.job == row.id) => {
                    let mut build = Build::new(&row, attachment);
                    // Before anything is claimed: what is claimed now must reach the index that is being built.
                    if let Some(known) = self.attachments.iter().find(|known| known.id == attachment) {
                        build.open_lane(&mut self.delivery, known, self.generation);
                    }
                    jobs.builds.push(build);
                }
                _ => {}
            }
        }
        self.jobs = jobs;
    }
}

/// The attachment's reader, made if there is none; None where the table cannot be read now.
pub(super) fn reader_of<'a>(
    readers: &'a mut FxHashMap<i32, Reader>,
    attachment: &Attachment,
) -> Option<&'a mut Reader> {
    match readers.entry(attachment.id) {
        Entry::Occupied(reader) => Some(reader.into_mut()),
        Entry::Vacant(place) => {
            // An excluded column must not be taken for another one because it was renamed a moment ago.
            let shape = || if definition::names_hold(attachment) { Shape::of(attachment) } else { None };
            let shape = transaction::run_without_waiting(shape).ok().flatten()?;
            Some(place.insert(Reader::new(shape)))
        }
    }
}

/// Does something to a table. None where somebody uses it just now, or it is gone: it is looked at again when the catalog
/// is.
fn when_quiet<T>(in_doubt: &mut bool, what: &str, work: impl FnOnce() -> T) -> Option<T> {
    let done = transaction::run_waiting_shortly(work);
    if let Err(error) = &done {
        pgrx::debug1!("could not {what} yet: {error}");
        *in_doubt = true;
    }
    done.ok()
}
