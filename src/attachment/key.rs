//! Keys: their text in the queue, and the document ids made of them.
//!
//! A key's text must not depend on the session that wrote it (DateStyle, TimeZone, bytea_output, ...), and two
//! different keys must never share a text. Writers and the worker make it with the same function: [`Column::text`].

use std::borrow::Cow;
use std::fmt::Write;

use pgrx::pg_sys;

use crate::postgres::spi;
use crate::postgres::transaction::{self, Scope};

/// How the text of one key column is made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Column {
    /// The column's type, domains resolved.
    kind: Kind,
    is_varlena: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Int2,
    Int4,
    Int8,
    Text,
    /// Anything else, by its output function; `fixed` if that depends on no setting.
    Other {
        output: pg_sys::Oid,
        fixed: bool,
    },
}

impl Column {
    /// The way to a text for values of type `type_oid`. Needs a transaction (syscache).
    pub fn new(type_oid: pg_sys::Oid) -> Self {
        // SAFETY: syscache lookups on the main thread, inside a transaction.
        let (base, output, is_varlena) = unsafe {
            let base = pg_sys::getBaseType(type_oid);
            let mut output = pg_sys::InvalidOid;
            let mut is_varlena = false;
            pg_sys::getTypeOutputInfo(base, &mut output, &mut is_varlena);
            (base, output, is_varlena)
        };
        let kind = match base {
            pg_sys::INT2OID => Kind::Int2,
            pg_sys::INT4OID => Kind::Int4,
            pg_sys::INT8OID => Kind::Int8,
            pg_sys::TEXTOID | pg_sys::VARCHAROID => Kind::Text,
            _ if is_object(base) => Kind::Other { output: pg_sys::Oid::from(pg_sys::F_OIDOUT), fixed: true },
            _ => Kind::Other {
                output,
                fixed: matches!(
                    base,
                    pg_sys::UUIDOID | pg_sys::BPCHAROID | pg_sys::NUMERICOID | pg_sys::BOOLOID | pg_sys::OIDOID
                ),
            },
        };
        Self { kind, is_varlena }
    }

    /// True for integers, whose equal values have equal texts whatever their size.
    pub fn is_integer(self) -> bool {
        matches!(self.kind, Kind::Int2 | Kind::Int4 | Kind::Int8)
    }

    /// The value as an integer, where the type is one: the writers' short cut.
    pub fn integer(self, datum: pg_sys::Datum) -> Option<i64> {
        match self.kind {
            Kind::Int2 => Some(datum.value() as i16 as i64),
            Kind::Int4 => Some(datum.value() as i32 as i64),
            Kind::Int8 => Some(datum.value() as i64),
            _ => None,
        }
    }

    /// Appends the value's text to `out`.
    ///
    /// # Safety
    /// `datum` is a non-null value of the type that this was made for.
    pub unsafe fn text(self, datum: pg_sys::Datum, out: &mut String) {
        // SAFETY: the caller's.
        unsafe { self.text_within(usize::MAX, datum, out) };
    }

    /// The same; false, and nothing is appended, where the value or its text has more than `limit` bytes. Memory
    /// that Rust does not get is no error that can be caught: the whole server would restart.
    ///
    /// # Safety
    /// As `text`.
    pub unsafe fn text_within(self, limit: usize, datum: pg_sys::Datum, out: &mut String) -> bool {
        // SAFETY: the caller's; what is no varlena is not looked at as one.
        unsafe {
            if self.is_varlena && spi::raw_bytes(datum) > limit {
                return false;
            }
            match self.kind {
                Kind::Int2 | Kind::Int4 | Kind::Int8 => {
                    let _ = write!(out, "{}", self.integer(datum).unwrap_or_default());
                    true
                }
                Kind::Text => {
                    spi::with_bytes(datum, |text| out.push_str(&to_utf8(text)));
                    true
                }
                Kind::Other { output, fixed: true } => append_output(output, limit, datum, out),
                Kind::Other { output, fixed: false } => transaction::with_nested_settings(|| {
                    pin_output_settings(Scope::Nested);
                    append_output(output, limit, datum, out)
                }),
            }
        }
    }
}

/// True for types whose values stand for objects of the catalog. The name that they are written as depends on the search
/// path, and is another one tomorrow or nobody's; the OID is not.
pub fn is_object(type_oid: pg_sys::Oid) -> bool {
    // SAFETY: a syscache lookup in a live transaction.
    let base = unsafe { pg_sys::getBaseType(type_oid) };
    matches!(
        base,
        pg_sys::REGCLASSOID
            | pg_sys::REGCOLLATIONOID
            | pg_sys::REGCONFIGOID
            | pg_sys::REGDICTIONARYOID
            | pg_sys::REGNAMESPACEOID
            | pg_sys::REGOPEROID
            | pg_sys::REGOPERATOROID
            | pg_sys::REGPROCOID
            | pg_sys::REGPROCEDUREOID
            | pg_sys::REGROLEOID
            | pg_sys::REGTYPEOID
    )
}

/// Sets every setting that the text of a value can depend on.
pub fn pin_output_settings(scope: Scope) {
    for (name, value) in [
        (c"datestyle", c"ISO, YMD"),
        (c"intervalstyle", c"iso_8601"),
        (c"timezone", c"UTC"),
        (c"extra_float_digits", c"1"),
        (c"bytea_output", c"hex"),
        (c"lc_monetary", c"C"),
        (c"xmlbinary", c"base64"),
    ] {
        transaction::set(name, value, scope);
    }
}

unsafe fn append_output(output: pg_sys::Oid, limit: usize, datum: pg_sys::Datum, out: &mut String) -> bool {
    // SAFETY: the caller pairs output function and datum; the result is a palloc'd C string.
    unsafe {
        let text = pg_sys::OidOutputFunctionCall(output, datum);
        let bytes = std::ffi::CStr::from_ptr(text).to_bytes();
        let fits = bytes.len() <= limit;
        if fits {
            out.push_str(&to_utf8(bytes));
        }
        pg_sys::pfree(text.cast());
        fits
    }
}

/// Server text is UTF-8 where attach allows a table at all.
fn to_utf8(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// Stands between the parts of a key of several columns.
pub const SEPARATOR: char = '|';

/// Appends one part of a key of several columns, so that no two different keys can share a text.
pub fn push_part(key: &mut String, first: bool, part: &str) {
    if !first {
        key.push(SEPARATOR);
    }
    for character in part.chars() {
        if matches!(character, SEPARATOR | '\\') {
            key.push('\\');
        }
        key.push(character);
    }
}

/// Takes a key of several columns apart again.
///
/// # Errors
/// None if the text is not one that `push_part` makes for `columns` parts.
pub fn parts(key: &str, columns: usize) -> Option<Vec<String>> {
    if columns == 1 {
        return Some(vec![key.to_owned()]);
    }
    let mut parts = vec![String::new()];
    let mut characters = key.chars();
    while let Some(character) = characters.next() {
        match character {
            SEPARATOR => parts.push(String::new()),
            '\\' => parts.last_mut()?.push(characters.next()?),
            other => parts.last_mut()?.push(other),
        }
    }
    (parts.len() == columns).then_some(parts)
}

/// The engine's limit for an `_id`, in bytes.
pub const MAX_ID_BYTES: usize = 512;

/// The document id of a key: the key's text, except that the engine knows no empty id. An empty key becomes a single
/// backslash, and a leading backslash is doubled to make room for that.
pub fn document_id(key: &str) -> Cow<'_, str> {
    if key.is_empty() {
        Cow::Borrowed("\\")
    } else if key.starts_with('\\') {
        Cow::Owned(format!("\\{key}"))
    } else {
        Cow::Borrowed(key)
    }
}

/// True if the engine refuses the key's document id.
pub fn is_too_long(key: &str) -> bool {
    document_id(key).len() > MAX_ID_BYTES
}

/// The key whose document has this id.
pub fn of_document_id(id: &str) -> String {
    id.strip_prefix('\\').unwrap_or(id).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(parts: &[&str]) -> String {
        let mut key = String::new();
        for (index, part) in parts.iter().enumerate() {
            push_part(&mut key, index == 0, part);
        }
        key
    }

    #[test]
    fn keys_of_several_columns_come_apart_as_they_were() {
        for parts_in in
            [["a", "b"], ["a|", "b"], ["a", "|b"], ["a\\", "|b"], ["", ""], ["\\|", "\\\\"], ["ä|ö", "\u{1F600}"]]
        {
            assert_eq!(parts(&joined(&parts_in), 2).as_deref(), Some(&parts_in.map(String::from)[..]));
        }
    }

    #[test]
    fn different_keys_never_share_a_document_id() {
        let words = ["", "|", "\\", "a", "a|", "|a", "\\|", "|\\"];
        let mut ids = std::collections::HashSet::new();
        for a in words {
            for b in words {
                assert!(ids.insert(document_id(&joined(&[a, b])).into_owned()), "{a:?}, {b:?}");
            }
        }
        let singles: std::collections::HashSet<_> = words.iter().map(|word| document_id(word)).collect();
        assert_eq!(singles.len(), words.len());
    }

    #[test]
    fn a_document_id_leads_back_to_its_key() {
        for key in ["", "\\", "\\x", "a", "a\\", "\\\\", "|"] {
            assert_eq!(of_document_id(&document_id(key)), key);
        }
    }

    #[test]
    fn a_document_id_is_never_empty() {
        for key in ["", "\\", "\\x", "a", "a\\"] {
            assert!(!document_id(key).is_empty());
        }
    }

    #[test]
    fn a_malformed_key_is_refused() {
        assert_eq!(parts("a", 2), None);
        assert_eq!(parts("a|b|c", 2), None);
        assert_eq!(parts("a|b\\", 2), None);
    }
}
