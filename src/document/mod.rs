//! From keys to documents, and from column types to mappings.
//! Runs in: the worker, on its main thread; `shape` also in users' backends, for es_sync.mapping.
//! May touch: attached tables, read-only, as their owner. No network.
//!
//! `shape` derives from the catalog what a table's documents look like, by what `types` says of a column, and `statements`
//! what reads them; `read` turns keys, or pages of a table, into documents, whose text `json` makes, and `pieces` says
//! which keys are read as a range; `related` finds the keys of documents that show a related row.

mod json;
mod pieces;
pub mod read;
pub mod related;
pub mod shape;
mod statements;
mod types;
