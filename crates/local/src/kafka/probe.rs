//! Asks a broker whether it serves its clients, in two small requests of Kafka's own protocol.
//!
//! A port that accepts connections is not enough: a broker accepts before the controller has let it in, and
//! then answers metadata requests with no broker at all.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

/// How long one answer may take; the caller asks again.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// `Metadata`, key 3, in version 1 for no topic, correlation id 7, client id "probe".
const METADATA_REQUEST: &[u8] = &[0, 3, 0, 1, 0, 0, 0, 7, 0, 5, b'p', b'r', b'o', b'b', b'e', 0, 0, 0, 0];

/// Says whether the broker on this port of 127.0.0.1 knows itself as part of its cluster.
pub(super) fn serves(port: u16) -> bool {
    metadata(port).is_ok_and(|answer| knows_a_broker(&answer))
}

fn metadata(port: u16) -> std::io::Result<Vec<u8>> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_LIMIT)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    stream.set_write_timeout(Some(ANSWER_LIMIT))?;
    stream.write_all(&(METADATA_REQUEST.len() as u32).to_be_bytes())?;
    stream.write_all(METADATA_REQUEST)?;
    let mut size = [0; 4];
    stream.read_exact(&mut size)?;
    let mut answer = Vec::new();
    // An honest answer has about 60 bytes; whoever else listens there cannot make us read without end.
    stream.take(u64::from(u32::from_be_bytes(size)).min(64 * 1024)).read_to_end(&mut answer)?;
    Ok(answer)
}

/// Reads correlation id and number of brokers.
fn knows_a_broker(answer: &[u8]) -> bool {
    let word = |at: usize| answer.get(at..at + 4).map(|b| i32::from_be_bytes([b[0], b[1], b[2], b[3]]));
    word(0) == Some(7) && word(4).is_some_and(|brokers| brokers > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_with_a_broker_counts() {
        for (answer, expected) in [
            (&[0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 1][..], true),
            (&[0, 0, 0, 7, 0, 0, 0, 0], false),
            (&[0, 0, 0, 8, 0, 0, 0, 1], false),
            (&[0, 0, 0, 7, 0, 0], false),
            (b"HTTP/1.1 400 Bad Request", false),
        ] {
            assert_eq!(knows_a_broker(answer), expected, "{answer:?}");
        }
    }
}
