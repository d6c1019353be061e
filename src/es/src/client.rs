//! One request to one of the nodes.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;
use ureq::Agent;

use crate::config::{Config, ConfigError};
use crate::credentials::Credentials;
use crate::exchange::exchange;
use crate::failure::{Failure, FailureKind};
use crate::nodes::{Node, Nodes, Turn};
use crate::tls::tls_config;

/// Connections idle for longer are not used again: load balancers drop them silently after a minute at the earliest.
const MAX_IDLE: Duration = Duration::from_secs(45);

/// A connection to the engine. Clones share the keep-alive connections; any thread may use them.
///
/// Call it from threads whose signals are masked: resolving a name with a timeout spawns a thread that inherits the mask.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    config: Config,
    agent: Agent,
    nodes: Nodes,
    credentials: RwLock<Arc<Credentials>>,
    stopped: AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Get,
    Put,
    Post,
    Delete,
}

/// What the engine said, whatever its status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Answer {
    /// Itself when the status is a success (2xx), otherwise what went wrong.
    pub fn success(self) -> Result<Answer, Failure> {
        match self.status {
            200..=299 => Ok(self),
            status => Err(Failure::from_answer(status, &self.body)),
        }
    }

    /// The body, which is JSON.
    pub(crate) fn read<'a, T: Deserialize<'a>>(&'a self) -> Result<T, Failure> {
        serde_json::from_slice(&self.body).map_err(|error| Failure {
            status: Some(self.status),
            ..Failure::new(
                FailureKind::BadAnswer,
                format!("answer of {} bytes cannot be read: {error}", self.body.len()),
            )
        })
    }
}

impl Client {
    /// Reads the certificate and credential files; connects to nothing yet.
    pub fn new(config: Config) -> Result<Client, ConfigError> {
        if config.urls.is_empty() {
            return Err(ConfigError::new("no URL is given"));
        }
        let per_node = config.connections.saturating_add(2);
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // A redirect would carry the credentials elsewhere; its answer is reported as what it is.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .tls_config(tls_config(&config)?)
            .timeout_resolve(Some(config.connect_timeout))
            .timeout_connect(Some(config.connect_timeout))
            .timeout_global(Some(config.request_timeout))
            .max_idle_connections_per_host(per_node)
            .max_idle_connections(per_node.saturating_mul(config.urls.len()))
            .max_idle_age(MAX_IDLE)
            .user_agent(concat!("pg_es_sync/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Ok(Client(Arc::new(Inner {
            agent,
            nodes: Nodes::new(&config.urls),
            credentials: RwLock::new(Arc::new(Credentials::read(&config)?)),
            stopped: AtomicBool::new(false),
            config,
        })))
    }

    /// Makes every later request, and those in flight, fail with `Shutdown`. Does not interrupt a TCP connect or a name
    /// resolution; these end by `connect_timeout`.
    pub fn shutdown(&self) {
        self.0.stopped.store(true, Ordering::SeqCst);
        self.0.agent.clone().shutdown();
    }

    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Sends one request and reads its answer, whatever status it has. `path_and_query` begins with "/", percent-encoded.
    ///
    /// Nodes take turns. One that cannot be connected to is passed over; once a byte that matters may have been sent, the
    /// request is not sent again. One that gave no answer, or 502 to 504, comes last for the requests that follow. After a
    /// 401 the credential files are read again, and if they changed the request is sent once more.
    pub fn call(&self, method: Method, path_and_query: &str, body: Option<&[u8]>) -> Result<Answer, Failure> {
        let credentials = self.credentials();
        let answer = self.call_with(&credentials, method, path_and_query, body)?;
        if answer.status != 401 {
            return Ok(answer);
        }
        match self.reread_credentials(&credentials) {
            Ok(Some(fresh)) => self.call_with(&fresh, method, path_and_query, body),
            Ok(None) => Ok(answer),
            Err(error) => {
                Err(Failure { status: Some(401), ..Failure::new(FailureKind::Unauthorized, error.to_string()) })
            }
        }
    }

    /// [`Client::call`] with JSON both ways; a status that is no success is a failure.
    pub fn call_json(&self, method: Method, path_and_query: &str, body: Option<&Value>) -> Result<Value, Failure> {
        let bytes = body.map(|body| body.to_string().into_bytes());
        self.call(method, path_and_query, bytes.as_deref())?.success()?.read()
    }

    fn credentials(&self) -> Arc<Credentials> {
        self.0.credentials.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Those to use instead of `refused`, or none when the files still say the same.
    fn reread_credentials(&self, refused: &Credentials) -> Result<Option<Arc<Credentials>>, ConfigError> {
        let fresh = Arc::new(Credentials::read(&self.0.config)?);
        if *fresh == *refused {
            return Ok(None);
        }
        *self.0.credentials.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = fresh.clone();
        Ok(Some(fresh))
    }

    fn call_with(
        &self,
        credentials: &Credentials,
        method: Method,
        path: &str,
        body: Option<&[u8]>,
    ) -> Result<Answer, Failure> {
        let mut unreachable = None;
        let nodes = self.0.nodes.in_turn(Instant::now());
        for (place, node) in nodes.iter().enumerate() {
            if self.0.stopped.load(Ordering::SeqCst) {
                break;
            }
            let is_last = place + 1 == nodes.len();
            match if is_last { Turn::Use } else { node.turn() } {
                Turn::Use => {}
                Turn::Skip => continue,
                Turn::Try => {
                    if !self.tries(node, credentials) {
                        node.answered(false);
                        continue;
                    }
                }
            }
            let result = self.call_node(node, credentials, method, path, body, None);
            node.answered(does_its_work(&result));
            match result {
                Err(failure) if failure.kind == FailureKind::Unreachable => unreachable = Some(failure),
                result => return result,
            }
        }
        Err(match unreachable {
            Some(failure) if !self.0.stopped.load(Ordering::SeqCst) => failure,
            _ => stopped(),
        })
    }

    /// Whether a node that failed answers again, and soon. A request is not risked for that: it may wait long for its
    /// answer, and its outcome be unknown then.
    fn tries(&self, node: &Node, credentials: &Credentials) -> bool {
        let limit = self.0.config.connect_timeout.min(self.0.config.request_timeout);
        does_its_work(&self.call_node(node, credentials, Method::Get, "/", None, Some(limit)))
    }

    fn call_node(
        &self,
        node: &Node,
        credentials: &Credentials,
        method: Method,
        path: &str,
        body: Option<&[u8]>,
        limit: Option<Duration>,
    ) -> Result<Answer, Failure> {
        exchange(&self.0.agent, &node.url, credentials, method, path, body, limit)
            .map_err(|failure| if self.0.stopped.load(Ordering::SeqCst) { stopped() } else { failure })
    }
}

/// False where another node may do what this one did not. What it says of a request, however bad, is an answer.
fn does_its_work(result: &Result<Answer, Failure>) -> bool {
    match result {
        Ok(answer) => !(502..=504).contains(&answer.status),
        Err(failure) => failure.kind == FailureKind::Shutdown,
    }
}

fn stopped() -> Failure {
    Failure::new(FailureKind::Shutdown, "the engine client was shut down")
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("urls", &self.0.config.urls).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
