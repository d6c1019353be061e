//! The shape of a table's documents: the statements that read them, and the settings and mappings of their index. What a
//! single column becomes is in `types`.

use pgrx::pg_sys;
use serde_json::{Map, Value, json};

use super::json::{Encoding, Template};
use super::types::{Field, Type, is_compound};
use crate::attachment::catalog::{self, Attachment, Column};
use crate::attachment::key;
use crate::attachment::operator::{self, Operator};
use crate::postgres::spi;

/// How often an index that is being loaded writes its segments. That goes on beside the indexing; without, the refresh at
/// the end does all of it on one core while nothing else is done.
const REFRESH_OF_A_LOAD: &str = "2s";

/// What the documents of an attachment look like, and how to read them.
pub struct Shape {
    pub owner: pg_sys::Oid,
    /// Documents come from a view.
    pub is_view: bool,
    pub key: Vec<key::Column>,
    /// The column that decides on which shard a document lies.
    pub routing: Option<key::Column>,
    /// Reads by keys: parameters are one text[] per key column, or one int8[] for an integer key; returns the key columns,
    /// the routing where there is one, then what `template` takes. With a routing, a row that has no document is
    /// returned, too: its document lies there.
    pub by_keys: String,
    /// Reads the first page: $1 is the number of rows.
    pub first_page: String,
    /// Reads the page after a key: one text per key column, then the number of rows.
    pub next_page: String,
    /// As the pages, but the key columns of one row only, whatever the filter says of it.
    pub first_key: String,
    pub next_key: String,
    /// Fails where a text is no value of its key column's type: one text per key column.
    pub key_check: String,
    /// Estimated number of rows, -1 if unknown.
    pub estimated_rows: f64,
    /// The types of the columns that reading returns: they are looked at before their values are.
    pub columns: Vec<pg_sys::Oid>,
    pub template: Template,
    fields: Vec<(String, Field)>,
}

/// Which product the mapping is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Dialect {
    Elasticsearch,
    OpenSearch,
}

/// Deepest nesting of objects and arrays in a document that is sent. OpenSearch reads a `flat_object` by recursion, on
/// a stack of 1 MB: 900 levels end its process, and end it again when it starts and replays what it had written down.
pub const MAX_NESTING: usize = 100;

/// Says whether a row passes the filter.
const PASSES: &str = "\"es_sync passes\"";

impl Shape {
    /// Reads the catalog; None if the table, a key column or the one of the routing is gone. SPI must be connected.
    pub fn of(attachment: &Attachment) -> Option<Self> {
        let table = spi::run(
            "select pg_catalog.format('%I.%I', n.nspname, c.relname), c.relowner, c.reltuples::float8
             from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
             where c.oid = $1",
            &[(pg_sys::OIDOID, spi::value(attachment.relation))],
        );
        if table.is_empty() {
            return None;
        }
        let own_columns = catalog::columns(attachment.relation);
        let key: Vec<&Column> = attachment
            .key_columns
            .iter()
            .map(|name| own_columns.iter().find(|column| &column.name == name))
            .collect::<Option<_>>()?;
        let routing = match &attachment.options.routing {
            Some(name) => Some(own_columns.iter().find(|column| &column.name == name)?),
            None => None,
        };
        let view = match attachment.document {
            // Its owner's rights count when it is read, so he must still be the table's.
            Some(view) => Some(view_name(view, table.get(0, 2)?)?),
            None => None,
        };
        let columns = match attachment.document {
            Some(view) => catalog::columns(view),
            None => own_columns.clone(),
        };
        let synced: Vec<_> = columns
            .iter()
            .filter(|column| {
                attachment.key_columns.contains(&column.name)
                    || catalog::is_synced(&column.name, column.type_oid, &attachment.exclude, &attachment.options)
            })
            .map(|column| (column, Type::of(column, attachment.options.maps(&column.name))))
            .collect();
        let value = |(column, kind): &(&Column, Type)| {
            let name = quote(&column.name);
            let bare = format!("t.{name}");
            // Where the user has a mapping of his own for it, a value stays as it is.
            let as_is = match own_mapping(attachment, &column.name) {
                Some(_) if kind.field == Field::Json => true,
                Some(own) => kind.fits_own_mapping_only() && has_another_type(own, kind.field),
                None => false,
            };
            let value = if as_is { bare.clone() } else { kind.expression(&bare) };
            let encoding = if value == bare { kind.encoding() } else { None };
            (value, name, encoding)
        };
        let values: Vec<(String, String, Option<Encoding>)> = synced.iter().map(value).collect();
        let list: Vec<String> = values.iter().map(|(value, name, _)| format!("{value} as {name}")).collect();
        let list = list.join(", ");

        let name: String = table.get(0, 1)?;
        let read = view.as_ref().unwrap_or(&name);
        let filtered = match &attachment.filter {
            None => read.clone(),
            Some(filter) => format!("(select * from {read} where (\n{filter}\n) is true)"),
        };
        let keys: Vec<String> = key.iter().map(|column| format!("t.{}", quote(&column.name))).collect();
        let makers: Vec<key::Column> = key.iter().map(|column| key::Column::new(column.type_oid)).collect();
        let key_types: Vec<pg_sys::Oid> = key.iter().map(|column| column.type_oid).collect();
        let equals: Vec<String> = key_types.iter().map(|kind| Operator::equal(*kind).qualified()).collect();
        let types: Vec<String> = key_types.iter().map(|kind| text_as(*kind, "")).collect();
        let arrays: Vec<String> = key_types.iter().map(|kind| text_as(*kind, "[]")).collect();
        // "document.*" is the row even where a column has the alias's name.
        let document = match &view {
            None if routing.is_some() && attachment.filter.is_some() => {
                let row = format!("(select pg_catalog.row_to_json(document.*) from (select {list}) document)");
                Document::whole(format!("case when t.{PASSES} then {row} end"))
            }
            None => {
                let columns = synced.iter().map(|(column, _)| *column);
                Document::of_columns(columns.zip(values.iter().map(|(value, _, encoding)| (value.as_str(), *encoding))))
            }
            // Key by key, so that a view's groups and sub-selects are evaluated for that key alone. OFFSET keeps what the
            // view computes from being computed again for each mention. A second row for a key is an error.
            Some(_) => {
                let equal: Vec<String> = key
                    .iter()
                    .zip(&equals)
                    .map(|(column, equal)| (quote(&column.name), equal))
                    .map(|(name, equal)| format!("v.{name} {equal} t.{name}"))
                    .collect();
                Document::whole(format!(
                    "(select pg_catalog.row_to_json(document.*) from (select {list} from \
                     (select v.* from {filtered} v where {} offset 0) t) document)",
                    equal.join(" and ")
                ))
            }
        };
        let source = match (&view, routing, &attachment.filter) {
            (Some(_), ..) => name.clone(),
            (None, Some(_), Some(filter)) => format!("(select *, (\n{filter}\n) is true as {PASSES} from {name})"),
            _ => filtered,
        };
        let place = routing.map(|column| format!("t.{}, ", quote(&column.name))).unwrap_or_default();
        let select = format!("select {}, {place}{} from", keys.join(", "), document.sql);

        // There is no array of arrays, and an array of rows comes apart into columns: their texts become keys one by one.
        let alone: Vec<bool> = key.iter().map(|column| is_compound(column)).collect();
        let by_keys = if let ([column], [array], [false]) = (&keys[..], &arrays[..], &alone[..]) {
            let array = match makers[0].is_integer() {
                true => "int8[]".to_owned(),
                false => format!("text[]::{array}"),
            };
            format!("{select} {source} t where {column} {} any ($1::pg_catalog.{array})", equals[0])
        } else {
            let part = |n: usize| match alone[n - 1] {
                true => format!("${n}::pg_catalog.text[]"),
                false => format!("${n}::pg_catalog.text[]::{}", arrays[n - 1]),
            };
            let parts: Vec<String> = (1..=keys.len()).map(part).collect();
            let names: Vec<String> = (1..=keys.len()).map(|n| format!("k{n}")).collect();
            let equal: Vec<String> = (0..keys.len())
                .map(|n| match alone[n] {
                    true => format!("{} {} k.{}::{}", keys[n], equals[n], names[n], types[n]),
                    false => format!("{} {} k.{}", keys[n], equals[n], names[n]),
                })
                .collect();
            format!(
                "{select} rows from (pg_catalog.unnest({})) k ({}) join {source} t on {}",
                parts.join("), pg_catalog.unnest("),
                names.join(", "),
                equal.join(" and ")
            )
        };
        let order = keys.join(", ");
        let after: Vec<String> = (1..=keys.len()).map(|n| format!("${n}::pg_catalog.text::{}", types[n - 1])).collect();
        let behind = operator::behind(&keys, &after, &key_types);
        let page = |behind: String, limit: usize| {
            let rows = format!("{source} t {behind} order by {order} limit ${limit}");
            // The rows of a page first: no document is made for others.
            match &view {
                None => format!("{select} {rows}"),
                Some(_) => format!("{select} (select t.* from {rows}) t order by {order}"),
            }
        };
        Some(Self {
            owner: table.get(0, 2)?,
            is_view: view.is_some(),
            key: makers,
            routing: routing.map(|column| key::Column::new(column.type_oid)),
            by_keys,
            first_page: page(String::new(), 1),
            next_page: page(format!("where {behind}"), keys.len() + 1),
            first_key: format!("select {order} from {name} t order by {order} limit 1"),
            next_key: format!("select {order} from {name} t where {behind} order by {order} limit 1"),
            key_check: format!("select {}", after.join(", ")),
            estimated_rows: table.get(0, 3).unwrap_or(-1.0),
            columns: key_types.into_iter().chain(routing.map(|column| column.type_oid)).chain(document.types).collect(),
            template: document.template,
            fields: synced.into_iter().map(|(column, kind)| (column.name.clone(), kind.field)).collect(),
        })
    }

    /// True if a key is one integer.
    pub fn has_integer_key(&self) -> bool {
        matches!(self.key[..], [column] if column.is_integer())
    }

    /// The body that creates an index for these documents: what was derived, with the user's own merged over it
    /// (RFC 7396), our mark of ownership, and settings for loading. `reduced` for an engine that lacks optional types.
    pub fn index_body(&self, attachment: &Attachment, dialect: Dialect, reduced: bool, owner: &str) -> Value {
        let (mut settings, mut mappings) = self.settings_and_mappings(attachment, dialect, reduced);
        mappings["_meta"]["pg_es_sync"] = json!({"installation": owner, "index": attachment.index});
        settings["index"]["refresh_interval"] = json!(REFRESH_OF_A_LOAD);
        settings["index"]["number_of_replicas"] = json!(0);
        json!({"settings": settings, "mappings": mappings})
    }

    /// Settings and mappings of the index once it is loaded, without our mark of ownership.
    pub fn live_index(&self, attachment: &Attachment, dialect: Dialect) -> Value {
        let (mut settings, mappings) = self.settings_and_mappings(attachment, dialect, false);
        merge(&mut settings, &Self::live_settings(attachment));
        json!({"settings": settings, "mappings": mappings})
    }

    /// The mapping of an index for these documents; `reduced` for an engine that lacks optional types.
    pub fn mappings(&self, attachment: &Attachment, dialect: Dialect, reduced: bool) -> Value {
        self.settings_and_mappings(attachment, dialect, reduced).1
    }

    fn settings_and_mappings(&self, attachment: &Attachment, dialect: Dialect, reduced: bool) -> (Value, Value) {
        let mut properties = Map::new();
        let mut searches_vectors = false;
        for (name, field) in &self.fields {
            let own = own_mapping(attachment, name);
            let field = if reduced && field.is_optional() && own.is_none() { Field::Unsearchable } else { *field };
            // Parameters of one type are none of another's.
            let kept = own.is_none_or(|own| !has_another_type(own, field));
            searches_vectors |= kept && matches!(field, Field::Vector(_));
            properties.insert(name.clone(), if kept { field.mapping(dialect) } else { json!({}) });
        }
        let mut mappings = json!({"dynamic": false, "properties": properties});
        if let Some(own) = &attachment.options.mappings {
            merge(&mut mappings, own);
        }
        let mut settings = json!({"index": {
            // A wide table must not fail on the engine's default of 1,000 fields; sub-fields count too.
            "mapping": {"total_fields": {"limit": (self.fields.len() * 3).max(1_000)}},
        }});
        if searches_vectors && dialect == Dialect::OpenSearch {
            settings["index"]["knn"] = json!(true);
        }
        if let Some(own) = &attachment.options.settings {
            merge(&mut settings, &nested(own));
        }
        (settings, mappings)
    }

    /// True if documents hold vectors that the engine searches: newer versions do not give them back as they were sent.
    pub fn has_vectors(&self) -> bool {
        self.fields.iter().any(|(_, field)| matches!(field, Field::Vector(_)))
    }

    /// Names the types of fields that not every distribution of the engine has, as it calls them; none where the user
    /// has mapped them all himself.
    pub fn optional_types(&self, attachment: &Attachment, dialect: Dialect) -> Vec<String> {
        let optional =
            self.fields.iter().filter(|(name, field)| field.is_optional() && own_mapping(attachment, name).is_none());
        let mut types: Vec<String> =
            optional.filter_map(|(_, field)| Some(field.mapping(dialect)["type"].as_str()?.to_owned())).collect();
        types.sort_unstable();
        types.dedup();
        types
    }

    /// The settings that an index gets back once it is loaded.
    pub fn live_settings(attachment: &Attachment) -> Value {
        let own = attachment.options.settings.as_ref().map(nested).unwrap_or_default();
        let own = |name: &str| own.get("index").and_then(|index| index.get(name)).cloned();
        let refresh = attachment.options.refresh.clone().map(Value::from).or_else(|| own("refresh_interval"));
        json!({"index": {
            "refresh_interval": refresh.unwrap_or(json!("1s")),
            "number_of_replicas": own("number_of_replicas").unwrap_or(Value::Null),
        }})
    }
}

/// What a statement returns of a document.
struct Document {
    sql: String,
    types: Vec<pg_sys::Oid>,
    template: Template,
}

impl Document {
    /// An expression that is the document, or null where there is none.
    fn whole(sql: String) -> Self {
        Self { sql, types: vec![pg_sys::JSONOID], template: Template::Whole }
    }

    /// Columns with the expressions of their values; an encoding only where that is the bare column.
    fn of_columns<'a>(columns: impl Iterator<Item = (&'a Column, (&'a str, Option<Encoding>))>) -> Self {
        let (mut sql, mut types, mut fields) = (Vec::new(), Vec::new(), Vec::new());
        for (column, (value, encoding)) in columns {
            sql.push(if encoding.is_some() { value.to_owned() } else { format!("pg_catalog.to_json({value})") });
            types.push(if encoding.is_some() { column.type_oid } else { pg_sys::JSONOID });
            fields.push((column.name.as_str(), encoding.unwrap_or(Encoding::Json)));
        }
        Self { sql: sql.join(", "), types, template: Template::of_fields(fields.into_iter()) }
    }
}

/// A view's name, schema-qualified and quoted; None where it is gone, or not this owner's.
fn view_name(view: pg_sys::Oid, owner: pg_sys::Oid) -> Option<String> {
    let rows = spi::run(
        "select pg_catalog.format('%I.%I', n.nspname, c.relname)
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         where c.oid = $1 and c.relkind = 'v' and c.relowner = $2",
        &[(pg_sys::OIDOID, spi::value(view)), (pg_sys::OIDOID, spi::value(owner))],
    );
    rows.first(1)
}

/// The type's name, qualified and quoted, for a cast. "character" and "bit" alone would mean a length of one.
pub fn type_name(type_oid: pg_sys::Oid) -> String {
    let flags = pg_sys::FORMAT_TYPE_TYPEMOD_GIVEN | pg_sys::FORMAT_TYPE_FORCE_QUALIFY;
    // SAFETY: as above.
    unsafe {
        let name = pg_sys::format_type_extended(type_oid, -1, flags as pg_sys::bits16);
        std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned()
    }
}

/// What a text that `key::Column` made is cast to, to be of the type again; `array` is empty or "[]".
pub fn text_as(type_oid: pg_sys::Oid, array: &str) -> String {
    let name = type_name(type_oid);
    match key::is_object(type_oid) {
        true => format!("pg_catalog.oid{array}::{name}{array}"),
        false => format!("{name}{array}"),
    }
}

fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// True if a document is nested deeper than `MAX_NESTING`.
pub fn is_too_deep(document: &[u8]) -> bool {
    // Nearly every document has so few brackets that it cannot be. In blocks whose sum fits into a byte, the compiler
    // counts many bytes at once; the two differ by one bit.
    let brackets = |block: &[u8]| block.iter().map(|byte| u8::from(byte | 0x20 == b'{')).sum::<u8>();
    if document.chunks(255).map(|block| usize::from(brackets(block))).sum::<usize>() <= MAX_NESTING {
        return false;
    }
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for byte in document {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            return true;
        }
    }
    false
}

/// What the user says himself of a field; null where he takes its mapping away.
fn own_mapping<'a>(attachment: &'a Attachment, name: &str) -> Option<&'a Value> {
    attachment.options.mappings.as_ref()?.get("properties")?.get(name)
}

/// True if the user's own mapping of a field has another type than the derived one.
fn has_another_type(own: &Value, field: Field) -> bool {
    let own = own.get("type").cloned().or_else(|| own.get("properties").map(|_| json!("object")));
    // Either dialect's word for it.
    own.is_some_and(|own| {
        [Dialect::Elasticsearch, Dialect::OpenSearch].iter().all(|dialect| field.mapping(*dialect)["type"] != own)
    })
}

/// RFC 7396.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(target) = target {
        for (name, value) in patch {
            if value.is_null() {
                target.remove(name);
            } else {
                merge(target.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
    }
}

/// Settings as one nested object under "index", however the user wrote them: `{"index.number_of_shards": 2}`,
/// `{"number_of_shards": 2}` and `{"index": {"number_of_shards": 2}}` mean the same.
fn nested(settings: &Value) -> Value {
    fn place(target: &mut Value, path: &[&str], value: &Value) {
        match (path, value) {
            ([first, rest @ ..], _) => {
                if !target.is_object() {
                    *target = Value::Object(Map::new());
                }
                place(&mut target[*first], rest, value);
            }
            // Not `merge`: a null must last until it takes something derived away.
            ([], Value::Object(fields)) => {
                if !target.is_object() {
                    *target = Value::Object(Map::new());
                }
                for (name, value) in fields {
                    place(target, &name.split('.').collect::<Vec<_>>(), value);
                }
            }
            ([], _) => *target = value.clone(),
        }
    }
    let mut result = json!({});
    for (name, value) in settings.as_object().into_iter().flatten() {
        let mut path: Vec<&str> = name.split('.').collect();
        if path[0] != "index" {
            path.insert(0, "index");
        }
        place(&mut result, &path, value);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nesting_is_counted_outside_of_strings_only() {
        let nested = |levels: usize| format!("{}{}", "[{\"a\":".repeat(levels / 2), "1}]".repeat(levels / 2));
        let of_text = format!("{{\"text\": \"\\\"{}\"}}", "[".repeat(1_000));
        let wide = format!("[{}]", "{},".repeat(1_000));
        for (document, deep) in
            [(nested(MAX_NESTING), false), (nested(MAX_NESTING + 2), true), (of_text, false), (wide, false)]
        {
            assert_eq!(is_too_deep(document.as_bytes()), deep, "{document}");
        }
    }

    #[test]
    fn a_merge_follows_rfc_7396() {
        let mut target = json!({"a": {"b": 1, "c": 2}, "d": [1]});
        merge(&mut target, &json!({"a": {"b": null, "e": {"f": null, "g": 3}}, "d": {"h": 4}}));
        assert_eq!(target, json!({"a": {"c": 2, "e": {"g": 3}}, "d": {"h": 4}}));
    }

    #[test]
    fn settings_mean_the_same_however_they_are_nested() {
        let wanted = json!({"index": {"number_of_shards": 2, "analysis": {"analyzer": {}}}});
        for own in [
            json!({"index.number_of_shards": 2, "analysis": {"analyzer": {}}}),
            json!({"index": {"number_of_shards": 2}, "index.analysis.analyzer": {}}),
            json!({"number_of_shards": 2, "analysis.analyzer": {}}),
        ] {
            assert_eq!(nested(&own), wanted);
        }
    }

    #[test]
    fn a_null_setting_takes_a_derived_one_away_however_it_is_nested() {
        for own in [
            json!({"index.mapping.total_fields.limit": null}),
            json!({"mapping": {"total_fields": {"limit": null}}}),
            json!({"index": {"mapping.total_fields": {"limit": null}}}),
        ] {
            let mut settings = json!({"index": {"mapping": {"total_fields": {"limit": 1_000}}}});
            merge(&mut settings, &nested(&own));
            assert_eq!(settings, json!({"index": {"mapping": {"total_fields": {}}}}), "{own}");
        }
    }
}
