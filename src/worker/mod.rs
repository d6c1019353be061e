//! The launcher, one worker per database, and the delivery loop.
//! Runs in: background workers, on their main threads. The sender threads belong to package `es`.
//! May touch: everything but users' sessions; the main thread never waits for the network.
//!
//! Processes: `launcher` keeps a worker in each database that has the extension, `process` is such a worker's start and
//! end, `database` what it knows and its loop.
//!
//! A turn of the loop: `catalog` reads what is attached and asked for, `definitions` hears of DDL; `ownership` sees to the
//! right to write, of which `lease` is the decision in the engine and `succession` what follows from it here; `changes`
//! claims, reads, sends and acknowledges, `tasks` takes jobs a step further; `waiters` answers es_sync.wait(); `upkeep`
//! looks after the queue as a table; `publish` shows it all. `version` waits for ALTER EXTENSION UPDATE before the first.
//!
//! What they work on: `engine` is the connection to the engine, `delivery` what is outstanding, `batch` a
//! request of it, `answers` what becomes of it, `outbox` what is written down of that, `lane` the documents of one index on their way, `delay` how changes of a document gather, `hold` what is
//! not claimed for now, `mapping` what an index is given before documents carry it, `fan` what changes of related rows
//! become.

mod answers;
mod batch;
mod catalog;
mod changes;
pub mod database;
mod definitions;
mod delay;
pub mod delivery;
pub mod engine;
mod fan;
mod hold;
pub mod lane;
pub mod launcher;
pub mod lease;
mod mapping;
mod outbox;
pub mod ownership;
pub mod process;
mod publish;
pub mod succession;
mod tasks;
pub mod upkeep;
pub mod version;
pub mod waiters;
