//! A table, its columns and their types, as Postgres' own catalog has them.

use pgrx::{PgRelation, pg_sys};

use super::spi;

/// `attgenerated` of a column that is generated when it is read: PostgreSQL 18 knows them.
pub const VIRTUAL: u8 = b'v';

/// The type below a type's domains and array, and whether it is an array.
pub fn element_of(type_oid: pg_sys::Oid) -> (pg_sys::Oid, bool) {
    // SAFETY: syscache lookups in a live transaction.
    unsafe {
        let base = pg_sys::getBaseType(type_oid);
        match pg_sys::get_element_type(base) {
            pg_sys::InvalidOid => (base, false),
            element => (pg_sys::getBaseType(element), true),
        }
    }
}

/// Name of a type that an extension brings, without schema.
pub fn extension_type(type_oid: pg_sys::Oid) -> String {
    // SAFETY: syscache lookup; the palloc'd result is copied.
    unsafe {
        let name = pg_sys::format_type_be(type_oid);
        let name = std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned();
        name.rsplit('.').next().unwrap_or_default().to_owned()
    }
}

/// The partitioned tables above a partition, nearest first.
pub fn partition_ancestors(relation: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    unsafe extern "C-unwind" {
        // Not in pgrx's bindings (catalog/partition.h).
        fn get_partition_ancestors(relid: pg_sys::Oid) -> *mut pg_sys::List;
    }
    // SAFETY: called in a live transaction through pgrx's guard, which turns an ERROR into a panic that unwinds.
    unsafe {
        let list = pg_sys::ffi::pg_guard_ffi_boundary(|| get_partition_ancestors(relation));
        let ancestors = oids(list);
        pg_sys::list_free(list);
        ancestors
    }
}

/// # Safety
/// `list` is null or a list of OIDs.
pub unsafe fn oids(list: *mut pg_sys::List) -> Vec<pg_sys::Oid> {
    // SAFETY: the caller's.
    unsafe {
        match list.as_ref() {
            None => Vec::new(),
            Some(list) => (0..list.length as usize).map(|index| (*list.elements.add(index)).oid_value).collect(),
        }
    }
}

/// True if a unique index on NOT NULL columns keeps a table's rows apart by these columns, as the columns themselves
/// compare: to the order in which rows are paged through, no two are equal then. SPI must be connected.
pub fn identify(relation: pg_sys::Oid, columns: Vec<String>) -> bool {
    let rows = spi::run(
        "select pg_catalog.array_agg(a.atttypid), pg_catalog.array_agg(o.opcfamily)
         from pg_catalog.pg_index i
         cross join lateral pg_catalog.unnest(i.indkey) with ordinality k (number, place)
         join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.number
         join pg_catalog.pg_opclass o on o.oid = i.indclass[k.place - 1]
         where i.indrelid = $1 and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
           and k.place <= i.indnkeyatts
         group by i.indexrelid
         having pg_catalog.bool_and(
             a.attnotnull and a.attname = any ($2) and a.attcollation = i.indcollation[k.place - 1])",
        &[spi::parameter(relation), spi::parameter(columns)],
    );
    let oids = |row, column| rows.get::<Vec<pg_sys::Oid>>(row, column).unwrap_or_default();
    (0..rows.len())
        .any(|row| oids(row, 1).into_iter().zip(oids(row, 2)).all(|(kind, family)| family == family_of(kind)))
}

/// The operator family by which values of a type are ordered.
fn family_of(kind: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: a cache lookup in a live transaction; an entry is never freed.
    unsafe { (*pg_sys::lookup_type_cache(kind, pg_sys::TYPECACHE_BTREE_OPFAMILY as i32)).btree_opf }
}

/// The columns of a table's primary key; none if it has none. SPI must be connected.
pub fn primary_key(relation: pg_sys::Oid) -> Vec<String> {
    let rows = spi::run(
        "select a.attname::text
         from pg_catalog.pg_index i,
              lateral pg_catalog.unnest(i.indkey) with ordinality k (number, place)
              join pg_catalog.pg_attribute a on a.attnum = k.number
         where i.indrelid = $1 and i.indisprimary and a.attrelid = $1 and k.place <= i.indnkeyatts
         order by k.place",
        &[spi::parameter(relation)],
    );
    (0..rows.len()).filter_map(|row| rows.get(row, 1)).collect()
}

/// A column of a relation.
#[derive(Debug, Clone)]
pub struct Column {
    pub number: i16,
    pub name: String,
    pub type_oid: pg_sys::Oid,
    pub modifier: i32,
    pub collation: pg_sys::Oid,
    /// Generated when it is read.
    pub is_virtual: bool,
}

/// The relation's owner; nobody if it is gone. SPI must be connected.
pub fn owner(relation: pg_sys::Oid) -> pg_sys::Oid {
    let rows = spi::run("select c.relowner from pg_catalog.pg_class c where c.oid = $1", &[spi::parameter(relation)]);
    rows.first(1).unwrap_or(pg_sys::InvalidOid)
}

/// The relation's columns, in order, dropped ones left out.
pub fn columns(relation: pg_sys::Oid) -> Vec<Column> {
    // SAFETY: opens with a lock that lasts as long as the reference.
    let relation = unsafe { PgRelation::with_lock(relation, pg_sys::AccessShareLock as i32) };
    relation
        .tuple_desc()
        .iter()
        .filter(|attribute| !attribute.attisdropped)
        .map(|attribute| Column {
            number: attribute.attnum,
            name: attribute.name().to_owned(),
            type_oid: attribute.atttypid,
            modifier: attribute.atttypmod,
            collation: attribute.attcollation,
            is_virtual: attribute.attgenerated as u8 == VIRTUAL,
        })
        .collect()
}
