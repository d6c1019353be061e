//! Reading documents: by keys, or page by page in the order of the key.

use std::rc::Rc;

use pgrx::pg_sys;
use serde_json::json;

use super::shape::{Dialect, Shape};
use crate::attachment::catalog::Attachment;
use crate::attachment::key;
use crate::postgres::error::SqlError;
use crate::postgres::spi::{self, Plan, Rows, Value};
use crate::postgres::transaction;

/// Reads one attachment's documents. Its statements stay prepared; make it anew when the attachment changes.
pub struct Reader {
    shape: Shape,
    by_keys: Option<Plan>,
    first_page: Option<Plan>,
    next_page: Option<Plan>,
    /// Rows taken from the cursor at once: adapted to the documents' size, so that memory stays bounded.
    fetch: i64,
    mapping: Option<Rc<str>>,
}

/// A row as it was read.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    pub key: &'a str,
    /// Where its document lies; None where that depends on its id alone.
    pub routing: Option<&'a str>,
    /// One line of JSON; None if the row has no document.
    pub document: Option<&'a [u8]>,
}

/// Bytes of documents that one fetch aims at.
const FETCH_BYTES: usize = 512 * 1024;
const MAX_FETCH: i64 = 2_000;

impl Reader {
    pub fn new(shape: Shape) -> Self {
        // One row tells how large documents are, and the fetch then grows fourfold. A first fetch of more would hold as
        // many documents, of 5 MB for instance.
        Self { shape, by_keys: None, first_page: None, next_page: None, fetch: 1, mapping: None }
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The fields that an index needs for these documents, as the body of a request.
    pub fn mapping(&mut self, attachment: &Attachment, dialect: Dialect) -> Rc<str> {
        let Self { shape, mapping, .. } = self;
        mapping
            .get_or_insert_with(|| {
                let properties = shape.mappings(attachment, dialect, false)["properties"].take();
                json!({ "properties": properties }).to_string().into()
            })
            .clone()
    }

    /// Reads the rows of `keys` that exist, as they are in the active snapshot; without a routing, those that have no
    /// document may be left out. `found` says whether to go on.
    ///
    /// Returns true if all rows were read: a key that was not found then has no document.
    pub fn by_keys(&mut self, keys: &[&str], found: impl FnMut(Row) -> bool) -> bool {
        let columns = self.shape.key.len();
        let mut values: Vec<Vec<String>> = vec![Vec::with_capacity(keys.len()); columns];
        for key in keys {
            // A text that is no key of this table has no row, and so no document.
            for (column, part) in values.iter_mut().zip(key::parts(key, columns).into_iter().flatten()) {
                column.push(part);
            }
        }
        let Self { shape, by_keys, fetch, .. } = self;
        transaction::as_owner(shape.owner, || {
            let plan =
                by_keys.get_or_insert_with(|| Plan::prepare(&shape.by_keys, &vec![pg_sys::TEXTARRAYOID; columns]));
            let values: Vec<Value> = values.into_iter().map(spi::value).collect();
            read(plan, &values, shape, fetch, found)
        })
    }

    /// Reads at the most `limit` rows that follow the key `after`, in the order of the key. `found` as in `by_keys`.
    ///
    /// Returns true if it was not stopped by `found`.
    pub fn page(&mut self, after: Option<&str>, limit: i64, found: impl FnMut(Row) -> bool) -> bool {
        let columns = self.shape.key.len();
        let parts = after.and_then(|after| key::parts(after, columns));
        let Self { shape, first_page, next_page, fetch, .. } = self;
        transaction::as_owner(shape.owner, || match parts {
            None => {
                let plan = first_page.get_or_insert_with(|| Plan::prepare(&shape.first_page, &[pg_sys::INT8OID]));
                read(plan, &[spi::value(limit)], shape, fetch, found)
            }
            Some(parts) => {
                let plan = next_page.get_or_insert_with(|| {
                    let mut types = vec![pg_sys::TEXTOID; columns];
                    types.push(pg_sys::INT8OID);
                    Plan::prepare(&shape.next_page, &types)
                });
                let mut values: Vec<Value> = parts.into_iter().map(spi::value).collect();
                values.push(spi::value(limit));
                read(plan, &values, shape, fetch, found)
            }
        })
    }

    /// True if a row could have this key: its parts are values of the key columns' types.
    ///
    /// # Errors
    /// What Postgres said, unless that is about the key.
    pub fn is_key(&self, text: &str) -> Result<bool, SqlError> {
        let Some(parts) = key::parts(text, self.shape.key.len()) else { return Ok(false) };
        let parts: Vec<_> = parts.into_iter().map(|part| (pg_sys::TEXTOID, spi::value(part))).collect();
        // The type may be a domain, whose check runs its owner's functions.
        let check = || transaction::as_owner(self.shape.owner, || spi::run(&self.shape.key_check, &parts).len());
        match transaction::run(check) {
            Ok(_) => Ok(true),
            Err(error) if error.is_in_the_data() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The key of the row that follows `after`, without its document: for a row that cannot be read.
    pub fn next_key(&mut self, after: Option<&str>) -> Option<String> {
        let shape = &self.shape;
        let parts = after.and_then(|after| key::parts(after, shape.key.len()));
        transaction::as_owner(shape.owner, || {
            let rows = match parts {
                None => spi::run(&shape.first_key, &[]),
                Some(parts) => {
                    let parts: Vec<_> = parts.into_iter().map(|part| (pg_sys::TEXTOID, spi::value(part))).collect();
                    spi::run(&shape.next_key, &parts)
                }
            };
            let mut text = String::new();
            (!rows.is_empty()).then(|| {
                key_of(&rows, 0, &shape.key, &mut text);
                text
            })
        })
    }
}

fn read(plan: &Plan, values: &[Value], shape: &Shape, fetch: &mut i64, mut found: impl FnMut(Row) -> bool) -> bool {
    let cursor = plan.open(values);
    let columns = shape.key.len();
    let (mut text, mut routing) = (String::new(), String::new());
    loop {
        let rows = cursor.fetch(*fetch);
        let mut bytes = 0;
        for row in 0..rows.len() {
            key_of(&rows, row, &shape.key, &mut text);
            if let Some(column) = shape.routing {
                routing.clear();
                if let Some(datum) = rows.datum(row, columns + 1) {
                    // SAFETY: the statement returns the routing behind the key columns.
                    unsafe { column.text(datum, &mut routing) };
                }
            }
            // The engine takes an empty routing for none.
            let bare = Row { key: &text, routing: (!routing.is_empty()).then_some(&routing), document: None };
            let document = columns + 1 + usize::from(shape.routing.is_some());
            let go_on = rows.with_bytes(row, document, |document| {
                bytes += document.len();
                found(Row { document: Some(document), ..bare })
            });
            if !go_on.unwrap_or_else(|| found(bare)) {
                cursor.close();
                return false;
            }
        }
        let last = (rows.len() as i64) < *fetch;
        if !rows.is_empty() {
            let fitting = (FETCH_BYTES * rows.len() / bytes.max(1)) as i64;
            *fetch = fitting.clamp(1, (*fetch * 4).min(MAX_FETCH));
        }
        rows.free();
        if last {
            cursor.close();
            return true;
        }
    }
}

pub(super) fn key_of(rows: &Rows, row: usize, columns: &[key::Column], text: &mut String) {
    text.clear();
    if let [column] = columns {
        if let Some(datum) = rows.datum(row, 1) {
            // SAFETY: the statement returns the key columns first, in the order of `columns`.
            unsafe { column.text(datum, text) };
        }
        return;
    }
    let mut part = String::new();
    for (index, column) in columns.iter().enumerate() {
        part.clear();
        if let Some(datum) = rows.datum(row, index + 1) {
            // SAFETY: as above.
            unsafe { column.text(datum, &mut part) };
        }
        key::push_part(text, index == 0, &part);
    }
}
