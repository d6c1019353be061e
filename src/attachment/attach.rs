//! How a table becomes attached, and how it is let go.
//!
//! Everything is checked before anything is changed, and all of it is one transaction: rolled back, it leaves nothing.

use pgrx::{JsonB, PgSqlErrorCode, pg_sys};

use super::catalog;
use super::follow::{self, Followed, Shown};
use super::options::Options;
use super::{definition, link, partitions, pause, pin};
use crate::capture;
use crate::postgres::error::Report;
use crate::postgres::spi;
use crate::postgres::transaction::{self, Scope};
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

/// A table that can be attached, and what was found out about it.
pub struct Table {
    pub oid: pg_sys::Oid,
    /// Schema-qualified and quoted.
    pub name: String,
    pub key_columns: Vec<String>,
    estimated_rows: f64,
}

/// Fields that the engine keeps for itself: a document that has one is refused.
const METADATA_FIELDS: [&str; 16] = [
    "_id",
    "_index",
    "_type",
    "_source",
    "_routing",
    "_field_names",
    "_ignored",
    "_size",
    "_doc_count",
    "_nested_path",
    "_seq_no",
    "_version",
    "_tier",
    "_feature",
    "_primary_term",
    "_meta",
];

/// Attaches a table; the id of the job that creates its index and loads it.
///
/// # Errors
/// Whatever makes it impossible, with a hint; nothing was changed then.
pub fn attach(request: Request) -> Result<i64, Report> {
    require_engine()?;
    let (table, index) = check(&request)?;
    // SAFETY: reads a variable of this process.
    let caller = unsafe { pg_sys::GetUserId() };

    as_extension(|| {
        let followed = follow::find(&table, &request.shown())?;
        lock(&table, "share row exclusive");
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
            crate::queue::claim::write_marker();
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
                (pg_sys::OIDOID, spi::value(table.oid)),
                (pg_sys::TEXTOID, spi::value(index.as_str())),
                (pg_sys::TEXTARRAYOID, spi::value(table.key_columns.clone())),
                (pg_sys::TEXTOID, request.filter.clone().and_then(spi::value)),
                (pg_sys::TEXTARRAYOID, spi::value(request.exclude.clone())),
                (pg_sys::JSONBOID, spi::value(JsonB(options))),
                (pg_sys::OIDOID, request.document.and_then(spi::value)),
                (pg_sys::TEXTOID, spi::value(table.name.as_str())),
                (pg_sys::INT4OID, moves.and_then(spi::value)),
            ],
        );
        let attachment: i32 = rows.get(0, 1).unwrap_or_default();
        pause::settle(&[table.oid]);
        spi::run(
            "insert into es_sync.installation (token) values (pg_catalog.gen_random_uuid()) on conflict do nothing",
            &[],
        );
        create_triggers(&table);
        if let Some(view) = request.document {
            pin::hold(table.oid, view);
        }
        follow::store(attachment, table.oid, &followed, caller)?;
        definition::begin(attachment);
        let job = create_build(attachment, "load");
        catalog::invalidate_captures();
        capture::announce_catalog_change();
        announce(&table, &index, &request, &followed);
        Ok(job)
    })
}

/// Checks all that can be checked before anything is locked; the table, and the index's name.
fn check(request: &Request) -> Result<(Table, String), Report> {
    let table = check_table(request.relation)?;
    let index = check_index(&table, request.index.as_deref())?;
    if let Some(view) = request.document {
        check_view(&table, view)?;
    }
    let document = request.document.unwrap_or(table.oid);
    check_columns(&table, document, &request.exclude)?;
    if let Some(filter) = &request.filter {
        check_filter(&qualified(document), filter);
    }
    if let Some(routing) = &request.options.routing {
        check_routing(&table, routing)?;
    }
    Ok((table, index))
}

/// Has `work` look, with SPI, at the attachment that a request would make; nothing is made.
///
/// # Errors
/// Those of `attach`, but for what concerns the engine, locks, and an index name that is taken.
pub fn preview<T>(request: Request, work: impl FnOnce(&catalog::Attachment) -> T) -> Result<T, Report> {
    let (table, index) = check(&request)?;
    as_extension(|| {
        follow::find(&table, &request.shown())?;
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
    let table = owned(relation)?;
    as_extension(|| {
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
            lock(&named(followed), mode);
        }
    }
    for attachment in attachments {
        if drop_index {
            spi::run(
                "insert into es_sync.job (kind, relation, index_name, target)
                 select 'drop', a.relation::text, a.index_name, a.index_name
                 from es_sync.attachment a where a.id = $1",
                &[(pg_sys::INT4OID, spi::value(attachment.id))],
            );
        }
        spi::run("delete from es_sync.attachment a where a.id = $1", &[(pg_sys::INT4OID, spi::value(attachment.id))]);
    }
    for followed in let_go {
        drop_triggers(&named(followed));
    }
    pin::release(table.oid);
    catalog::invalidate_captures();
    capture::announce_catalog_change();
}

/// The table of an attachment, without any check.
pub fn table_of(attachment: &catalog::Attachment) -> Table {
    Table { key_columns: attachment.key_columns.clone(), ..named(attachment.relation) }
}

/// Declares which documents of a table show a row of another one; None takes that back.
///
/// # Errors
/// The caller does not own the table, the declaration does not fit, or one that is needed is taken back.
pub fn relate(relation: pg_sys::Oid, related: pg_sys::Oid, via: Option<&str>) -> Result<(), Report> {
    let table = check_table(relation)?;
    // SAFETY: reads a variable of this process.
    let caller = unsafe { pg_sys::GetUserId() };
    as_extension(|| {
        related_table(related, caller)?;
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
    owned(relation)?;
    // SAFETY: reads a variable of this process.
    let caller = unsafe { pg_sys::GetUserId() };
    as_extension(|| {
        let mut job = 0;
        for attachment in attached(relation, index)? {
            let attachment = definition::with_names(attachment);
            if attachment.document.is_some() {
                // The view may have been replaced: then it is made of other tables.
                follow::renew(&table_of(&attachment), &attachment, caller)?;
            }
            job = create_build(attachment.id, "reindex");
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
    owned(relation)?;
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
            job = create_verify(attachment.id, repair, sample);
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
    if !owns_extension() {
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
        let name = crate::postgres::error::relation_name(relation);
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

/// True if the extension is there and the caller is a member of the role that owns it.
pub fn owns_extension() -> bool {
    // SAFETY: lookups in a live transaction.
    unsafe {
        let extension = pg_sys::get_extension_oid(c"pg_es_sync".as_ptr(), true);
        extension != pg_sys::InvalidOid && pg_sys::pg_extension_ownercheck(extension, pg_sys::GetUserId())
    }
}

/// Runs `work` as the extension's owner, whoever calls: the caller's own rights were checked before.
pub fn as_extension<T>(work: impl FnOnce() -> T) -> T {
    let mut user = pg_sys::InvalidOid;
    let mut context = 0;
    // SAFETY: user and settings are restored below, or by the abort if `work` raises.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        pg_sys::SetUserIdAndSecContext(
            pg_sys::Oid::from(pg_sys::BOOTSTRAP_SUPERUSERID),
            context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32,
        );
        let level = pg_sys::NewGUCNestLevel();
        transaction::set(c"search_path", c"pg_catalog, pg_temp", Scope::Nested);
        spi::connect();
        let result = work();
        spi::finish();
        pg_sys::AtEOXact_GUC(true, level);
        pg_sys::SetUserIdAndSecContext(user, context);
        result
    }
}

fn require_engine() -> Result<(), Report> {
    if settings::url().is_none() {
        return Err(Report::new(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, "es_sync.url is not set")
            .detail("Without it there is no engine to send documents to.")
            .hint("Set it, for instance with ALTER SYSTEM SET es_sync.url = 'http://localhost:9200', then SELECT pg_reload_conf()."));
    }
    settings::engine().map(|_| ()).map_err(|error| {
        Report::new(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, error)
            .hint("Write one or more addresses like http://host:9200, separated by commas.")
    })
}

fn no_relation(oid: pg_sys::Oid) -> Report {
    Report::new(PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE, format!("relation {} does not exist", oid.to_u32()))
}

/// The table, if the caller owns it. Whose operators and functions the caller's search path finds must not matter.
fn owned(relation: pg_sys::Oid) -> Result<Table, Report> {
    let rows = with_pinned_path(|| {
        let rows = spi::run(
            "select pg_catalog.format('%I.%I', n.nspname, c.relname), c.reltuples::float8,
                    pg_catalog.pg_has_role(c.relowner, 'usage')
             from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
             where c.oid = $1",
            &[(pg_sys::OIDOID, spi::value(relation))],
        );
        (!rows.is_empty()).then(|| (rows.get::<String>(0, 1), rows.get::<f64>(0, 2), rows.get::<bool>(0, 3)))
    });
    let Some((Some(name), rows, owner)) = rows else {
        return Err(no_relation(relation));
    };
    if owner != Some(true) {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("must be owner of table {name}"),
        ));
    }
    Ok(Table { oid: relation, name, key_columns: Vec::new(), estimated_rows: rows.unwrap_or(-1.0) })
}

/// Makes sure that the caller owns the table.
///
/// # Errors
/// He does not, or there is none.
pub fn require_owner(relation: pg_sys::Oid) -> Result<(), Report> {
    owned(relation).map(drop)
}

/// Whether the caller owns the table.
pub fn is_owner(relation: pg_sys::Oid) -> bool {
    owned(relation).is_ok()
}

/// Makes sure that the caller owns the table and that `condition` is a condition on its rows; the table's name,
/// schema-qualified and quoted. What is wrong with the condition is raised as Postgres says it.
///
/// # Errors
/// He does not, or there is none.
pub fn require_condition(relation: pg_sys::Oid, condition: &str) -> Result<String, Report> {
    let table = owned(relation)?;
    check_filter(&table.name, condition);
    Ok(table.name)
}

fn check_table(relation: pg_sys::Oid) -> Result<Table, Report> {
    let mut table = owned(relation)?;
    let name = &table.name;
    // The caller's own rights were checked by `owned`; he need not be able to read our catalog.
    let facts = as_extension(|| {
        let rows = spi::run(
            "select c.relkind::text, c.relpersistence::text, c.relforcerowsecurity,
                    c.relnamespace = any (array['pg_catalog', 'information_schema', 'es_sync']::pg_catalog.regnamespace[]),
                    exists (select from pg_catalog.pg_inherits i
                            where i.inhparent = c.oid and c.relkind = 'r'),
                    (select pg_catalog.array_agg(a.attname::text order by k.place)
                     from (select i.indrelid, i.indkey, i.indnkeyatts from pg_catalog.pg_index i
                           where i.indrelid = c.oid and i.indisvalid and (i.indisprimary or i.indisreplident)
                           order by i.indisprimary desc limit 1) i,
                          lateral pg_catalog.unnest(i.indkey) with ordinality k (number, place)
                          join pg_catalog.pg_attribute a on a.attnum = k.number
                     where a.attrelid = c.oid and k.place <= i.indnkeyatts),
                    (select pg_catalog.min(x.relation::text) from es_sync.attachment x
                     where x.relation <> c.oid
                       and (x.relation in (select relid from pg_catalog.pg_partition_ancestors(c.oid))
                            or x.relation in (select relid from pg_catalog.pg_partition_tree(c.oid)))),
                    pg_catalog.getdatabaseencoding()::text
             from pg_catalog.pg_class c where c.oid = $1",
            &[(pg_sys::OIDOID, spi::value(relation))],
        );
        (
            rows.get::<String>(0, 1).unwrap_or_default(),
            rows.get::<String>(0, 2).unwrap_or_default(),
            rows.get::<bool>(0, 3) == Some(true),
            rows.get::<bool>(0, 4) == Some(true),
            rows.get::<bool>(0, 5) == Some(true),
            rows.get::<Vec<String>>(0, 6),
            rows.get::<String>(0, 7),
            rows.get::<String>(0, 8).unwrap_or_default(),
        )
    });
    let (kind, persistence, forced_security, system, has_children, key, relative, encoding) = facts;
    let wrong = |message: String| Report::new(PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE, message);
    if system {
        return Err(wrong(format!("cannot attach system table {name}"))
            .detail("Only ordinary and partitioned tables of your own can be attached."));
    }
    if kind != "r" && kind != "p" {
        let what = match kind.as_str() {
            "v" => "view",
            "m" => "materialized view",
            "f" => "foreign table",
            _ => "relation",
        };
        return Err(wrong(format!("cannot attach {what} {name}"))
            .detail("Its changes fire no row triggers.")
            .hint("Attach the table that it reads."));
    }
    if persistence == "t" {
        let name = crate::postgres::error::relation_name(relation);
        return Err(wrong(format!("cannot attach temporary table \"{name}\""))
            .detail("The worker cannot read another session's temporary table."));
    }
    if has_children {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("cannot attach table {name} that other tables inherit from"),
        )
        .detail("Changes of inheritance children fire no trigger of their parent.")
        .hint("Attach each child, or use declarative partitioning."));
    }
    if let Some(relative) = relative {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("cannot attach table {name} beside table {relative} of the same partition tree"),
        )
        .hint("Attach either the partitioned table or single partitions."));
    }
    if forced_security {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("cannot attach table {name} with forced row-level security"),
        )
        .detail("The worker reads as the table's owner, to whom the policies would apply.")
        .hint("Use ALTER TABLE ... NO FORCE ROW LEVEL SECURITY."));
    }
    if encoding != "UTF8" {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("cannot attach tables of a database with encoding {encoding}"),
        )
        .detail("Documents are JSON, which is UTF-8."));
    }
    let Some(key) = key.filter(|key| !key.is_empty()) else {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_INVALID_TABLE_DEFINITION,
            format!("cannot attach table {name} without a primary key"),
        )
        .detail("Documents are identified by their row's key.")
        .hint("Add a primary key, or a unique index on NOT NULL columns named as REPLICA IDENTITY."));
    };
    table.key_columns = key;
    Ok(table)
}

/// A table whose rows documents show.
///
/// # Errors
/// It is none, `caller` may not create triggers on it, or a table of the same partition tree is followed already.
pub fn related_table(relation: pg_sys::Oid, caller: pg_sys::Oid) -> Result<Table, Report> {
    let rows = spi::run(
        "select pg_catalog.has_table_privilege($2, c.oid, 'TRIGGER'),
                c.relkind in ('r', 'p') and c.relpersistence <> 't' and c.oid >= 16384,
                (select pg_catalog.min(x.relation::text)
                 from (select relation from es_sync.attachment union select related from es_sync.way) x
                 where x.relation <> c.oid
                   and (x.relation in (select relid from pg_catalog.pg_partition_ancestors(c.oid))
                        or x.relation in (select relid from pg_catalog.pg_partition_tree(c.oid))))
         from pg_catalog.pg_class c where c.oid = $1",
        &[(pg_sys::OIDOID, spi::value(relation)), (pg_sys::OIDOID, spi::value(caller))],
    );
    if rows.is_empty() {
        return Err(no_relation(relation));
    }
    let table = named(relation);
    if rows.get::<bool>(0, 2) != Some(true) {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
            format!("cannot follow relation {}", table.name),
        )
        .detail("Only changes of ordinary and partitioned tables can be followed."));
    }
    if rows.get::<bool>(0, 1) != Some(true) {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("permission denied to follow table {}", table.name),
        )
        .detail("Documents show its rows, so it gets a trigger.")
        .hint("Ask its owner for GRANT TRIGGER."));
    }
    if let Some(relative) = rows.get::<String>(0, 3) {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("cannot follow table {} beside table {relative} of the same partition tree", table.name),
        )
        .hint("Let all views read either the partitioned table or single partitions."));
    }
    Ok(table)
}

/// A table by its OID, without any check.
fn named(relation: pg_sys::Oid) -> Table {
    Table { oid: relation, name: qualified(relation), key_columns: Vec::new(), estimated_rows: -1.0 }
}

/// A relation's name, schema-qualified and quoted.
pub fn qualified(relation: pg_sys::Oid) -> String {
    // SAFETY: syscache lookups in a live transaction; the palloc'd results are copied.
    unsafe {
        let schema = pg_sys::get_namespace_name(pg_sys::get_rel_namespace(relation));
        let name = pg_sys::get_rel_name(relation);
        if schema.is_null() || name.is_null() {
            return relation.to_u32().to_string();
        }
        let quoted = pg_sys::quote_qualified_identifier(schema, name);
        std::ffi::CStr::from_ptr(quoted).to_string_lossy().into_owned()
    }
}

/// A view that documents can be read from.
fn check_view(table: &Table, view: pg_sys::Oid) -> Result<(), Report> {
    let facts = as_extension(|| {
        let rows = spi::run(
            "select c.relkind::text, c.relowner = t.relowner, c.relpersistence = 't', t.relowner
             from pg_catalog.pg_class c, pg_catalog.pg_class t where c.oid = $1 and t.oid = $2",
            &[(pg_sys::OIDOID, spi::value(view)), (pg_sys::OIDOID, spi::value(table.oid))],
        );
        (!rows.is_empty()).then(|| {
            (
                rows.get::<String>(0, 1).unwrap_or_default(),
                rows.get::<bool>(0, 2) == Some(true),
                rows.get::<bool>(0, 3) == Some(true),
                rows.get::<pg_sys::Oid>(0, 4).unwrap_or(pg_sys::InvalidOid),
            )
        })
    });
    let Some((kind, same_owner, temporary, owner)) = facts else {
        return Err(no_relation(view));
    };
    let name = qualified(view);
    if kind != "v" || temporary {
        return Err(Report::new(PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE, format!("{name} is not a view"))
            .detail("Documents are read from the table itself, or from a view that is not temporary.")
            .hint("Create a view that has the key columns of the table."));
    }
    if !same_owner {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("view {name} has another owner than table {}", table.name),
        )
        .detail("The worker reads with the rights of the table's owner, and lends them to nobody.")
        .hint("Use ALTER VIEW ... OWNER TO."));
    }
    let columns = catalog::columns(view);
    for key in catalog::columns(table.oid).iter().filter(|column| table.key_columns.contains(&column.name)) {
        match columns.iter().find(|column| column.name == key.name) {
            Some(column) if column.type_oid == key.type_oid => {}
            Some(_) => {
                return Err(Report::new(
                    PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
                    format!("column \"{}\" of view {name} has another type than in table {}", key.name, table.name),
                )
                .detail("Documents are identified by their row's key."));
            }
            None => {
                return Err(Report::new(
                    PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                    format!("view {name} has no column \"{}\"", key.name),
                )
                .detail("Documents are identified by their row's key.")
                .hint("Let the view return the key columns of the table under their own names."));
            }
        }
    }
    // As the worker will read it: what the owner may not read, or policies would filter, is refused here.
    with_spi(|| transaction::as_owner(owner, || spi::run(&format!("select from {name} limit 0"), &[]).len()));
    Ok(())
}

fn check_index(table: &Table, index: Option<&str>) -> Result<String, Report> {
    let index = match index {
        Some(index) => index.to_owned(),
        // The engine knows no capitals; people who quote "Collectives" expect index collectives.
        None => crate::postgres::error::relation_name(table.oid).to_lowercase(),
    };
    es::check_index_name(&index).map_err(|reason| {
        Report::new(PgSqlErrorCode::ERRCODE_INVALID_NAME, format!("index name \"{index}\" is not valid"))
            .detail(format!("{reason}."))
            .hint("Pass a name that Elasticsearch accepts as \"index\".")
    })?;
    Ok(index)
}

fn check_columns(table: &Table, document: pg_sys::Oid, exclude: &[String]) -> Result<(), Report> {
    let columns = catalog::columns(document);
    let what = if document == table.oid { "table" } else { "view" };
    for excluded in exclude {
        if table.key_columns.contains(excluded) {
            return Err(Report::new(
                PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                format!("cannot exclude key column \"{excluded}\""),
            )
            .detail("Documents are identified by their row's key."));
        }
        if !columns.iter().any(|column| &column.name == excluded) {
            return Err(Report::new(
                PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                format!("column \"{excluded}\" of {what} {} does not exist", qualified(document)),
            ));
        }
    }
    let fields: Vec<&str> =
        columns.iter().map(|column| column.name.as_str()).filter(|name| !exclude.iter().any(|x| x == name)).collect();
    for column in columns.iter().filter(|column| !exclude.contains(&column.name)) {
        if let Some(reason) = unfit_field(&column.name, &fields) {
            return Err(Report::new(
                PgSqlErrorCode::ERRCODE_RESERVED_NAME,
                format!("column \"{}\" cannot be a field of a document", column.name),
            )
            .detail(reason)
            .hint("Name it in \"exclude\"."));
        }
        if METADATA_FIELDS.contains(&column.name.as_str()) {
            return Err(Report::new(
                PgSqlErrorCode::ERRCODE_RESERVED_NAME,
                format!("column \"{}\" cannot be a field of a document", column.name),
            )
            .detail("The engine keeps this name for itself.")
            .hint("Name it in \"exclude\"."));
        }
    }
    Ok(())
}

/// A column that can say on which shard a document lies.
fn check_routing(table: &Table, column: &str) -> Result<(), Report> {
    match catalog::columns(table.oid).iter().find(|known| known.name == column) {
        None => Err(Report::new(
            PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
            format!("column \"{column}\" of table {} does not exist", table.name),
        )
        .detail("Option \"routing\" names a column of the table, also where documents come from a view.")),
        Some(column) if column.is_virtual => Err(Report::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("cannot route by virtual generated column \"{}\"", column.name),
        )
        .detail("Where a document lies must be known when its row is changed, and no trigger sees the column's value.")
        .hint("Generate the column STORED.")),
        Some(_) => Ok(()),
    }
}

/// Why the engine takes no field of this name beside the other `fields`; None if it does. A dot stands for an object
/// within an object.
fn unfit_field(name: &str, fields: &[&str]) -> Option<String> {
    if name.split('.').any(|part| part.trim().is_empty()) {
        return Some("The engine takes no name that is blank before, between or behind dots.".to_owned());
    }
    let parent = fields.iter().find(|field| name.strip_prefix(**field).is_some_and(|rest| rest.starts_with('.')))?;
    Some(format!("To the engine it is a field within \"{parent}\", which is a field of its own."))
}

/// Raises what Postgres says of the filter: a syntax error, an unknown column, a value that is not boolean.
fn check_filter(relation: &str, filter: &str) {
    // The worker reads under this search path, so names that need another fail here, not later.
    with_pinned_path(|| {
        // By itself first: closed and opened parentheses must not make two expressions look like one.
        spi::run(&format!("select\n{filter}\nfrom {relation} limit 0"), &[]);
        spi::run(&format!("select from (select * from {relation} where (\n{filter}\n) is true limit 0) checked"), &[]);
    });
}

/// Runs `work` with SPI, as the caller, under the search path that filters are read with.
pub fn with_pinned_path<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: only the search path is changed, and restored below or by the abort.
    let level = unsafe { pg_sys::NewGUCNestLevel() };
    transaction::set(c"search_path", c"pg_catalog, pg_temp", Scope::Nested);
    let result = with_spi(work);
    // SAFETY: paired with NewGUCNestLevel above.
    unsafe { pg_sys::AtEOXact_GUC(true, level) };
    result
}

fn with_spi<T>(work: impl FnOnce() -> T) -> T {
    spi::connect();
    let result = work();
    spi::finish();
    result
}

/// Takes the lock that changing triggers needs, or says who stands in the way.
pub fn lock(table: &Table, mode: &str) {
    let holders = spi::run(
        "select pg_catalog.string_agg(distinct l.pid::text, ', ')
         from pg_catalog.pg_locks l
         where l.locktype = 'relation' and l.relation = $1 and l.granted
           and l.database = (select d.oid from pg_catalog.pg_database d
                             where d.datname = pg_catalog.current_database())
           and ($2 = 'access exclusive' or l.mode not in ('AccessShareLock', 'RowShareLock'))
           and l.pid is distinct from pg_catalog.pg_backend_pid()",
        &[(pg_sys::OIDOID, spi::value(table.oid)), (pg_sys::TEXTOID, spi::value(mode))],
    )
    .get::<String>(0, 1);
    // SAFETY: reads a variable of this process, null in users' backends. A worker does not wait, it comes back: writers
    // queue up behind whoever waits for such a lock.
    let is_worker = unsafe { !pg_sys::MyBgworkerEntry.is_null() };
    // A user's own time-out holds again afterwards.
    let former = (!is_worker).then(|| transaction::setting(c"lock_timeout"));
    if is_worker {
        // To the end of the transaction: what it locks it must not keep while it waits for something else.
        transaction::set(c"lock_timeout", c"100ms", Scope::Local);
    } else {
        let timeout = std::ffi::CString::new(settings::lock_timeout()).unwrap_or_default();
        transaction::set(c"lock_timeout", &timeout, Scope::Nested);
    }
    let name = &table.name;
    pgrx::PgTryBuilder::new(std::panic::AssertUnwindSafe(|| {
        spi::run(&format!("lock table {name} in {mode} mode"), &[]);
    }))
    .catch_when(PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE, |_| {
        let who = match &holders {
            Some(pids) => format!("Its transactions in process {pids} hold a lock: let them end, then try again."),
            None => "Try again, or raise es_sync.lock_timeout.".to_owned(),
        };
        Report::new(
            PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE,
            format!("could not lock table {name} within es_sync.lock_timeout"),
        )
        .detail("The table must be quiet for a moment while its triggers change.")
        .hint(who)
        .raise()
    })
    .execute();
    if let Some(former) = former {
        transaction::set(c"lock_timeout", &former, Scope::Nested);
    }
}

/// The table and all its partitions, schema-qualified; the table first.
fn tree(table: &Table) -> Vec<(pg_sys::Oid, String)> {
    let rows = spi::run(
        "select c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname)
         from (select $1::oid as oid, 0 as level
               union
               select t.relid, t.level from pg_catalog.pg_partition_tree($1) t) t
         join pg_catalog.pg_class c on c.oid = t.oid
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         where c.relkind in ('r', 'p')
         order by t.level",
        &[(pg_sys::OIDOID, spi::value(table.oid))],
    );
    (0..rows.len()).filter_map(|row| Some((rows.get(row, 1)?, rows.get(row, 2)?))).collect()
}

/// True if the table has its triggers now: in REPEATABLE READ, a query would see the catalog as it was.
fn has_triggers(table: pg_sys::Oid) -> bool {
    // SAFETY: in a transaction; the catalog is read as it is now.
    unsafe { pg_sys::get_trigger_oid(table, c"es_sync_truncate".as_ptr(), true) != pg_sys::InvalidOid }
}

pub fn create_triggers(table: &Table) {
    for (place, (oid, name)) in tree(table).into_iter().enumerate() {
        if has_triggers(oid) {
            continue;
        }
        if place == 0 {
            // Row triggers of a partitioned table are cloned to its partitions, present and future.
            spi::run(
                &format!(
                    "create trigger es_sync_capture after insert or update or delete on {name}
                     for each row execute function es_sync.capture()"
                ),
                &[],
            );
        }
        // ALWAYS: logical replication applies its changes as a replica.
        spi::run(&format!("alter table {name} enable always trigger es_sync_capture"), &[]);
        if place == 0 {
            // So that DROP EXTENSION needs no CASCADE.
            spi::run(&format!("alter trigger es_sync_capture on {name} depends on extension pg_es_sync"), &[]);
        }
        create_truncate_trigger(&name);
    }
    if !partitions::are_known(table.oid) {
        partitions::remember(Some(table.oid));
    }
}

/// Truncate triggers are not cloned: one for each partition.
pub fn create_truncate_trigger(name: &str) {
    for statement in [
        format!(
            "create trigger es_sync_truncate after truncate on {name}
             for each statement execute function es_sync.capture()"
        ),
        format!("alter table {name} enable always trigger es_sync_truncate"),
        format!("alter trigger es_sync_truncate on {name} depends on extension pg_es_sync"),
    ] {
        spi::run(&statement, &[]);
    }
}

/// Gives a table, where it has lost one of its triggers, both of them.
pub fn renew_triggers(table: pg_sys::Oid) {
    let table = named(table);
    drop_triggers(&table);
    create_triggers(&table);
}

fn drop_triggers(table: &Table) {
    for (place, (_, name)) in tree(table).into_iter().enumerate() {
        if place == 0 {
            spi::run(&format!("drop trigger if exists es_sync_capture on {name}"), &[]);
        }
        spi::run(&format!("drop trigger if exists es_sync_truncate on {name}"), &[]);
    }
    partitions::forget(table.oid);
}

/// Asks for a build of an attachment's index, unless one is under way; the job's id.
pub fn create_build(attachment: i32, kind: &str) -> i64 {
    let rows = spi::run(
        "with made as (
             insert into es_sync.job (kind, attachment, relation, index_name)
             select $2, a.id, a.relation::text, a.index_name from es_sync.attachment a where a.id = $1
             on conflict (attachment) where kind in ('load', 'reindex') and state in ('queued', 'running') do nothing
             returning id)
         select id from made
         union all
         select j.id from es_sync.job j
         where j.attachment = $1 and j.kind in ('load', 'reindex') and j.state in ('queued', 'running')
         limit 1",
        &[(pg_sys::INT4OID, spi::value(attachment)), (pg_sys::TEXTOID, spi::value(kind))],
    );
    rows.first(1).unwrap_or_default()
}

/// Marks an index as stale and asks for what makes it equal to its table again: a comparison that mends, or a rebuild
/// where the engine does not give documents back as they were sent. The job's id.
pub fn create_repair(attachment: i32, why: &str) -> i64 {
    crate::jobs::record::mark_stale(attachment, why);
    match catalog::of_id(attachment) {
        Some(known) if known.live.is_none() => create_build(attachment, "load"),
        Some(known) if !known.contents_comparable() || catalog::has_vectors(&known) => {
            create_build(attachment, "reindex")
        }
        _ => create_verify(attachment, true, 1.0),
    }
}

/// Asks for a comparison; one that is under way begins again, so that it sees what led to this call. The job's id.
fn create_verify(attachment: i32, repair: bool, sample: f32) -> i64 {
    create_comparison(attachment, repair, sample, false)
}

/// Asks for documents to be taken out whose rows went without being noted one by one. Until then the index is stale. One
/// that is under way is followed by another: if it began again, it would never end where partitions are emptied more often
/// than it takes.
pub fn create_sweep(attachment: i32) {
    crate::jobs::record::mark_partitions(attachment);
    let follows = spi::run(
        "update es_sync.job j set again = true
         where j.attachment = $1 and j.kind = 'verify' and j.state = 'running' and j.orphans_only
         returning j.id",
        &[(pg_sys::INT4OID, spi::value(attachment))],
    );
    if follows.is_empty() {
        create_comparison(attachment, true, 1.0, true);
    }
}

fn create_comparison(attachment: i32, repair: bool, sample: f32, orphans_only: bool) -> i64 {
    let rows = spi::run(
        "insert into es_sync.job as j (kind, attachment, relation, index_name, repair, sample, orphans_only)
         select 'verify', a.id, a.relation::text, a.index_name, $2, $3, $4 from es_sync.attachment a where a.id = $1
         on conflict (attachment) where kind = 'verify' and state in ('queued', 'running') do update
         set state = 'queued', again = false, repair = j.repair or excluded.repair,
             sample = greatest(j.sample, excluded.sample), orphans_only = j.orphans_only and excluded.orphans_only,
             phase = null, target = null, position = null, done = 0, missing = null, different = null, orphaned = null
         returning j.id",
        &[
            (pg_sys::INT4OID, spi::value(attachment)),
            (pg_sys::BOOLOID, spi::value(repair)),
            (pg_sys::FLOAT4OID, spi::value(sample)),
            (pg_sys::BOOLOID, spi::value(orphans_only)),
        ],
    );
    rows.first(1).unwrap_or_default()
}

fn announce(table: &Table, index: &str, request: &Request, followed: &Followed) {
    let left_out: Vec<String> = catalog::columns(request.document.unwrap_or(table.oid))
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
