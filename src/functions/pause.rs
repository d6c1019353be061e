//! es_sync.pause, es_sync.resume.

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::primary_only;
use crate::attachment::pause as pauses;
use crate::postgres::error::OrRaise;

#[pg_extern(sql = false)]
fn pause(relation: Option<pg_sys::Oid>, index: Option<String>) {
    primary_only(c"es_sync.pause()");
    pauses::pause(relation, index.as_deref()).or_raise();
}

#[pg_extern(sql = false)]
fn resume(relation: Option<pg_sys::Oid>, index: Option<String>) {
    primary_only(c"es_sync.resume()");
    pauses::resume(relation, index.as_deref()).or_raise();
}
