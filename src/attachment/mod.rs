//! What is synced: the catalog of attachments, their keys, columns and options, and how a table becomes attached.
//! Runs in: users' backends (attach, detach), workers (reading the catalog), writers' backends (keys only).
//! May touch: Postgres catalogs and the tables of schema es_sync, the queue excepted. No network.

pub mod attach;
pub mod catalog;
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
pub mod switched;
mod view;
