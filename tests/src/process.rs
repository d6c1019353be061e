//! Starting servers so that they end with the test, however it ends.

use std::io;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};

/// What scripts/test.sh tells us: `PG_ES_SYNC_<name>`.
pub fn setting(name: &str) -> String {
    let name = format!("PG_ES_SYNC_{name}");
    std::env::var(&name).unwrap_or_else(|_| {
        panic!(
            "{name} is not set: run these tests with `make test-e2e`, or in the shell that scripts/test.sh shell opens"
        )
    })
}

/// The folder that holds all servers of this run, owned by whoever runs them.
pub fn run_folder() -> PathBuf {
    PathBuf::from(setting("RUN"))
}

/// A new folder in there, owned by the server's user.
pub fn server_folder(prefix: &str) -> tempfile::TempDir {
    let folder = tempfile::Builder::new()
        .prefix(prefix)
        .tempdir_in(run_folder())
        .expect("could not create a folder for a server");
    if let Some(user) = server_user() {
        let done = Command::new("chown").arg(format!("{user}:{user}")).arg(folder.path()).status();
        assert!(done.expect("could not run chown").success(), "could not hand {:?} to {user}", folder.path());
    }
    folder
}

fn server_user() -> Option<String> {
    Some(setting("USER")).filter(|user| !user.is_empty())
}

/// A command run as the server's user: initdb and the engines refuse root. `death_signal` (such as "QUIT") is what it
/// gets when the test process dies.
pub fn as_server(program: impl AsRef<std::ffi::OsStr>, death_signal: &str) -> Command {
    let mut command = Command::new("setpriv");
    if let Some(user) = server_user() {
        command.args(["--reuid", &user, "--regid", &user, "--init-groups"]);
    }
    command.args(["--pdeathsig", death_signal]).arg(program);
    // The caller's folder may be closed to that user.
    command.current_dir("/");
    // A backtrace in the postmaster's environment is sent to clients as DETAIL.
    command.env_remove("RUST_BACKTRACE");
    command
}

/// Spawns from a thread that lives as long as the process. The death signal is sent when the *thread* that spawned ends,
/// and a test's thread ends with the test, while a server may be shared.
pub fn spawn(command: Command) -> io::Result<Child> {
    type Order = (Command, Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in inbox {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (answer, outcome) = channel();
    spawner
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
        .send((command, answer))
        .expect("the spawning thread has ended");
    outcome.recv().expect("the spawning thread has ended")
}

/// Runs a command to its end and returns what it printed; panics with both of its streams if it failed.
pub fn run(mut command: Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("could not run {command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?} failed ({})\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Sends a signal ("KILL", "STOP", ...) by process id. A process that is gone is no error.
pub fn signal(pid: u32, name: &str) {
    let _ = Command::new("kill").args(["-s", name, &pid.to_string()]).stderr(std::process::Stdio::null()).status();
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("could not bind a port");
    listener.local_addr().expect("a bound socket has an address").port()
}
