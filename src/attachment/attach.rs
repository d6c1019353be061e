//! How a table becomes attached, and how it is let go.
//!
//! Everything is checked before anything is changed, and all of it is one transaction: rolled back, it leaves nothing.

use pgrx::{JsonB, PgSqlErrorCode, pg_sys};

use super::captures;
use super::catalog;
use super::check::{self, Table};
use super::follow::{self, Followed, Shown};
use super::options::Options;
use super::triggers::patiently;
use super::{definition, link, pause, pin, triggers};
use crate::capture;
use crate::jobs::ask;
use crate::postgres::error::{Report, relation_name};
use crate::postgres::relation;
use crate::postgres::rights::as_extension;
use crate::postgres::spi::{self, qualified};
use crate::settings;

/// What `es_sync.attach` was asked for.
pub struct Request {
    pub relation: pg_sys::Oid,
    pub index: Option<String>,
    /// The view that documents are read from; None for the table's rows.
    pub document: Option<pg_sys::Oid>,
    pub filter: Option<String>,
    pub exclude: Vec<String>,
    pub options: Options,
}

impl Request {
    fn shown(&self) -> Shown<'_> {
        let filter = self.filter.as_deref();
        Shown { view: self.document, exclude: &self.exclude, options: &self.options, filter }
    }
}

/// Attaches a table; the id of the job that creates its index and loads it.
///
/// # Errors
/// Whatever makes it impossible, with a hint; nothing was changed then.
pub fn attach(request: Request) -> Result<i64, Report> {
    require_engine()?;
    check::require_owner(request.relation)?;
    as_extension(triggers::take_turn);
    let (table, index) = patiently(&qualified(request.relation), || check::request(&request))?;
    // SAFETY: reads a variable of this process.
    let caller = unsafe { pg_sys::GetUserId() };

    as_extension(|| {
        let followed = patiently(&table.name, || follow::find(&table, &request.shown()))?;
        triggers::lock(&table, "share row exclusive");
        // The worker may not have seen yet that the table which it was filled from was dropped.
        catalog::forget_dropped_tables(Some(&index));
        if let Some(owner) = catalog::owner_of_index(&index) {
            return Err(Report::new(
                PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT,
                format!("index \"{index}\" already belongs to an attachment"),
            )
            .detail(format!("It is filled from table {owner}."))
            .hint("Pass another name as \"index\", or detach that table first."));
        }
        if catalog::all().is_empty() {
            // Nothing was captured before the first attachment, so no queue can have been lost. The install script must
            // not say so: it also runs where a dump is restored.
            crate::queue::marker::write();
        }
        let moves = request.options.routing.as_ref().map(|_| link::free_source()).transpose()?;
        let options = serde_json::to_value(&request.options).unwrap_or_default();
        let rows = spi::run(
            "insert into es_sync.attachment (
                 relation, index_name, key_columns, filter, exclude, options, document, attached_as,
                 routing_source)
             values ($1::oid, $2, $3, $4, $5, $6, $7::oid, $8, $9)
             returning id",
            &[
                spi::parameter(table.oid),
                spi::parameter(index.as_str()),
                spi::parameter(table.key_columns.clone()),
                spi::parameter(request.filter.clone()),
                spi::parameter(request.exclude.clone()),
                spi::parameter(JsonB(options)),
                spi::parameter(request.document),
                spi::parameter(table.name.as_str()),
                spi::parameter(moves),
            ],
        );
        let attachment: i32 = rows.get(0, 1).unwrap_or_default();
        pause::settle(&[table.oid]);
        spi::run(
            "insert into es_sync.installation (token) values (pg_catalog.gen_random_uuid()) on conflict do nothing",
            &[],
        );
        triggers::create(&table);
        if let Some(view) = request.document {
            pin::hold(table.oid, view);
        }
        follow::store(attachment, table.oid, &followed, caller)?;
        definition::begin(attachment);
        let job = ask::for_build(attachment, "load");
        captures::invalidate();
        capture::announce_catalog_change();
        announce(&table, &index, &request, &followed);
        Ok(job)
    })
}

/// Has `work` look, with SPI, at the attachment that a request would make; nothing is made.
///
/// # Errors
/// Those of `attach`, but for what concerns the engine, locks, and an index name that is taken.
pub fn preview<T>(request: Request, work: impl FnOnce(&catalog::Attachment) -> T) -> Result<T, Report> {
    let (table, index) = patiently(&qualified(request.relation), || check::request(&request))?;
    as_extension(|| {
        patiently(&table.name, || follow::find(&table, &request.shown()))?;
        Ok(work(&catalog::Attachment {
            id: 0,
            relation: table.oid,
            index,
            key_columns: table.key_columns,
            document: request.document,
            filter: request.filter,
            exclude: request.exclude,
            options: request.options,
            live: None,
            uuid: None,
            stale: false,
            paused: false,
            routing_source: None,
        }))
    })
}

/// Detaches a table from all its indexes, or from one.
///
/// # Errors
/// The table is not attached, or not the caller's.
pub fn detach(relation: pg_sys::Oid, index: Option<&str>, drop_index: bool) -> Result<(), Report> {
    let table = check::owned(relation)?;
    as_extension(|| {
        triggers::take_turn();
        let_go(&table, &attached(relation, index)?, drop_index);
        Ok(())
    })
}

/// Detaches a table from the given indexes of its, whoever asks. SPI must be connected.
///
/// Raises an ERROR where a table cannot be locked.
pub fn let_go(table: &Table, attachments: &[catalog::Attachment], drop_index: bool) {
    let ids: Vec<i32> = attachments.iter().map(|attachment| attachment.id).collect();
    let let_go = follow::only_followed_by(&ids);
    for followed in follow::tables_of(&ids) {
        // Dropping a trigger needs the table for itself.
        let mode = if let_go.contains(&followed) { "access exclusive" } else { "share row exclusive" };
        if followed == table.oid || let_go.contains(&followed) {
            triggers::lock(&check::named(followed), mode);
        }
    }
    // Whoever has begun to follow one of them meanwhile, as the worker does, has committed by now.
    let followed_on = follow::only_followed_by(&ids);
    let let_go: Vec<_> = let_go.into_iter().filter(|followed| followed_on.contains(followed)).collect();
    for attachment in attachments {
        if drop_index {
            spi::run(
                "insert into es_sync.job (kind, relation, detached, index_name, target)
                 select 'drop', a.relation::text, a.relation, a.index_name, a.index_name
                 from es_sync.attachment a where a.id = $1",
                &[spi::parameter(attachment.id)],
            );
        }
        catalog::delete("a.id = $1", spi::parameter(attachment.id));
    }
    for followed in let_go {
        triggers::drop_from(&check::named(followed));
    }
    pin::release(table.oid);
    captures::invalidate();
    capture::announce_catalog_change();
}

/// Declares which documents of a table show a row of another one; None takes that back.
///
/// # Errors
/// The caller does not own the table, the declaration does not fit, or one that is needed is taken back.
pub fn relate(relation: pg_sys::Oid, related: pg_sys::Oid, via: Option<&str>) -> Result<(), Report> {
    check::require_owner(relation)?;
    as_extension(triggers::take_turn);
    let table = patiently(&qualified(relation), || check::attachable(relation))?;
    // SAFETY: reads a variable of this process.
    let caller = unsafe { pg_sys::GetUserId() };
    as_extension(|| {
        patiently(&table.name, || check::followable(related, caller))?;
        follow::relate(&table, related, via, caller)
    })
}

/// Asks for a rebuild of all a table's indexes, or of one; the last job's id. During a first load or a rebuild that
/// is the same job again.
///
/// # Errors
/// The table is not attached, or not the caller's, or no engine is set.
pub fn reindex(relation: pg_sys::Oid, index: Option<&str>) -> Result<i64, Report> {
    require_engine()?;
    check::owned(relation)?;
    // SAFETY: reads a variable of this process.
    let caller = unsafe { pg_sys::GetUserId() };
    as_extension(|| {
        let mut job = 0;
        if attached(relation, index)?.iter().any(|attachment| attachment.document.is_some()) {
            triggers::take_turn();
        }
        for attachment in attached(relation, index)? {
            let attachment = definition::with_names(attachment);
            if attachment.document.is_some() {
                // The view may have been replaced: then it is made of other tables.
                follow::renew(&check::table_of(&attachment), &attachment, caller)?;
            }
            job = ask::for_rebuild(&attachment);
        }
        capture::announce_catalog_change();
        Ok(job)
    })
}

/// Asks for a comparison of all a table's indexes with it, or of one; the last job's id.
///
/// # Errors
/// As `reindex`.
pub fn verify(relation: pg_sys::Oid, index: Option<&str>, repair: bool, sample: f32) -> Result<i64, Report> {
    require_engine()?;
    check::owned(relation)?;
    if !(sample > 0.0 && sample <= 1.0) {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("sample must be greater than 0 and at most 1, not {sample}"),
        )
        .hint("It is the share of the rows that is compared."));
    }
    as_extension(|| {
        let mut job = 0;
        for attachment in attached(relation, index)? {
            job = ask::for_verify(attachment.id, repair, sample);
        }
        capture::announce_catalog_change();
        Ok(job)
    })
}

/// Lets this database write to its indexes, whoever else does: the worker takes the lease over.
///
/// # Errors
/// The caller does not own the extension: it is about every table of the database. No engine is set.
pub fn take_over() -> Result<(), Report> {
    if !check::owns_extension() {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            "must be owner of extension pg_es_sync to take over from another database",
        ));
    }
    require_engine()?;
    as_extension(|| {
        spi::run("update es_sync.lease l set take_over = true", &[]);
        capture::announce_catalog_change();
    });
    Ok(())
}

/// The attachments of a table that the caller owns.
///
/// # Errors
/// There are none.
pub fn attached(relation: pg_sys::Oid, index: Option<&str>) -> Result<Vec<catalog::Attachment>, Report> {
    let attachments = catalog::of_relation(relation, index);
    if attachments.is_empty() {
        let name = relation_name(relation);
        let report = match index {
            None => Report::new(PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT, format!("table \"{name}\" is not attached")),
            Some(index) => Report::new(
                PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
                format!("table \"{name}\" is not attached to index \"{index}\""),
            ),
        };
        return Err(report.hint("Attach it with es_sync.attach(), or look into the view es_sync.status."));
    }
    Ok(attachments)
}

fn require_engine() -> Result<(), Report> {
    if settings::url().is_none() {
        return Err(Report::new(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, "es_sync.url is not set")
            .detail("Without it there is no engine to send documents to.")
            .hint("Set it, for instance with ALTER SYSTEM SET es_sync.url = 'http://localhost:9200', then SELECT pg_reload_conf()."));
    }
    settings::engine().map(|_| ()).map_err(|error| {
        let hint = error.hint().unwrap_or("Write one or more addresses like http://host:9200, separated by commas.");
        Report::new(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, error.message()).hint(hint)
    })
}

fn announce(table: &Table, index: &str, request: &Request, followed: &Followed) {
    let left_out: Vec<String> = relation::columns(request.document.unwrap_or(table.oid))
        .into_iter()
        .filter(|column| {
            !table.key_columns.contains(&column.name)
                && !catalog::is_synced(&column.name, column.type_oid, &request.exclude, &request.options)
        })
        .map(|column| format!("\"{}\"", column.name))
        .collect();
    let rows = if table.estimated_rows < 0.0 {
        "an unknown number of rows".to_owned()
    } else {
        format!("about {} rows", table.estimated_rows)
    };
    let left_out = if left_out.is_empty() { String::new() } else { format!("; left out: {}", left_out.join(", ")) };
    pgrx::notice!(
        "table {} is attached to index \"{index}\" with {rows}, identified by ({}){left_out}",
        table.name,
        table.key_columns.join(", ")
    );
    let tables: Vec<String> = followed.tables(table.oid).into_iter().map(qualified).collect();
    if !tables.is_empty() {
        pgrx::notice!("its documents follow changes of {}", tables.join(", "));
    }
    if !followed.unfollowed.is_empty() {
        pgrx::notice!(
            "its documents do not follow changes of {}; the view es_sync.status lists this",
            followed.unfollowed.join("; ")
        );
    }
}
