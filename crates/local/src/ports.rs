//! Free ports on the loopback interface.

use crate::error::LocalError;
use parking_lot::Mutex;
use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};

/// Ports given out by this process, so that two components started at the same time get different ones.
static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);

/// Below what Linux gives to connections that go out (32768 to 60999): one of those would take a port between
/// the look at it and the listening on it.
const BELOW: std::ops::Range<u16> = 12_000..32_000;
/// How many ports are looked at before the system is asked for one.
const LOOKS: usize = 200;

/// Returns a port of 127.0.0.1 that nobody listens on now and that this process has not given out before.
///
/// # Errors
/// When the system has none left.
pub fn free() -> Result<u16, LocalError> {
    for _ in 0..LOOKS {
        // The random half of a UUID: processes that start together look in different places.
        let random = uuid::Uuid::now_v7().as_u64_pair().1;
        let port = BELOW.start + (random % u64::from(BELOW.end - BELOW.start)) as u16;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() && is_first(port) {
            return Ok(port);
        }
    }
    loop {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .map_err(|source| LocalError::PortTaken { name: "a component", port: 0, source })?
            .port();
        if is_first(port) {
            return Ok(port);
        }
    }
}

fn is_first(port: u16) -> bool {
    GIVEN.lock().get_or_insert_default().insert(port)
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
