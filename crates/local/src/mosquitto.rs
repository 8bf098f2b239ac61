//! A real Mosquitto as a child of this process, to stand for an existing MQTT broker.

use crate::child::{Fault, Program, Supervised, find_program, words};
use crate::error::LocalError;
use crate::ports;
use rustix::process::Signal;
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

const START_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// How a managed Mosquitto is made.
#[derive(Clone, Debug)]
pub struct MosquittoOptions {
    /// Its directory; sessions and queued messages of an earlier start there are found again.
    pub data_dir: PathBuf,
    /// The port on 127.0.0.1, or `None` for a free one.
    pub port: Option<u16>,
    /// Lines appended to its configuration.
    pub config: String,
}

impl MosquittoOptions {
    /// Makes options for a directory: a free port, anonymous clients, nothing dropped from queues.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self { data_dir: data_dir.into(), port: None, config: String::new() }
    }
}

/// A running Mosquitto. Dropping it kills it; [`ManagedMosquitto::stop`] ends it in order.
#[derive(Debug)]
pub struct ManagedMosquitto {
    options: MosquittoOptions,
    binary: PathBuf,
    port: u16,
    child: Option<Supervised>,
}

impl ManagedMosquitto {
    /// Starts it and returns when it accepts connections.
    ///
    /// # Errors
    /// [`LocalError::Missing`] without Mosquitto, [`LocalError::PortTaken`], [`LocalError::InUse`],
    /// [`LocalError::Failed`] with the end of the log.
    pub fn start(options: MosquittoOptions) -> Result<Self, LocalError> {
        let binary = find_program("mosquitto").ok_or(LocalError::Missing {
            program: "mosquitto",
            purpose: "the managed MQTT broker",
            remedy: "install it: `apt-get install mosquitto` on Debian and Ubuntu, `dnf install mosquitto` on \
                     Fedora, `brew install mosquitto` on macOS",
        })?;
        let port = ports::wanted_or_free("Mosquitto", options.port)?;
        let mut mosquitto = Self { options, binary, port, child: None };
        mosquitto.launch()?;
        Ok(mosquitto)
    }

    /// Returns host and port.
    pub fn addr(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Returns the port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns its process id, or `None` while it does not run.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Supervised::pid)
    }

    /// Does a fault to it. After [`Fault::Kill`] go on with [`ManagedMosquitto::restart`].
    pub fn fault(&mut self, fault: Fault) {
        if let Some(child) = &self.child {
            child.fault(fault);
        }
        if fault == Fault::Kill {
            self.child = None;
        }
    }

    /// Starts it again on the same port, ending it in order before where it runs.
    ///
    /// # Errors
    /// As [`ManagedMosquitto::start`].
    pub fn restart(&mut self) -> Result<(), LocalError> {
        if let Some(child) = self.child.take() {
            child.stop(Signal::TERM, STOP_LIMIT)?;
        }
        self.launch()
    }

    /// Ends it in order; its persistent sessions are saved.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn stop(mut self) -> Result<(), LocalError> {
        match self.child.take() {
            Some(child) => child.stop(Signal::TERM, STOP_LIMIT).map(drop),
            None => Ok(()),
        }
    }

    fn launch(&mut self) -> Result<(), LocalError> {
        let dir = self.options.data_dir.clone();
        std::fs::create_dir_all(&dir).map_err(LocalError::io("create", &dir))?;
        let dir = dir.canonicalize().map_err(LocalError::io("find", &dir))?;
        let config = dir.join("mosquitto.conf");
        // As root it would change to a user of its own, who cannot write here.
        let user = if rustix::process::geteuid().is_root() { "user root\n" } else { "" };
        let text = format!(
            "listener {} 127.0.0.1\nallow_anonymous true\n{user}persistence true\npersistence_location {}/\n\
             log_dest stdout\nlog_type error\nlog_type warning\nmax_queued_messages 0\n\
             max_inflight_messages 0\n{}\n",
            self.port,
            dir.display(),
            self.options.config
        );
        std::fs::write(&config, text).map_err(LocalError::io("write", &config))?;
        let command = words([self.binary.clone(), "-c".into(), config]);
        let mut child = Supervised::spawn(Program {
            name: "mosquitto",
            dir: &dir,
            command,
            env: Vec::new(),
            user: None,
        })?;
        let port = self.port;
        child.wait_ready(START_LIMIT, || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok())?;
        self.child = Some(child);
        Ok(())
    }
}
