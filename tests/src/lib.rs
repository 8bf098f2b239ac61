//! Drives the platform as its users do: the built binary, Kafka's own tools, clients that we did not write.

pub mod chaos;
pub mod cluster;
pub mod scenario_run;
pub mod short_run;

use serde_json::Value;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// How long a platform may take to be ready on a busy machine; it takes seconds on an idle one.
const READY_WITHIN: Duration = Duration::from_secs(90);

/// Returns the repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the root").to_owned()
}

/// Returns the `throughline` binary that was built beside this test, or the one that `PLATFORM_BINARY`
/// names: long runs take the release build.
///
/// # Panics
/// When it was not built: `cargo build --workspace` comes first, as in the Makefile.
pub fn binary() -> PathBuf {
    if let Some(binary) = std::env::var_os("PLATFORM_BINARY") {
        return binary.into();
    }
    let test = std::env::current_exe().expect("a test knows its own path");
    let profile = test.parent().and_then(Path::parent).expect("target/<profile>/deps/<test>");
    let binary = profile.join("throughline");
    assert!(binary.exists(), "{} is missing: run `cargo build --workspace` first", binary.display());
    binary
}

/// Returns the interpreter that has the clients of `tests/python/requirements.txt`.
///
/// # Panics
/// When `scripts/setup test` has not installed them.
pub fn python() -> PathBuf {
    let python = root().join("target/venv/bin/python3");
    assert!(python.exists(), "{} is missing: run `scripts/setup test` first", python.display());
    python
}

/// Waits until `condition` gives a value.
///
/// # Panics
/// After `limit`, naming `what` was waited for.
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {limit:?} in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A child process with its output in a file; it is killed when dropped, and on Linux when the thread that
/// started it ends in whatever way.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, its stdout and stderr going to `log`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(command: &Command, log: PathBuf) -> Self {
        let out = File::create(&log).expect("the log file can be made");
        let err = out.try_clone().expect("a file handle can be cloned");
        let mut bound = bound_to_us(command);
        let child = bound.stdin(Stdio::null()).stdout(out).stderr(err).spawn().expect("the command starts");
        Self { child, log }
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns what it printed so far.
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Says whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.status().is_some()
    }

    /// Returns how it ended, if it has.
    pub fn status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// Sends a signal by name, for instance `KILL`, `STOP`, `TERM`.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Kills it at once and waits for its end.
    pub fn kill(&mut self) {
        self.child.kill().expect("our own child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Asks it to end, waits at most `limit`, and returns its exit code.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn terminate(&mut self, limit: Duration) -> Option<i32> {
        self.signal("TERM");
        let log = self.log.clone();
        let child = &mut self.child;
        wait_for(&format!("the end of {}", log.display()), limit, || {
            child.try_wait().expect("a child can be waited for")
        })
        .code()
    }
}

/// Returns the command that runs under the same pid and is killed when we are: util-linux' `setpriv` sets
/// `PR_SET_PDEATHSIG` and becomes the program.
fn bound_to_us(command: &Command) -> Command {
    let mut bound = if cfg!(target_os = "linux") {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--pdeathsig", "KILL"]).arg(command.get_program());
        setpriv
    } else {
        Command::new(command.get_program())
    };
    bound.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bound.env(name, value),
            None => bound.env_remove(name),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        bound.current_dir(directory);
    }
    bound
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.has_ended() {
            self.kill();
        }
    }
}

/// Sends a signal to a process that a test started.
///
/// # Panics
/// When the process is gone.
pub fn signal(pid: u32, name: &str) {
    let status =
        Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().expect("kill exists");
    assert!(status.success(), "process {pid} takes no {name}");
}

/// A running `throughline up` in a directory of its own.
pub struct Platform {
    process: Process,
    directory: tempfile::TempDir,
    endpoints: Value,
}

impl Platform {
    /// Starts a platform without the simulated site on free ports and waits until it is ready.
    ///
    /// # Panics
    /// When it is not ready in time; the message has what it printed.
    pub fn up(extra: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        Self::up_in(directory, extra)
    }

    /// Starts a platform in `directory`, for instance one that was used before.
    ///
    /// # Panics
    /// As [`Platform::up`].
    pub fn up_in(directory: tempfile::TempDir, extra: &[&str]) -> Self {
        let data = directory.path().join("data");
        let file = data.join("endpoints.json");
        let _absent_is_fine = std::fs::remove_file(&file);
        let mut command = Command::new(binary());
        command.args(["up", "--no-demo", "--random-ports", "--data-dir"]).arg(&data).args(extra);
        let mut process = Process::start(&command, directory.path().join("up.log"));
        let deadline = Instant::now() + READY_WITHIN;
        let endpoints = loop {
            if let Some(endpoints) =
                std::fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok())
            {
                break endpoints;
            }
            let late = Instant::now() > deadline;
            assert!(!late && !process.has_ended(), "the platform is not ready:\n{}", process.output());
            std::thread::sleep(Duration::from_millis(50));
        };
        Self { process, directory, endpoints }
    }

    /// Returns an address of `endpoints.json`.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn endpoint(&self, name: &str) -> &str {
        self.endpoints[name]
            .as_str()
            .unwrap_or_else(|| panic!("endpoints.json has `{name}`: {}", self.endpoints))
    }

    /// Returns the port of the MQTT listener.
    pub fn mqtt_port(&self) -> String {
        port_of(self.endpoint("mqtt"))
    }

    /// Returns the process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Returns the directory of its data.
    pub fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Returns a directory for files of the test.
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    /// Runs a `throughline` command against it.
    pub fn command(&self, args: &[&str]) -> Output {
        let mut command = Command::new(binary());
        command.args(args).arg("--data-dir").arg(self.data_dir()).stdin(Stdio::null());
        command.output().expect("the binary runs")
    }

    /// Runs a command that must succeed and returns its stdout.
    ///
    /// # Panics
    /// When it exits with another code than 0.
    pub fn done(&self, args: &[&str]) -> String {
        let output = self.command(args);
        assert!(output.status.success(), "throughline {}:\n{}", args.join(" "), said(&output));
        String::from_utf8(output.stdout).expect("our output is UTF-8")
    }

    /// Runs a command with `--json` that must succeed and returns its document.
    ///
    /// # Panics
    /// When it fails or prints no JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        let mut with_json = args.to_vec();
        with_json.push("--json");
        let text = self.done(&with_json);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("throughline {}: {e}:\n{text}", args.join(" ")))
    }

    /// Ends it hard and gives its directory back for another start.
    pub fn kill(self) -> tempfile::TempDir {
        let Self { mut process, directory, .. } = self;
        process.kill();
        directory
    }
}

/// Returns the port at the end of an address.
///
/// # Panics
/// When there is none.
pub fn port_of(address: &str) -> String {
    let digits = address.trim_end_matches('/').rsplit(':').next().expect("rsplit gives at least one part");
    assert!(digits.parse::<u16>().is_ok(), "`{address}` ends in a port");
    digits.to_owned()
}

/// Returns what a command printed, for messages of failed assertions.
pub fn said(output: &Output) -> String {
    format!(
        "exit {:?}\n{}{}",
        output.status.code(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Runs a program that must succeed and returns its stdout.
///
/// # Panics
/// When it cannot be run or fails.
pub fn succeed(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> String {
    let program = program.as_ref();
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{} cannot be run: {e}", program.display()));
    assert!(output.status.success(), "{} {}:\n{}", program.display(), args.join(" "), said(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Returns what a query finds in a SQLite database, a line a row.
///
/// # Panics
/// When the query fails.
pub fn sqlite(url: &str, query: &str) -> String {
    let path = url.trim_start_matches("sqlite:").trim_start_matches("//");
    let script = "import sqlite3,sys\nfor r in sqlite3.connect('file:'+sys.argv[1]+'?mode=ro',uri=True)\
                  .execute(sys.argv[2]): print(*r)";
    succeed(python(), &["-c", script, path, query])
}

/// The load of a seed, published and checked by the programs in `tests/python`.
pub struct Load {
    /// What the publishes are derived from; a failing test prints it.
    pub seed: u64,
    /// Number of distinct readings.
    pub readings: u64,
    /// Number of devices, half of them in each of two sites.
    pub devices: u64,
    start_us: u64,
    /// How long the publisher may take.
    pub deadline: Duration,
    /// Whether some devices have wrong clocks, restart under an old epoch or a new one, or send out of order.
    pub mix: bool,
    /// What the publisher intended and what was acknowledged to it.
    journal: tempfile::TempDir,
}

impl Load {
    /// Makes a load whose device clocks start shortly before now.
    ///
    /// # Panics
    /// When the system's clock stands before 1970.
    pub fn new(seed: u64, readings: u64, devices: u64) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        // A device's readings are a second apart, so they end about now.
        let span = Duration::from_secs(readings / devices + 1);
        let start_us = (now - span).as_micros() as u64;
        let journal = tempfile::tempdir().expect("a temporary directory can be made");
        Self { seed, readings, devices, start_us, deadline: Duration::from_secs(240), mix: false, journal }
    }

    /// Lets the devices' clocks be right at the rate of a reading a second each: through an outage of minutes a
    /// reading grows old, and rules look at none that is older than ten.
    ///
    /// # Panics
    /// As [`Load::new`].
    pub fn begin_now(&mut self) {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        self.start_us = now.as_micros() as u64;
    }

    fn arguments(&self) -> Vec<String> {
        let pairs = [
            ("seed", self.seed),
            ("readings", self.readings),
            ("devices", self.devices),
            ("start-us", self.start_us),
        ];
        let mut arguments: Vec<String> =
            pairs.iter().flat_map(|(name, value)| [format!("--{name}"), value.to_string()]).collect();
        arguments.extend(["--journal".to_owned(), self.journal.path().display().to_string()]);
        arguments.extend(self.mix.then(|| "--mix".to_owned()));
        arguments
    }

    /// Starts to publish to the MQTT server at `port`, or to several at ports with commas between, at `rate`
    /// messages a second or, with 0, as fast as they are acknowledged. A publisher that is started after one was killed goes on where that stopped.
    pub fn publish(&self, port: &str, rate: u32, log: PathBuf) -> Process {
        let mut command = Command::new(python());
        command.arg(root().join("tests/python/publish.py")).args(self.arguments());
        command.args(["--port", port, "--rate", &rate.to_string()]);
        command.args(["--deadline", &self.deadline.as_secs().to_string()]);
        Process::start(&command, log)
    }

    /// Compares Kafka and store with what was sent.
    ///
    /// # Errors
    /// The differences that the oracle lists.
    ///
    /// # Panics
    /// When the oracle cannot be run.
    pub fn compare(&self, kafka: &str, database: &str, extra: &[&str]) -> Result<(), String> {
        self.compare_while(kafka, database, extra, || {})
    }

    /// As [`Load::compare`], calling `meanwhile` again and again until the oracle has ended.
    ///
    /// # Errors
    /// As [`Load::compare`].
    ///
    /// # Panics
    /// When the oracle cannot be run.
    #[expect(clippy::print_stderr, reason = "a comparison that was begun again should not be hidden")]
    pub fn compare_while(
        &self,
        kafka: &str,
        database: &str,
        extra: &[&str],
        mut meanwhile: impl FnMut(),
    ) -> Result<(), String> {
        let mut command = Command::new(python());
        command.arg(root().join("tests/python/oracle.py")).args(self.arguments());
        command.args(["--kafka", kafka, "--database", database]).args(extra);
        let log = self.journal.path().join("oracle.log");
        // It only reads. A signal that ends it comes from the client library below it, which is librdkafka too.
        let mut attempts = 3;
        loop {
            let mut oracle = Process::start(&command, log.clone());
            let status = loop {
                if let Some(status) = oracle.status() {
                    break status;
                }
                meanwhile();
                std::thread::sleep(Duration::from_millis(200));
            };
            attempts -= 1;
            match status.signal() {
                Some(signal) if attempts > 0 => eprintln!("signal {signal} ended the oracle: once more"),
                _ if status.success() => return Ok(()),
                _ => return Err(format!("seed {}: {status}\n{}", self.seed, oracle.output())),
            }
        }
    }

    /// As [`Load::compare`], for tests that end there.
    ///
    /// # Panics
    /// When something differs; the message lists the differences.
    pub fn check(&self, kafka: &str, database: &str, extra: &[&str]) {
        if let Err(differences) = self.compare(kafka, database, extra) {
            panic!("{differences}");
        }
    }
}

/// Waits for a publisher's end and asserts that everything it sent was acknowledged.
///
/// # Panics
/// When it was not, or it takes longer than `limit`.
pub fn published(mut publisher: Process, limit: Duration) -> Value {
    wait_for("the publisher's end", limit, || publisher.has_ended().then_some(()));
    let text = publisher.output();
    let report: Value =
        text.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or(Value::Null);
    assert!(
        report["sent"].is_u64() && report["sent"] == report["acknowledged"],
        "not all acknowledged:\n{text}"
    );
    report
}
