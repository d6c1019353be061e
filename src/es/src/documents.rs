//! Reading documents back, to compare them with what they should be.

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
        let got: MultiGet = read(&answer.body)?;
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
        let answer: Scrolled = read(&answer.body)?;
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
    expected == found
        || matches!(
            (serde_json::from_slice::<Value>(expected), serde_json::from_slice::<Value>(found)),
            (Ok(expected), Ok(found)) if without_nulls(&expected) == without_nulls(&found)
        )
}

fn without_nulls(document: &Value) -> Value {
    match document {
        Value::Object(fields) => {
            let fields = fields.iter().filter(|(_, value)| !value.is_null());
            Value::Object(fields.map(|(name, value)| (name.clone(), value.clone())).collect())
        }
        other => other.clone(),
    }
}

fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Failure> {
    serde_json::from_slice(body)
        .map_err(|error| Failure::new(FailureKind::BadAnswer, format!("answer cannot be read: {error}")))
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
