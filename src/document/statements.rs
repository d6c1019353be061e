//! The statements that read documents: by keys, or page by page in the order of the key.

use pgrx::pg_sys;

use super::json::{Encoding, Template};
use super::shape::text_as;
use super::types::is_compound;
use crate::attachment::key;
use crate::attachment::operator::{self, Operator};
use crate::postgres::relation::Column;
use crate::postgres::spi::quoted;

/// They return the key columns, the routing where there is one, then what the template takes.
pub struct Statements {
    /// Reads by keys: parameters are one text[] per key column, or one int8[] for an integer key. With a routing, a row
    /// that has no document is returned, too: its document lies there.
    pub by_keys: String,
    /// As `by_keys`, for an integer key: all rows from the key $1 to the key $2.
    pub by_range: String,
    /// No filter and no view is evaluated for a row that is read: nothing of the owner's that fails, or takes long.
    pub is_plain: bool,
    /// Reads the first page: $1 is the number of rows.
    pub first_page: String,
    /// Reads the page after a key: one text per key column, then the number of rows.
    pub next_page: String,
    /// As the pages, but the key columns only, whatever the filter says of a row.
    pub first_keys: String,
    pub next_keys: String,
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

impl Statements {
    pub fn new(origin: &Origin, document: &Document) -> Self {
        let key = Key::new(origin.key);
        let rows = origin.rows();
        let place = origin.routing.map(|column| format!("t.{}, ", quoted(&column.name))).unwrap_or_default();
        let order = key.columns.join(", ");
        let select = format!("select {order}, {place}{} from", document.sql);
        let after = key.texts();
        let behind = operator::behind(&key.columns, &after, &key.kinds);
        let has_key = key.is_there();
        let keys = |behind: &str, limit: usize| {
            format!("select {order} from {} t where {has_key}{behind} order by {order} limit ${limit}", origin.table)
        };
        let page = |behind: &str, limit: usize| {
            let rows = format!("{rows} t where {has_key}{behind} order by {order} limit ${limit}");
            // The rows of a page first: no document is made for others.
            match origin.view {
                None => format!("{select} {rows}"),
                Some(_) => format!("{select} (select t.* from {rows}) t order by {order}"),
            }
        };
        Self {
            by_keys: format!("{select} {}", key.look_up(&rows)),
            by_range: format!("{select} {}", key.range(&rows)),
            is_plain: origin.view.is_none() && origin.filter.is_none(),
            first_page: page("", 1),
            next_page: page(&format!(" and {behind}"), key.columns.len() + 1),
            first_keys: keys("", 1),
            next_keys: keys(&format!(" and {behind}"), key.columns.len() + 1),
            key_check: format!("select {}", after.join(", ")),
        }
    }
}

impl Origin<'_> {
    /// What documents are read from, as far as the filter lets it through.
    fn filtered(&self) -> String {
        let read = self.view.unwrap_or(self.table);
        match self.filter {
            None => read.to_owned(),
            Some(filter) => format!("(select * from {read} where (\n{filter}\n) is true)"),
        }
    }

    /// The rows that are looked up, or follow each other in pages. A view is read for each of them.
    fn rows(&self) -> String {
        match (self.view, self.routing, self.filter) {
            (Some(_), ..) => self.table.to_owned(),
            (None, Some(_), Some(filter)) => {
                format!("(select *, (\n{filter}\n) is true as {PASSES} from {})", self.table)
            }
            _ => self.filtered(),
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
            None if self.routing.is_some() && self.filter.is_some() => {
                let row = format!("(select pg_catalog.row_to_json(document.*) from (select {}) document)", list());
                Document::whole(format!("case when t.{PASSES} then {row} end"))
            }
            None => Document::of_columns(fields),
            // Key by key, so that a view's groups and sub-selects are evaluated for that key alone. OFFSET keeps what the
            // view computes from being computed again for each mention. A second row for a key is an error.
            Some(_) => {
                let equal = |column: &&Column| {
                    let name = quoted(&column.name);
                    format!("v.{name} {} t.{name}", Operator::equal(column.type_oid).qualified())
                };
                let equal: Vec<String> = self.key.iter().map(equal).collect();
                Document::whole(format!(
                    "(select pg_catalog.row_to_json(document.*) from (select {} from \
                     (select v.* from {} v where {} offset 0) t) document)",
                    list(),
                    self.filtered(),
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

    fn of_columns(fields: &[Shown]) -> Self {
        let (mut sql, mut types, mut encodings) = (Vec::new(), Vec::new(), Vec::new());
        for Shown { column, value, encoding } in fields {
            sql.push(if encoding.is_some() { value.clone() } else { format!("pg_catalog.to_json({value})") });
            types.push(if encoding.is_some() { column.type_oid } else { pg_sys::JSONOID });
            encodings.push((column.name.as_str(), encoding.unwrap_or(Encoding::Json)));
        }
        Self { sql: sql.join(", "), types, template: Template::of_fields(encodings.into_iter()) }
    }
}

/// The key of the row `t`, in SQL.
struct Key {
    columns: Vec<String>,
    kinds: Vec<pg_sys::Oid>,
    /// There is no array of arrays, and an array of rows comes apart into columns: their texts become keys one by one.
    alone: Vec<bool>,
}

impl Key {
    fn new(key: &[&Column]) -> Self {
        Self {
            columns: key.iter().map(|column| format!("t.{}", quoted(&column.name))).collect(),
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

    /// The rows `t` among `rows` whose key, an integer, is not below $1 and not above $2.
    fn range(&self, rows: &str) -> String {
        let column = &self.columns[0];
        format!("{rows} t where {column} >= $1::pg_catalog.int8 and {column} <= $2::pg_catalog.int8")
    }

    /// The rows `t` among `rows` that have one of the keys in the parameters.
    fn look_up(&self, rows: &str) -> String {
        let equals: Vec<String> = self.kinds.iter().map(|kind| Operator::equal(*kind).qualified()).collect();
        if let ([column], [kind], [false]) = (&self.columns[..], &self.kinds[..], &self.alone[..]) {
            let array = match key::Column::new(*kind).is_integer() {
                true => "int8[]".to_owned(),
                false => format!("text[]::{}", text_as(*kind, "[]")),
            };
            return format!("{rows} t where {column} {} any ($1::pg_catalog.{array})", equals[0]);
        }
        let (mut parts, mut names, mut conditions) = (Vec::new(), Vec::new(), Vec::new());
        for (place, (column, kind)) in self.columns.iter().zip(&self.kinds).enumerate() {
            let (n, equal) = (place + 1, &equals[place]);
            if self.alone[place] {
                parts.push(format!("${n}::pg_catalog.text[]"));
                conditions.push(format!("{column} {equal} k.k{n}::{}", text_as(*kind, "")));
            } else {
                parts.push(format!("${n}::pg_catalog.text[]::{}", text_as(*kind, "[]")));
                conditions.push(format!("{column} {equal} k.k{n}"));
            }
            names.push(format!("k{n}"));
        }
        format!(
            "rows from (pg_catalog.unnest({})) k ({}) join {rows} t on {}",
            parts.join("), pg_catalog.unnest("),
            names.join(", "),
            conditions.join(" and ")
        )
    }
}
