//! A bulk request under construction: which documents are in it, and what becomes of each.

use std::rc::Rc;

use es::Body;

use super::lane::Key;
use crate::attachment::key::{self, is_too_long};
use crate::attachment::routing::Routing;
use crate::document::read::Row as Found;
use crate::document::shape::{MAX_NESTING, is_too_deep};

/// What becomes of one document.
pub struct Operation {
    pub key: Key,
    pub delete: bool,
    /// Of a routed index: where it is indexed.
    pub routing: Option<Routing>,
    /// So many items of the request, one after the other: one to index it, and one for each place where it must not be.
    pub items: usize,
}

/// A request under construction.
pub struct Batch {
    pub body: Body,
    pub operations: Vec<Operation>,
    /// What the engine must not see: document, kind and reason of its dead letter.
    pub unfit: Vec<(Key, &'static str, String)>,
    pub version: i64,
    /// With a routing: the version of deletes beside an index operation of the same document. It is the lower one, so in
    /// whatever order they arrive on a shard that both routings lead to, the document stays.
    pub former: i64,
    pub routed: bool,
    /// Rows that were asked for, with a document or without.
    pub rows: usize,
}

impl Batch {
    /// Adds what a row's document should be: indexed where it belongs, and nowhere else.
    pub fn put(&mut self, key: &Key, row: Found, elsewhere: &[Routing], max_content: usize) {
        let id = key::document_id(key);
        let Some(document) = row.document else {
            // The row is there and its document must not be.
            let here = row.routing.map(Rc::from);
            let others = elsewhere.iter().filter(|routing| **routing != here).cloned();
            let places: Vec<Routing> = others.chain([here.clone()]).collect();
            return self.remove(key, &places);
        };
        if es::operation_len(&id, row.routing, document.len()) > max_content {
            let reason = format!("document of {} bytes is larger than the engine takes", document.len());
            self.unfit.push((key.clone(), "too_large", reason));
            return;
        }
        if is_too_deep(document) {
            let reason = format!("document is nested more than {MAX_NESTING} levels deep");
            self.unfit.push((key.clone(), "too_deep", reason));
            return;
        }
        let mut items = 0;
        if !is_too_long(key) {
            // First, so that on a shard that both routings lead to the document is never missing.
            self.body.index(&id, row.routing, self.version, document);
            items = 1;
            for former in elsewhere.iter().filter(|routing| routing.as_deref() != row.routing) {
                self.body.delete(&id, former.as_deref(), self.former);
                items += 1;
            }
        }
        let routing = self.routed.then(|| row.routing.map(Rc::from));
        self.operations.push(Operation { key: key.clone(), delete: false, routing, items });
    }

    /// Adds what becomes of a document that must not be there; `places` are where it may lie, in a routed index.
    pub fn remove(&mut self, key: &Key, places: &[Routing]) {
        let mut items = 0;
        if !is_too_long(key) {
            let id = key::document_id(key);
            let places: &[Routing] = if self.routed { places } else { &[None] };
            for routing in places {
                self.body.delete(&id, routing.as_deref(), self.version);
            }
            items = places.len();
        }
        self.operations.push(Operation { key: key.clone(), delete: true, routing: None, items });
    }
}
