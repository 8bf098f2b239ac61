//! A cheap load generator: prebuilt QoS 1 packets whose packet id and seq are patched in place, PUBACKs
//! counted byte by byte. It knows just enough MQTT 3.1.1 not to be what a benchmark measures.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Seqs have ten digits, so that they can be patched without moving bytes.
pub const SEQ_FIRST: u64 = 1_000_000_000;

/// What to send.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where to.
    pub address: SocketAddr,
    /// Connections; each is one device, `<site>/<device_prefix><n>`.
    pub connections: usize,
    /// Publishes that each connection keeps open, 1 to 65,535.
    pub open: usize,
    /// Messages of each connection.
    pub messages_each: u64,
    /// Messages a second of all connections together; `None`: as fast as they are acknowledged.
    pub rate: Option<f64>,
    /// The site.
    pub site: String,
    /// The beginning of the devices' names.
    pub device_prefix: String,
    /// The epoch of the readings: a new one for each run, so that they are not duplicates.
    pub epoch: u64,
    /// The readings' `values`, a JSON object.
    pub values: String,
    /// User and password.
    pub login: Option<(String, String)>,
    /// Gives up a connection on which nothing was acknowledged for so long.
    pub patience: Duration,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 1883)),
            connections: 50,
            open: 50,
            messages_each: 10_000,
            rate: None,
            site: "bench".to_owned(),
            device_prefix: "device-".to_owned(),
            epoch: 1,
            values: r#"{"temperature":21.5,"running":true,"mode":"auto"}"#.to_owned(),
            login: None,
            patience: Duration::from_secs(60),
        }
    }
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Messages sent.
    pub sent: u64,
    /// PUBACKs received.
    pub acknowledged: u64,
    /// From the first packet to the last PUBACK.
    pub elapsed: Duration,
    /// Connections that failed, with what the first of them said.
    pub failed: usize,
    /// What the first failed connection said.
    pub first_failure: Option<String>,
    latencies: Latencies,
}

impl Report {
    /// Returns acknowledged messages a second.
    pub fn rate(&self) -> f64 {
        self.acknowledged as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// Returns the time within which the fraction `quantile` of PUBACKs came, to within 5 %.
    pub fn latency(&self, quantile: f64) -> Duration {
        self.latencies.quantile(quantile)
    }
}

/// A histogram whose buckets grow by 5 % from 1 µs.
#[derive(Clone, Debug)]
struct Latencies(Vec<u64>);

const BUCKETS: usize = 400;
const GROWTH: f64 = 1.05;

impl Default for Latencies {
    fn default() -> Self {
        Self(vec![0; BUCKETS])
    }
}

impl Latencies {
    fn add(&mut self, latency: Duration, n: u64) {
        let us = latency.as_secs_f64() * 1e6;
        let bucket = us.max(1.0).log(GROWTH).ceil() as usize;
        self.0[bucket.min(BUCKETS - 1)] += n;
    }

    fn merge(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a += b);
    }

    fn quantile(&self, quantile: f64) -> Duration {
        let total: u64 = self.0.iter().sum();
        let wanted = (total as f64 * quantile.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.0.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Duration::from_secs_f64(GROWTH.powi(bucket as i32) / 1e6);
            }
        }
        Duration::ZERO
    }
}

/// Sends a load from this thread and returns when every connection has ended.
///
/// # Errors
/// When no runtime can be made. Connections that fail are counted in the report.
pub fn run(load: &Load) -> io::Result<Report> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(send(load))
}

async fn send(load: &Load) -> io::Result<Report> {
    let mut report = Report::default();
    let mut connections = JoinSet::new();
    let start = Instant::now();
    for index in 0..load.connections {
        let load = load.clone();
        connections.spawn(async move {
            let mut seen = Report::default();
            if let Err(e) = connection(&load, index, &mut seen).await {
                seen.failed = 1;
                seen.first_failure = Some(e.to_string());
            }
            seen
        });
    }
    while let Some(seen) = connections.join_next().await {
        let seen = seen.map_err(io::Error::other)?;
        report.sent += seen.sent;
        report.acknowledged += seen.acknowledged;
        report.failed += seen.failed;
        report.first_failure = report.first_failure.or(seen.first_failure);
        report.latencies.merge(&seen.latencies);
    }
    report.elapsed = start.elapsed();
    Ok(report)
}

async fn connection(load: &Load, index: usize, seen: &mut Report) -> io::Result<()> {
    let device = format!("{}{index}", load.device_prefix);
    let mut socket = TcpStream::connect(load.address).await?;
    socket.set_nodelay(true)?;
    connect(&mut socket, load, &device).await?;
    let template = Template::new(load, &device);
    let open_max = load.open.clamp(1, 65_535) as u64;
    // When the packet of a packet id went out; ids follow each other, so the oldest is acknowledged first.
    let mut sent_at = vec![Instant::now(); open_max as usize];
    let mut out = Vec::new();
    let mut input = vec![0u8; 16 << 10];
    let mut filled = 0;
    let pause = load.rate.map(|rate| Duration::from_secs_f64(load.connections as f64 / rate.max(1e-3)));
    let start = Instant::now();
    while seen.acknowledged < load.messages_each {
        let now = Instant::now();
        let due =
            pause.map_or(u64::MAX, |pause| (start.elapsed().as_secs_f64() / pause.as_secs_f64()) as u64 + 1);
        let may = (seen.acknowledged + open_max).min(load.messages_each).min(due);
        out.clear();
        while seen.sent < may {
            template.write(seen.sent, (seen.sent % open_max) as u16 + 1, &mut out);
            sent_at[(seen.sent % open_max) as usize] = now;
            seen.sent += 1;
        }
        if !out.is_empty() {
            socket.write_all(&out).await?;
        }
        let wait = pause.filter(|_| may == due).unwrap_or(load.patience).min(load.patience);
        let n = match tokio::time::timeout(wait, socket.read(&mut input[filled..])).await {
            Ok(read) => read?,
            Err(_) if pause.is_some() => continue,
            Err(_) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "nothing was acknowledged in time"));
            }
        };
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the listener closed the connection"));
        }
        filled += n;
        let now = Instant::now();
        let whole = filled / 4 * 4;
        for puback in input[..whole].chunks_exact(4) {
            let expected = (seen.acknowledged % open_max) as u16 + 1;
            if puback[..2] != [0x40, 2] || puback[2..] != expected.to_be_bytes() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a PUBACK is out of order"));
            }
            seen.latencies.add(now - sent_at[usize::from(expected) - 1], 1);
            seen.acknowledged += 1;
        }
        input.copy_within(whole..filled, 0);
        filled -= whole;
    }
    socket.write_all(&[0xe0, 0]).await
}

async fn connect(socket: &mut TcpStream, load: &Load, device: &str) -> io::Result<()> {
    let client_id = format!("{}/{device}", load.site);
    let mut body = b"\0\x04MQTT\x04\x02\0\0".to_vec();
    push_text(&mut body, client_id.as_bytes());
    if let Some((user, password)) = &load.login {
        body[7] |= 0xc0;
        push_text(&mut body, user.as_bytes());
        push_text(&mut body, password.as_bytes());
    }
    let mut packet = vec![0x10];
    push_length(&mut packet, body.len());
    packet.extend_from_slice(&body);
    socket.write_all(&packet).await?;
    let mut connack = [0; 4];
    socket.read_exact(&mut connack).await?;
    if connack[..2] == [0x20, 2] && connack[3] == 0 {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("CONNECT was refused: {}", connack[3])))
}

struct Template {
    packet: Vec<u8>,
    packet_id_at: usize,
    seq_at: usize,
}

impl Template {
    fn new(load: &Load, device: &str) -> Self {
        let mut body = Vec::new();
        push_text(&mut body, format!("tl/{}/{device}/telemetry", load.site).as_bytes());
        let packet_id_in_body = body.len();
        body.extend_from_slice(&[0, 1]);
        let head = format!("{{\"epoch\":{},\"seq\":", load.epoch);
        body.extend_from_slice(head.as_bytes());
        let seq_in_body = body.len();
        body.extend_from_slice(format!("{SEQ_FIRST},\"values\":{}}}", load.values).as_bytes());
        let mut packet = vec![0x32];
        push_length(&mut packet, body.len());
        let header = packet.len();
        packet.extend_from_slice(&body);
        Self { packet, packet_id_at: header + packet_id_in_body, seq_at: header + seq_in_body }
    }

    fn write(&self, n: u64, packet_id: u16, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.packet);
        out[start + self.packet_id_at..start + self.packet_id_at + 2]
            .copy_from_slice(&packet_id.to_be_bytes());
        let mut seq = SEQ_FIRST + n;
        for at in (0..10).rev() {
            out[start + self.seq_at + at] = b'0' + (seq % 10) as u8;
            seq /= 10;
        }
    }
}

fn push_text(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text);
}

fn push_length(out: &mut Vec<u8>, mut len: usize) {
    loop {
        let byte = (len % 128) as u8;
        len /= 128;
        if len == 0 {
            out.push(byte);
            return;
        }
        out.push(byte | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_carry_their_id_and_seq() {
        let template = Template::new(&Load::default(), "d");
        let mut out = Vec::new();
        template.write(7, 300, &mut out);
        let text = String::from_utf8_lossy(&out);
        assert!(
            text.contains("tl/bench/d/telemetry\u{1},{\"epoch\":1,\"seq\":1000000007,\"values\":{"),
            "{text}"
        );
        let frame = crate::gate::frame(&out, 1 << 20);
        assert!(matches!(frame, crate::gate::Frame::Packet { len, .. } if len == out.len()), "{frame:?}");
    }

    #[test]
    fn quantiles_are_within_five_percent() {
        let mut latencies = Latencies::default();
        for ms in 1..=1000 {
            latencies.add(Duration::from_millis(ms), 1);
        }
        let p50 = latencies.quantile(0.5).as_secs_f64();
        assert!((0.5..0.53).contains(&p50), "{p50}");
    }
}
