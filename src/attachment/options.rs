//! The `options` argument of attach: each is known, validated, and has one meaning.

use std::time::Duration;

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
    /// How long a document's changes gather before it is sent, in the engine's notation of times.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay: Option<String>,
    /// False: attach without loading what is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<bool>,
    /// True: take over an index of that name which another installation made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adopt: Option<bool>,
}

/// Longer than this nobody wants to search what was.
const MAX_DELAY: Duration = Duration::from_secs(3_600);

const KNOWN: &str = "mappings, settings, routing, pipeline, refresh, delay, load, adopt";

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
        let is_object_or_null = |value: &Value| value.is_object() || value.is_null();
        for (name, value) in fields {
            let (fits, kind) = match name.as_str() {
                "mappings" => (
                    value.is_object()
                        && value.get("properties").is_none_or(Value::is_object)
                        && value.get("_meta").is_none_or(is_object_or_null),
                    "an object, as Elasticsearch takes it; its \"properties\" and \"_meta\" are objects, too",
                ),
                "settings" => (
                    value.is_object() && value.get("index").is_none_or(is_object_or_null),
                    "an object, as Elasticsearch takes it; its \"index\" is one, too",
                ),
                "routing" | "pipeline" | "refresh" => {
                    (value.as_str().is_some_and(|text| !text.is_empty()), "a non-empty string")
                }
                "load" | "adopt" => (value.is_boolean(), "true or false"),
                "delay" => (
                    value.as_str().and_then(time).is_some_and(|delay| delay <= MAX_DELAY),
                    "a time of one hour at the most, such as \"500ms\", \"5s\" or \"1m\"",
                ),
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

    /// True if the user has a mapping of his own for a column.
    pub fn maps(&self, column: &str) -> bool {
        let own = self.mappings.as_ref().and_then(|mappings| mappings.get("properties")?.get(column));
        own.is_some_and(|own| !own.is_null())
    }

    /// The same where columns of the table (`own`), and of the documents (`shown`), have other names now: an option keeps
    /// with its column. The user's mapping of a field that has the new name goes first.
    pub fn renamed(&self, own: impl Fn(&str) -> Option<String>, shown: impl Fn(&str) -> Option<String>) -> Self {
        let mut options = self.clone();
        if let Some(new) = self.routing.as_deref().and_then(own) {
            options.routing = Some(new);
        }
        let properties = options.mappings.as_mut().and_then(|mappings| mappings.get_mut("properties")?.as_object_mut());
        if let Some(properties) = properties {
            // All at once: columns may have swapped their names.
            let (moved, kept): (Vec<_>, Vec<_>) =
                std::mem::take(properties).into_iter().partition(|(name, _)| shown(name).is_some());
            properties.extend(kept);
            for (name, mapping) in moved {
                properties.entry(shown(&name).unwrap_or(name)).or_insert(mapping);
            }
        }
        options
    }

    /// How long a document's changes gather before it is sent; zero where it goes at once.
    pub fn delay(&self) -> Duration {
        self.delay.as_deref().and_then(time).unwrap_or_default()
    }

    /// Reads what `parse` accepted earlier and the catalog kept.
    pub fn stored(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_default()
    }
}

/// A time as the engine writes it: a whole number and a unit.
fn time(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let millis = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(millis).map(Duration::from_millis)
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
            json!({"mappings": {"properties": null}}),
            json!({"mappings": {"_meta": "v1"}}),
            json!({"settings": []}),
            json!({"settings": {"index": 5}}),
            json!({"load": "no"}),
            json!({"pipeline": ""}),
            json!({"routing": ["a"]}),
            json!({"delay": 5}),
        ] {
            assert!(Options::parse(&options).is_err(), "{options}");
        }
    }

    #[test]
    fn a_delay_is_a_number_and_a_unit() {
        for (text, millis) in [("500ms", 500), ("5s", 5_000), ("2m", 120_000), ("1h", 3_600_000), ("0s", 0)] {
            let options = Options::parse(&json!({"delay": text})).unwrap();
            assert_eq!(options.delay(), Duration::from_millis(millis), "{text}");
        }
        for wrong in ["", "5", "s", "5 s", "-1s", "1.5s", "2h", "99999999999999999999ms", "18446744073709551615h"] {
            assert!(Options::parse(&json!({"delay": wrong})).is_err(), "{wrong}");
        }
        assert_eq!(Options::default().delay(), Duration::ZERO);
    }

    #[test]
    fn options_keep_with_a_column_that_is_renamed() {
        let options = |routing: &str, properties: Value| {
            Options::parse(&json!({"routing": routing, "mappings": {"properties": properties}})).unwrap()
        };
        let names = |pairs: &'static [(&'static str, &'static str)]| {
            move |name: &str| pairs.iter().find(|(old, _)| *old == name).map(|(_, new)| (*new).to_owned())
        };
        let none = names(&[]);
        let before = options("a", json!({"a": {"type": "text"}, "b": {"type": "ip"}, "x": {"type": "alias"}}));
        assert_eq!(before.renamed(none, none), before);
        assert_eq!(before.renamed(names(&[("a", "c")]), none).routing.as_deref(), Some("c"));
        let swapped = options("a", json!({"b": {"type": "text"}, "a": {"type": "ip"}, "x": {"type": "alias"}}));
        assert_eq!(before.renamed(none, names(&[("a", "b"), ("b", "a")])), swapped);
        let taken = options("a", json!({"b": {"type": "ip"}, "x": {"type": "alias"}}));
        assert_eq!(before.renamed(none, names(&[("a", "x")])), taken);
        assert_eq!(Options::default().renamed(none, names(&[("a", "b")])), Options::default());
    }

    #[test]
    fn what_was_parsed_is_stored_and_read_again() {
        let options = Options::parse(&json!({"mappings": {"properties": {}}, "load": false})).unwrap();
        assert_eq!(Options::stored(&serde_json::to_string(&options).unwrap()), options);
    }
}
