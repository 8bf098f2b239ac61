//! A real Apicurio Registry, in memory, as a child of this process: the second implementation that the
//! conformance suite of registries runs against.

use crate::artifacts::{self, Notice};
use crate::child::{Program, Supervised, words};
use crate::error::LocalError;
use crate::ports;
use rustix::process::Signal;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

/// Quarkus takes 5 s on an idle machine.
const START_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(15);
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// A running registry. Dropping it kills it.
#[derive(Debug)]
pub struct ManagedApicurio {
    port: u16,
    child: Supervised,
}

impl ManagedApicurio {
    /// Starts a registry with an empty memory and returns when it is ready. The first start on a machine
    /// downloads it.
    ///
    /// # Errors
    /// [`LocalError::Missing`], [`LocalError::Download`], [`LocalError::Failed`] with the end of the log.
    pub fn start(dir: &Path, notice: Notice<'_>) -> Result<Self, LocalError> {
        let jars = artifacts::apicurio(notice)?;
        let java = artifacts::java()?;
        let port = ports::free()?;
        std::fs::create_dir_all(dir).map_err(LocalError::io("create", dir))?;
        let dir = dir.canonicalize().map_err(LocalError::io("find", dir))?;
        let command = [
            java.display().to_string(),
            "-Xmx384m".to_owned(),
            "-XX:+UseSerialGC".to_owned(),
            "-XX:TieredStopAtLevel=1".to_owned(),
            // Also makes this process recognisable as one of this directory.
            format!("-Djava.io.tmpdir={}", dir.display()),
            "-Dquarkus.http.host=127.0.0.1".to_owned(),
            format!("-Dquarkus.http.port={port}"),
            "-Dquarkus.log.level=WARN".to_owned(),
            "-jar".to_owned(),
            jars.join("apicurio-registry-app-2.6.13.Final-runner.jar").display().to_string(),
        ];
        let program =
            Program { name: "apicurio", dir: &dir, command: words(command), env: Vec::new(), user: None };
        let mut child = Supervised::spawn(program)?;
        child.wait_ready(START_LIMIT, || is_ready(port).unwrap_or(false))?;
        Ok(Self { port, child })
    }

    /// Returns the base address of its Confluent-compatible API.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/apis/ccompat/v7", self.port)
    }

    /// Ends it in order; its memory is gone.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn stop(self) -> Result<(), LocalError> {
        self.child.stop(Signal::TERM, STOP_LIMIT).map(drop)
    }
}

/// Asks its own readiness page.
fn is_ready(port: u16) -> std::io::Result<bool> {
    let mut stream =
        TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), ANSWER_LIMIT)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    stream.write_all(b"GET /health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")?;
    let mut answer = [0; 15];
    stream.read_exact(&mut answer)?;
    Ok(&answer[9..12] == b"200")
}
