//! A real PostgreSQL for tests: a cluster in a temporary directory, reached over a Unix socket alone.
//!
//! The managed PostgreSQL of the crate `local` is not used here, because that crate brings the Kafka client
//! with it, which a test of the store should not have to build.
//!
//! The server is the child of a shell that waits for the end of its standard input: whichever way the test
//! ends, the pipe closes and the shell stops the server.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Where distributions put the server, beside PATH.
const PLACES: &[&str] = &[
    "/usr/lib/postgresql/18/bin",
    "/usr/lib/postgresql/17/bin",
    "/usr/lib/postgresql/16/bin",
    "/usr/lib/postgresql/15/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql/bin",
];

const SUPERVISE: &str = r#""$0" "$@" & pid=$!; read -r _; kill -QUIT "$pid" 2>/dev/null; wait "$pid""#;

/// A running PostgreSQL that ends with this value.
pub struct TestPostgres {
    bin: PathBuf,
    directory: tempfile::TempDir,
    supervisor: Option<Child>,
}

impl TestPostgres {
    /// Makes a cluster and starts it. `settings` are `name=value` of postgresql.conf.
    pub fn start(settings: &[&str]) -> Self {
        let bin = find_server();
        let directory = tempfile::tempdir().expect("a temporary directory");
        if is_root() {
            run(Command::new("chown").arg("postgres").arg(directory.path()));
        }
        let mut postgres = Self { bin, directory, supervisor: None };
        let mut initdb = postgres.command("initdb");
        initdb.args(["-U", "postgres", "-E", "UTF8", "--locale=C", "--auth=trust", "--no-sync", "-D"]);
        initdb.arg(postgres.data());
        run(&mut initdb);
        postgres.restart(settings);
        postgres
    }

    /// Starts the server again after [`TestPostgres::kill`].
    pub fn restart(&mut self, settings: &[&str]) {
        let server = self.bin.join("postgres");
        let mut command = self.command_as_owner("sh");
        command.arg("-c").arg(SUPERVISE).arg(server).arg("-D").arg(self.data());
        command
            .args(["-c", "listen_addresses=", "-c", "logging_collector=off", "-k"])
            .arg(self.directory.path());
        for setting in settings {
            command.args(["-c", setting]);
        }
        let log = std::fs::File::create(self.directory.path().join("log")).expect("a log file");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        self.supervisor = Some(command.spawn().expect("sh starts"));
        self.wait_until_ready();
    }

    /// Stops the server at once, as a crash does.
    pub fn kill(&mut self) {
        if let Some(mut supervisor) = self.supervisor.take() {
            drop(supervisor.stdin.take());
            supervisor.wait().expect("the supervisor ends");
        }
    }

    /// Makes a database and returns its URL.
    pub fn database(&self, name: &str) -> String {
        let mut psql = self.command("psql");
        psql.args(["-qU", "postgres", "-d", "postgres", "-h"]).arg(self.directory.path());
        run(psql.arg("-c").arg(format!("CREATE DATABASE {name}")));
        self.url(name)
    }

    /// Returns the URL of a database.
    pub fn url(&self, name: &str) -> String {
        let socket = self.directory.path().display().to_string().replace('/', "%2F");
        format!("postgres://postgres@{socket}/{name}")
    }

    /// Returns the id of the server's first process.
    pub fn server_pid(&self) -> Option<u32> {
        let text = std::fs::read_to_string(self.data().join("postmaster.pid")).ok()?;
        text.lines().next()?.parse().ok()
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn wait_until_ready(&self) {
        let give_up = Instant::now() + Duration::from_secs(60);
        loop {
            let mut probe = self.command("pg_isready");
            probe.args(["-q", "-h"]).arg(self.directory.path());
            if probe.status().expect("pg_isready starts").success() {
                return;
            }
            assert!(Instant::now() < give_up, "PostgreSQL is not ready after 60 s:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        let mut text = String::new();
        if let Ok(mut file) = std::fs::File::open(self.directory.path().join("log")) {
            let _ = file.read_to_string(&mut text);
        }
        text
    }

    fn command(&self, program: &str) -> Command {
        self.command_as_owner(self.bin.join(program))
    }

    /// PostgreSQL refuses to run as root; there, `runuser` takes the user that its package made.
    fn command_as_owner(&self, program: impl AsRef<Path>) -> Command {
        let mut command = if is_root() {
            let mut command = Command::new("runuser");
            command.args(["-u", "postgres", "--"]).arg(program.as_ref());
            command
        } else {
            Command::new(program.as_ref())
        };
        command.current_dir(self.directory.path());
        command
    }
}

impl Drop for TestPostgres {
    fn drop(&mut self) {
        self.kill();
    }
}

fn find_server() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    PLACES
        .iter()
        .map(PathBuf::from)
        .chain(std::env::split_paths(&path))
        .find(|dir| dir.join("initdb").exists() && dir.join("postgres").exists())
        .expect("PostgreSQL's server is installed (Debian: apt-get install postgresql)")
}

fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"))
}

fn run(command: &mut Command) {
    let output = command.output().expect("the program starts");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
