//! The catalog of attachments: `es_sync.attachment` as Rust values.

use pgrx::pg_sys;

use super::options::Options;
use crate::document::shape;
use crate::postgres::relation::{element_of, extension_type};
use crate::postgres::spi::{self, Rows};
use crate::postgres::transaction::{Scope, set, with_nested_settings};

/// An attached table and its index.
#[derive(Debug, Clone, PartialEq)]
pub struct Attachment {
    pub id: i32,
    pub relation: pg_sys::Oid,
    /// The alias under which people search.
    pub index: String,
    pub key_columns: Vec<String>,
    /// The view that documents are read from; None where they are the table's rows.
    pub document: Option<pg_sys::Oid>,
    pub filter: Option<String>,
    pub exclude: Vec<String>,
    pub options: Options,
    /// The source under which the queue holds where documents lay before; None without the option `routing`.
    pub routing_source: Option<u32>,
    /// The concrete index behind the alias; None until the first load is done.
    pub live: Option<String>,
    /// The engine's own id of the live index, once it has been seen.
    pub uuid: Option<String>,
    /// Index and table may differ: a repair is under way, or somebody has to act.
    pub stale: bool,
    /// Nothing is sent to it until es_sync.resume().
    pub paused: bool,
}

impl Attachment {
    /// False where the engine gives back something else than it was sent: documents then can only be counted as there
    /// or not. Whether they hold vectors is not in it.
    pub fn contents_comparable(&self) -> bool {
        // Vectors are left out of _source by newer versions.
        const NOT_GIVEN_BACK: [&str; 4] = ["_source", "dense_vector", "knn_vector", "rank_vectors"];
        let mentions = |value: &serde_json::Value| {
            let text = value.to_string();
            NOT_GIVEN_BACK.iter().any(|word| text.contains(&format!("\"{word}\"")))
        };
        let default_pipeline = |value: &serde_json::Value| {
            ["default_pipeline", "final_pipeline"].iter().any(|name| value.to_string().contains(name))
        };
        self.options.pipeline.is_none()
            && !self.options.mappings.as_ref().is_some_and(mentions)
            && !self.options.settings.as_ref().is_some_and(|own| default_pipeline(own) || shape::makes_source_up(own))
    }
}

const COLUMNS: &str = "a.id, a.relation::oid, a.index_name, a.key_columns, a.filter, a.exclude, a.options::text, \
                       a.live_index, a.live_uuid, coalesce(a.obstacle, a.stale) is not null, a.paused, a.document::oid, a.routing_source";

/// All attachments whose table still exists. SPI must be connected.
pub fn all() -> Vec<Attachment> {
    select("join pg_catalog.pg_class c on c.oid = a.relation order by a.id", &[])
}

/// Attachments of a table, oldest first; only that of `index` where one is given.
pub fn of_relation(relation: pg_sys::Oid, index: Option<&str>) -> Vec<Attachment> {
    select(
        "where a.relation = $1::oid and ($2 is null or a.index_name = $2) order by a.id",
        &[spi::parameter(relation), spi::parameter(index)],
    )
}

/// One attachment.
pub fn of_id(id: i32) -> Option<Attachment> {
    select("where a.id = $1", &[spi::parameter(id)]).pop()
}

fn select(rest: &str, parameters: &[spi::Parameter]) -> Vec<Attachment> {
    let rows = spi::run(&format!("select {COLUMNS} from es_sync.attachment a {rest}"), parameters);
    (0..rows.len()).filter_map(|row| read(&rows, row)).collect()
}

fn read(rows: &Rows, row: usize) -> Option<Attachment> {
    Some(Attachment {
        id: rows.get(row, 1)?,
        relation: rows.get(row, 2)?,
        index: rows.get(row, 3)?,
        key_columns: rows.get(row, 4)?,
        filter: rows.get(row, 5),
        exclude: rows.get(row, 6)?,
        options: Options::stored(&rows.get::<String>(row, 7)?),
        live: rows.get(row, 8),
        uuid: rows.get(row, 9),
        stale: rows.get(row, 10)?,
        paused: rows.get(row, 11)?,
        document: rows.get(row, 12),
        routing_source: rows.get::<i32>(row, 13).map(|source| source as u32),
    })
}

/// The index name that is taken, and by which table; None if it is free.
pub fn owner_of_index(index: &str) -> Option<String> {
    let rows =
        spi::run("select a.relation::text from es_sync.attachment a where a.index_name = $1", &[spi::parameter(index)]);
    rows.first(1)
}

/// Deletes the attachments that a condition on $1 chooses, and with them what is theirs: ways, jobs, dead letters, and
/// what was seen of their definitions. SPI must be connected.
pub fn delete(condition: &str, parameter: spi::Parameter) {
    with_nested_settings(|| {
        // In a session that acts as a replica no foreign key would cascade.
        set(c"session_replication_role", c"origin", Scope::Nested);
        spi::run(&format!("delete from es_sync.attachment a where {condition}"), &[parameter]);
    });
}

/// DROP TABLE leaves its attachments behind: the table's owner need not know of us. Lets go of them all, or of that of
/// `index` alone, and of what was declared about the table.
pub fn forget_dropped_tables(index: Option<&str>) {
    delete(
        "($1 is null or a.index_name = $1)
         and not exists (select from pg_catalog.pg_class c where c.oid = a.relation)",
        spi::parameter(index),
    );
    spi::run(
        "delete from es_sync.declaration d
         where not exists (select from pg_catalog.pg_class c where c.oid = d.root)
            or not exists (select from pg_catalog.pg_class c where c.oid = d.related)",
        &[],
    );
}

/// Whether documents hold a column that is no key: all but those excluded, and but bytea and tsvector that the user has
/// not mapped.
pub fn is_synced(name: &str, type_oid: pg_sys::Oid, exclude: &[String], options: &Options) -> bool {
    let left_out = || matches!(element_of(type_oid).0, pg_sys::BYTEAOID | pg_sys::TSVECTOROID);
    !exclude.iter().any(|excluded| excluded == name) && (options.maps(name) || !left_out())
}

/// True if documents hold vectors. SPI must be connected.
pub fn has_vectors(attachment: &Attachment) -> bool {
    // By SQL, because opening the relation would wait for whoever has it locked.
    let rows = spi::run(
        "select a.attname::text, a.atttypid from pg_catalog.pg_attribute a
         where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped",
        &[spi::parameter(attachment.document.unwrap_or(attachment.relation))],
    );
    (0..rows.len()).any(|row| {
        let excluded = rows.get::<String>(row, 1).is_none_or(|name| attachment.exclude.contains(&name));
        let kind = rows.get::<pg_sys::Oid>(row, 2);
        !excluded && kind.is_some_and(|kind| is_vector(element_of(kind).0))
    })
}

/// True for pgvector's types whose text is a list of numbers.
fn is_vector(type_oid: pg_sys::Oid) -> bool {
    matches!(extension_type(type_oid).as_str(), "vector" | "halfvec")
}

/// Attachments whose documents hold rows of a table, or of a partitioned table that it belongs to.
pub fn concerned(table: pg_sys::Oid) -> Vec<i32> {
    let rows = spi::run(
        "select x.attachment
         from (select a.id, a.relation::oid from es_sync.attachment a
               union
               select w.attachment, w.related::oid from es_sync.way w) x (attachment, relation)
         where x.relation = $1 or x.relation in (select p.relid from pg_catalog.pg_partition_ancestors($1) p)
         group by 1 order by 1",
        &[spi::parameter(table)],
    );
    (0..rows.len()).filter_map(|row| rows.get(row, 1)).collect()
}
