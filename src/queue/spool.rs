//! Rows of the queue that the worker writes itself: what a link's values led to, when that is much.

use pgrx::pg_sys;

use super::claim::{self, Place};
use super::keys::Keys;
use crate::attachment::link;
use crate::postgres::spi;

/// The highest id that such a row may have: the end of es_sync.spooled. Ids of writers are above, for they begin with the
/// clock.
pub const LAST_SPOOLED: i64 = 281_474_976_710_655;

/// Puts rows of a link in the place of others: keys that were found, and what is still to be looked for, if anything.
///
/// Their ids are lower than those of all writers, so that whoever waits for what was replaced waits for them too.
pub fn replace(places: &[Place], source: u32, enqueued_at: i64, found: &[String], rest: Option<&[String]>) {
    let mut row = Keys::default();
    for key in found {
        if row.is_full_for(key.len()) {
            insert(source, enqueued_at, &row);
            row.clear();
        }
        if row.is_empty() {
            row.push_text(link::FOUND);
        }
        row.push_text(key);
    }
    if !row.is_empty() {
        insert(source, enqueued_at, &row);
    }
    if let Some(rest) = rest {
        let mut row = Keys::default();
        rest.iter().for_each(|text| row.push_text(text));
        insert(source, enqueued_at, &row);
    }
    claim::acknowledge(places);
}

fn insert(source: u32, enqueued_at: i64, keys: &Keys) {
    // A timestamptz is its microseconds, by value.
    let time = pg_sys::Datum::from(enqueued_at);
    spi::run(
        "insert into es_sync.queue (id, source, count, enqueued_at, keys)
         values (pg_catalog.nextval('es_sync.spooled'), $1, $2, $3, $4)",
        &[
            spi::parameter(pg_sys::Oid::from(source)),
            spi::parameter(keys.count() as i32),
            (pg_sys::TIMESTAMPTZOID, Some(time)),
            spi::parameter(keys.bytes()),
        ],
    );
}
