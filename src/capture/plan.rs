//! What to note for a relation: which sources it feeds, where their key columns are, which columns matter.
//!
//! Kept per backend and made anew when the relation or the catalog of attachments changes.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use pgrx::pg_sys;
use rustc_hash::FxHashMap;

use crate::attachment::captures::{self, Part, Used};
use crate::attachment::catalog;
use crate::attachment::key;
use crate::postgres::relation;

/// What to note for one relation. Without sources the trigger is a silent no-op (restored from a dump, or detached).
#[derive(Debug, Default)]
pub struct Plan {
    pub sources: Vec<Source>,
    /// Where documents of its rows lie, for each index that is routed.
    pub moves: Vec<Moves>,
    /// Highest attribute number needed from a tuple to compare it with another one.
    pub attributes: i32,
    /// Highest attribute number of a key column: all that is needed from a row that came or went.
    pub key_attributes: i32,
}

/// One source that the relation's rows feed: an attached table that it is or is a partition of, or that shows its rows.
#[derive(Debug)]
pub struct Source {
    /// As the queue has it: the attached table, or the number of a link.
    pub oid: u32,
    pub part: Part,
    /// The columns that are noted: place in the tuple (from 0) and the way to their text. None where one of them was
    /// dropped or renamed: then only that the table changed is noted.
    pub key: Vec<(usize, key::Column)>,
    /// Columns whose change matters; None where every UPDATE does.
    pub used: Option<Vec<Attribute>>,
}

/// What is noted when a row's document leaves the place where it lies: its key and the former routing.
#[derive(Debug)]
pub struct Moves {
    /// As the queue has it.
    pub oid: u32,
    pub key: Vec<(usize, key::Column)>,
    /// None where a column was dropped or renamed: then what leaves cannot be noted one by one.
    pub routing: Option<(usize, key::Column)>,
    /// Key and routing.
    pub used: Vec<Attribute>,
}

/// How to compare two values of a column by their image.
#[derive(Debug, Clone, Copy)]
pub struct Attribute {
    pub place: usize,
    pub by_value: bool,
    pub length: i16,
}

thread_local! {
    static PLANS: RefCell<FxHashMap<u32, Rc<Plan>>> = RefCell::default();
    static LAST: RefCell<Option<(u32, Rc<Plan>)>> = const { RefCell::new(None) };
    static STALE: Cell<bool> = const { Cell::new(false) };
    static LISTENING: Cell<bool> = const { Cell::new(false) };
}

/// The plan for a relation that a trigger fired on.
///
/// # Safety
/// `relation` is open and locked.
pub unsafe fn of(relation: pg_sys::Relation) -> Rc<Plan> {
    if STALE.replace(false) {
        PLANS.with_borrow_mut(|plans| plans.clear());
        LAST.set(None);
    }
    // SAFETY: the caller's.
    let oid = unsafe { (*relation).rd_id }.to_u32();
    let last = LAST.with_borrow(|last| last.as_ref().filter(|(known, _)| *known == oid).map(|(_, plan)| plan.clone()));
    if let Some(plan) = last {
        return plan;
    }
    let known = PLANS.with_borrow(|plans| plans.get(&oid).cloned());
    let plan = known.unwrap_or_else(|| {
        listen();
        // SAFETY: the caller's.
        let plan = Rc::new(unsafe { make(relation) });
        PLANS.with_borrow_mut(|plans| plans.insert(oid, plan.clone()));
        plan
    });
    LAST.set(Some((oid, plan.clone())));
    plan
}

/// # Safety
/// `relation` is open and locked.
unsafe fn make(relation: pg_sys::Relation) -> Plan {
    // SAFETY: the relation's descriptor lives as long as it is open.
    unsafe {
        let mut candidates = vec![(*relation).rd_id];
        if (*(*relation).rd_rel).relispartition {
            candidates.extend(relation::partition_ancestors((*relation).rd_id));
        }
        let mut plan = Plan::default();
        let noted = captures::of(&candidates);
        let is_empty = noted.captures.is_empty();
        let columns = if is_empty { Vec::new() } else { columns_of((*relation).rd_att) };
        let place = |name: &str| columns.iter().find(|column| column.name == name);
        let maker = |column: &Named| (column.attribute.place, key::Column::new(column.kind));
        for moves in noted.moves {
            let columns: Option<Vec<_>> =
                moves.key_columns.iter().chain([&moves.routing]).map(|name| place(name)).collect();
            let columns = columns.unwrap_or_default();
            let mut key: Vec<_> = columns.iter().map(|column| maker(column)).collect();
            let routing = key.pop();
            let used = columns.iter().map(|column| column.attribute).collect();
            plan.moves.push(Moves { oid: moves.source, key, routing, used });
        }
        for capture in noted.captures {
            let key = capture.columns.iter().map(|name| place(name)).collect::<Option<Vec<_>>>().unwrap_or_default();
            // Which column a used one has become is for the worker to find out.
            let every = key.is_empty()
                || match &capture.used {
                    Used::Every => true,
                    Used::Shown { .. } => false,
                    Used::Only(used) => used.iter().any(|name| place(name).is_none()),
                };
            let matters = |column: &Named| match &capture.used {
                Used::Every => true,
                Used::Shown { exclude, options } => catalog::is_synced(&column.name, column.kind, exclude, options),
                Used::Only(used) => used.contains(&column.name),
            };
            let used: Vec<&Named> =
                columns.iter().filter(|column| capture.columns.contains(&column.name) || matters(column)).collect();
            // What a virtual generated column is made of cannot be seen here: neither row has its value.
            let known = !every && !used.iter().any(|column| column.is_virtual);
            let used = known.then(|| used.iter().map(|column| column.attribute).collect::<Vec<_>>());
            let key: Vec<_> = key.iter().map(|column| maker(column)).collect();
            let places =
                |source: &Source| source.key.iter().map(|(place, _)| *place).eq(key.iter().map(|(place, _)| *place));
            let same =
                |source: &&mut Source| source.oid == capture.source && source.part == capture.part && places(source);
            match plan.sources.iter_mut().find(same) {
                // A second index on the same table: what either uses matters.
                Some(source) => match (&mut source.used, used) {
                    (Some(mine), Some(its)) => {
                        for attribute in its {
                            if !mine.iter().any(|known| known.place == attribute.place) {
                                mine.push(attribute);
                            }
                        }
                    }
                    (mine, _) => *mine = None,
                },
                None => plan.sources.push(Source { oid: capture.source, part: capture.part, key, used }),
            }
        }
        let moved = || plan.moves.iter().flat_map(|moves| &moves.used).map(|used| used.place);
        let key_places = || plan.sources.iter().flat_map(|source| &source.key).map(|(place, _)| *place).chain(moved());
        let used_places = plan.sources.iter().flat_map(|source| source.used.iter().flatten()).map(|used| used.place);
        plan.attributes = key_places().chain(used_places).max().map_or(0, |place| place as i32 + 1);
        plan.key_attributes = key_places().max().map_or(0, |place| place as i32 + 1);
        plan
    }
}

struct Named {
    name: String,
    kind: pg_sys::Oid,
    /// Generated when it is read (PostgreSQL 18): no tuple has a value of it.
    is_virtual: bool,
    attribute: Attribute,
}

/// # Safety
/// `descriptor` is valid.
unsafe fn columns_of(descriptor: pg_sys::TupleDesc) -> Vec<Named> {
    // SAFETY: the descriptor has `natts` attributes.
    unsafe {
        let attributes = (*descriptor).attrs.as_slice((*descriptor).natts as usize);
        attributes
            .iter()
            .enumerate()
            .filter(|(_, attribute)| !attribute.attisdropped)
            .map(|(place, attribute)| Named {
                name: std::ffi::CStr::from_ptr(attribute.attname.data.as_ptr()).to_string_lossy().into_owned(),
                kind: attribute.atttypid,
                is_virtual: attribute.attgenerated as u8 == relation::VIRTUAL,
                attribute: Attribute { place, by_value: attribute.attbyval, length: attribute.attlen },
            })
            .collect()
    }
}

fn listen() {
    if !LISTENING.replace(true) {
        // SAFETY: registered once per backend; the callback lasts as long as the library is loaded, which is for ever.
        unsafe { pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), pg_sys::Datum::from(0usize)) };
    }
}

/// Only raises a flag: it may run at any place that accepts invalidations, in the middle of our own work too.
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn relation_changed(_argument: pg_sys::Datum, relation: pg_sys::Oid) {
    let concerns_us = relation == pg_sys::InvalidOid
        || PLANS.with(|plans| plans.try_borrow().map_or(true, |plans| plans.contains_key(&relation.to_u32())))
        || captures::is_attachment_table(relation);
    if concerns_us {
        STALE.set(true);
    }
}
