//! The queue of changes and the dead letters: every statement on them is here, and what is done to them below SQL.
//! Runs in: writers' backends (`insert`, `table`), the worker (all), users' backends (`dead_letter`, the marker).
//! May touch: es_sync.queue, es_sync.prepared_queue, es_sync.marker, es_sync.dead_letter.
//!
//! A row of the queue is (id, source, count, enqueued_at, keys): the keys of one table that one transaction changed, a
//! chunk at a time; or, where the source is a link, values of related rows that lead to keys, and where it is that of a
//! routed index, keys with former routings; as `keys` writes them. `keys` null is a request for the whole table: to build
//! its indexes anew (count 0), to mend them (count 1), or to take out documents without a row (count 2). There is no index
//! and no sequence: both would cost the writer more than the row itself. The worker finds rows by scanning and deletes
//! them by ctid and id.

pub mod claim;
pub mod dead_letter;
pub mod insert;
pub mod keys;
pub mod marker;
pub mod spool;
pub mod storage;
pub mod table;
