//! What can go wrong with a whole request.

use std::fmt;

use serde::Deserialize;

/// Longest reason kept, in characters: the engine's may quote a whole document.
const MAX_REASON: usize = 500;

/// Why a request did not do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub kind: FailureKind,
    /// HTTP status, where there was an answer.
    pub status: Option<u16>,
    /// The engine's type and reason, or the network's; at most 500 characters, never a credential. May quote
    /// document text: for the table's owner and administrators only.
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailureKind {
    /// No node could be connected to (DNS, TCP, TLS): nothing was sent.
    Unreachable,
    /// No answer in time, or a gateway's 504: outcome unknown.
    Timeout,
    /// The connection broke after sending began, or a gateway's 502: outcome unknown.
    Broken,
    /// 401, 403
    Unauthorized,
    /// 429
    TooManyRequests,
    /// 413
    TooLarge,
    /// 5xx
    Unavailable,
    /// 400 and other 4xx
    BadRequest,
    NotFound,
    Exists,
    Conflict,
    /// Not what the engine answers: no JSON, a wrong count, a panic on our side. Outcome unknown.
    BadAnswer,
    /// A setting, or a file it names, cannot be used: nothing was sent.
    Config,
    /// [`Client::shutdown`](crate::Client::shutdown) was called. Outcome unknown.
    Shutdown,
}

impl FailureKind {
    /// The request may have been carried out, or may still be.
    pub fn outcome_unknown(self) -> bool {
        matches!(self, FailureKind::Timeout | FailureKind::Broken | FailureKind::BadAnswer | FailureKind::Shutdown)
    }

    /// The same request may well succeed later, without anything about it being changed.
    pub fn is_transient(self) -> bool {
        matches!(
            self,
            FailureKind::Unreachable
                | FailureKind::Timeout
                | FailureKind::Broken
                | FailureKind::Unauthorized
                | FailureKind::TooManyRequests
                | FailureKind::Unavailable
                | FailureKind::BadAnswer
        )
    }
}

impl Failure {
    pub fn new(kind: FailureKind, reason: impl Into<String>) -> Failure {
        Failure { kind, status: None, reason: cut(reason.into()) }
    }

    /// True if an index was refused because of one of these types, or of the setting that comes with one.
    pub fn lacks(&self, types: &[String]) -> bool {
        let message = self.to_string();
        self.status == Some(400)
            && !types.is_empty()
            && (types.iter().any(|name| message.contains(&format!("[{name}]"))) || message.contains("[index.knn]"))
    }

    /// Reads an answer whose status is not a success.
    pub(crate) fn from_answer(status: u16, body: &[u8]) -> Failure {
        let (kind_text, reason) = read_error(body);
        let kind = match status {
            401 | 403 => FailureKind::Unauthorized,
            // Not the engine's own word, so not "it is not there": a wrong path prefix or a proxy. Whoever
            // believed it would create what exists, or take rows for deleted.
            404 if reason.is_none() => FailureKind::BadAnswer,
            404 => FailureKind::NotFound,
            409 => FailureKind::Conflict,
            413 => FailureKind::TooLarge,
            429 => FailureKind::TooManyRequests,
            408 | 504 => FailureKind::Timeout,
            502 => FailureKind::Broken,
            500.. => FailureKind::Unavailable,
            400 if kind_text.as_deref() == Some("resource_already_exists_exception") => FailureKind::Exists,
            400 if reason.as_deref().is_some_and(|reason| reason.ends_with("already exists as alias")) => {
                FailureKind::Exists
            }
            // A gateway's word again (a certificate that has expired, a rule): no document's fault.
            400..=499 if reason.is_none() => FailureKind::BadAnswer,
            400..=499 => FailureKind::BadRequest,
            _ => FailureKind::BadAnswer,
        };
        let reason = match (kind_text, reason) {
            (Some(kind), Some(reason)) => format!("{kind}: {reason}"),
            (None, Some(reason)) => reason,
            (_, None) => format!(
                "HTTP status {status}, not an engine's answer: {}",
                String::from_utf8_lossy(&body[..body.len().min(200)])
            ),
        };
        Failure { kind, status: Some(status), reason: cut(reason) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status {
            Some(status) => write!(f, "{} (HTTP {status})", self.reason),
            None => f.write_str(&self.reason),
        }
    }
}

impl std::error::Error for Failure {}

/// The engine's error as (type, reason), where it is the engine's. It comes as an object, or as a bare string.
fn read_error(body: &[u8]) -> (Option<String>, Option<String>) {
    #[derive(Deserialize)]
    struct Envelope {
        error: Error,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Error {
        Text(String),
        Object {
            #[serde(rename = "type")]
            kind: Option<String>,
            reason: Option<String>,
            caused_by: Option<Cause>,
        },
    }
    #[derive(Deserialize)]
    struct Cause {
        reason: Option<String>,
    }
    match serde_json::from_slice::<Envelope>(body) {
        Err(_) => (None, None),
        // Gateways say {"error": "Not Found"} too; the engine, where we may get one and have to know it, only this.
        Ok(Envelope { error: Error::Text(text) }) => (None, Some(text).filter(|text| is_missing_alias(text))),
        Ok(Envelope { error: Error::Object { kind, reason, caused_by } }) => {
            let reason = reason.unwrap_or_default();
            let cause = caused_by.and_then(|cause| cause.reason);
            (kind, Some(with_cause(reason, cause.as_deref())))
        }
    }
}

/// "alias [a] missing", "aliases [a,b] missing".
fn is_missing_alias(text: &str) -> bool {
    text.starts_with("alias") && text.ends_with("] missing")
}

/// Appends the cause's reason, unless the reason already says it.
pub(crate) fn with_cause(mut reason: String, cause: Option<&str>) -> String {
    if let Some(cause) = cause.filter(|cause| !reason.contains(cause)) {
        reason.push_str(": ");
        reason.push_str(cause);
    }
    reason
}

/// Cuts to [`MAX_REASON`] characters.
pub(crate) fn cut(mut reason: String) -> String {
    if let Some((end, _)) = reason.char_indices().nth(MAX_REASON) {
        reason.truncate(end);
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engines_error_becomes_kind_and_reason() {
        for (status, body, kind, reason) in [
            (
                400,
                r#"{"error":{"root_cause":[],"type":"resource_already_exists_exception","reason":"index [t/Qb] already exists","index":"t"},"status":400}"#,
                FailureKind::Exists,
                "resource_already_exists_exception: index [t/Qb] already exists",
            ),
            (
                400,
                r#"{"error":{"type":"invalid_index_name_exception","reason":"Invalid index name [t.one], already exists as alias"},"status":400}"#,
                FailureKind::Exists,
                "invalid_index_name_exception: Invalid index name [t.one], already exists as alias",
            ),
            (
                404,
                r#"{"error":"alias [nonesuch] missing","status":404}"#,
                FailureKind::NotFound,
                "alias [nonesuch] missing",
            ),
            (403, "forbidden", FailureKind::Unauthorized, "HTTP status 403, not an engine's answer: forbidden"),
            (
                404,
                r#"{"timestamp":"2026-11-23T10:00:00Z","status":404,"error":"Not Found","path":"/t"}"#,
                FailureKind::BadAnswer,
                r#"HTTP status 404, not an engine's answer: {"timestamp":"2026-11-23T10:00:00Z","status":404,"error":"Not Found","path":"/t"}"#,
            ),
            (404, "<html>", FailureKind::BadAnswer, "HTTP status 404, not an engine's answer: <html>"),
            (302, "", FailureKind::BadAnswer, "HTTP status 302, not an engine's answer: "),
            (504, "", FailureKind::Timeout, "HTTP status 504, not an engine's answer: "),
        ] {
            let failure = Failure::from_answer(status, body.as_bytes());
            assert_eq!((failure.kind, failure.reason.as_str(), failure.status), (kind, reason, Some(status)));
        }
    }

    #[test]
    fn a_reason_is_cut_between_characters() {
        let failure = Failure::new(FailureKind::BadRequest, "ö".repeat(10_000));
        assert_eq!(failure.reason.chars().count(), 500);
    }
}
