//! The shape of a table's documents: for each column a field of the mapping, and the SQL that makes its value.
//!
//! Postgres itself turns the row into JSON; an expression differs from the bare column only where the engine reads the
//! type's JSON otherwise than it was meant.

use std::fmt::Write;

use pgrx::pg_sys;
use serde_json::{Map, Value, json};

use crate::attachment::catalog::{self, Attachment, Column};
use crate::attachment::key;
use crate::postgres::spi;

/// What the documents of an attachment look like, and how to read them.
pub struct Shape {
    pub owner: pg_sys::Oid,
    pub key: Vec<key::Column>,
    /// The column that decides on which shard a document lies.
    pub routing: Option<key::Column>,
    /// Reads by keys: parameters are one text[] per key column; returns the key columns, the routing where there is one,
    /// then the document. With a routing, a row that has no document is returned, too: its document lies there.
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
    fields: Vec<(String, Field)>,
}

/// Which product the mapping is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Dialect {
    Elasticsearch,
    OpenSearch,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Field {
    Text,
    Keyword,
    Boolean,
    Date,
    Ip,
    Json,
    Number(&'static str),
    Range(&'static str),
}

/// Longest string, in characters, that is also searchable as a whole. Lucene's limit of 32,766 bytes must hold for
/// four-byte characters too.
const IGNORE_ABOVE: u32 = 8_191;

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
                    || (catalog::is_synced(column.type_oid) && !attachment.exclude.contains(&column.name))
            })
            .map(|column| (column, Type::of(column)))
            .collect();

        let overridden = |name: &str| {
            let mappings = attachment.options.mappings.as_ref();
            mappings.and_then(|mappings| mappings.get("properties")?.get(name)).is_some()
        };
        let mut list = String::new();
        for (column, kind) in &synced {
            let name = quote(&column.name);
            let separator = if list.is_empty() { "" } else { ", " };
            let bare = format!("t.{name}");
            // Where the user gave it a mapping of his own, a value stays as it is.
            let own = overridden(&column.name) && kind.field == Field::Json;
            let value = if own { bare } else { kind.expression(&bare) };
            let _ = write!(list, "{separator}{value} as {name}");
        }

        let name: String = table.get(0, 1)?;
        let read = view.as_ref().unwrap_or(&name);
        let filtered = match &attachment.filter {
            None => read.clone(),
            Some(filter) => format!("(select * from {read} where (\n{filter}\n) is true)"),
        };
        let keys: Vec<String> = key.iter().map(|column| format!("t.{}", quote(&column.name))).collect();
        let types: Vec<String> = key.iter().map(|column| type_name(column.type_oid)).collect();
        // "document.*" is the row even where a column has the alias's name.
        let row = format!("(select pg_catalog.row_to_json(document.*) from (select {list}) document)");
        let document = match &view {
            None if routing.is_some() && attachment.filter.is_some() => {
                format!("case when t.{PASSES} then {row} end")
            }
            None => row,
            // Key by key, so that a view's groups and sub-selects are evaluated for that key alone. OFFSET keeps what the
            // view computes from being computed again for each mention. A second row for a key is an error.
            Some(_) => {
                let equal: Vec<String> =
                    key.iter().map(|column| quote(&column.name)).map(|name| format!("v.{name} = t.{name}")).collect();
                format!(
                    "(select pg_catalog.row_to_json(document.*) from (select {list} from \
                     (select v.* from {filtered} v where {} offset 0) t) document)",
                    equal.join(" and ")
                )
            }
        };
        let source = match (&view, routing, &attachment.filter) {
            (Some(_), ..) => name.clone(),
            (None, Some(_), Some(filter)) => format!("(select *, (\n{filter}\n) is true as {PASSES} from {name})"),
            _ => filtered,
        };
        let place = routing.map(|column| format!("t.{}, ", quote(&column.name))).unwrap_or_default();
        let select = format!("select {}, {place}{document} from", keys.join(", "));

        // There is no array of arrays, and an array of rows comes apart into columns: their texts become keys one by one.
        let alone: Vec<bool> = key.iter().map(|column| Type::of(column).is_compound()).collect();
        let by_keys = if let ([column], [kind], [false]) = (&keys[..], &types[..], &alone[..]) {
            format!("{select} {source} t where {column} = any ($1::pg_catalog.text[]::{kind}[])")
        } else {
            let part = |n: usize| match alone[n - 1] {
                true => format!("${n}::pg_catalog.text[]"),
                false => format!("${n}::pg_catalog.text[]::{}[]", types[n - 1]),
            };
            let parts: Vec<String> = (1..=keys.len()).map(part).collect();
            let names: Vec<String> = (1..=keys.len()).map(|n| format!("k{n}")).collect();
            let equal: Vec<String> = (0..keys.len())
                .map(|n| match alone[n] {
                    true => format!("{} = k.{}::{}", keys[n], names[n], types[n]),
                    false => format!("{} = k.{}", keys[n], names[n]),
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
            key: key.iter().map(|column| key::Column::new(column.type_oid)).collect(),
            routing: routing.map(|column| key::Column::new(column.type_oid)),
            by_keys,
            first_page: page(String::new(), 1),
            next_page: page(format!("where ({order}) > ({})", after.join(", ")), keys.len() + 1),
            first_key: format!("select {order} from {name} t order by {order} limit 1"),
            next_key: format!(
                "select {order} from {name} t where ({order}) > ({}) order by {order} limit 1",
                after.join(", ")
            ),
            key_check: format!("select {}", after.join(", ")),
            estimated_rows: table.get(0, 3).unwrap_or(-1.0),
            fields: synced.into_iter().map(|(column, kind)| (column.name.clone(), kind.field)).collect(),
        })
    }

    /// The body that creates an index for these documents: what was derived, with the user's own merged over it
    /// (RFC 7396), our mark of ownership, and settings for loading.
    pub fn index_body(&self, attachment: &Attachment, dialect: Dialect, owner: &str) -> Value {
        let mut mappings = self.mappings(attachment, dialect);
        mappings["_meta"]["pg_es_sync"] = json!({"installation": owner, "index": attachment.index});
        let mut settings = json!({"index": {
            // A wide table must not fail on the engine's default of 1,000 fields; sub-fields count too.
            "mapping": {"total_fields": {"limit": (self.fields.len() * 3).max(1_000)}},
        }});
        if let Some(own) = &attachment.options.settings {
            merge(&mut settings, &nested(own));
        }
        settings["index"]["refresh_interval"] = json!("-1");
        settings["index"]["number_of_replicas"] = json!(0);
        json!({"settings": settings, "mappings": mappings})
    }

    /// The mapping of an index for these documents.
    pub fn mappings(&self, attachment: &Attachment, dialect: Dialect) -> Value {
        let mut properties = Map::new();
        let own_type = |name: &str| {
            let own = attachment.options.mappings.as_ref()?.get("properties")?.get(name)?;
            own.get("type").cloned().or_else(|| own.get("properties").map(|_| json!("object")))
        };
        for (name, field) in &self.fields {
            let derived = field.mapping(dialect);
            // Parameters of one type are none of another's.
            let kept = own_type(name).is_none_or(|own| own == derived["type"]);
            properties.insert(name.clone(), if kept { derived } else { json!({}) });
        }
        let mut mappings = json!({"dynamic": false, "properties": properties});
        if let Some(own) = &attachment.options.mappings {
            merge(&mut mappings, own);
        }
        mappings
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

impl Field {
    fn mapping(self, dialect: Dialect) -> Value {
        match self {
            Field::Text => json!({
                "type": "text",
                "fields": {"keyword": {"type": "keyword", "ignore_above": IGNORE_ABOVE}},
            }),
            Field::Keyword => json!({"type": "keyword", "ignore_above": IGNORE_ABOVE}),
            Field::Boolean => json!({"type": "boolean"}),
            // ignore_malformed: a value that the engine's type cannot hold (infinity, NaN, a date BC, an address with
            // a mask) stays in the document and is only not searchable by this field.
            Field::Date => json!({"type": "date", "ignore_malformed": true}),
            Field::Ip => json!({"type": "ip", "ignore_malformed": true}),
            Field::Number(kind) => json!({"type": kind, "ignore_malformed": true}),
            Field::Range(kind) => json!({"type": kind}),
            Field::Json if dialect == Dialect::Elasticsearch => {
                json!({"type": "flattened", "ignore_above": IGNORE_ABOVE, "depth_limit": MAX_NESTING})
            }
            Field::Json => json!({"type": "flat_object"}),
        }
    }
}

/// A column's type, seen as a field.
struct Type {
    field: Field,
    is_array: bool,
    /// The type without domain and array.
    element: pg_sys::Oid,
    is_multirange: bool,
}

impl Type {
    fn of(column: &Column) -> Self {
        // SAFETY: syscache lookups on the main thread, inside a transaction.
        let (element, is_array) = unsafe {
            let base = pg_sys::getBaseType(column.type_oid);
            match pg_sys::get_element_type(base) {
                pg_sys::InvalidOid => (base, false),
                element => (pg_sys::getBaseType(element), true),
            }
        };
        // SAFETY: as above.
        let kind = unsafe { pg_sys::get_typtype(element) } as u8;
        let is_multirange = kind == pg_sys::TYPTYPE_MULTIRANGE;
        let field = match element {
            pg_sys::INT2OID => Field::Number("short"),
            pg_sys::INT4OID => Field::Number("integer"),
            pg_sys::INT8OID | pg_sys::OIDOID => Field::Number("long"),
            pg_sys::FLOAT4OID => Field::Number("float"),
            pg_sys::FLOAT8OID | pg_sys::NUMERICOID | pg_sys::MONEYOID => Field::Number("double"),
            pg_sys::BOOLOID => Field::Boolean,
            pg_sys::TEXTOID | pg_sys::VARCHAROID | pg_sys::BPCHAROID | pg_sys::NAMEOID | pg_sys::XMLOID => Field::Text,
            pg_sys::DATEOID | pg_sys::TIMESTAMPOID | pg_sys::TIMESTAMPTZOID => Field::Date,
            pg_sys::INETOID => Field::Ip,
            pg_sys::CIDROID => Field::Range("ip_range"),
            pg_sys::JSONOID | pg_sys::JSONBOID => Field::Json,
            pg_sys::INT4RANGEOID | pg_sys::INT4MULTIRANGEOID => Field::Range("integer_range"),
            pg_sys::INT8RANGEOID | pg_sys::INT8MULTIRANGEOID => Field::Range("long_range"),
            pg_sys::NUMRANGEOID | pg_sys::NUMMULTIRANGEOID => Field::Range("double_range"),
            pg_sys::DATERANGEOID
            | pg_sys::TSRANGEOID
            | pg_sys::TSTZRANGEOID
            | pg_sys::DATEMULTIRANGEOID
            | pg_sys::TSMULTIRANGEOID
            | pg_sys::TSTZMULTIRANGEOID => Field::Range("date_range"),
            _ if kind == pg_sys::TYPTYPE_COMPOSITE => Field::Json,
            _ => match extension_type(element).as_str() {
                "citext" => Field::Text,
                "hstore" => Field::Json,
                _ => Field::Keyword,
            },
        };
        // Ranges of ranges of text, arrays of ranges: as text.
        let field =
            if is_array && matches!(field, Field::Range(kind) if kind != "ip_range") { Field::Keyword } else { field };
        Self { field, is_array, element, is_multirange }
    }

    /// An array or a composite type.
    fn is_compound(&self) -> bool {
        // SAFETY: a syscache lookup on the main thread, inside a transaction.
        self.is_array || unsafe { pg_sys::get_typtype(self.element) } as u8 == pg_sys::TYPTYPE_COMPOSITE
    }

    /// The SQL that makes the column's JSON value; `bare` is the qualified column.
    fn expression(&self, bare: &str) -> String {
        match (self.field, self.element) {
            // The engine's type for free-form JSON takes objects and arrays of objects only; anything else is kept
            // under the name "value".
            (Field::Json, pg_sys::JSONBOID | pg_sys::JSONOID) if self.is_array => {
                let kind = if self.element == pg_sys::JSONOID { "json" } else { "jsonb" };
                format!(
                    "case when pg_catalog.array_ndims({bare}) > 1 \
                       or exists (select from pg_catalog.unnest({bare}) e \
                                  where pg_catalog.{kind}_typeof(e) is distinct from 'object') \
                     then pg_catalog.json_build_object('value', {bare}) else pg_catalog.to_json({bare}) end"
                )
            }
            _ if self.is_array => bare.to_owned(),
            (Field::Range("ip_range"), _) => bare.to_owned(),
            (Field::Range(kind), _) if self.is_multirange => {
                let range = range_expression("r", kind);
                format!("(select pg_catalog.json_agg({range}) from pg_catalog.unnest({bare}) r)")
            }
            (Field::Range(kind), _) => range_expression(bare, kind),
            // Its text depends on lc_monetary.
            (_, pg_sys::MONEYOID) => format!("{bare}::pg_catalog.numeric"),
            (Field::Json, pg_sys::JSONBOID) => format!(
                "case when pg_catalog.jsonb_typeof({bare}) = 'object' \
                   or pg_catalog.jsonb_typeof({bare}) = 'array' \
                      and not pg_catalog.jsonb_path_exists({bare}, 'strict $[*] ? (@.type() != \"object\")', '{{}}', true) \
                 then {bare} when {bare} is not null and pg_catalog.jsonb_typeof({bare}) <> 'null' \
                 then pg_catalog.jsonb_build_object('value', {bare}) end"
            ),
            (Field::Json, pg_sys::JSONOID) => format!(
                "case when pg_catalog.json_typeof({bare}) = 'object' then {bare} \
                 when {bare} is not null and pg_catalog.json_typeof({bare}) <> 'null' \
                 then pg_catalog.json_build_object('value', {bare}) end"
            ),
            _ => bare.to_owned(),
        }
    }
}

/// A range as the engine takes it: {"gte": ..., "lt": ...}; an open side has no bound, an empty range is null. The
/// engine knows no infinity: such a side is open.
fn range_expression(range: &str, kind: &str) -> String {
    let bound = |side: &str, infinity: &str| match kind {
        "date_range" | "double_range" => format!("nullif(pg_catalog.{side}({range}), '{infinity}')"),
        _ => format!("pg_catalog.{side}({range})"),
    };
    format!(
        "case when not pg_catalog.isempty({range}) then pg_catalog.json_strip_nulls(pg_catalog.json_build_object(\
         case when pg_catalog.lower_inc({range}) then 'gte' else 'gt' end, {}, \
         case when pg_catalog.upper_inc({range}) then 'lte' else 'lt' end, {})) end",
        bound("lower", "-infinity"),
        bound("upper", "infinity")
    )
}

/// A view's name, schema-qualified and quoted; None where it is gone, or not this owner's.
fn view_name(view: pg_sys::Oid, owner: pg_sys::Oid) -> Option<String> {
    let rows = spi::run(
        "select pg_catalog.format('%I.%I', n.nspname, c.relname)
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         where c.oid = $1 and c.relkind = 'v' and c.relowner = $2",
        &[(pg_sys::OIDOID, spi::value(view)), (pg_sys::OIDOID, spi::value(owner))],
    );
    if rows.is_empty() { None } else { rows.get(0, 1) }
}

/// Name of a type that an extension brings; empty for others.
fn extension_type(type_oid: pg_sys::Oid) -> String {
    // SAFETY: syscache lookup; the palloc'd result is copied.
    unsafe {
        let name = pg_sys::format_type_be(type_oid);
        let name = std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned();
        name.rsplit('.').next().unwrap_or_default().to_owned()
    }
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

fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// True if a document is nested deeper than `MAX_NESTING`.
pub fn is_too_deep(document: &[u8]) -> bool {
    // Nearly every document has so few brackets that it cannot be, and counting them is cheap.
    if document.iter().filter(|byte| matches!(byte, b'{' | b'[')).count() <= MAX_NESTING {
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

/// RFC 7396.
pub fn merge(target: &mut Value, patch: &Value) {
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
        match path {
            [] => merge(target, value),
            [first, rest @ ..] => {
                if !target.is_object() {
                    *target = Value::Object(Map::new());
                }
                place(&mut target[*first], rest, value);
            }
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
}
