//! What other users of a PostgreSQL do to it.

use std::process::{Command, Stdio};
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
