//! `throughline`: one subcommand a role or a command. The composition root: the only place where stages,
//! adapters and loops meet.
//!
//! A library beside the program only so that fuzzing reaches what reads texts of others.

mod bridge;
mod commands;
pub mod config;
mod context;
mod demo;
mod failure;
mod output;
mod predict;
mod process;
mod records;
mod replay_policies;
mod roles;
mod simulation;
mod watch;
pub mod webhook;

pub use records::header;

use clap::{CommandFactory, Parser, Subcommand};
use failure::{CliError, Exit};
use std::process::ExitCode;

/// Throughline moves messages between devices and services, and shows where each of them is.
#[derive(Parser)]
#[command(name = "throughline", version, about, propagate_version = true, subcommand_required = true)]
struct Cli {
    #[command(flatten)]
    flags: config::Flags,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the whole platform on this machine: Kafka, registry, every role, a simulated site
    Up(commands::up::Args),
    /// Run chosen roles against existing services
    Run(commands::run::Args),
    /// List, show, plan and apply topics and schemas
    Topics(commands::topics::Args),
    /// Apply, list, test and disable rules
    Rules(commands::rules::Args),
    /// Show a device's twin and set its desired fields
    Twin(commands::twin::Args),
    /// List and show devices
    Devices(commands::devices::Args),
    /// Follow one message: where is it, and who is past it
    Trace(commands::trace::Args),
    /// Read a topic, decoded and filtered
    Tap(commands::tap::Args),
    /// List, show, replay and drop dead letters
    Dlq(commands::dlq::Args),
    /// List consumer groups with their books, and adopt offsets that a foreign tool moved
    Groups(commands::groups::Args),
    /// Send the messages of simulated sites
    Simulate(commands::simulate::Args),
    /// Check every dependency and say what fixes it
    Doctor(commands::doctor::Args),
    /// Measure bridge, stages and stores beside plain clients
    Bench(commands::bench::Args),
    /// Print what each stage does about each failure
    Policy(commands::policy::Args),
    /// Describe an error code
    Explain(commands::explain::Args),
    /// Print the completion script of a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = dispatch(cli);
    match result {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(error) => {
            output::error(&error.to_string());
            ExitCode::from(error.exit as u8)
        }
    }
}

fn dispatch(cli: Cli) -> Result<Exit, CliError> {
    let flags = &cli.flags;
    match cli.command {
        Command::Up(args) => commands::up::run(flags, &args),
        Command::Run(args) => commands::run::run(flags, &args),
        Command::Topics(args) => commands::topics::run(flags, &args),
        Command::Rules(args) => commands::rules::run(flags, &args),
        Command::Twin(args) => commands::twin::run(flags, &args),
        Command::Devices(args) => commands::devices::run(flags, &args),
        Command::Trace(args) => commands::trace::run(flags, &args),
        Command::Tap(args) => commands::tap::run(flags, &args),
        Command::Dlq(args) => commands::dlq::run(flags, &args),
        Command::Groups(args) => commands::groups::run(flags, &args),
        Command::Simulate(args) => commands::simulate::run(flags, &args),
        Command::Doctor(args) => commands::doctor::run(flags, &args),
        Command::Bench(args) => commands::bench::run(flags, &args),
        Command::Policy(args) => commands::policy::run(flags, &args),
        Command::Explain(args) => commands::explain::run(flags, &args),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "throughline", &mut std::io::stdout());
            Ok(Exit::Done)
        }
    }
}
