//! What capture notes of which table's rows: the attachments and their ways, read below SQL in a writer's backend.

use std::cell::Cell;

use pgrx::{Array, FromDatum, JsonB, pg_sys};

use super::options::Options;

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

/// Has `is_attachment_table` know the table. Needs a transaction.
pub fn listen() {
    ATTACHMENT_TABLE.set(attachment_table());
}

/// True if a change of this relation means a change of attachments.
pub fn is_attachment_table(relation: pg_sys::Oid) -> bool {
    relation == ATTACHMENT_TABLE.get()
}

/// Tells every backend to read the attachments anew, once this transaction has committed.
pub fn invalidate() {
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

/// What is noted of rows of any of `relations`, read below SQL: a writer has no right on schema es_sync.
pub fn of(relations: &[pg_sys::Oid]) -> Captures {
    listen();
    let oid = ATTACHMENT_TABLE.get();
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
