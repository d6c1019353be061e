//! What es_sync.status and es_sync.health() are made of: shared memory, so that reading it touches neither queue nor
//! worker.

use std::sync::atomic::Ordering::Relaxed;

use pgrx::datum::TimestampWithTimeZone;
use pgrx::prelude::*;
use pgrx::{FromDatum, pg_sys};

use crate::shared::{self, Breaker, Database, Index};

fn timestamp(micros: i64) -> Option<TimestampWithTimeZone> {
    if micros == 0 {
        return None;
    }
    // SAFETY: a timestamptz is its microseconds, by value.
    unsafe { TimestampWithTimeZone::from_datum(pg_sys::Datum::from(micros), false) }
}

fn milliseconds(index: &Index, quantile: f64) -> Option<f64> {
    index.latency.quantile(quantile).map(|micros| micros as f64 / 1_000.0)
}

/// Counters of one attachment's index; nulls where no worker has published any.
#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)] // the columns of a view, in order
fn index_statistics(
    attachment: i32,
) -> TableIterator<
    'static,
    (
        name!(pending, Option<i64>),
        name!(oldest, Option<TimestampWithTimeZone>),
        name!(indexed, Option<i64>),
        name!(deleted, Option<i64>),
        name!(refused, Option<i64>),
        name!(retried, Option<i64>),
        name!(batches, Option<i64>),
        name!(latency_p50_ms, Option<f64>),
        name!(latency_p95_ms, Option<f64>),
        name!(latency_p99_ms, Option<f64>),
        name!(latency_p999_ms, Option<f64>),
        name!(cause, Option<String>),
        name!(since, Option<TimestampWithTimeZone>),
    ),
> {
    // SAFETY: reads a variable of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    let index = shared::shared().and_then(|shared| shared.index(database, attachment));
    let count = |read: fn(&Index) -> u64| index.map(|index| read(index) as i64);
    let cause = index.map(|index| index.cause.get()).filter(|cause| !cause.is_empty());
    TableIterator::once((
        count(|index| index.pending.load(Relaxed)),
        index.and_then(|index| timestamp(index.oldest.load(Relaxed))),
        count(|index| index.indexed.load(Relaxed)),
        count(|index| index.deleted.load(Relaxed)),
        count(|index| index.refused.load(Relaxed)),
        count(|index| index.retried.load(Relaxed)),
        count(|index| index.batches.load(Relaxed)),
        index.and_then(|index| milliseconds(index, 0.5)),
        index.and_then(|index| milliseconds(index, 0.95)),
        index.and_then(|index| milliseconds(index, 0.99)),
        index.and_then(|index| milliseconds(index, 0.999)),
        cause.clone(),
        cause.and(index).and_then(|index| timestamp(index.since.load(Relaxed))),
    ))
}

/// The database's worker: its process id and what it knows of the engine; nulls where none runs.
#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)] // the columns of a view, in order
fn worker_state() -> TableIterator<
    'static,
    (
        name!(pid, Option<i32>),
        name!(trouble, Option<String>),
        name!(since, Option<TimestampWithTimeZone>),
        name!(engine, Option<String>),
        name!(breaker, Option<&'static str>),
        name!(next_try, Option<TimestampWithTimeZone>),
        name!(latency_p50_ms, Option<f64>),
        name!(latency_p99_ms, Option<f64>),
    ),
> {
    // SAFETY: reads a variable of this process.
    let oid = unsafe { pg_sys::MyDatabaseId };
    let shared = shared::shared();
    let latency =
        |quantile| shared.and_then(|shared| shared.latency(oid, quantile)).map(|micros| micros as f64 / 1_000.0);
    let database = shared.and_then(|shared| shared.database(oid)).filter(|database| database.worker_pid().is_some());
    let trouble = database.and_then(Database::state);
    let breaker = |breaker| match breaker {
        Breaker::Closed => "closed",
        Breaker::Open => "open",
        Breaker::HalfOpen => "half-open",
    };
    TableIterator::once((
        database.and_then(Database::worker_pid),
        trouble.as_ref().map(|(trouble, _)| trouble.clone()),
        trouble.and_then(|(_, since)| timestamp(since)),
        database.map(|database| database.engine.get()).filter(|engine| !engine.is_empty()),
        database.map(|database| breaker(database.breaker())),
        database.and_then(|database| timestamp(database.next_try.load(Relaxed))),
        latency(0.5),
        latency(0.99),
    ))
}

/// The last failures, the latest first; attachment 0 where no single index is concerned.
#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn failures()
-> TableIterator<'static, (name!(at, Option<TimestampWithTimeZone>), name!(attachment, i32), name!(text, String))> {
    // SAFETY: reads a variable of this process.
    let database = shared::shared().and_then(|shared| shared.database(unsafe { pg_sys::MyDatabaseId }));
    let failures = database.map(Database::failures).unwrap_or_default();
    TableIterator::new(failures.into_iter().map(|failure| (timestamp(failure.at), failure.attachment, failure.text)))
}
