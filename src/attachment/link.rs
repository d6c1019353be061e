//! Links: what the queue holds of a related row's change, the values that lead from it to documents.
//!
//! A link is a source in the queue as an attached table is, with a number below those of tables. Its "keys" are the
//! values of its columns, old and new. A row of a link may also hold the keys that were found for it, when there are
//! many: then the first of them says so.

use pgrx::{PgSqlErrorCode, pg_sys};

use super::key;
use crate::postgres::error::Report;
use crate::postgres::spi;

/// Numbers of links are below this. No table of a user's has such an OID.
pub const END: u32 = 16_384;

/// Stands for a null. A backslash in a value is doubled, so no value reads like this.
const NULL: &str = "\\N";
/// Stands first where the rest are keys of the attached table.
pub const FOUND: &str = "\\F";
/// Begins the first text where it is the key after which to go on with the value that follows.
const AFTER: &str = "\\A";

/// True if a source of the queue is a link.
pub fn is_link(source: u32) -> bool {
    source < END
}

/// A number that no link has, nor had lately: what the queue still holds under a former one leads nowhere. Transactions
/// that choose at the same time, or by an old snapshot, choose different ones. SPI must be connected.
///
/// # Errors
/// All are taken.
pub fn free_source() -> Result<i32, Report> {
    let rows = spi::run(
        "select n from (
             select pg_catalog.nextval('es_sync.source')::int4 as n from pg_catalog.generate_series(1, 16383)) numbers
         where not exists (select from es_sync.way w where w.source = n)
           and not exists (select from es_sync.attachment a where a.routing_source = n)
         limit 1",
        &[],
    );
    rows.first(1).ok_or_else(|| {
        Report::new(PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED, "too many ways lead from tables to documents")
            .detail(format!("There may be {} of them in a database.", END - 1))
            .hint("Detach tables that need not be attached.")
    })
}

/// Appends one value.
pub fn push_value(values: &mut String, first: bool, value: Option<&str>) {
    match value {
        Some(value) => key::push_part(values, first, value),
        None => {
            if !first {
                values.push(key::SEPARATOR);
            }
            values.push_str(NULL);
        }
    }
}

/// Takes values apart again; None if the text is not one of `columns` values.
pub fn values(text: &str, columns: usize) -> Option<Vec<Option<String>>> {
    let mut values = vec![Some(String::new())];
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            key::SEPARATOR => values.push(Some(String::new())),
            '\\' => match characters.next()? {
                'N' => *values.last_mut()? = None,
                other => values.last_mut()?.as_mut()?.push(other),
            },
            other => values.last_mut()?.as_mut()?.push(other),
        }
    }
    (values.len() == columns).then_some(values)
}

/// A key after which to go on, as a row of the queue holds it.
pub fn after(key: &str) -> String {
    format!("{AFTER}{key}")
}

/// What a row of a link holds.
#[derive(Debug, PartialEq)]
pub enum Content {
    /// Values to look for; the first of them only from the key on that comes with it.
    Values { after: Option<String>, values: Vec<String> },
    /// Keys of the attached table.
    Found(Vec<String>),
}

impl Content {
    pub fn of(mut texts: Vec<String>) -> Self {
        match texts.first() {
            Some(first) if first == FOUND => {
                texts.remove(0);
                Content::Found(texts)
            }
            Some(first) if first.starts_with(AFTER) => {
                let after = texts.remove(0)[AFTER.len()..].to_owned();
                Content::Values { after: Some(after), values: texts }
            }
            _ => Content::Values { after: None, values: texts },
        }
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
        if is_link(self.source) {
            for (place, value) in values.iter().enumerate() {
                push_value(&mut text, place == 0, value.as_deref());
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
        &[spi::parameter(attachment), spi::parameter(part)],
    );
    read_notes(&rows)
}

/// What is noted for rows of a table, its own documents left out. SPI must be connected.
pub fn notes(related: pg_sys::Oid) -> Vec<Note> {
    let rows = spi::run(
        "select distinct coalesce(w.source, w.root::oid::int8), w.columns from es_sync.way w
         where w.related = $1::oid and (w.source is not null or w.root <> w.related or w.columns <> (
             select a.key_columns from es_sync.attachment a where a.id = w.attachment))",
        &[spi::parameter(related)],
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_apart_as_they_were_put_together() {
        let words = [Some(""), Some("N"), Some("\\N"), Some("a|b"), Some("\\F"), None];
        let mut texts = std::collections::HashSet::new();
        for a in words {
            for b in words {
                let mut text = String::new();
                push_value(&mut text, true, a);
                push_value(&mut text, false, b);
                let back = values(&text, 2).unwrap();
                assert_eq!(back.iter().map(Option::as_deref).collect::<Vec<_>>(), [a, b]);
                assert_eq!(
                    Content::of(vec![text.clone()]),
                    Content::Values { after: None, values: vec![text.clone()] }
                );
                assert!(texts.insert(text), "{a:?}, {b:?}");
            }
        }
        assert_eq!(values("a", 2), None);
    }

    #[test]
    fn a_row_says_what_it_holds() {
        let texts = |all: &[&str]| all.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        assert_eq!(Content::of(texts(&[FOUND, "1", "2"])), Content::Found(texts(&["1", "2"])));
        assert_eq!(
            Content::of(texts(&[&after("7|x"), "5"])),
            Content::Values { after: Some("7|x".into()), values: texts(&["5"]) }
        );
    }
}
