//! Partitions that came after their table was attached. Postgres gives them the row trigger, but clones no statement
//! triggers: TRUNCATE of such a partition alone would go unnoticed. The worker looks for them and creates the trigger.

use pgrx::pg_sys;

use super::{attach, catalog};
use crate::jobs::record;
use crate::postgres::spi;
use crate::postgres::transaction::{self, Scope};

/// A partition of an attached table.
pub struct Partition {
    oid: pg_sys::Oid,
    /// Schema-qualified and quoted.
    pub name: String,
}

/// Partitions whose truncation would go unnoticed. SPI must be connected.
pub fn unwatched() -> Vec<Partition> {
    let rows = spi::run(
        "select distinct c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname)
         from (select relation from es_sync.attachment union select related from es_sync.way) a
         join pg_catalog.pg_class r on r.oid = a.relation and r.relkind = 'p'
         cross join lateral pg_catalog.pg_partition_tree(a.relation) p
         join pg_catalog.pg_class c on c.oid = p.relid and c.relkind in ('r', 'p')
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         where not exists (
             select from pg_catalog.pg_trigger t where t.tgrelid = c.oid and t.tgname = 'es_sync_truncate')",
        &[],
    );
    (0..rows.len()).filter_map(|row| Some(Partition { oid: rows.get(row, 1)?, name: rows.get(row, 2)? })).collect()
}

/// Creates the trigger. A partition that was truncated before has its table compared and mended; true if so.
///
/// # Errors
/// Raises lock_not_available while somebody writes to the partition for longer than a moment: creating a trigger makes
/// later writers wait behind it.
pub fn watch(partition: &Partition) -> bool {
    transaction::set(c"lock_timeout", c"100ms", Scope::Local);
    attach::create_truncate_trigger(&partition.name);
    // TRUNCATE gives a table a new file, whose number then differs from the table's own. So does a rewrite, which costs
    // a repair too many.
    let suspect = spi::run(
        "select from pg_catalog.pg_class c
         where c.oid = $1 and c.relkind = 'r' and pg_catalog.pg_relation_filenode(c.oid) <> c.oid",
        &[(pg_sys::OIDOID, spi::value(partition.oid))],
    );
    if suspect.is_empty() {
        return false;
    }
    for attachment in catalog::concerned(partition.oid) {
        record::restart(Some(attachment));
        attach::create_repair(attachment, &format!("partition {} may have been truncated", partition.name));
    }
    true
}
