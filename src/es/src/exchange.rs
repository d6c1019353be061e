//! One request on the wire, and what its going wrong tells about its outcome.

use std::io::{self, Read};
use std::time::Duration;

use ureq::http::{self, Request, Response, header};
use ureq::{Agent, AsSendBody, SendBody, Timeout};

use crate::client::{Answer, Method};
use crate::credentials::Credentials;
use crate::failure::{Failure, FailureKind};

/// Longest answer read, in bytes: enough for any page we ask for, too little to exhaust a server's memory.
const MAX_ANSWER: u64 = 256 * 1024 * 1024;

/// Sends a request to the node at `url` and reads its answer, within `limit` where it is to be less than the agent's.
/// `Unreachable` only when the engine cannot have carried it out.
pub(crate) fn exchange(
    agent: &Agent,
    url: &str,
    credentials: &Credentials,
    method: Method,
    path: &str,
    body: Option<&[u8]>,
    limit: Option<Duration>,
) -> Result<Answer, Failure> {
    let mut request = Request::builder().method(http::Method::from(method)).uri(format!("{url}{path}"));
    for (name, value) in credentials.headers() {
        request = request.header(name, value);
    }
    let mut nothing_sent = false;
    let result = match body {
        // Without a body the headers are the request: whatever is not plainly a failed connect may have arrived.
        None => run(agent, request.body(()), limit),
        Some(bytes) => {
            let mut sent = Sent { rest: bytes, begun: false };
            let request =
                request.header(header::CONTENT_TYPE, content_type(path)).header(header::CONTENT_LENGTH, bytes.len());
            let result = run(agent, request.body(SendBody::from_reader(&mut sent)), limit);
            nothing_sent = !sent.begun;
            result
        }
    };
    result.map_err(|error| classify(&error, nothing_sent, url))
}

fn run(
    agent: &Agent,
    request: Result<Request<impl AsSendBody>, http::Error>,
    limit: Option<Duration>,
) -> Result<Answer, ureq::Error> {
    let mut request = request.map_err(ureq::Error::Http)?;
    if limit.is_some() {
        request = agent.configure_request(request).timeout_global(limit).build();
    }
    read_answer(agent.run(request)?)
}

fn read_answer(response: Response<ureq::Body>) -> Result<Answer, ureq::Error> {
    let status = response.status().as_u16();
    let body = response.into_body().into_with_config().limit(MAX_ANSWER).read_to_vec()?;
    Ok(Answer { status, body })
}

/// A request's body, which notes whether any of it was asked for: ureq reads it only once the headers are written, and
/// without it the engine does not carry out the request.
struct Sent<'b> {
    rest: &'b [u8],
    begun: bool,
}

impl Read for Sent<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.begun = true;
        self.rest.read(buffer)
    }
}

fn classify(error: &ureq::Error, nothing_sent: bool, url: &str) -> Failure {
    let not_connected = match error {
        ureq::Error::HostNotFound | ureq::Error::ConnectionFailed | ureq::Error::Tls(_) => true,
        ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => true,
        ureq::Error::Io(error) => is_connect_error(error),
        _ => false,
    };
    let kind = match error {
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => FailureKind::Config,
        _ if not_connected || nothing_sent => FailureKind::Unreachable,
        ureq::Error::Timeout(_) => FailureKind::Timeout,
        ureq::Error::BodyExceedsLimit(_) | ureq::Error::LargeResponseHeader(..) | ureq::Error::Protocol(_) => {
            FailureKind::BadAnswer
        }
        _ => FailureKind::Broken,
    };
    Failure::new(kind, format!("{url}: {error}"))
}

fn is_connect_error(error: &io::Error) -> bool {
    // A certificate is judged in the handshake only, so nothing has been sent.
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let refused_certificate = matches!(tls, Some(rustls::Error::InvalidCertificate(_)));
    // What getaddrinfo says has no kind of its own in std, only this text.
    let lookup = "failed to lookup address information";
    refused_certificate
        || error.to_string().starts_with(lookup)
        || matches!(
            error.kind(),
            io::ErrorKind::ConnectionRefused
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkUnreachable
                | io::ErrorKind::AddrNotAvailable
        )
}

fn content_type(path: &str) -> &'static str {
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    if path.ends_with("/_bulk") || path.ends_with("/_msearch") { "application/x-ndjson" } else { "application/json" }
}

impl From<Method> for http::Method {
    fn from(method: Method) -> http::Method {
        match method {
            Method::Get => http::Method::GET,
            Method::Put => http::Method::PUT,
            Method::Post => http::Method::POST,
            Method::Delete => http::Method::DELETE,
        }
    }
}
