//! Elasticsearch and OpenSearch: one of each is shared by a whole run; a test that stops its engine starts its own.

use crate::{process, wait};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use ureq::Agent;
use ureq::http::Request;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    Elasticsearch,
    OpenSearch,
}

/// A document's id and routing: what it is found by.
pub type Place = (String, Option<String>);

pub struct Engine {
    product: Product,
    url: String,
    agent: Agent,
    own: Option<Own>,
}

/// A process of one's own. Its data outlives a stop.
struct Own {
    port: u16,
    folder: TempDir,
    secured: bool,
    process: Option<Child>,
}

impl Engine {
    /// The run's shared Elasticsearch. Names of indexes in it need [`crate::unique`].
    pub fn elasticsearch() -> Engine {
        Engine::shared(Product::Elasticsearch, "ES_URL")
    }

    /// The run's shared OpenSearch.
    pub fn opensearch() -> Engine {
        Engine::shared(Product::OpenSearch, "OPENSEARCH_URL")
    }

    fn shared(product: Product, variable: &str) -> Engine {
        let url = std::env::var(variable)
            .unwrap_or_else(|_| panic!("{variable} is not set: run these tests with `make test-e2e`"));
        Engine { product, url: url.trim_end_matches('/').into(), agent: agent(), own: None }
    }

    /// An engine that this test may stop and start; it takes 10 to 25 s to start.
    pub fn private(product: Product) -> Engine {
        Engine::private_with(product, false)
    }

    /// An Elasticsearch of one's own whose security is switched on and lets everybody in, as the user "anyone".
    pub fn secured() -> Engine {
        Engine::private_with(Product::Elasticsearch, true)
    }

    fn private_with(product: Product, secured: bool) -> Engine {
        let port = process::free_port();
        let own = Own { port, folder: process::server_folder("engine"), secured, process: None };
        let mut engine = Engine { product, url: format!("http://127.0.0.1:{port}"), agent: agent(), own: Some(own) };
        engine.start();
        engine
    }

    /// Starts a private engine on the port and data it had.
    #[track_caller]
    pub fn start(&mut self) {
        let url = format!("{}/_cluster/health?wait_for_status=yellow&timeout=1s", self.url);
        let own = self.own.as_mut().expect("only a private engine can be started");
        assert!(own.process.is_none(), "the engine runs already");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/engine.sh");
        let output = own.folder.path().join("output");
        let file = std::fs::File::create(&output).expect("could not create the engine's output file");
        // The script becomes the engine, whose death signal setpriv sets anew.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM"]).arg(script);
        command.arg(match self.product {
            Product::Elasticsearch => "elasticsearch",
            Product::OpenSearch => "opensearch",
        });
        command.arg(own.folder.path()).arg(own.port.to_string());
        command.env("DIST", process::setting("ENGINES")).env("HEAP", "512m").env("SECURITY", own.secured.to_string());
        command.stdin(Stdio::null()).stdout(file.try_clone().expect("could not share a file")).stderr(file);
        let mut child = process::spawn(command).expect("could not start the engine");
        let agent = &self.agent;
        wait::until("the engine answers", Duration::from_secs(150), || {
            if let Some(status) = child.try_wait().expect("could not look after the engine") {
                let text = std::fs::read_to_string(&output).unwrap_or_default();
                panic!("the engine ended while it started ({status}):\n{text}");
            }
            agent.get(&url).call().is_ok_and(|answer| answer.status() == 200)
        });
        own.process = Some(child);
    }

    /// Stops a private engine; `signal` is "TERM" or "KILL".
    #[track_caller]
    pub fn stop(&mut self, signal: &str) {
        let own = self.own.as_mut().expect("only a private engine can be stopped");
        own.stop(signal);
    }

    pub fn product(&self) -> Product {
        self.product
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Any request, to a path that begins with a slash. Returns status and body (null if empty, text if no JSON).
    #[track_caller]
    pub fn request(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let request = Request::builder().method(method).uri(format!("{}{path}", self.url));
        let answer = match body {
            Some(body) => self.agent.run(
                request.header("content-type", "application/json").body(body.to_string()).expect("a request's parts"),
            ),
            None => self.agent.run(request.body(()).expect("a request's parts")),
        };
        let mut answer = answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        let text = answer.body_mut().with_config().limit(1 << 30).read_to_string();
        let text = text.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        let body = match text.is_empty() {
            true => Value::Null,
            false => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        };
        (answer.status().as_u16(), body)
    }

    #[track_caller]
    fn expect_success(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let (status, answer) = self.request(method, path, body);
        assert!(status < 400, "{method} {path} was answered {status}: {answer}");
        answer
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        self.expect_success("GET", path, None)
    }

    #[track_caller]
    pub fn post(&self, path: &str, body: Value) -> Value {
        self.expect_success("POST", path, Some(body))
    }

    #[track_caller]
    pub fn put(&self, path: &str, body: Value) -> Value {
        self.expect_success("PUT", path, Some(body))
    }

    #[track_caller]
    pub fn delete(&self, path: &str) -> Value {
        self.expect_success("DELETE", path, None)
    }

    /// Whether an index or alias of that name exists.
    pub fn exists(&self, index: &str) -> bool {
        self.request("HEAD", &format!("/{index}"), None).0 == 200
    }

    /// The indexes behind an alias, sorted.
    pub fn indexes_of(&self, alias: &str) -> Vec<String> {
        let (status, answer) = self.request("GET", &format!("/_alias/{alias}"), None);
        if status == 404 {
            return Vec::new();
        }
        answer.as_object().map(|object| object.keys().cloned().collect()).unwrap_or_default()
    }

    #[track_caller]
    pub fn refresh(&self, index: &str) {
        self.expect_success("POST", &format!("/{index}/_refresh"), None);
    }

    /// A document's `_source`, byte for byte; None if there is no such document.
    #[track_caller]
    pub fn source(&self, index: &str, id: &str) -> Option<String> {
        let id: String = id.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let url = format!("{}/{index}/_source/{id}", self.url);
        let mut answer = self.agent.get(&url).call().unwrap_or_else(|error| panic!("GET {url}: {error}"));
        let found = answer.status() == 200;
        let text = answer.body_mut().with_config().limit(1 << 30).read_to_string();
        let text = text.unwrap_or_else(|error| panic!("GET {url}: {error}"));
        found.then_some(text)
    }

    /// Ids that a query finds as things are, without a refresh: what a user would see. Sorted, at most 10,000.
    #[track_caller]
    pub fn search_ids(&self, index: &str, query: Value) -> Vec<String> {
        let answer = self.post(&format!("/{index}/_search"), json!({"query": query, "size": 10000, "_source": false}));
        let hits = answer["hits"]["hits"].as_array().expect("an answer has hits");
        let mut ids: Vec<String> = hits.iter().map(|hit| hit["_id"].as_str().unwrap_or_default().into()).collect();
        ids.sort();
        ids
    }

    /// How many documents there are, after a refresh.
    #[track_caller]
    pub fn count(&self, index: &str) -> u64 {
        self.refresh(index);
        self.get(&format!("/{index}/_count"))["count"].as_u64().expect("an answer has a count")
    }

    /// Every document by id, after a refresh. Panics if an id is there twice (under two routings).
    #[track_caller]
    pub fn documents(&self, index: &str) -> BTreeMap<String, Value> {
        let mut documents = BTreeMap::new();
        for ((id, _), document) in self.places(index) {
            let before = documents.insert(id.clone(), document);
            assert!(before.is_none(), "{index} has two documents with the id {id:?}");
        }
        documents
    }

    /// Every document under its id and routing, on whatever shard, after a refresh.
    #[track_caller]
    pub fn places(&self, index: &str) -> BTreeMap<Place, Value> {
        self.refresh(index);
        let mut places = BTreeMap::new();
        let mut page = self.post(&format!("/{index}/_search?scroll=1m"), json!({"size": 5000, "sort": ["_doc"]}));
        loop {
            let scroll = page["_scroll_id"].as_str().expect("an answer has a scroll id").to_owned();
            let hits = page["hits"]["hits"].as_array_mut().map(std::mem::take).unwrap_or_default();
            if hits.is_empty() {
                self.request("DELETE", "/_search/scroll", Some(json!({"scroll_id": scroll})));
                return places;
            }
            for mut hit in hits {
                let id = hit["_id"].as_str().expect("a hit has an id").to_owned();
                let place = (id, hit["_routing"].as_str().map(str::to_owned));
                let before = places.insert(place, hit["_source"].take());
                assert!(before.is_none(), "{index} has twice the document {hit}");
            }
            page = self.post("/_search/scroll", json!({"scroll": "1m", "scroll_id": scroll}));
        }
    }
}

impl Own {
    fn stop(&mut self, signal: &str) {
        let Some(mut child) = self.process.take() else {
            return;
        };
        // Elasticsearch's server is a child of its launcher, and ends when that is gone; a KILL has to reach both.
        if signal == "KILL" {
            let _ = Command::new("pkill").args(["-KILL", "-P", &child.id().to_string()]).status();
        }
        process::signal(child.id(), signal);
        for _ in 0..300 {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        process::signal(child.id(), "KILL");
        let _ = child.wait();
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.stop("KILL");
    }
}

fn agent() -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        // Elasticsearch wants bodies with GET and DELETE in places.
        .allow_non_standard_methods(true)
        .timeout_global(Some(Duration::from_secs(120)))
        .build()
        .into()
}
