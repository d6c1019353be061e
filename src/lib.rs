//! pg_es_sync keeps Elasticsearch or OpenSearch in step with Postgres tables.
//!
//! # The rooms, in the order in which a change travels
//!
//! - [`settings`]: every `es_sync.*` setting, defined once.
//! - [`shared`]: shared memory: wake-up, counters, what views show without touching the queue.
//! - [`postgres`]: thin, safe hands on Postgres: transactions, SPI, relations, errors, latches, processes.
//! - [`attachment`]: what is synced: the catalog of attachments, keys, options; views and the ways from what they read;
//!   DDL and partitions.
//! - [`capture`]: trigger, pending set, flush at commit (writers' backends).
//! - [`queue`]: the only SQL on the queue and the dead letters.
//! - [`document`]: from keys to documents, from column types to mappings.
//! - `es` (a package of its own, `src/es`): the engine. It knows no Postgres.
//! - [`worker`]: the launcher, one worker per database, the delivery loop.
//! - [`jobs`]: long work inside the worker: first load, reindex, comparing and mending, a partition's rows.
//! - [`statements`]: DROP EXTENSION, DROP DATABASE and the like: what is done before they run.
//! - [`functions`]: what users call from SQL: thin, one file per family.
//!
//! docs/architecture.md tells how they work together, and where to change what.

mod attachment;
mod capture;
mod document;
mod functions;
mod jobs;
mod postgres;
mod queue;
mod settings;
mod shared;
mod statements;
mod worker;

use pgrx::prelude::*;

pgrx::pg_module_magic!(name, version);

extension_sql_file!("../sql/tables.sql", name = "tables", bootstrap);
extension_sql_file!("../sql/functions.sql", name = "functions", requires = ["tables"]);
extension_sql_file!("../sql/views.sql", name = "views", requires = ["functions"], finalize);

/// Called once by the postmaster (shared_preload_libraries) or by a backend that loads the library late.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    settings::define();
    // SAFETY: a plain flag of Postgres, read on the main thread while the library is being loaded.
    if unsafe { pg_sys::process_shared_preload_libraries_in_progress } {
        postgres::error::keep_backtraces_from_clients();
        shared::install_hooks();
        statements::install_hook();
        worker::launcher::register();
    }
    capture::register();
}

/// Needed by `cargo pgrx test`.
#[cfg(test)]
pub mod pg_test {
    pub fn setup(_options: Vec<&str>) {}

    pub fn postgresql_conf_options() -> Vec<&'static str> {
        vec!["shared_preload_libraries = 'pg_es_sync'"]
    }
}
