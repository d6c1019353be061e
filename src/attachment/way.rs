//! A way: from a row of a related table to the documents that show it, as names and SQL. It is what the view's graph says
//! (`stated`), or what the user has declared (`declared`).

use std::ffi::CStr;
use std::fmt::Write;

use pgrx::{PgSqlErrorCode, pg_sys};

use super::check::Table;
use super::operator::Operator;
use super::view::graph::{self, Comparison};
use super::view::tree::{Tree, Used};
use crate::document::shape::text_as;
use crate::postgres::error::Report;
use crate::postgres::relation::{self, Column};
use crate::postgres::spi::{self, quoted};

/// From rows of a related table to documents.
#[derive(Debug, Clone, PartialEq)]
pub struct Way {
    pub related: pg_sys::Oid,
    /// Of the related table: their values lead to the keys.
    pub columns: Vec<String>,
    /// None where every UPDATE matters.
    pub used: Option<Vec<String>>,
    /// Rows count, too, in which one of the columns is null.
    pub nulls: bool,
    /// None where the columns are keys of the attached table.
    pub query: Option<String>,
}

/// An attached table, as ways need it.
pub struct Root {
    pub oid: pg_sys::Oid,
    /// Whose rights its documents are read with.
    pub owner: pg_sys::Oid,
    pub name: String,
    pub key: Vec<Column>,
}

impl Root {
    /// # Errors
    /// The table has lost a column of its key.
    pub fn of(table: &Table) -> Result<Self, Report> {
        let columns = relation::columns(table.oid);
        let column = |name: &String| columns.iter().find(|column| &column.name == name).cloned();
        let key: Vec<Column> = table.key_columns.iter().filter_map(column).collect();
        if key.len() < table.key_columns.len() {
            return Err(Report::new(
                PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                format!("table {} has lost a column of its key ({})", table.name, table.key_columns.join(", ")),
            )
            .detail("Documents are identified by their row's key.")
            .hint("Detach the table and attach it anew."));
        }
        Ok(Self { oid: table.oid, owner: relation::owner(table.oid), name: table.name.clone(), key })
    }

    /// True if the way leads from each row to its own document: by its key, compared as a key is.
    pub fn is_led_to_by(&self, way: &graph::Way) -> bool {
        way.tables.len() == 1 && self.is_last_on(way)
    }

    /// True if the last table on the way, which is the attached one, has the document's own row there. Compared otherwise
    /// than as a key is, its key may equal several documents' keys (citext).
    fn is_last_on(&self, way: &graph::Way) -> bool {
        let is_own = |((table, number), how): &((usize, i16), Comparison), column: &Column| {
            let as_key = || match (how, Operator::equal(column.type_oid).comparison(column.collation)) {
                (
                    Comparison::Equal { family, collation, .. },
                    Some(Comparison::Equal { family: own, collation: its, .. }),
                ) => (*family, *collation) == (own, its),
                _ => false,
            };
            (*table, *number) == (way.tables.len() - 1, column.number) && (*how == Comparison::Same || as_key())
        };
        way.keys.len() == self.key.len() && way.keys.iter().zip(&self.key).all(|(key, column)| is_own(key, column))
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
pub fn stated(way: &graph::Way, tree: &Tree, root: &Root, related: pg_sys::Oid, used: Option<Vec<String>>) -> Way {
    let tables: Vec<(pg_sys::Oid, Vec<Column>)> = way
        .tables
        .iter()
        .map(|table| pg_sys::Oid::from(tree.graph.tables[*table].oid))
        .map(|oid| (oid, relation::columns(oid)))
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
    let ends_at_root = last > 0 && tables[last].0 == root.oid && root.is_last_on(way);
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
        let _ = write!(joined, "\njoin {} {} on {on}", spi::qualified(*table), alias(place));
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
pub fn declared(root: &Root) -> Result<Vec<Way>, Report> {
    let rows = spi::run(
        "select d.related::oid, d.via from es_sync.declaration d
         join pg_catalog.pg_class c on c.oid = d.related
         where d.root = $1::oid order by c.oid",
        &[spi::parameter(root.oid)],
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
    let statement = format!("select w.* from {} related cross join lateral (\n{via}\n) w", spi::qualified(related));
    let tree = Tree::of_statement(root.owner, &statement);
    let columns = relation::columns(related);
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
