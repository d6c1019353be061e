//! Operators by their full names. Our statements run with a search path of pg_catalog alone: there a bare `=` would compare
//! values of an extension's type (citext) as what they resemble, or find nothing.

use std::ffi::CString;

use pgrx::{PgList, pg_sys};

use super::view::graph::Comparison;
use crate::document::shape::type_name;
use crate::postgres::relation;
use crate::postgres::spi::{self, quoted};

/// An operator that compares.
#[derive(Debug, Clone, PartialEq)]
pub struct Operator {
    oid: pg_sys::Oid,
    schema: String,
    name: String,
}

impl Operator {
    /// SPI must be connected.
    pub fn of(oid: u32) -> Self {
        let oid = pg_sys::Oid::from(oid);
        let rows = spi::run(
            "select n.nspname::text, o.oprname::text
             from pg_catalog.pg_operator o join pg_catalog.pg_namespace n on n.oid = o.oprnamespace
             where o.oid = $1",
            &[spi::parameter(oid)],
        );
        let part = |column| rows.first::<String>(column);
        Self { oid, schema: part(1).unwrap_or("pg_catalog".to_owned()), name: part(2).unwrap_or("=".to_owned()) }
    }

    /// The equality of a type's own order, by which a primary key is unique. SPI must be connected.
    pub fn equal(kind: pg_sys::Oid) -> Self {
        Self::of_order(kind, pg_sys::BTEqualStrategyNumber)
    }

    fn of_order(kind: pg_sys::Oid, strategy: u32) -> Self {
        // SAFETY: cache lookups in a live transaction; an entry is never freed.
        let found = unsafe {
            let entry = &*pg_sys::lookup_type_cache(kind, pg_sys::TYPECACHE_BTREE_OPFAMILY as i32);
            let (family, of) = (entry.btree_opf, entry.btree_opintype);
            pg_sys::get_opfamily_member(family, of, of, strategy as i16)
        };
        Self::of(found.to_u32())
    }

    /// As SQL writes it.
    pub fn qualified(&self) -> String {
        format!("operator({}.{})", quoted(&self.schema), self.name)
    }

    /// What the sides are cast to. A view may compare columns as what they are not (`name::citext`); that cast costs
    /// nothing and is not seen in its conditions. None where the columns by themselves are compared like that.
    fn casts(&self, left: pg_sys::Oid, right: pg_sys::Oid) -> Option<[pg_sys::Oid; 2]> {
        let text = |text: &str| CString::new(text).unwrap_or_default();
        let (schema, name) = (text(&self.schema), text(&self.name));
        // SAFETY: syscache lookups in a live transaction; the names are copied, and the lists palloc'd.
        unsafe {
            let mut names = PgList::<pg_sys::Node>::new();
            for part in [&schema, &name] {
                names.push(pg_sys::makeString(pg_sys::pstrdup(part.as_ptr())).cast());
            }
            let found = pg_sys::compatible_oper_opid(names.into_pg(), left, right, true);
            let families = |operator| relation::oids(pg_sys::get_mergejoin_opfamilies(operator));
            let wanted = families(self.oid);
            if found == self.oid || families(found).iter().any(|family| wanted.contains(family)) {
                return None;
            }
            let mut types = [pg_sys::InvalidOid; 2];
            let [first, second] = &mut types;
            pg_sys::op_input_types(self.oid, first, second);
            // One for all types compares what it gets.
            let any = types.iter().any(|kind| pg_sys::get_typtype(*kind) as u8 == pg_sys::TYPTYPE_PSEUDO);
            (!any).then_some(types)
        }
    }

    /// Two values, each with its type; `collate` is empty or the clause that names the collation.
    pub fn compare(
        &self,
        (left, left_type): (String, pg_sys::Oid),
        (right, right_type): (String, pg_sys::Oid),
        collate: &str,
    ) -> String {
        let operator = self.qualified();
        match self.casts(left_type, right_type) {
            None => format!("{left}{collate} {operator} {right}"),
            Some([a, b]) => format!("{left}::{}{collate} {operator} {right}::{}", type_name(a), type_name(b)),
        }
    }

    /// How it compares values of a collation, if it is an equality that a btree knows.
    pub fn comparison(&self, collation: pg_sys::Oid) -> Option<Comparison> {
        equality(self.oid, collation)
    }

    /// An element of an array, so that an index on the array can be used.
    pub fn is_element(&self, value: &str, kind: pg_sys::Oid, array: &str, array_type: pg_sys::Oid) -> String {
        match self.casts(kind, element_of(array_type)) {
            None => format!("{array} operator(pg_catalog.@>) array[{value}]::{}", type_name(array_type)),
            Some(_) => self.is_any_of(value, kind, array, array_type),
        }
    }

    /// An element of an array, so that an index on the element can be used.
    pub fn is_any_of(&self, value: &str, kind: pg_sys::Oid, array: &str, array_type: pg_sys::Oid) -> String {
        let operator = self.qualified();
        match self.casts(kind, element_of(array_type)) {
            None => format!("{value} {operator} any ({array})"),
            Some([a, b]) => format!("{value}::{} {operator} any ({array}::{}[])", type_name(a), type_name(b)),
        }
    }

    /// A column, and what a query returns whose types we do not know. Postgres finds a cast among its own types; for
    /// another one it is asked for.
    pub fn meets(&self, column: &str, its: &relation::Column, value: &str) -> String {
        let cast = match self.schema.as_str() {
            "pg_catalog" => String::new(),
            _ => format!("::{}", type_name(its.type_oid)),
        };
        format!("{column} {} w.{value}{cast}", self.qualified())
    }
}

/// A condition that holds for keys behind another one: those that an index on the columns has after it.
///
/// `columns` and `values` are SQL, `types` those of the columns. SPI must be connected.
pub fn behind(columns: &[String], values: &[String], types: &[pg_sys::Oid]) -> String {
    let operators =
        |strategy| -> Vec<Operator> { types.iter().map(|kind| Operator::of_order(*kind, strategy)).collect() };
    let greater = operators(pg_sys::BTGreaterStrategyNumber);
    let qualified: Vec<String> = greater.iter().map(Operator::qualified).collect();
    if qualified.windows(2).all(|pair| pair[0] == pair[1]) {
        return format!("({}) {} ({})", columns.join(", "), qualified[0], values.join(", "));
    }
    // Rows are compared by operators of one name. Column by column then; the first condition is for the index.
    let compare =
        |place: usize, operator: &Operator| format!("{} {} {}", columns[place], operator.qualified(), values[place]);
    let equal = operators(pg_sys::BTEqualStrategyNumber);
    let last = columns.len() - 1;
    let mut condition = compare(last, &greater[last]);
    for place in (0..last).rev() {
        condition =
            format!("({} or {} and {condition})", compare(place, &greater[place]), compare(place, &equal[place]));
    }
    let first = operators(pg_sys::BTGreaterEqualStrategyNumber);
    format!("{} and {condition}", compare(0, &first[0]))
}

/// How two values compare by an operator, if it is an equality that a btree knows.
pub fn equality(operator: pg_sys::Oid, collation: pg_sys::Oid) -> Option<Comparison> {
    // SAFETY: a syscache lookup in a live transaction; the list is palloc'd.
    let families = unsafe { relation::oids(pg_sys::get_mergejoin_opfamilies(operator)) };
    let family = families.into_iter().map(pg_sys::Oid::to_u32).min()?;
    Some(Comparison::Equal { operator: operator.to_u32(), family, collation: collation.to_u32() })
}

/// The number of the function by which an operator family tells whether what it takes for equal is identical; Postgres'
/// BTEQUALIMAGE_PROC.
const EQUAL_IMAGE: i16 = 4;

/// How rows compare that a clause takes for equal: it leaves the value of one of them, and another's may be equal to that
/// by this operator only (citext).
pub fn gathering(operator: pg_sys::Oid, collation: pg_sys::Oid) -> Option<Comparison> {
    let how = equality(operator, collation)?;
    let Comparison::Equal { family, .. } = how else { return Some(how) };
    let mut types = [pg_sys::InvalidOid; 2];
    let [left, right] = &mut types;
    // SAFETY: syscache lookups in a live transaction; a family's function of that number takes a type, and says a boolean.
    let identical = unsafe {
        pg_sys::op_input_types(operator, left, right);
        let function = pg_sys::get_opfamily_proc(pg_sys::Oid::from(family), types[0], types[1], EQUAL_IMAGE);
        function != pg_sys::InvalidOid
            && pg_sys::OidFunctionCall1Coll(function, collation, pg_sys::Datum::from(types[0])).value() != 0
    };
    Some(if identical { Comparison::Same } else { how })
}

/// The type of an array's elements.
fn element_of(array: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: syscache lookups in a live transaction.
    unsafe { pg_sys::get_element_type(pg_sys::getBaseType(array)) }
}
