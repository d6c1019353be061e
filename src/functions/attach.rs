//! es_sync.attach, es_sync.mapping, es_sync.detach, es_sync.relate, es_sync.reindex, es_sync.verify, es_sync.take_over.

use pgrx::prelude::*;
use pgrx::{JsonB, PgSqlErrorCode, pg_sys};

use super::primary_only;
use crate::attachment::attach::{self, Request};
use crate::attachment::options::Options;
use crate::document::shape::{Dialect, Shape};
use crate::postgres::error::{OrRaise, Report};
use crate::shared;

/// An argument that may not be null.
pub(super) fn required<T>(value: Option<T>, name: &str) -> T {
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
    attach::attach(request(relation, index, document, filter, exclude, options)).or_raise()
}

fn request(
    relation: Option<pg_sys::Oid>,
    index: Option<String>,
    document: Option<pg_sys::Oid>,
    filter: Option<String>,
    exclude: Option<Vec<Option<String>>>,
    options: Option<JsonB>,
) -> Request {
    Request {
        relation: required(relation, "relation"),
        index,
        document,
        filter: filter.filter(|filter| !filter.trim().is_empty()),
        exclude: exclude.unwrap_or_default().into_iter().flatten().collect(),
        options: options.map_or_else(|| Ok(Options::default()), |options| Options::parse(&options.0)).or_raise(),
    }
}

/// What attach would create, for the engine that is connected, or for the product that is named.
#[pg_extern(sql = false)]
fn mapping(
    relation: Option<pg_sys::Oid>,
    index: Option<String>,
    document: Option<pg_sys::Oid>,
    filter: Option<String>,
    exclude: Option<Vec<Option<String>>>,
    options: Option<JsonB>,
    product: Option<&str>,
) -> JsonB {
    let request = request(relation, index, document, filter, exclude, options);
    let body = attach::preview(request, |attachment| {
        let shape = Shape::of(attachment).ok_or_else(|| {
            Report::new(PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE, "the table, its key or its view has just been dropped")
        })?;
        let mut body = shape.live_index(attachment, dialect(product)?);
        body["index"] = attachment.index.clone().into();
        Ok::<_, Report>(body)
    });
    JsonB(body.and_then(|body| body).or_raise())
}

fn dialect(product: Option<&str>) -> Result<Dialect, Report> {
    let connected = || {
        // SAFETY: reads a variable of this process.
        let database = shared::shared().and_then(|shared| shared.database(unsafe { pg_sys::MyDatabaseId }));
        database.map(|database| database.engine.get()).unwrap_or_default()
    };
    let known = product.map_or_else(connected, str::to_owned).to_lowercase();
    // The connected engine's name is followed by its version.
    match known.split(' ').next() {
        Some("elasticsearch") => Ok(Dialect::Elasticsearch),
        Some("opensearch") => Ok(Dialect::OpenSearch),
        _ if product.is_some() => Err(Report::new(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("product \"{known}\" is not known"),
        )
        .hint("Pass 'elasticsearch' or 'opensearch'.")),
        _ => Err(Report::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "the engine's product is not known yet",
        )
        .detail("No worker has connected to it since the server was started.")
        .hint("Pass 'elasticsearch' or 'opensearch' as \"product\".")),
    }
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
