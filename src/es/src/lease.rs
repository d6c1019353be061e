//! Who may write: one document per installation, changed only by compare-and-set, and write aliases that name the
//! generation.
//!
//! The lease decides between databases that believe to be the same one (a standby that was promoted, a restored
//! backup, a copy). Document versions carry its generation, which fences single documents; write aliases carry it too,
//! which fences the index: what the former holder still has on its way finds no alias any more.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::client::{Client, Method};
use crate::failure::{Failure, FailureKind};
use crate::name::{path_name, percent_encode};

/// The hidden index that holds the leases of all installations.
pub const LEASE_INDEX: &str = "pg_es_sync-lease";

/// The lease of one installation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Grows with each taking.
    pub generation: i64,
    /// A nonce: one server's run and one database in it.
    pub holder: String,
    /// For people: where the holder is.
    pub address: String,
    /// Grows with each renewal.
    pub beats: u64,
    /// The highest version used so far, or somewhat less: at a clean stop it is exact.
    pub version: i64,
    /// The holder has stopped and let go.
    pub released: bool,
}

/// Which state of the document was seen: what compare-and-set compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    pub seq_no: u64,
    pub primary_term: u64,
}

/// A lease as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub lease: Lease,
    pub mark: Mark,
}

#[derive(Deserialize)]
struct GetAnswer {
    found: bool,
    #[serde(rename = "_seq_no", default)]
    seq_no: u64,
    #[serde(rename = "_primary_term", default)]
    primary_term: u64,
    #[serde(rename = "_source")]
    source: Option<Lease>,
}

#[derive(Deserialize)]
struct WriteAnswer {
    #[serde(rename = "_seq_no")]
    seq_no: u64,
    #[serde(rename = "_primary_term")]
    primary_term: u64,
}

impl Client {
    /// The lease of an installation; None if there is none.
    pub fn lease(&self, installation: &str) -> Result<Option<Found>, Failure> {
        let answer = self.call(Method::Get, &lease_path("_doc", installation)?, None)?;
        if answer.status == 404 {
            // Without the document the engine's answer has no error; without the index it has one.
            return match serde_json::from_slice::<GetAnswer>(&answer.body) {
                Ok(GetAnswer { found: false, .. }) => Ok(None),
                _ => match answer.success() {
                    Err(failure) if failure.kind == FailureKind::NotFound => Ok(None),
                    Err(failure) => Err(failure),
                    Ok(_) => Ok(None),
                },
            };
        }
        let answer: GetAnswer = answer.success()?.read()?;
        let mark = Mark { seq_no: answer.seq_no, primary_term: answer.primary_term };
        Ok(answer.source.filter(|_| answer.found).map(|lease| Found { lease, mark }))
    }

    /// Writes a lease over the state that was seen (None: where there was none). Fails with `Conflict` when somebody
    /// else was first.
    pub fn write_lease(&self, installation: &str, lease: &Lease, over: Option<Mark>) -> Result<Mark, Failure> {
        let body = json!(lease);
        let path = match over {
            Some(Mark { seq_no, primary_term }) => {
                let path = lease_path("_doc", installation)?;
                format!("{path}?if_seq_no={seq_no}&if_primary_term={primary_term}")
            }
            None => {
                self.create_lease_index()?;
                lease_path("_create", installation)?
            }
        };
        let answer: WriteAnswer =
            self.call(Method::Put, &path, Some(body.to_string().as_bytes()))?.success()?.read()?;
        Ok(Mark { seq_no: answer.seq_no, primary_term: answer.primary_term })
    }

    fn create_lease_index(&self) -> Result<(), Failure> {
        let body = json!({
            "settings": {"index": {"hidden": true, "number_of_shards": 1, "auto_expand_replicas": "0-1"}},
            "mappings": {"dynamic": false, "properties": {}},
        });
        match self.create_index(LEASE_INDEX, &body) {
            Err(failure) if failure.kind == FailureKind::Exists => Ok(()),
            result => result,
        }
    }

    /// Makes generation `generation` the only one that can write to a concrete index.
    ///
    /// Fails with `NotFound` when there is no such index, with `Conflict` when it bears another installation's mark or
    /// a later generation has it.
    pub fn take_write_alias(&self, index: &str, generation: i64, installation: &str) -> Result<WriteAlias, Failure> {
        let gone = || Failure::new(FailureKind::NotFound, format!("index \"{index}\" is missing"));
        let info = self.index(index)?.filter(|info| info.name == index).ok_or_else(gone)?;
        if !info.is_of(installation) {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("index \"{index}\" was made by somebody else, or its mark of ownership is gone"),
            ));
        }
        let mine = write_alias(index, generation);
        let mut actions = Vec::new();
        for alias in &info.aliases {
            match generation_of(index, alias) {
                Some(later) if later > generation => {
                    return Err(Failure::new(
                        FailureKind::Conflict,
                        format!("index \"{index}\" is written by generation {later}, which is later than {generation}"),
                    ));
                }
                Some(earlier) if earlier < generation => {
                    actions.push(json!({"remove": {"index": index, "alias": alias}}));
                }
                _ => {}
            }
        }
        let found = info.aliases.contains(&mine);
        if !found {
            actions.push(json!({"add": {"index": index, "alias": &mine, "is_hidden": true}}));
        }
        // What was restored beside it has its aliases too, and the engine writes to neither then.
        let mut taken_from = self.alias(&mine)?;
        taken_from.retain(|other| other != index);
        actions.extend(taken_from.iter().map(|other| json!({"remove": {"index": other, "alias": mine}})));
        if !actions.is_empty() {
            self.update_aliases(&Value::Array(actions))?;
        }
        Ok(WriteAlias { uuid: info.uuid, found, taken_from })
    }

    /// [`Client::take_write_alias`] for one index among many: what is wrong with this one alone must not stop the others.
    pub fn wire(&self, index: &str, generation: i64, installation: &str) -> Result<Wired, Failure> {
        match self.take_write_alias(index, generation, installation) {
            Ok(alias) => Ok(Wired::Set(alias)),
            Err(failure) if failure.kind == FailureKind::NotFound => Ok(Wired::Missing),
            Err(failure) if failure.kind == FailureKind::Conflict => {
                Ok(Wired::Refused { reason: failure.reason, blocked: false })
            }
            Err(failure) if matches!(failure.status, Some(403 | 429)) => {
                Ok(Wired::Refused { reason: failure.reason, blocked: true })
            }
            Err(failure) => Err(failure),
        }
    }
}

/// What [`Client::take_write_alias`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteAlias {
    /// The index's own id: a restored or recreated index has another.
    pub uuid: String,
    /// The alias was there already.
    pub found: bool,
    /// Other indexes that had it.
    pub taken_from: Vec<String>,
}

/// What became of an index's write alias.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wired {
    Set(WriteAlias),
    /// There is no such index.
    Missing,
    /// It is another's; or, if `blocked`, it lets nobody change it (index.blocks.read_only), or its disk is full.
    Refused {
        reason: String,
        blocked: bool,
    },
}

/// Name of the alias through which a generation writes a concrete index.
pub fn write_alias(index: &str, generation: i64) -> String {
    format!("{index}.write-{generation}")
}

/// True if a name has the form of such an alias, whatever the index.
pub(crate) fn is_write_alias(name: &str) -> bool {
    let generation = name.rsplit_once(".write-").map(|(_, generation)| generation);
    generation.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The generation that a write alias of this index belongs to; None for another alias.
pub(crate) fn generation_of(index: &str, alias: &str) -> Option<i64> {
    alias.strip_prefix(index)?.strip_prefix(".write-")?.parse().ok()
}

fn lease_path(endpoint: &str, installation: &str) -> Result<String, Failure> {
    Ok(format!("/{}/{endpoint}/{}", path_name(LEASE_INDEX)?, percent_encode(installation)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stub::{Reply, Stub, config};

    fn lease() -> Lease {
        Lease { generation: 7, holder: "h".into(), address: "a".into(), beats: 1, version: 0, released: false }
    }

    #[test]
    fn no_document_and_no_index_are_no_lease_and_anything_else_is_a_failure() {
        for (status, body, none) in [
            (404, r#"{"_index":"pg_es_sync-lease","_id":"t","found":false}"#, true),
            (404, r#"{"error":{"type":"index_not_found_exception","reason":"no such index"},"status":404}"#, true),
            (404, "<html>wrong way</html>", false),
            (503, "{}", false),
        ] {
            let stub = Stub::start(move |_| Reply::Answer(status, body));
            let client = Client::new(config(&stub.url)).unwrap();
            assert_eq!(client.lease("t") == Ok(None), none, "{body}");
        }
    }

    #[test]
    fn a_lease_is_written_only_over_the_state_that_was_seen() {
        let stub = Stub::start(|_| {
            Reply::Answer(409, r#"{"error":{"type":"version_conflict_engine_exception","reason":"x"}}"#)
        });
        let client = Client::new(config(&stub.url)).unwrap();
        let mark = Mark { seq_no: 4, primary_term: 2 };
        let failure = client.write_lease("t/1", &lease(), Some(mark)).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Conflict);
        assert_eq!(stub.seen()[0].line, "PUT /pg_es_sync-lease/_doc/t%2F1?if_seq_no=4&if_primary_term=2");
    }

    #[test]
    fn the_generation_of_an_alias_is_read_from_its_name() {
        assert_eq!(generation_of("a-1", &write_alias("a-1", 12)), Some(12));
        assert_eq!(generation_of("a-1", "a-10.write-12"), None);
        assert_eq!(generation_of("a-1", "a"), None);
    }
}
