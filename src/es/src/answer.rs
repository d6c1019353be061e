//! What the engine said to each operation of a bulk request.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::failure::{Failure, FailureKind, cut, with_cause};

/// What happened to one operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The engine is in the state asked for.
    Done,
    /// It holds this document at the same or a higher version. 0 when it does not say which.
    Newer { version: i64 },
    /// Not now, or not until an operator has mended something: later again.
    Retry { cause: Cause, reason: String },
    /// This document as it is will never be taken. `kind` is the engine's error type.
    Refused { status: u16, kind: String, reason: String },
    /// The write alias is gone, is an index, or stands for several.
    IndexMissing { reason: String },
}

/// Why not now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The engine has no room for it just now.
    Busy,
    /// The index is closed or blocked, its pipeline is missing, or its shard is on no node.
    Index,
    /// It may be the document's own fault: a right that is missing for it, an error within the engine.
    Unclear,
}

/// Reads a bulk answer, which has at least the members that `FILTER_PATH` lets through.
///
/// Gives one outcome per operation, in order. Errors: `BadAnswer` when it is no bulk answer, or not of `operations` items.
pub fn read_answer(body: &[u8], operations: usize) -> Result<Vec<Outcome>, Failure> {
    let mut outcomes = Vec::with_capacity(operations);
    let mut json = serde_json::Deserializer::from_slice(body);
    json.deserialize_map(AnswerVisitor(&mut outcomes)).and_then(|()| json.end()).map_err(|error| {
        Failure::new(FailureKind::BadAnswer, format!("bulk answer of {} bytes cannot be read: {error}", body.len()))
    })?;
    if outcomes.len() != operations {
        return Err(Failure::new(
            FailureKind::BadAnswer,
            format!("bulk answer has {} items for {operations} operations", outcomes.len()),
        ));
    }
    Ok(outcomes)
}

/// What a bulk answer is reduced to. Every item keeps its status: without it a missing item would shift the others.
pub(crate) const FILTER_PATH: &str =
    "errors,items.*.status,items.*.error.type,items.*.error.reason,items.*.error.caused_by.reason";

/// The whole answer. Items become outcomes as they are read: a tree of all of them would cost more than the rest of a batch.
struct AnswerVisitor<'o>(&'o mut Vec<Outcome>);

impl<'de> Visitor<'de> for AnswerVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a bulk answer")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<Cow<'de, str>>()? {
            if name == "items" {
                map.next_value_seed(Items(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct Items<'o>(&'o mut Vec<Outcome>);

impl<'de> DeserializeSeed<'de> for Items<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Items<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an array of items")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while let Some(Item(result)) = items.next_element()? {
            self.0.push(result.outcome());
        }
        Ok(())
    }
}

/// `{"index": {...}}` or `{"delete": {...}}`: one member, whose name we know without looking.
struct Item(ItemResult);

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemVisitor;
        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = Item;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an item with one action")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Item, A::Error> {
                use serde::de::Error;
                if map.next_key::<IgnoredAny>()?.is_none() {
                    return Err(A::Error::custom("an item is empty"));
                }
                let result = map.next_value()?;
                if map.next_key::<IgnoredAny>()?.is_some() {
                    return Err(A::Error::custom("an item has two actions"));
                }
                Ok(Item(result))
            }
        }
        deserializer.deserialize_map(ItemVisitor)
    }
}

#[derive(Deserialize)]
struct ItemResult {
    status: u16,
    error: Option<ItemError>,
}

#[derive(Deserialize)]
struct ItemError {
    #[serde(rename = "type", default)]
    kind: String,
    reason: Option<String>,
    caused_by: Option<CausedBy>,
}

#[derive(Deserialize)]
struct CausedBy {
    reason: Option<String>,
}

impl ItemResult {
    fn outcome(self) -> Outcome {
        let status = self.status;
        let Some(error) = self.error else {
            return match status {
                // 404: a document to delete that is not there.
                200..=299 | 404 => Outcome::Done,
                409 => Outcome::Newer { version: 0 },
                429 => Outcome::Retry { cause: Cause::Busy, reason: format!("status {status}") },
                500.. => Outcome::Retry { cause: Cause::Unclear, reason: format!("status {status}") },
                _ => Outcome::Refused { status, kind: String::new(), reason: format!("status {status}") },
            };
        };
        let kind = error.kind;
        let reason = error.reason.unwrap_or_default();
        if kind == "version_conflict_engine_exception" {
            return Outcome::Newer { version: held_version(&reason) };
        }
        let reason = with_cause(reason, error.caused_by.and_then(|cause| cause.reason).as_deref());
        let is_missing = match kind.as_str() {
            // With require_alias also when it is an index: "... and [t] is not an alias".
            "index_not_found_exception" => true,
            "illegal_argument_exception" => reason.starts_with("no write index is defined for alias ["),
            _ => false,
        };
        if is_missing {
            return Outcome::IndexMissing { reason: cut(reason) };
        }
        match passing_cause(status, &kind, &reason) {
            Some(cause) => Outcome::Retry { cause, reason: cut(format!("{kind}: {reason}")) },
            None => Outcome::Refused { status, kind, reason: cut(reason) },
        }
    }
}

/// Why a document was not taken now; None if it never will be. In doubt not so: parking it, and every other one with it,
/// would be wrong.
fn passing_cause(status: u16, kind: &str, reason: &str) -> Option<Cause> {
    match kind {
        // A pipeline's processor `fail`, with status 500: it says so of the document, and would again.
        "fail_processor_exception" => None,
        // With status 400, or 429 where a disk is full.
        "cluster_block_exception" | "index_closed_exception" => Some(Cause::Index),
        "unavailable_shards_exception" | "no_shard_available_action_exception" => Some(Cause::Index),
        // A shard on its way from one node to another, or whose node has just gone, for longer than the engine waits
        // itself; with status 404, 500 or 503.
        "shard_not_found_exception"
        | "shard_not_in_primary_mode_exception"
        | "index_shard_closed_exception"
        | "index_shard_not_started_exception"
        | "index_shard_recovering_exception"
        | "index_shard_relocated_exception"
        | "illegal_index_shard_state_exception"
        | "already_closed_exception"
        | "node_closed_exception"
        | "node_disconnected_exception"
        | "node_not_connected_exception"
        | "connect_transport_exception"
        | "receive_timeout_transport_exception" => Some(Cause::Index),
        // A change of the mapping that waits for others.
        "process_cluster_event_timeout_exception" => Some(Cause::Busy),
        "mapper_exception" if status >= 500 => Some(Cause::Busy),
        "es_rejected_execution_exception" | "rejected_execution_exception" => Some(Cause::Busy),
        "circuit_breaking_exception" => Some(Cause::Busy),
        // An ingest pipeline deleted by hand, with status 400 and for every document.
        "illegal_argument_exception"
            if reason.starts_with("pipeline with id [") && reason.ends_with("] does not exist") =>
        {
            Some(Cause::Index)
        }
        _ => match status {
            429 => Some(Cause::Busy),
            // Among them missing rights. 404: what it needs is not there, whatever that is.
            401 | 403 | 404 | 408 | 500.. => Some(Cause::Unclear),
            _ => None,
        },
    }
}

/// The version in "[id]: version conflict, current version [10] is higher or equal to the one provided [5]", or 0.
fn held_version(reason: &str) -> i64 {
    const BEFORE: &str = "]: version conflict, current version [";
    // The last one: the id stands before it, and may hold any text.
    let version = reason.rfind(BEFORE).and_then(|at| {
        let (digits, _) = reason[at + BEFORE.len()..].split_once(']')?;
        digits.parse().ok()
    });
    version.unwrap_or(0)
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
