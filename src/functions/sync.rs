//! es_sync.sync, es_sync.sync_full, es_sync.sync_where: index what is there, delete what is not.

use std::ffi::CString;

use pgrx::prelude::*;
use pgrx::{AnyArray, PgSqlErrorCode, pg_sys};

use super::primary_only;
use crate::attachment::operator::Operator;
use crate::attachment::{attach, catalog, check, definition, key, link};
use crate::capture;
use crate::document::shape::text_as;
use crate::postgres::error::{OrRaise, Report};
use crate::postgres::relation::{self, Column};
use crate::postgres::rights::{as_extension, as_owner, with_pinned_path};
use crate::postgres::spi::{self, Plan, Rows};

/// Enqueues keys of a table; how many. Keys of several columns are given as document ids (`1|a`).
#[pg_extern(sql = false)]
fn sync(relation: pg_sys::Oid, keys: AnyArray) -> i64 {
    primary_only(c"es_sync.sync()");
    check::require_owner(relation).or_raise();
    let key = columns_of(relation, &key_columns(relation));
    let keys = canonical_keys(owner(relation), &keys, &key);
    for parts in &keys {
        capture::note_key(relation.to_u32(), &key_of_parts(parts));
    }
    keys.len() as i64
}

/// Enqueues keys of a table, and what leads to documents elsewhere that show these rows; how many keys. Of a row that is
/// gone, only those documents are found that its key leads to.
#[pg_extern(sql = false)]
fn sync_full(relation: pg_sys::Oid, keys: AnyArray) -> i64 {
    primary_only(c"es_sync.sync_full()");
    check::require_owner(relation).or_raise();
    let (attached, notes, key_columns) = as_extension(|| {
        let attached = catalog::of_relation(relation, None).into_iter().next();
        let key_columns = attached.as_ref().map_or_else(|| relation::primary_key(relation), definition::key_columns);
        let mut notes = link::notes(relation);
        // What the key leads to elsewhere was found under the same names.
        let former = attached.iter().flat_map(|attached| &attached.key_columns).zip(&key_columns);
        let renamed: Vec<_> = former.filter(|(former, now)| former != now).collect();
        for name in notes.iter_mut().flat_map(|note| &mut note.columns) {
            if let Some((_, now)) = renamed.iter().find(|(former, _)| *former == name) {
                name.clone_from(now);
            }
        }
        (attached.is_some(), notes, key_columns)
    });
    if !attached && notes.is_empty() {
        as_extension(|| attach::attached(relation, None)).map(drop).or_raise();
    }
    if key_columns.is_empty() {
        Report::new(
            PgSqlErrorCode::ERRCODE_INVALID_TABLE_DEFINITION,
            format!("table {} has no primary key", spi::qualified(relation)),
        )
        .detail("Its rows are named by their key.")
        .hint("Add a primary key, or call es_sync.sync() with keys of the documents that show its rows.")
        .raise()
    }
    let owner = owner(relation);
    let key = columns_of(relation, &key_columns);
    let keys = canonical_keys(owner, &keys, &key);
    for parts in &keys {
        if attached {
            capture::note_key(relation.to_u32(), &key_of_parts(parts));
        }
        for note in &notes {
            let values = as_owner(owner, || values_of(relation, &key, parts, &note.columns));
            if let Some(values) = values {
                note_values(note, &values);
            }
        }
    }
    keys.len() as i64
}

/// The key columns of an attached table, by the names that they have now.
fn key_columns(relation: pg_sys::Oid) -> Vec<String> {
    as_extension(|| attach::attached(relation, None).map(|attached| definition::key_columns(&attached[0]))).or_raise()
}

/// Whose rights the checks of domains and the functions in partition keys and indexes run with, whoever calls.
fn owner(relation: pg_sys::Oid) -> pg_sys::Oid {
    as_extension(|| relation::owner(relation))
}

/// The values of a row's columns: from its key where that has them all, else as the row is now; None if it is gone.
fn values_of(
    relation: pg_sys::Oid,
    key: &[Column],
    parts: &[String],
    columns: &[String],
) -> Option<Vec<Option<String>>> {
    let of_key = |name: &String| Some(Some(parts.get(key.iter().position(|column| &column.name == name)?)?.clone()));
    if let Some(values) = columns.iter().map(of_key).collect() {
        return Some(values);
    }
    let select: Vec<String> = columns.iter().map(|name| spi::quoted(name)).collect();
    let equal: Vec<String> = key
        .iter()
        .enumerate()
        .map(|(place, column)| {
            let operator = as_extension(|| Operator::equal(column.type_oid)).qualified();
            format!("{} {operator} ${}::{}", spi::quoted(&column.name), place + 1, text_as(column.type_oid, ""))
        })
        .collect();
    let statement =
        format!("select {} from {} where {}", select.join(", "), spi::qualified(relation), equal.join(" and "));
    let types: Vec<pg_sys::Oid> = columns_of(relation, columns).iter().map(|column| column.type_oid).collect();
    let makers: Vec<key::Column> = types.iter().copied().map(key::Column::new).collect();
    with_pinned_path(|| {
        let parameters: Vec<_> = parts.iter().map(|part| spi::parameter(part.as_str())).collect();
        let rows = spi::run(&statement, &parameters).typed(&types);
        (!rows.is_empty()).then(|| {
            let value = |(place, maker): (usize, &key::Column)| {
                rows.datum(0, place + 1).map(|datum| {
                    let mut text = String::new();
                    // SAFETY: the statement returns these columns in this order.
                    unsafe { maker.text(datum, &mut text) };
                    text
                })
            };
            makers.iter().enumerate().map(value).collect()
        })
    })
}

fn note_values(note: &link::Note, values: &[Option<String>]) {
    if let Some(text) = note.text(values) {
        capture::note_key(note.source, &text);
    }
}

/// The keys of an array in their parts, nulls left out.
fn canonical_keys(owner: pg_sys::Oid, keys: &AnyArray, columns: &[Column]) -> Vec<Vec<String>> {
    let texts = element_texts(keys);
    as_owner(owner, || texts.iter().map(|text| key_parts(text, columns)).collect())
}

/// The parts of a key, in the text that capture would make of them.
fn key_parts(text: &str, columns: &[Column]) -> Vec<String> {
    let Some(parts) = key::parts(text, columns.len()) else {
        Report::new(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("\"{text}\" is not a key of {} columns", columns.len()),
        )
        .hint("Write the columns one after the other with | between them, as in a document's id.")
        .raise()
    };
    parts.iter().zip(columns).map(|(part, column)| canonical(part, column)).collect()
}

fn key_of_parts(parts: &[String]) -> String {
    if let [part] = parts {
        return part.clone();
    }
    let mut key = String::new();
    for (place, part) in parts.iter().enumerate() {
        key::push_part(&mut key, place == 0, part);
    }
    key
}

/// The columns of a table that have these names.
fn columns_of(relation: pg_sys::Oid, names: &[String]) -> Vec<Column> {
    let columns = relation::columns(relation);
    names.iter().filter_map(|name| columns.iter().find(|column| &column.name == name).cloned()).collect()
}

/// Rows taken from the cursor at once.
const FETCH: i64 = 1_000;

/// Enqueues the keys of the rows that match a condition; how many. The condition is the caller's, and is evaluated as
/// the caller, who owns the table.
#[pg_extern(sql = false)]
fn sync_where(relation: pg_sys::Oid, condition: &str) -> i64 {
    primary_only(c"es_sync.sync_where()");
    check::require_owner(relation).or_raise();
    let columns = columns_of(relation, &key_columns(relation));
    let table = check::require_condition(relation, condition).or_raise();
    let types: Vec<pg_sys::Oid> = columns.iter().map(|column| column.type_oid).collect();
    let key: Vec<key::Column> = types.iter().copied().map(key::Column::new).collect();
    let names: Vec<String> = columns.iter().map(|column| spi::quoted(&column.name)).collect();
    let statement = format!("select {} from {table} where (\n{condition}\n) is true", names.join(", "));
    with_pinned_path(|| {
        let plan = Plan::prepare(&statement, &[]);
        let cursor = plan.open(&[]);
        let mut count = 0;
        loop {
            let rows = cursor.fetch(FETCH).typed(&types);
            for row in 0..rows.len() {
                note_row(relation.to_u32(), &key, &rows, row);
            }
            count += rows.len() as i64;
            let ended = (rows.len() as i64) < FETCH;
            rows.free();
            if ended {
                cursor.close();
                return count;
            }
            pgrx::check_for_interrupts!();
        }
    })
}

fn note_row(source: u32, columns: &[key::Column], rows: &Rows, row: usize) {
    if let ([column], Some(datum)) = (columns, rows.datum(row, 1))
        && let Some(integer) = column.integer(datum)
    {
        capture::note_integer(source, integer);
        return;
    }
    let mut text = String::new();
    for (place, column) in columns.iter().enumerate() {
        let mut part = String::new();
        if let Some(datum) = rows.datum(row, place + 1) {
            // SAFETY: the statement returns the key columns in this order.
            unsafe { column.text(datum, &mut part) };
        }
        if columns.len() == 1 {
            text = part;
        } else {
            key::push_part(&mut text, place == 0, &part);
        }
    }
    capture::note_key(source, &text);
}

/// The elements' texts, nulls left out.
fn element_texts(array: &AnyArray) -> Vec<String> {
    let type_oid = array.oid();
    // SAFETY: the array is a live argument of an element type that getBaseType, get_element_type and the catalog know.
    unsafe {
        let element = pg_sys::get_element_type(pg_sys::getBaseType(type_oid));
        let (mut length, mut by_value, mut align) = (0, false, 0);
        pg_sys::get_typlenbyvalalign(element, &mut length, &mut by_value, &mut align);
        let (mut output, mut varlena) = (pg_sys::InvalidOid, false);
        pg_sys::getTypeOutputInfo(element, &mut output, &mut varlena);
        let (mut datums, mut nulls, mut count) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
        let plain = pg_sys::pg_detoast_datum(array.datum().cast_mut_ptr());
        pg_sys::deconstruct_array(
            plain.cast(),
            element,
            i32::from(length),
            by_value,
            align,
            &mut datums,
            &mut nulls,
            &mut count,
        );
        (0..count as usize)
            .filter(|place| !*nulls.add(*place))
            .map(|place| {
                let text = pg_sys::OidOutputFunctionCall(output, *datums.add(place));
                std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned()
            })
            .collect()
    }
}

/// The text that capture would make of this key: in and out of the column's type, with its length or scale. Of a domain it
/// is the type below: a row may be there whose key its checks would refuse now.
fn canonical(text: &str, column: &Column) -> String {
    let text = CString::new(text).unwrap_or_default();
    let mut out = String::new();
    // SAFETY: the input function raises for a text that is no value of the type; otherwise its result is one.
    unsafe {
        let (mut input, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
        let mut modifier = column.modifier;
        let base = pg_sys::getBaseTypeAndTypmod(column.type_oid, &mut modifier);
        pg_sys::getTypeInputInfo(base, &mut input, &mut parameter);
        let value = pg_sys::OidInputFunctionCall(input, text.as_ptr().cast_mut(), parameter, modifier);
        key::Column::new(column.type_oid).text(value, &mut out);
    }
    out
}
