//! What other users of a database do to it.

use crate::python;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use throughline_local::child::Fault;
use throughline_local::postgres::ManagedPostgres;

/// Few enough that [`exhaust`] can take them all.
pub const CONNECTIONS_MAX: usize = 30;

/// Settings under which these faults show within seconds.
pub fn settings() -> Vec<(String, String)> {
    [("max_connections", CONNECTIONS_MAX.to_string()), ("deadlock_timeout", "200ms".to_owned())]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
}

/// Lets the server run a quarter of the time.
pub fn slow_down(server: &mut ManagedPostgres, time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        server.fault(Fault::Stop);
        std::thread::sleep(Duration::from_millis(150));
        server.fault(Fault::Continue);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A lock that nobody of ours can write past; it ends with this value.
pub struct Lock {
    holder: Child,
}

/// Takes what every writer needs first: the positions of load stages, in SQLite the database.
///
/// # Panics
/// When it cannot be had.
pub fn lock(url: &str) -> Lock {
    let mut command = if let Some(path) = url.strip_prefix("sqlite:") {
        let script = "import sqlite3,sys\ndb=sqlite3.connect(sys.argv[1],timeout=30,isolation_level=None)\n\
                      db.execute('BEGIN IMMEDIATE')\nprint('locked',flush=True)\nsys.stdin.read()";
        let mut python = Command::new(python());
        python.args(["-c", script, path.trim_start_matches("//")]);
        python
    } else {
        // After our commands psql reads on from us, and we say nothing more. What it warns is not buffered.
        let script = "{ echo 'BEGIN; LOCK TABLE stage_offset IN ACCESS EXCLUSIVE MODE;'; echo '\\warn locked'; cat; } \
                      | psql --no-psqlrc --quiet -v ON_ERROR_STOP=1 \"$0\" 2>&1";
        let mut shell = Command::new("sh");
        shell.args(["-c", script, url]);
        shell
    };
    let mut holder = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a client exists");
    let mut line = String::new();
    let told = BufReader::new(holder.stdout.take().expect("it was asked for a pipe")).read_line(&mut line);
    assert!(told.is_ok() && line.trim() == "locked", "no lock in {url}: {line}");
    Lock { holder }
}

impl Drop for Lock {
    /// The holder reads the end of its input and goes, and its transaction with it.
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let ended = self.holder.wait();
        assert!(ended.is_ok() || std::thread::panicking(), "the holder of a lock cannot be waited for");
    }
}

/// Locks positions of load stages one after the other and in both orders, so that transactions wait for each
/// other in a circle and the server ends one of them.
pub fn deadlock(server: &ManagedPostgres, time: Duration) {
    let lock = |partition: u32| {
        format!("SELECT 1 FROM stage_offset WHERE partition = {partition} ORDER BY topic FOR UPDATE;")
    };
    let crossing = |first: u32, second: u32| {
        format!("BEGIN; {} SELECT pg_sleep(0.1); {} COMMIT;", lock(first), lock(second))
    };
    run_for(server, time, &[crossing(0, 5), crossing(5, 0), crossing(1, 4), crossing(4, 1)]);
}

/// Ends every connection of ours and takes all that the server gives.
pub fn exhaust(server: &ManagedPostgres, time: Duration) {
    let hold = format!("SELECT pg_sleep({});", time.as_secs_f64());
    let mut sessions = vec![hold; CONNECTIONS_MAX + 5];
    sessions[0] = format!(
        "SELECT pg_sleep(0.5); SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
         WHERE application_name <> 'psql' AND backend_type = 'client backend'; SELECT pg_sleep({});",
        time.as_secs_f64()
    );
    run_for(server, time, &sessions);
}

/// Repeats each script in a session of its own until the time is over. That a session fails, because the
/// server refused it or chose it as the victim, is part of it.
fn run_for(server: &ManagedPostgres, time: Duration, scripts: &[String]) {
    let repeat =
        "while :; do psql --no-psqlrc --quiet --output=/dev/null \"$0\" --command \"$1\"; sleep 0.05; done";
    let seconds = format!("{:.1}", time.as_secs_f64());
    let sessions = scripts.iter().map(|script| {
        let mut session = Command::new("timeout");
        session.args([&seconds, "sh", "-c", repeat, &server.url(), script]);
        session.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        session.spawn().expect("timeout and psql exist")
    });
    for mut session in sessions.collect::<Vec<_>>() {
        session.wait().expect("a child can be waited for");
    }
}
