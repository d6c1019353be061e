//! Partitions that come and go while their table is attached or followed.
//!
//! Postgres gives one that comes the row trigger, so its changes are noted at once. What it brings along, and what one
//! that goes takes along, is no change of a row: the worker compares the partitions that there are with those that it
//! wrote down, so it also learns of what happened while there was no worker. Postgres clones no statement triggers
//! either: a TRUNCATE of a new partition alone would go unnoticed, until the worker creates the trigger.

use pgrx::pg_sys;

use super::{catalog, state, triggers};
use crate::jobs::ask;
use crate::postgres::spi;

/// Attached and followed tables with all that belongs to them, themselves included: `tree (parent, child)`. It takes no
/// locks, as pg_partition_tree() does: ALTER TABLE of one partition must not hold up all other tables' changes.
pub const TREES: &str = "
    with recursive followed as (
        select a.relation::oid as oid from es_sync.attachment a
        union
        select w.related::oid from es_sync.way w
    ), tree (parent, child) as (
        select f.oid, f.oid from followed f
        union all
        select t.parent, i.inhrelid
        from tree t
        join pg_catalog.pg_inherits i on i.inhparent = t.child and not i.inhdetachpending
        join pg_catalog.pg_class c on c.oid = i.inhrelid and c.relispartition
    )";

/// True if a crash of the server empties an attached or followed table, or a partition of one. SPI must be connected.
pub fn any_is_unlogged() -> bool {
    let unlogged = format!(
        "{TREES} select from tree t join pg_catalog.pg_class c on c.oid = t.child and c.relpersistence = 'u' limit 1"
    );
    !spi::run(&unlogged, &[]).is_empty()
}

/// As `TREES`, with what tells a partition from the same one before it went and came back: `part (parent, child,
/// trigger)`.
fn parts() -> String {
    format!(
        "{TREES}, part as (
             select t.parent, t.child, g.oid as trigger
             from tree t
             join pg_catalog.pg_class r on r.oid = t.parent and r.relkind = 'p'
             join pg_catalog.pg_trigger g on g.tgrelid = t.child and g.tgname = 'es_sync_capture')"
    )
}

/// A partition of an attached or followed table.
pub struct Partition {
    /// The attached or followed table.
    parent: pg_sys::Oid,
    oid: pg_sys::Oid,
    /// Schema-qualified and quoted.
    pub name: String,
}

/// What has become of a partition since it was written down.
pub struct Difference {
    parent: pg_sys::Oid,
    child: pg_sys::Oid,
    /// Its row trigger now; None where it is no partition any more.
    trigger: Option<pg_sys::Oid>,
    /// It was one before.
    was: bool,
    /// pg_class.relkind; None where it is gone.
    kind: Option<String>,
}

/// True if the partitions of a table are written down. SPI must be connected.
pub fn are_known(parent: pg_sys::Oid) -> bool {
    let known = "select from es_sync.partition p where p.parent = $1 limit 1";
    !spi::run(known, &[spi::parameter(parent)]).is_empty()
}

/// Writes down which partitions a table has (None: all tables). What else there was to do about them must be done anyway.
pub fn remember(parent: Option<pg_sys::Oid>) {
    let only = || [spi::parameter(parent)];
    spi::run("delete from es_sync.partition p where $1 is null or p.parent = $1", &only());
    spi::run(
        &format!(
            "{} insert into es_sync.partition (parent, child, trigger)
             select p.parent, p.child, p.trigger from part p where $1 is null or p.parent = $1",
            parts()
        ),
        &only(),
    );
}

/// The table is followed no more.
pub fn forget(parent: pg_sys::Oid) {
    spi::run("delete from es_sync.partition p where p.parent = $1", &[spi::parameter(parent)]);
}

/// Partitions that came or went since they were written down. SPI must be connected.
pub fn differences() -> Vec<Difference> {
    spi::run(
        &format!(
            "{TREES} delete from es_sync.partition p where not exists (select from followed f where f.oid = p.parent)"
        ),
        &[],
    );
    let rows = spi::run(
        &format!(
            "{} select coalesce(n.parent, p.parent), coalesce(n.child, p.child), n.trigger, p.trigger is not null,
                    c.relkind::text
             from part n
             full join es_sync.partition p on p.parent = n.parent and p.child = n.child
             left join pg_catalog.pg_class c on c.oid = n.child
             where n.trigger is distinct from p.trigger
               -- A table that is dropped, or has lost its own trigger, says nothing of its partitions.
               and exists (select from part r where r.child = coalesce(n.parent, p.parent) and r.parent = r.child)
             order by 1, 2",
            parts()
        ),
        &[],
    );
    (0..rows.len())
        .filter_map(|row| {
            Some(Difference {
                parent: rows.get(row, 1)?,
                child: rows.get(row, 2)?,
                trigger: rows.get(row, 3),
                was: rows.get(row, 4)?,
                kind: rows.get(row, 5),
            })
        })
        .collect()
}

impl Difference {
    /// True if it has come with rows in blocks of its own, as far as can be seen.
    ///
    /// # Errors
    /// Raises lock_not_available where somebody alters the partition.
    pub fn is_filled(&self) -> bool {
        if self.trigger.is_none() || self.kind.as_deref() != Some("r") {
            return false;
        }
        let rows = spi::run("select pg_catalog.pg_relation_size($1) > 0", &[spi::parameter(self.child)]);
        rows.get::<bool>(0, 1) == Some(true)
    }

    /// Asks for what the difference makes necessary, and writes down how things are now.
    pub fn take(&self, filled: bool) {
        let ids = [spi::parameter(self.parent), spi::parameter(self.child)];
        if self.was {
            spi::run("delete from es_sync.partition p where p.parent = $1 and p.child = $2", &ids);
            rows_left(self.parent, "rows went with a partition");
        }
        if let Some(trigger) = self.trigger {
            let [parent, child] = ids;
            spi::run(
                "insert into es_sync.partition (parent, child, trigger) values ($1, $2, $3)",
                &[parent, child, spi::parameter(trigger)],
            );
        }
        // Whether a foreign table has rows is not known here, and it is not read piece by piece.
        let is_foreign = self.trigger.is_some() && self.kind.as_deref() == Some("f");
        for attachment in catalog::concerned(self.parent) {
            if filled {
                create_load(attachment, self.child);
            } else if is_foreign {
                ask::for_repair(attachment, "a foreign table came as a partition");
            }
        }
    }
}

/// Asks for a partition's rows to be brought into an index, which is stale until then.
fn create_load(attachment: i32, part: pg_sys::Oid) {
    state::mark_partitions(attachment);
    spi::run(
        "insert into es_sync.job (kind, attachment, relation, index_name, part)
         select 'partition', a.id, a.relation::text, a.index_name, $2::oid from es_sync.attachment a where a.id = $1
         on conflict (attachment, part) where kind = 'partition' and state in ('queued', 'running') do update
         set state = 'queued', phase = null, position = null, done = 0",
        &[spi::parameter(attachment), spi::parameter(part)],
    );
}

/// Rows of a table are gone, nobody noted which. Documents of their own are searched for; where documents of other rows
/// showed them, all are compared.
fn rows_left(parent: pg_sys::Oid, why: &str) {
    take_out(parent, why, true);
}

/// The same for a partition of an attached table that was truncated: what is shown by documents of other tables was
/// noted for each of those.
pub fn emptied(parent: pg_sys::Oid) {
    take_out(parent, "a partition was truncated", false);
}

fn take_out(parent: pg_sys::Oid, why: &str, everywhere: bool) {
    let rows = spi::run(
        "select a.id, exists (
             select from es_sync.way w
             where w.attachment = a.id and w.related = $1::oid
               and (w.source is not null or w.root <> w.related or w.columns <> a.key_columns))
         from es_sync.attachment a
         where a.relation = $1::oid
            or $2 and exists (select from es_sync.way w where w.attachment = a.id and w.related = $1::oid)
         order by a.id",
        &[spi::parameter(parent), spi::parameter(everywhere)],
    );
    let attachments: Vec<(i32, bool)> =
        (0..rows.len()).filter_map(|row| Some((rows.get(row, 1)?, rows.get(row, 2)?))).collect();
    for (attachment, shown_elsewhere) in attachments {
        if shown_elsewhere {
            ask::for_repair(attachment, why);
        } else {
            ask::for_sweep(attachment);
        }
    }
}

/// Partitions whose truncation would go unnoticed. SPI must be connected.
pub fn unwatched() -> Vec<Partition> {
    read(&spi::run(
        &format!(
            "{} select p.parent, p.child, pg_catalog.format('%I.%I', n.nspname, c.relname)
             from part p
             join pg_catalog.pg_class c on c.oid = p.child and c.relkind in ('r', 'p')
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace
             where not exists (
                 select from pg_catalog.pg_trigger t where t.tgrelid = c.oid and t.tgname = 'es_sync_truncate')",
            parts()
        ),
        &[],
    ))
}

/// Tables that were partitions once: Postgres took the row trigger from them, and left the one for TRUNCATE. SPI must be
/// connected.
pub fn strays() -> Vec<Partition> {
    read(&spi::run(
        "select c.oid, c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname)
         from pg_catalog.pg_trigger t
         join pg_catalog.pg_class c on c.oid = t.tgrelid
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         where t.tgname = 'es_sync_truncate' and t.tgfoid = pg_catalog.to_regprocedure('es_sync.capture()')
           and not exists (
               select from pg_catalog.pg_trigger x where x.tgrelid = c.oid and x.tgname = 'es_sync_capture')",
        &[],
    ))
}

fn read(rows: &spi::Rows) -> Vec<Partition> {
    (0..rows.len())
        .filter_map(|row| {
            Some(Partition { parent: rows.get(row, 1)?, oid: rows.get(row, 2)?, name: rows.get(row, 3)? })
        })
        .collect()
}

/// Creates the trigger. What a partition had before it was truncated, without it, is taken out; true if there may be any.
///
/// # Errors
/// Raises lock_not_available while somebody writes to the partition for longer than a moment: creating a trigger makes
/// later writers wait behind it.
pub fn watch(partition: &Partition) -> bool {
    triggers::create_for_truncate(&partition.name);
    // TRUNCATE gives a table a new file, whose number then differs from the table's own. So does a rewrite, which costs
    // a search in vain.
    let suspect = spi::run(
        "select from pg_catalog.pg_class c
         where c.oid = $1 and c.relkind = 'r' and pg_catalog.pg_relation_filenode(c.oid) <> c.oid",
        &[spi::parameter(partition.oid)],
    );
    if suspect.is_empty() {
        return false;
    }
    rows_left(partition.parent, &format!("partition {} may have been truncated", partition.name));
    true
}

/// Drops the trigger that a table has kept from when it was a partition.
///
/// # Errors
/// As `watch`; readers stand in the way too.
pub fn unwatch(stray: &Partition) {
    spi::run(&format!("drop trigger if exists es_sync_truncate on {}", stray.name), &[]);
}
