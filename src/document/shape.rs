//! The shape of a table's documents, and the settings and mappings of their index. What a single column becomes is in
//! `types`, what reads it in `statements`.

use pgrx::pg_sys;
use serde_json::{Map, Value, json};

use super::json::Template;
use super::statements::{Origin, Shown, Statements};
use super::types::{Field, Type};
use crate::attachment::catalog::{self, Attachment};
use crate::attachment::key;
use crate::postgres::relation::{self, Column};
use crate::postgres::spi::{self, quoted};

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
    pub statements: Statements,
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

impl Shape {
    /// Reads the catalog; None if the table, a key column or the one of the routing is gone. SPI must be connected.
    pub fn of(attachment: &Attachment) -> Option<Self> {
        let table = spi::run(
            "select pg_catalog.format('%I.%I', n.nspname, c.relname), c.relowner, c.reltuples::float8
             from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
             where c.oid = $1",
            &[spi::parameter(attachment.relation)],
        );
        if table.is_empty() {
            return None;
        }
        let own_columns = relation::columns(attachment.relation);
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
            Some(view) => relation::columns(view),
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
        let shown: Vec<Shown> = synced.iter().map(|(column, kind)| shown(attachment, column, kind)).collect();
        let name: String = table.get(0, 1)?;
        let (view, filter) = (view.as_deref(), attachment.filter.as_deref());
        let origin = Origin { table: &name, view, filter, key: &key, routing };
        let document = origin.document(&shown);
        let returned = key.iter().copied().chain(routing).map(|column| column.type_oid);
        Some(Self {
            owner: table.get(0, 2)?,
            is_view: view.is_some(),
            key: key.iter().map(|column| key::Column::new(column.type_oid)).collect(),
            routing: routing.map(|column| key::Column::new(column.type_oid)),
            statements: Statements::new(&origin, &document),
            estimated_rows: table.get(0, 3).unwrap_or(-1.0),
            columns: returned.chain(document.types).collect(),
            template: document.template,
            fields: synced.iter().map(|(column, kind)| (column.name.clone(), kind.field)).collect(),
        })
    }

    /// True if a filter decides which of the table's rows have a document. That of a view is a part of it.
    pub fn is_filtered(&self) -> bool {
        matches!(self.template, Template::Fields { filtered: true, .. })
    }

    /// True if a key is one integer.
    pub fn has_integer_key(&self) -> bool {
        matches!(self.key[..], [column] if column.is_integer())
    }

    /// The body that creates an index for these documents: what was derived, with the user's own merged over it
    /// (RFC 7396), our mark of ownership, and settings for loading. `reduced` for an engine that lacks optional types.
    pub fn index_body(&self, attachment: &Attachment, dialect: Dialect, reduced: bool, owner: &str) -> Value {
        let (mut settings, mut mappings) = self.settings_and_mappings(attachment, dialect, reduced);
        merge(&mut mappings, &json!({"_meta": {"pg_es_sync": {"installation": owner, "index": attachment.index}}}));
        merge(&mut settings, &json!({"index": {"refresh_interval": REFRESH_OF_A_LOAD, "number_of_replicas": 0}}));
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

/// A view's name, schema-qualified and quoted; None where it is gone, or not this owner's.
fn view_name(view: pg_sys::Oid, owner: pg_sys::Oid) -> Option<String> {
    let rows = spi::run(
        "select pg_catalog.format('%I.%I', n.nspname, c.relname)
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         where c.oid = $1 and c.relkind = 'v' and c.relowner = $2",
        &[spi::parameter(view), spi::parameter(owner)],
    );
    rows.first(1)
}

/// The type's name, qualified and quoted, for a cast. "character" and "bit" alone would mean a length of one.
pub fn type_name(type_oid: pg_sys::Oid) -> String {
    let flags = pg_sys::FORMAT_TYPE_TYPEMOD_GIVEN | pg_sys::FORMAT_TYPE_FORCE_QUALIFY;
    // SAFETY: syscache lookups in a live transaction; without FORMAT_TYPE_INVALID_AS_NULL the name is never null, and the
    // palloc'd text outlives its use here.
    unsafe {
        let name = pg_sys::format_type_extended(type_oid, -1, flags as pg_sys::bits16);
        std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned()
    }
}

/// What a text that `key::Column` made is cast to, to be of the type again; `array` is empty or "[]". Of a domain it is the
/// type below: a row may be there whose value its checks would refuse now, and operators are of that type anyway.
pub fn text_as(type_oid: pg_sys::Oid, array: &str) -> String {
    // SAFETY: a syscache lookup in a live transaction.
    let base = unsafe { pg_sys::getBaseType(type_oid) };
    let name = type_name(base);
    match key::is_object(base) {
        true => format!("pg_catalog.oid{array}::{name}{array}"),
        false => format!("{name}{array}"),
    }
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

/// How a column becomes a field.
fn shown<'a>(attachment: &Attachment, column: &'a Column, kind: &Type) -> Shown<'a> {
    let bare = format!("t.{}", quoted(&column.name));
    // Where the user has a mapping of his own for it, a value stays as it is.
    let as_is = match own_mapping(attachment, &column.name) {
        Some(_) if kind.field == Field::Json => true,
        Some(own) => kind.fits_own_mapping_only() && has_another_type(own, kind.field),
        None => false,
    };
    let value = if as_is { bare.clone() } else { kind.expression(&bare) };
    let encoding = if value == bare { kind.encoding() } else { None };
    Shown { column, value, encoding }
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

/// True if an index with the user's settings makes `_source` up from its fields, in another order and without what they
/// do not keep, or has none. Modes that are not known here count as such.
pub fn makes_source_up(settings: &Value) -> bool {
    let settings = nested(settings);
    let says = |path: &str, as_sent: &[&str]| {
        let own = settings.pointer(path).filter(|own| !own.is_null())?;
        let own = own.as_str().map_or_else(|| own.to_string(), str::to_lowercase);
        Some(!as_sent.contains(&own.as_str()))
    };
    // What is said of `_source` itself goes before the index's mode.
    let mode = says("/index/mapping/source/mode", &["stored"]).or_else(|| says("/index/mode", &["standard", "lookup"]));
    mode == Some(true) || says("/index/derived_source/enabled", &["false"]) == Some(true)
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
    fn an_index_that_makes_its_source_up_is_known_however_that_is_written() {
        for own in [
            json!({"index.mapping.source.mode": "synthetic"}),
            json!({"mapping.source.mode": "SYNTHETIC"}),
            json!({"mapping": {"source": {"mode": "disabled"}}}),
            json!({"index": {"mapping.source": {"mode": "synthetic"}}}),
            json!({"index.mode": "logsdb"}),
            json!({"mode": "time_series"}),
            json!({"index": {"mode": "logsdb", "mapping.source.mode": null}}),
            json!({"index.derived_source.enabled": true}),
            json!({"derived_source": {"enabled": "true"}}),
        ] {
            assert!(makes_source_up(&own), "{own}");
        }
        for own in [
            json!({}),
            json!({"index.mapping.total_fields.limit": 2_000, "number_of_shards": 2}),
            json!({"index.mapping.source.mode": "stored"}),
            json!({"index": {"mode": "logsdb", "mapping": {"source": {"mode": "stored"}}}}),
            json!({"index.mode": "standard"}),
            json!({"index": {"mode": null}}),
            json!({"index.derived_source.enabled": false}),
            json!({"index": {"derived_source.enabled": "false"}}),
        ] {
            assert!(!makes_source_up(&own), "{own}");
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
