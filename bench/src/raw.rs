//! The engine without us: the same documents, ready as bulk bodies, over keep-alive connections.

use es::{Body, Client, Config, Method};
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

/// Bulk bodies of about `megabytes`, with external versions as ours have them.
pub fn bodies(documents: &[Document], megabytes: usize, version: i64) -> Vec<Body> {
    let mut bodies = vec![Body::new()];
    for (id, document) in documents {
        if bodies.last().is_some_and(|body| body.len() >= megabytes << 20) {
            bodies.push(Body::new());
        }
        if let Some(body) = bodies.last_mut() {
            body.index(id, None, version, document.as_bytes());
        }
    }
    bodies
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
