//! Dead letters: documents that the engine or Postgres refused for good, with the reason.

use pgrx::pg_sys;

use crate::attachment::key;
use crate::postgres::spi;

/// A refused document.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    pub attachment: i32,
    pub key: String,
    /// HTTP status, if the engine refused it.
    pub status: Option<i32>,
    /// The engine's error type, or an SQLSTATE.
    pub kind: String,
    pub reason: String,
    pub attempts: i32,
}

/// Parks it; a document that was parked before keeps its first time.
pub fn park(letter: &DeadLetter) {
    spi::run(
        "insert into es_sync.dead_letter as d (attachment, key, document_id, status, kind, reason, attempts)
         select a.id, $2, $3, $4, $5, $6, $7 from es_sync.attachment a where a.id = $1
         on conflict (attachment, key) do update
         set status = excluded.status, kind = excluded.kind, reason = excluded.reason,
             attempts = d.attempts + excluded.attempts, last_failed_at = excluded.last_failed_at",
        &[
            (pg_sys::INT4OID, spi::value(letter.attachment)),
            (pg_sys::TEXTOID, spi::value(letter.key.as_str())),
            (pg_sys::TEXTOID, spi::value(&*key::document_id(&letter.key))),
            (pg_sys::INT4OID, letter.status.and_then(spi::value)),
            (pg_sys::TEXTOID, spi::value(letter.kind.as_str())),
            (pg_sys::TEXTOID, spi::value(letter.reason.as_str())),
            (pg_sys::INT4OID, spi::value(letter.attempts)),
        ],
    );
}

/// Forgets a document's dead letter: a later version of it was taken.
pub fn clear(attachment: i32, key: &str) {
    spi::run(
        "delete from es_sync.dead_letter d where d.attachment = $1 and d.key = $2",
        &[(pg_sys::INT4OID, spi::value(attachment)), (pg_sys::TEXTOID, spi::value(key))],
    );
}

/// Attachment and key of every dead letter.
pub fn all() -> Vec<(i32, String)> {
    let rows = spi::run("select d.attachment, d.key from es_sync.dead_letter d", &[]);
    (0..rows.len()).filter_map(|row| Some((rows.get(row, 1)?, rows.get(row, 2)?))).collect()
}
