//! The `options` argument of attach: each is known, validated, and has one meaning.

use pgrx::PgSqlErrorCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::postgres::error::Report;

/// What a user may say about an index beyond its table.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Elasticsearch's own `mappings`, merged over the derived ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mappings: Option<Value>,
    /// Elasticsearch's own `settings`, merged over the derived ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settings: Option<Value>,
    /// Name of an ingest pipeline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<String>,
    /// The column of the table that decides on which shard a document lies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing: Option<String>,
    /// `index.refresh_interval`, in the engine's notation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refresh: Option<String>,
    /// False: attach without loading what is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<bool>,
    /// True: take over an index of that name which another installation made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adopt: Option<bool>,
}

const KNOWN: &str = "mappings, settings, routing, pipeline, refresh, load, adopt";

impl Options {
    /// Reads what a user passed.
    ///
    /// # Errors
    /// An unknown option, or a value of the wrong kind.
    pub fn parse(options: &Value) -> Result<Self, Report> {
        let invalid = |message: String, hint: String| {
            Report::new(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message).hint(hint)
        };
        let Some(fields) = options.as_object() else {
            return Err(invalid("options must be a JSON object".into(), format!("Known options are: {KNOWN}.")));
        };
        for (name, value) in fields {
            let (fits, kind) = match name.as_str() {
                "mappings" | "settings" => (value.is_object(), "an object, as Elasticsearch takes it"),
                "routing" | "pipeline" | "refresh" => {
                    (value.as_str().is_some_and(|text| !text.is_empty()), "a non-empty string")
                }
                "load" | "adopt" => (value.is_boolean(), "true or false"),
                "delay" => {
                    return Err(Report::new(
                        PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                        format!("option \"{name}\" is not supported yet"),
                    )
                    .hint(format!("Known options are: {KNOWN}.")));
                }
                _ => {
                    return Err(invalid(
                        format!("option \"{name}\" is not known"),
                        format!("Known options are: {KNOWN}."),
                    ));
                }
            };
            if !fits {
                return Err(invalid(
                    format!("option \"{name}\" has a value of the wrong kind"),
                    format!("Pass {kind}."),
                ));
            }
        }
        serde_json::from_value(options.clone()).map_err(|error| {
            invalid(format!("options cannot be read: {error}"), format!("Known options are: {KNOWN}."))
        })
    }

    /// Reads what `parse` accepted earlier and the catalog kept.
    pub fn stored(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_unknown_option_is_refused_by_name() {
        let error = Options::parse(&json!({"mapings": {}})).unwrap_err();
        assert!(error.message.contains("\"mapings\""), "{}", error.message);
        assert!(error.hint.unwrap().contains("mappings"));
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_refused() {
        for options in [
            json!([]),
            json!({"mappings": 1}),
            json!({"load": "no"}),
            json!({"pipeline": ""}),
            json!({"routing": ["a"]}),
        ] {
            assert!(Options::parse(&options).is_err(), "{options}");
        }
    }

    #[test]
    fn what_was_parsed_is_stored_and_read_again() {
        let options = Options::parse(&json!({"mappings": {"properties": {}}, "load": false})).unwrap();
        assert_eq!(Options::stored(&serde_json::to_string(&options).unwrap()), options);
    }
}
