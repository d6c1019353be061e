//! The statements that read documents: by keys, or page by page in the order of the key.

use pgrx::pg_sys;

use super::json::{Encoding, Template};
use super::shape::text_as;
use super::types::is_compound;
use crate::attachment::key;
use crate::attachment::operator::{self, Operator};
use crate::postgres::relation::Column;
use crate::postgres::spi::quoted;

/// They return the key columns, the routing where there is one, then what the template takes. Rows that the filter leaves
/// out are returned, too, without a document: one that was there lies where their routing leads, and a page ends after so
/// many rows, however few of them have one.
pub struct Statements {
    /// Reads by keys: parameters are one text[] per key column, or one int8[] for an integer key.
    pub by_keys: String,
    /// As `by_keys`, for an integer key: all rows from the key $1 to the key $2.
    pub by_range: String,
    /// No filter and no view is evaluated for a row that is read: nothing of the owner's that fails, or takes long.
    pub is_plain: bool,
    /// Reads the first page: $1 is the number of rows.
    pub first_page: String,
    /// Reads the page after a key: one text per key column, then the number of rows.
    pub next_page: String,
    /// The key columns of the first row, and of the one after a key.
    pub first_key: String,
    pub next_key: String,
    /// Fails where a text is no value of its key column's type: one text per key column.
    pub key_check: String,
}

/// What they read.
pub struct Origin<'a> {
    /// The attached table, schema-qualified and quoted.
    pub table: &'a str,
    /// The view that documents come from, likewise.
    pub view: Option<&'a str>,
    pub filter: Option<&'a str>,
    pub key: &'a [&'a Column],
    /// The column that decides on which shard a document lies.
    pub routing: Option<&'a Column>,
}

/// A field of a document.
pub struct Shown<'a> {
    pub column: &'a Column,
    /// The expression of its value, of the row `t`.
    pub value: String,
    /// Where that is the bare column.
    pub encoding: Option<Encoding>,
}

/// What a statement returns of a document.
pub struct Document {
    sql: String,
    pub types: Vec<pg_sys::Oid>,
    pub template: Template,
}

/// Says whether a row passes the filter.
const PASSES: &str = "\"es_sync passes\"";
/// True, and volatile, so that it is not evaluated before rows are merged and counted: a partition's first row may lie far
/// behind the page.
const WHEN_CHOSEN: &str = " and pg_catalog.random() operator(pg_catalog.>=) 0";
/// The keys that are looked up; no table is called so.
const KEYS: &str = "\"es_sync keys\"";

impl Statements {
    pub fn new(origin: &Origin, document: &Document) -> Self {
        let key = Key::new(origin.key);
        let list = |of: &str| {
            let columns: Vec<String> = key.columns.iter().map(|column| format!("{of}{column}")).collect();
            columns.join(", ")
        };
        let (own, order) = (list(""), list("t."));
        let place = origin.routing.map(|column| format!("t.{}, ", quoted(&column.name))).unwrap_or_default();
        let select = format!("select {order}, {place}{} from", document.sql);
        let is_plain = origin.view.is_none() && origin.filter.is_none();
        let after = key.texts();
        let behind = operator::behind(&key.columns, &after, &key.kinds);
        let has_key = key.is_there();
        let one =
            |behind: &str| format!("select {own} from {} where {has_key}{behind} order by {own} limit 1", origin.table);
        let page = |behind: &str, limit: usize| match is_plain {
            true => {
                format!("{select} {} order by {order} limit ${limit}", origin.rows(&format!("{has_key}{behind}"), ""))
            }
            // The rows of a page first: no filter and no view is evaluated for others.
            false => {
                let rows = origin.rows(&format!("{has_key}{behind} order by {own} limit ${limit}"), WHEN_CHOSEN);
                format!("{select} {rows} order by {order}")
            }
        };
        Self {
            by_keys: format!("{select} {}", key.look_up(origin)),
            by_range: format!("{select} {}", key.range(origin)),
            is_plain,
            first_page: page("", 1),
            next_page: page(&format!(" and {behind}"), key.columns.len() + 1),
            first_key: one(""),
            next_key: one(&format!(" and {behind}")),
            key_check: format!("select {}", after.join(", ")),
        }
    }
}

impl Origin<'_> {
    /// The rows `t` of the table that a condition on its columns chooses. The filter is evaluated for those alone, whatever
    /// it does: in a WHERE it might come before the key is compared. OFFSET keeps it from being evaluated for each mention.
    /// `and` is added to it.
    fn rows(&self, condition: &str, and: &str) -> String {
        match (self.view, self.filter) {
            (None, Some(filter)) => format!(
                "(select *, (\n{filter}\n) is true{and} as {PASSES} from {} where {condition} offset 0) t",
                self.table
            ),
            _ => format!("(select * from {} where {condition}) t", self.table),
        }
    }

    /// A document with these fields, of the row `t`.
    pub fn document(&self, fields: &[Shown]) -> Document {
        let list = || {
            let list: Vec<String> =
                fields.iter().map(|shown| format!("{} as {}", shown.value, quoted(&shown.column.name))).collect();
            list.join(", ")
        };
        // "document.*" is the row even where a column has the alias's name.
        match self.view {
            None => Document::of_columns(fields, self.filter.is_some()),
            // Key by key, so that a view's groups and sub-selects are evaluated for that key alone. OFFSET keeps what the
            // view computes from being computed again for each mention. A second row for a key is an error.
            Some(view) => {
                let passing = self.filter.map(|filter| format!(" where (\n{filter}\n) is true")).unwrap_or_default();
                let equal = |column: &&Column| {
                    let name = quoted(&column.name);
                    format!("v.{name} {} t.{name}", Operator::equal(column.type_oid).qualified())
                };
                let equal: Vec<String> = self.key.iter().map(equal).collect();
                Document::whole(format!(
                    "(select pg_catalog.row_to_json(document.*) from (select {} from \
                     (select v.* from (select * from {view}{passing}) v where {} offset 0) t) document)",
                    list(),
                    equal.join(" and ")
                ))
            }
        }
    }
}

impl Document {
    /// An expression that is the document, or null where there is none.
    fn whole(sql: String) -> Self {
        Self { sql, types: vec![pg_sys::JSONOID], template: Template::Whole }
    }

    /// `filtered`: of a row that may not pass, for which nothing is made into JSON.
    fn of_columns(fields: &[Shown], filtered: bool) -> Self {
        let (mut sql, mut types, mut encodings) = (Vec::new(), Vec::new(), Vec::new());
        if filtered {
            sql.push(format!("t.{PASSES}"));
            types.push(pg_sys::BOOLOID);
        }
        for Shown { column, value, encoding } in fields {
            sql.push(match (encoding, filtered) {
                (Some(_), _) => value.clone(),
                (None, false) => format!("pg_catalog.to_json({value})"),
                (None, true) => format!("case when t.{PASSES} then pg_catalog.to_json({value}) end"),
            });
            types.push(if encoding.is_some() { column.type_oid } else { pg_sys::JSONOID });
            encodings.push((column.name.as_str(), encoding.unwrap_or(Encoding::Json)));
        }
        Self { sql: sql.join(", "), types, template: Template::of_fields(encodings.into_iter(), filtered) }
    }
}

/// The key of a row, in SQL.
struct Key {
    columns: Vec<String>,
    kinds: Vec<pg_sys::Oid>,
    /// There is no array of arrays, and an array of rows comes apart into columns: their texts become keys one by one.
    alone: Vec<bool>,
}

impl Key {
    fn new(key: &[&Column]) -> Self {
        Self {
            columns: key.iter().map(|column| quoted(&column.name)).collect(),
            kinds: key.iter().map(|column| column.type_oid).collect(),
            alone: key.iter().map(|column| is_compound(column)).collect(),
        }
    }

    /// That none of its columns is null, as may be after a DROP NOT NULL: such a row has no document. IS NOT NULL would
    /// look into a composite value.
    fn is_there(&self) -> String {
        let there: Vec<String> = self.columns.iter().map(|column| format!("{column} is distinct from null")).collect();
        there.join(" and ")
    }

    /// Parameters of text, one for each column, as values of its type.
    fn texts(&self) -> Vec<String> {
        let text =
            |(place, kind): (usize, &pg_sys::Oid)| format!("${}::pg_catalog.text::{}", place + 1, text_as(*kind, ""));
        self.kinds.iter().enumerate().map(text).collect()
    }

    /// The rows `t` whose key, an integer, is not below $1 and not above $2.
    fn range(&self, origin: &Origin) -> String {
        let column = &self.columns[0];
        origin.rows(&format!("{column} >= $1::pg_catalog.int8 and {column} <= $2::pg_catalog.int8"), "")
    }

    /// The rows `t` that have one of the keys in the parameters.
    fn look_up(&self, origin: &Origin) -> String {
        let equals: Vec<String> = self.kinds.iter().map(|kind| Operator::equal(*kind).qualified()).collect();
        if let ([column], [kind], [false]) = (&self.columns[..], &self.kinds[..], &self.alone[..]) {
            let array = match key::Column::new(*kind).is_integer() {
                true => "int8[]".to_owned(),
                false => format!("text[]::{}", text_as(*kind, "[]")),
            };
            return origin.rows(&format!("{column} {} any ($1::pg_catalog.{array})", equals[0]), "");
        }
        let (mut parts, mut names, mut conditions) = (Vec::new(), Vec::new(), Vec::new());
        for (place, (column, kind)) in self.columns.iter().zip(&self.kinds).enumerate() {
            let (n, equal) = (place + 1, &equals[place]);
            if self.alone[place] {
                parts.push(format!("${n}::pg_catalog.text[]"));
                conditions.push(format!("{column} {equal} {KEYS}.k{n}::{}", text_as(*kind, "")));
            } else {
                parts.push(format!("${n}::pg_catalog.text[]::{}", text_as(*kind, "[]")));
                conditions.push(format!("{column} {equal} {KEYS}.k{n}"));
            }
            names.push(format!("k{n}"));
        }
        format!(
            "rows from (pg_catalog.unnest({})) {KEYS} ({}) cross join lateral {}",
            parts.join("), pg_catalog.unnest("),
            names.join(", "),
            origin.rows(&conditions.join(" and "), "")
        )
    }
}
