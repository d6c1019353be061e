//! A column's type as a field of the engine's mapping, and the SQL that makes its value.
//!
//! Values become the JSON that Postgres makes of them; an expression differs from the bare column only where the engine
//! reads the type's JSON otherwise than it was meant. docs/reference.md has the table, and a test reads it.

use pgrx::pg_sys;
use serde_json::{Value, json};

use super::json::Encoding;
use super::shape::{Dialect, MAX_NESTING, type_name};
use crate::postgres::relation::{Column, element_of, extension_type};

/// Longest string, in characters, that is also searchable as a whole. Lucene's limit of 32,766 bytes must hold for
/// four-byte characters too.
const IGNORE_ABOVE: u32 = 8_191;

/// Most dimensions of a vector that both engines search.
const MAX_DIMENSIONS: i32 = 4_096;

/// PostGIS keeps a geometry's kind in its type modifier, beside SRID and dimensions (libpgcommon/lwgeom_pg.h).
const POSTGIS_KIND: i32 = 0xfc;
const POSTGIS_POINT: i32 = 1 << 2;

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Field {
    Text,
    Keyword,
    Boolean,
    Date,
    Ip,
    Json,
    Number(&'static str),
    Range(&'static str),
    /// Postgres' own point.
    Point,
    /// PostGIS: points only, or any shape.
    Geography {
        point: bool,
    },
    /// pgvector, with its number of dimensions.
    Vector(i32),
    Binary,
    /// In _source only.
    Unsearchable,
}

impl Field {
    pub fn mapping(self, dialect: Dialect) -> Value {
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
            Field::Point | Field::Geography { point: true } => json!({"type": "geo_point", "ignore_malformed": true}),
            Field::Geography { point: false } => json!({"type": "geo_shape", "ignore_malformed": true}),
            // By distance, which is what pgvector's own default is, and which takes a vector of zeros, too: cosine does
            // not.
            Field::Vector(dimensions) if dialect == Dialect::Elasticsearch => {
                json!({"type": "dense_vector", "dims": dimensions, "index": true, "similarity": "l2_norm"})
            }
            Field::Vector(dimensions) => json!({"type": "knn_vector", "dimension": dimensions}),
            Field::Binary => json!({"type": "binary"}),
            // Any JSON will do, and none of it is looked at.
            Field::Unsearchable => json!({"type": "object", "enabled": false}),
        }
    }

    /// True for types that not every distribution of the engines has: modules and plugins bring them.
    pub fn is_optional(self) -> bool {
        matches!(self, Field::Geography { point: false } | Field::Vector(_))
    }
}

/// True for an array and for a composite type, also below a domain.
pub fn is_compound(column: &Column) -> bool {
    let (element, is_array) = element_of(column.type_oid);
    // SAFETY: a syscache lookup on the main thread, inside a transaction.
    is_array || unsafe { pg_sys::get_typtype(element) } as u8 == pg_sys::TYPTYPE_COMPOSITE
}

/// A column's type, seen as a field.
pub struct Type {
    pub field: Field,
    is_array: bool,
    /// The type without domain and array.
    element: pg_sys::Oid,
    is_multirange: bool,
}

impl Type {
    /// `mapped`: the user has a mapping of his own for it.
    pub fn of(column: &Column, mapped: bool) -> Self {
        let (element, is_array) = element_of(column.type_oid);
        let mut modifier = column.modifier;
        // SAFETY: syscache lookups on the main thread, inside a transaction.
        let kind = unsafe {
            pg_sys::getBaseTypeAndTypmod(column.type_oid, &mut modifier);
            pg_sys::get_typtype(element)
        } as u8;
        let is_multirange = kind == pg_sys::TYPTYPE_MULTIRANGE;
        let field = match element {
            pg_sys::INT2OID => Field::Number("short"),
            pg_sys::INT4OID => Field::Number("integer"),
            pg_sys::INT8OID | pg_sys::OIDOID => Field::Number("long"),
            pg_sys::FLOAT4OID => Field::Number("float"),
            pg_sys::FLOAT8OID | pg_sys::NUMERICOID | pg_sys::MONEYOID => Field::Number("double"),
            pg_sys::BOOLOID => Field::Boolean,
            pg_sys::TEXTOID | pg_sys::VARCHAROID | pg_sys::BPCHAROID | pg_sys::NAMEOID | pg_sys::XMLOID => Field::Text,
            pg_sys::TSVECTOROID if mapped => Field::Text,
            pg_sys::BYTEAOID if mapped => Field::Binary,
            pg_sys::DATEOID | pg_sys::TIMESTAMPOID | pg_sys::TIMESTAMPTZOID => Field::Date,
            pg_sys::INETOID => Field::Ip,
            pg_sys::CIDROID => Field::Range("ip_range"),
            pg_sys::JSONOID | pg_sys::JSONBOID => Field::Json,
            pg_sys::POINTOID => Field::Point,
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
            _ if kind == pg_sys::TYPTYPE_BASE => match extension_type(element).as_str() {
                "citext" => Field::Text,
                "hstore" => Field::Json,
                "geometry" | "geography" => Field::Geography { point: modifier & POSTGIS_KIND == POSTGIS_POINT },
                "vector" | "halfvec" if is_array => Field::Keyword,
                "vector" | "halfvec" if (1..=MAX_DIMENSIONS).contains(&modifier) => Field::Vector(modifier),
                "vector" | "halfvec" => Field::Unsearchable,
                _ => Field::Keyword,
            },
            _ => Field::Keyword,
        };
        // Arrays of ranges go as text, for `expression` takes none apart; cidr's JSON is a text already.
        let field =
            if is_array && matches!(field, Field::Range(kind) if kind != "ip_range") { Field::Keyword } else { field };
        Self { field, is_array, element, is_multirange }
    }

    /// True where the value is made to fit the derived mapping: under a mapping of another type it stays as Postgres
    /// writes it.
    pub fn fits_own_mapping_only(&self) -> bool {
        matches!(self.field, Field::Range(_) | Field::Point)
    }

    /// How the bare column becomes JSON; None where only Postgres knows.
    pub fn encoding(&self) -> Option<Encoding> {
        match self.element {
            _ if self.is_array => None,
            pg_sys::BOOLOID => Some(Encoding::Boolean),
            pg_sys::INT2OID => Some(Encoding::Int2),
            pg_sys::INT4OID => Some(Encoding::Int4),
            pg_sys::INT8OID => Some(Encoding::Int8),
            pg_sys::NUMERICOID => Some(Encoding::Numeric),
            pg_sys::TEXTOID | pg_sys::VARCHAROID | pg_sys::BPCHAROID => Some(Encoding::Text),
            kind @ (pg_sys::DATEOID | pg_sys::TIMESTAMPOID | pg_sys::TIMESTAMPTZOID) => Some(Encoding::Time(kind)),
            _ => None,
        }
    }

    /// The SQL that makes the column's JSON value; `bare` is the qualified column.
    pub fn expression(&self, bare: &str) -> String {
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
            (Field::Point | Field::Geography { .. } | Field::Binary, _) if self.is_array => {
                let element = self.element_expression("e");
                // Without nulls: OpenSearch finds a document by none of its points if the last of them is null.
                format!(
                    "case when {bare} is not null then coalesce((select pg_catalog.json_agg({element}) \
                     filter (where e is not null) from pg_catalog.unnest({bare}) e), '[]') end"
                )
            }
            (_, pg_sys::MONEYOID) if self.is_array => format!("{bare}::pg_catalog.numeric[]"),
            _ if self.is_array => bare.to_owned(),
            (Field::Range("ip_range"), _) => bare.to_owned(),
            (Field::Range(kind), _) if self.is_multirange => {
                let range = self.range_expression("r", kind);
                format!("(select pg_catalog.json_agg({range}) from pg_catalog.unnest({bare}) r)")
            }
            _ => self.element_expression(bare),
        }
    }

    /// The same for a single value.
    fn element_expression(&self, bare: &str) -> String {
        match (self.field, self.element) {
            (Field::Range(kind), _) => self.range_expression(bare, kind),
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
            // What does not lie on earth stays as Postgres writes it: the engine would wrap it around.
            (Field::Point, _) => format!(
                "case when ({bare})[0] between -180 and 180 and ({bare})[1] between -90 and 90 \
                 then pg_catalog.json_build_object('lon', ({bare})[0], 'lat', ({bare})[1]) \
                 else pg_catalog.to_json({bare}) end"
            ),
            (Field::Geography { .. }, _) => {
                let name = type_name(self.element);
                // PostGIS' functions lie where its types do.
                let (schema, kind) = name.rsplit_once('.').unwrap_or(("public", &name));
                let degrees = if kind == "geography" {
                    bare.to_owned()
                } else {
                    format!(
                        "case when {schema}.st_srid({bare}) in (0, 4326) then {bare} \
                         else {schema}.st_transform({bare}, 4326) end"
                    )
                };
                format!("{schema}.st_asgeojson({degrees}, 9, 0)::pg_catalog.json")
            }
            (Field::Vector(_) | Field::Unsearchable, _) => format!("{bare}::pg_catalog.text::pg_catalog.json"),
            // Without the line ends that encode() makes.
            (Field::Binary, _) => {
                format!("pg_catalog.translate(pg_catalog.encode({bare}, 'base64'), pg_catalog.chr(10), '')")
            }
            _ => bare.to_owned(),
        }
    }

    /// A range as the engine takes it: {"gte": ..., "lt": ...}; an open side has no bound, an empty range is null. The
    /// engine knows no infinity: such a side is open. It steps over a bound that is excluded, to the next millisecond or
    /// double, and refuses the document where nothing is left then: such a range includes its bounds.
    fn range_expression(&self, range: &str, kind: &str) -> String {
        let (lower, upper) = (format!("pg_catalog.lower({range})"), format!("pg_catalog.upper({range})"));
        let (lower_in, upper_in) = (format!("pg_catalog.lower_inc({range})"), format!("pg_catalog.upper_inc({range})"));
        let object = |lower_in: &str, lower: &str, upper_in: &str, upper: &str| {
            format!(
                "when not pg_catalog.isempty({range}) then pg_catalog.json_build_object(\
                 case when {lower_in} then 'gte' else 'gt' end, {lower}, \
                 case when {upper_in} then 'lte' else 'lt' end, {upper})"
            )
        };
        let finite = || (format!("nullif({lower}, '-infinity')"), format!("nullif({upper}, 'infinity')"));
        let moments = |zone: &str| {
            let (lower, upper) = finite();
            // What a bound leaves open the engine fills up, with .999 for some: so none goes without milliseconds.
            let text = |bound: &str| {
                format!(
                    "coalesce(pg_catalog.replace(pg_catalog.to_char({bound}, \
                     'YYYY-MM-DD\"T\"HH24:MI:SS.MS{zone} BC'), ' AD', ''), {bound}::pg_catalog.text)"
                )
            };
            // A bound that is cut is included: what lies in its millisecond is cut likewise.
            let is_in = |inclusive: &str, bound: &str| {
                format!("({inclusive} or pg_catalog.date_trunc('milliseconds', {bound}) <> {bound})")
            };
            let (lower_in, upper_in) = (is_in(&lower_in, &lower), is_in(&upper_in, &upper));
            let millis = |bound: &str| format!("pg_catalog.floor(extract(epoch from {bound}) * 1000)");
            let left_out = |is_in: &str| format!("(not {is_in})::pg_catalog.int4");
            format!(
                "when {} - {} < {} + {} then pg_catalog.json_build_object('gte', {start}, 'lte', {start}) {}",
                millis(&upper),
                millis(&lower),
                left_out(&lower_in),
                left_out(&upper_in),
                object(&lower_in, &text(&lower), &upper_in, &text(&upper)),
                start = text(&lower),
            )
        };
        let cases = match self.element {
            pg_sys::TSRANGEOID | pg_sys::TSMULTIRANGEOID => moments(""),
            pg_sys::TSTZRANGEOID | pg_sys::TSTZMULTIRANGEOID => moments("TZH:TZM"),
            // Closer than that, two numbers may be one double, or neighbours. No cast tells: it fails where they are too
            // large or too small for a double.
            _ if kind == "double_range" => {
                let (lower, upper) = finite();
                let close = format!(
                    "{upper} - {lower} <= \
                     greatest(pg_catalog.abs({lower}), pg_catalog.abs({upper})) * 5e-16 + 1e-323"
                );
                object(&format!("{lower_in} or {close}"), &lower, &format!("{upper_in} or {close}"), &upper)
            }
            _ if kind == "date_range" => {
                let (lower, upper) = finite();
                object(&lower_in, &lower, &upper_in, &upper)
            }
            _ => object(&lower_in, &lower, &upper_in, &upper),
        };
        format!("pg_catalog.json_strip_nulls(case {cases} end)")
    }
}
