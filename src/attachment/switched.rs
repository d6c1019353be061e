//! Triggers that somebody has switched off (ALTER TABLE ... DISABLE TRIGGER, pg_restore --disable-triggers), or on again:
//! ENABLE TRIGGER gives them back without ALWAYS, and that is the trace by which the worker notices it.

use pgrx::pg_sys;

use super::{catalog, partitions};
use crate::jobs::ask;
use crate::postgres::spi;

/// A trigger of ours that does not always fire.
pub struct Trigger {
    table: pg_sys::Oid,
    /// The table's name, schema-qualified and quoted.
    pub table_name: String,
    name: String,
}

/// Triggers of attached tables and their partitions that do not always fire. SPI must be connected.
pub fn off() -> Vec<Trigger> {
    let rows = spi::run(
        &format!(
            "{} select distinct c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname), t.tgname::text
             from tree x
             join pg_catalog.pg_trigger t on t.tgrelid = x.child
             join pg_catalog.pg_class c on c.oid = x.child
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace
             where t.tgname in ('es_sync_capture', 'es_sync_truncate') and t.tgenabled <> 'A'",
            partitions::TREES
        ),
        &[],
    );
    let read = |row| Some(Trigger { table: rows.get(row, 1)?, table_name: rows.get(row, 2)?, name: rows.get(row, 3)? });
    (0..rows.len()).filter_map(read).collect()
}

/// Lets the trigger fire always again, and has what it missed repaired. Its lock waits for every transaction that has
/// written to the table without it, so the repair sees what they wrote.
///
/// # Errors
/// Raises lock_not_available while somebody writes to the table for longer than a moment: later writers wait behind.
pub fn mend(trigger: &Trigger) {
    // Each partition has its own turn. A statement that went on to them would build keys of partitioned tables, and so
    // call functions of theirs with our rights.
    spi::run(&format!("alter table only {} enable always trigger {}", trigger.table_name, trigger.name), &[]);
    for attachment in catalog::concerned(trigger.table) {
        ask::for_repair(attachment, &format!("triggers of {} were switched off", trigger.table_name));
    }
}
