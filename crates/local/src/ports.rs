//! Free ports on the loopback interface.

use crate::error::LocalError;
use parking_lot::Mutex;
use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};

/// Ports given out by this process, so that two components started at the same time get different ones.
static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);

/// Returns a port of 127.0.0.1 that nobody listens on now and that this process has not given out before.
///
/// # Errors
/// When the system has none left.
pub fn free() -> Result<u16, LocalError> {
    loop {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .map_err(|source| LocalError::PortTaken { name: "a component", port: 0, source })?
            .port();
        if GIVEN.lock().get_or_insert_default().insert(port) {
            return Ok(port);
        }
    }
}

/// Returns `wanted` after checking that it can be listened on, or a free port.
///
/// # Errors
/// [`LocalError::PortTaken`], with the name of the component that wanted it.
pub fn wanted_or_free(name: &'static str, wanted: Option<u16>) -> Result<u16, LocalError> {
    let Some(port) = wanted else { return free() };
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|source| LocalError::PortTaken {
        name,
        port,
        source,
    })?;
    Ok(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_given_out_once() {
        let ports: HashSet<u16> = (0..50).map(|_| free().unwrap()).collect();
        assert_eq!(ports.len(), 50);
    }

    #[test]
    fn a_taken_port_is_named() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let message = wanted_or_free("Kafka", Some(port)).unwrap_err().to_string();
        assert!(message.starts_with(&format!("port {port} on 127.0.0.1, which Kafka shall use, is taken")));
    }
}
