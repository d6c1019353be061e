//! What may be set about the way to the engine.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use ureq::http::Uri;

/// How to reach the engine. Holds no credential, only the files they are in.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Nodes, from [`parse_urls`]: no trailing slash, no credentials.
    pub urls: Vec<String>,
    pub username: Option<String>,
    /// Its first line is the password of `username`.
    pub password_file: Option<PathBuf>,
    /// Its first line is an API key, as the engine hands it out encoded. Wins over `username`.
    pub api_key_file: Option<PathBuf>,
    /// PEM. When set, only these authorities are trusted; otherwise Mozilla's list.
    pub ca_file: Option<PathBuf>,
    /// PEM, leaf first. Needs `client_key_file`.
    pub client_cert_file: Option<PathBuf>,
    /// PEM, not encrypted.
    pub client_key_file: Option<PathBuf>,
    /// Lines of `Name: value`, sent with each request. Empty lines and those that begin with `#` are skipped.
    pub headers_file: Option<PathBuf>,
    /// Name resolution, and TCP connect with the TLS handshake: so much for each, per node.
    pub connect_timeout: Duration,
    /// One request to one node, from its first to its last byte.
    pub request_timeout: Duration,
    /// Bulk requests at once. At least 1.
    pub connections: usize,
}

/// What is wrong with a setting or a file it names. The text never holds a credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    message: String,
    hint: Option<&'static str>,
}

impl ConfigError {
    pub fn new(message: impl Into<String>) -> ConfigError {
        ConfigError { message: message.into(), hint: None }
    }

    pub(crate) fn with_hint(message: impl Into<String>, hint: &'static str) -> ConfigError {
        ConfigError { message: message.into(), hint: Some(hint) }
    }

    /// The same, said of this setting.
    pub fn of(self, setting: &str) -> ConfigError {
        ConfigError { message: format!("{setting}: {}", self.message), hint: self.hint }
    }

    /// Lower-case, no full stop: fit for an error's primary message.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The way out, in whole sentences.
    pub fn hint(&self) -> Option<&'static str> {
        self.hint
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.hint {
            None => f.write_str(&self.message),
            Some(hint) => write!(f, "{} ({hint})", self.message),
        }
    }
}

impl std::error::Error for ConfigError {}

/// Reads a comma-separated list of node URLs. A path prefix is kept, a trailing slash is not.
///
/// Errors: no URL at all, another scheme than http and https, no host, a query, credentials inside.
pub fn parse_urls(text: &str) -> Result<Vec<String>, ConfigError> {
    // Over the whole text and first of all: a comma inside a password would split it, and the message about
    // one half would print it.
    if text.contains('@') {
        return Err(ConfigError::with_hint(
            "credentials are not allowed in a URL",
            "Use es_sync.username with es_sync.password_file, or es_sync.api_key_file.",
        ));
    }
    let urls =
        text.split(',').map(str::trim).filter(|url| !url.is_empty()).map(parse_url).collect::<Result<Vec<_>, _>>()?;
    if urls.is_empty() {
        return Err(ConfigError::new("no URL is given"));
    }
    Ok(urls)
}

fn parse_url(url: &str) -> Result<String, ConfigError> {
    let wrong = |what: &str| {
        ConfigError::with_hint(
            format!("invalid URL \"{url}\": {what}"),
            "A URL looks like https://search.example.com:9200.",
        )
    };
    let scheme_ends = url.find("://").ok_or_else(|| wrong("it does not begin with http:// or https://"))?;
    let scheme = url[..scheme_ends].to_ascii_lowercase();
    if scheme != "http" && scheme != "https" {
        return Err(wrong("only http and https are known"));
    }
    if url.contains('?') || url.contains('#') {
        return Err(wrong("it must not have a query or fragment"));
    }
    let url = format!("{scheme}{}", url[scheme_ends..].trim_end_matches('/'));
    let uri: Uri = url.parse().map_err(|_| wrong("it cannot be parsed"))?;
    match uri.authority() {
        None => Err(wrong("it has no host")),
        Some(authority) if authority.host().is_empty() => Err(wrong("it has no host")),
        // The parser takes "host:" and "host:99999" as they are.
        Some(authority) if authority.as_str().len() > authority.host().len() && authority.port_u16().is_none() => {
            Err(wrong("its port is not a number from 1 to 65535"))
        }
        Some(_) => Ok(url),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_nodes_with_prefixes_are_read() {
        assert_eq!(
            parse_urls(" http://a:9200/ , HTTPS://b.example.com/es/,http://[::1]:9200").unwrap(),
            ["http://a:9200", "https://b.example.com/es", "http://[::1]:9200"]
        );
    }

    #[test]
    fn what_is_no_url_is_refused() {
        for text in [
            "",
            " , ",
            "localhost:9200",
            "ftp://a",
            "http://",
            "http:///x",
            "http://a:99999",
            "http://a:x",
            "http://a b",
            "http://a/?x=1",
            "http://a/#x",
        ] {
            assert!(parse_urls(text).is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn credentials_in_a_url_are_refused_and_not_printed() {
        for text in [
            "http://elastic:hunter2@a:9200",
            "http://elastic:hun,ter2@a:9200",
            "x://elastic:hunter2@a",
            "http://a:9200,http://elastic:hunter2@b",
        ] {
            let error = parse_urls(text).unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("hun") && !shown.contains("ter2"), "{shown}");
            assert!(shown.contains("password_file"), "{shown}");
        }
    }
}
