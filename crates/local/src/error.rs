//! What can go wrong on one machine, in words that help.

use std::path::{Path, PathBuf};

/// Why a component cannot be started, reached or stopped.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// A file or directory cannot be used.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: `read`, `create` …
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another process uses the directory.
    #[error("{} is in use by {owner}; stop it, or choose another directory with --data-dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// `process 4711`, where it is known.
        owner: String,
    },
    /// A program is not installed.
    #[error("{program} is needed for {purpose} and was not found; {remedy}")]
    Missing {
        /// The program.
        program: &'static str,
        /// What needs it.
        purpose: &'static str,
        /// The commands that help.
        remedy: &'static str,
    },
    /// A port that was asked for is taken.
    #[error("port {port} on 127.0.0.1, which {name} shall use, is taken: {source}")]
    PortTaken {
        /// Which component wants it.
        name: &'static str,
        /// The port.
        port: u16,
        /// What the system said.
        source: std::io::Error,
    },
    /// The download of artifacts failed.
    #[error("cannot download {what}: {message}")]
    Download {
        /// What was wanted.
        what: String,
        /// The last lines of the tool.
        message: String,
    },
    /// A component did not start, or ended.
    #[error("{name} {what}; the end of its log {}:\n{tail}", log.display())]
    Failed {
        /// The component.
        name: &'static str,
        /// What happened: `ended with exit status: 1`, `was not ready within 60 s`.
        what: String,
        /// Its log file.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// The registry's topic cannot be read or written.
    #[error("the embedded registry cannot use its topic `{topic}`: {message}")]
    Registry {
        /// The topic.
        topic: String,
        /// What Kafka said.
        message: String,
    },
}

impl LocalError {
    /// Makes a function for `map_err` that names what was tried on which path.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}
