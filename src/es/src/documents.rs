//! Reading documents back, to compare them with what they should be.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::client::{Client, Method};
use crate::failure::{Failure, FailureKind};
use crate::name::path_name;

/// How long the engine keeps a scroll open between two pages.
const SCROLL: &str = "5m";

/// What became of comparing one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    Equal,
    Missing,
    Different,
}

/// A document as it should be.
#[derive(Debug, Default)]
pub struct Wanted {
    pub id: String,
    pub routing: Option<String>,
    /// Its JSON text.
    pub document: Vec<u8>,
}

/// What counts when documents are compared.
#[derive(Clone, Copy, Debug)]
pub struct Compare {
    /// Otherwise only whether they are there.
    pub contents: bool,
    /// A document is looked for where its routing leads, and one of another routing is another document: two routings
    /// may share a shard, and there an id.
    pub routed: bool,
}

/// A page of ids, with the documents' routings.
#[derive(Debug, PartialEq, Eq)]
pub struct Ids {
    pub ids: Vec<(String, Option<String>)>,
    /// For the next page; every answer may name another.
    pub scroll: String,
}

#[derive(Deserialize)]
struct MultiGet<'a> {
    #[serde(borrow)]
    docs: Vec<Got<'a>>,
}

#[derive(Deserialize)]
struct Got<'a> {
    #[serde(default)]
    found: bool,
    #[serde(rename = "_routing")]
    routing: Option<String>,
    #[serde(rename = "_source", borrow)]
    source: Option<&'a RawValue>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Scrolled {
    #[serde(rename = "_scroll_id")]
    scroll: String,
    hits: Hits,
    #[serde(rename = "_shards")]
    shards: Option<Shards>,
}

#[derive(Deserialize)]
struct Shards {
    failed: u64,
}

#[derive(Deserialize)]
struct Hits {
    /// Left out where there are none.
    #[serde(default)]
    hits: Vec<Hit>,
}

#[derive(Deserialize)]
struct Hit {
    #[serde(rename = "_id")]
    id: String,
    #[serde(rename = "_routing")]
    routing: Option<String>,
}

impl Client {
    /// Compares documents with those in a concrete index, as they are now (not as they were at the last refresh). One
    /// result each, in order.
    pub fn compare(&self, index: &str, documents: &[Wanted], how: Compare) -> Result<Vec<Compared>, Failure> {
        if documents.is_empty() {
            return Ok(Vec::new());
        }
        // No filter_path where contents count: with it the engine parses each document and writes it anew, its numbers
        // as doubles; without, it gives back the very bytes that it was sent.
        let rest = match how {
            Compare { contents: true, .. } => "",
            // Nothing stored is loaded, and so no routing, unless it is asked for.
            Compare { routed: true, .. } => {
                "&_source=false&stored_fields=_routing&filter_path=docs.found,docs._routing,docs.error"
            }
            _ => "&_source=false&filter_path=docs.found,docs.error",
        };
        let path = format!("/{}/_mget?realtime=true{rest}", path_name(index)?);
        let body = if how.routed {
            let places = documents.iter().map(|wanted| match &wanted.routing {
                Some(routing) => json!({"_id": wanted.id, "routing": routing}),
                None => json!({"_id": wanted.id}),
            });
            json!({"docs": places.collect::<Vec<_>>()})
        } else {
            json!({"ids": documents.iter().map(|wanted| wanted.id.as_str()).collect::<Vec<_>>()})
        };
        let answer = self.call(Method::Post, &path, Some(body.to_string().as_bytes()))?.success()?;
        let got: MultiGet = answer.read()?;
        if got.docs.len() != documents.len() {
            let reason = format!("{} documents were asked for, {} answered", documents.len(), got.docs.len());
            return Err(Failure::new(FailureKind::BadAnswer, reason));
        }
        documents
            .iter()
            .zip(got.docs)
            .map(|(wanted, got)| match got {
                Got { error: Some(error), .. } if error["type"] == "index_not_found_exception" => {
                    Err(Failure::new(FailureKind::NotFound, format!("index \"{index}\" is missing")))
                }
                Got { error: Some(error), .. } => Err(Failure::new(FailureKind::Unavailable, error.to_string())),
                Got { found: false, .. } => Ok(Compared::Missing),
                Got { routing, .. } if how.routed && routing != wanted.routing => Ok(Compared::Missing),
                Got { source: Some(found), .. } if how.contents && !same(&wanted.document, found.get().as_bytes()) => {
                    Ok(Compared::Different)
                }
                Got { source: None, .. } if how.contents => Ok(Compared::Different),
                _ => Ok(Compared::Equal),
            })
            .collect()
    }

    /// Opens a scroll over all ids of a concrete index, as they are searchable now, and takes the first page.
    pub fn first_ids(&self, index: &str, size: usize) -> Result<Ids, Failure> {
        let path = format!("/{}/_search?scroll={SCROLL}&filter_path={SCROLL_PATH}", path_name(index)?);
        let body = json!({"size": size, "sort": ["_doc"], "_source": false, "query": {"match_all": {}}});
        self.ids(&path, &body)
    }

    /// Takes the next page; an empty one is the end. A scroll that the engine has forgotten is `NotFound`.
    pub fn next_ids(&self, scroll: &str) -> Result<Ids, Failure> {
        let path = format!("/_search/scroll?filter_path={SCROLL_PATH}");
        self.ids(&path, &json!({"scroll": SCROLL, "scroll_id": scroll}))
    }

    /// Closes a scroll. One that is gone already is no failure.
    pub fn end_scroll(&self, scroll: &str) {
        let body = json!({"scroll_id": scroll}).to_string();
        let _ = self.call(Method::Delete, "/_search/scroll", Some(body.as_bytes()));
    }

    fn ids(&self, path: &str, body: &Value) -> Result<Ids, Failure> {
        let answer = self.call(Method::Post, path, Some(body.to_string().as_bytes()))?.success()?;
        let answer: Scrolled = answer.read()?;
        if answer.shards.is_some_and(|shards| shards.failed > 0) {
            return Err(Failure::new(FailureKind::Unavailable, "not all shards answered"));
        }
        Ok(Ids { ids: answer.hits.hits.into_iter().map(|hit| (hit.id, hit.routing)).collect(), scroll: answer.scroll })
    }
}

/// `hits` itself must be there even when no hit is.
const SCROLL_PATH: &str = "_scroll_id,_shards.failed,hits.hits._id,hits.hits._routing,hits.max_score";

/// True if two JSON texts mean the same: the same bytes as a rule, for the engine gives back what it was sent. A field that
/// is absent is one that is null: documents from before a column was added do not have it.
fn same(expected: &[u8], found: &[u8]) -> bool {
    fn text(document: &[u8]) -> Option<&RawValue> {
        serde_json::from_slice(document).ok()
    }
    expected == found
        || matches!((text(expected), text(found)), (Some(expected), Some(found)) if same_value(expected, found, 0))
}

/// Nobody sends documents that are nested as deeply.
const MAX_DEPTH: usize = 128;

/// Compares texts, not `Value`s: in these numbers are doubles, which two numerics may share.
fn same_value(expected: &RawValue, found: &RawValue, depth: usize) -> bool {
    let texts = (expected.get(), found.get());
    if texts.0 == texts.1 {
        return true;
    }
    if depth == MAX_DEPTH {
        return false;
    }
    match (texts.0.as_bytes()[0], texts.1.as_bytes()[0]) {
        (b'{', b'{') => match (fields(texts.0), fields(texts.1)) {
            (Some(expected), Some(found)) => {
                expected.len() == found.len()
                    && expected.iter().zip(&found).all(|((name, value), (its_name, its_value))| {
                        name == its_name && same_value(value, its_value, depth + 1)
                    })
            }
            _ => false,
        },
        (b'[', b'[') => match (elements(texts.0), elements(texts.1)) {
            (Some(expected), Some(found)) => {
                expected.len() == found.len()
                    && expected.iter().zip(&found).all(|(one, other)| same_value(one, other, depth + 1))
            }
            _ => false,
        },
        (b'"', b'"') => match (serde_json::from_str::<String>(texts.0), serde_json::from_str::<String>(texts.1)) {
            (Ok(expected), Ok(found)) => expected == found,
            _ => false,
        },
        (b'-' | b'0'..=b'9', b'-' | b'0'..=b'9') => {
            matches!((Number::of(texts.0), Number::of(texts.1)), (Some(expected), Some(found)) if expected == found)
        }
        // One of null, true and false, which are written in one way only, or of different kinds.
        _ => false,
    }
}

/// An object's fields in the order of their names, without those that are null.
fn fields(text: &str) -> Option<BTreeMap<String, &RawValue>> {
    let mut fields: BTreeMap<String, &RawValue> = serde_json::from_str(text).ok()?;
    fields.retain(|_, value| value.get() != "null");
    Some(fields)
}

fn elements(text: &str) -> Option<Vec<&RawValue>> {
    serde_json::from_str(text).ok()
}

/// A JSON number, exactly: 1.50, 1.5 and 15e-1 are the same.
#[derive(PartialEq)]
struct Number {
    negative: bool,
    /// Without zeros at either end; empty for zero.
    digits: String,
    /// The power of ten that the last digit counts.
    exponent: i64,
}

impl Number {
    /// None where the exponent is beyond all measure.
    fn of(text: &str) -> Option<Self> {
        let (mantissa, exponent) = match text.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => (mantissa, exponent.parse::<i64>().ok()?),
            None => (text, 0),
        };
        let mantissa = mantissa.trim_start_matches('-');
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let all = format!("{whole}{fraction}");
        let digits = all.trim_end_matches('0');
        let dropped = all.len() - digits.len();
        let digits = digits.trim_start_matches('0').to_owned();
        if digits.is_empty() {
            return Some(Self { negative: false, digits, exponent: 0 });
        }
        let exponent = exponent.checked_sub(fraction.len() as i64)?.checked_add(dropped as i64)?;
        Some(Self { negative: text.starts_with('-'), digits, exponent })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stub::{Reply, Stub, config};

    const CONTENTS: Compare = Compare { contents: true, routed: false };

    fn documents() -> Vec<Wanted> {
        [("1", "{\"a\": 1}"), ("2", "{\"a\":2}"), ("3", "{}")]
            .map(|(id, text)| Wanted { id: id.into(), routing: None, document: text.into() })
            .into()
    }

    #[test]
    fn documents_are_compared_by_what_they_mean() {
        let stub = Stub::start(|_| {
            Reply::Answer(
                200,
                r#"{"docs":[{"found":true,"_source":{"a":1}},{"found":true,"_source":{"a":3}},{"found":false}]}"#,
            )
        });
        let client = Client::new(config(&stub.url)).unwrap();
        let compared = client.compare("i-1", &documents(), CONTENTS).unwrap();
        assert_eq!(compared, [Compared::Equal, Compared::Different, Compared::Missing]);
    }

    #[test]
    fn only_the_same_number_is_equal_and_only_nulls_may_be_absent() {
        for (one, other) in [
            (r#"{"a": 1, "b": "x"}"#, r#"{"b":"x","a":1}"#),
            (r#"{"a": {"b": [1, {"c": null}]}, "n": null}"#, r#"{"a":{"b":[1,{}]}}"#),
            (r#"{"a": "é\/\n"}"#, "{\"a\":\"\\u00e9/\\n\"}"),
            (r#"{"a": [1.50, -2e2, 0.0, -0, 10, 1E+2, 0.010]}"#, r#"{"a":[1.5,-200,0,0e5,1e1,100.0,1e-2]}"#),
            (r#"[12345678901234567.01, 1e400]"#, r#"[12345678901234567.010,10e399]"#),
        ] {
            assert!(same(one.as_bytes(), other.as_bytes()), "{one} {other}");
        }
        for (one, other) in [
            (r#"{"a": 12345678901234567.01}"#, r#"{"a": 12345678901234567.02}"#),
            (r#"{"a": [{"b": 0.1}]}"#, r#"{"a": [{"b": 0.1000000000000000055511151231257827}]}"#),
            (r#"{"a": 18446744073709551617}"#, r#"{"a": 18446744073709551616}"#),
            ("[1e400]", "[1e401]"),
            ("[1]", "[-1]"),
            ("[10]", "[1]"),
            ("[1]", r#"["1"]"#),
            ("[null]", "[]"),
            ("[null]", "[false]"),
            (r#"{"a": "null"}"#, "{}"),
            (r#"{"a": 1}"#, r#"{"b": 1}"#),
            ("[1, 2]", "[2, 1]"),
            ("{}", "[]"),
            ("[1]", "[1"),
        ] {
            assert!(!same(one.as_bytes(), other.as_bytes()), "{one} {other}");
            assert!(!same(other.as_bytes(), one.as_bytes()), "{other} {one}");
        }
        // Too deep to be looked at, not too deep to be the same.
        let deep = |inner: &str| format!("{}{inner}{}", "[".repeat(10_000), "]".repeat(10_000));
        assert!(same(deep("1").as_bytes(), deep("1").as_bytes()));
        assert!(!same(deep("1").as_bytes(), deep("2").as_bytes()));
    }

    #[test]
    fn a_document_of_another_routing_is_another_document() {
        let stub = Stub::start(|_| {
            Reply::Answer(
                200,
                r#"{"docs":[{"found":true,"_routing":"x","_source":{}},{"found":true,"_routing":"x","_source":{}},{"found":true,"_source":{}}]}"#,
            )
        });
        let client = Client::new(config(&stub.url)).unwrap();
        let wanted = [("1", Some("x")), ("2", None), ("3", None)].map(|(id, routing)| Wanted {
            id: id.into(),
            routing: routing.map(String::from),
            document: b"{}".into(),
        });
        let compared = client.compare("i-1", &wanted, Compare { contents: true, routed: true }).unwrap();
        assert_eq!(compared, [Compared::Equal, Compared::Missing, Compared::Equal]);
        let asked: Value = serde_json::from_slice(&stub.seen()[0].body).unwrap();
        assert_eq!(asked, json!({"docs": [{"_id": "1", "routing": "x"}, {"_id": "2"}, {"_id": "3"}]}));
    }

    #[test]
    fn an_answer_that_does_not_fit_is_never_taken_for_missing_documents() {
        for body in [
            r#"{"docs":[]}"#,
            r#"{"docs":[{"found":true},{"found":true},{"error":{"type":"no_shard_available_action_exception"}}]}"#,
            "{}",
        ] {
            let stub = Stub::start(move |_| Reply::Answer(200, body));
            let client = Client::new(config(&stub.url)).unwrap();
            assert!(client.compare("i-1", &documents(), Compare { contents: false, ..CONTENTS }).is_err(), "{body}");
        }
    }
}
