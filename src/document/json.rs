//! A document's JSON, made of a row's values where the executor has them.
//!
//! Byte for byte what row_to_json makes. Values of the usual types are written here: Postgres would build a row of them,
//! look up how each is converted, and escape byte by byte. Any other one comes as the JSON that to_json makes of it.

use pgrx::{PgSqlErrorCode, pg_sys};

use crate::postgres::error::Report;
use crate::postgres::spi::{self, Slot};

/// What a text of Postgres' own may hold. Without a limit, a row of large values could take all the memory there is.
const MOST_BYTES: usize = 0x3fff_ffff;

/// How a value becomes JSON.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Encoding {
    Boolean,
    Int2,
    Int4,
    Int8,
    Numeric,
    /// text and its kin: the bytes of the value are those of the text.
    Text,
    /// date, timestamp, timestamptz.
    Time(pg_sys::Oid),
    /// JSON already.
    Json,
}

/// What the columns of a statement make.
pub enum Template {
    /// One column is the document, or null where there is none.
    Whole,
    /// A column for each field; where rows are `filtered`, one before them that says whether the row has a document.
    Fields { fields: Vec<Field>, filtered: bool },
}

/// A field of a document.
pub struct Field {
    /// All that stands before the value.
    before: Box<[u8]>,
    encoding: Encoding,
}

impl Template {
    /// Names of fields and how their values become JSON, in the statement's order. There is one at least, of the key.
    pub fn of_fields<'a>(fields: impl Iterator<Item = (&'a str, Encoding)>, filtered: bool) -> Self {
        let field = |(place, (name, encoding)): (usize, (&str, Encoding))| {
            let mut before = vec![if place == 0 { b'{' } else { b',' }];
            // A name has 63 bytes.
            let _ = push_string(&mut before, name.as_bytes());
            before.push(b':');
            Field { before: before.into(), encoding }
        };
        Self::Fields { fields: fields.enumerate().map(field).collect(), filtered }
    }

    /// Appends a row's document; its columns begin at `first` (from 1). False if the row has none. Raises
    /// program_limit_exceeded where it is too large for Postgres, too.
    pub fn write(&self, row: &Slot, first: usize, out: &mut Vec<u8>) -> bool {
        let Self::Fields { fields, filtered } = self else {
            let Some(document) = row.datum(first) else { return false };
            // SAFETY: the column is of type json.
            unsafe { spi::with_bytes(document, |bytes| append(out, bytes)) }.unwrap_or_else(TooLarge::raise);
            return true;
        };
        if *filtered && !row.datum(first).is_some_and(is_true) {
            return false;
        }
        let first = first + usize::from(*filtered);
        for (place, field) in fields.iter().enumerate() {
            out.extend_from_slice(&field.before);
            match row.datum(first + place) {
                // SAFETY: `Shape` pairs columns and fields.
                Some(value) => unsafe { field.encoding.write(value, out) }.unwrap_or_else(TooLarge::raise),
                None => out.extend_from_slice(b"null"),
            }
        }
        out.push(b'}');
        true
    }
}

fn is_true(boolean: pg_sys::Datum) -> bool {
    boolean.value() as u8 != 0
}

impl Encoding {
    /// # Safety
    /// `value` is a non-null value of the type that this stands for.
    unsafe fn write(self, value: pg_sys::Datum, out: &mut Vec<u8>) -> Result<(), TooLarge> {
        let integer = |integer: i64, out: &mut Vec<u8>| {
            out.extend_from_slice(itoa::Buffer::new().format(integer).as_bytes());
        };
        // SAFETY: the caller's.
        unsafe {
            match self {
                Encoding::Boolean => out.extend_from_slice(if is_true(value) { b"true" } else { b"false" }),
                Encoding::Int2 => integer(value.value() as i16 as i64, out),
                Encoding::Int4 => integer(value.value() as i32 as i64, out),
                Encoding::Int8 => integer(value.value() as i64, out),
                Encoding::Numeric => push_numeric(value, out),
                Encoding::Text => spi::with_bytes(value, |text| push_string(out, text))?,
                Encoding::Time(kind) => push_time(value, kind, out),
                Encoding::Json => spi::with_bytes(value, |json| append(out, json))?,
            }
        }
        Ok(())
    }
}

unsafe extern "C-unwind" {
    // Declared anew because pgrx wraps it in a function that Postgres cannot call.
    fn numeric_out(call: pg_sys::FunctionCallInfo) -> pg_sys::Datum;
}

/// # Safety
/// `value` is a numeric.
unsafe fn push_numeric(value: pg_sys::Datum, out: &mut Vec<u8>) {
    // SAFETY: the function takes a numeric and returns a palloc'd C string.
    unsafe {
        let text = pg_sys::DirectFunctionCall1Coll(Some(numeric_out), pg_sys::InvalidOid, value);
        let text = text.cast_mut_ptr::<std::ffi::c_char>();
        let digits = std::ffi::CStr::from_ptr(text).to_bytes();
        if digits.last().is_some_and(u8::is_ascii_digit) {
            out.extend_from_slice(digits);
        } else {
            // NaN and the infinities.
            let _ = push_string(out, digits);
        }
        pg_sys::pfree(text.cast());
    }
}

/// # Safety
/// `value` is of the type `kind`, which is one of date, timestamp and timestamptz.
unsafe fn push_time(value: pg_sys::Datum, kind: pg_sys::Oid, out: &mut Vec<u8>) {
    let mut buffer = [0 as std::ffi::c_char; pg_sys::MAXDATELEN as usize + 1];
    // SAFETY: the buffer has the size that Postgres uses itself; the text in it ends with a NUL.
    let text = unsafe {
        pg_sys::JsonEncodeDateTime(buffer.as_mut_ptr(), value, kind, std::ptr::null());
        std::ffi::CStr::from_ptr(buffer.as_ptr())
    };
    out.push(b'"');
    out.extend_from_slice(text.to_bytes());
    out.push(b'"');
}

fn push_string(out: &mut Vec<u8>, text: &[u8]) -> Result<(), TooLarge> {
    out.push(b'"');
    let mut rest = text;
    while let Some(place) = first_to_escape(rest) {
        append(out, &rest[..place])?;
        push_escaped(out, rest[place]);
        rest = &rest[place + 1..];
    }
    append(out, rest)?;
    out.push(b'"');
    Ok(())
}

/// What would make a document longer than `MOST_BYTES`.
#[derive(Debug)]
struct TooLarge;

impl TooLarge {
    fn raise(self) {
        Report::new(PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED, "document is larger than 1 GB")
            .hint("Exclude the columns that need not be searched.")
            .raise();
    }
}

fn append(out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), TooLarge> {
    if out.len() + bytes.len() > MOST_BYTES {
        return Err(TooLarge);
    }
    out.extend_from_slice(bytes);
    Ok(())
}

fn first_to_escape(text: &[u8]) -> Option<usize> {
    // Without a branch, so that the compiler looks at all bytes of a block at once.
    const BLOCK: usize = 16;
    let is_escaped = |byte: &u8| (*byte < b' ') | (*byte == b'"') | (*byte == b'\\');
    let has_none = |block: &&[u8]| block.iter().fold(0, |found, byte| found | u8::from(is_escaped(byte))) == 0;
    let clean = text.chunks_exact(BLOCK).take_while(has_none).count() * BLOCK;
    text[clean..].iter().position(is_escaped).map(|place| clean + place)
}

fn push_escaped(out: &mut Vec<u8>, byte: u8) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let short = match byte {
        b'"' | b'\\' => byte,
        b'\n' => b'n',
        b'\r' => b'r',
        b'\t' => b't',
        0x08 => b'b',
        0x0c => b'f',
        _ => {
            out.extend_from_slice(b"\\u00");
            return out.extend([DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
        }
    };
    out.extend([b'\\', short]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_string_is_escaped_wherever_it_must_be_and_nowhere_else() {
        let every: String = (1..0x300).filter_map(char::from_u32).collect();
        for text in ["", "plain", "\"", "\\\"", "é\u{7f}\u{2028}", &"x".repeat(31), &every, &every.repeat(3)] {
            for begin in (0..text.len().min(70)).filter(|place| text.is_char_boundary(*place)) {
                let mut out = Vec::new();
                push_string(&mut out, &text.as_bytes()[begin..]).unwrap();
                assert_eq!(String::from_utf8(out).unwrap(), serde_json::to_string(&text[begin..]).unwrap());
            }
        }
    }
}
