//! es_sync.retry_dead_letters, es_sync.discard_dead_letters.

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::primary_only;
use crate::attachment::{attach, check};
use crate::capture;
use crate::postgres::error::OrRaise;
use crate::postgres::rights::as_extension;
use crate::queue::dead_letter::{self, Chosen};

/// Checks that the caller owns what he names; where he names nothing, only what he owns is meant.
fn chosen(ids: Option<Vec<Option<i64>>>, relation: Option<pg_sys::Oid>) -> Chosen {
    if let Some(relation) = relation {
        check::require_owner(relation).or_raise();
        as_extension(|| attach::attached(relation, None)).or_raise();
    }
    // SAFETY: reads a variable of this process.
    let role = unsafe { pg_sys::GetUserId() };
    let ids: Option<Vec<i64>> = ids.map(|ids| ids.into_iter().flatten().collect());
    if let Some(foreign) = ids.as_ref().and_then(|ids| as_extension(|| dead_letter::not_owned(ids, role))) {
        check::require_owner(foreign).or_raise();
    }
    Chosen { ids, relation, role }
}

/// Enqueues the keys of dead letters again; how many letters. They stay until their document is taken.
#[pg_extern(sql = false)]
fn retry_dead_letters(ids: Option<Vec<Option<i64>>>, relation: Option<pg_sys::Oid>) -> i64 {
    primary_only(c"es_sync.retry_dead_letters()");
    let chosen = chosen(ids, relation);
    as_extension(|| dead_letter::each(&chosen, capture::note_key))
}

/// Forgets dead letters; how many.
#[pg_extern(sql = false)]
fn discard_dead_letters(ids: Option<Vec<Option<i64>>>, relation: Option<pg_sys::Oid>) -> i64 {
    primary_only(c"es_sync.discard_dead_letters()");
    let chosen = chosen(ids, relation);
    as_extension(|| dead_letter::discard(&chosen))
}
