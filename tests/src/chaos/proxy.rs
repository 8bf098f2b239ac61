//! A link whose packets can be lost without leave of the system: bytes are held, and connections stay open.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// How long held bytes, or the end of the proxy, may stay unnoticed.
const TURN: Duration = Duration::from_millis(20);

/// Passes the connections of one port on to another until it is dropped.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    holds: AtomicBool,
    ends: AtomicBool,
}

impl Proxy {
    /// Listens on a free port of this machine and passes on to `port`, which may open later.
    ///
    /// # Panics
    /// When no port can be opened.
    pub fn start(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port can be opened");
        listener.set_nonblocking(true).expect("a listener can be asked without waiting");
        let own = listener.local_addr().expect("an open port is known").port();
        let shared = Arc::<Shared>::default();
        let theirs = Arc::clone(&shared);
        thread::spawn(move || {
            while !theirs.ends.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((client, _)) => pass_on(client, port, &theirs),
                    Err(_) => thread::sleep(TURN),
                }
            }
        });
        Self { port: own, shared }
    }

    /// Returns the port to connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Says whether bytes are held, of both directions, from now on.
    pub fn hold(&self, holds: bool) {
        self.shared.holds.store(holds, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
    }
}

/// Who listens nowhere refuses a connection; the client sees it closed.
fn pass_on(client: TcpStream, port: u16, shared: &Arc<Shared>) {
    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { return };
    for (from, to) in [(&client, &server), (&server, &client)] {
        let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else { return };
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            copy(&from, &to, &shared);
            // Both directions end together, as far as they have not.
            let _closed_already =
                (from.shutdown(std::net::Shutdown::Both), to.shutdown(std::net::Shutdown::Both));
        });
    }
}

fn copy(mut from: &TcpStream, mut to: &TcpStream, shared: &Shared) {
    if from.set_nonblocking(false).and_then(|()| from.set_read_timeout(Some(TURN))).is_err() {
        return;
    }
    let mut bytes = [0; 16_384];
    while !shared.ends.load(Ordering::Relaxed) {
        if shared.holds.load(Ordering::Relaxed) {
            thread::sleep(TURN);
            continue;
        }
        match from.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => {
                if to.write_all(&bytes[..count]).is_err() {
                    return;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}
