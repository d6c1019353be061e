//! The worker's connection to the engine: settings, sender threads, breaker, sizing.

use std::time::{Duration, Instant};

use es::{Backoff, Breaker, Client, EngineInfo, Event, Failure, Output, Permit, Product, Senders, Sizing};

use crate::document::shape::Dialect;
use crate::settings;

/// A bulk request that takes longer than this makes the next ones smaller, and its index waits for the answer.
pub const SLOW: Duration = Duration::from_secs(5);
/// First wait after a failure.
const RETRY_BASE: Duration = Duration::from_millis(100);
/// How long threads may take to stop; those that are stuck in a connect are left behind.
const STOP_GRACE: Duration = Duration::from_millis(100);

/// A live connection to the engine.
pub struct Engine {
    pub senders: Senders,
    pub breaker: Breaker,
    pub sizing: Sizing,
    pub backoff: Backoff,
    pub random: fastrand::Rng,
    config: es::Config,
    info: Info,
    next_token: u64,
    /// `es_sync.bulk_bytes` when this was started.
    max_body: usize,
    /// What the engine takes in one request, in bytes.
    pub max_content: usize,
}

enum Info {
    Unknown {
        due: Instant,
    },
    Asked(u64),
    /// It was known, and may have gone away.
    AskedAgain(u64),
    Known(Dialect),
}

impl Engine {
    /// Starts the sender threads; nothing is asked of the engine yet.
    ///
    /// # Errors
    /// A setting is wrong or a file unreadable: a sentence for status and log.
    pub fn start() -> Result<Self, String> {
        let config = settings::engine().map_err(|error| error.to_string())?;
        let client = Client::new(config.clone()).map_err(|error| error.to_string())?;
        // The lease cannot wait as long as a bulk request may take.
        let limit = (settings::lease_timeout() / 3).min(config.request_timeout);
        let urgent =
            es::Config { request_timeout: limit, connect_timeout: limit.min(config.connect_timeout), ..config.clone() };
        let urgent = Client::new(urgent).map_err(|error| error.to_string())?;
        let senders =
            Senders::start(client, urgent).map_err(|error| format!("could not start sender threads: {error}"))?;
        let backoff = Backoff { base: RETRY_BASE, max: settings::retry_max_delay() };
        let max_body = settings::bulk_bytes();
        Ok(Self {
            senders,
            breaker: Breaker::new(backoff),
            sizing: Sizing::new(max_body.min(es::DEFAULT_MAX_CONTENT), config.connections, SLOW),
            backoff,
            random: fastrand::Rng::new(),
            config,
            info: Info::Unknown { due: Instant::now() },
            next_token: 0,
            max_body,
            max_content: es::DEFAULT_MAX_CONTENT,
        })
    }

    /// True if the settings are still those that this was started with.
    pub fn is_current(&self) -> bool {
        settings::engine().is_ok_and(|config| config == self.config) && self.max_body == settings::bulk_bytes()
    }

    pub fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Has `work` done by the calls' thread; its token.
    pub fn call<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&Client) -> Result<T, Failure> + Send + 'static,
    ) -> u64 {
        let token = self.token();
        self.senders.call(token, work);
        token
    }

    /// As `call`, in the thread for what must not wait.
    pub fn call_urgent<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&Client) -> Result<T, Failure> + Send + 'static,
    ) -> u64 {
        let token = self.token();
        self.senders.call_urgent(token, work);
        token
    }

    /// The settings that this was started with.
    pub fn config(&self) -> &es::Config {
        &self.config
    }

    /// Which product it is, once it has said so.
    pub fn dialect(&self) -> Option<Dialect> {
        match self.info {
            Info::Known(dialect) => Some(dialect),
            _ => None,
        }
    }

    /// Asks the engine who it is, if that is not known; when to come again.
    pub fn identify(&mut self, now: Instant) -> Option<Instant> {
        match self.info {
            Info::Unknown { due } if due <= now => {
                self.info = Info::Asked(self.ask());
                None
            }
            Info::Unknown { due } => Some(due),
            _ => None,
        }
    }

    fn ask(&mut self) -> u64 {
        self.call(Client::info)
    }

    /// True unless the engine is known to be away: a lease must be renewed while it is asked once more, for that may take
    /// as long as a request may.
    pub fn may_be_there(&self) -> bool {
        matches!(self.info, Info::Known(_) | Info::AskedAgain(_))
    }

    /// Takes the answer to `identify`; None if the token is not its. Says which engine it is, or what went wrong.
    pub fn identified(
        &mut self,
        token: u64,
        result: &Result<Output, Failure>,
        now: Instant,
    ) -> Option<Result<String, String>> {
        if !matches!(self.info, Info::Asked(asked) | Info::AskedAgain(asked) if asked == token) {
            return None;
        }
        Some(match result {
            Ok(output) => {
                let info: &EngineInfo = output.get();
                let (dialect, product) = match info.product {
                    Product::OpenSearch => (Dialect::OpenSearch, "OpenSearch"),
                    Product::Elasticsearch => (Dialect::Elasticsearch, "Elasticsearch"),
                };
                self.info = Info::Known(dialect);
                // What was found by trying stays: it is asked after each failure.
                if info.max_content_length != self.max_content {
                    self.max_content = info.max_content_length;
                    let most = self.max_body.min(self.max_content);
                    self.sizing = Sizing::new(most, self.config.connections, SLOW);
                }
                self.breaker.success();
                Ok(format!("{product} {}", info.version))
            }
            Err(failure) => {
                self.breaker.failure(now);
                let due = now + self.backoff.delay(self.breaker.failures().min(8), &mut self.random);
                self.info = Info::Unknown { due };
                Err(failure.to_string())
            }
        })
    }

    /// Asks again who the engine is, to learn whether it answers while there is nothing else to send.
    pub fn probe(&mut self, now: Instant) {
        match self.info {
            Info::Known(_) => self.info = Info::AskedAgain(self.ask()),
            _ => {
                self.identify(now);
            }
        }
    }

    /// Whether a request may be sent now: the breaker's word.
    pub fn permit(&mut self, now: Instant) -> Permit {
        self.breaker.allow(now)
    }

    /// When the engine is asked again; None while nothing holds that back, or while an answer is awaited.
    pub fn next_try(&self) -> Option<Instant> {
        match (&self.info, self.breaker.state()) {
            (Info::Unknown { due }, _) => Some(*due),
            (Info::Known(_), es::State::Open { until }) => Some(until),
            _ => None,
        }
    }

    pub fn next_event(&mut self) -> Option<Event> {
        self.senders.next()
    }

    pub fn stop(self) {
        self.senders.stop(STOP_GRACE);
    }
}
