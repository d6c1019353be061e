//! What a view reads, and which of its columns are equal.
//! Runs in: users' backends (attach, relate).
//! May touch: Postgres' catalogs. It reads the query that Postgres stores for a view, and no table.
//!
//! `tree` reads that query; `graph` finds the way from a table's row to the view's keys.

pub mod graph;
pub mod tree;
