//! A real PostgreSQL server as a child of this process.

use crate::child::{Fault, Program, Supervised, find_program, run_to_end, words};
use crate::error::LocalError;
use crate::ports;
use rustix::process::Signal;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long a start may take, recovery after a crash included.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How long a fast shutdown may take before the server is killed.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// The superuser and the database that are made.
const NAME: &str = "throughline";

/// How a managed PostgreSQL is made.
#[derive(Clone, Debug)]
pub struct PostgresOptions {
    /// Its directory; data of an earlier start there is found again. When root starts it, the directory
    /// above must let other users pass, because PostgreSQL runs as another user then.
    pub data_dir: PathBuf,
    /// The port on 127.0.0.1, or `None` for a free one.
    pub port: Option<u16>,
    /// Whether a commit waits for the disk. Without it a crash of the machine (not of the server) loses
    /// data; tests do without.
    pub fsync: bool,
    /// Server settings in place of the defaults, for instance `("max_connections", "20")`.
    pub settings: Vec<(String, String)>,
}

impl PostgresOptions {
    /// Makes options for a directory: a free port, fsync on.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self { data_dir: data_dir.into(), port: None, fsync: true, settings: Vec::new() }
    }
}

/// A running server. Dropping it kills it; [`ManagedPostgres::stop`] ends it in order.
#[derive(Debug)]
pub struct ManagedPostgres {
    options: PostgresOptions,
    dir: PathBuf,
    binaries: PathBuf,
    user: Option<(u32, u32)>,
    port: u16,
    child: Option<Supervised>,
}

impl ManagedPostgres {
    /// Starts a server with a database and superuser `throughline` and returns when it answers.
    ///
    /// # Errors
    /// [`LocalError::Missing`] without PostgreSQL, [`LocalError::PortTaken`], [`LocalError::InUse`],
    /// [`LocalError::Failed`] with the end of the log.
    pub fn start(options: PostgresOptions) -> Result<Self, LocalError> {
        let binaries = find_binaries()?;
        let port = ports::wanted_or_free("PostgreSQL", options.port)?;
        let user = unprivileged_user()?;
        let dir = options.data_dir.clone();
        std::fs::create_dir_all(&dir).map_err(LocalError::io("create", &dir))?;
        let dir = dir.canonicalize().map_err(LocalError::io("find", &dir))?;
        if let Some((uid, gid)) = user {
            std::os::unix::fs::chown(&dir, Some(uid), Some(gid)).map_err(LocalError::io("chown", &dir))?;
        }
        let mut server = Self { options, dir, binaries, user, port, child: None };
        let fresh = !server.dir.join("data/PG_VERSION").exists();
        if fresh {
            let mut initdb = server.command("initdb");
            initdb.args(["-U", NAME, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "-D"]);
            server.prepare(initdb.arg(server.dir.join("data")))?;
        }
        server.launch()?;
        if fresh {
            let mut createdb = server.command("createdb");
            createdb.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", NAME, NAME]);
            server.prepare(&mut createdb)?;
        }
        Ok(server)
    }

    /// Returns `postgres://throughline@127.0.0.1:port/throughline`.
    pub fn url(&self) -> String {
        format!("postgres://{NAME}@127.0.0.1:{}/{NAME}", self.port)
    }

    /// Returns the port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the postmaster's process id, or `None` while it does not run.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Supervised::pid)
    }

    /// Does a fault to the server and all its backends. After [`Fault::Kill`] go on with
    /// [`ManagedPostgres::restart`].
    pub fn fault(&mut self, fault: Fault) {
        if let Some(child) = &self.child {
            child.fault(fault);
        }
        if fault == Fault::Kill {
            self.child = None;
        }
    }

    /// Starts the server again on the same port and data, ending it in order before where it runs.
    ///
    /// # Errors
    /// As [`ManagedPostgres::start`].
    pub fn restart(&mut self) -> Result<(), LocalError> {
        if let Some(child) = self.child.take() {
            child.stop(Signal::INT, STOP_LIMIT)?;
        }
        self.launch()
    }

    /// Ends the server in order (a fast shutdown: open transactions are aborted).
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn stop(mut self) -> Result<(), LocalError> {
        match self.child.take() {
            Some(child) => child.stop(Signal::INT, STOP_LIMIT).map(drop),
            None => Ok(()),
        }
    }

    fn launch(&mut self) -> Result<(), LocalError> {
        let mut settings = vec![
            "listen_addresses=127.0.0.1".to_owned(),
            format!("port={}", self.port),
            // The path of a socket may have 107 bytes at most, which a data directory may exceed.
            "unix_socket_directories=".to_owned(),
            format!("fsync={}", if self.options.fsync { "on" } else { "off" }),
        ];
        settings.extend(self.options.settings.iter().map(|(key, value)| format!("{key}={value}")));
        let mut command = words([self.binaries.join("postgres"), "-D".into(), self.dir.join("data")]);
        for setting in &settings {
            command.extend(words(["-c", setting]));
        }
        let program = Program { name: "postgres", dir: &self.dir, command, env: Vec::new(), user: self.user };
        let mut child = Supervised::spawn(program)?;
        child.wait_ready(START_LIMIT, || self.answers())?;
        self.child = Some(child);
        Ok(())
    }

    fn answers(&self) -> bool {
        let mut command = self.command("pg_isready");
        command.args(["-q", "-t", "2", "-h", "127.0.0.1", "-p", &self.port.to_string()]);
        command.stdin(Stdio::null()).status().is_ok_and(|status| status.success())
    }

    fn prepare(&self, command: &mut Command) -> Result<(), LocalError> {
        run_to_end("postgres", &self.dir.join("postgres.log"), command)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.binaries.join(program));
        command.current_dir(&self.dir);
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }
}

/// Returns the directory of PostgreSQL's programs: of `initdb` in `PATH`, or the newest of those that
/// Debian keeps out of it.
fn find_binaries() -> Result<PathBuf, LocalError> {
    if let Some(initdb) = find_program("initdb") {
        let initdb = initdb.canonicalize().map_err(LocalError::io("find", &initdb))?;
        return Ok(initdb.parent().expect("a file has a directory").to_owned());
    }
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = versions
        .filter(|version| version.path().join("bin/initdb").is_file())
        .filter_map(|version| Some((version.file_name().to_str()?.parse::<u32>().ok()?, version.path())))
        .max();
    newest.map(|(_, path)| path.join("bin")).ok_or(LocalError::Missing {
        program: "initdb",
        purpose: "the managed PostgreSQL",
        remedy: "install PostgreSQL 15 or newer: `apt-get install postgresql` on Debian and Ubuntu, \
                 `dnf install postgresql-server` on Fedora, `brew install postgresql@17` on macOS",
    })
}

/// PostgreSQL refuses to run as root: returns user and group to run it as, or `None` where we are not root.
fn unprivileged_user() -> Result<Option<(u32, u32)>, LocalError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let path = Path::new("/etc/passwd");
    let users = std::fs::read_to_string(path).map_err(LocalError::io("read", path))?;
    let of = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    let found = of("postgres").or_else(|| of("nobody"));
    found.map(Some).ok_or(LocalError::Missing {
        program: "a user `postgres` or `nobody`",
        purpose: "running PostgreSQL, which refuses to run as root",
        remedy: "run as an ordinary user",
    })
}
