//! es_sync.attach, es_sync.detach, es_sync.relate, es_sync.reindex, es_sync.verify, es_sync.take_over.

use pgrx::prelude::*;
use pgrx::{JsonB, PgSqlErrorCode, pg_sys};

use super::primary_only;
use crate::attachment::attach::{self, Request};
use crate::attachment::options::Options;
use crate::postgres::error::{OrRaise, Report};

/// An argument that may not be null.
fn required<T>(value: Option<T>, name: &str) -> T {
    value
        .ok_or_else(|| {
            Report::new(PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED, format!("argument \"{name}\" must not be null"))
        })
        .or_raise()
}

#[pg_extern(sql = false)]
fn attach(
    relation: Option<pg_sys::Oid>,
    index: Option<String>,
    document: Option<pg_sys::Oid>,
    filter: Option<String>,
    exclude: Option<Vec<Option<String>>>,
    options: Option<JsonB>,
) -> i64 {
    super::require_preload();
    primary_only(c"es_sync.attach()");
    attach::attach(Request {
        relation: required(relation, "relation"),
        index,
        document,
        filter: filter.filter(|filter| !filter.trim().is_empty()),
        exclude: exclude.unwrap_or_default().into_iter().flatten().collect(),
        options: options.map_or_else(|| Ok(Options::default()), |options| Options::parse(&options.0)).or_raise(),
    })
    .or_raise()
}

#[pg_extern(sql = false)]
fn detach(relation: Option<pg_sys::Oid>, index: Option<String>, drop_index: Option<bool>) {
    primary_only(c"es_sync.detach()");
    attach::detach(required(relation, "relation"), index.as_deref(), drop_index == Some(true)).or_raise();
}

#[pg_extern(sql = false)]
fn relate(relation: Option<pg_sys::Oid>, related: Option<pg_sys::Oid>, via: Option<&str>) {
    primary_only(c"es_sync.relate()");
    let via = via.filter(|via| !via.trim().is_empty());
    attach::relate(required(relation, "relation"), required(related, "related"), via).or_raise();
}

#[pg_extern(sql = false)]
fn reindex(relation: Option<pg_sys::Oid>, index: Option<String>) -> i64 {
    primary_only(c"es_sync.reindex()");
    attach::reindex(required(relation, "relation"), index.as_deref()).or_raise()
}

#[pg_extern(sql = false)]
fn verify(relation: Option<pg_sys::Oid>, index: Option<String>, repair: Option<bool>, sample: Option<f32>) -> i64 {
    primary_only(c"es_sync.verify()");
    let relation = required(relation, "relation");
    attach::verify(relation, index.as_deref(), repair == Some(true), sample.unwrap_or(1.0)).or_raise()
}

/// Only who administers the extension may decide between two databases.
#[pg_extern(sql = false)]
fn take_over() {
    primary_only(c"es_sync.take_over()");
    attach::take_over().or_raise();
}
