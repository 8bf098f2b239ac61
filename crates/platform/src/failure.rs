//! How a command fails: a message for people and an exit code for scripts.

use std::fmt;
use throughline_kafka::RegistryError;
use throughline_runtime::ports::Failure;

/// Exit codes of every command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed.
    Failed = 1,
    /// The command line, configuration or a file that it names is wrong.
    Usage = 2,
    /// A check found something: drift, a failing rule test, an unhealthy dependency.
    Found = 3,
    /// A dependency cannot be reached.
    Unreachable = 4,
    /// Interrupted.
    Interrupted = 130,
}

/// An error that ends a command.
#[derive(Debug)]
pub struct CliError {
    /// The exit code.
    pub exit: Exit,
    /// What, where, why, and what helps.
    pub message: String,
}

impl CliError {
    /// The command line, configuration or a named file is wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, message: message.into() }
    }

    /// The command could not do its work.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { exit: Exit::Failed, message: message.into() }
    }

    /// A dependency cannot be reached.
    pub fn unreachable(message: impl Into<String>) -> Self {
        Self { exit: Exit::Unreachable, message: message.into() }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CliError {}

impl From<Failure> for CliError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Dependency { dependency, message } => Self::unreachable(format!(
                "{dependency} cannot be used: {message}; `throughline doctor` checks each dependency"
            )),
            other => Self::failed(other.to_string()),
        }
    }
}

impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        Self::failed(error.to_string())
    }
}

impl From<anyhow::Error> for CliError {
    fn from(error: anyhow::Error) -> Self {
        Self::failed(format!("{error:#}"))
    }
}

impl From<RegistryError> for CliError {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Unavailable { .. } => Self::unreachable(error.to_string()),
            other => Self::failed(other.to_string()),
        }
    }
}
