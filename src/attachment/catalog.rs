//! The catalog of attachments: `es_sync.attachment` as Rust values.

use std::cell::Cell;

use pgrx::{Array, FromDatum, JsonB, PgRelation, pg_sys};

use super::options::Options;
use crate::postgres::spi::{self, Rows};
use crate::postgres::transaction::{Scope, set, with_nested_settings};

/// An attached table and its index.
#[derive(Debug, Clone, PartialEq)]
pub struct Attachment {
    pub id: i32,
    pub relation: pg_sys::Oid,
    /// The alias under which people search.
    pub index: String,
    pub key_columns: Vec<String>,
    /// The view that documents are read from; None where they are the table's rows.
    pub document: Option<pg_sys::Oid>,
    pub filter: Option<String>,
    pub exclude: Vec<String>,
    pub options: Options,
    /// The source under which the queue holds where documents lay before; None without the option `routing`.
    pub routing_source: Option<u32>,
    /// The concrete index behind the alias; None until the first load is done.
    pub live: Option<String>,
    /// The engine's own id of the live index, once it has been seen.
    pub uuid: Option<String>,
    /// Index and table may differ: a repair is under way, or somebody has to act.
    pub stale: bool,
    /// Nothing is sent to it until es_sync.resume().
    pub paused: bool,
}

impl Attachment {
    /// False where the engine gives back something else than it was sent: documents then can only be counted as there
    /// or not. Whether they hold vectors is not in it.
    pub fn contents_comparable(&self) -> bool {
        // Vectors are left out of _source by newer versions.
        const NOT_GIVEN_BACK: [&str; 4] = ["_source", "dense_vector", "knn_vector", "rank_vectors"];
        let mentions = |value: &serde_json::Value| {
            let text = value.to_string();
            NOT_GIVEN_BACK.iter().any(|word| text.contains(&format!("\"{word}\"")))
        };
        let default_pipeline = |value: &serde_json::Value| {
            ["default_pipeline", "final_pipeline"].iter().any(|name| value.to_string().contains(name))
        };
        self.options.pipeline.is_none()
            && !self.options.mappings.as_ref().is_some_and(mentions)
            && !self.options.settings.as_ref().is_some_and(default_pipeline)
    }
}

const COLUMNS: &str = "a.id, a.relation::oid, a.index_name, a.key_columns, a.filter, a.exclude, a.options::text, \
                       a.live_index, a.live_uuid, coalesce(a.obstacle, a.stale) is not null, a.paused, a.document::oid, a.routing_source";

/// All attachments whose table still exists. SPI must be connected.
pub fn all() -> Vec<Attachment> {
    select("join pg_catalog.pg_class c on c.oid = a.relation order by a.id", &[])
}

/// Attachments of a table, oldest first; only that of `index` where one is given.
pub fn of_relation(relation: pg_sys::Oid, index: Option<&str>) -> Vec<Attachment> {
    select(
        "where a.relation = $1::oid and ($2 is null or a.index_name = $2) order by a.id",
        &[(pg_sys::OIDOID, spi::value(relation)), (pg_sys::TEXTOID, index.and_then(spi::value))],
    )
}

/// One attachment.
pub fn of_id(id: i32) -> Option<Attachment> {
    select("where a.id = $1", &[(pg_sys::INT4OID, spi::value(id))]).pop()
}

fn select(rest: &str, parameters: &[(pg_sys::Oid, spi::Value)]) -> Vec<Attachment> {
    let rows = spi::run(&format!("select {COLUMNS} from es_sync.attachment a {rest}"), parameters);
    (0..rows.len()).filter_map(|row| read(&rows, row)).collect()
}

fn read(rows: &Rows, row: usize) -> Option<Attachment> {
    Some(Attachment {
        id: rows.get(row, 1)?,
        relation: rows.get(row, 2)?,
        index: rows.get(row, 3)?,
        key_columns: rows.get(row, 4)?,
        filter: rows.get(row, 5),
        exclude: rows.get(row, 6)?,
        options: Options::stored(&rows.get::<String>(row, 7)?),
        live: rows.get(row, 8),
        uuid: rows.get(row, 9),
        stale: rows.get(row, 10)?,
        paused: rows.get(row, 11)?,
        document: rows.get(row, 12),
        routing_source: rows.get::<i32>(row, 13).map(|source| source as u32),
    })
}

/// The index name that is taken, and by which table; None if it is free.
pub fn owner_of_index(index: &str) -> Option<String> {
    let rows = spi::run(
        "select a.relation::text from es_sync.attachment a where a.index_name = $1",
        &[(pg_sys::TEXTOID, spi::value(index))],
    );
    rows.first(1)
}

/// Deletes the attachments that a condition on $1 chooses, and with them what is theirs: ways, jobs, dead letters, and
/// what was seen of their definitions. SPI must be connected.
pub fn delete(condition: &str, parameter: (pg_sys::Oid, spi::Value)) {
    with_nested_settings(|| {
        // In a session that acts as a replica no foreign key would cascade.
        set(c"session_replication_role", c"origin", Scope::Nested);
        spi::run(&format!("delete from es_sync.attachment a where {condition}"), &[parameter]);
    });
}

/// DROP TABLE leaves its attachments behind: the table's owner need not know of us. Lets go of them all, or of that of
/// `index` alone, and of what was declared about the table.
pub fn forget_dropped_tables(index: Option<&str>) {
    delete(
        "($1 is null or a.index_name = $1)
         and not exists (select from pg_catalog.pg_class c where c.oid = a.relation)",
        (pg_sys::TEXTOID, index.and_then(spi::value)),
    );
    spi::run(
        "delete from es_sync.declaration d
         where not exists (select from pg_catalog.pg_class c where c.oid = d.root)
            or not exists (select from pg_catalog.pg_class c where c.oid = d.related)",
        &[],
    );
}

/// Whether documents hold a column that is no key: all but those excluded, and but bytea and tsvector that the user has
/// not mapped.
pub fn is_synced(name: &str, type_oid: pg_sys::Oid, exclude: &[String], options: &Options) -> bool {
    let left_out = || matches!(element_of(type_oid).0, pg_sys::BYTEAOID | pg_sys::TSVECTOROID);
    !exclude.iter().any(|excluded| excluded == name) && (options.maps(name) || !left_out())
}

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

/// True if documents hold vectors. SPI must be connected.
pub fn has_vectors(attachment: &Attachment) -> bool {
    // By SQL, because opening the relation would wait for whoever has it locked.
    let rows = spi::run(
        "select a.attname::text, a.atttypid from pg_catalog.pg_attribute a
         where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped",
        &[(pg_sys::OIDOID, spi::value(attachment.document.unwrap_or(attachment.relation)))],
    );
    (0..rows.len()).any(|row| {
        let excluded = rows.get::<String>(row, 1).is_none_or(|name| attachment.exclude.contains(&name));
        let kind = rows.get::<pg_sys::Oid>(row, 2);
        !excluded && kind.is_some_and(|kind| is_vector(element_of(kind).0))
    })
}

/// True for pgvector's types whose text is a list of numbers.
fn is_vector(type_oid: pg_sys::Oid) -> bool {
    matches!(extension_type(type_oid).as_str(), "vector" | "halfvec")
}

/// `attgenerated` of a column that is generated when it is read: PostgreSQL 18 knows them.
pub const VIRTUAL: u8 = b'v';

/// What capture notes of a table's rows, and under which source.
pub struct Capture {
    /// As the queue has it: an attached table, or the number of a link.
    pub source: u32,
    /// The columns whose values are noted.
    pub columns: Vec<String>,
    pub used: Used,
    pub part: Part,
}

/// Where documents of a table's rows lie: what capture notes of it when they leave there.
pub struct Moves {
    /// As the queue has it.
    pub source: u32,
    pub key_columns: Vec<String>,
    pub routing: String,
}

/// What is noted of a relation's rows.
#[derive(Default)]
pub struct Captures {
    pub captures: Vec<Capture>,
    pub moves: Vec<Moves>,
}

/// Which columns' changes matter.
pub enum Used {
    /// No UPDATE may be skipped, because it is not known.
    Every,
    /// Those that a document of the row as it is holds.
    Shown {
        exclude: Vec<String>,
        options: Options,
    },
    Only(Vec<String>),
}

/// What a row of the table has to do with the documents of the source.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Part {
    /// It is the document's own row.
    Root,
    /// The document shows it; `nulls` where a value that is null leads somewhere too.
    Related { nulls: bool },
}

thread_local! {
    static ATTACHMENT_TABLE: Cell<pg_sys::Oid> = const { Cell::new(pg_sys::InvalidOid) };
}

/// True if a change of this relation means a change of attachments.
pub fn is_attachment_table(relation: pg_sys::Oid) -> bool {
    relation == ATTACHMENT_TABLE.get()
}

/// Tells every backend to read the attachments anew, once this transaction has committed.
pub fn invalidate_captures() {
    let table = attachment_table();
    if table != pg_sys::InvalidOid {
        // SAFETY: the table exists; the message is sent at commit.
        unsafe { pg_sys::CacheInvalidateRelcacheByRelid(table) };
    }
}

fn attachment_table() -> pg_sys::Oid {
    table_of_ours(c"attachment")
}

/// The table whose lock says whose turn it is to change what is attached. It has one row, which nobody changes.
pub fn turns() -> pg_sys::Oid {
    table_of_ours(c"installation")
}

fn table_of_ours(name: &std::ffi::CStr) -> pg_sys::Oid {
    // SAFETY: syscache lookups in a live transaction.
    unsafe {
        let schema = pg_sys::get_namespace_oid(c"es_sync".as_ptr(), true);
        pg_sys::get_relname_relid(name.as_ptr(), schema)
    }
}

/// Attachments whose documents hold rows of a table, or of a partitioned table that it belongs to.
pub fn concerned(table: pg_sys::Oid) -> Vec<i32> {
    let rows = spi::run(
        "select x.attachment
         from (select a.id, a.relation::oid from es_sync.attachment a
               union
               select w.attachment, w.related::oid from es_sync.way w) x (attachment, relation)
         where x.relation = $1 or x.relation in (select p.relid from pg_catalog.pg_partition_ancestors($1) p)
         group by 1 order by 1",
        &[(pg_sys::OIDOID, spi::value(table))],
    );
    (0..rows.len()).filter_map(|row| rows.get(row, 1)).collect()
}

/// What is noted of rows of any of `relations`, read below SQL: a writer has no right on schema es_sync.
pub fn captures(relations: &[pg_sys::Oid]) -> Captures {
    let oid = attachment_table();
    ATTACHMENT_TABLE.set(oid);
    let Captures { captures: mut found, mut moves } = Captures::default();
    let columns =
        [c"relation", c"key_columns", c"exclude", c"filter", c"document", c"options", c"routing", c"routing_source"];
    scan(oid, columns, |row| {
        let [relation, key_columns, exclude, filter, document, options, routing, routing_source] = row;
        let Some(relation) = relation.and_then(oid_of).filter(|relation| relations.contains(relation)) else { return };
        // SAFETY: the columns are integer and text.
        let (routing_source, routing) = unsafe {
            (
                routing_source.and_then(|source| i32::from_datum(source, false)),
                routing.and_then(|routing| String::from_datum(routing, false)),
            )
        };
        if let (Some(source), Some(routing)) = (routing_source, routing) {
            moves.push(Moves { source: source as u32, key_columns: texts(key_columns), routing });
        }
        if document.is_some() {
            // Its ways say what is used of the table itself, too.
            return;
        }
        found.push(Capture {
            source: relation.to_u32(),
            columns: texts(key_columns),
            used: match filter {
                Some(_) => Used::Every,
                None => Used::Shown { exclude: texts(exclude), options: options.map(options_of).unwrap_or_default() },
            },
            part: Part::Root,
        });
    });
    scan(table_of_ours(c"way"), [c"related", c"source", c"columns", c"used", c"nulls", c"root"], |row| {
        let [related, source, columns, used, nulls, root] = row;
        let Some(related) = related.and_then(oid_of).filter(|related| relations.contains(related)) else { return };
        let Some(root) = root.and_then(oid_of) else { return };
        // SAFETY: the columns are integer and boolean.
        let (link, nulls) = unsafe {
            (
                source.and_then(|source| i32::from_datum(source, false)),
                nulls.and_then(|nulls| bool::from_datum(nulls, false)) == Some(true),
            )
        };
        let part = if link.is_none() && related == root { Part::Root } else { Part::Related { nulls } };
        found.push(Capture {
            source: link.map_or(root.to_u32(), |link| link as u32),
            columns: texts(columns),
            used: if used.is_some() { Used::Only(texts(used)) } else { Used::Every },
            part,
        });
    });
    Captures { captures: found, moves }
}

/// Hands over the named columns of each row of a table of ours, read below SQL; None for null, and for a column that
/// another version's table does not have.
fn scan<const N: usize>(
    oid: pg_sys::Oid,
    names: [&std::ffi::CStr; N],
    mut visit: impl FnMut([Option<pg_sys::Datum>; N]),
) {
    if oid == pg_sys::InvalidOid {
        return;
    }
    // SAFETY: the scan is ended and the table closed before return; an ERROR in between releases both with the
    // transaction. Columns are looked up by name and read as the types that sql/tables.sql gives them.
    unsafe {
        let table = pg_sys::try_table_open(oid, pg_sys::AccessShareLock as i32);
        if table.is_null() {
            return;
        }
        let columns = names.map(|name| (pg_sys::get_attnum(oid, name.as_ptr()) as usize).checked_sub(1));
        let descriptor = (*table).rd_att;
        let scan = pg_sys::table_beginscan_catalog(table, 0, std::ptr::null_mut());
        let natts = (*descriptor).natts as usize;
        let (mut values, mut nulls) = (vec![pg_sys::Datum::from(0usize); natts], vec![false; natts]);
        loop {
            let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
            if tuple.is_null() {
                break;
            }
            pg_sys::heap_deform_tuple(tuple, descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
            visit(columns.map(|column| column.filter(|column| !nulls[*column]).map(|column| values[column])));
        }
        pg_sys::table_endscan(scan);
        pg_sys::table_close(table, pg_sys::AccessShareLock as i32);
    }
}

fn oid_of(datum: pg_sys::Datum) -> Option<pg_sys::Oid> {
    // SAFETY: the column is a regclass, which is an OID.
    unsafe { pg_sys::Oid::from_datum(datum, false) }
}

fn options_of(datum: pg_sys::Datum) -> Options {
    // SAFETY: the column is a jsonb.
    let options = unsafe { JsonB::from_datum(datum, false) };
    options.and_then(|options| serde_json::from_value(options.0).ok()).unwrap_or_default()
}

fn texts(datum: Option<pg_sys::Datum>) -> Vec<String> {
    // SAFETY: the column is a text[].
    datum
        .and_then(|datum| unsafe { Array::<String>::from_datum(datum, false) })
        .map(|array| array.iter().flatten().collect())
        .unwrap_or_default()
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
        &[(pg_sys::OIDOID, spi::value(relation)), (pg_sys::TEXTARRAYOID, spi::value(columns))],
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
        &[(pg_sys::OIDOID, spi::value(relation))],
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
    let rows = spi::run(
        "select c.relowner from pg_catalog.pg_class c where c.oid = $1",
        &[(pg_sys::OIDOID, spi::value(relation))],
    );
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
