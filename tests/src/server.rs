//! A Postgres of one's own: made in a moment from a template, on its own socket, gone when dropped.

use crate::{Engine, process, wait};
use postgres::{Client, NoTls};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// How to stop: as `pg_ctl stop -m` does, or as a crash (`Kill`: the postmaster gets no signal it could handle).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Fast,
    Immediate,
    Kill,
}

pub struct Server {
    folder: TempDir,
    port: u16,
    process: Option<Child>,
    environment: Vec<(String, String)>,
}

/// What a server starts with. Begin with [`Server::builder`].
pub struct Builder {
    settings: Vec<(String, String)>,
    environment: Vec<(String, String)>,
}

impl Builder {
    /// Sets a setting in postgresql.conf. The last one wins.
    pub fn conf(mut self, key: &str, value: impl ToString) -> Self {
        self.settings.push((key.into(), value.to_string()));
        self
    }

    /// With a queue that takes nothing more when it has 1 MB, and a lease that is soon free.
    pub fn with_small_queue(self) -> Self {
        self.conf("es_sync.lease_timeout", "2s").conf("es_sync.queue_limit", "1MB")
    }

    /// Sets a variable in the postmaster's environment.
    pub fn env(mut self, key: &str, value: impl ToString) -> Self {
        self.environment.push((key.into(), value.to_string()));
        self
    }

    /// Without the extension in shared_preload_libraries.
    pub fn without_preload(self) -> Self {
        self.conf("shared_preload_libraries", "")
    }

    /// With fsync: for tests that are about what survives a crash of the machine's processes.
    pub fn durable(self) -> Self {
        self.conf("fsync", "on")
    }

    pub fn start(self) -> Server {
        let mut server = Server::on_new_folder(|data| copy_folder(&template(), data));
        server.environment = self.environment;
        for (key, value) in self.settings {
            server.conf(&key, value);
        }
        server.started()
    }
}

impl Server {
    /// Settings for tests: no fsync, room for workers and prepared transactions, log_min_messages = info.
    pub fn builder() -> Builder {
        Builder { settings: Vec::new(), environment: Vec::new() }
    }

    /// A running server whose worker talks to this engine.
    pub fn with(engine: &Engine) -> Server {
        Server::with_url(engine.url())
    }

    /// The same for an address, such as a proxy's.
    pub fn with_url(url: &str) -> Server {
        Server::builder().conf("es_sync.url", url).start()
    }

    fn on_new_folder(fill: impl FnOnce(&Path)) -> Server {
        let folder = process::server_folder("pg");
        fill(&folder.path().join("data"));
        let server = Server { folder, port: process::free_port(), process: None, environment: Vec::new() };
        server.conf("port", server.port);
        server.conf("unix_socket_directories", server.folder.path().display());
        server
    }

    fn started(mut self) -> Server {
        self.start();
        self
    }

    /// Starts it and waits until it takes connections.
    #[track_caller]
    pub fn start(&mut self) {
        assert!(self.process.is_none(), "the server runs already");
        let log = self.open_log();
        let mut command = process::as_server(pg_bin().join("postgres"), "QUIT");
        command.envs(self.environment.iter().cloned());
        command.arg("-D").arg(self.data()).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("could not share the log")).stderr(log);
        let mut child = process::spawn(command).expect("could not start Postgres");
        let mut probe = self.command("pg_isready");
        probe.stdout(Stdio::null());
        let ended = wait::until("Postgres takes connections", wait::LONG, || {
            match child.try_wait().expect("could not look after Postgres") {
                Some(status) => Some(Some(status)),
                None => probe.status().expect("could not run pg_isready").success().then_some(None),
            }
        });
        if let Some(status) = ended {
            panic!("Postgres ended while it started ({status}); its log:\n{}", tail(&self.log(), 40));
        }
        self.process = Some(child);
    }

    /// Stops it and waits for its end.
    #[track_caller]
    pub fn stop(&mut self, mode: Mode) {
        let mut child = self.process.take().expect("the server does not run");
        let signal = match mode {
            Mode::Fast => "INT",
            Mode::Immediate => "QUIT",
            Mode::Kill => "KILL",
        };
        process::signal(child.id(), signal);
        let deadline = Duration::from_secs(30);
        let start = std::time::Instant::now();
        while child.try_wait().expect("could not look after Postgres").is_none() {
            if start.elapsed() > deadline {
                let running = self.processes();
                process::signal(child.id(), "KILL");
                let _ = child.wait();
                panic!("Postgres did not stop ({mode:?}) within {deadline:?}; still running:\n{running}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        if mode == Mode::Kill {
            // Its children notice on their own, and a new postmaster refuses to start before.
            wait::until("the children of the killed postmaster end", wait::SHORT, || {
                let left = self.processes();
                if left.is_empty() { Ok(()) } else { Err(left) }
            });
        }
    }

    pub fn restart(&mut self, mode: Mode) {
        self.stop(mode);
        self.start();
    }

    /// Writes a setting into postgresql.conf; effective after [`Server::reload`] or a restart.
    pub fn conf(&self, key: &str, value: impl ToString) {
        let value = value.to_string().replace('\'', "''");
        let mut file = OpenOptions::new()
            .append(true)
            .open(self.data().join("postgresql.conf"))
            .expect("could not open postgresql.conf");
        writeln!(file, "{key} = '{value}'").expect("could not write postgresql.conf");
    }

    /// Has the configuration read again and waits until new connections see it.
    pub fn reload(&self) {
        let loaded = || -> String {
            self.connect("postgres")
                .query_one("select pg_conf_load_time()::text", &[])
                .expect("pg_conf_load_time")
                .get(0)
        };
        let before = loaded();
        process::signal(self.process.as_ref().expect("the server does not run").id(), "HUP");
        wait::until("Postgres has read its configuration", wait::SHORT, || loaded() != before);
    }

    /// Process ids of the extension's background workers: (pid, kind as pg_stat_activity names it, database or "").
    pub fn workers(&self) -> Vec<(u32, String, String)> {
        let rows = self.connect("postgres").query(
            "select pid, backend_type, coalesce(datname, '')
               from pg_stat_activity
              where backend_type ilike '%es_sync%'
              order by pid",
            &[],
        );
        let row = |row: postgres::Row| (row.get::<_, i32>(0) as u32, row.get(1), row.get(2));
        rows.expect("could not read pg_stat_activity").into_iter().map(row).collect()
    }

    /// Kills a database's worker with SIGKILL, which has Postgres restart all of its processes. Returns its pid.
    pub fn kill_worker(&self, database: &str) -> u32 {
        let pid = wait::until("the database has a worker", wait::SHORT, || {
            let workers = self.workers();
            workers.iter().find(|worker| worker.2 == database).map(|worker| worker.0).ok_or(workers)
        });
        process::signal(pid, "KILL");
        // Before it notices, the server lets clients in whose connections it then cuts.
        let noticed = format!("(PID {pid}) was terminated by signal 9");
        wait::until("the server has noticed", wait::SHORT, || self.log().contains(&noticed));
        pid
    }

    /// Everything it logged so far.
    pub fn log(&self) -> String {
        fs::read(self.log_path()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Lines of WARNING and above that contain none of the expected words. A test ends well with an empty list.
    pub fn unexpected_log_lines(&self, expected: &[&str]) -> Vec<String> {
        let grave = ["WARNING:", "ERROR:", "FATAL:", "PANIC:"];
        // What our own question gets while the server starts.
        let starting = ["the database system is starting up", "the database system is not yet accepting connections"];
        let log = self.log();
        log.lines()
            .filter(|line| grave.iter().any(|word| line.contains(word)))
            .filter(|line| !starting.iter().chain(expected).any(|word| line.contains(word)))
            .map(str::to_owned)
            .collect()
    }

    /// Its port, for programs that need one; TCP only where listen_addresses says so.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// For psql and other programs by hand.
    pub fn url(&self, database: &str) -> String {
        format!("postgresql://postgres@/{database}?host={}&port={}", self.folder.path().display(), self.port)
    }

    /// One of Postgres' client programs (psql, pg_dump, pgbench, ...), told how to reach this server.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(pg_bin().join(program));
        command.arg("-h").arg(self.folder.path()).args(["-p", &self.port.to_string(), "-U", "postgres"]);
        command
    }

    /// A connection as the superuser "postgres".
    #[track_caller]
    pub fn connect(&self, database: &str) -> Client {
        self.connect_as("postgres", database)
    }

    #[track_caller]
    pub fn connect_as(&self, user: &str, database: &str) -> Client {
        match self.try_connect(user, database) {
            Ok(client) => client,
            Err(error) => panic!("could not connect to {database} as {user}: {error:?}"),
        }
    }

    pub fn try_connect(&self, user: &str, database: &str) -> Result<Client, postgres::Error> {
        postgres::Config::new()
            .host_path(self.folder.path())
            .port(self.port)
            .user(user)
            .dbname(database)
            .connect_timeout(Duration::from_secs(10))
            .connect(NoTls)
    }

    /// Creates a database with the extension in it and connects to it.
    #[track_caller]
    pub fn create_database(&self, name: &str) -> Client {
        let mut client = self.create_empty_database(name);
        client.batch_execute("create extension pg_es_sync").expect("could not create the extension");
        client
    }

    #[track_caller]
    pub fn create_empty_database(&self, name: &str) -> Client {
        self.connect("postgres")
            .batch_execute(&format!("create database \"{name}\""))
            .expect("could not create a database");
        self.connect(name)
    }

    /// A physical copy of the running server, started: a standby that follows it, or a restore that has gone its own way.
    pub fn copy(&self, standby: bool) -> Server {
        let copy = Server::on_new_folder(|data| {
            let mut command = process::as_server(pg_bin().join("pg_basebackup"), "TERM");
            command.arg("-h").arg(self.folder.path()).args(["-p", &self.port.to_string(), "-U", "postgres"]);
            command.args(["--checkpoint=fast", "--no-sync", "-X", "stream", "-D"]).arg(data);
            if standby {
                command.arg("-R");
            }
            process::run(command);
        });
        copy.started()
    }

    /// A copy of the stopped server's files, started.
    pub fn copy_of_files(&self) -> Server {
        assert!(self.process.is_none(), "stop the server before its files are copied");
        Server::on_new_folder(|data| copy_folder(&self.data(), data)).started()
    }

    /// Waits until this standby has all that was committed there.
    pub fn catch_up_with(&self, primary: &mut Client) {
        let lsn: String = primary.query_one("select pg_current_wal_lsn()::text", &[]).expect("lsn").get(0);
        let query = format!("select pg_last_wal_replay_lsn() >= '{lsn}'::pg_lsn");
        crate::wait::until("the standby has it", crate::wait::SHORT, || -> bool {
            self.connect("app").query_one(&query, &[]).expect("lsn").get(0)
        });
    }

    /// Promotes a standby and waits until it takes writes.
    pub fn promote(&self) {
        self.connect("postgres").execute("select pg_promote(true, 60)", &[]).expect("could not promote");
    }

    /// The data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn open_log(&self) -> File {
        let file = OpenOptions::new().create(true).append(true).open(self.log_path());
        file.expect("could not open the log")
    }

    /// This server's processes, which are those that work in its folder, a line each.
    fn processes(&self) -> String {
        let data = self.data();
        let output = Command::new("ps").args(["-eo", "pid,args"]).output().expect("could not run ps");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mine = |line: &&str| {
            let pid = line.split_whitespace().next().unwrap_or_default();
            line.contains("postgres") && fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|folder| folder == data)
        };
        text.lines().filter(mine).collect::<Vec<_>>().join("\n")
    }

    /// What a failing test wants to know: the log's end, and the extension's views in every database.
    fn report(&self) {
        eprintln!("--- server log (its last lines)\n{}", tail(&self.log(), 60));
        let Ok(mut client) = self.try_connect("postgres", "postgres") else {
            return;
        };
        let names = client.query("select datname from pg_database where datallowconn and not datistemplate", &[]);
        for row in names.unwrap_or_default() {
            let name: String = row.get(0);
            let Ok(mut client) = self.try_connect("postgres", &name) else {
                continue;
            };
            let _ = client.batch_execute("set statement_timeout = '5s'");
            for view in ["status", "jobs", "dead_letters"] {
                let Ok(rows) =
                    client.query(&format!("select row_to_json(r)::text from es_sync.{view} r limit 20"), &[])
                else {
                    continue;
                };
                eprintln!("--- {name}: es_sync.{view}, {} rows", rows.len());
                for row in rows {
                    eprintln!("{}", row.get::<_, String>(0));
                }
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.report();
        }
        let Some(mut child) = self.process.take() else {
            return;
        };
        process::signal(child.id(), "QUIT");
        // No panic here: this may run while a test's own unwinds.
        for _ in 0..500 {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        process::signal(child.id(), "KILL");
        let _ = child.wait();
    }
}

fn pg_bin() -> PathBuf {
    PathBuf::from(process::setting("PG_BIN"))
}

/// A cluster made by initdb once per run; copying it takes a tenth of the time.
fn template() -> PathBuf {
    let folder = process::run_folder().join("template");
    let lock = File::create(process::run_folder().join("template.lock")).expect("could not create the template's lock");
    lock.lock().expect("could not lock the template");
    if folder.join("ready").exists() {
        return folder;
    }
    let mut initdb = process::as_server(pg_bin().join("initdb"), "TERM");
    initdb.arg("-D").arg(&folder);
    initdb.args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]);
    process::run(initdb);
    let conf = folder.join("postgresql.conf");
    let mut file = OpenOptions::new().append(true).open(conf).expect("could not open postgresql.conf");
    file.write_all(
        b"
listen_addresses = ''
shared_preload_libraries = 'pg_es_sync'
fsync = off
wal_level = logical
max_worker_processes = 16
max_prepared_transactions = 10
log_min_messages = info
log_line_prefix = '%m [%p] %b %d '
# Small machines run several of these at once.
shared_buffers = 32MB
",
    )
    .expect("could not write postgresql.conf");
    File::create(folder.join("ready")).expect("could not mark the template");
    folder
}

/// As the server's user, who must own what Postgres runs on.
fn copy_folder(from: &Path, to: &Path) {
    let mut command = process::as_server("cp", "TERM");
    command.args(["-a", "--reflink=auto"]).arg(from).arg(to);
    process::run(command);
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
