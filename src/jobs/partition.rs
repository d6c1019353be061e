//! Bringing the rows of a partition that came into the live index: what capture would have noted of each goes into the
//! queue, and takes every change's way. So writes meanwhile make no difference, and a build that runs gets them too.
//!
//! The partition is read block by block: it may have no key, where documents only show its rows. A row that an UPDATE
//! moves into a block that was read already is captured.

use std::time::Instant;

use es::Failure;
use pgrx::pg_sys;
use rustc_hash::FxHashSet;
use serde_json::Value;

use super::record;
use super::step::{Context, Step, UnderWay};
use crate::attachment::{catalog, follow, key};
use crate::capture::Changes;
use crate::postgres::error::SqlError;
use crate::postgres::spi::{self, quoted};
use crate::postgres::transaction;
use crate::queue::insert::{self, Queue};

/// Blocks read at once: some 10,000 rows, which are delivered before the next ones are read. So the queue stays small.
const PAGE_BLOCKS: i64 = 64;

/// A partition's rows on their way into an index.
pub struct Load {
    pub job: i64,
    pub attachment: i32,
    part: pg_sys::Oid,
    phase: Phase,
    /// The next block.
    block: i64,
    done: i64,
    begun: bool,
    failures: u32,
}

enum Phase {
    Page,
    /// Waits until everything below the mark has been delivered.
    Drain {
        mark: i64,
        due: Instant,
    },
    Pause(Instant),
    Over,
}

impl Load {
    /// None for a job that is no partition's.
    pub fn new(job: &record::Job, attachment: i32) -> Option<Self> {
        Some(Self {
            job: job.id,
            attachment,
            part: job.part?,
            phase: Phase::Page,
            block: job.position.as_ref().and_then(|block| block.parse().ok()).unwrap_or(0),
            done: job.done,
            begun: false,
            failures: 0,
        })
    }

    /// Takes in that somebody wants it to begin again.
    pub fn take(&mut self, job: &record::Job) {
        if job.state == "queued"
            && self.begun
            && let Some(load) = Self::new(job, self.attachment)
        {
            *self = load;
        }
    }
}

impl UnderWay for Load {
    fn attachment(&self) -> i32 {
        self.attachment
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    fn step(&mut self, context: &mut Context, now: Instant) -> Result<Step, SqlError> {
        match self.phase {
            Phase::Pause(until) if until > now => return Ok(Step::Wait(Some(until))),
            Phase::Drain { due, .. } if due > now => return Ok(Step::Wait(Some(due))),
            Phase::Drain { mark, .. } => {
                if let Some(due) = context.look(mark, now)? {
                    self.phase = Phase::Drain { mark, due };
                    return Ok(Step::Wait(Some(due)));
                }
                self.phase = Phase::Page;
            }
            Phase::Over => return Ok(Step::Over),
            Phase::Page | Phase::Pause(_) => {}
        }
        if context.held {
            return Ok(Step::Wait(None));
        }
        match transaction::run_without_waiting(|| self.page()) {
            Ok(Some(rows)) => {
                self.block += PAGE_BLOCKS;
                self.done += rows;
                self.begun = true;
                self.failures = 0;
                context.delivery.enqueued = true;
                self.phase = Phase::Drain { mark: context.shared.queue_mark(), due: now };
                Ok(Step::Again)
            }
            Ok(None) => {
                let (job, attachment, done) = (self.job, self.attachment, self.done);
                transaction::run_without_waiting(|| {
                    if record::finish_running(job, done) {
                        record::settle_partitions(attachment);
                    }
                })?;
                self.phase = Phase::Over;
                Ok(Step::Over)
            }
            Err(error) => {
                let why = format!("could not read the partition: {}", error.message);
                self.phase = Phase::Pause(context.pause(self.job, &mut self.failures, &why, now)?);
                Ok(Step::Again)
            }
        }
    }

    fn answered(
        &mut self,
        _token: u64,
        _result: &Result<Value, Failure>,
        _context: &mut Context,
    ) -> Result<bool, SqlError> {
        Ok(false)
    }
}

impl Load {
    /// Enqueues what the next blocks hold, and writes down that it did, in one transaction; how many rows. None at the
    /// end, or where it is no partition any more: whoever took it away sees to its documents.
    fn page(&self) -> Option<i64> {
        let table = spi::run(
            "select c.relowner, pg_catalog.format('%I.%I', n.nspname, c.relname), c.reltuples::int8
             from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
             where c.oid = $1 and c.relkind = 'r'",
            &[(pg_sys::OIDOID, spi::value(self.part))],
        );
        if !self.begun {
            let rows = (!table.is_empty()).then(|| table.get::<i64>(0, 3)).flatten();
            record::begin(self.job, None, rows.filter(|rows| *rows >= 0));
        }
        if table.is_empty() {
            return None;
        }
        let (owner, name) = (table.get::<pg_sys::Oid>(0, 1)?, table.get::<String>(0, 2)?);
        let notes = follow::notes_of_partition(self.attachment, self.part);
        if notes.is_empty() || self.block >= blocks(self.part) {
            return None;
        }
        let columns = catalog::columns(self.part);
        let mut rows_read = 0;
        let mut changes = Vec::new();
        for note in notes {
            let found: Option<Vec<_>> =
                note.columns.iter().map(|name| columns.iter().find(|column| &column.name == name)).collect();
            // A column that was renamed: nothing can be noted until the table is attached anew.
            let Some(found) = found else { continue };
            let makers: Vec<key::Column> = found.iter().map(|column| key::Column::new(column.type_oid)).collect();
            let select: Vec<String> = note.columns.iter().map(|name| quoted(name)).collect();
            let statement = format!(
                "select {} from {name} where ctid >= '({},0)' and ctid < '({},0)'",
                select.join(", "),
                self.block,
                self.block + PAGE_BLOCKS
            );
            // As its own owner: rights on the partitioned table give none on the partition.
            let texts: FxHashSet<Box<str>> = transaction::as_owner(owner, || {
                let rows = spi::run(&statement, &[]);
                rows_read = rows.len() as i64;
                let texts = (0..rows.len()).filter_map(|row| note.text(&values(&rows, row, &makers)));
                texts.map(String::into_boxed_str).collect()
            });
            if !texts.is_empty() {
                changes.push((note.source, Changes { texts, ..Changes::default() }));
            }
        }
        insert::write(Queue::Changes, changes, &[]);
        let position = (self.block + PAGE_BLOCKS).to_string();
        record::progress(self.job, "rows", Some(&position), self.done + rows_read);
        record::trouble(self.job, None);
        Some(rows_read)
    }
}

fn blocks(table: pg_sys::Oid) -> i64 {
    let rows = spi::run(
        "select pg_catalog.pg_relation_size($1) / pg_catalog.current_setting('block_size')::pg_catalog.int8",
        &[(pg_sys::OIDOID, spi::value(table))],
    );
    rows.get(0, 1).unwrap_or(0)
}

fn values(rows: &spi::Rows, row: usize, makers: &[key::Column]) -> Vec<Option<String>> {
    let value = |(place, maker): (usize, &key::Column)| {
        rows.datum(row, place + 1).map(|datum| {
            let mut text = String::new();
            // SAFETY: the statement returns the columns that the makers were made for, in this order.
            unsafe { maker.text(datum, &mut text) };
            text
        })
    };
    makers.iter().enumerate().map(value).collect()
}
