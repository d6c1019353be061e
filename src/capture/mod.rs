//! Noting which rows changed, and writing their keys to the queue when the transaction commits.
//! Runs in: writers' backends.
//! May touch: backend memory, the queue's heap, the worker's latch; for plans the catalog, below SQL. No SPI or network.
//!
//! `trigger` notes keys in a `pending` set that knows savepoints; `transaction` hears of commit, prepare, abort and
//! savepoints and flushes the set; `plan` remembers what to note for each relation;
//! `rewrite` hears of tables that are written anew as a whole.

mod pending;
mod plan;
mod rewrite;
mod transaction;
mod trigger;

pub use pending::Changes;
pub use transaction::{LONGEST, announce_catalog_change, announce_extension_change, note_integer, note_key, register};
