//! Which tables a document is made of, and the way from a row of theirs to the documents that show it.
//!
//! The ways come from the view's own stored query (`view`). What that does not determine is declared by the user, and
//! never guessed.

use pgrx::{PgSqlErrorCode, pg_sys};

use super::captures;
use super::catalog::{self, Attachment};
use super::check::{self, Table};
use super::options::Options;
use super::view::tree::{Tree, Used, WITH_SESSION, WITH_TIME};
use super::way::{Root, Way};
use super::{definition, link, triggers, way};
use crate::capture;
use crate::jobs::{ask, record};
use crate::postgres::error::Report;
use crate::postgres::relation::{self, Column};
use crate::postgres::{rights, spi};

/// What an attachment's documents are made of.
#[derive(Debug, Default)]
pub struct Followed {
    ways: Vec<Way>,
    /// What the view reads and nobody hears of: "name: why".
    pub unfollowed: Vec<String>,
}

/// Which columns of a view its documents use.
pub struct Shown<'a> {
    pub view: Option<pg_sys::Oid>,
    pub exclude: &'a [String],
    pub options: &'a Options,
    /// A condition may use any column.
    pub filter: Option<&'a str>,
}

impl Followed {
    /// The tables that are followed, the attached one left out.
    pub fn tables(&self, root: pg_sys::Oid) -> Vec<pg_sys::Oid> {
        let mut tables: Vec<pg_sys::Oid> =
            self.ways.iter().map(|way| way.related).filter(|table| *table != root).collect();
        tables.sort_unstable_by_key(|table| table.to_u32());
        tables.dedup();
        tables
    }
}

/// Finds out what documents are made of. SPI must be connected.
///
/// # Errors
/// A table whose way to the documents is neither determined by the view nor declared.
pub fn find(table: &Table, shown: &Shown) -> Result<Followed, Report> {
    let root = Root::of(table)?;
    let mut followed = Followed::default();
    let mut declared = way::declared(&root)?;
    let related: Vec<pg_sys::Oid> = declared.iter().map(|way| way.related).collect();
    let filtered = match shown.view {
        Some(view) => read_view(&root, view, shown, &mut declared, &mut followed)?,
        None => 1,
    };
    // A row's own columns show no other table.
    if shown.view.is_some() || shown.filter.is_some() {
        followed.ways.extend(declared);
    }
    if let Some(filter) = shown.filter {
        read_filter(&root, shown.view, filter, filtered, &related, &mut followed)?;
    }
    Ok(followed)
}

/// What decides about documents besides their own row, and is not followed. The first `filtered` tables that the filter
/// reads are those that it filters: the view's, or the table itself. `declared` are tables of which the user says how
/// they are.
///
/// # Errors
/// A filter that time alone would have to apply: rows would not leave the index by themselves. One that depends on who
/// reads, which nobody who searches does.
fn read_filter(
    root: &Root,
    view: Option<pg_sys::Oid>,
    filter: &str,
    filtered: usize,
    declared: &[pg_sys::Oid],
    followed: &mut Followed,
) -> Result<(), Report> {
    let tree = Tree::of_filter(root.owner, view.unwrap_or(root.oid), filter);
    for (name, why) in &tree.unfollowed {
        let known = format!("{name}: {why}");
        // The view's own is told of already.
        if followed.unfollowed.contains(&known) {
            continue;
        }
        let refused = |message| Report::new(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message);
        if why == WITH_TIME {
            return Err(refused("cannot filter by what changes with time")
                .detail(format!("The filter uses {name}, and a row that stays as it is would not leave its index."))
                .hint("Filter by columns only, and compare with the time when you search."));
        }
        if why == WITH_SESSION {
            return Err(refused("cannot filter by what changes with the session")
                .detail(format!("The filter uses {name}, and is evaluated as the table's owner, whoever searches."))
                .hint("Filter by columns only, and compare with the user when you search."));
        }
        followed.unfollowed.push(known);
    }
    let read_by_functions = if tree.calls_readers() { declared } else { &[] };
    let read =
        tree.graph.tables[filtered..].iter().filter(|table| table.fires).map(|table| pg_sys::Oid::from(table.oid));
    for oid in read.clone() {
        let name = format!("{}: the filter reads it, and no way is declared", spi::qualified(oid));
        if !declared.contains(&oid) && !followed.unfollowed.contains(&name) {
            followed.unfollowed.push(name);
        }
    }
    // The view says nothing of their columns.
    for oid in read.chain(read_by_functions.iter().copied()) {
        for way in followed.ways.iter_mut().filter(|way| way.related == oid) {
            way.used = None;
        }
    }
    Ok(())
}

/// The number of tables that the view reads.
fn read_view(
    root: &Root,
    view: pg_sys::Oid,
    shown: &Shown,
    declared: &mut [Way],
    followed: &mut Followed,
) -> Result<usize, Report> {
    let tree = Tree::of_view(view);
    followed.unfollowed = tree.unfollowed.iter().map(|(name, why)| format!("{name}: {why}")).collect();
    let place = |name: &String| tree.columns.iter().position(|(known, _)| known == name);
    let keys: Vec<_> =
        root.key.iter().filter_map(|column| place(&column.name)).map(|place| tree.output(place)).collect();
    let is_shown = |(name, kind): &(String, pg_sys::Oid)| {
        shown.filter.is_some()
            || root.key.iter().any(|key| &key.name == name)
            || catalog::is_synced(name, *kind, shown.exclude, shown.options)
    };
    let used = tree.used((0..tree.columns.len()).filter(|place| is_shown(&tree.columns[*place])));

    let mut own: Option<Option<Vec<String>>> = None;
    let mut undetermined: Vec<String> = Vec::new();
    let mut first_undetermined = None;
    let mut read = std::collections::HashSet::new();
    let mut ways = tree.graph.ways(&keys);
    for (place, occurrence) in tree.graph.tables.iter().enumerate().filter(|(_, table)| table.fires) {
        let oid = pg_sys::Oid::from(occurrence.oid);
        let columns = relation::columns(oid);
        let used = names(&used[place], &columns);
        // How a row leads to documents is declared; which of its columns they show, the view still says, unless functions
        // read it, too.
        for way in declared.iter_mut().filter(|way| way.related == oid && !tree.calls_readers()) {
            match (&mut way.used, &used) {
                (Some(mine), Some(its)) => mine.extend(its.iter().cloned()),
                (mine @ None, Some(its)) if read.insert(oid) => *mine = Some(its.clone()),
                (mine, _) => {
                    read.insert(oid);
                    *mine = None;
                }
            }
        }
        let Some(way) = ways[place].take() else {
            if !declared.iter().any(|way| way.related == oid) {
                let why = occurrence.obstacle.clone().unwrap_or_else(|| {
                    "the view does not compare its columns for equality with what leads to the key".to_owned()
                });
                let why = format!("{}: {why}.", spi::qualified(oid));
                if !undetermined.contains(&why) {
                    undetermined.push(why);
                }
                first_undetermined.get_or_insert(oid);
            }
            continue;
        };
        if oid == root.oid && root.is_led_to_by(&way) {
            // The document's own row.
            own = Some(match (own, used) {
                (None, used) => used,
                (Some(Some(mut mine)), Some(its)) => {
                    mine.extend(its);
                    Some(mine)
                }
                _ => None,
            });
            continue;
        }
        let way = way::stated(&way, &tree, root, oid, used);
        if !followed.ways.contains(&way) {
            followed.ways.push(way);
        }
    }
    if let Some(first) = first_undetermined {
        return Err(Report::new(
            PgSqlErrorCode::ERRCODE_INVALID_OBJECT_DEFINITION,
            format!("cannot follow table {}, which view {} reads", spi::qualified(first), spi::qualified(view)),
        )
        .detail(format!("The view does not determine which documents show a row of it. {}", undetermined.join(" ")))
        .hint(format!(
            "Declare the way first: SELECT es_sync.relate('{}', '{}', 'SELECT ... related.column ...').",
            root.name,
            spi::qualified(first)
        )));
    }
    followed.ways.insert(
        0,
        Way {
            related: root.oid,
            columns: root.key.iter().map(|column| column.name.clone()).collect(),
            used: own.flatten(),
            nulls: false,
            query: None,
        },
    );
    Ok(tree.graph.tables.len())
}

fn names(used: &Used, columns: &[Column]) -> Option<Vec<String>> {
    match used {
        Used::Everything => None,
        Used::Columns(numbers) => Some(
            columns
                .iter()
                .filter(|column| numbers.contains(&column.number))
                .map(|column| column.name.clone())
                .collect(),
        ),
    }
}

/// Writes an attachment's ways down, and follows the tables that they begin at. Their locks are taken here: whoever has
/// written to one of them without noting it has ended then.
///
/// # Errors
/// A table that cannot be locked or must not be followed.
pub fn store(attachment: i32, root: pg_sys::Oid, followed: &Followed, caller: pg_sys::Oid) -> Result<(), Report> {
    let known = spi::run(
        "select coalesce(pg_catalog.array_agg(distinct w.related::oid), '{}') from es_sync.way w where w.attachment = $1",
        &[spi::parameter(attachment)],
    );
    let known: Vec<pg_sys::Oid> = known.get(0, 1).unwrap_or_default();
    let mut tables = Vec::new();
    for related in followed.tables(root) {
        // Who attached was allowed to, and the trigger is there; ways are found anew by whoever notices that they must be.
        let caller = if known.contains(&related) { relation::owner(related) } else { caller };
        tables.push(check::followable(related, caller)?);
    }
    for table in &tables {
        triggers::lock(table, "share row exclusive");
    }
    // Those that were there before go last: a link that stays keeps its number, under which the queue has rows.
    let before = spi::run(
        "select coalesce(pg_catalog.array_agg(w.id), '{}') from es_sync.way w where w.attachment = $1",
        &[spi::parameter(attachment)],
    );
    let (before, owner) = (before.get::<Vec<i64>>(0, 1), relation::owner(root));
    for way in &followed.ways {
        if let Some(query) = &way.query {
            // What is wrong with it must be known now, not by the worker: a right that is missing, a query that fails.
            let none: Vec<_> = way.columns.iter().map(|_| spi::parameter(Vec::<String>::new())).collect();
            rights::as_owner(owner, || spi::run(query, &none).len());
        }
        let source = match &way.query {
            Some(_) => Some(link_of(root, way).map_or_else(link::free_source, Ok)?),
            None => None,
        };
        spi::run(
            "insert into es_sync.way (attachment, root, related, source, columns, used, nulls, query)
             values ($1, $2::oid, $3::oid, $8, $4, $5, $6, $7)",
            &[
                spi::parameter(attachment),
                spi::parameter(root),
                spi::parameter(way.related),
                spi::parameter(way.columns.clone()),
                spi::parameter(way.used.clone()),
                spi::parameter(way.nulls),
                spi::parameter(way.query.clone()),
                spi::parameter(source),
            ],
        );
    }
    spi::run("delete from es_sync.way w where w.id = any ($1)", &[spi::parameter(before)]);
    store_unfollowed(attachment, followed);
    for table in &tables {
        triggers::create(table);
    }
    Ok(())
}

/// The link that notes of a related row what this way needs, if there is one.
fn link_of(root: pg_sys::Oid, way: &Way) -> Option<i32> {
    let rows = spi::run(
        "select w.source from es_sync.way w
         where w.root = $1::oid and w.related = $2::oid and w.columns = $3 and w.nulls = $4 and w.source is not null
         limit 1",
        &[
            spi::parameter(root),
            spi::parameter(way.related),
            spi::parameter(way.columns.clone()),
            spi::parameter(way.nulls),
        ],
    );
    rows.first(1)
}

/// Notes for the status what nobody hears of.
fn store_unfollowed(attachment: i32, followed: &Followed) {
    spi::run(
        "update es_sync.attachment a set not_followed = $2 where a.id = $1 and a.not_followed is distinct from $2",
        &[spi::parameter(attachment), spi::parameter(followed.unfollowed.clone())],
    );
}

/// Tables that the given attachments follow, the attached ones included.
pub fn tables_of(attachments: &[i32]) -> Vec<pg_sys::Oid> {
    let rows = spi::run(
        "select a.relation::oid from es_sync.attachment a where a.id = any ($1)
         union
         select w.related::oid from es_sync.way w join pg_catalog.pg_class c on c.oid = w.related
         where w.attachment = any ($1)
         order by 1",
        &[spi::parameter(attachments.to_vec())],
    );
    (0..rows.len()).filter_map(|row| rows.get(row, 1)).collect()
}

/// Those tables that no attachment but the given ones follows.
pub fn only_followed_by(attachments: &[i32]) -> Vec<pg_sys::Oid> {
    let rows = spi::run(
        "select x.oid from (
             select a.relation::oid, a.id from es_sync.attachment a
             union
             select w.related::oid, w.attachment from es_sync.way w) x (oid, attachment)
         join pg_catalog.pg_class c on c.oid = x.oid
         group by x.oid having pg_catalog.bool_and(x.attachment = any ($1))
         order by x.oid",
        &[spi::parameter(attachments.to_vec())],
    );
    (0..rows.len()).filter_map(|row| rows.get(row, 1)).collect()
}

/// Declares the way from rows of a related table to documents of a table, or takes that back. Where the table is attached
/// already, its ways are found anew, and what was missed so far is mended.
///
/// # Errors
/// The declaration does not fit, or is still needed.
pub fn relate(table: &Table, related: pg_sys::Oid, via: Option<&str>, caller: pg_sys::Oid) -> Result<(), Report> {
    match via {
        Some(via) => {
            spi::run(
                "insert into es_sync.declaration as d (root, related, via) values ($1::oid, $2::oid, $3)
                 on conflict (root, related) do update set via = excluded.via",
                &[spi::parameter(table.oid), spi::parameter(related), spi::parameter(via)],
            );
        }
        None => {
            spi::run(
                "delete from es_sync.declaration d where d.root = $1::oid and d.related = $2::oid",
                &[spi::parameter(table.oid), spi::parameter(related)],
            );
        }
    }
    let attachments = catalog::of_relation(table.oid, None);
    if attachments.is_empty() {
        // Only checked: the way is taken by the next attach.
        let shown = Shown { view: None, exclude: &[], options: &Options::default(), filter: None };
        triggers::patiently(&table.name, || find(table, &shown))?;
    }
    for attachment in attachments {
        let attachment = definition::with_names(attachment);
        renew(&check::table_of(&attachment), &attachment, caller)?;
        ask::for_repair(
            attachment.id,
            &format!("changes of {} were followed otherwise until now", spi::qualified(related)),
        );
    }
    captures::invalidate();
    capture::announce_catalog_change();
    Ok(())
}

/// Finds an attachment's ways anew. What reads its table under way begins again.
///
/// # Errors
/// As `find` and `store`.
pub fn renew(table: &Table, attachment: &Attachment, caller: pg_sys::Oid) -> Result<(), Report> {
    let followed = triggers::patiently(&table.name, || find(table, &shown_by(attachment)))?;
    // Who skipped an UPDATE by the former rules has ended then.
    triggers::lock(table, "share row exclusive");
    store(attachment.id, table.oid, &followed, caller)?;
    record::restart(Some(attachment.id));
    captures::invalidate();
    // The worker looks whether anything is still in the way.
    // SAFETY: the table exists; the message is sent at commit.
    unsafe { pg_sys::CacheInvalidateRelcacheByRelid(table.oid) };
    Ok(())
}

/// Why an index is stale whose ways may name other columns or tables than they were made of.
pub const MISLED: &str = "columns or tables that its documents are made of have other names";

/// As `renew`, where the ways have changed; true if they have. What cannot be found is raised. `renamed`: tables have other
/// names than before. `rebuilt`: the index is built anew after this.
///
/// # Errors
/// As `find` and `store`.
pub fn renew_where_changed(
    table: &Table,
    attachment: &Attachment,
    caller: pg_sys::Oid,
    renamed: bool,
    rebuilt: bool,
) -> Result<bool, Report> {
    let followed = find(table, &shown_by(attachment))?;
    let links = || -> Vec<i32> {
        spi::run(
            "select coalesce(pg_catalog.array_agg(w.source), '{}') from es_sync.way w
             where w.attachment = $1 and w.source is not null",
            &[spi::parameter(attachment.id)],
        )
        .get(0, 1)
        .unwrap_or_default()
    };
    let stored = stored(attachment.id);
    if stored == followed.ways {
        store_unfollowed(attachment.id, &followed);
        return Ok(false);
    }
    let before = links();
    renew(table, attachment, caller)?;
    let after = links();
    // What the queue holds under a link that is gone leads nowhere.
    let lost = before.iter().any(|link| !after.contains(link));
    if lost || (!rebuilt && (renamed || have_passed(&stored, &followed.ways))) {
        ask::for_repair(attachment.id, "changes of its tables were followed otherwise until now");
    }
    capture::announce_catalog_change();
    Ok(true)
}

/// True if changes may be missed until the ways are found anew, because names in them mean other columns now, or other
/// tables, where some are `renamed`: a link's query finds the documents of whichever has the name.
///
/// # Errors
/// As `find`.
pub fn is_misled(table: &Table, attachment: &Attachment, renamed: bool) -> Result<bool, Report> {
    let (stored, found) = (stored(attachment.id), find(table, &shown_by(attachment))?.ways);
    Ok((renamed && stored != found) || have_passed(&stored, &found))
}

/// An attachment's ways as they were written down.
fn stored(attachment: i32) -> Vec<Way> {
    let rows = spi::run(
        "select w.related::oid, w.columns, w.used, w.nulls, w.query from es_sync.way w where w.attachment = $1 order by w.id",
        &[spi::parameter(attachment)],
    );
    (0..rows.len())
        .filter_map(|row| {
            Some(Way {
                related: rows.get(row, 1)?,
                columns: rows.get(row, 2)?,
                used: rows.get(row, 3),
                nulls: rows.get(row, 4)?,
                query: rows.get(row, 5),
            })
        })
        .collect()
}

/// True if a name that a way has no more is a column's nevertheless: capture took that for the one that was meant. A name
/// that no column has makes it note all that is done to the table.
fn have_passed(stored: &[Way], found: &[Way]) -> bool {
    stored.iter().enumerate().any(|(place, old)| {
        // The same view and declarations lead to the same ways in the same order.
        let new = found.get(place).filter(|new| new.related == old.related);
        let columns = old.columns.iter().enumerate();
        let left = columns.filter(|(place, name)| new.is_none_or(|new| new.columns.get(*place) != Some(name)));
        let unused = old
            .used
            .iter()
            .flatten()
            .filter(|name| new.is_none_or(|new| new.used.as_ref().is_some_and(|used| !used.contains(name))));
        let left: Vec<String> = left.map(|(_, name)| name).chain(unused).cloned().collect();
        !left.is_empty() && has_any_column(old.related, left)
    })
}

/// True if the table, which may be gone, has a column of one of these names.
pub fn has_any_column(table: pg_sys::Oid, names: Vec<String>) -> bool {
    let rows = spi::run(
        "select from pg_catalog.pg_attribute a
         where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped and a.attname::text = any ($2)
         limit 1",
        &[spi::parameter(table), spi::parameter(names)],
    );
    !rows.is_empty()
}

fn shown_by(attachment: &Attachment) -> Shown<'_> {
    Shown {
        view: attachment.document,
        exclude: &attachment.exclude,
        options: &attachment.options,
        filter: attachment.filter.as_deref(),
    }
}
