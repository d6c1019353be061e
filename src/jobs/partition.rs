//! Bringing the rows of a partition that came into the live index: what capture would have noted of each goes into the
//! queue, and takes every change's way. So writes meanwhile make no difference, and a build that runs gets them too.
//!
//! The partition is read block by block: it may have no key, where documents only show its rows. An UPDATE that capture
//! skips, for it changes nothing that documents show, may move a row into a block that was read already. So at the end
//! all rows that were written since the beginning are read once more, in one snapshot.

use std::time::Instant;

use es::{Failure, Output};
use pgrx::{PgSqlErrorCode, pg_sys};

use super::step::{Context, Step, UnderWay};
use super::{ask, record};
use crate::attachment::{key, link, state};
use crate::capture::{self, Changes};
use crate::postgres::error::{Report, SqlError};
use crate::postgres::relation;
use crate::postgres::rights;
use crate::postgres::spi::{self, Plan, quoted};
use crate::postgres::transaction;
use crate::queue::insert;
use crate::queue::table::Queue;

/// Blocks read at once: some 10,000 rows, which are delivered before the next ones are read. So the queue stays small.
const PAGE_BLOCKS: i64 = 64;
/// What is held in memory of them.
const ROWS_AT_ONCE: i64 = 10_000;

/// A partition's rows on their way into an index.
pub struct Load {
    pub job: i64,
    pub attachment: i32,
    part: pg_sys::Oid,
    phase: Phase,
    place: Place,
    done: i64,
    begun: bool,
    /// All has been read.
    exhausted: bool,
    failures: u32,
}

/// How far a load is: in its job's row, three words.
#[derive(Clone, Default)]
struct Place {
    /// The next block.
    block: i64,
    /// The oldest transaction that ran when the load began, as xid; none before that.
    since: String,
    /// The partition's file: another one has its rows elsewhere.
    file: i64,
}

impl Place {
    fn of(position: &str) -> Option<Self> {
        let mut words = position.split(' ');
        let (block, since, file) = (words.next()?, words.next()?, words.next()?);
        Some(Self { block: block.parse().ok()?, since: since.to_owned(), file: file.parse().ok()? })
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.block, self.since, self.file)
    }
}

/// What came of reading a page.
struct Read {
    next: Place,
    rows: i64,
    /// There is nothing more to read.
    last: bool,
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
            place: job.position.as_deref().and_then(Place::of).unwrap_or_default(),
            done: job.done,
            begun: false,
            exhausted: false,
            failures: 0,
        })
    }

    /// Takes in that somebody wants it to begin again.
    pub fn take(&mut self, job: &record::Job) {
        if job.state == "queued"
            && let Some(load) = Self::new(job, self.attachment)
        {
            *self = load;
        }
    }
}

impl UnderWay for Load {
    fn job(&self) -> i64 {
        self.job
    }

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
        if self.exhausted {
            let (job, attachment, done) = (self.job, self.attachment, self.done);
            transaction::run_without_waiting(|| {
                if record::finish_running(job, done) {
                    state::settle_partitions(attachment);
                }
            })?;
            self.phase = Phase::Over;
            return Ok(Step::Over);
        }
        match transaction::run_without_waiting(|| self.page()) {
            Ok(read) => {
                (self.place, self.exhausted) = (read.next, read.last);
                self.done += read.rows;
                self.begun = true;
                self.failures = 0;
                context.delivery.enqueued |= read.rows > 0;
                self.phase = Phase::Drain { mark: context.shared.queue_mark(), due: now };
                Ok(Step::Again)
            }
            Err(error) if error.sqlstate == PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE => {
                // Its policies hold for its owner, too; read as a part of the whole it has none. So all is compared.
                let why = format!("a partition could not be read by itself: {}", error.message);
                let (job, attachment, done) = (self.job, self.attachment, self.done);
                transaction::run_without_waiting(|| {
                    record::finish(job, "done", done, Some(&why));
                    ask::for_repair(attachment, &why);
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
        _result: &Result<Output, Failure>,
        _context: &mut Context,
    ) -> Result<bool, SqlError> {
        Ok(false)
    }
}

impl Load {
    /// Enqueues what the next blocks hold, and writes down that it did, in one transaction. At the end, or where it is no
    /// partition any more, nothing: whoever took it away sees to its documents.
    fn page(&self) -> Read {
        let table = spi::run(
            "select c.relowner, pg_catalog.format('%I.%I', n.nspname, c.relname), c.reltuples::int8,
                    pg_catalog.pg_relation_filenode(c.oid)::int8,
                    pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::pg_catalog.xid::text
             from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
             where c.oid = $1 and c.relkind = 'r'",
            &[spi::parameter(self.part)],
        );
        let mut place = self.place.clone();
        if !self.begun {
            let rows = table.first::<i64>(3).filter(|rows| *rows >= 0);
            let former = (!place.since.is_empty()).then(|| place.to_string());
            if !record::resume(self.job, None, rows, former.as_deref(), self.done, None) {
                // Another begins at its beginning.
                return Read { next: place, rows: 0, last: true };
            }
        }
        let notes = link::notes_of_partition(self.attachment, self.part);
        if table.is_empty() || notes.is_empty() {
            return Read { next: place, rows: 0, last: true };
        }
        let owner = table.get::<pg_sys::Oid>(0, 1).unwrap_or(pg_sys::InvalidOid);
        let name = table.get::<String>(0, 2).unwrap_or_default();
        let file = table.get::<i64>(0, 4).unwrap_or_default();
        if place.since.is_empty() {
            place.since = table.get(0, 5).unwrap_or_default();
        }
        if place.file != file {
            (place.block, place.file) = (0, file);
        }
        let last = place.block >= blocks(self.part);
        let condition = if last {
            format!("pg_catalog.age(xmin) operator(pg_catalog.<=) pg_catalog.age('{}'::pg_catalog.xid)", place.since)
        } else {
            let next = place.block + PAGE_BLOCKS;
            let condition = format!(
                "ctid operator(pg_catalog.>=) '({},0)' and ctid operator(pg_catalog.<) '({next},0)'",
                place.block
            );
            place.block = next;
            condition
        };
        let rows = self.enqueue(&notes, owner, &name, &condition);
        record::progress(self.job, "rows", Some(&place.to_string()), self.done + rows);
        record::trouble(self.job, None);
        Read { next: place, rows, last }
    }

    /// Enqueues what capture would have noted of the rows that `condition` chooses; how many there are.
    fn enqueue(&self, notes: &[link::Note], owner: pg_sys::Oid, name: &str, condition: &str) -> i64 {
        let columns = relation::columns(self.part);
        let mut most = 0;
        for note in notes {
            let found: Option<Vec<_>> =
                note.columns.iter().map(|name| columns.iter().find(|column| &column.name == name)).collect();
            let Some(found) = found else {
                // Renamed just now: what is noted will be known anew in a moment.
                Report::new(
                    PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                    format!("partition {name} has lost one of its columns {}", note.columns.join(", ")),
                )
                .raise()
            };
            let types: Vec<pg_sys::Oid> = found.iter().map(|column| column.type_oid).collect();
            let makers: Vec<key::Column> = types.iter().copied().map(key::Column::new).collect();
            let select: Vec<String> = note.columns.iter().map(|name| quoted(name)).collect();
            let statement = format!("select {} from only {name} where {condition}", select.join(", "));
            // As its own owner: rights on the partitioned table give none on the partition.
            let plan = rights::as_owner(owner, || Plan::prepare(&statement, &[]));
            let cursor = rights::as_owner(owner, || plan.open(&[]));
            let mut count = 0;
            loop {
                let rows = rights::as_owner(owner, || cursor.fetch(ROWS_AT_ONCE).typed(&types));
                let fetched = rows.len() as i64;
                let mut changes = Changes::default();
                for row in 0..rows.len() {
                    match values(&rows, row, &makers, capture::LONGEST) {
                        Some(values) => changes.texts.extend(note.text(&values).map(String::into_boxed_str)),
                        None => changes.unnoted = true,
                    }
                }
                rows.free();
                if changes != Changes::default() {
                    insert::write(Queue::Changes, vec![(note.source, changes)], &[]);
                }
                count += fetched;
                if fetched < ROWS_AT_ONCE {
                    break;
                }
            }
            cursor.close();
            most = most.max(count);
        }
        most
    }
}

fn blocks(table: pg_sys::Oid) -> i64 {
    let rows = spi::run(
        "select pg_catalog.pg_relation_size($1) / pg_catalog.current_setting('block_size')::pg_catalog.int8",
        &[spi::parameter(table)],
    );
    rows.get(0, 1).unwrap_or(0)
}

/// The values of a row; None where one has more than `limit` bytes.
fn values(rows: &spi::Rows, row: usize, makers: &[key::Column], limit: usize) -> Option<Vec<Option<String>>> {
    let value = |(place, maker): (usize, &key::Column)| {
        let Some(datum) = rows.datum(row, place + 1) else { return Some(None) };
        let mut text = String::new();
        // SAFETY: the statement returns the columns that the makers were made for, in this order.
        unsafe { maker.text_within(limit, datum, &mut text) }.then_some(Some(text))
    };
    makers.iter().enumerate().map(value).collect()
}
