//! Fields: an index has those of a new column before the first document with it is sent. As `dynamic` is off, the engine
//! would take the document and never find it by that field.

use std::rc::Rc;
use std::time::{Duration, Instant};

use es::{Failure, FailureKind, Output};
use serde_json::json;

use super::answers::set_cause;
use super::delivery::Delivery;
use super::engine::Engine;
use crate::attachment::catalog::Attachment;
use crate::document::read::Reader;

/// A mapping that the engine was asked to take.
pub(super) struct PutMapping {
    token: u64,
    lane: u32,
    mapping: Rc<str>,
}

impl Delivery {
    /// True if the lane's index has the fields of its documents. If not, the engine is asked to give it those, and the
    /// lane is closed until it has answered.
    pub fn fit_mapping(
        &mut self,
        lane: u32,
        reader: &mut Reader,
        attachment: &Attachment,
        engine: &mut Engine,
    ) -> bool {
        let Some(dialect) = engine.dialect() else { return false };
        let mapping = reader.mapping(attachment, dialect);
        let Some(state) = self.lane(lane) else { return false };
        if state.mapping.as_ref() == Some(&mapping) {
            return true;
        }
        if !state.awaits_mapping {
            state.awaits_mapping = true;
            // Through the write alias, which is gone where somebody else writes by now.
            let (alias, body) = (state.target.alias.clone(), mapping.to_string());
            let shape = reader.shape();
            let optional = shape.optional_types(attachment, dialect);
            let reduced = json!({"properties": shape.mappings(attachment, dialect, true)["properties"]});
            let token = engine.call(move |client| {
                let body = serde_json::from_str(&body).unwrap_or_default();
                match client.put_mapping(&alias, &body) {
                    Err(failure) if failure.lacks(&optional) => client.put_mapping(&alias, &reduced),
                    result => result,
                }
            });
            self.mappings.push(PutMapping { token, lane, mapping });
        }
        false
    }

    /// Takes the answer to `fit_mapping`; false if it is not one.
    pub(super) fn mapping_answered(
        &mut self,
        token: u64,
        result: &Result<Output, Failure>,
        engine: &mut Engine,
    ) -> bool {
        let Some(place) = self.mappings.iter().position(|asked| asked.token == token) else { return false };
        let PutMapping { lane: id, mapping, .. } = self.mappings.swap_remove(place);
        let Some(lane) = self.lane(id) else { return true };
        lane.awaits_mapping = false;
        let attachment = lane.attachment;
        match result {
            Ok(_) => {
                lane.mapping = Some(mapping);
                lane.failures = 0;
                lane.blocked_until = None;
            }
            Err(failure) if failure.kind == FailureKind::NotFound => {
                lane.blocked_until = Some(Instant::now() + Duration::from_secs(1));
                self.missing.push(id);
                set_cause(attachment, &failure.to_string());
            }
            Err(failure) if failure.kind.is_transient() || failure.kind.outcome_unknown() => {
                lane.failures += 1;
                lane.refusals += u32::from(failure.status == Some(403));
                let delay = engine.backoff.delay(lane.failures.min(10), &mut engine.random);
                lane.blocked_until = Some(Instant::now() + delay);
                set_cause(attachment, &format!("could not give the index its fields: {failure}"));
            }
            Err(failure) => {
                // Another index must have them. Until it is there, this one takes what it can: a build waits until all
                // changes have been delivered here, too.
                lane.mapping = Some(mapping);
                let building = lane.building;
                let why = format!("the index cannot be given the fields of its documents: {failure}");
                self.outbox.misfits.push((attachment, building, es::request_failure(&why)));
            }
        }
        true
    }
}
