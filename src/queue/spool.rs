//! Rows of the queue that the worker writes itself: what a link's values led to, when that is much.

use pgrx::pg_sys;

use super::claim::{self, Place};
use crate::attachment::link;
use crate::postgres::spi;

/// Bytes of keys in one row: with its header it fits a page.
const ROW_BYTES: usize = 7_600;

/// The highest id that such a row may have: the end of es_sync.spooled. Ids of writers are above, for they begin with the
/// clock.
pub const LAST_SPOOLED: i64 = 281_474_976_710_655;

/// Puts rows of a link in the place of others: keys that were found, and what is still to be looked for, if anything.
///
/// Their ids are lower than those of all writers, so that whoever waits for what was replaced waits for them too.
pub fn replace(places: &[Place], source: u32, enqueued_at: i64, found: Vec<String>, rest: Option<Vec<String>>) {
    let mut row: Vec<String> = Vec::new();
    let mut bytes = 0;
    for key in found {
        if bytes + key.len() + 8 > ROW_BYTES {
            insert(source, enqueued_at, std::mem::take(&mut row));
            bytes = 0;
        }
        if row.is_empty() {
            row.push(link::FOUND.to_owned());
        }
        bytes += key.len() + 8;
        row.push(key);
    }
    if !row.is_empty() {
        insert(source, enqueued_at, row);
    }
    if let Some(rest) = rest {
        insert(source, enqueued_at, rest);
    }
    claim::acknowledge(places);
}

fn insert(source: u32, enqueued_at: i64, keys: Vec<String>) {
    // A timestamptz is its microseconds, by value.
    let time = pg_sys::Datum::from(enqueued_at);
    spi::run(
        "insert into es_sync.queue (id, source, count, enqueued_at, keys)
         values (pg_catalog.nextval('es_sync.spooled'), $1, $2, $3, $4)",
        &[
            (pg_sys::OIDOID, spi::value(pg_sys::Oid::from(source))),
            (pg_sys::INT4OID, spi::value(keys.len() as i32)),
            (pg_sys::TIMESTAMPTZOID, Some(time)),
            (pg_sys::TEXTARRAYOID, spi::value(keys)),
        ],
    );
}
