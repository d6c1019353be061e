//! es_sync.cancel, es_sync.watch.

use std::time::Duration;

use pgrx::prelude::*;
use pgrx::{PgSqlErrorCode, pg_sys};

use super::attach::required;
use super::primary_only;
use crate::attachment::check;
use crate::capture;
use crate::jobs::ask;
use crate::jobs::record::{self, Asked};
use crate::postgres::error::{OrRaise, Report};
use crate::postgres::latch;
use crate::postgres::rights::as_extension;

/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The job, if there is one and the caller owns its table. Where that is gone, it is the superusers'.
fn owned(job: i64) -> Result<Asked, Report> {
    let Some(asked) = as_extension(|| record::find(job)) else {
        return Err(Report::new(PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT, format!("job {job} does not exist"))
            .hint("The view es_sync.jobs lists the jobs."));
    };
    match asked.relation {
        Some(relation) => check::require_owner(relation)?,
        // SAFETY: looks up the current user.
        None if unsafe { pg_sys::superuser() } => {}
        None => {
            return Err(Report::new(
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
                format!("must be superuser, because table {} of job {job} is gone", asked.name),
            ));
        }
    }
    Ok(asked)
}

#[pg_extern(sql = false)]
fn cancel(job: i64) {
    primary_only(c"es_sync.cancel()");
    let asked = owned(job).or_raise();
    let cancel = || {
        let cancelled = record::cancel(job);
        if cancelled {
            ask::for_what_follows(job);
        }
        cancelled
    };
    if !as_extension(cancel) {
        let state = as_extension(|| record::find(job)).map_or(asked.state, |now| now.state);
        Report::new(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, format!("job {job} has ended already"))
            .detail(format!("Its state is \"{state}\"."))
            .raise();
    }
    capture::announce_catalog_change();
}

/// Shows how far a job is until it has ended, a transaction at each look: so nothing is held meanwhile.
#[pg_extern(sql = false)]
fn watch(job: Option<i64>, call: pg_sys::FunctionCallInfo) {
    let job = required(job, "job");
    require_own_transactions(call);
    owned(job).or_raise();
    let mut shown = String::new();
    loop {
        let Some((line, ended)) = as_extension(|| record::describe(job)) else {
            pgrx::notice!("job {job} is gone: its table was detached or dropped");
            return;
        };
        if line != shown {
            pgrx::notice!("job {job}: {line}");
            shown = line;
        }
        if ended {
            return;
        }
        // SAFETY: CALL outside a transaction block, as was checked; SPI is opened for the commit and closed after it.
        unsafe {
            pg_sys::SPI_connect_ext(pg_sys::SPI_OPT_NONATOMIC as i32);
            pg_sys::SPI_commit();
            pg_sys::SPI_start_transaction();
            pg_sys::SPI_finish();
        }
        latch::wait_my_latch(LOOK_EVERY);
    }
}

/// A look every half second must see what the worker has committed, and hold nothing in between.
fn require_own_transactions(call: pg_sys::FunctionCallInfo) {
    // SAFETY: Postgres passes a valid call info, whose context is a CallContext where a procedure is called.
    let may_commit = unsafe {
        let context = (*call).context;
        !context.is_null()
            && (*context).type_ == pg_sys::NodeTag::T_CallContext
            && !(*context.cast::<pg_sys::CallContext>()).atomic
    };
    if !may_commit {
        Report::new(
            PgSqlErrorCode::ERRCODE_ACTIVE_SQL_TRANSACTION,
            "es_sync.watch() cannot run inside a transaction block",
        )
        .detail("It commits after each look, so that it holds nothing while it waits.")
        .raise();
    }
}
