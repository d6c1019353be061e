//! The engine without us: the same documents, ready as bulk bodies, over keep-alive connections.

use es::{Body, Client, Config, Method};
use pg_es_sync_tests::{Engine, unique};
use postgres::fallible_iterator::FallibleIterator;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Connections that a client keeps open.
const MOST_CONNECTIONS: usize = 8;

/// A document's id and its JSON.
pub type Document = (String, String);

/// How the bodies are sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Way {
    pub connections: usize,
    pub megabytes: usize,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plural = if self.connections == 1 { "" } else { "s" };
        write!(f, "{} connection{plural}, bodies of {} MB", self.connections, self.megabytes)
    }
}

pub fn client(url: &str) -> Client {
    let config = Config {
        urls: es::parse_urls(url).expect("the engine's address"),
        username: None,
        password_file: None,
        api_key_file: None,
        ca_file: None,
        client_cert_file: None,
        client_key_file: None,
        headers_file: None,
        connect_timeout: Duration::from_secs(5),
        request_timeout: Duration::from_secs(60),
        connections: MOST_CONNECTIONS,
    };
    Client::new(config).expect("a client")
}

/// Mapping and settings of an index that the extension made.
pub fn alike(engine: &Engine, index: &str) -> Value {
    let mut body = engine.get(&format!("/{index}")).get_mut(index).map(Value::take).expect("an index");
    for name in ["creation_date", "provided_name", "uuid", "version"] {
        body["settings"]["index"].as_object_mut().expect("an index has settings").remove(name);
    }
    json!({"settings": body["settings"], "mappings": body["mappings"]})
}

/// As the extension has it during a load.
const REFRESH: &str = "2s";

/// Makes an index as the extension does for a load; its name.
pub fn create_index(engine: &Engine, alike: &Value) -> String {
    let name = unique("raw");
    let mut index = alike.clone();
    index["settings"]["index"]["refresh_interval"] = json!(REFRESH);
    index["settings"]["index"]["number_of_replicas"] = json!("0");
    engine.put(&format!("/{name}"), index);
    name
}

/// Gives it what the live index gets after a load.
pub fn go_live(engine: &Engine, index: &str, alike: &Value) {
    let live = &alike["settings"]["index"];
    let settings =
        json!({"refresh_interval": live["refresh_interval"], "number_of_replicas": live["number_of_replicas"]});
    engine.put(&format!("/{index}/_settings"), json!({ "index": settings }));
}

/// Bulk bodies of about `megabytes`, with external versions as ours have them.
pub fn bodies(documents: &[Document], megabytes: usize, version: i64) -> Vec<Body> {
    let mut bodies = vec![Body::new()];
    for (id, document) in documents {
        add(&mut bodies, megabytes, version, id, document);
    }
    bodies
}

/// The same for a query of ids and documents, which need not fit into memory twice.
pub fn bodies_of(client: &mut postgres::Client, query: &str, megabytes: usize, version: i64) -> Vec<Body> {
    let rows = client.query_raw(query, std::iter::empty::<String>());
    let mut rows = rows.expect("could not read the documents");
    let mut bodies = vec![Body::new()];
    while let Some(row) = rows.next().expect("could not read a document") {
        add(&mut bodies, megabytes, version, row.get(0), row.get(1));
    }
    bodies
}

fn add(bodies: &mut Vec<Body>, megabytes: usize, version: i64, id: &str, document: &str) {
    if bodies.last().is_some_and(|body| body.len() >= megabytes << 20) {
        bodies.push(Body::new());
    }
    if let Some(body) = bodies.last_mut() {
        body.index(id, None, version, document.as_bytes());
    }
}

/// Sends them all; how long that took.
pub fn send(client: &Client, index: &str, bodies: &[Body], connections: usize) -> Duration {
    let next = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..connections {
            scope.spawn(|| {
                while let Some(body) = bodies.get(next.fetch_add(1, Ordering::Relaxed)) {
                    one(client, index, body);
                }
            });
        }
    });
    start.elapsed()
}

/// Sends one. The shortest answer that says whether all went well.
pub fn one(client: &Client, index: &str, body: &Body) {
    let path = format!("/{index}/_bulk?filter_path=errors");
    let answer = client.call(Method::Post, &path, Some(body.as_bytes())).expect("_bulk");
    assert_eq!(answer.success().expect("_bulk").body, b"{\"errors\":false}");
}
