//! The engine side of pg_es_sync: everything that speaks to Elasticsearch or OpenSearch.
//!
//! Knows no Postgres. All of it may run in any thread: it touches owned Rust data, files and sockets, nothing else.
//!
//! In the order a change travels:
//! - `body`: the NDJSON of one bulk request, under construction
//! - `sizing`: how many bytes and how many requests at once
//! - `breaker`, `backoff`: whether to send at all, and how long to wait
//! - `senders`: the threads that send, and how the worker hears from them
//! - `bulk`: one bulk request
//! - `answer`: what the engine said to each operation
//!
//! Beside the way:
//! - `indices`: indexes, aliases, mappings
//! - `public`: the name that users search by, and whose index is behind it
//! - `documents`: reading back what was sent, to compare it
//! - `lease`: which of several databases may write
//! - `engine`: which engine it is
//! - `client`: one request to one of the nodes, with `nodes` (which one next), `exchange` (the wire), `tls`, `credentials`
//! - `config`, `name`: what may be set, and what an index may be called
//! - `disclose`: what of a failure may be shown to everybody
//! - `failure`: what can go wrong with a whole request
//! - `secret`: a string that does not print

mod answer;
mod backoff;
mod body;
mod breaker;
mod bulk;
mod client;
mod config;
mod credentials;
mod disclose;
mod documents;
mod engine;
mod exchange;
mod failure;
mod indices;
mod lease;
mod name;
mod nodes;
mod public;
mod secret;
mod senders;
mod sizing;
mod tls;

#[cfg(test)]
mod stub;

pub use answer::{Cause, Outcome, read_answer};
pub use backoff::Backoff;
pub use body::{Body, operation_len};
pub use breaker::{Breaker, Permit, State};
pub use bulk::Target;
pub use client::{Answer, Client, Method};
pub use config::{Config, ConfigError, parse_urls};
pub use disclose::{document_failure, request_failure};
pub use documents::{Compare, Compared, Ids, Wanted};
pub use engine::{DEFAULT_MAX_CONTENT, EngineInfo, Product};
pub use failure::{Failure, FailureKind};
pub use indices::IndexInfo;
pub use lease::{Found, LEASE_INDEX, Lease, Mark, Wired, WriteAlias, write_alias};
pub use name::check_index_name;
pub use public::Standing;
pub use secret::Secret;
pub use senders::{Delivery, Event, Output, Senders, run_apart};
pub use sizing::Sizing;
