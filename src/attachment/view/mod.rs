//! What a view reads, and which of its columns are equal.
//! Runs in: users' backends (attach, relate), the worker (after DDL).
//! May touch: Postgres' catalogs: the queries that it stores for views, filters and declared ways. No table.
//!
//! `tree` reads that query; `graph` finds the way from a table's row to the view's keys.

pub mod graph;
pub mod tree;
