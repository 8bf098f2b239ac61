//! `throughline run`: chosen roles against existing services.

use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::process::{self, Signals};
use crate::roles::{self, ROLES, Role, RunningRole};
use std::time::Duration;

/// Arguments of `run`.
#[derive(clap::Args)]
pub struct Args {
    /// Roles: bridge, evaluate_rules, update_twin, bridge_data, load_warehouse, project_twins, notify,
    /// reprocess_dead_letters, watch
    #[arg(required = true)]
    roles: Vec<String>,
}

/// Runs the roles until SIGTERM or SIGINT, then drains them.
///
/// # Errors
/// Usage errors, and exit code 1 when a role did not drain.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let chosen = choose(&args.roles)?;
    let config = flags.load()?;
    for role in &chosen {
        if let Some(lacking) = role.lacks(&config) {
            return Err(CliError::usage(format!("`{}` cannot run: {lacking}", role.name)));
        }
    }
    let _telemetry = process::start_telemetry(&config)?;
    let signals = Signals::install()?;
    let context = Context::new(config)?;
    let _http = process::serve_http(&context)?;
    if !bind_schemas_patiently(&context, &signals, &chosen)? {
        return Ok(Exit::Done);
    }
    let mut running = Vec::new();
    for role in chosen {
        running.push(roles::start(&context, role)?);
    }
    tracing::info!(roles = args.roles.join(","), instance = context.config.instance, "running");
    // A role that stopped because a person must act stays, so that its status can be read; after a panic the
    // process ends, so that whatever watches it starts it again.
    signals.wait(Duration::from_millis(200), || !running.iter().any(RunningRole::has_panicked));
    process::drain(&context, running)
}

fn choose(names: &[String]) -> Result<Vec<&'static Role>, CliError> {
    let known: Vec<&str> = ROLES.iter().map(|role| role.name).collect();
    let mut chosen = Vec::new();
    for name in names {
        let role = ROLES.iter().find(|role| role.name == name).ok_or_else(|| {
            CliError::usage(format!("there is no role `{name}`; the roles are {}", known.join(", ")))
        })?;
        chosen.push(role);
    }
    Ok(chosen)
}

/// Binds the schemas; while the registry is away it waits and says so in the health of every role.
/// Returns `false` when the process shall end before.
fn bind_schemas_patiently(
    context: &Context,
    signals: &Signals,
    chosen: &[&'static Role],
) -> Result<bool, CliError> {
    let mut said = String::new();
    loop {
        let error = match context.bind_schemas() {
            Ok(()) => return Ok(true),
            Err(error) => error,
        };
        // A schema that is not registered yet comes with `topics apply`, which may run at the same time.
        for role in chosen {
            let health = context.health.role(role.name);
            health.ready(false, &error.to_string());
            health.turned();
        }
        if said != error.to_string() {
            said = error.to_string();
            tracing::warn!("waiting: {said}");
        }
        if signals.wait_at_most(Duration::from_secs(1)) {
            return Ok(false);
        }
    }
}
