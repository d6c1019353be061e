//! What is synced: the catalog of attachments, their keys, columns and options, and how a table becomes attached.
//! Runs in: users' backends (attach, detach), workers (reading the catalog), writers' backends (what to note, and keys).
//! May touch: Postgres catalogs and the tables of schema es_sync, the queue excepted. No network.
//!
//! What was asked for: `attach` (attach, detach, reindex, verify), `check` (what can be), `options`, `pause`, `catalog`.
//! What is known of the index: `state`. What writers' triggers note: `captures`.
//! What identifies a row and its document: `key`, `routing`.
//! Documents from views: `view` reads the view's query, `follow` makes ways of it, `way` has their SQL, `link` is how the
//! queue has those, `operator` names what compares, `pin` ties the view to the trigger.
//! What changes meanwhile: `definition` (DDL), `partitions`, `triggers` and `switched` (where they were switched off).

pub mod attach;
pub mod captures;
pub mod catalog;
pub mod check;
pub mod definition;
pub mod follow;
pub mod key;
pub mod link;
pub mod operator;
pub mod options;
pub mod partitions;
pub mod pause;
pub mod pin;
pub mod routing;
pub mod state;
pub mod switched;
pub mod triggers;
mod view;
mod way;
