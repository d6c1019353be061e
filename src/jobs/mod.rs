//! Long work, done in the worker a step at a time: first load, reindex, verify, a partition's rows, dropping indexes.
//! Runs in: the worker, on its main thread, between deliveries; `ask` and `record` also in users' backends.
//! May touch: es_sync.job, the delivery's lanes, the engine through its call thread.
//!
//! `ask` asks for one. A job's row (`record`) is its durable state: where the worker dies, the next one goes on from there.
//! `step` is what all kinds have in common; `build`, `verify` and `partition` are one each. The worker takes them up in
//! `worker::catalog`, and a step further in `worker::tasks`.

pub mod ask;
pub mod build;
pub mod partition;
pub mod record;
pub mod step;
pub mod verify;
