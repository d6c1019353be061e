//! es_sync.sync: index what is there, delete what is not.

use std::ffi::CString;

use pgrx::prelude::*;
use pgrx::{AnyArray, PgSqlErrorCode, pg_sys};

use crate::attachment::attach as attachments;
use crate::attachment::{catalog, key};
use crate::capture;
use crate::postgres::error::{OrRaise, Report};

/// Enqueues keys of a table; how many. Keys of several columns are given as document ids (`1|a`).
#[pg_extern(sql = false)]
fn sync(relation: pg_sys::Oid, keys: AnyArray) -> i64 {
    attachments::require_owner(relation).or_raise();
    let attachment = attachments::as_extension(|| attachments::attached(relation, None)).or_raise().remove(0);
    let columns = catalog::columns(relation);
    let types: Vec<pg_sys::Oid> = attachment
        .key_columns
        .iter()
        .filter_map(|name| columns.iter().find(|column| &column.name == name).map(|column| column.type_oid))
        .collect();
    let texts = element_texts(&keys);
    for text in &texts {
        let Some(parts) = key::parts(text, types.len()) else {
            Report::new(
                PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                format!("\"{text}\" is not a key of {} columns", types.len()),
            )
            .hint("Write the columns one after the other with | between them, as in a document's id.")
            .raise()
        };
        let mut key = String::new();
        for (place, (part, type_oid)) in parts.iter().zip(&types).enumerate() {
            let canonical = canonical(part, *type_oid);
            if types.len() == 1 {
                key = canonical;
            } else {
                key::push_part(&mut key, place == 0, &canonical);
            }
        }
        capture::note_key(relation.to_u32(), &key);
    }
    texts.len() as i64
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

/// The text that capture would make of this key: in and out of the column's type.
fn canonical(text: &str, type_oid: pg_sys::Oid) -> String {
    let text = CString::new(text).unwrap_or_default();
    let mut out = String::new();
    // SAFETY: the input function raises for a text that is no value of the type; otherwise its result is one.
    unsafe {
        let (mut input, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
        pg_sys::getTypeInputInfo(type_oid, &mut input, &mut parameter);
        let value = pg_sys::OidInputFunctionCall(input, text.as_ptr().cast_mut(), parameter, -1);
        key::Column::new(type_oid).text(value, &mut out);
    }
    out
}
