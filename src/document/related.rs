//! From a related row's values to the keys of the documents that show it.

use pgrx::{PgSqlErrorCode, pg_sys};

use super::read::key_of;
use super::shape::text_as;
use crate::attachment::link::Link;
use crate::attachment::{key, link, operator};
use crate::postgres::error::Report;
use crate::postgres::limit::within_read_timeout;
use crate::postgres::relation;
use crate::postgres::rights;
use crate::postgres::spi::{self, Plan, Value, quoted};

/// Finds keys for one link. Its statements stay prepared; make it anew when the link changes.
pub struct Finder {
    owner: pg_sys::Oid,
    key: Vec<key::Column>,
    key_types: Vec<pg_sys::Oid>,
    columns: usize,
    first: String,
    next: String,
    first_plan: Option<Plan>,
    next_plan: Option<Plan>,
}

impl Finder {
    /// Reads the catalog; None if the attached table is gone. SPI must be connected.
    ///
    /// # Errors
    /// Raises undefined_column where a key column is not there: it was renamed, and that is not known yet.
    pub fn of(link: &Link) -> Option<Self> {
        let owner = relation::owner(link.root);
        if owner == pg_sys::InvalidOid {
            return None;
        }
        let columns = relation::columns(link.root);
        let column = |name: &String| {
            columns.iter().find(|column| &column.name == name).unwrap_or_else(|| {
                Report::new(
                    PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                    format!("an attached table has no key column \"{name}\" any more"),
                )
                .raise()
            })
        };
        let key: Vec<_> = link.key_columns.iter().map(column).collect();
        let names: Vec<String> = key.iter().map(|column| format!("w.{}", quoted(&column.name))).collect();
        let aliases: Vec<String> = key.iter().map(|column| quoted(&column.name)).collect();
        let types: Vec<pg_sys::Oid> = key.iter().map(|column| column.type_oid).collect();
        let order = names.join(", ");
        let from = format!("select distinct {order} from (\n{}\n) w ({})", link.query, aliases.join(", "));
        let after: Vec<String> = key
            .iter()
            .enumerate()
            .map(|(place, column)| {
                format!("${}::pg_catalog.text::{}", link.columns + 1 + place, text_as(column.type_oid, ""))
            })
            .collect();
        Some(Self {
            owner,
            key: key.iter().map(|column| key::Column::new(column.type_oid)).collect(),
            columns: link.columns,
            first: format!("{from} order by {order} limit ${}", link.columns + 1),
            next: format!(
                "{from} where {} order by {order} limit ${}",
                operator::behind(&names, &after, &types),
                link.columns + key.len() + 1
            ),
            key_types: types,
            first_plan: None,
            next_plan: None,
        })
    }

    /// At the most `limit` keys that the values lead to, in order; only those behind `after`.
    pub fn find(&mut self, values: &[String], after: Option<&str>, limit: usize) -> Vec<String> {
        let columns = self.columns;
        let mut texts: Vec<Vec<Option<String>>> = vec![Vec::with_capacity(values.len()); columns];
        for text in values {
            for (column, value) in texts.iter_mut().zip(link::values(text, columns).into_iter().flatten()) {
                column.push(value);
            }
        }
        let mut parameters: Vec<Value> = texts.into_iter().map(spi::value).collect();
        let after = after.and_then(|after| key::parts(after, self.key.len()));
        let Self { owner, key, key_types, first, next, first_plan, next_plan, .. } = self;
        rights::as_owner(*owner, || {
            let mut types = vec![pg_sys::TEXTARRAYOID; columns];
            let plan = match after {
                None => first_plan.get_or_insert_with(|| {
                    types.push(pg_sys::INT8OID);
                    Plan::prepare(first, &types)
                }),
                Some(parts) => {
                    parameters.extend(parts.into_iter().map(spi::value));
                    next_plan.get_or_insert_with(|| {
                        types.extend(vec![pg_sys::TEXTOID; key.len()]);
                        types.push(pg_sys::INT8OID);
                        Plan::prepare(next, &types)
                    })
                }
            };
            parameters.push(spi::value(limit as i64));
            let rows = within_read_timeout(|| plan.execute(&parameters, 0)).typed(key_types);
            let mut text = String::new();
            (0..rows.len())
                .map(|row| {
                    key_of(|column| rows.datum(row, column), key, &mut text);
                    text.clone()
                })
                .collect()
        })
    }
}
