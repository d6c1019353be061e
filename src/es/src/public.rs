//! The public name, under which users search: which index is behind it, and whose that is.
//!
//! An index bears a mark (`_meta.pg_es_sync`): the installation that made it, and the public name it was made for. What
//! is behind a name is asked each time, never remembered: people and other installations move aliases too.

use serde_json::{Value, json};

use crate::client::Client;
use crate::failure::{Failure, FailureKind};
use crate::indices::IndexInfo;
use crate::lease::generation_of;

/// What became of an index that a build had made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is gone, or somebody else's by now.
    Gone,
    /// It is there, and this generation writes to it.
    Ready,
    /// It is behind its public name already.
    Live,
}

impl IndexInfo {
    /// Whether this installation made it.
    pub(crate) fn is_of(&self, installation: &str) -> bool {
        self.meta["pg_es_sync"]["installation"] == installation
    }

    /// Whether this installation made it for this very name.
    fn is_made_for(&self, public: &str, installation: &str) -> bool {
        self.is_of(installation) && self.meta["pg_es_sync"]["index"] == public
    }

    /// Whether it bears the mark and the name that a build gives: such a one is replaced by the next build, and dropped
    /// with the attachment. What else is behind the name has come there by hand (an alias of another table's index, a
    /// snapshot that was restored beside ours) and is not to be deleted.
    fn is_former(&self, public: &str, installation: &str) -> bool {
        let number = self.name.strip_prefix(public).and_then(|rest| rest.strip_prefix('-')).unwrap_or_default();
        self.is_made_for(public, installation) && !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    }

    fn maker(&self, installation: &str) -> String {
        match self.meta["pg_es_sync"]["index"].as_str() {
            Some(other) if self.is_of(installation) => format!("was made for \"{other}\""),
            _ => "another installation made".to_owned(),
        }
    }
}

impl Client {
    /// The alias actions that take everything but `index` away from behind the public name. Fails with `Config` where
    /// the name belongs to somebody else; `adopt` takes it over.
    pub fn make_room(&self, public: &str, index: &str, installation: &str, adopt: bool) -> Result<Vec<Value>, Failure> {
        let refuse = |why: String| Err(Failure::new(FailureKind::Config, why));
        let behind = self.alias(public)?;
        let mut actions = Vec::new();
        for old in behind.iter().filter(|old| *old != index) {
            let Some(info) = self.index(old)? else { continue };
            actions.push(if info.is_former(public, installation) {
                json!({"remove_index": {"index": old}})
            } else if adopt || info.is_made_for(public, installation) {
                json!({"remove": {"index": old, "alias": public}})
            } else {
                let why = format!("\"{public}\" is an alias of index \"{old}\", which {}", info.maker(installation));
                return refuse(format!("{why}; option \"adopt\" takes it over"));
            });
        }
        let own = if behind.is_empty() { self.index(public)?.filter(|info| info.name == public) } else { None };
        if let Some(info) = own {
            if info.is_of(installation) && !info.is_made_for(public, installation) {
                return refuse(format!("\"{public}\" is an index that {}", info.maker(installation)));
            }
            if !adopt {
                let why = format!("\"{public}\" exists in the engine as an index of its own");
                return refuse(format!("{why}; option \"adopt\" replaces it"));
            }
            actions.push(json!({"remove_index": {"index": public}}));
        }
        Ok(actions)
    }

    /// Puts an index behind the public name and drops what was there, in one call. May be repeated after a lost answer.
    pub fn swap(&self, public: &str, index: &str, installation: &str, adopt: bool) -> Result<(), Failure> {
        if self.alias(public)? == [index] {
            return Ok(());
        }
        let mut actions = self.make_room(public, index, installation, adopt)?;
        actions.push(json!({"add": {"index": index, "alias": public}}));
        // What is searchable in the old index must not be missing in the new one for a while.
        self.refresh(index)?;
        self.update_aliases(&Value::Array(actions))?;
        if self.alias(public)? == [index] {
            Ok(())
        } else {
            let why = format!("the engine did not put \"{index}\" behind \"{public}\"");
            Err(Failure::new(FailureKind::BadAnswer, why))
        }
    }

    /// Whether the index of an interrupted build still stands. If so, this generation can write to it.
    pub fn standing(&self, index: &str, generation: i64, installation: &str) -> Result<Standing, Failure> {
        match self.take_write_alias(index, generation, installation) {
            Ok(_) => {}
            Err(failure) if matches!(failure.kind, FailureKind::NotFound | FailureKind::Conflict) => {
                return Ok(Standing::Gone);
            }
            Err(failure) => return Err(failure),
        }
        let Some(info) = self.index(index)? else { return Ok(Standing::Gone) };
        let public = info.meta["pg_es_sync"]["index"].as_str().unwrap_or_default();
        Ok(if info.aliases.iter().any(|name| name == public) { Standing::Live } else { Standing::Ready })
    }

    /// Drops an abandoned build, never what is behind the public name, or what a later generation writes to.
    pub fn drop_unless_live(
        &self,
        index: &str,
        public: &str,
        installation: &str,
        generation: i64,
    ) -> Result<(), Failure> {
        let info = match self.index(index) {
            // An alias of several indexes, so somebody else's.
            Err(failure) if failure.kind == FailureKind::Conflict => None,
            info => info?,
        };
        let is_used = |alias: &String| alias == public || generation_of(index, alias) > Some(generation);
        if let Some(info) = info
            && info.name == index
            && info.is_former(public, installation)
            && !info.aliases.iter().any(is_used)
        {
            self.delete_index(index)?;
        }
        Ok(())
    }

    /// Drops what was built for a public name and is behind it.
    pub fn drop_public(&self, public: &str, installation: &str) -> Result<(), Failure> {
        for index in self.alias(public)? {
            if self.index(&index)?.is_some_and(|info| info.is_former(public, installation)) {
                self.delete_index(&index)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stub::{Reply, Stub, config};
    use std::sync::atomic::{AtomicBool, Ordering};

    const MISSING: Reply = Reply::Answer(404, r#"{"error":"alias [t] missing","status":404}"#);
    /// Three indexes behind "t": built for it, renamed by a restore, another table's.
    const BEHIND: &str = r#"{"t-1":{},"restored":{},"u-1":{}}"#;

    fn answer(line: &str) -> Reply {
        let body = match line.split('?').next().unwrap_or_default() {
            "GET /t-1" => {
                r#"{"t-1":{"aliases":{"t":{}},"mappings":{"_meta":{"pg_es_sync":{"installation":"me","index":"t"}}},"settings":{"index":{"uuid":"a"}}}}"#
            }
            "GET /restored" => {
                r#"{"restored":{"mappings":{"_meta":{"pg_es_sync":{"installation":"me","index":"t"}}},"settings":{"index":{"uuid":"b"}}}}"#
            }
            "GET /u-1" => {
                r#"{"u-1":{"mappings":{"_meta":{"pg_es_sync":{"installation":"me","index":"u"}}},"settings":{"index":{"uuid":"c"}}}}"#
            }
            "GET /u-2" => {
                r#"{"u-2":{"aliases":{"u-2.write-7":{}},"mappings":{"_meta":{"pg_es_sync":{"installation":"me","index":"u"}}},"settings":{"index":{"uuid":"d"}}}}"#
            }
            "GET /u-3" => r#"{"a":{"settings":{"index":{"uuid":"e"}}},"b":{"settings":{"index":{"uuid":"f"}}}}"#,
            "GET /_cluster/health/t-2" => r#"{"status":"green"}"#,
            "POST /t-2/_refresh" => r#"{"_shards":{"failed":0}}"#,
            _ => r#"{"acknowledged":true}"#,
        };
        Reply::Answer(200, body)
    }

    fn client(stub: &Stub) -> Client {
        Client::new(config(&stub.url)).unwrap()
    }

    #[test]
    fn a_swap_drops_what_was_built_for_the_name_and_only_unlinks_the_rest() {
        let swapped = AtomicBool::new(false);
        let stub = Stub::start(move |seen| match seen.line.as_str() {
            "GET /_alias/t" if swapped.load(Ordering::SeqCst) => Reply::Answer(200, r#"{"t-2":{}}"#),
            "GET /_alias/t" => Reply::Answer(200, BEHIND),
            line => {
                swapped.fetch_or(line == "POST /_aliases", Ordering::SeqCst);
                answer(line)
            }
        });
        client(&stub).swap("t", "t-2", "me", true).unwrap();
        let seen = stub.seen();
        let actions = seen.iter().find(|seen| seen.line == "POST /_aliases").unwrap();
        assert_eq!(
            serde_json::from_slice::<Value>(&actions.body).unwrap(),
            json!({"actions": [
                {"remove": {"index": "restored", "alias": "t"}},
                {"remove_index": {"index": "t-1"}},
                {"remove": {"index": "u-1", "alias": "t"}},
                {"add": {"index": "t-2", "alias": "t"}},
            ]})
        );
        let asked = seen.len();
        client(&stub).swap("t", "t-2", "me", true).unwrap();
        assert_eq!(stub.seen().len(), asked + 1, "it was done a second time");
    }

    #[test]
    fn a_name_that_is_somebody_elses_is_refused() {
        let stub = Stub::start(|seen| match seen.line.as_str() {
            "GET /_alias/t" => Reply::Answer(200, BEHIND),
            "GET /_alias/restored" | "GET /_alias/u-1" => MISSING,
            line => answer(line),
        });
        for (public, installation, adopt, why) in [
            ("t", "me", false, "\"t\" is an alias of index \"u-1\", which was made for \"u\""),
            ("t", "you", false, "\"t\" is an alias of index \"restored\", which another installation made"),
            ("u-1", "me", true, "\"u-1\" is an index that was made for \"u\""),
            ("u-1", "you", false, "\"u-1\" exists in the engine as an index of its own"),
        ] {
            let failure = client(&stub).make_room(public, "x-1", installation, adopt).unwrap_err();
            assert_eq!(failure.kind, FailureKind::Config);
            assert!(failure.reason.starts_with(why), "{failure}");
        }
        let actions = client(&stub).make_room("u-1", "x-1", "you", true).unwrap();
        assert_eq!(actions, [json!({"remove_index": {"index": "u-1"}})]);
    }

    #[test]
    fn only_what_was_built_for_the_name_is_dropped_and_nothing_that_is_live() {
        let stub = Stub::start(|seen| match seen.line.as_str() {
            "GET /_alias/t" => Reply::Answer(200, BEHIND),
            line => answer(line),
        });
        let deleted = |stub: &Stub| {
            let lines = stub.seen().into_iter().map(|seen| seen.line);
            lines.filter(|line| line.starts_with("DELETE")).collect::<Vec<_>>()
        };
        client(&stub).drop_unless_live("t-1", "t", "me", 7).unwrap();
        client(&stub).drop_unless_live("u-1", "t", "me", 7).unwrap();
        client(&stub).drop_unless_live("u-1", "u", "you", 7).unwrap();
        client(&stub).drop_unless_live("u-2", "u", "me", 6).unwrap();
        client(&stub).drop_unless_live("u-3", "u", "me", 7).unwrap();
        client(&stub).drop_public("t", "you").unwrap();
        assert_eq!(deleted(&stub), [""; 0]);
        client(&stub).drop_unless_live("u-1", "u", "me", 7).unwrap();
        client(&stub).drop_unless_live("u-2", "u", "me", 7).unwrap();
        client(&stub).drop_public("t", "me").unwrap();
        assert_eq!(deleted(&stub), ["DELETE /u-1", "DELETE /u-2", "DELETE /t-1"]);
    }
}
