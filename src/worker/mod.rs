//! The launcher, one worker per database, and the delivery loop.
//! Runs in: background workers, on their main threads. The sender threads belong to package `es`.
//! May touch: everything but users' sessions; the main thread never waits for the network.
//!
//! `launcher` keeps a worker in each database that has the extension; `database` is such a worker's life; `engine` its
//! connection to the engine; `delivery` what is outstanding and what becomes of it; `hold` what is not claimed for now;
//! `lane` the documents of one index on their way; `waiters` answers es_sync.wait(). `lease` decides in the engine
//! whether this database may write, `ownership` acts on it there, `succession` writes it down here. `upkeep` looks after
//! the queue as a table; `version` waits for ALTER EXTENSION UPDATE.

pub mod database;
pub mod delivery;
pub mod engine;
mod hold;
pub mod lane;
pub mod launcher;
pub mod lease;
pub mod ownership;
pub mod succession;
pub mod upkeep;
pub mod version;
pub mod waiters;
