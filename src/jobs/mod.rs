//! Long work, done in the worker a step at a time: first load, reindex, verify, and dropping indexes.
//! Runs in: the worker, on its main thread, between deliveries.
//! May touch: es_sync.job, the delivery's lanes, the engine through its call thread.
//!
//! A job's row is its durable state: where the worker dies, the next one goes on from there.

pub mod build;
pub mod partition;
pub mod record;
pub mod step;
pub mod verify;
