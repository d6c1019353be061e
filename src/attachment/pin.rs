//! DROP VIEW of a view that documents are read from is refused, as that of a view which another one reads: the capture
//! trigger depends on it. With CASCADE the trigger goes along, and the worker lets go of the index.

use pgrx::pg_sys;

use super::catalog;
use crate::postgres::spi;

/// Makes the table's trigger depend on a view. SPI must be connected, and the trigger be there.
pub fn hold(table: pg_sys::Oid, view: pg_sys::Oid) {
    let Some(trigger) = trigger_of(table) else { return };
    let known = spi::run(
        "select from pg_catalog.pg_depend d
         where d.classid = 'pg_catalog.pg_trigger'::regclass and d.objid = $1
           and d.refclassid = 'pg_catalog.pg_class'::regclass and d.refobjid = $2",
        &[spi::parameter(trigger), spi::parameter(view)],
    );
    if !known.is_empty() {
        return;
    }
    let address = |class, object| pg_sys::ObjectAddress { classId: class, objectId: object, objectSubId: 0 };
    // SAFETY: both objects exist, in a live transaction.
    unsafe {
        pg_sys::recordDependencyOn(
            &address(pg_sys::TriggerRelationId, trigger),
            &address(pg_sys::RelationRelationId, view),
            pg_sys::DependencyType::DEPENDENCY_NORMAL,
        );
    }
}

/// Lets go of views that no attachment of the table reads any more.
pub fn release(table: pg_sys::Oid) {
    let Some(trigger) = trigger_of(table) else { return };
    let read: Vec<pg_sys::Oid> =
        catalog::of_relation(table, None).into_iter().filter_map(|attachment| attachment.document).collect();
    let rows = spi::run(
        "select distinct d.refobjid
         from pg_catalog.pg_depend d
         join pg_catalog.pg_class c on c.oid = d.refobjid and c.relkind = 'v'
         where d.classid = 'pg_catalog.pg_trigger'::regclass and d.objid = $1
           and d.refclassid = 'pg_catalog.pg_class'::regclass",
        &[spi::parameter(trigger)],
    );
    for view in (0..rows.len()).filter_map(|row| rows.get::<pg_sys::Oid>(row, 1)).filter(|view| !read.contains(view)) {
        // SAFETY: deletes rows of pg_depend in a live transaction.
        unsafe {
            pg_sys::deleteDependencyRecordsForSpecific(
                pg_sys::TriggerRelationId,
                trigger,
                pg_sys::DependencyType::DEPENDENCY_NORMAL as std::ffi::c_char,
                pg_sys::RelationRelationId,
                view,
            );
        }
    }
}

fn trigger_of(table: pg_sys::Oid) -> Option<pg_sys::Oid> {
    let rows = spi::run(
        "select t.oid from pg_catalog.pg_trigger t where t.tgrelid = $1 and t.tgname = 'es_sync_capture'",
        &[spi::parameter(table)],
    );
    rows.first(1)
}
