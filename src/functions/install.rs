//! Called by the extension's script.

use pgrx::PgSqlErrorCode;
use pgrx::prelude::*;

use crate::capture;
use crate::postgres::error::Report;
use crate::shared;

/// Fails where the library was not preloaded; otherwise tells the launcher, once CREATE EXTENSION has committed.
#[pg_extern(sql = false)]
fn require_preload() {
    if shared::shared().is_none() {
        Report::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "pg_es_sync must be loaded via shared_preload_libraries",
        )
        .detail("Its worker and its shared memory are set up when the server starts.")
        .hint("Add pg_es_sync to shared_preload_libraries and restart the server.")
        .raise();
    }
    capture::announce_extension_change();
}
