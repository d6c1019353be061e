//! Dead letters: documents that the engine or Postgres refused for good, with the reason.

use pgrx::pg_sys;

use super::insert;
use super::table::Queue;
use crate::attachment::{key, routing};
use crate::capture::Changes;
use crate::postgres::spi::{self, Plan};

/// A refused document.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    pub attachment: i32,
    pub key: String,
    /// HTTP status, if the engine refused it.
    pub status: Option<i32>,
    /// The engine's error type, or an SQLSTATE.
    pub kind: String,
    pub reason: String,
    pub attempts: i32,
    /// Of a routed index: where the document may lie besides.
    pub routings: Vec<Option<String>>,
}

/// Parks it; a document that was parked before keeps its first time.
pub fn park(letter: &DeadLetter) {
    spi::run(
        "insert into es_sync.dead_letter as d (attachment, key, document_id, status, kind, reason, attempts, routings)
         select a.id, $2, $3, $4, $5, $6, $7, $8 from es_sync.attachment a where a.id = $1
         on conflict (attachment, pg_catalog.left(key, 512), pg_catalog.hashtextextended(key, 0)) do update
         set status = excluded.status, kind = excluded.kind, reason = excluded.reason,
             attempts = d.attempts + excluded.attempts, last_failed_at = excluded.last_failed_at,
             routings = array(select distinct r from pg_catalog.unnest(d.routings || excluded.routings) r)",
        &[
            spi::parameter(letter.attachment),
            spi::parameter(letter.key.as_str()),
            spi::parameter(&*key::document_id(&letter.key)),
            spi::parameter(letter.status),
            spi::parameter(letter.kind.as_str()),
            spi::parameter(letter.reason.as_str()),
            spi::parameter(letter.attempts),
            spi::parameter(letter.routings.clone()),
        ],
    );
}

/// Forgets a document's dead letter: a later version of it was taken. What was taken may not have been told where else
/// the document lies, so that goes back to the queue; true if there was something.
pub fn clear(attachment: i32, key: &str) -> bool {
    let rows = spi::run(
        "delete from es_sync.dead_letter d
         using es_sync.attachment a
         where a.id = d.attachment and d.attachment = $1 and d.key = $2
           and pg_catalog.left(d.key, 512) = pg_catalog.left($2, 512)
           and pg_catalog.hashtextextended(d.key, 0) = pg_catalog.hashtextextended($2, 0)
         returning a.routing_source, d.routings",
        &[spi::parameter(attachment), spi::parameter(key)],
    );
    if rows.is_empty() {
        return false;
    }
    let (source, texts) = moves(&rows, 0, 1, key);
    let changes = Changes { texts: texts.into_iter().map(String::into_boxed_str).collect(), ..Changes::default() };
    !changes.texts.is_empty() && insert::write(Queue::Changes, vec![(source, changes)], &[])
}

/// Where a letter's document may lie, as the queue has it: from two columns, the source and the routings.
fn moves(rows: &spi::Rows, row: usize, column: usize, key: &str) -> (u32, Vec<String>) {
    let source = rows.get::<i32>(row, column).unwrap_or_default() as u32;
    let routings: Vec<Option<String>> = rows.get(row, column + 1).unwrap_or_default();
    let text = |routing: Option<String>| {
        let mut text = String::new();
        routing::push(&mut text, key, routing.as_deref());
        text
    };
    (source, if source == 0 { Vec::new() } else { routings.into_iter().map(text).collect() })
}

/// Attachment and key of every dead letter.
pub fn all() -> Vec<(i32, String)> {
    let rows = spi::run("select d.attachment, d.key from es_sync.dead_letter d", &[]);
    (0..rows.len()).filter_map(|row| Some((rows.get(row, 1)?, rows.get(row, 2)?))).collect()
}

/// Which dead letters a call is about: null means all, and only tables that `role` owns are looked at.
#[derive(Clone)]
pub struct Chosen {
    pub ids: Option<Vec<i64>>,
    pub relation: Option<pg_sys::Oid>,
    pub role: pg_sys::Oid,
}

const CHOSEN: &str = "($1 is null or d.id = any ($1)) and ($2 is null or a.relation = $2::oid)
                      and pg_catalog.pg_has_role($3, c.relowner, 'usage')";

impl Chosen {
    fn parameters(&self) -> [spi::Parameter; 3] {
        [spi::parameter(self.ids.clone()), spi::parameter(self.relation), spi::parameter(self.role)]
    }
}

/// The table of a letter among `ids` that `role` does not own; None if there is none.
pub fn not_owned(ids: &[i64], role: pg_sys::Oid) -> Option<pg_sys::Oid> {
    let rows = spi::run(
        "select a.relation::oid
         from es_sync.dead_letter d
         join es_sync.attachment a on a.id = d.attachment
         join pg_catalog.pg_class c on c.oid = a.relation
         where d.id = any ($1) and not pg_catalog.pg_has_role($2, c.relowner, 'usage')
         limit 1",
        &[spi::parameter(ids.to_vec()), spi::parameter(role)],
    );
    rows.first(1)
}

/// The keys of an attachment's letters.
pub fn keys_of(attachment: i32) -> Vec<String> {
    let rows =
        spi::run("select d.key from es_sync.dead_letter d where d.attachment = $1", &[spi::parameter(attachment)]);
    (0..rows.len()).filter_map(|row| rows.get(row, 1)).collect()
}

/// Rows taken from the cursor at once.
const FETCH: i64 = 1_000;

/// Calls `visit` with source and key, as the queue has them, of each chosen letter; how many letters there are.
pub fn each(chosen: &Chosen, mut visit: impl FnMut(u32, &str)) -> i64 {
    let (types, values): (Vec<_>, Vec<_>) = chosen.parameters().into_iter().unzip();
    let plan = Plan::prepare(
        &format!(
            "select a.relation::oid, d.key, a.routing_source, d.routings
             from es_sync.dead_letter d
             join es_sync.attachment a on a.id = d.attachment
             join pg_catalog.pg_class c on c.oid = a.relation
             where {CHOSEN}"
        ),
        &types,
    );
    let cursor = plan.open(&values);
    let mut count = 0;
    loop {
        let rows = cursor.fetch(FETCH);
        for row in 0..rows.len() {
            if let (Some(source), Some(key)) = (rows.get::<pg_sys::Oid>(row, 1), rows.get::<String>(row, 2)) {
                visit(source.to_u32(), &key);
                let (source, texts) = moves(&rows, row, 3, &key);
                texts.iter().for_each(|text| visit(source, text));
                count += 1;
            }
        }
        let ended = (rows.len() as i64) < FETCH;
        rows.free();
        if ended {
            cursor.close();
            return count;
        }
    }
}

/// Forgets the chosen letters; how many there were. The worker may still think of them as parked: it then clears what
/// is gone already.
pub fn discard(chosen: &Chosen) -> i64 {
    spi::run(
        &format!(
            "delete from es_sync.dead_letter d
             using es_sync.attachment a, pg_catalog.pg_class c
             where a.id = d.attachment and c.oid = a.relation and {CHOSEN}"
        ),
        &chosen.parameters(),
    )
    .len() as i64
}
