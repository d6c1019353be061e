//! Every `es_sync.*` setting, with its unit, its range and a sentence.
//! Runs in: every process that has loaded the library.
//! May touch: Postgres' configuration system, nothing else.
//!
//! Credentials are never settings, only the names of the files that hold them: a setting's value is visible to
//! members of pg_monitor, in pg_db_role_setting and in the log.

use std::ffi::{CStr, CString};
use std::path::PathBuf;
use std::time::Duration;

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};

type Text = GucSetting<Option<CString>>;

static URL: Text = Text::new(None);
static USERNAME: Text = Text::new(None);
static PASSWORD_FILE: Text = Text::new(None);
static API_KEY_FILE: Text = Text::new(None);
static CA_FILE: Text = Text::new(None);
static CLIENT_CERT_FILE: Text = Text::new(None);
static CLIENT_KEY_FILE: Text = Text::new(None);
static HEADERS_FILE: Text = Text::new(None);
static CONNECTIONS: GucSetting<i32> = GucSetting::<i32>::new(4);
static CONNECT_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(5_000);
static REQUEST_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(60_000);
static BULK_BYTES: GucSetting<i32> = GucSetting::<i32>::new(5 * 1024);
static LINGER: GucSetting<i32> = GucSetting::<i32>::new(3);
static POLL_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(1_000);
static MAX_ATTEMPTS: GucSetting<i32> = GucSetting::<i32>::new(8);
static RETRY_MAX_DELAY: GucSetting<i32> = GucSetting::<i32>::new(30_000);
static QUEUE_LIMIT: GucSetting<i32> = GucSetting::<i32>::new(4 * 1024);
static QUEUE_DURABILITY: GucSetting<Durability> = GucSetting::<Durability>::new(Durability::Unlogged);
static LEASE_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(15_000);
static LOCK_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(5_000);
static READ_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(60_000);
static CAPTURE: GucSetting<bool> = GucSetting::<bool>::new(true);

/// What becomes of the queue in a crash.
#[derive(Debug, Clone, Copy, PartialEq, pgrx::PostgresGucEnum)]
enum Durability {
    /// It is lost, and every index compared with its table and mended.
    Unlogged,
    /// It is kept: each change costs its writer some WAL.
    Logged,
}

/// Defines all settings. Called once per process, from `_PG_init`.
pub fn define() {
    text(
        c"es_sync.url",
        c"Sets the addresses of the engine's nodes, separated by commas.",
        c"http or https; without it nothing is sent and nothing can be attached. No credentials here.",
        &URL,
    );
    text(
        c"es_sync.username",
        c"Sets the user name for basic authentication.",
        c"Used together with es_sync.password_file.",
        &USERNAME,
    );
    text(
        c"es_sync.password_file",
        c"Names the file that holds the password for basic authentication.",
        c"Read again when the engine answers 401.",
        &PASSWORD_FILE,
    );
    text(
        c"es_sync.api_key_file",
        c"Names the file that holds an API key in its encoded form.",
        c"Takes precedence over a user name; read again when the engine answers 401.",
        &API_KEY_FILE,
    );
    text(
        c"es_sync.ca_file",
        c"Names the PEM file with the authorities that may sign the engine's certificate.",
        c"Without it Mozilla's list of authorities is used.",
        &CA_FILE,
    );
    text(
        c"es_sync.client_cert_file",
        c"Names the PEM file with the client's certificate chain.",
        c"Used together with es_sync.client_key_file.",
        &CLIENT_CERT_FILE,
    );
    text(
        c"es_sync.client_key_file",
        c"Names the PEM file with the client certificate's private key.",
        c"Used together with es_sync.client_cert_file.",
        &CLIENT_KEY_FILE,
    );
    text(
        c"es_sync.headers_file",
        c"Names a file with additional request headers.",
        c"One \"Name: value\" a line.",
        &HEADERS_FILE,
    );

    let none = GucFlags::empty();
    number(
        c"es_sync.connections",
        c"Sets how many bulk requests a worker keeps in flight at the most.",
        c"Each has a sender thread and a connection of its own.",
        &CONNECTIONS,
        1,
        64,
        none,
    );
    number(
        c"es_sync.connect_timeout",
        c"Limits the time for opening a connection to the engine.",
        c"In milliseconds.",
        &CONNECT_TIMEOUT,
        100,
        600_000,
        GucFlags::UNIT_MS,
    );
    number(
        c"es_sync.request_timeout",
        c"Limits the time for one request to the engine.",
        c"In milliseconds. What timed out has an unknown outcome and is read and sent again.",
        &REQUEST_TIMEOUT,
        1_000,
        3_600_000,
        GucFlags::UNIT_MS,
    );
    number(
        c"es_sync.bulk_bytes",
        c"Limits the size of one bulk request.",
        c"In kilobytes; the engine's http.max_content_length is kept in any case.",
        &BULK_BYTES,
        64,
        1024 * 1024,
        GucFlags::UNIT_KB,
    );
    number(
        c"es_sync.linger",
        c"Sets how long the worker lets changes gather while commits keep coming.",
        c"In milliseconds. After a quiet time a change is claimed at once; 0 never waits.",
        &LINGER,
        0,
        1_000,
        GucFlags::UNIT_MS,
    );
    number(
        c"es_sync.poll_interval",
        c"Sets how often the worker looks for changes that woke nobody.",
        c"In milliseconds. COMMIT PREPARED is the one that wakes nobody.",
        &POLL_INTERVAL,
        10,
        60_000,
        GucFlags::UNIT_MS,
    );
    number(
        c"es_sync.max_attempts",
        c"Sets after how many failures a document becomes a dead letter.",
        c"Counted only while the engine takes other documents.",
        &MAX_ATTEMPTS,
        1,
        1_000,
        none,
    );
    number(
        c"es_sync.retry_max_delay",
        c"Limits the wait between two attempts.",
        c"In milliseconds; the wait grows from 100 ms on, with full jitter.",
        &RETRY_MAX_DELAY,
        100,
        3_600_000,
        GucFlags::UNIT_MS,
    );
    number(
        c"es_sync.queue_limit",
        c"Limits the size of the queue on disk.",
        c"In megabytes; 0 for no limit. Beyond it changes are not noted one by one: a repair follows when the queue is empty.",
        &QUEUE_LIMIT,
        0,
        i32::MAX,
        GucFlags::UNIT_MB,
    );
    GucRegistry::define_enum_guc(
        c"es_sync.queue_durability",
        c"Sets whether the queue survives a crash of the server.",
        c"An unlogged queue is lost in a crash, and every index then compared with its table and mended.",
        &QUEUE_DURABILITY,
        GucContext::Sighup,
        none,
    );
    number(
        c"es_sync.lease_timeout",
        c"Sets after what silence of its holder the lease in the engine is taken over.",
        c"In milliseconds. The holder renews it five times as often, and stops sending after two thirds of it.",
        &LEASE_TIMEOUT,
        1_000,
        600_000,
        GucFlags::UNIT_MS,
    );
    number(
        c"es_sync.read_timeout",
        c"Limits how long the worker takes for one read.",
        c"In milliseconds; 0 is no limit. Fewer are read at once then, and one that takes longer by itself is a dead letter.",
        &READ_TIMEOUT,
        0,
        3_600_000,
        GucFlags::UNIT_MS,
    );
    number(
        c"es_sync.lock_timeout",
        c"Limits how long attach, detach, relate and reindex wait for a table's lock.",
        c"In milliseconds; 0 waits without limit.",
        &LOCK_TIMEOUT,
        0,
        3_600_000,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_bool_guc(
        c"es_sync.capture",
        c"Notes the changes of attached tables row by row.",
        c"Off, for a bulk load, each transaction asks for a repair of the tables that it changed.",
        &CAPTURE,
        GucContext::Suset,
        GucFlags::empty(),
    );
    // SAFETY: called from `_PG_init` with a string that lasts; it warns of names that are none of the above, or are
    // misspelt, and takes them away.
    unsafe { pgrx::pg_sys::MarkGUCPrefixReserved(c"es_sync".as_ptr()) };
}

fn text(name: &'static CStr, sentence: &'static CStr, more: &'static CStr, setting: &'static Text) {
    GucRegistry::define_string_guc(name, sentence, more, setting, GucContext::Suset, GucFlags::empty());
}

#[allow(clippy::too_many_arguments)] // one line per setting above, in the order of Postgres' own definition
fn number(
    name: &'static CStr,
    sentence: &'static CStr,
    more: &'static CStr,
    setting: &'static GucSetting<i32>,
    min: i32,
    max: i32,
    unit: GucFlags,
) {
    GucRegistry::define_int_guc(name, sentence, more, setting, min, max, GucContext::Suset, unit);
}

fn string(setting: &Text) -> Option<String> {
    let value = setting.get()?.into_string().ok()?;
    (!value.trim().is_empty()).then_some(value)
}

fn path(setting: &Text) -> Option<PathBuf> {
    string(setting).map(PathBuf::from)
}

fn millis(setting: &GucSetting<i32>) -> Duration {
    Duration::from_millis(setting.get().max(0) as u64)
}

/// The engine's addresses as the user wrote them; None where none are set.
pub fn url() -> Option<String> {
    string(&URL)
}

/// Everything that the engine's client needs.
///
/// # Errors
/// What is wrong with the setting, ready for a person; never with a credential in it.
pub fn engine() -> Result<es::Config, es::ConfigError> {
    let url = url().ok_or_else(|| es::ConfigError::new("es_sync.url is not set"))?;
    Ok(es::Config {
        urls: es::parse_urls(&url).map_err(|error| error.of("es_sync.url"))?,
        username: string(&USERNAME),
        password_file: path(&PASSWORD_FILE),
        api_key_file: path(&API_KEY_FILE),
        ca_file: path(&CA_FILE),
        client_cert_file: path(&CLIENT_CERT_FILE),
        client_key_file: path(&CLIENT_KEY_FILE),
        headers_file: path(&HEADERS_FILE),
        connect_timeout: millis(&CONNECT_TIMEOUT),
        request_timeout: millis(&REQUEST_TIMEOUT),
        connections: CONNECTIONS.get().max(1) as usize,
    })
}

/// Longest time for one request.
pub fn request_timeout() -> Duration {
    millis(&REQUEST_TIMEOUT)
}

/// Largest bulk request, in bytes.
pub fn bulk_bytes() -> usize {
    BULK_BYTES.get() as usize * 1024
}

/// How long changes gather while commits keep coming.
pub fn linger() -> Duration {
    millis(&LINGER)
}

/// How often the worker looks for what woke nobody.
pub fn poll_interval() -> Duration {
    millis(&POLL_INTERVAL)
}

/// Failures after which a document becomes a dead letter.
pub fn max_attempts() -> u32 {
    MAX_ATTEMPTS.get() as u32
}

/// Longest wait between two attempts.
pub fn retry_max_delay() -> Duration {
    millis(&RETRY_MAX_DELAY)
}

/// Bytes on disk beyond which the queue takes nothing; 0 for no limit.
pub fn queue_limit() -> u64 {
    QUEUE_LIMIT.get().max(0) as u64 * 1024 * 1024
}

/// Whether the queue is to survive a crash.
pub fn queue_is_logged() -> bool {
    QUEUE_DURABILITY.get() == Durability::Logged
}

/// Silence after which a lease is taken over.
pub fn lease_timeout() -> Duration {
    millis(&LEASE_TIMEOUT)
}

/// Whether changed rows are noted one by one; otherwise only their table.
pub fn capture() -> bool {
    CAPTURE.get()
}

/// How long one read of the worker's may take; zero for no limit.
pub fn read_timeout() -> Duration {
    millis(&READ_TIMEOUT)
}

/// How long users' calls wait for a table's lock, in milliseconds, as text for `lock_timeout`.
pub fn lock_timeout() -> String {
    format!("{}ms", LOCK_TIMEOUT.get())
}
