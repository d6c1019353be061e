//! Stands between the worker and the engine and injects faults. It understands HTTP/1.1 just enough to know where a
//! request and an answer end, so that a fault strikes at a definite moment.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

/// What happens to a request that arrives while the fault is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is answered by the engine.
    Pass,
    /// The port is closed, and open connections are cut. Always for all paths.
    Refuse,
    /// It is read and never answered, until another fault is set; then its connection is cut. The engine never sees it.
    Blackhole,
    /// It reaches the engine that much later, even if the client has gone in the meantime: a late request.
    Delay(Duration),
    /// It reaches the engine once another fault is set, even if the client has gone in the meantime: a late request.
    Hold,
    /// It is read, not forwarded, and the connection is cut.
    Reset,
    /// It is forwarded, and the connection is cut at once.
    ResetAfterRequest,
    /// It is carried out by the engine, whose answer is thrown away as the connection is cut.
    LoseAnswer,
}

/// A request that came by, in order of arrival.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    /// The first 64 KB of it.
    pub body: String,
    pub bytes: usize,
    pub at: Instant,
}

pub struct Proxy {
    url: String,
    state: Arc<State>,
}

struct State {
    engine: String,
    stop: AtomicBool,
    carried_out: AtomicUsize,
    rules: Mutex<Rules>,
    seen: Mutex<Vec<Seen>>,
    open: Mutex<Vec<TcpStream>>,
}

/// Says what a request is answered in the engine's place; None for "ask the engine". Gets head and body.
type Judge = dyn Fn(&str, &str) -> Option<(u16, String)> + Send;

struct Rules {
    fault: Fault,
    /// Only for requests whose path contains this.
    path: String,
    /// And whose body contains this.
    body: String,
    judge: Option<Box<Judge>>,
    /// Bulk operations whose document or action line contains this are answered with this status, as if they alone had failed.
    spoiled: Option<(String, u16)>,
    /// Answers given in the engine's place: (path contains, status, body).
    answers: VecDeque<(String, u16, String)>,
}

impl Proxy {
    /// Listens on a port of its own and passes everything on to the engine at `url` (http://host:port).
    pub fn to(url: &str) -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("could not bind a port for the proxy");
        let address = listener.local_addr().expect("a bound socket has an address");
        let state = Arc::new(State {
            engine: url.trim_start_matches("http://").trim_end_matches('/').into(),
            stop: AtomicBool::new(false),
            carried_out: AtomicUsize::new(0),
            rules: Mutex::new(Rules {
                fault: Fault::Pass,
                path: String::new(),
                body: String::new(),
                judge: None,
                spoiled: None,
                answers: VecDeque::new(),
            }),
            seen: Mutex::default(),
            open: Mutex::default(),
        });
        let shared = state.clone();
        thread::spawn(move || accept(listener, address, shared));
        Proxy { url: format!("http://{address}"), state }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Sets the fault for all requests from now on.
    pub fn set(&self, fault: Fault) {
        self.set_for("", fault);
    }

    /// Sets it for requests whose path contains `path` (such as "_bulk"); others pass.
    pub fn set_for(&self, path: &str, fault: Fault) {
        self.set_where(path, "", fault);
    }

    /// Sets it for requests whose path contains `path` and whose body contains `body`; others pass.
    pub fn set_where(&self, path: &str, body: &str, fault: Fault) {
        let mut rules = locked(&self.state.rules);
        rules.fault = fault;
        rules.path = path.into();
        rules.body = body.into();
        drop(rules);
        if fault == Fault::Refuse {
            self.wake();
            self.cut();
        }
    }

    /// Lets the accepting thread look at the rules again.
    fn wake(&self) {
        // It fails if the port is closed: then the thread looks by itself.
        let _ = TcpStream::connect(self.url.trim_start_matches("http://"));
    }

    /// Cuts the connections that are open.
    pub fn cut(&self) {
        for connection in locked(&self.state.open).drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Answers the next `times` requests whose path contains `path` itself; the engine does not see them.
    pub fn answer(&self, path: &str, times: usize, status: u16, body: &str) {
        let answer = (path.to_owned(), status, body.to_owned());
        locked(&self.state.rules).answers.extend(std::iter::repeat_n(answer, times));
    }

    /// Has each request judged by its head (in lower case) and body: `Some` is answered in the engine's place.
    pub fn judge(&self, judge: impl Fn(&str, &str) -> Option<(u16, String)> + Send + 'static) {
        locked(&self.state.rules).judge = Some(Box::new(judge));
    }

    /// Lets bulk operations whose document or action line contains `text` look as if they alone had failed with `status`, although the
    /// engine has carried them out; none any more with an empty text.
    pub fn spoil(&self, text: &str, status: u16) {
        locked(&self.state.rules).spoiled = (!text.is_empty()).then(|| (text.to_owned(), status));
    }

    /// How many of these answers were not given yet.
    pub fn answers_left(&self) -> usize {
        locked(&self.state.rules).answers.len()
    }

    pub fn forget_answers(&self) {
        locked(&self.state.rules).answers.clear();
    }

    /// The requests whose path contains `path`, since the start or [`Proxy::forget_seen`].
    pub fn seen(&self, path: &str) -> Vec<Seen> {
        locked(&self.state.seen).iter().filter(|seen| seen.path.contains(path)).cloned().collect()
    }

    /// How many requests the engine has answered so far, whoever still waited for that.
    pub fn carried_out(&self) -> usize {
        self.state.carried_out.load(Ordering::SeqCst)
    }

    pub fn forget_seen(&self) {
        locked(&self.state.seen).clear();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        self.wake();
        self.cut();
    }
}

impl State {
    fn fault_for(&self, path: &str, request: &Message) -> Fault {
        let rules = locked(&self.rules);
        let is_meant = path.contains(&rules.path)
            && (rules.body.is_empty() || String::from_utf8_lossy(request.body()).contains(&rules.body));
        if is_meant { rules.fault } else { Fault::Pass }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn answer_for(&self, path: &str, request: &Message) -> Option<(u16, String)> {
        let mut rules = locked(&self.rules);
        if let Some(judge) = &rules.judge {
            let head = String::from_utf8_lossy(&request.bytes[..request.body]).to_lowercase();
            if let Some(answer) = judge(&head, &String::from_utf8_lossy(request.body())) {
                return Some(answer);
            }
        }
        let place = rules.answers.iter().position(|answer| path.contains(&answer.0))?;
        rules.answers.remove(place).map(|(_, status, body)| (status, body))
    }
}

/// Accepts until the proxy is dropped. While refusing, the port is really closed.
fn accept(listener: TcpListener, address: SocketAddr, state: Arc<State>) {
    let mut listener = Some(listener);
    while !state.stopped() {
        if locked(&state.rules).fault == Fault::Refuse {
            listener = None;
        } else if listener.is_none() {
            listener = TcpListener::bind(address).ok();
        }
        // Blocked until somebody comes (see Proxy::wake): looking again and again would take time from what the bench measures.
        match listener.as_ref().map(TcpListener::accept) {
            Some(Ok((client, _))) => {
                let state = state.clone();
                thread::spawn(move || {
                    let _ = serve(client, &state);
                });
            }
            Some(Err(_)) | None => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// One client's connection, and one to the engine for it, until either ends.
fn serve(client: TcpStream, state: &State) -> io::Result<()> {
    client.set_nodelay(true)?;
    {
        let mut open = locked(&state.open);
        // Those that ended have no peer any more.
        open.retain(|connection| connection.peer_addr().is_ok());
        open.push(client.try_clone()?);
    }
    let mut client = buffered(client);
    let outcome = serve_requests(&mut client, state);
    let _ = client.get_ref().shutdown(Shutdown::Both);
    outcome
}

fn buffered(stream: TcpStream) -> BufReader<TcpStream> {
    BufReader::with_capacity(64 << 10, stream)
}

fn serve_requests(client: &mut BufReader<TcpStream>, state: &State) -> io::Result<()> {
    let mut engine: Option<BufReader<TcpStream>> = None;
    let mut buffer = Vec::new();
    while let Some(request) = Message::read(client, buffer, false)? {
        let mut words = request.first_line().split(' ');
        let method = words.next().unwrap_or_default().to_owned();
        let path = words.next().unwrap_or_default().to_owned();
        locked(&state.seen).push(Seen {
            method: method.clone(),
            path: path.clone(),
            body: String::from_utf8_lossy(&request.body()[..request.body().len().min(65536)]).into_owned(),
            bytes: request.body().len(),
            at: Instant::now(),
        });
        if let Some((status, body)) = state.answer_for(&path, &request) {
            let text = format!(
                "HTTP/1.1 {status} Stub\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            client.get_mut().write_all(text.as_bytes())?;
            buffer = request.bytes;
            continue;
        }
        let fault = state.fault_for(&path, &request);
        match fault {
            Fault::Pass | Fault::ResetAfterRequest | Fault::LoseAnswer => {}
            Fault::Refuse | Fault::Reset => return Ok(()),
            Fault::Blackhole => {
                while state.fault_for(&path, &request) == Fault::Blackhole && !state.stopped() {
                    thread::sleep(Duration::from_millis(2));
                }
                return Ok(());
            }
            Fault::Delay(time) => thread::sleep(time),
            Fault::Hold => {
                while state.fault_for(&path, &request) == Fault::Hold && !state.stopped() {
                    thread::sleep(Duration::from_millis(2));
                }
            }
        }
        if engine.is_none() {
            let stream = TcpStream::connect(&state.engine)?;
            stream.set_nodelay(true)?;
            engine = Some(buffered(stream));
        }
        let stream = engine.as_mut().expect("it was just connected");
        stream.get_mut().write_all(&request.bytes)?;
        if fault == Fault::ResetAfterRequest {
            client.get_ref().shutdown(Shutdown::Both)?;
            // The engine gets to carry it out: closing early might cancel it.
            let _ = Message::read(stream, Vec::new(), method == "HEAD");
            return Ok(());
        }
        let Some(answer) = Message::read(stream, Vec::new(), method == "HEAD")? else {
            return Ok(());
        };
        state.carried_out.fetch_add(1, Ordering::SeqCst);
        if fault == Fault::LoseAnswer {
            return Ok(());
        }
        // A fault set while the engine worked holds back its answer too.
        while state.fault_for(&path, &request) == Fault::Blackhole && !state.stopped() {
            thread::sleep(Duration::from_millis(2));
        }
        let spoiled = locked(&state.rules).spoiled.clone().filter(|_| path.contains("_bulk"));
        match spoiled {
            Some((text, status)) => client.get_mut().write_all(&spoil(&request, &answer, &text, status))?,
            None => client.get_mut().write_all(&answer.bytes)?,
        }
        buffer = request.bytes;
    }
    Ok(())
}

/// The answer to a bulk request, with other outcomes for the operations whose document or action line contains `text`.
fn spoil(request: &Message, answer: &Message, text: &str, status: u16) -> Vec<u8> {
    let mut body: serde_json::Value = serde_json::from_slice(&answer.whole_body()).expect("a bulk answer is JSON");
    let lines = String::from_utf8_lossy(request.body()).into_owned();
    let mut lines = lines.lines();
    for item in body["items"].as_array_mut().expect("a bulk answer has items") {
        let action = lines.next().unwrap_or_default();
        let document = if action.starts_with("{\"delete\"") { "" } else { lines.next().unwrap_or_default() };
        if document.contains(text) || action.contains(text) {
            let error = serde_json::json!({"type": "spoiled", "reason": "spoiled by the proxy"});
            *item = serde_json::json!({"index": {"status": status, "error": error}});
        }
    }
    body["errors"] = true.into();
    let body = body.to_string();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
    format!("{head}{body}").into_bytes()
}

/// A request or an answer as it came, and where its body begins.
struct Message {
    bytes: Vec<u8>,
    body: usize,
}

impl Message {
    /// Reads one into `bytes`; none if the connection ends before it begins.
    fn read(stream: &mut BufReader<TcpStream>, mut bytes: Vec<u8>, without_body: bool) -> io::Result<Option<Message>> {
        bytes.clear();
        while !bytes.ends_with(b"\r\n\r\n") {
            if stream.read_until(b'\n', &mut bytes)? == 0 {
                return if bytes.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
        let body = bytes.len();
        let head = String::from_utf8_lossy(&bytes).to_lowercase();
        let status: u16 = match head.strip_prefix("http/1.1 ") {
            Some(rest) => rest.get(..3).and_then(|code| code.parse().ok()).unwrap_or(200),
            None => 200,
        };
        if head.contains("\r\nexpect: 100-continue") {
            stream.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let header = |name: &str| {
            let start = head.find(&format!("\r\n{name}:"))? + name.len() + 3;
            head[start..].lines().next().map(str::trim)
        };
        if without_body || status == 204 || status == 304 {
            return Ok(Some(Message { bytes, body }));
        }
        if header("transfer-encoding").is_some_and(|value| value.contains("chunked")) {
            loop {
                // A chunk: its size in hex, a line's end, its bytes, a line's end. The last has size zero.
                let line = bytes.len();
                stream.read_until(b'\n', &mut bytes)?;
                let size = chunk_size(&bytes[line..]).ok_or(io::ErrorKind::InvalidData)?;
                read_more(stream, &mut bytes, size + 2)?;
                if size == 0 {
                    break;
                }
            }
        } else {
            let length = header("content-length").and_then(|value| value.parse().ok()).unwrap_or(0);
            read_more(stream, &mut bytes, length)?;
        }
        Ok(Some(Message { bytes, body }))
    }

    fn first_line(&self) -> &str {
        let end = find(&self.bytes, b"\r\n").unwrap_or(0);
        std::str::from_utf8(&self.bytes[..end]).unwrap_or_default()
    }

    fn body(&self) -> &[u8] {
        &self.bytes[self.body..]
    }

    /// The body, put together if it came in chunks.
    fn whole_body(&self) -> Vec<u8> {
        let head = String::from_utf8_lossy(&self.bytes[..self.body]).to_lowercase();
        if !head.contains("transfer-encoding: chunked") {
            return self.body().to_vec();
        }
        let (mut whole, mut rest) = (Vec::new(), self.body());
        while let Some(line) = find(rest, b"\r\n") {
            let size = chunk_size(&rest[..line]).unwrap_or(0);
            if size == 0 {
                break;
            }
            whole.extend_from_slice(&rest[line + 2..line + 2 + size]);
            rest = &rest[line + 2 + size + 2..];
        }
        whole
    }
}

/// Of a chunk's first line.
fn chunk_size(line: &[u8]) -> Option<usize> {
    let line = std::str::from_utf8(line).ok()?;
    usize::from_str_radix(line.split(';').next()?.trim(), 16).ok()
}

fn read_more(stream: &mut BufReader<TcpStream>, bytes: &mut Vec<u8>, length: usize) -> io::Result<()> {
    match stream.take(length as u64).read_to_end(bytes)? {
        read if read < length => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// A test that failed elsewhere must not make every later use of the proxy fail too.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
