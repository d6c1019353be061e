//! What users call from SQL: thin, one file per family. Their signatures are in sql/functions.sql.
//! Runs in: users' backends.
//! May touch: schema es_sync through `attachment`, the pending set through `capture`, shared memory. No network.

mod attach;
mod install;
mod status;
mod sync;
mod wait;
