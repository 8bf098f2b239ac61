//! What every long-running process needs: telemetry, signals, the HTTP pages, drain.

use crate::config::Config;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::roles::RunningRole;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use throughline_telemetry::{Health, TelemetryConfig, TelemetryGuard};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// How long roles may take to commit what is in flight. Our Kubernetes files grant 45 s
/// before it kills.
const DRAIN_BUDGET: Duration = Duration::from_secs(25);

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
    runtime.spawn(end_when_a_loop_hangs(health.clone()));
    runtime.spawn(async move {
        if let Err(error) = throughline_telemetry::http::serve(listener, health, std::future::pending()).await
        {
            tracing::error!("the HTTP pages ended: {error}");
        }
    });
    Ok(runtime)
}

/// Ends the process when a role's loop hangs in a call that does not come back, as librdkafka's may when brokers
/// come and go: only a new process gets out of that, and whoever supervises this one starts it. Nothing is
/// lost, as by any kill.
async fn end_when_a_loop_hangs(health: Health) {
    let mut before = false;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let hung = health.hung(HANG_LIMIT);
        if before && !hung.is_empty() {
            tracing::error!("the process ends, to be started again: {}", hung.join("; "));
            std::process::abort();
        }
        before = !hung.is_empty();
    }
}

/// Asks every role to end and waits for it within the budget.
///
/// # Errors
/// Exit code 1 that names the roles which did not drain.
pub fn drain(context: &Context, running: Vec<RunningRole>) -> Result<Exit, CliError> {
    context.shutdown.request();
    let end = Instant::now() + DRAIN_BUDGET;
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
