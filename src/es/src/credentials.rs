//! Who we are to the engine: read from files, so that they stand in no setting, catalog or log.

use std::fs;
use std::path::Path;

use ureq::http::{HeaderName, HeaderValue, header};

use crate::config::{Config, ConfigError};
use crate::secret::Secret;

/// The headers that every request carries. Values are secrets, whatever they are.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Credentials {
    headers: Vec<(HeaderName, Secret)>,
}

impl Credentials {
    /// Reads the files that the configuration names. Errors name the file, never what is in it.
    pub fn read(config: &Config) -> Result<Credentials, ConfigError> {
        let mut headers = match &config.headers_file {
            Some(path) => parse_headers(path, &read_file(path)?)?,
            None => Vec::new(),
        };
        if let Some(authorization) = authorization(config)? {
            headers.push((header::AUTHORIZATION, authorization));
        }
        for (name, value) in &headers {
            if HeaderValue::from_str(value.expose()).is_err() {
                return Err(ConfigError::new(format!(
                    "the value of header \"{name}\" has characters that HTTP does not allow"
                )));
            }
        }
        Ok(Credentials { headers })
    }

    pub fn headers(&self) -> impl Iterator<Item = (&HeaderName, HeaderValue)> {
        self.headers.iter().filter_map(|(name, value)| {
            let mut value = HeaderValue::from_str(value.expose()).ok()?;
            value.set_sensitive(true);
            Some((name, value))
        })
    }
}

fn authorization(config: &Config) -> Result<Option<Secret>, ConfigError> {
    if let Some(path) = &config.api_key_file {
        return Ok(Some(Secret::new(format!("ApiKey {}", first_line(path)?.expose()))));
    }
    match (&config.username, &config.password_file) {
        (Some(username), Some(path)) => {
            if username.contains(':') {
                return Err(ConfigError::new("a username must not contain \":\""));
            }
            let pair = format!("{username}:{}", first_line(path)?.expose());
            Ok(Some(Secret::new(format!("Basic {}", base64(pair.as_bytes())))))
        }
        (None, None) => Ok(None),
        (Some(_), None) => {
            Err(ConfigError::with_hint("a username is set without a password file", "Set es_sync.password_file too."))
        }
        (None, Some(_)) => {
            Err(ConfigError::with_hint("a password file is set without a username", "Set es_sync.username too."))
        }
    }
}

fn read_file(path: &Path) -> Result<Secret, ConfigError> {
    fs::read_to_string(path)
        .map(Secret::new)
        .map_err(|error| ConfigError::new(format!("could not read file \"{}\": {error}", path.display())))
}

/// Editors leave a line end behind the password.
fn first_line(path: &Path) -> Result<Secret, ConfigError> {
    let text = read_file(path)?;
    match text.expose().lines().next() {
        Some(line) if !line.is_empty() => Ok(Secret::new(line)),
        _ => Err(ConfigError::new(format!("file \"{}\" has no first line", path.display()))),
    }
}

fn parse_headers(path: &Path, text: &Secret) -> Result<Vec<(HeaderName, Secret)>, ConfigError> {
    let lines = text.expose().lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(at, line)| {
            let header = line.split_once(':').and_then(|(name, value)| {
                let name = HeaderName::from_bytes(name.trim().as_bytes()).ok()?;
                Some((name, Secret::new(value.trim())))
            });
            header.ok_or_else(|| {
                ConfigError::with_hint(
                    format!("file \"{}\", line {at} is not a header", path.display()),
                    "Write a line as \"Name: value\".",
                )
            })
        })
        .collect()
}

/// RFC 4648, with padding. One function is less to keep up than one more dependency.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let mut three = [0; 3];
        three[..chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes([0, three[0], three[1], three[2]]);
        for place in 0..4 {
            if place <= chunk.len() {
                text.push(char::from(ALPHABET[(bits >> (18 - 6 * place)) as usize & 63]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stub::{Folder, config};

    fn shown(credentials: &Credentials) -> Vec<(String, String)> {
        credentials
            .headers()
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect()
    }

    #[test]
    fn base64_is_rfc_4648() {
        for (text, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
            ("elastic:p\u{f6}?", "ZWxhc3RpYzpww7Y/"),
        ] {
            assert_eq!(base64(text.as_bytes()), encoded);
        }
    }

    #[test]
    fn files_become_headers() {
        let folder = Folder::new();
        let mut config = config("http://a");
        assert_eq!(shown(&Credentials::read(&config).unwrap()), []);
        config.username = Some("elastic".into());
        config.password_file = Some(folder.write("password", "hunter2\n"));
        config.headers_file = Some(folder.write("headers", "# ours\nX-Tenant: a b \n\n"));
        assert_eq!(
            shown(&Credentials::read(&config).unwrap()),
            [("x-tenant".into(), "a b".into()), ("authorization".into(), "Basic ZWxhc3RpYzpodW50ZXIy".into())]
        );
        config.api_key_file = Some(folder.write("key", "abc=="));
        assert_eq!(shown(&Credentials::read(&config).unwrap())[1].1, "ApiKey abc==");
    }

    #[test]
    fn errors_name_the_file_and_not_its_content() {
        let folder = Folder::new();
        let mut config = config("http://a");
        config.headers_file = Some(folder.write("headers", "X: 1\nhunter2\n"));
        let error = Credentials::read(&config).unwrap_err().to_string();
        assert!(error.contains("line 2") && !error.contains("hunter2"), "{error}");
        config.headers_file = None;
        config.api_key_file = Some("/nonexistent/key".into());
        assert!(Credentials::read(&config).unwrap_err().to_string().contains("/nonexistent/key"));
        config.api_key_file = Some(folder.write("empty", "\n"));
        assert!(Credentials::read(&config).is_err());
        config.api_key_file = None;
        config.username = Some("elastic".into());
        assert!(Credentials::read(&config).unwrap_err().hint().unwrap().contains("password_file"));
    }
}
