//! Every row of the table "Column types" in docs/reference.md, read from there: what a type becomes on either product,
//! what is in `_source`, and that it is found. And what mappings and settings of the user's own make of it.

use pg_es_sync_tests::engine::Product;
use pg_es_sync_tests::{Engine, Server, expect, unique};
use postgres::Client;
use serde_json::{Value, json};

/// A type as the documentation names it, and a column of it.
struct Case {
    /// As in the table's first column; other names are promises of the text around it.
    name: &'static str,
    kind: &'static str,
    value: &'static str,
    /// What the query must not find.
    other: &'static str,
    /// The value in `_source`.
    json: &'static str,
    /// Finds `value`: "@" is the field.
    query: &'static str,
    /// The user's own mapping.
    own: Option<&'static str>,
}

const fn case(
    name: &'static str,
    kind: &'static str,
    value: &'static str,
    other: &'static str,
    json: &'static str,
    query: &'static str,
) -> Case {
    Case { name, kind, value, other, json, query, own: None }
}

const SETUP: &str = "
    create extension hstore; create extension citext;
    create type mood as enum ('sad', 'happy');
    create type pair as (a int, b text);
    create domain small as smallint;
    create domain positive as int check (value > 0);
    create domain deep as positive check (value < 1000);
    create domain several as deep[];
    create domain duo as pair;
    create domain span as int4range;
    create domain spot as point;
    create domain blob as bytea;
    create type textrange as range (subtype = text)";

const TERM: &str = r#"{"term": {"@": "$"}}"#;

const CASES: &[Case] = &[
    case("smallint", "smallint", "-7", "8", "-7", r#"{"term": {"@": -7}}"#),
    case("integer", "integer", "2147483647", "8", "2147483647", r#"{"range": {"@": {"gt": 2147483646}}}"#),
    case("bigint", "bigint", "9007199254740993", "9007199254740992", "9007199254740993", TERM),
    case("oid", "oid", "4294967295", "1", r#""4294967295""#, TERM),
    case("real", "real", "1.5", "1.6", "1.5", r#"{"range": {"@": {"gte": 1.4, "lt": 1.55}}}"#),
    case("double precision", "float8", "0.1", "0.2", "0.1", r#"{"term": {"@": 0.1}}"#),
    case("numeric", "numeric(30, 10)", "123.4500000000", "1", "123.4500000000", r#"{"term": {"@": 123.45}}"#),
    case("money", "money", "'1234.56'", "'1'", "1234.56", r#"{"term": {"@": 1234.56}}"#),
    case("boolean", "boolean", "true", "false", "true", r#"{"term": {"@": true}}"#),
    case("text", "text", "'Ein grüner Baum'", "'Haus'", r#""Ein grüner Baum""#, r#"{"match": {"@": "grüner"}}"#),
    case("varchar", "varchar(20)", "'a b'", "'b'", r#""a b""#, r#"{"term": {"@.keyword": "a b"}}"#),
    case("char", "char(5)", "'ab'", "'cd'", r#""ab   ""#, r#"{"match": {"@": "ab"}}"#),
    case("name", "name", "'pg_class'", "'x'", r#""pg_class""#, r#"{"term": {"@.keyword": "pg_class"}}"#),
    case("xml", "xml", "'<a>tree</a>'", "'<b/>'", r#""<a>tree</a>""#, r#"{"match": {"@": "tree"}}"#),
    case("citext", "citext", "'Tree'", "'House'", r#""Tree""#, r#"{"match": {"@": "tree"}}"#),
    case("date", "date", "'2024-02-29'", "'2023-01-01'", r#""2024-02-29""#, r#"{"term": {"@": "2024-02-29"}}"#),
    case(
        "timestamp",
        "timestamp",
        "'2024-02-29 12:00:00.5'",
        "'2023-01-01'",
        r#""2024-02-29T12:00:00.5""#,
        r#"{"range": {"@": {"gte": "2024-02-29T12:00:00.5", "lt": "2024-02-29T12:00:00.6"}}}"#,
    ),
    case(
        "timestamptz",
        "timestamptz",
        "'2024-02-29 12:00:00+02'",
        "'2023-01-01'",
        r#""2024-02-29T10:00:00+00:00""#,
        r#"{"term": {"@": "2024-02-29T10:00:00Z"}}"#,
    ),
    case("inet", "inet", "'2001:db8::1'", "'10.0.0.1'", r#""2001:db8::1""#, r#"{"term": {"@": "2001:db8::/32"}}"#),
    case("cidr", "cidr", "'10.1.0.0/16'", "'10.2.0.0/16'", r#""10.1.0.0/16""#, r#"{"term": {"@": "10.1.2.3"}}"#),
    case("json", "json", r#"'{"a": {"b": "c"}}'"#, "'{}'", r#"{"a": {"b": "c"}}"#, r#"{"term": {"@.a.b": "c"}}"#),
    case("jsonb", "jsonb", r#"'{"a": [1, 2]}'"#, "'{}'", r#"{"a": [1, 2]}"#, r#"{"term": {"@.a": "2"}}"#),
    case("hstore", "hstore", "'k=>v'", "'k=>w'", r#"{"k": "v"}"#, r#"{"term": {"@.k": "v"}}"#),
    case("composite types", "pair", "(1, 'x')", "(2, 'y')", r#"{"a": 1, "b": "x"}"#, r#"{"term": {"@.b": "x"}}"#),
    case("int4range", "int4range", "'[1,5)'", "'[7,9)'", r#"{"gte": 1, "lt": 5}"#, r#"{"term": {"@": 4}}"#),
    case(
        "int4multirange",
        "int4multirange",
        "'{[1,3),[7,9)}'",
        "'{[3,5)}'",
        r#"[{"gte": 1, "lt": 3}, {"gte": 7, "lt": 9}]"#,
        r#"{"term": {"@": 8}}"#,
    ),
    case("int8range", "int8range", "'[1,)'", "'(,0)'", r#"{"gte": 1}"#, r#"{"term": {"@": 9000000000}}"#),
    case("int8multirange", "int8multirange", "'{[1,2)}'", "'{}'", r#"[{"gte": 1, "lt": 2}]"#, r#"{"term": {"@": 1}}"#),
    case("numrange", "numrange", "'(1.5,2.5]'", "'(3,4)'", r#"{"gt": 1.5, "lte": 2.5}"#, r#"{"term": {"@": 2.5}}"#),
    case(
        "nummultirange",
        "nummultirange",
        "'{(1.5,2.5]}'",
        "'{(3,4)}'",
        r#"[{"gt": 1.5, "lte": 2.5}]"#,
        r#"{"term": {"@": 2.5}}"#,
    ),
    case(
        "daterange",
        "daterange",
        "'[2024-01-01,2024-02-01)'",
        "'[2025-01-01,)'",
        r#"{"gte": "2024-01-01", "lt": "2024-02-01"}"#,
        r#"{"term": {"@": "2024-01-31"}}"#,
    ),
    case(
        "tsrange",
        "tsrange",
        "'[2024-01-01 10:00,2024-01-01 11:00)'",
        "'empty'",
        r#"{"gte": "2024-01-01T10:00:00.000", "lt": "2024-01-01T11:00:00.000"}"#,
        r#"{"term": {"@": "2024-01-01T10:30:00"}}"#,
    ),
    case(
        "tstzrange",
        "tstzrange",
        "'[2024-01-01 10:00+00,2024-01-01 11:00+00)'",
        "'empty'",
        r#"{"gte": "2024-01-01T10:00:00.000+00:00", "lt": "2024-01-01T11:00:00.000+00:00"}"#,
        r#"{"term": {"@": "2024-01-01T10:30:00Z"}}"#,
    ),
    case(
        "datemultirange",
        "datemultirange",
        "'{[2024-01-01,2024-02-01)}'",
        "'{}'",
        r#"[{"gte": "2024-01-01", "lt": "2024-02-01"}]"#,
        r#"{"term": {"@": "2024-01-31"}}"#,
    ),
    case(
        "tsmultirange",
        "tsmultirange",
        "'{[2024-01-01 10:00,2024-01-01 11:00)}'",
        "'{}'",
        r#"[{"gte": "2024-01-01T10:00:00.000", "lt": "2024-01-01T11:00:00.000"}]"#,
        r#"{"term": {"@": "2024-01-01T10:30:00"}}"#,
    ),
    case(
        "tstzmultirange",
        "tstzmultirange",
        "'{[2024-01-01 10:00+00,2024-01-01 11:00+00)}'",
        "'{}'",
        r#"[{"gte": "2024-01-01T10:00:00.000+00:00", "lt": "2024-01-01T11:00:00.000+00:00"}]"#,
        r#"{"term": {"@": "2024-01-01T10:30:00Z"}}"#,
    ),
    case("arrays of ranges", "int4range[]", "array['[1,3)', '[5,7)']", "'{}'", r#"["[1,3)", "[5,7)"]"#, TERM_SECOND),
    case("arrays of multiranges", "int4multirange[]", "array['{[1,3)}']", "'{}'", r#"["{[1,3)}"]"#, TERM_ONLY),
    case("point", "point", "'(9.5,48)'", "'(1,1)'", r#"{"lon": 9.5, "lat": 48}"#, AROUND),
    case("bytea", "bytea", r"'\xff'", r"'\x00'", "", ""),
    case("tsvector", "tsvector", "'tree'", "'house'", "", ""),
    case("arrays of bytea", "bytea[]", r"array['\xff'::bytea]", "'{}'", "", ""),
    Case {
        own: Some(r#"{"doc_values": true}"#),
        ..case(
            "bytea that is mapped",
            "bytea",
            "convert_to(repeat('ab', 60), 'UTF8')",
            "null",
            r#""YWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFiYWJhYmFi""#,
            r#"{"exists": {"field": "@"}}"#,
        )
    },
    Case {
        own: Some("{}"),
        ..case(
            "tsvector that is mapped",
            "tsvector",
            "'tree:1'",
            "'b:1'",
            r#""'tree':1""#,
            r#"{"match": {"@": "tree"}}"#,
        )
    },
    case(
        "uuid",
        "uuid",
        "'6a7a9d10-0000-4000-8000-000000000001'",
        "'6a7a9d10-0000-4000-8000-000000000002'",
        r#""6a7a9d10-0000-4000-8000-000000000001""#,
        TERM,
    ),
    case("enums", "mood", "'happy'", "'sad'", r#""happy""#, TERM),
    case("\"char\"", "\"char\"", "'x'", "'y'", r#""x""#, TERM),
    case("time", "time", "'12:30'", "'13:30'", r#""12:30:00""#, TERM),
    case("timetz", "timetz", "'12:30+02'", "'13:30+02'", r#""12:30:00+02""#, TERM),
    case("interval", "interval", "'1 day 2 hours'", "'1 day'", r#""P1DT2H""#, TERM),
    case("bit", "bit(4)", "B'1010'", "B'0000'", r#""1010""#, TERM),
    case("varbit", "varbit", "B'101'", "B'1'", r#""101""#, TERM),
    case("macaddr", "macaddr", "'08:00:2b:01:02:03'", "'08:00:2b:01:02:04'", r#""08:00:2b:01:02:03""#, TERM),
    case("macaddr8", "macaddr8", "'08:00:2b:01:02:03:04:05'", "null", r#""08:00:2b:01:02:03:04:05""#, TERM),
    case("pg_lsn", "pg_lsn", "'16/B374D848'", "'0/0'", r#""16/B374D848""#, TERM),
    case("jsonpath", "jsonpath", "'$.a'", "'$.b'", r#""$.\"a\"""#, TERM),
    case("tsquery", "tsquery", "'a & b'", "'c'", r#""'a' & 'b'""#, TERM),
    case("xid8", "xid8", "'77'", "'78'", r#""77""#, TERM),
    case("line", "line", "'{1,2,3}'", "'{1,2,4}'", r#""{1,2,3}""#, TERM),
    case("lseg", "lseg", "'[(1,2),(3,4)]'", "'[(1,2),(3,5)]'", r#""[(1,2),(3,4)]""#, TERM),
    case("box", "box", "'(3,4),(1,2)'", "'(3,5),(1,2)'", r#""(3,4),(1,2)""#, TERM),
    case("path", "path", "'((1,2),(3,4))'", "'((1,2),(3,5))'", r#""((1,2),(3,4))""#, TERM),
    case("polygon", "polygon", "'((1,2),(3,4))'", "'((1,2),(3,5))'", r#""((1,2),(3,4))""#, TERM),
    case("circle", "circle", "'<(1,2),3>'", "'<(1,2),4>'", r#""<(1,2),3>""#, TERM),
    case("all others", "regclass", "'pg_catalog.pg_class'", "null", r#""pg_class""#, TERM),
    // What the text says of domains, arrays and mappings.
    case("+ `short` a domain", "small", "7", "8", "7", r#"{"term": {"@": 7}}"#),
    case("+ `integer` a domain over a domain", "deep", "7", "8", "7", r#"{"term": {"@": 7}}"#),
    case(
        "+ `integer` a domain over an array of a domain",
        "several",
        "'{1,2}'",
        "'{3}'",
        "[1, 2]",
        r#"{"term": {"@": 2}}"#,
    ),
    case(
        "+ `integer_range` a domain over a range",
        "span",
        "'[1,5)'",
        "'[7,9)'",
        r#"{"gte": 1, "lt": 5}"#,
        r#"{"term": {"@": 4}}"#,
    ),
    case("+ `geo_point` a domain over a point", "spot", "'(9.5,48)'", "'(1,1)'", r#"{"lon": 9.5, "lat": 48}"#, AROUND),
    case("+ left out a domain over bytea", "blob", r"'\xff'", r"'\x00'", "", ""),
    case(
        "+ json a domain over a composite type",
        "duo",
        "(1, 'x')",
        "(2, 'y')",
        r#"{"a": 1, "b": "x"}"#,
        r#"{"term": {"@.b": "x"}}"#,
    ),
    case(
        "+ json an array of composite types",
        "pair[]",
        "array[(1, 'x'), null]::pair[]",
        "'{}'",
        r#"[{"a": 1, "b": "x"}, null]"#,
        r#"{"term": {"@.b": "x"}}"#,
    ),
    case(
        "+ json an array of hstore",
        "hstore[]",
        "array['k=>v', 'k=>w']::hstore[]",
        "'{}'",
        r#"[{"k": "v"}, {"k": "w"}]"#,
        r#"{"term": {"@.k": "w"}}"#,
    ),
    case(
        "+ json an array of two dimensions of composite types",
        "pair[]",
        "array[array[(1, 'x')], array[(2, 'z')]]::pair[]",
        "'{}'",
        r#"[[{"a": 1, "b": "x"}], [{"a": 2, "b": "z"}]]"#,
        r#"{"term": {"@.b": "z"}}"#,
    ),
    case(
        "+ `integer` an array of two dimensions",
        "int[]",
        "'{{1,2},{3,4}}'",
        "'{{5}}'",
        "[[1, 2], [3, 4]]",
        r#"{"term": {"@": 4}}"#,
    ),
    case(
        "+ `double` an array of three dimensions with nulls",
        "numeric[]",
        "'{{{1.5,null}},{{2.5,3}}}'",
        "'{}'",
        "[[[1.5, null]], [[2.5, 3]]]",
        r#"{"term": {"@": 2.5}}"#,
    ),
    case(
        "+ `text` an array of two dimensions",
        "text[]",
        "'{{a tree,b},{c,d}}'",
        "'{b}'",
        r#"[["a tree", "b"], ["c", "d"]]"#,
        r#"{"match": {"@": "tree"}}"#,
    ),
    case(
        "+ `date` an array of two dimensions",
        "date[]",
        "'{{2024-01-01},{2024-01-02}}'",
        "'{}'",
        r#"[["2024-01-01"], ["2024-01-02"]]"#,
        r#"{"term": {"@": "2024-01-02"}}"#,
    ),
    case("+ `boolean` an array", "boolean[]", "'{true,null}'", "'{false}'", "[true, null]", r#"{"term": {"@": true}}"#),
    case(
        "+ `long` an array",
        "bigint[]",
        "'{1,9000000000}'",
        "'{1}'",
        "[1, 9000000000]",
        r#"{"term": {"@": 9000000000}}"#,
    ),
    case(
        "+ `keyword` an array of enums",
        "mood[]",
        "'{happy,sad}'",
        "'{sad}'",
        r#"["happy", "sad"]"#,
        r#"{"term": {"@": "happy"}}"#,
    ),
    case(
        "+ `keyword` an array of uuids",
        "uuid[]",
        "array['6a7a9d10-0000-4000-8000-000000000001']::uuid[]",
        "'{}'",
        r#"["6a7a9d10-0000-4000-8000-000000000001"]"#,
        TERM_ONLY,
    ),
    case(
        "+ `ip` an array",
        "inet[]",
        "'{10.0.0.1,10.0.0.2}'",
        "'{10.0.0.1}'",
        r#"["10.0.0.1", "10.0.0.2"]"#,
        r#"{"term": {"@": "10.0.0.2"}}"#,
    ),
    case(
        "+ `ip_range` an array",
        "cidr[]",
        "'{10.1.0.0/16,10.3.0.0/16}'",
        "'{}'",
        r#"["10.1.0.0/16", "10.3.0.0/16"]"#,
        r#"{"term": {"@": "10.3.2.1"}}"#,
    ),
    case("+ `double` an array of money", "money[]", "'{1.5,2.5}'", "'{}'", "[1.5, 2.5]", r#"{"term": {"@": 2.5}}"#),
    case(
        "+ `geo_point` an array",
        "point[]",
        "array[point '(1,1)', point '(9.5,48)', null]",
        "'{}'",
        r#"[{"lon": 1, "lat": 1}, {"lon": 9.5, "lat": 48}]"#,
        AROUND,
    ),
    case("+ `geo_point` a point that is not on earth", "point", "'(800,600)'", "null", r#""(800,600)""#, ""),
    case("+ `geo_point` a point that is no number", "point", "'(NaN,Infinity)'", "null", r#""(NaN,Infinity)""#, ""),
    case("+ `keyword` a range of text", "textrange", "'[a,c)'", "'[a,b)'", r#""[a,c)""#, r#"{"term": {"@": "[a,c)"}}"#),
    case(
        "+ `date_range` a range within a millisecond",
        "tsrange",
        "'[2024-01-01 10:00:00.1234,2024-01-01 10:00:00.1239)'",
        "'(2024-01-01 10:00:00.124,2024-01-01 10:00:00.125)'",
        r#"{"gte": "2024-01-01T10:00:00.123", "lte": "2024-01-01T10:00:00.123"}"#,
        r#"{"term": {"@": "2024-01-01T10:00:00.123"}}"#,
    ),
    case(
        "+ `date_range` a multirange within a millisecond",
        "tstzmultirange",
        "'{(2024-01-01 10:00:00+00,2024-01-01 10:00:00.001+00)}'",
        "'{[2024-01-01 10:00:00.001+00,2024-01-01 10:00:00.002+00)}'",
        r#"[{"gte": "2024-01-01T10:00:00.000+00:00", "lte": "2024-01-01T10:00:00.000+00:00"}]"#,
        r#"{"term": {"@": "2024-01-01T10:00:00.000Z"}}"#,
    ),
    case(
        "+ `double_range` a range within a double",
        "numrange",
        "'[1.5,1.50000000000000001)'",
        "'(1.6,1.60000000000000001)'",
        r#"{"gte": 1.5, "lte": 1.50000000000000001}"#,
        r#"{"term": {"@": 1.5}}"#,
    ),
    Case {
        own: Some(r#"{"type": "keyword"}"#),
        ..case("+ `keyword` a range that is mapped", "int4range", "'[1,5)'", "'[1,6)'", r#""[1,5)""#, TERM)
    },
    Case {
        own: Some(r#"{"type": "keyword"}"#),
        ..case("+ `keyword` a point that is mapped", "point", "'(9.5,48)'", "'(1,1)'", r#""(9.5,48)""#, TERM)
    },
    Case {
        own: Some("{}"),
        ..case(
            "+ `binary` an array of bytea that is mapped",
            "bytea[]",
            r"array['\x00', '\xff']::bytea[]",
            "'{}'",
            r#"["AA==", "/w=="]"#,
            "",
        )
    },
    Case { own: Some("null"), ..case("+ nothing a column whose mapping is taken away", "integer", "7", "8", "7", "") },
    Case {
        own: Some(r#"{"type": "nested", "properties": {"a": {"type": "integer"}}}"#),
        ..case(
            "+ `nested` jsonb that is mapped",
            "jsonb",
            r#"'[{"a": 5}]'"#,
            "'[]'",
            r#"[{"a": 5}]"#,
            r#"{"nested": {"path": "@", "query": {"term": {"@.a": 5}}}}"#,
        )
    },
];

const TERM_ONLY: &str = r#"{"term": {"@": "$0"}}"#;
const TERM_SECOND: &str = r#"{"term": {"@": "$1"}}"#;
const AROUND: &str =
    r#"{"geo_bounding_box": {"@": {"top_left": {"lat": 49, "lon": 9}, "bottom_right": {"lat": 47, "lon": 10}}}}"#;

const POSTGIS: &[Case] = &[
    case(
        "geometry(Point)",
        "geometry(Point, 4326)",
        "'SRID=4326;POINT(9.5 48)'",
        "'SRID=4326;POINT(1 1)'",
        r#"{"type": "Point", "coordinates": [9.5, 48]}"#,
        AROUND,
    ),
    case(
        "geography(Point)",
        "geography(Point)",
        "'POINT(9.5 48)'",
        "'POINT(1 1)'",
        r#"{"type": "Point", "coordinates": [9.5, 48]}"#,
        AROUND,
    ),
    case(
        "geometry",
        "geometry",
        "'LINESTRING(9 47.5,9.5 48)'",
        "'POINT(1 1)'",
        r#"{"type": "LineString", "coordinates": [[9, 47.5], [9.5, 48]]}"#,
        INTERSECTS,
    ),
    case(
        "geography",
        "geography",
        "'LINESTRING(9 47.5,9.5 48)'",
        "'POINT(1 1)'",
        r#"{"type": "LineString", "coordinates": [[9, 47.5], [9.5, 48]]}"#,
        INTERSECTS,
    ),
    case(
        "+ `geo_point` another SRID",
        "geometry(Point, 3857)",
        "st_transform(st_setsrid(st_point(9.5, 48), 4326), 3857)",
        "null",
        r#"{"type": "Point", "coordinates": [9.5, 48]}"#,
        AROUND,
    ),
    case(
        "+ `geo_point` an empty point",
        "geometry(Point)",
        "'POINT EMPTY'",
        "null",
        r#"{"type": "Point", "coordinates": []}"#,
        "",
    ),
    case(
        "+ `geo_point` an array of points",
        "geometry(Point)[]",
        "array[st_point(1, 1), st_point(9.5, 48)]",
        "'{}'",
        r#"[{"type": "Point", "coordinates": [1, 1]}, {"type": "Point", "coordinates": [9.5, 48]}]"#,
        AROUND,
    ),
];

const INTERSECTS: &str = r#"{"geo_shape": {"@": {"shape": {"type": "envelope", "coordinates": [[9, 49], [10, 47]]}, "relation": "intersects"}}}"#;

const PGVECTOR: &[Case] = &[
    case("vector(n)", "vector(3)", "'[1,2.5,3]'", "'[0,0,0]'", "[1, 2.5, 3]", NEAREST),
    case("halfvec(n)", "halfvec(3)", "'[1,2.5,3]'", "'[0,0,0]'", "[1, 2.5, 3]", NEAREST),
    case("vector", "vector", "'[1,2.5]'", "'[1]'", "[1, 2.5]", ""),
    case("halfvec", "halfvec(5000)", "array_to_json(array_fill(1, array[5000]))::text::halfvec", "null", "ones", ""),
    case("arrays of vectors", "vector(3)[]", "array['[1,2,3]']::vector(3)[]", "'{}'", r#"["[1,2,3]"]"#, TERM_ONLY),
    case("+ `dense_vector` a domain", "embedding", "'[1,2.5,3]'", "'[0,0,0]'", "[1, 2.5, 3]", NEAREST),
];

/// All that have a vector, the nearest one first.
const NEAREST: &str = "nearest";

/// The table's rows: name, what it becomes on Elasticsearch, on OpenSearch.
fn documented() -> Vec<(String, String, String)> {
    let reference = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference.md");
    let text = std::fs::read_to_string(reference).expect("docs/reference.md");
    let section = text.split("\n## Column types\n").nth(1).expect("a section \"Column types\"");
    let rows = section.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    rows.skip(2)
        .flat_map(|row| {
            let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
            let types = cells[0].split(", ").map(str::to_owned);
            types.map(|name| (name, cells[1].to_owned(), cells[2].to_owned())).collect::<Vec<_>>()
        })
        .collect()
}

impl Case {
    /// What the field's type is to be, in the documentation's words.
    fn becomes(&self, product: Product) -> String {
        let Some(promise) = self.name.strip_prefix("+ ") else {
            let row = documented().into_iter().find(|(name, ..)| name == self.name);
            let (_, elasticsearch, opensearch) = row.unwrap_or_else(|| panic!("{} is not in the table", self.name));
            return if product == Product::Elasticsearch { elasticsearch } else { opensearch };
        };
        match (promise.split(' ').next().unwrap_or_default(), product) {
            ("json", Product::Elasticsearch) => "`flattened`".into(),
            ("json", Product::OpenSearch) => "`flat_object`".into(),
            ("`dense_vector`", Product::OpenSearch) => "`knn_vector`".into(),
            ("left", _) => "left out".into(),
            (word, _) => word.into(),
        }
    }

    fn query(&self, field: &str, value: &Value) -> Value {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let escaped = |value: &Value| json!(text(value)).to_string().trim_matches('"').to_owned();
        let mut query = self.query.replace('@', field);
        for (place, mark) in ["$0", "$1"].iter().enumerate() {
            if query.contains(mark) {
                query = query.replace(mark, &escaped(&value[place]));
            }
        }
        let query = query.replace("\"$\"", &json!(text(value)).to_string());
        serde_json::from_str(&query).unwrap_or_else(|error| panic!("{error}: {query}"))
    }
}

/// Whether the engine knows a field's type: a module or plugin may be missing.
fn knows(engine: &Engine, kind: &str) -> bool {
    let index = unique("probe");
    let field = match kind {
        "knn_vector" => json!({"type": kind, "dimension": 3}),
        _ => json!({"type": kind}),
    };
    let (status, _) =
        engine.request("PUT", &format!("/{index}"), Some(json!({"mappings": {"properties": {"f": field}}})));
    engine.request("DELETE", &format!("/{index}"), None);
    status == 200
}

/// Loads, updates and inserts rows with a value of each case, and with another one; compares mapping, `_source` and what
/// is found. Rows 1 to 3 end with the values, row 2 by an update.
fn written_and_read_back(server: &Server, engine: &Engine, setup: &str, cases: &[Case], comparable: bool) {
    let database = format!("{:?}", engine.product()).to_lowercase();
    let mut client = server.create_empty_database(&database);
    let table = unique("types");
    let column = |place: usize| format!("c{place}");
    let columns: Vec<String> =
        cases.iter().enumerate().map(|(place, case)| format!("{} {}", column(place), case.kind)).collect();
    let properties: serde_json::Map<String, Value> = cases
        .iter()
        .enumerate()
        .filter_map(|(place, case)| Some((column(place), serde_json::from_str(case.own?).expect("an own mapping"))))
        .collect();
    let options = json!({"mappings": {"properties": properties}});
    client
        .batch_execute(&format!(
            "alter database {database} set es_sync.url = '{}'; create extension pg_es_sync; {setup};
             create table {table} (id int primary key, {})",
            engine.url(),
            columns.join(", ")
        ))
        .expect("set up");
    let mut client = server.connect(&database);
    let insert = |client: &mut Client, id: i32, value: fn(&Case) -> &'static str| {
        let names: Vec<String> = (0..cases.len()).map(column).collect();
        let values: Vec<String> = cases.iter().map(|case| format!("({})::{}", value(case), case.kind)).collect();
        let insert = format!("insert into {table} (id, {}) values ({id}, {})", names.join(", "), values.join(", "));
        client.batch_execute(&insert).unwrap_or_else(|error| panic!("{error:?} in: {insert}"));
    };
    insert(&mut client, 1, |case| case.value);
    insert(&mut client, 2, |case| case.other);
    let shown: Value = client
        .query_one(&format!("select es_sync.mapping('{table}', options => $1, product => $2)"), &[&options, &database])
        .expect("mapping")
        .get(0);
    client.execute(&format!("select es_sync.attach('{table}', options => $1)"), &[&options]).expect("attach");
    expect::settled(&mut client);
    insert(&mut client, 3, |case| case.value);
    insert(&mut client, 4, |case| case.other);
    client.batch_execute(&format!("insert into {table} (id) values (5)")).expect("a row of nulls");
    let names = (0..cases.len()).map(column).collect::<Vec<_>>().join(", ");
    client
        .batch_execute(&format!(
            "update {table} set ({names}) = (select {names} from {table} where id = 1) where id = 2"
        ))
        .expect("an update of every column");
    expect::settled(&mut client);
    let letters = client.query("select key || ': ' || reason from es_sync.dead_letters", &[]).expect("dead letters");
    let letters: Vec<String> = letters.iter().map(|row| row.get(0)).collect();
    assert_eq!(letters, Vec::<String>::new());

    let concrete = &engine.indexes_of(&table)[0];
    let mapping = engine.get(&format!("/{concrete}/_mapping"))[concrete]["mappings"]["properties"].clone();
    // All that fail are shown, not only the first.
    let failed: Vec<&str> = cases
        .iter()
        .enumerate()
        .filter(|(place, case)| {
            let judge = || judge(engine, &table, &column(*place), case, &mapping, &shown);
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(judge)).is_err()
        })
        .map(|(_, case)| case.name)
        .collect();
    assert!(failed.is_empty(), "{failed:?}");
    // What is sent is what a comparison takes for equal.
    client.batch_execute(&format!("select es_sync.verify('{table}')")).expect("verify");
    expect::settled(&mut client);
    let row = client
        .query_one("select missing, different, orphaned from es_sync.jobs order by id desc limit 1", &[])
        .expect("job");
    let counts: [Option<i64>; 3] = [row.get(0), row.get(1), row.get(2)];
    assert_eq!(counts.map(Option::unwrap_or_default), [0; 3]);
    if comparable {
        engine.put(&format!("/{table}/_doc/5?refresh=true"), json!({"id": -5}));
        client.batch_execute(&format!("select es_sync.verify('{table}')")).expect("verify");
        expect::settled(&mut client);
        let different: Option<i64> =
            client.query_one("select different from es_sync.jobs order by id desc limit 1", &[]).expect("job").get(0);
        assert_eq!(different, Some(1), "contents are compared");
    }
}

/// Asserts that a case's column became what it is to be.
fn judge(engine: &Engine, table: &str, field: &str, case: &Case, mapping: &Value, shown: &Value) {
    let what = format!("{} on {:?}", case.name, engine.product());
    let becomes = case.becomes(engine.product());
    let source: Vec<Value> = ["1", "2", "3"]
        .iter()
        .map(|id| serde_json::from_str(&engine.source(table, id).expect("a document")).expect("JSON"))
        .collect();
    let is = &mapping[field]["type"];
    if becomes == "left out" {
        assert_eq!(is, &Value::Null, "{what} has no mapping");
        assert!(source.iter().all(|document| document.get(field).is_none()), "{what} is in no document");
        return;
    }
    let wanted: Value = match case.json {
        "ones" => json!(vec![1; 5000]),
        text => serde_json::from_str(text).unwrap_or_else(|error| panic!("{what}: {error}")),
    };
    for document in &source {
        assert_eq!(document[field], wanted, "{what} in _source");
    }
    let mut searchable = !case.query.is_empty();
    match becomes.as_str() {
        "nothing" => assert_eq!(is, &Value::Null, "{what}"),
        "not searchable" => assert_eq!(mapping[field]["enabled"], json!(false), "{what}"),
        kind => {
            let kind = kind.trim_matches('`');
            assert_eq!(shown["mappings"]["properties"][field]["type"], *kind, "{what}, as es_sync.mapping says");
            if ["geo_shape", "knn_vector"].contains(&kind) && !knows(engine, kind) {
                eprintln!("{what}: this engine has no {kind}, so only that its values are kept was checked");
                assert_eq!(mapping[field]["enabled"], json!(false), "{what}");
                searchable = false;
            } else {
                assert_eq!(is, kind, "{what}");
                assert_eq!(mapping[field]["fields"]["keyword"]["type"] == "keyword", kind == "text", "{what}");
            }
        }
    }
    if !searchable {
        let exists = engine.search_ids(table, json!({"exists": {"field": field}}));
        assert!(exists.is_empty() || becomes == "`binary`", "{what} is found: {exists:?}");
    } else if case.query == NEAREST {
        let search = match engine.product() {
            Product::Elasticsearch => {
                json!({"knn": {"field": field, "query_vector": wanted, "k": 4, "num_candidates": 10}})
            }
            Product::OpenSearch => json!({"query": {"knn": {field: {"vector": wanted, "k": 4}}}}),
        };
        let answer = engine.post(&format!("/{table}/_search"), search);
        let hits = answer["hits"]["hits"].as_array().expect("hits").clone();
        let mut ids: Vec<&str> = hits.iter().filter_map(|hit| hit["_id"].as_str()).collect();
        // Engines round the numbers, and with so few vectors roughly: the second one's place is not certain.
        assert_ne!(ids[0], "4", "{what}: {ids:?}");
        ids.sort_unstable();
        assert_eq!(ids, ["1", "2", "3", "4"], "{what}");
    } else {
        let query = case.query(field, &wanted);
        assert_eq!(engine.search_ids(table, query.clone()), ["1", "2", "3"], "{what}: {query}");
    }
}

#[test]
fn every_row_of_the_table_of_column_types_has_a_case() {
    let rows = documented();
    assert!(rows.len() > 50, "{} types are documented", rows.len());
    let all = || CASES.iter().chain(POSTGIS).chain(PGVECTOR);
    let missing: Vec<&String> =
        rows.iter().map(|(name, ..)| name).filter(|name| !all().any(|case| case.name == **name)).collect();
    assert!(missing.is_empty(), "documented and not tested: {missing:?}");
}

#[test]
fn every_type_becomes_what_the_documentation_says_on_elasticsearch() {
    written_and_read_back(&Server::builder().start(), &Engine::elasticsearch(), SETUP, CASES, true);
}

#[test]
fn every_type_becomes_what_the_documentation_says_on_opensearch() {
    written_and_read_back(&Server::builder().start(), &Engine::opensearch(), SETUP, CASES, true);
}

#[test]
#[cfg_attr(not(postgis), ignore = "PostGIS is not installed")]
fn postgis_becomes_what_the_documentation_says() {
    let server = Server::builder().start();
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        written_and_read_back(&server, &engine, "create extension postgis", POSTGIS, true);
    }
}

/// Where pgvector is not installed, types that are written as its are stand in for it: a text, and the number of
/// dimensions as the type modifier.
const STAND_IN: &str = "
    create type NAME;
    create function NAME_in(cstring) returns NAME language internal immutable strict as 'textin';
    create function NAME_out(NAME) returns cstring language internal immutable strict as 'textout';
    create function NAME_modifier(cstring[]) returns int language internal immutable strict as 'bittypmodin';
    create type NAME (input = NAME_in, output = NAME_out, typmod_in = NAME_modifier, like = text)";

#[test]
fn pgvector_becomes_what_the_documentation_says() {
    let server = Server::builder().start();
    let installed: bool = server
        .create_empty_database("look")
        .query_one("select exists (select from pg_available_extensions where name = 'vector')", &[])
        .expect("extensions")
        .get(0);
    let mut setup = if installed {
        "create extension vector".to_owned()
    } else {
        eprintln!("pgvector is not installed: types that are written alike stand in for it");
        ["vector", "halfvec"].map(|name| STAND_IN.replace("NAME", name)).join(";")
    };
    setup.push_str("; create domain embedding as vector(3)");
    let setup = setup.as_str();
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        written_and_read_back(&server, &engine, setup, PGVECTOR, false);
    }
    if knows(&Engine::opensearch(), "knn_vector") {
        return;
    }
    let warned = server.log().contains("cannot search columns that would be knn_vector: the engine has no such type");
    assert!(warned, "the log says what the engine lacks");
}
