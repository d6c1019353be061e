//! Thin, safe hands on Postgres: transactions, SPI, relations, errors, latches, processes.
//! Runs in: writers' and users' backends, launcher and workers; always on the process's main thread.
//! May touch: Postgres' own API. It knows nothing of attachments, queues or the engine.

pub mod error;
pub mod latch;
pub mod limit;
pub mod process;
pub mod relation;
pub mod rights;
pub mod spi;
pub mod transaction;
