//! Which tables a document is made of, and the way from a row of theirs to the documents that show it.
//!
//! The ways come from the view's own stored query (`view`). What that does not determine is declared by the user, and
//! never guessed.

use std::ffi::CStr;
use std::fmt::Write;

use pgrx::{PgSqlErrorCode, pg_sys};

use super::attach::{self, Table};
use super::catalog::{self, Attachment, Column};
use super::definition;
use super::operator::Operator;
use super::options::Options;
use super::view::graph::{self, Comparison};
use super::view::tree::{Tree, Used};
use super::{key, link};
use crate::capture;
use crate::document::shape::text_as;
use crate::jobs::record;
use crate::postgres::error::Report;
use crate::postgres::spi::{self, quoted};
use crate::postgres::transaction;

/// What an attachment's documents are made of.
#[derive(Debug, Default)]
pub struct Followed {
    ways: Vec<Way>,
    /// What the view reads and nobody hears of: "name: why".
    pub unfollowed: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
struct Way {
    related: pg_sys::Oid,
    columns: Vec<String>,
    /// None where every UPDATE matters.
    used: Option<Vec<String>>,
    nulls: bool,
    /// None where the columns are keys of the attached table.
    query: Option<String>,
}

/// An attached table, as ways need it.
struct Root {
    oid: pg_sys::Oid,
    /// Whose rights its documents are read with.
    owner: pg_sys::Oid,
    name: String,
    key: Vec<Column>,
}

/// Which columns of a view its documents use.
pub struct Shown<'a> {
    pub view: Option<pg_sys::Oid>,
    pub exclude: &'a [String],
    pub options: &'a Options,
    /// A condition may use any column.
    pub filter: Option<&'a str>,
}

impl Followed {
    /// The tables that are followed, the attached one left out.
    pub fn tables(&self, root: pg_sys::Oid) -> Vec<pg_sys::Oid> {
        let mut tables: Vec<pg_sys::Oid> =
            self.ways.iter().map(|way| way.related).filter(|table| *table != root).collect();
        tables.sort_unstable_by_key(|table| table.to_u32());
        tables.dedup();
        tables
    }
}

/// Finds out what documents are made of. SPI must be connected.
///
/// # Errors
/// A table whose way to the documents is neither determined by the view nor declared.
pub fn find(table: &Table, shown: &Shown) -> Result<Followed, Report> {
    let columns = catalog::columns(table.oid);
    let column = |name: &String| columns.iter().find(|column| &column.name == name).cloned();
    let root = Root {
        oid: table.oid,
        owner: catalog::owner(table.oid),
        name: table.name.clone(),
        key: table.key_columns.iter().filter_map(column).collect(),
    };
    if root.key.len() < table.key_columns.len() {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
            format!("table {} has lost a column of its key ({})", table.name, table.key_columns.join(", ")),
        )
        .detail("Documents are identified by their row's key.")
        .hint("Detach the table and attach it anew."));
    }
    let mut followed = Followed::default();
    let mut declared = declared(&root)?;
    let related: Vec<pg_sys::Oid> = declared.iter().map(|way| way.related).collect();
    let filtered = match shown.view {
        Some(view) => read_view(&root, view, shown, &mut declared, &mut followed)?,
        None => 1,
    };
    // A row's own columns show no other table.
    if shown.view.is_some() || shown.filter.is_some() {
        followed.ways.extend(declared);
    }
    if let Some(filter) = shown.filter {
        read_filter(&root, shown.view, filter, filtered, &related, &mut followed)?;
    }
    Ok(followed)
}

/// What decides about documents besides their own row, and is not followed. The first `filtered` tables that the filter
/// reads are those that it filters: the view's, or the table itself. `declared` are tables of which the user says how
/// they are.
///
/// # Errors
/// A filter that time alone would have to apply: rows would not leave the index by themselves.
fn read_filter(
    root: &Root,
    view: Option<pg_sys::Oid>,
    filter: &str,
    filtered: usize,
    declared: &[pg_sys::Oid],
    followed: &mut Followed,
) -> Result<(), Report> {
    let tree = Tree::of_filter(root.owner, view.unwrap_or(root.oid), filter);
    for (name, why) in &tree.unfollowed {
        let known = format!("{name}: {why}");
        // The view's own is told of already.
        if followed.unfollowed.contains(&known) {
            continue;
        }
        if why.contains("with time") {
            return Err(Report::new(
                PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                "cannot filter by what changes with time",
            )
            .detail(format!("The filter uses {name}, and a row that stays as it is would not leave its index."))
            .hint("Filter by columns only, and compare with the time when you search."));
        }
        followed.unfollowed.push(known);
    }
    let read_by_functions = if tree.calls_readers() { declared } else { &[] };
    let read =
        tree.graph.tables[filtered..].iter().filter(|table| table.fires).map(|table| pg_sys::Oid::from(table.oid));
    for oid in read.clone() {
        let name = format!("{}: the filter reads it, and no way is declared", attach::qualified(oid));
        if !declared.contains(&oid) && !followed.unfollowed.contains(&name) {
            followed.unfollowed.push(name);
        }
    }
    // The view says nothing of their columns.
    for oid in read.chain(read_by_functions.iter().copied()) {
        for way in followed.ways.iter_mut().filter(|way| way.related == oid) {
            way.used = None;
        }
    }
    Ok(())
}

/// The number of tables that the view reads.
fn read_view(
    root: &Root,
    view: pg_sys::Oid,
    shown: &Shown,
    declared: &mut [Way],
    followed: &mut Followed,
) -> Result<usize, Report> {
    let tree = Tree::of_view(view);
    followed.unfollowed = tree.unfollowed.iter().map(|(name, why)| format!("{name}: {why}")).collect();
    let place = |name: &String| tree.columns.iter().position(|(known, _)| known == name);
    let keys: Vec<_> =
        root.key.iter().filter_map(|column| place(&column.name)).map(|place| tree.output(place)).collect();
    let is_shown = |(name, kind): &(String, pg_sys::Oid)| {
        shown.filter.is_some()
            || root.key.iter().any(|key| &key.name == name)
            || catalog::is_synced(name, *kind, shown.exclude, shown.options)
    };
    let used = tree.used((0..tree.columns.len()).filter(|place| is_shown(&tree.columns[*place])));

    let mut own: Option<Option<Vec<String>>> = None;
    let mut undetermined: Vec<String> = Vec::new();
    let mut first_undetermined = None;
    let mut read = std::collections::HashSet::new();
    let mut ways = tree.graph.ways(&keys);
    for (place, occurrence) in tree.graph.tables.iter().enumerate().filter(|(_, table)| table.fires) {
        let oid = pg_sys::Oid::from(occurrence.oid);
        let columns = catalog::columns(oid);
        let used = names(&used[place], &columns);
        // How a row leads to documents is declared; which of its columns they show, the view still says, unless functions
        // read it, too.
        for way in declared.iter_mut().filter(|way| way.related == oid && !tree.calls_readers()) {
            match (&mut way.used, &used) {
                (Some(mine), Some(its)) => mine.extend(its.iter().cloned()),
                (mine @ None, Some(its)) if read.insert(oid) => *mine = Some(its.clone()),
                (mine, _) => {
                    read.insert(oid);
                    *mine = None;
                }
            }
        }
        let Some(way) = ways[place].take() else {
            if !declared.iter().any(|way| way.related == oid) {
                let why = occurrence.obstacle.clone().unwrap_or_else(|| {
                    "the view does not compare its columns for equality with what leads to the key".to_owned()
                });
                let why = format!("{}: {why}.", attach::qualified(oid));
                if !undetermined.contains(&why) {
                    undetermined.push(why);
                }
                first_undetermined.get_or_insert(oid);
            }
            continue;
        };
        if oid == root.oid && is_root(&way, root) {
            // The document's own row.
            own = Some(match (own, used) {
                (None, used) => used,
                (Some(Some(mut mine)), Some(its)) => {
                    mine.extend(its);
                    Some(mine)
                }
                _ => None,
            });
            continue;
        }
        let way = stated(&way, &tree, root, oid, used);
        if !followed.ways.contains(&way) {
            followed.ways.push(way);
        }
    }
    if let Some(first) = first_undetermined {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_INVALID_OBJECT_DEFINITION,
            format!("cannot follow table {}, which view {} reads", attach::qualified(first), attach::qualified(view)),
        )
        .detail(format!("The view does not determine which documents show a row of it. {}", undetermined.join(" ")))
        .hint(format!(
            "Declare the way first: SELECT es_sync.relate('{}', '{}', 'SELECT ... related.column ...').",
            root.name,
            attach::qualified(first)
        )));
    }
    followed.ways.insert(
        0,
        Way {
            related: root.oid,
            columns: root.key.iter().map(|column| column.name.clone()).collect(),
            used: own.flatten(),
            nulls: false,
            query: None,
        },
    );
    Ok(tree.graph.tables.len())
}

/// True if the way leads from each row to its own document: by its key, compared as a key is.
fn is_root(way: &graph::Way, root: &Root) -> bool {
    let is_own = |((_, number), how): &((usize, i16), Comparison), column: &Column| {
        let as_key = || match (how, Operator::equal(column.type_oid).comparison(column.collation)) {
            (
                Comparison::Equal { family, collation, .. },
                Some(Comparison::Equal { family: own, collation: its, .. }),
            ) => (*family, *collation) == (own, its),
            _ => false,
        };
        *number == column.number && (*how == Comparison::Same || as_key())
    };
    way.tables.len() == 1
        && way.keys.len() == root.key.len()
        && way.keys.iter().zip(&root.key).all(|(key, column)| is_own(key, column))
}

fn names(used: &Used, columns: &[Column]) -> Option<Vec<String>> {
    match used {
        Used::Everything => None,
        Used::Columns(numbers) => Some(
            columns
                .iter()
                .filter(|column| numbers.contains(&column.number))
                .map(|column| column.name.clone())
                .collect(),
        ),
    }
}

/// True for types of which equal values are identical, so that a value of one can stand for the key.
fn is_exact(kind: pg_sys::Oid) -> bool {
    is_integer(kind) || matches!(kind, pg_sys::UUIDOID | pg_sys::DATEOID | pg_sys::OIDOID | pg_sys::BOOLOID)
}

fn is_integer(kind: pg_sys::Oid) -> bool {
    matches!(kind, pg_sys::INT2OID | pg_sys::INT4OID | pg_sys::INT8OID)
}

/// Says a way as names and SQL.
fn stated(way: &graph::Way, tree: &Tree, root: &Root, related: pg_sys::Oid, used: Option<Vec<String>>) -> Way {
    let tables: Vec<(pg_sys::Oid, Vec<Column>)> = way
        .tables
        .iter()
        .map(|table| pg_sys::Oid::from(tree.graph.tables[*table].oid))
        .map(|oid| (oid, catalog::columns(oid)))
        .collect();
    let column = |(table, number): (usize, i16)| tables[table].1.iter().find(|column| column.number == number);
    let name = |place| column(place).map(|column| column.name.clone()).unwrap_or_default();
    let kind = |place| column(place).map_or(pg_sys::InvalidOid, |column| column.type_oid);

    let direct = way.tables.len() == 1
        && way.keys.iter().zip(&root.key).all(|((place, _), key)| {
            let its = kind(*place);
            is_exact(its) && (its == key.type_oid || (is_integer(its) && is_integer(key.type_oid)))
        });
    if direct {
        let columns = way.keys.iter().map(|(place, _)| name(*place)).collect();
        return Way { related, columns, used, nulls: false, query: None };
    }

    let first: Vec<&Column> = way.columns().iter().filter_map(|number| column((0, *number))).collect();
    // The last table may be the attached one itself, by its key.
    let last = way.tables.len() - 1;
    let ends_at_root = last > 0
        && tables[last].0 == root.oid
        && way.keys.iter().zip(&root.key).all(|((place, _), key)| *place == (last, key.number));
    let alias = |table: usize| if ends_at_root && table == last { "r".to_owned() } else { format!("t{table}") };
    let qualified = |place: (usize, i16)| format!("{}.{}", alias(place.0), quoted(&name(place)));
    let condition = |left: (usize, i16), how: Comparison, right: (usize, i16)| match how {
        Comparison::Same | Comparison::Equal { .. } => {
            let [left, right] = [left, right].map(|place| (qualified(place), kind(place)));
            comparison(how, left.1).compare(left, right, &collate(how))
        }
        Comparison::Element { operator } => {
            Operator::of(operator).is_element(&qualified(left), kind(left), &qualified(right), kind(right))
        }
        Comparison::Contains { operator } => {
            Operator::of(operator).is_any_of(&qualified(right), kind(right), &qualified(left), kind(left))
        }
    };
    let mut joined = values(&first, "t0");
    for (place, (table, _)) in tables.iter().enumerate().skip(1) {
        let conditions: Vec<String> = way
            .conditions
            .iter()
            .filter(|condition| condition.left.0.max(condition.right.0) == place)
            .map(|known| condition(known.left, known.how, known.right))
            .collect();
        let on = if conditions.is_empty() { "true".to_owned() } else { conditions.join(" and ") };
        let _ = write!(joined, "\njoin {} {} on {on}", attach::qualified(*table), alias(place));
    }
    if !ends_at_root {
        let on: Vec<String> = way
            .keys
            .iter()
            .zip(&root.key)
            .map(|((place, how), key)| {
                let left = (format!("r.{}", quoted(&key.name)), key.type_oid);
                comparison(*how, key.type_oid).compare(left, (qualified(*place), kind(*place)), &collate(*how))
            })
            .collect();
        let _ = write!(joined, "\njoin {} r on {}", root.name, on.join(" and "));
    }
    let keys: Vec<String> = root.key.iter().map(|key| format!("r.{}", quoted(&key.name))).collect();
    let query = format!("select {} from {joined}", keys.join(", "));
    Way {
        related,
        columns: first.iter().map(|column| column.name.clone()).collect(),
        used,
        nulls: false,
        query: Some(query),
    }
}

/// How values of this type compare for `how`.
fn comparison(how: Comparison, kind: pg_sys::Oid) -> Operator {
    match how {
        Comparison::Equal { operator, .. } => Operator::of(operator),
        _ => Operator::equal(kind),
    }
}

/// What has values compare by the collation that the view compares them by; between these two columns there may have been
/// another one, whose collation it is.
fn collate(how: Comparison) -> String {
    match how {
        Comparison::Equal { collation, .. } if ![0, pg_sys::DEFAULT_COLLATION_OID.to_u32()].contains(&collation) => {
            format!(" collate {}", collation_name(pg_sys::Oid::from(collation)))
        }
        _ => String::new(),
    }
}

/// A relation of rows with the given columns, from a parameter of texts for each.
fn values(columns: &[&Column], alias: &str) -> String {
    let parameters: Vec<String> =
        (1..=columns.len()).map(|n| format!("pg_catalog.unnest(${n}::pg_catalog.text[])")).collect();
    let names: Vec<String> = (1..=columns.len()).map(|n| format!("v{n}")).collect();
    let typed: Vec<String> = columns
        .iter()
        .zip(&names)
        .map(|(column, name)| {
            let collation = collation(column).map(|name| format!(" collate {name}")).unwrap_or_default();
            format!("v.{name}::{}{collation} as {}", text_as(column.type_oid, ""), quoted(&column.name))
        })
        .collect();
    format!("(select {} from rows from ({}) v ({})) {alias}", typed.join(", "), parameters.join(", "), names.join(", "))
}

/// A column's collation, where it is not its type's.
fn collation(column: &Column) -> Option<String> {
    // SAFETY: a syscache lookup in a live transaction.
    let own = unsafe { pg_sys::get_typcollation(column.type_oid) };
    let differs = column.collation != pg_sys::InvalidOid && column.collation != own;
    differs.then(|| collation_name(column.collation))
}

fn collation_name(collation: pg_sys::Oid) -> String {
    // SAFETY: syscache lookups in a live transaction; the palloc'd result is copied.
    unsafe { CStr::from_ptr(pg_sys::generate_collation_name(collation)).to_string_lossy().into_owned() }
}

/// The ways that were declared for a table.
fn declared(root: &Root) -> Result<Vec<Way>, Report> {
    let rows = spi::run(
        "select d.related::oid, d.via from es_sync.declaration d
         join pg_catalog.pg_class c on c.oid = d.related
         where d.root = $1::oid order by c.oid",
        &[(pg_sys::OIDOID, spi::value(root.oid))],
    );
    let declarations: Vec<(pg_sys::Oid, String)> =
        (0..rows.len()).filter_map(|row| Some((rows.get(row, 1)?, rows.get(row, 2)?))).collect();
    declarations.iter().map(|(related, via)| declared_way(root, *related, via)).collect()
}

/// What stands for one declaration. What is wrong with its query is raised as Postgres says it.
fn declared_way(root: &Root, related: pg_sys::Oid, via: &str) -> Result<Way, Report> {
    let invalid = |message: String| {
        Report::new(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message).hint(
            "Write a query that returns keys of the attached table, and names the row's columns as related.column.",
        )
    };
    let keys: Vec<String> = (1..=root.key.len()).map(|n| format!("k{n}")).collect();
    let statement = format!("select w.* from {} related cross join lateral (\n{via}\n) w", attach::qualified(related));
    let tree = Tree::of_statement(root.owner, &statement);
    let columns = catalog::columns(related);
    let count = tree.width();
    if count != root.key.len() {
        return Err(invalid(format!(
            "the way returns {count} columns, but the key of table {} has {}",
            root.name,
            root.key.len()
        )));
    }
    let used = match tree.used(0..count).first() {
        Some(Used::Columns(numbers)) => {
            columns.iter().filter(|column| numbers.contains(&column.number)).collect::<Vec<_>>()
        }
        _ => columns.iter().collect(),
    };
    if used.is_empty() {
        return Err(invalid("the way uses no column of the related row".to_owned()));
    }
    let on: Vec<String> = root
        .key
        .iter()
        .zip(&keys)
        .map(|(key, name)| Operator::equal(key.type_oid).meets(&format!("r.{}", quoted(&key.name)), key, name))
        .collect();
    let select: Vec<String> = root.key.iter().map(|key| format!("r.{}", quoted(&key.name))).collect();
    let query = format!(
        "select {} from {} cross join lateral (\n{via}\n) w ({}) join {} r on {}",
        select.join(", "),
        values(&used, "related"),
        keys.join(", "),
        root.name,
        on.join(" and ")
    );
    // Until the view says more, every UPDATE counts.
    Ok(Way {
        related,
        columns: used.iter().map(|column| column.name.clone()).collect(),
        used: None,
        nulls: true,
        query: Some(query),
    })
}

/// Writes an attachment's ways down, and follows the tables that they begin at. Their locks are taken here: whoever has
/// written to one of them without noting it has ended then.
///
/// # Errors
/// A table that cannot be locked or must not be followed.
pub fn store(attachment: i32, root: pg_sys::Oid, followed: &Followed, caller: pg_sys::Oid) -> Result<(), Report> {
    let mut tables = Vec::new();
    for related in followed.tables(root) {
        tables.push(attach::related_table(related, caller)?);
    }
    for table in &tables {
        attach::lock(table, "share row exclusive");
    }
    // Those that were there before go last: a link that stays keeps its number, under which the queue has rows.
    let before = spi::run(
        "select coalesce(pg_catalog.array_agg(w.id), '{}') from es_sync.way w where w.attachment = $1",
        &[(pg_sys::INT4OID, spi::value(attachment))],
    );
    let (before, owner) = (before.get::<Vec<i64>>(0, 1), catalog::owner(root));
    for way in &followed.ways {
        if let Some(query) = &way.query {
            // What is wrong with it must be known now, not by the worker: a right that is missing, a query that fails.
            let none: Vec<_> =
                way.columns.iter().map(|_| (pg_sys::TEXTARRAYOID, spi::value(Vec::<String>::new()))).collect();
            transaction::as_owner(owner, || spi::run(query, &none).len());
        }
        let source = match &way.query {
            Some(_) => Some(link_of(root, way).map_or_else(link::free_source, Ok)?),
            None => None,
        };
        spi::run(
            "insert into es_sync.way (attachment, root, related, source, columns, used, nulls, query)
             values ($1, $2::oid, $3::oid, $8, $4, $5, $6, $7)",
            &[
                (pg_sys::INT4OID, spi::value(attachment)),
                (pg_sys::OIDOID, spi::value(root)),
                (pg_sys::OIDOID, spi::value(way.related)),
                (pg_sys::TEXTARRAYOID, spi::value(way.columns.clone())),
                (pg_sys::TEXTARRAYOID, way.used.clone().and_then(spi::value)),
                (pg_sys::BOOLOID, spi::value(way.nulls)),
                (pg_sys::TEXTOID, way.query.clone().and_then(spi::value)),
                (pg_sys::INT4OID, source.and_then(spi::value)),
            ],
        );
    }
    spi::run("delete from es_sync.way w where w.id = any ($1)", &[(pg_sys::INT8ARRAYOID, before.and_then(spi::value))]);
    store_unfollowed(attachment, followed);
    for table in &tables {
        attach::create_triggers(table);
    }
    Ok(())
}

/// The link that notes of a related row what this way needs, if there is one.
fn link_of(root: pg_sys::Oid, way: &Way) -> Option<i32> {
    let rows = spi::run(
        "select w.source from es_sync.way w
         where w.root = $1::oid and w.related = $2::oid and w.columns = $3 and w.nulls = $4 and w.source is not null
         limit 1",
        &[
            (pg_sys::OIDOID, spi::value(root)),
            (pg_sys::OIDOID, spi::value(way.related)),
            (pg_sys::TEXTARRAYOID, spi::value(way.columns.clone())),
            (pg_sys::BOOLOID, spi::value(way.nulls)),
        ],
    );
    rows.first(1)
}

/// Notes for the status what nobody hears of.
fn store_unfollowed(attachment: i32, followed: &Followed) {
    spi::run(
        "update es_sync.attachment a set not_followed = $2 where a.id = $1 and a.not_followed is distinct from $2",
        &[(pg_sys::INT4OID, spi::value(attachment)), (pg_sys::TEXTARRAYOID, spi::value(followed.unfollowed.clone()))],
    );
}

/// Tables that the given attachments follow, the attached ones included.
pub fn tables_of(attachments: &[i32]) -> Vec<pg_sys::Oid> {
    let rows = spi::run(
        "select a.relation::oid from es_sync.attachment a where a.id = any ($1)
         union
         select w.related::oid from es_sync.way w join pg_catalog.pg_class c on c.oid = w.related
         where w.attachment = any ($1)
         order by 1",
        &[(pg_sys::INT4ARRAYOID, spi::value(attachments.to_vec()))],
    );
    (0..rows.len()).filter_map(|row| rows.get(row, 1)).collect()
}

/// Those tables that no attachment but the given ones follows.
pub fn only_followed_by(attachments: &[i32]) -> Vec<pg_sys::Oid> {
    let rows = spi::run(
        "select x.oid from (
             select a.relation::oid, a.id from es_sync.attachment a
             union
             select w.related::oid, w.attachment from es_sync.way w) x (oid, attachment)
         join pg_catalog.pg_class c on c.oid = x.oid
         group by x.oid having pg_catalog.bool_and(x.attachment = any ($1))
         order by x.oid",
        &[(pg_sys::INT4ARRAYOID, spi::value(attachments.to_vec()))],
    );
    (0..rows.len()).filter_map(|row| rows.get(row, 1)).collect()
}

/// Declares the way from rows of a related table to documents of a table, or takes that back. Where the table is attached
/// already, its ways are found anew, and what was missed so far is mended.
///
/// # Errors
/// The declaration does not fit, or is still needed.
pub fn relate(table: &Table, related: pg_sys::Oid, via: Option<&str>, caller: pg_sys::Oid) -> Result<(), Report> {
    match via {
        Some(via) => {
            spi::run(
                "insert into es_sync.declaration as d (root, related, via) values ($1::oid, $2::oid, $3)
                 on conflict (root, related) do update set via = excluded.via",
                &[
                    (pg_sys::OIDOID, spi::value(table.oid)),
                    (pg_sys::OIDOID, spi::value(related)),
                    (pg_sys::TEXTOID, spi::value(via)),
                ],
            );
        }
        None => {
            spi::run(
                "delete from es_sync.declaration d where d.root = $1::oid and d.related = $2::oid",
                &[(pg_sys::OIDOID, spi::value(table.oid)), (pg_sys::OIDOID, spi::value(related))],
            );
        }
    }
    let attachments = catalog::of_relation(table.oid, None);
    if attachments.is_empty() {
        // Only checked: the way is taken by the next attach.
        find(table, &Shown { view: None, exclude: &[], options: &Options::default(), filter: None })?;
    }
    for attachment in attachments {
        let attachment = definition::with_names(attachment);
        renew(&attach::table_of(&attachment), &attachment, caller)?;
        attach::create_repair(
            attachment.id,
            &format!("changes of {} were followed otherwise until now", attach::qualified(related)),
        );
    }
    catalog::invalidate_captures();
    capture::announce_catalog_change();
    Ok(())
}

/// Finds an attachment's ways anew. What reads its table under way begins again.
///
/// # Errors
/// As `find` and `store`.
pub fn renew(table: &Table, attachment: &Attachment, caller: pg_sys::Oid) -> Result<(), Report> {
    let followed = find(table, &shown_by(attachment))?;
    // Who skipped an UPDATE by the former rules has ended then.
    attach::lock(table, "share row exclusive");
    store(attachment.id, table.oid, &followed, caller)?;
    record::restart(Some(attachment.id));
    catalog::invalidate_captures();
    // The worker looks whether anything is still in the way.
    // SAFETY: the table exists; the message is sent at commit.
    unsafe { pg_sys::CacheInvalidateRelcacheByRelid(table.oid) };
    Ok(())
}

/// As `renew`, where the ways have changed; true if they have. What cannot be found is raised.
///
/// # Errors
/// As `find` and `store`.
pub fn renew_where_changed(table: &Table, attachment: &Attachment, caller: pg_sys::Oid) -> Result<bool, Report> {
    let followed = find(table, &shown_by(attachment))?;
    let rows = spi::run(
        "select w.related::oid, w.columns, w.used, w.nulls, w.query from es_sync.way w where w.attachment = $1 order by w.id",
        &[(pg_sys::INT4OID, spi::value(attachment.id))],
    );
    let links = || -> Vec<i32> {
        spi::run(
            "select coalesce(pg_catalog.array_agg(w.source), '{}') from es_sync.way w
             where w.attachment = $1 and w.source is not null",
            &[(pg_sys::INT4OID, spi::value(attachment.id))],
        )
        .get(0, 1)
        .unwrap_or_default()
    };
    let stored: Vec<Way> = (0..rows.len())
        .filter_map(|row| {
            Some(Way {
                related: rows.get(row, 1)?,
                columns: rows.get(row, 2)?,
                used: rows.get(row, 3),
                nulls: rows.get(row, 4)?,
                query: rows.get(row, 5),
            })
        })
        .collect();
    if stored == followed.ways {
        store_unfollowed(attachment.id, &followed);
        return Ok(false);
    }
    let before = links();
    renew(table, attachment, caller)?;
    let after = links();
    if before.iter().any(|link| !after.contains(link)) {
        // What the queue holds under a link that is gone leads nowhere.
        attach::create_repair(attachment.id, "changes of its related tables were followed otherwise until now");
    }
    capture::announce_catalog_change();
    Ok(true)
}

fn shown_by(attachment: &Attachment) -> Shown<'_> {
    Shown {
        view: attachment.document,
        exclude: &attachment.exclude,
        options: &attachment.options,
        filter: attachment.filter.as_deref(),
    }
}

/// What is noted for a row of a table that documents of others show.
pub struct Note {
    /// As the queue has it: a link, or the attached table itself.
    pub source: u32,
    pub columns: Vec<String>,
}

impl Note {
    /// What is noted of a row whose columns have these values, in the text that capture makes of them; None for a row
    /// that leads nowhere.
    pub fn text(&self, values: &[Option<String>]) -> Option<String> {
        let mut text = String::new();
        if link::is_link(self.source) {
            for (place, value) in values.iter().enumerate() {
                link::push_value(&mut text, place == 0, value.as_deref());
            }
        } else if let [value] = values {
            text.clone_from(value.as_ref()?);
        } else {
            for (place, value) in values.iter().enumerate() {
                key::push_part(&mut text, place == 0, value.as_ref()?);
            }
        }
        Some(text)
    }
}

/// What an attachment wants noted of a partition's rows: keys, or values that lead to keys. Nothing once it is no partition
/// of a table that the attachment's documents show. SPI must be connected.
pub fn notes_of_partition(attachment: i32, part: pg_sys::Oid) -> Vec<Note> {
    let rows = spi::run(
        "with above as (select p.relid::oid as oid from pg_catalog.pg_partition_ancestors($2) p)
         select coalesce(w.source, w.root::oid::int8), w.columns from es_sync.way w
         where w.attachment = $1 and w.related::oid in (select oid from above)
         union
         select a.relation::oid::int8, a.key_columns from es_sync.attachment a
         where a.id = $1 and a.document is null and a.relation::oid in (select oid from above)",
        &[(pg_sys::INT4OID, spi::value(attachment)), (pg_sys::OIDOID, spi::value(part))],
    );
    read_notes(&rows)
}

/// What is noted for rows of a table, its own documents left out. SPI must be connected.
pub fn notes(related: pg_sys::Oid) -> Vec<Note> {
    let rows = spi::run(
        "select distinct coalesce(w.source, w.root::oid::int8), w.columns from es_sync.way w
         where w.related = $1::oid and (w.source is not null or w.root <> w.related or w.columns <> (
             select a.key_columns from es_sync.attachment a where a.id = w.attachment))",
        &[(pg_sys::OIDOID, spi::value(related))],
    );
    read_notes(&rows)
}

fn read_notes(rows: &spi::Rows) -> Vec<Note> {
    (0..rows.len())
        .filter_map(|row| Some(Note { source: rows.get::<i64>(row, 1)? as u32, columns: rows.get(row, 2)? }))
        .collect()
}

/// A link of the queue: what the worker needs to find the keys that its values lead to.
#[derive(Debug, Clone, PartialEq)]
pub struct Link {
    pub source: u32,
    pub root: pg_sys::Oid,
    pub key_columns: Vec<String>,
    /// How many values make one of its "keys".
    pub columns: usize,
    /// From values to keys.
    pub query: String,
}

/// All links. SPI must be connected.
pub fn links() -> Vec<Link> {
    let rows = spi::run(
        "select w.source, w.root::oid, pg_catalog.min(a.key_columns), pg_catalog.max(pg_catalog.cardinality(w.columns)),
                pg_catalog.string_agg(distinct w.query, E'\\nunion all\\n')
         from es_sync.way w join es_sync.attachment a on a.id = w.attachment
         where w.source is not null
         group by w.source, w.root
         order by w.source",
        &[],
    );
    (0..rows.len())
        .filter_map(|row| {
            Some(Link {
                source: rows.get::<i32>(row, 1)? as u32,
                root: rows.get(row, 2)?,
                key_columns: rows.get(row, 3)?,
                columns: rows.get::<i32>(row, 4)? as usize,
                query: rows.get(row, 5)?,
            })
        })
        .collect()
}
