//! For tests: a server that says what it is told to, and a folder for files.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{env, fs, process, thread};

use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::config::Config;

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    /// For instance `GET /_alias/a`.
    pub line: String,
    /// Lower-case names.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Which connection it came by, counted from 1.
    pub connection: u32,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

pub enum Reply {
    Answer(u16, &'static str),
    /// Closes the connection instead of answering.
    HangUp,
    /// Says it has more to send than it sends, and closes.
    Cut,
    /// Holds the connection and says nothing.
    Silence,
}

pub struct Stub {
    pub url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

type Handler = Arc<dyn Fn(&Seen) -> Reply + Send + Sync>;

impl Stub {
    pub fn start(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Stub {
        Stub::serve("http", None, handler)
    }

    pub fn start_tls(tls: ServerConfig, handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Stub {
        Stub::serve("https", Some(Arc::new(tls)), handler)
    }

    fn serve(
        scheme: &str,
        tls: Option<Arc<ServerConfig>>,
        handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Stub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("{scheme}://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (handler, log): (Handler, _) = (Arc::new(handler), seen.clone());
        thread::spawn(move || {
            for (number, stream) in (1..).zip(listener.incoming()) {
                let (stream, handler, log, tls) = (stream.unwrap(), handler.clone(), log.clone(), tls.clone());
                thread::spawn(move || match tls {
                    None => converse(stream, number, &handler, &log),
                    Some(tls) => {
                        converse(StreamOwned::new(ServerConnection::new(tls).unwrap(), stream), number, &handler, &log)
                    }
                });
            }
        });
        Stub { url, seen }
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

fn converse(stream: impl Read + Write, connection: u32, handler: &Handler, log: &Mutex<Vec<Seen>>) {
    let mut stream = BufReader::new(stream);
    while let Some(seen) = read_request(&mut stream, connection) {
        log.lock().unwrap().push(seen.clone());
        let reply = match handler(&seen) {
            Reply::Answer(status, body) => {
                format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len())
            }
            Reply::Cut => "HTTP/1.1 200 X\r\ncontent-length: 1000\r\n\r\n{".into(),
            Reply::HangUp => return,
            Reply::Silence => {
                thread::sleep(Duration::from_secs(60));
                return;
            }
        };
        let stream = stream.get_mut();
        if stream.write_all(reply.as_bytes()).and_then(|()| stream.flush()).is_err() || reply.ends_with("\n{") {
            return;
        }
    }
}

fn read_request(stream: &mut impl BufRead, connection: u32) -> Option<Seen> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).ok().filter(|read| *read > 0)?;
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_string()),
        }
    }
    let headers: Vec<(String, String)> = lines[1..]
        .iter()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_string()))
        .collect();
    let length =
        headers.iter().find(|(name, _)| name == "content-length").map_or(0, |(_, value)| value.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some(Seen { line: lines[0].trim_end_matches(" HTTP/1.1").to_string(), headers, body, connection })
}

/// A URL that refuses connections.
pub fn refusing_url() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// A URL whose connects hang: a listener whose backlog is full. Keep what comes with it.
pub fn hanging_url() -> (String, TcpListener, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // SAFETY: the descriptor is the listener's, which outlives the call. Listening again only changes the backlog.
    unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) };
    let held = (0..4).filter_map(|_| TcpStream::connect_timeout(&address, Duration::from_millis(50)).ok()).collect();
    (format!("http://{address}"), listener, held)
}

pub fn config(urls: &str) -> Config {
    Config {
        urls: crate::config::parse_urls(urls).unwrap(),
        username: None,
        password_file: None,
        api_key_file: None,
        ca_file: None,
        client_cert_file: None,
        client_key_file: None,
        headers_file: None,
        connect_timeout: Duration::from_millis(500),
        request_timeout: Duration::from_secs(10),
        connections: 2,
    }
}

/// A folder that goes with the test.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let path =
            env::temp_dir().join(format!("es-test-{}-{}", process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
