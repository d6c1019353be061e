//! What documents depend on besides rows: columns and their types, the text of views, the bodies of functions, the labels
//! of enums. Nobody tells us when DDL changes one of them, so the worker keeps what it last saw, and compares.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::mem::ManuallyDrop;

use pgrx::{JsonB, pg_sys};
use serde::{Deserialize, Serialize};

use super::captures;
use super::catalog::{self, Attachment};
use super::follow;
use super::key;
use super::state;
use super::triggers;
use super::view::tree::{Tree, Used};
use crate::capture;
use crate::jobs::{ask, record};
use crate::postgres::relation;
use crate::postgres::spi::{self, Plan};
use crate::postgres::transaction::{self, Scope};

/// What was seen of an attachment's definitions, by kind and number.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Facts(BTreeMap<String, Fact>);

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Fact {
    name: String,
    /// Differs where documents do. Empty for a column that documents do not have.
    value: String,
    /// Of a column: rows have values in it that no trigger has told of.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    filled: bool,
}

/// What makes all documents different, and whether the ways to them and their order are.
#[derive(Debug, Default, PartialEq)]
pub struct Difference {
    /// Why the index is to be built anew; empty where it is not.
    pub causes: Vec<String>,
    pub ways: bool,
    /// Tables have other names, which links have in their queries.
    pub names: bool,
    /// The table's rows are in another order now, by their key.
    pub order: bool,
}

/// Postgres' numbers and notations hold within a major version; after an upgrade everything is compared anyway.
const VERSION: &str = "version";

/// Where the rows of documents of a table's own lie.
const FILES: &str = "files";

impl Facts {
    /// What has changed since these were seen.
    pub fn compare(&self, new: &Facts) -> Difference {
        let mut difference = Difference::default();
        if self.0.get(VERSION) != new.0.get(VERSION) {
            return difference;
        }
        let mut cause = |text: String| {
            if difference.causes.len() < 3 {
                difference.causes.push(text);
            }
        };
        // A file that is written anew has the values of columns that were added before: nothing else tells of them.
        let written_anew = self.0.get(FILES).zip(new.0.get(FILES)).is_some_and(|(old, new)| old.value != new.value);
        for (id, old) in &self.0 {
            let kind = id.split(' ').next().unwrap_or_default();
            let is = new.0.get(id);
            let same = is.is_some_and(|is| is.value == old.value);
            difference.names |= kind == "table" && is.is_some_and(|is| is.name != old.name);
            match (kind, is) {
                ("column", None) if !old.value.is_empty() => cause(format!("column \"{}\" was dropped", old.name)),
                ("column", Some(is)) if is.name != old.name && !(old.value.is_empty() && is.value.is_empty()) => {
                    cause(format!("column \"{}\" was renamed to \"{}\"", old.name, is.name));
                }
                ("column", Some(is)) if !same => cause(format!("column \"{}\" was altered", is.name)),
                ("view", _) if !same => cause(format!("view {} was replaced", old.name)),
                ("function", _) if !same => cause(format!("function {} was replaced", old.name)),
                ("label" | "type", _) if !same => cause(format!("type {} was altered", old.name)),
                ("child", None) => cause(format!("table {} inherits from it no more", old.name)),
                ("table" | "branch" | "schema", _) if !same => difference.ways = true,
                // Only of a key's column it is known.
                ("own", Some(is)) if !same && !old.value.is_empty() && !is.value.is_empty() => difference.order = true,
                _ => {}
            }
        }
        for (id, is) in new.0.iter().filter(|(id, _)| !self.0.contains_key(*id)) {
            if id.starts_with("column ") && (is.filled || written_anew) && !is.value.is_empty() {
                cause(format!("column \"{}\" was added with values", is.name));
            }
            difference.ways |= ["table ", "branch ", "view "].iter().any(|kind| id.starts_with(kind));
        }
        difference.ways |= difference.causes.iter().any(|cause| cause.starts_with("view "));
        difference
    }

    /// Kind and number of what these are about.
    pub fn objects(&self) -> impl Iterator<Item = (&str, u32)> {
        self.0.keys().filter_map(|id| {
            let (kind, number) = id.split_once(' ')?;
            Some((kind, number.parse().ok()?))
        })
    }
}

/// The facts of an attachment. $1: its table; $2: its view; $3: functions that its filter calls; $4: tables that its
/// ways and its filter read; $5: row types of those that its filter reads as whole rows; $6: its key columns; $7: views
/// that its filter reads.
const FACTS: &str = r"
    with recursive views (oid) as (
        select $2 where $2 is not null
        union
        select pg_catalog.unnest($7)
        union
        select c.oid
        from views v
        join pg_catalog.pg_rewrite r on r.ev_class = v.oid
        join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_rewrite'::regclass and d.objid = r.oid
        join pg_catalog.pg_class c on c.oid = d.refobjid and c.relkind = 'v'
        where d.refclassid = 'pg_catalog.pg_class'::regclass
    ), rules as (
        select r.oid, r.ev_class, r.ev_action
        from views v join pg_catalog.pg_rewrite r on r.ev_class = v.oid and r.rulename = '_RETURN'
    ), uses as (
        select distinct d.refclassid, d.refobjid
        from rules r
        join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_rewrite'::regclass and d.objid = r.oid
    ), tables (oid) as (
        select $1
        union
        select pg_catalog.unnest($4)
        union
        select c.oid
        from uses u join pg_catalog.pg_class c on c.oid = u.refobjid and c.relkind not in ('v', 'c')
        where u.refclassid = 'pg_catalog.pg_class'::regclass
    ), called (oid) as (
        select pg_catalog.unnest($3)
        union
        select u.refobjid from uses u where u.refclassid = 'pg_catalog.pg_proc'::regclass
        union
        select o.oprcode::oid
        from uses u join pg_catalog.pg_operator o on o.oid = u.refobjid
        where u.refclassid = 'pg_catalog.pg_operator'::regclass
    ), functions (oid) as (
        select oid from called
        union
        select part.oid
        from called c
        join pg_catalog.pg_aggregate g on g.aggfnoid = c.oid
        cross join lateral (values
            (g.aggtransfn::oid), (g.aggfinalfn::oid), (g.aggmtransfn::oid), (g.aggminvtransfn::oid),
            (g.aggmfinalfn::oid)) part (oid)
    ), types (oid) as (
        select a.atttypid
        from (select oid from tables union select oid from views) r
        join pg_catalog.pg_attribute a on a.attrelid = r.oid and a.attnum > 0 and not a.attisdropped
        union
        select u.refobjid from uses u where u.refclassid = 'pg_catalog.pg_type'::regclass
        union
        select pg_catalog.unnest($5)
        union
        -- A whole row names no column, so nothing depends on any: what is added, renamed or dropped shows all the same.
        select t.oid
        from (select oid from tables union select oid from views) r
        join pg_catalog.pg_type t on t.typrelid = r.oid
        where exists (
            select from rules
            where pg_catalog.strpos(ev_action::pg_catalog.text, ':varattno 0 :vartype ' || t.oid || ' ') > 0)
        union
        select inner_type.oid
        from types k
        join pg_catalog.pg_type t on t.oid = k.oid
        cross join lateral (
            select t.typelem where t.typcategory = 'A'
            union all
            select t.typbasetype where t.typtype = 'd'
            union all
            select r.rngsubtype from pg_catalog.pg_range r where t.oid in (r.rngtypid, r.rngmultitypid)
            union all
            select a.atttypid from pg_catalog.pg_attribute a
            where t.typtype = 'c' and a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped
        ) inner_type (oid)
    ), parts (oid) as (
        -- Not by pg_partition_tree, which waits for whoever alters one of them.
        select coalesce($2, $1)
        union
        select i.inhrelid
        from parts p
        join pg_catalog.pg_inherits i on i.inhparent = p.oid
        join pg_catalog.pg_class c on c.oid = i.inhrelid and c.relispartition
    ), branches (oid) as (
        -- Partitions that are foreign tables, or may come to have such. The table itself has none, for it has a key.
        select t.oid from tables t where t.oid <> $1
        union
        select c.oid
        from branches b
        join pg_catalog.pg_inherits i on i.inhparent = b.oid
        join pg_catalog.pg_class c on c.oid = i.inhrelid and c.relispartition and c.relkind in ('p', 'f')
    ), children (oid) as (
        select i.inhrelid
        from tables t
        join pg_catalog.pg_class c on c.oid = t.oid and c.relkind = 'r'
        join pg_catalog.pg_inherits i on i.inhparent = t.oid
        union
        select i.inhrelid from children k join pg_catalog.pg_inherits i on i.inhparent = k.oid
    )
    select 'column ' || a.attnum, a.attname::text,
           pg_catalog.concat(
               -- The same to a document, and to the engine.
               pg_catalog.replace(pg_catalog.format_type(a.atttypid, null), 'character varying', 'text'),
               case when a.attgenerated <> '' then
                   (select ' ' || pg_catalog.md5(pg_catalog.pg_get_expr(x.adbin, x.adrelid))
                    from pg_catalog.pg_attrdef x where x.adrelid = a.attrelid and x.adnum = a.attnum)
               end),
           a.attgenerated <> '' or exists (
               select
               from parts p
               join pg_catalog.pg_attribute x on x.attrelid = p.oid and x.attname = a.attname and x.atthasmissing),
           a.atttypid
    from pg_catalog.pg_attribute a
    where a.attrelid = coalesce($2, $1) and a.attnum > 0 and not a.attisdropped
    union all
    -- Rows are paged through in the order of their key, which a collation makes.
    select k.kind || ' ' || a.attnum, a.attname::text,
           case when k.kind = 'own' and a.attname::text = any ($6) then a.attcollation::pg_catalog.text else '' end,
           false, null
    from (values ('own', $1), ('shown', coalesce($2, $1))) k (kind, relation)
    join pg_catalog.pg_attribute a on a.attrelid = k.relation and a.attnum > 0 and not a.attisdropped
    union all
    select 'view ' || r.ev_class, pg_catalog.format('%I.%I', n.nspname, c.relname),
           -- Without the places in the text that the query was written as.
           pg_catalog.md5(pg_catalog.regexp_replace(
               r.ev_action::pg_catalog.text, ':(location|stmt_location|stmt_len) -?[0-9]+', '', 'g')),
           false, null
    from rules r
    join pg_catalog.pg_class c on c.oid = r.ev_class
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    union all
    select 'function ' || p.oid, p.oid::regprocedure::text,
           pg_catalog.md5(pg_catalog.concat_ws(
               '|', p.prosrc, p.probin, p.prosqlbody, p.proargdefaults, p.proconfig, p.proisstrict, p.prosecdef,
               (select pg_catalog.concat_ws(
                    '|', g.aggtransfn::oid, g.aggfinalfn::oid, g.aggtranstype, g.agginitval, g.aggfinalextra,
                    nullif(g.aggmtransfn::oid, 0), nullif(g.aggminvtransfn::oid, 0), nullif(g.aggmfinalfn::oid, 0))
                from pg_catalog.pg_aggregate g where g.aggfnoid = p.oid))),
           false, null
    from functions f join pg_catalog.pg_proc p on p.oid = f.oid and p.oid >= 16384
    union all
    select 'label ' || e.oid, e.enumtypid::regtype::text, e.enumlabel::text, false, null
    from types t join pg_catalog.pg_enum e on e.enumtypid = t.oid
    union all
    select 'type ' || t.typrelid, t.oid::regtype::text,
           pg_catalog.md5(
               (select pg_catalog.string_agg(pg_catalog.concat_ws('|', a.attname, a.atttypid), ',' order by a.attnum)
                from pg_catalog.pg_attribute a
                where a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped)),
           false, null
    from types k join pg_catalog.pg_type t on t.oid = k.oid
    where t.typtype = 'c' and t.typrelid >= 16384
    union all
    select 'schema ' || n.oid, n.nspname::text, n.nspname::text, false, null
    from pg_catalog.pg_namespace n
    where n.oid in (select c.relnamespace
                    from (select oid from tables union select oid from views) r
                    join pg_catalog.pg_class c on c.oid = r.oid)
    union all
    select 'child ' || c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname), '', false, null
    from children k
    join pg_catalog.pg_class c on c.oid = k.oid
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    union all
    select 'branch ' || c.oid, c.relname::text, pg_catalog.format('%I.%I', n.nspname, c.relname), false, null
    from branches b
    join pg_catalog.pg_class c on c.oid = b.oid
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where b.oid not in (select oid from tables)
    union all
    -- A new table's file has its own number.
    select 'files', '',
           pg_catalog.md5(pg_catalog.string_agg(c.relfilenode::pg_catalog.text, ',' order by c.oid)), false, null
    from parts p
    join pg_catalog.pg_class c on c.oid = p.oid and c.relkind = 'r' and c.relfilenode <> c.oid
    union all
    select 'table ' || c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname),
           pg_catalog.md5(pg_catalog.concat_ws(
               '|', n.nspname, c.relname,
               (select pg_catalog.string_agg(
                    -- By its name, as the ways are written.
                    pg_catalog.concat_ws(
                        '|', a.attnum, a.attname, pg_catalog.format_type(a.atttypid, null), a.attcollation),
                    ',' order by a.attnum)
                from pg_catalog.pg_attribute a
                where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped))),
           false, null
    from tables t
    join pg_catalog.pg_class c on c.oid = t.oid
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace";

thread_local! {
    // Planning it takes much longer than running it. Never freed: a thread's end is no place for Postgres' memory.
    static PLAN: OnceCell<ManuallyDrop<Plan>> = const { OnceCell::new() };
}

/// What the filter of an attachment calls and reads, as OIDs.
#[derive(Debug, Default)]
pub struct Called {
    functions: Vec<pg_sys::Oid>,
    tables: Vec<pg_sys::Oid>,
    views: Vec<pg_sys::Oid>,
    /// Row types of the tables that it reads as whole rows.
    rows: Vec<pg_sys::Oid>,
}

/// Reads the filter of an attachment. What is wrong with it is raised.
pub fn called(attachment: &Attachment) -> Called {
    let Some(filter) = &attachment.filter else { return Called::default() };
    let owner = relation::owner(attachment.relation);
    let tree = Tree::of_filter(owner, attachment.document.unwrap_or(attachment.relation), filter);
    let tables: Vec<pg_sys::Oid> = tree.graph.tables.iter().map(|table| pg_sys::Oid::from(table.oid)).collect();
    let whole = tree.used(0..tree.width()).into_iter().zip(&tables).filter(|(used, _)| *used == Used::Everything);
    // SAFETY: a syscache lookup in a live transaction.
    let rows = whole.map(|(_, table)| unsafe { pg_sys::get_rel_type_id(*table) }).collect();
    Called { tables, rows, functions: tree.functions, views: tree.views }
}

/// Notes the facts as they are when a table is attached, so that whatever is altered from then on is noticed.
pub fn begin(attachment: i32) {
    transaction::with_nested_settings(|| {
        // The worker's: a constant in a generated column would be written otherwise.
        pin_notation(Scope::Nested);
        if let Some(made) = catalog::of_id(attachment) {
            remember(attachment, &gather(&made, &called(&made)));
        }
    });
}

/// Sets every setting that the text of a definition can depend on.
pub fn pin_notation(scope: Scope) {
    key::pin_output_settings(scope);
    transaction::set(c"quote_all_identifiers", c"off", scope);
}

/// The facts as they are. SPI must be connected.
pub fn gather(attachment: &Attachment, called: &Called) -> Facts {
    let mut tables = called.tables.clone();
    tables.extend(follow::tables_of(&[attachment.id]));
    let values = [
        spi::value(attachment.relation),
        attachment.document.and_then(spi::value),
        spi::value(called.functions.clone()),
        spi::value(tables),
        spi::value(called.rows.clone()),
        spi::value(attachment.key_columns.clone()),
        spi::value(called.views.clone()),
    ];
    let types = [
        pg_sys::OIDOID,
        pg_sys::OIDOID,
        pg_sys::OIDARRAYOID,
        pg_sys::OIDARRAYOID,
        pg_sys::OIDARRAYOID,
        pg_sys::TEXTARRAYOID,
        pg_sys::OIDARRAYOID,
    ];
    let rows =
        PLAN.with(|plan| plan.get_or_init(|| ManuallyDrop::new(Plan::prepare(FACTS, &types))).execute(&values, 0));
    let mut facts = BTreeMap::new();
    for row in 0..rows.len() {
        let (Some(id), Some(name)) = (rows.get::<String>(row, 1), rows.get::<String>(row, 2)) else { continue };
        let mut value: String = rows.get(row, 3).unwrap_or_default();
        if let Some(kind) = rows.get::<pg_sys::Oid>(row, 5)
            && !attachment.key_columns.contains(&name)
            && !catalog::is_synced(&name, kind, &attachment.exclude, &attachment.options)
        {
            value.clear();
        }
        facts.insert(id, Fact { name, value, filled: rows.get(row, 4) == Some(true) });
    }
    let version = format!("{}", pg_sys::PG_VERSION_NUM / 10_000);
    facts.insert(VERSION.to_owned(), Fact { name: String::new(), value: version, filled: false });
    Facts(facts)
}

/// What was last seen of an attachment; None if nothing was. SPI must be connected.
pub fn seen(attachment: i32) -> Option<Facts> {
    let rows = spi::run(
        "select d.facts::text from es_sync.definition d where d.attachment = $1",
        &[spi::parameter(attachment)],
    );
    serde_json::from_str(&rows.first::<String>(1)?).ok()
}

/// Notes what was seen.
pub fn remember(attachment: i32, facts: &Facts) {
    spi::run(
        "insert into es_sync.definition (attachment, facts)
         select a.id, $2::pg_catalog.jsonb from es_sync.attachment a where a.id = $1
         on conflict (attachment) do update set facts = excluded.facts",
        &[spi::parameter(attachment), spi::parameter(serde_json::to_string(facts).ok())],
    );
}

/// Columns that are known under a number and have another name now: key columns ("own", for they are the table's) and
/// excluded ones ("shown", the document's) must not be lost sight of, nor those that options name. $1: the attachment.
const RENAMED: &str = "
    from es_sync.attachment a
    join es_sync.definition d on d.attachment = a.id
    cross join lateral pg_catalog.jsonb_each(d.facts) f (id, fact)
    join pg_catalog.pg_attribute c
      on c.attrelid = case pg_catalog.split_part(f.id, ' ', 1)
                      when 'own' then a.relation when 'shown' then coalesce(a.document, a.relation) end
     and c.attnum = nullif(pg_catalog.split_part(f.id, ' ', 2), '')::int8
     and not c.attisdropped and c.attname <> f.fact ->> 'name'
    where a.id = $1 and d.facts -> 'version' ->> 'value' = $2";

fn version() -> spi::Parameter {
    spi::parameter(format!("{}", pg_sys::PG_VERSION_NUM / 10_000))
}

/// True if the attachment's columns have the names that it knows. The locks last until the end of the transaction, so it
/// stays true as long. SPI must be connected.
pub fn names_hold(attachment: &Attachment) -> bool {
    for relation in [Some(attachment.relation), attachment.document].into_iter().flatten() {
        // SAFETY: a lock of a relation, or of an OID that is none any more; released with the transaction.
        unsafe { pg_sys::LockRelationOid(relation, pg_sys::AccessShareLock as i32) };
    }
    spi::run(
        &format!("select {RENAMED} and f.fact ->> 'name' = any (a.key_columns || a.exclude || a.routing)"),
        &[spi::parameter(attachment.id), version()],
    )
    .is_empty()
}

/// A column that has another name than was seen of it.
struct Renamed {
    /// As facts have it.
    id: String,
    old: String,
    new: String,
}

fn renamed(attachment: &Attachment) -> Vec<Renamed> {
    let rows = spi::run(
        &format!("select f.id, f.fact ->> 'name', c.attname::text {RENAMED}"),
        &[spi::parameter(attachment.id), version()],
    );
    let of = |row| Some(Renamed { id: rows.get(row, 1)?, old: rows.get(row, 2)?, new: rows.get(row, 3)? });
    (0..rows.len()).filter_map(of).collect()
}

/// The attachment with the names that its key columns, excluded columns and those that options name have now; None where
/// they are the same.
fn with_new_names(attachment: &Attachment, renamed: &[Renamed]) -> Option<Attachment> {
    let now = |kind: &str, name: &str| {
        renamed.iter().find(|column| column.id.starts_with(kind) && column.old == name).map(|column| column.new.clone())
    };
    let (own, shown) = (|name: &str| now("own ", name), |name: &str| now("shown ", name));
    let key_columns = attachment.key_columns.iter().map(|name| own(name).unwrap_or_else(|| name.clone())).collect();
    let exclude = attachment.exclude.iter().map(|name| shown(name).unwrap_or_else(|| name.clone())).collect();
    let options = attachment.options.renamed(own, shown);
    let is_same =
        key_columns == attachment.key_columns && exclude == attachment.exclude && options == attachment.options;
    (!is_same).then(|| Attachment { key_columns, exclude, options, ..attachment.clone() })
}

/// True if capture may have taken one of its columns for another, or for none of a document: a name that one had is
/// another one's now, or says no more which mapping is meant.
fn is_misled(before: &Attachment, now: &Attachment, renamed: &[Renamed]) -> bool {
    let own = renamed.iter().filter(|column| column.id.starts_with("own "));
    let has_passed = || follow::has_any_column(before.relation, own.map(|column| column.old.clone()).collect());
    before.options.mappings != now.options.mappings || has_passed()
}

/// Lets key columns, excluded columns and those that options name keep up with their names; true if any had another one.
/// Where that has misled capture, the index is stale until all who were misled have ended.
pub fn rename(attachment: &Attachment) -> bool {
    let renamed = renamed(attachment);
    let Some(mut facts) = seen(attachment.id).filter(|_| !renamed.is_empty()) else { return false };
    for column in &renamed {
        if let Some(fact) = facts.0.get_mut(&column.id) {
            fact.name.clone_from(&column.new);
        }
    }
    remember(attachment.id, &facts);
    let Some(named) = with_new_names(attachment, &renamed) else { return false };
    if is_misled(attachment, &named, &renamed) {
        record::restart(Some(attachment.id));
        state::mark_not_taken_in(attachment.id, follow::MISLED);
    }
    spi::run(
        "update es_sync.attachment a set key_columns = $2, exclude = $3, options = a.options || $4 where a.id = $1",
        &[
            spi::parameter(attachment.id),
            spi::parameter(named.key_columns),
            spi::parameter(named.exclude),
            spi::parameter(JsonB(serde_json::to_value(&named.options).unwrap_or_default())),
        ],
    );
    captures::invalidate();
    capture::announce_catalog_change();
    true
}

/// The names that an attachment's key columns have now, of which the worker may not have heard yet. Nothing is written,
/// so nobody waits for who asks. SPI must be connected.
pub fn key_columns(attachment: &Attachment) -> Vec<String> {
    let rows = spi::run(
        &format!("select f.fact ->> 'name', c.attname::text {RENAMED} and pg_catalog.starts_with(f.id, 'own ')"),
        &[spi::parameter(attachment.id), version()],
    );
    let renamed = |name: &String| (0..rows.len()).find(|row| rows.get::<String>(*row, 1).as_ref() == Some(name));
    let now = |name: &String| renamed(name).and_then(|row| rows.get(row, 2)).unwrap_or_else(|| name.clone());
    attachment.key_columns.iter().map(now).collect()
}

/// The attachment, once it has kept up with the names of its columns.
pub fn with_names(attachment: Attachment) -> Attachment {
    if rename(&attachment) { catalog::of_id(attachment.id).unwrap_or(attachment) } else { attachment }
}

/// What keeps documents from being right until somebody acts: a sentence; None where nothing does. SPI must be connected.
pub fn obstacle(attachment: &Attachment) -> Option<String> {
    let rows = spi::run(
        "select pg_catalog.format('%I.%I', n.nspname, c.relname), c.relforcerowsecurity,
                case when v.oid is not null then pg_catalog.format('%I.%I', vn.nspname, v.relname) end, v.relowner is distinct from c.relowner,
                (select pg_catalog.min(k) from pg_catalog.unnest($3) k
                 where not exists (select from pg_catalog.pg_attribute a
                                   where a.attrelid = c.oid and a.attname = k and not a.attisdropped)),
                (select pg_catalog.min(k) from pg_catalog.unnest($3) k
                 where v.oid is not null
                   and not exists (select from pg_catalog.pg_attribute a
                                   where a.attrelid = v.oid and a.attname = k and not a.attisdropped)),
                $4 is null or exists (select from pg_catalog.pg_attribute a
                                      where a.attrelid = c.oid and a.attname = $4 and not a.attisdropped)
         from pg_catalog.pg_class c
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         left join (pg_catalog.pg_class v join pg_catalog.pg_namespace vn on vn.oid = v.relnamespace) on v.oid = $2
         where c.oid = $1",
        &[
            spi::parameter(attachment.relation),
            spi::parameter(attachment.document),
            spi::parameter(attachment.key_columns.clone()),
            spi::parameter(attachment.options.routing.as_deref()),
        ],
    );
    if rows.is_empty() {
        return None;
    }
    let table: String = rows.get(0, 1)?;
    let view: String = rows.get(0, 3).unwrap_or_default();
    if let Some(key) = rows.get::<String>(0, 5) {
        return Some(format!("table {table} has lost its key column \"{key}\": detach it and attach it anew"));
    }
    if !relation::identify(attachment.relation, attachment.key_columns.clone()) {
        return Some(format!(
            "nothing keeps ({}) of table {table} unique and not null any more, by which its documents are identified: \
             add a primary key, or detach the table and attach it anew",
            attachment.key_columns.join(", ")
        ));
    }
    if let (Some(routing), Some(false)) = (&attachment.options.routing, rows.get::<bool>(0, 7)) {
        return Some(format!(
            "table {table} has lost column \"{routing}\", by which its documents are routed: add a column of that name, \
             or detach the table and attach it anew"
        ));
    }
    if rows.get::<bool>(0, 2) == Some(true) {
        return Some(format!(
            "table {table} has forced row-level security, which would hide rows from its index: \
             use ALTER TABLE ... NO FORCE ROW LEVEL SECURITY"
        ));
    }
    attachment.document?;
    if rows.get::<bool>(0, 4) == Some(true) {
        return Some(format!(
            "view {view} has another owner than table {table}, and nobody is lent the rights of others: \
             use ALTER VIEW ... OWNER TO"
        ));
    }
    let key = rows.get::<String>(0, 6)?;
    Some(format!("view {view} has no column \"{key}\", the key of table {table}: use ALTER VIEW ... RENAME COLUMN"))
}

/// True if something was in the way when this was last looked at.
pub fn is_obstructed(attachment: i32) -> bool {
    let rows = spi::run(
        "select from es_sync.attachment a where a.id = $1 and a.obstacle is not null",
        &[spi::parameter(attachment)],
    );
    !rows.is_empty()
}

/// Notes what is in the way, or that nothing is; true if that is news.
pub fn set_obstacle(attachment: i32, obstacle: Option<&str>) -> bool {
    let rows = spi::run(
        "update es_sync.attachment a set obstacle = $2 where a.id = $1 and a.obstacle is distinct from $2 returning a.id",
        &[spi::parameter(attachment), spi::parameter(obstacle)],
    );
    if !rows.is_empty() {
        capture::announce_catalog_change();
    }
    !rows.is_empty()
}

/// Asks for a build of an index whose documents are all different now.
pub fn rebuild(attachment: i32, why: &str) {
    record::restart(Some(attachment));
    state::mark_taken_in(attachment);
    state::mark_stale(attachment, why);
    ask::for_build(attachment, "reindex");
    capture::announce_catalog_change();
}

/// True if the attachment's view was dropped, which takes CASCADE.
pub fn view_is_gone(attachment: &Attachment) -> bool {
    attachment.document.is_some_and(|view| {
        spi::run("select from pg_catalog.pg_class c where c.oid = $1", &[spi::parameter(view)]).is_empty()
    })
}

/// Tables that are followed and have lost one of their triggers: somebody dropped it, or it went with a view.
pub fn without_trigger() -> Vec<(pg_sys::Oid, String)> {
    let rows = spi::run(
        "select c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname)
         from (select relation from es_sync.attachment union select related from es_sync.way) a
         join pg_catalog.pg_class c on c.oid = a.relation
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         where not exists (
                 select from pg_catalog.pg_trigger t where t.tgrelid = c.oid and t.tgname = 'es_sync_capture')
            -- That of a partitioned table is missed by nobody: its partitions have their own.
            or c.relkind = 'r' and not exists (
                 select from pg_catalog.pg_trigger t where t.tgrelid = c.oid and t.tgname = 'es_sync_truncate')",
        &[],
    );
    (0..rows.len()).filter_map(|row| Some((rows.get(row, 1)?, rows.get(row, 2)?))).collect()
}

/// Gives a table its triggers back, and has what was missed repaired.
///
/// # Errors
/// Raises lock_not_available while somebody writes to the table for longer than a moment.
pub fn give_trigger_back(table: pg_sys::Oid, name: &str) {
    triggers::renew(table);
    for attachment in catalog::concerned(table) {
        ask::for_repair(attachment, &format!("table {name} had lost its trigger"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(list: &[(&str, &str, &str, bool)]) -> Facts {
        let fact = |(id, name, value, filled): &(&str, &str, &str, bool)| {
            ((*id).to_owned(), Fact { name: (*name).to_owned(), value: (*value).to_owned(), filled: *filled })
        };
        Facts(list.iter().map(fact).collect())
    }

    fn causes(old: &[(&str, &str, &str, bool)], new: &[(&str, &str, &str, bool)]) -> Vec<String> {
        facts(old).compare(&facts(new)).causes
    }

    #[test]
    fn what_documents_show_makes_them_different() {
        let old =
            [("column 2", "a", "text", false), ("label 7", "mood", "sad", false), ("function 9", "f()", "1", false)];
        assert_eq!(causes(&old, &old), Vec::<String>::new());
        let named = |new: &[(&str, &str, &str, bool)]| causes(&old, new).join("; ");
        assert_eq!(named(&[("column 2", "b", "text", false), old[1], old[2]]), "column \"a\" was renamed to \"b\"");
        assert_eq!(named(&[("column 2", "a", "integer", false), old[1], old[2]]), "column \"a\" was altered");
        assert_eq!(named(&[old[1], old[2]]), "column \"a\" was dropped");
        assert_eq!(named(&[old[0], ("label 7", "mood", "low", false), old[2]]), "type mood was altered");
        assert_eq!(named(&[old[0], old[1], ("function 9", "f()", "2", false)]), "function f() was replaced");
        assert_eq!(named(&[old[0], old[1], old[2], ("label 8", "mood", "new", false)]), "", "nobody has it yet");
    }

    #[test]
    fn columns_that_documents_do_not_have_and_empty_ones_make_no_difference() {
        let old = [("column 2", "secret", "", false)];
        assert_eq!(causes(&old, &[]), Vec::<String>::new());
        assert_eq!(causes(&old, &[("column 2", "hidden", "", false)]), Vec::<String>::new());
        assert_eq!(causes(&old, &[old[0], ("column 3", "new", "text", false)]), Vec::<String>::new());
        assert_eq!(
            causes(&old, &[old[0], ("column 3", "new", "text", true)]),
            ["column \"new\" was added with values".to_owned()]
        );
    }

    #[test]
    fn a_column_that_was_added_before_its_table_was_written_anew_may_have_values() {
        let added = [("column 3", "new", "text", false), (FILES, "", "2", false)];
        assert_eq!(causes(&[(FILES, "", "1", false)], &added), ["column \"new\" was added with values".to_owned()]);
        assert_eq!(causes(&[(FILES, "", "2", false)], &added), Vec::<String>::new());
        assert_eq!(causes(&[(FILES, "", "1", false)], &added[1..]), Vec::<String>::new());
    }

    #[test]
    fn other_tables_and_views_change_the_ways() {
        let old = [("view 5", "public.v", "1", false), ("table 6", "public.t", "1", false)];
        let ways = |new: &[(&str, &str, &str, bool)]| facts(&old).compare(&facts(new)).ways;
        assert!(!ways(&old));
        assert!(ways(&[old[0], ("table 6", "public.u", "2", false)]));
        assert!(ways(&[("view 5", "public.v", "2", false), old[1]]));
        assert!(ways(&[old[0], old[1], ("table 7", "public.w", "1", false)]));
        let names = |name| facts(&old).compare(&facts(&[old[0], ("table 6", name, "2", false)])).names;
        assert!(names("public.u") && !names("public.t"));
    }

    #[test]
    fn another_collation_of_a_key_is_another_order() {
        let old = [("own 1", "id", "100", false), ("own 2", "title", "", false)];
        let order = |new: &[(&str, &str, &str, bool)]| facts(&old).compare(&facts(new)).order;
        assert!(!order(&old));
        assert!(!order(&[("own 1", "key", "100", false), old[1]]));
        assert!(order(&[("own 1", "id", "950", false), old[1]]));
        // As a former version has written it down.
        assert!(!order(&[("own 1", "id", "", false), ("own 2", "title", "100", false)]));
    }

    #[test]
    fn nothing_is_compared_over_an_upgrade_of_the_server() {
        let old = [(VERSION, "", "15", false), ("view 5", "public.v", "1", false)];
        let new = [(VERSION, "", "16", false), ("view 5", "public.v", "2", false)];
        assert_eq!(facts(&old).compare(&facts(&new)), Difference::default());
    }
}
