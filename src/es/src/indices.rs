//! Indexes, aliases, mappings.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

use crate::client::{Answer, Client, Method};
use crate::failure::{Failure, FailureKind};
use crate::name::path_name;

/// What is known of an index.
#[derive(Clone, Debug, PartialEq)]
pub struct IndexInfo {
    /// Its own name, also when it was asked for by an alias.
    pub name: String,
    pub uuid: String,
    /// `_meta` of its mapping; null when it has none.
    pub meta: Value,
    pub aliases: Vec<String>,
}

impl Client {
    /// Creates an index. `body` has settings, mappings, aliases. Fails with `Exists` when the name is taken, by an index or an
    /// alias. Does not wait until its shards have nodes: who writes to it does, and not for so long.
    pub fn create_index(&self, name: &str, body: &Value) -> Result<(), Failure> {
        self.acknowledged(Method::Put, &format!("/{}?wait_for_active_shards=0", path_name(name)?), Some(body))
    }

    /// Deletes an index by its own name; an alias is a `BadRequest`. False: it was not there.
    pub fn delete_index(&self, name: &str) -> Result<bool, Failure> {
        match self.acknowledged(Method::Delete, &format!("/{}", path_name(name)?), None) {
            Ok(()) => Ok(true),
            Err(failure) if failure.kind == FailureKind::NotFound => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    /// The index of this name, or behind this alias. Fails with `Conflict` when several are behind it.
    pub fn index(&self, name: &str) -> Result<Option<IndexInfo>, Failure> {
        let path = format!("/{}?filter_path=*.aliases,*.mappings._meta,*.settings.index.uuid", path_name(name)?);
        let Some(answer) = self.found(&path)? else {
            return Ok(None);
        };
        let mut indexes: BTreeMap<String, IndexAnswer> = answer.read()?;
        if indexes.len() > 1 {
            let names: Vec<&str> = indexes.keys().map(String::as_str).collect();
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("\"{name}\" is an alias of several indexes: {}", names.join(", ")),
            ));
        }
        Ok(indexes.pop_first().map(|(name, index)| IndexInfo {
            name,
            uuid: index.settings.index.uuid,
            meta: index.mappings.meta,
            aliases: index.aliases.into_iter().map(|(alias, _)| alias).collect(),
        }))
    }

    /// The indexes behind an alias, by their own names and in order; empty when it is no alias.
    pub fn alias(&self, alias: &str) -> Result<Vec<String>, Failure> {
        match self.found(&format!("/_alias/{}", path_name(alias)?))? {
            None => Ok(Vec::new()),
            Some(answer) => Ok(answer.read::<BTreeMap<String, Value>>()?.into_keys().collect()),
        }
    }

    /// Carries out alias actions (an array of `{"add": ...}`, `{"remove": ...}`, `{"remove_index": ...}`), all or none.
    pub fn update_aliases(&self, actions: &Value) -> Result<(), Failure> {
        self.acknowledged(Method::Post, "/_aliases", Some(&json!({ "actions": actions })))
    }

    pub fn put_settings(&self, index: &str, settings: &Value) -> Result<(), Failure> {
        self.acknowledged(Method::Put, &format!("/{}/_settings", path_name(index)?), Some(settings))
    }

    pub fn put_mapping(&self, index: &str, mapping: &Value) -> Result<(), Failure> {
        self.acknowledged(Method::Put, &format!("/{}/_mapping", path_name(index)?), Some(mapping))
    }

    /// Makes searchable what was written before. Fails with `Unavailable` when a shard did not; at once where one has no
    /// node, for which the engine would wait a minute and then say that none has failed.
    pub fn refresh(&self, index: &str) -> Result<(), Failure> {
        let name = path_name(index)?;
        let health =
            self.call(Method::Get, &format!("/_cluster/health/{name}?local=true&timeout=0s&filter_path=status"), None)?;
        // Who may not ask goes without, and what is not there (408) is missed below.
        if health.status == 200
            && serde_json::from_slice(&health.body).is_ok_and(|health: Health| health.status == "red")
        {
            let reason = format!("index \"{index}\" has a shard that is on no node");
            return Err(Failure::new(FailureKind::Unavailable, reason));
        }
        let Refreshed { shards } = self.call(Method::Post, &format!("/{name}/_refresh"), None)?.success()?.read()?;
        if shards.failed > 0 {
            let reason = format!("{} of {} shards failed", shards.failed, shards.total);
            return Err(Failure::new(FailureKind::Unavailable, reason));
        }
        Ok(())
    }

    /// An answer, or none when the engine itself says that it is not there.
    fn found(&self, path: &str) -> Result<Option<Answer>, Failure> {
        match self.call(Method::Get, path, None)?.success() {
            Ok(answer) => Ok(Some(answer)),
            Err(failure) if failure.kind == FailureKind::NotFound => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// A change of the cluster's state. Without `"acknowledged": true` not every node has it yet: outcome unknown.
    fn acknowledged(&self, method: Method, path: &str, body: Option<&Value>) -> Result<(), Failure> {
        let answer = self.call_json(method, path, body)?;
        if answer["acknowledged"] == Value::Bool(true) {
            Ok(())
        } else {
            Err(Failure::new(FailureKind::Timeout, "the change was not acknowledged by all nodes in time"))
        }
    }
}

#[derive(Deserialize)]
struct IndexAnswer {
    #[serde(default)]
    aliases: Map<String, Value>,
    #[serde(default)]
    mappings: Mappings,
    settings: Settings,
}

#[derive(Deserialize, Default)]
struct Mappings {
    #[serde(rename = "_meta", default)]
    meta: Value,
}

#[derive(Deserialize)]
struct Settings {
    index: IndexSettings,
}

#[derive(Deserialize)]
struct IndexSettings {
    uuid: String,
}

#[derive(Deserialize)]
struct Health {
    #[serde(default)]
    status: String,
}

#[derive(Deserialize)]
struct Refreshed {
    #[serde(rename = "_shards")]
    shards: Shards,
}

#[derive(Deserialize)]
struct Shards {
    failed: u64,
    #[serde(default)]
    total: u64,
}
