//! One bulk request.

use std::time::Duration;

use crate::answer::{FILTER_PATH, Outcome, read_answer};
use crate::body::Body;
use crate::client::{Client, Method};
use crate::failure::Failure;
use crate::name::{path_name, percent_encode};

/// Where a body goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Write alias; an index of this name is not written to.
    pub alias: String,
    /// Ingest pipeline that the documents go through.
    pub pipeline: Option<String>,
}

/// How long the engine waits for a shard that has no node before it says so. It would be a minute, and a few requests for
/// one such index would keep all connections from the others.
const WAIT_FOR_SHARD: Duration = Duration::from_secs(2);

impl Client {
    /// Sends a body. Gives one outcome per operation, in order; fails when the request as a whole did.
    pub fn bulk(&self, target: &Target, body: &Body) -> Result<Vec<Outcome>, Failure> {
        if body.is_empty() {
            return Ok(Vec::new());
        }
        // A delete with an external version creates a missing index, whatever require_alias says (both engines). That
        // index would have the alias's name and guess its mapping.
        if body.has_deletes() && self.alias(&target.alias)?.is_empty() {
            let reason = format!("\"{}\" is not an alias", target.alias);
            return Ok(vec![Outcome::IndexMissing { reason }; body.operations()]);
        }
        let wait = WAIT_FOR_SHARD.min(self.config().request_timeout / 2).as_millis();
        let alias = path_name(&target.alias)?;
        let mut path = format!("/{alias}/_bulk?require_alias=true&timeout={wait}ms&filter_path={FILTER_PATH}");
        if let Some(pipeline) = &target.pipeline {
            path.push_str("&pipeline=");
            path.push_str(&percent_encode(pipeline));
        }
        let answer = self.call(Method::Post, &path, Some(body.as_bytes()))?.success()?;
        read_answer(&answer.body, body.operations())
    }
}
