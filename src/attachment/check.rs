//! What can be attached, and by whom: all that is looked at before anything is changed.

use pgrx::{PgSqlErrorCode, pg_sys};

use super::attach::Request;
use super::catalog;
use crate::postgres::error::{Report, relation_name};
use crate::postgres::relation;
use crate::postgres::rights::{as_extension, as_owner, with_pinned_path};
use crate::postgres::spi::{self, qualified};

/// A table that can be attached, and what was found out about it.
pub struct Table {
    pub oid: pg_sys::Oid,
    /// Schema-qualified and quoted.
    pub name: String,
    pub key_columns: Vec<String>,
    /// Negative where it is not known.
    pub estimated_rows: f64,
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

/// Checks all that can be checked before anything is locked; the table, and the index's name.
pub fn request(request: &Request) -> Result<(Table, String), Report> {
    let table = attachable(request.relation)?;
    let index = check_index(&table, request.index.as_deref())?;
    if let Some(view) = request.document {
        check_view(&table, view)?;
    }
    let document = request.document.unwrap_or(table.oid);
    check_columns(&table, document, &request.exclude)?;
    if let Some(filter) = &request.filter {
        // Planning it calls functions of the view's, and whoever attaches need not be the owner.
        let owner = as_extension(|| relation::owner(table.oid));
        as_owner(owner, || check_filter(&qualified(document), filter));
    }
    if let Some(routing) = &request.options.routing {
        check_routing(&table, routing)?;
    }
    Ok((table, index))
}

/// The table of an attachment, without any check.
pub fn table_of(attachment: &catalog::Attachment) -> Table {
    Table { key_columns: attachment.key_columns.clone(), ..named(attachment.relation) }
}

fn no_relation(oid: pg_sys::Oid) -> Report {
    Report::new(PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE, format!("relation {} does not exist", oid.to_u32()))
}

/// The table, if the caller owns it. Whose operators and functions the caller's search path finds must not matter.
pub fn owned(relation: pg_sys::Oid) -> Result<Table, Report> {
    let rows = with_pinned_path(|| {
        let rows = spi::run(
            "select pg_catalog.format('%I.%I', n.nspname, c.relname), c.reltuples::float8,
                    pg_catalog.pg_has_role(c.relowner, 'usage')
             from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
             where c.oid = $1",
            &[spi::parameter(relation)],
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

/// What decides whether a table can be attached.
struct Facts {
    /// pg_class.relkind
    kind: String,
    is_temporary: bool,
    forces_security: bool,
    is_system: bool,
    /// Other tables inherit from it.
    has_children: bool,
    /// The columns of its primary key or replica identity; empty where it has neither.
    key: Vec<String>,
    /// An attached or followed table of the same partition tree.
    relative: Option<String>,
    encoding: String,
}

/// Another table of c's partition tree that is attached or followed: its triggers and those of c would be in each other's
/// way, for Postgres clones them.
const RELATIVE: &str = "
    (select pg_catalog.min(x.relation::text)
     from (select a.relation from es_sync.attachment a union select w.related from es_sync.way w) x
     where x.relation <> c.oid
       and (x.relation in (select relid from pg_catalog.pg_partition_ancestors(c.oid))
            or x.relation in (select relid from pg_catalog.pg_partition_tree(c.oid))))";

/// A table that can be attached, with its key.
///
/// # Errors
/// It cannot, or the caller does not own it.
pub fn attachable(relation: pg_sys::Oid) -> Result<Table, Report> {
    let mut table = owned(relation)?;
    let name = &table.name;
    // The caller's own rights were checked by `owned`; he need not be able to read our catalog.
    let facts = as_extension(|| {
        let facts = format!(
            "select c.relkind::text, c.relpersistence = 't', c.relforcerowsecurity,
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
                    {RELATIVE}, pg_catalog.getdatabaseencoding()::text
             from pg_catalog.pg_class c where c.oid = $1"
        );
        let rows = spi::run(&facts, &[spi::parameter(relation)]);
        let is = |column| rows.get::<bool>(0, column) == Some(true);
        let text = |column| rows.get::<String>(0, column);
        Facts {
            kind: text(1).unwrap_or_default(),
            is_temporary: is(2),
            forces_security: is(3),
            is_system: is(4),
            has_children: is(5),
            key: rows.get(0, 6).unwrap_or_default(),
            relative: text(7),
            encoding: text(8).unwrap_or_default(),
        }
    });
    let wrong = |message: String| Report::new(PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE, message);
    if facts.is_system {
        return Err(wrong(format!("cannot attach system table {name}"))
            .detail("Only ordinary and partitioned tables of your own can be attached."));
    }
    if facts.kind != "r" && facts.kind != "p" {
        let refused = |what: &str| wrong(format!("cannot attach {what} {name}"));
        let of_tables = "Only ordinary and partitioned tables can be attached.";
        return Err(match facts.kind.as_str() {
            "v" => refused("view")
                .detail("Its changes fire no row triggers.")
                .hint("Attach the table whose rows it shows, with the view as \"document\"."),
            "m" => refused("materialized view")
                .detail("Its changes fire no row triggers.")
                .hint("Attach the table that it reads."),
            "f" => refused("foreign table").detail("Its changes elsewhere fire no triggers here."),
            "S" => refused("sequence").detail(of_tables),
            "i" | "I" => refused("index").detail(of_tables),
            _ => refused("relation").detail(of_tables),
        });
    }
    if facts.is_temporary {
        let name = relation_name(relation);
        return Err(wrong(format!("cannot attach temporary table \"{name}\""))
            .detail("The worker cannot read another session's temporary table."));
    }
    if facts.has_children {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("cannot attach table {name} that other tables inherit from"),
        )
        .detail("Changes of inheritance children fire no trigger of their parent.")
        .hint("Attach each child, or use declarative partitioning."));
    }
    if let Some(relative) = facts.relative {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("cannot attach table {name} beside table {relative} of the same partition tree"),
        )
        .detail(format!("Table {relative} is attached, or documents of another table show its rows."))
        .hint("Attach, and let views read, either the partitioned table or single partitions."));
    }
    if facts.forces_security {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("cannot attach table {name} with forced row-level security"),
        )
        .detail("The worker reads as the table's owner, to whom the policies would apply.")
        .hint("Use ALTER TABLE ... NO FORCE ROW LEVEL SECURITY."));
    }
    if facts.encoding != "UTF8" {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("cannot attach tables of a database with encoding {}", facts.encoding),
        )
        .detail("Documents are JSON, which is UTF-8."));
    }
    if facts.key.is_empty() {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_INVALID_TABLE_DEFINITION,
            format!("cannot attach table {name} without a primary key"),
        )
        .detail("Documents are identified by their row's key.")
        .hint("Add a primary key, or a unique index on NOT NULL columns named as REPLICA IDENTITY."));
    }
    let columns = facts.key.clone();
    if !as_extension(|| relation::identify(relation, columns)) {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_INVALID_TABLE_DEFINITION,
            format!("cannot attach table {name} by an index that compares otherwise than its columns"),
        )
        .detail(format!(
            "Rows are read in the order of ({}), to which some may be equal that the index keeps apart.",
            facts.key.join(", ")
        ))
        .hint("Create the index named as REPLICA IDENTITY with the collations and the default operator classes of its columns, or add a primary key."));
    }
    table.key_columns = facts.key;
    Ok(table)
}

/// A table whose rows documents show.
///
/// # Errors
/// It is none, `caller` may not create triggers on it, or a table of the same partition tree is followed already.
pub fn followable(relation: pg_sys::Oid, caller: pg_sys::Oid) -> Result<Table, Report> {
    let rows = spi::run(
        &format!(
            "select pg_catalog.has_table_privilege($2, c.oid, 'TRIGGER'),
                    c.relkind in ('r', 'p') and c.relpersistence <> 't' and c.oid >= 16384, {RELATIVE}
             from pg_catalog.pg_class c where c.oid = $1"
        ),
        &[spi::parameter(relation), spi::parameter(caller)],
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
pub fn named(relation: pg_sys::Oid) -> Table {
    Table { oid: relation, name: qualified(relation), key_columns: Vec::new(), estimated_rows: -1.0 }
}

/// A view that documents can be read from.
fn check_view(table: &Table, view: pg_sys::Oid) -> Result<(), Report> {
    let facts = as_extension(|| {
        let rows = spi::run(
            "select c.relkind::text, c.relowner = t.relowner, c.relpersistence = 't', t.relowner
             from pg_catalog.pg_class c, pg_catalog.pg_class t where c.oid = $1 and t.oid = $2",
            &[spi::parameter(view), spi::parameter(table.oid)],
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
    let columns = relation::columns(view);
    for key in relation::columns(table.oid).iter().filter(|column| table.key_columns.contains(&column.name)) {
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
    // All of its columns and under that search path: a function in it may name a table that another path finds.
    with_pinned_path(|| as_owner(owner, || spi::run(&format!("select * from {name} limit 0"), &[]).len()));
    Ok(())
}

fn check_index(table: &Table, index: Option<&str>) -> Result<String, Report> {
    let index = match index {
        Some(index) => index.to_owned(),
        // The engine knows no capitals; people who quote "Collectives" expect index collectives.
        None => relation_name(table.oid).to_lowercase(),
    };
    es::check_index_name(&index).map_err(|rule| {
        Report::new(PgSqlErrorCode::ERRCODE_INVALID_NAME, format!("index name \"{index}\" is not valid"))
            .detail(format!("It {rule}."))
            .hint("Pass a name that Elasticsearch accepts as \"index\".")
    })?;
    Ok(index)
}

fn check_columns(table: &Table, document: pg_sys::Oid, exclude: &[String]) -> Result<(), Report> {
    let columns = relation::columns(document);
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
    match relation::columns(table.oid).iter().find(|known| known.name == column) {
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

/// True if the extension is there and the caller is a member of the role that owns it.
pub fn owns_extension() -> bool {
    // SAFETY: lookups in a live transaction.
    unsafe {
        let extension = pg_sys::get_extension_oid(c"pg_es_sync".as_ptr(), true);
        extension != pg_sys::InvalidOid && pg_sys::pg_extension_ownercheck(extension, pg_sys::GetUserId())
    }
}
