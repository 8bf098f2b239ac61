//! What every long-running process needs: telemetry, signals, the HTTP pages, drain.

use crate::config::Config;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::roles::RunningRole;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use throughline_telemetry::{TelemetryConfig, TelemetryGuard};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// How long roles may take to commit what is in flight. Our Kubernetes files grant 45 s
/// before it kills.
pub const DRAIN_BUDGET: Duration = Duration::from_secs(25);

/// How long a loop may hang before its process ends: as long as Kubernetes takes to act on `/healthz`, so that
/// it is the same everywhere.
const HANG_LIMIT: Duration = Duration::from_secs(135);
/// How often it is looked at. Two looks in a row must agree: a process that was itself stopped for a while has
/// turned again by the second one.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Sets up logs, traces and the export of metrics.
///
/// # Errors
/// A usage error when a filter or endpoint is wrong.
pub fn start_telemetry(config: &Config) -> Result<TelemetryGuard, CliError> {
    let telemetry = TelemetryConfig { instance: config.instance.clone(), ..config.telemetry.clone() };
    throughline_telemetry::init(&telemetry).map_err(|e| CliError::usage(e.to_string()))
}

/// The wish to end, as signals state it.
#[derive(Clone)]
pub struct Signals(Arc<AtomicBool>);

impl Signals {
    /// Takes SIGINT and SIGTERM. The second of them ends the process at once.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn install() -> Result<Self, CliError> {
        let asked = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // Order matters: this one acts only if the flag was set by an earlier signal.
            signal_hook::flag::register_conditional_shutdown(
                signal,
                Exit::Interrupted as i32,
                Arc::clone(&asked),
            )?;
            signal_hook::flag::register(signal, Arc::clone(&asked))?;
        }
        Ok(Self(asked))
    }

    /// Says whether the process was asked to end.
    pub fn asked(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Waits until the process is asked to end, or `each`, called every `pause`, returns `false`.
    pub fn wait(&self, pause: Duration, mut each: impl FnMut() -> bool) {
        while !self.asked() && each() {
            std::thread::sleep(pause);
        }
    }

    /// Waits at most `limit` and says whether the process was asked to end.
    pub fn wait_at_most(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        self.wait(Duration::from_millis(50), || Instant::now() < end);
        self.asked()
    }
}

/// Serves `/metrics`, `/healthz`, `/readyz` and `/v1/status` until the returned runtime is dropped.
///
/// # Errors
/// A usage error that names the address and the setting when it is taken.
pub fn serve_http(context: &Context) -> Result<Runtime, CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("http")
        .enable_all()
        .build()?;
    let address = &context.config.http.listen;
    let listener = runtime.block_on(TcpListener::bind(address)).map_err(|e| {
        CliError::usage(format!(
            "cannot listen on `{address}` (`http.listen`, THROUGHLINE_HTTP__LISTEN): {e}"
        ))
    })?;
    let health = context.health.clone();
    let looked_at = health.clone();
    runtime.spawn(end_when_a_loop_hangs(
        LOOK_EVERY,
        move || looked_at.hung(HANG_LIMIT),
        |why| {
            tracing::error!("the process ends, to be started again: {why}");
            std::process::abort();
        },
    ));
    runtime.spawn(async move {
        if let Err(error) = throughline_telemetry::http::serve(listener, health, std::future::pending()).await
        {
            tracing::error!("the HTTP pages ended: {error}");
        }
    });
    Ok(runtime)
}

/// Looks every so often whether a role's loop hangs in a call that does not come back, as librdkafka's may when
/// brokers come and go, and ends the process where two looks in a row agree: only a new process gets out of that,
/// and whoever supervises this one starts it. Nothing is lost, as by any kill.
async fn end_when_a_loop_hangs(
    every: Duration,
    mut hung: impl FnMut() -> Vec<String>,
    end: impl FnOnce(&str),
) {
    let mut before = false;
    loop {
        tokio::time::sleep(every).await;
        let hung = hung();
        if before && !hung.is_empty() {
            return end(&hung.join("; "));
        }
        before = !hung.is_empty();
    }
}

/// Asks every role to end and waits for it within the budget.
///
/// # Errors
/// Exit code 1 that names the roles which did not drain.
pub fn drain(context: &Context, running: Vec<RunningRole>) -> Result<Exit, CliError> {
    drain_within(context, running, DRAIN_BUDGET)
}

fn drain_within(context: &Context, running: Vec<RunningRole>, budget: Duration) -> Result<Exit, CliError> {
    context.shutdown.request();
    let end = Instant::now() + budget;
    while running.iter().any(|role| !role.is_finished()) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut undrained = Vec::new();
    for role in running {
        let name = role.name();
        if !role.is_finished() || !role.join() {
            undrained.push(name);
        }
    }
    if undrained.is_empty() {
        return Ok(Exit::Done);
    }
    Err(CliError::failed(format!(
        "did not drain: {}; what was not committed will be read again at the next start",
        undrained.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roles::{self, Role};
    use throughline_telemetry::STALL_LIMIT;

    /// Ends when it is asked to.
    static WILLING: Role = Role {
        name: "willing",
        spec: None,
        run: |context, _| {
            while !context.shutdown.is_requested() {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        },
        predict: None,
    };
    /// Does not.
    static STUBBORN: Role = Role {
        name: "stubborn",
        spec: None,
        run: |_, _| {
            while !LET_GO.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        },
        predict: None,
    };
    static LET_GO: AtomicBool = AtomicBool::new(false);

    #[test]
    fn a_role_that_does_not_drain_within_the_budget_is_named_and_left() {
        let context = Context::new(Config::default()).expect("the embedded catalog");
        let start = |role| roles::start(&context, role).expect("a thread");
        let running = vec![start(&WILLING), start(&STUBBORN)];
        context.shutdown.request();
        while !running[0].is_finished() {
            std::thread::yield_now();
        }
        let error =
            drain_within(&context, running, Duration::from_millis(50)).expect_err("one did not drain");
        LET_GO.store(true, Ordering::Release);
        assert_eq!(error.exit, Exit::Failed);
        let said = error.to_string();
        assert!(said.contains("did not drain: stubborn;"), "{said}");
        assert!(matches!(drain(&context, vec![start(&WILLING)]), Ok(Exit::Done)));
    }

    #[test]
    fn a_process_ends_when_two_looks_in_a_row_find_a_loop_that_hangs() {
        let mut looks = ["", "a", "", "a", "b", "never"].into_iter();
        let hung = || looks.next().filter(|name| !name.is_empty()).map(str::to_owned).into_iter().collect();
        let mut ended = None;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        runtime.block_on(end_when_a_loop_hangs(Duration::from_millis(1), hung, |why| {
            ended = Some(why.to_owned());
        }));
        assert_eq!((ended.as_deref(), looks.next()), (Some("b"), Some("never")));
        assert!(HANG_LIMIT > STALL_LIMIT + 2 * LOOK_EVERY, "`/healthz` says it before");
    }
}
