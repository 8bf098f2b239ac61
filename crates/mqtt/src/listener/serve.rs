//! The task of a connection: reads, frames, passes packets to the gate and the crate, and pauses at bounds.

use super::conn::{Conn, Phase};
use super::packets::{self, Connect};
use super::worker::Worker;
use super::{Event, Packet};
use crate::gate::{self, Frame, Violation};
use crate::sessions::Owner;
use mqtt_protocol_core::mqtt::common::Cursor;
use mqtt_protocol_core::mqtt::connection::event::TimerKind;
use mqtt_protocol_core::mqtt::packet::GenericPacketTrait;
use mqtt_protocol_core::mqtt::packet::{Property, Qos};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;

/// How long a closed connection may take to accept our last bytes and to go: without it the system would
/// reset the connection and the client would miss why it was closed.
const LINGER: Duration = Duration::from_millis(500);

impl Worker {
    /// Takes a socket that the acceptor dealt to this worker.
    pub(crate) fn accept(self: &Rc<Self>, stream: std::net::TcpStream, peer: SocketAddr) {
        let stream = match TcpStream::from_std(stream) {
            Ok(stream) => stream,
            Err(e) => {
                self.meters.connect("socket_error");
                self.meters.log(|_| tracing::warn!(%peer, error = %e, "cannot serve an MQTT connection"));
                self.shared.forget_connection();
                return;
            }
        };
        let (read, write) = stream.into_split();
        let deadline = Instant::now() + self.shared.connect_deadline();
        let slots_max = super::asides::SLOT as usize;
        let conn = self.slots.borrow_mut().insert(slots_max, |slot, generation| {
            let owner = Owner { worker: self.index, slot, generation };
            Rc::new(Conn::new(owner, peer, write, deadline))
        });
        match conn {
            Some(conn) => {
                tokio::task::spawn_local(serve(Rc::clone(self), conn, read));
            }
            None => {
                self.meters.connect("connections_max");
                self.shared.forget_connection();
            }
        }
    }

    /// Says whether packets of the connection may be processed.
    pub(crate) fn may_take(&self, conn: &Conn) -> bool {
        let bounds = &self.shared.config.bounds;
        let state = conn.state.borrow();
        matches!(state.phase, Phase::New | Phase::Open)
            && self.draining.get().is_none()
            && state.held.is_none()
            && state.ring.len() < usize::from(bounds.open_publishes_max.max(1))
            && state.ring.bytes() < bounds.open_bytes_max
            && state.out.len() < bounds.out_bytes_max
    }

    /// Says whether anything may be read: all connections together hold less than they may.
    pub(crate) fn has_room(&self) -> bool {
        self.shared.held_bytes.load(Ordering::Relaxed) < self.shared.config.bounds.held_bytes_max
    }

    /// Adds what a connection holds to the sum of all.
    pub(crate) fn account(&self, conn: &Conn) {
        let bytes = conn.holds_bytes();
        let before = conn.held_bytes.replace(bytes);
        if bytes != before {
            // Wrapping addition is subtraction where the number fell.
            self.shared.held_bytes.fetch_add(bytes.wrapping_sub(before), Ordering::Relaxed);
        }
    }

    /// Wakes the connections that waited for the others to hold less.
    pub(crate) fn make_use_of_room(&self) {
        if self.crowded.get() && self.has_room() {
            self.crowded.set(false);
            self.slots.borrow().all().iter().for_each(|conn| conn.wake.notify_one());
        }
    }

    /// Notes that reading stopped or goes on. Who was not read gets its keep-alive anew.
    fn set_paused(&self, conn: &Conn, paused: bool) {
        if conn.paused.replace(paused) && !paused {
            let mut state = conn.state.borrow_mut();
            let keep_alive = state.client.as_ref().map(|client| client.keep_alive);
            if let Some(keep_alive) = keep_alive.filter(|_| state.phase == Phase::Open) {
                state.deadline = (!keep_alive.is_zero()).then(|| Instant::now() + keep_alive * 3 / 2);
            }
        }
    }

    fn read(self: &Rc<Self>, conn: &Rc<Conn>, socket: &OwnedReadHalf) {
        let mut buffer = self.buffer.borrow_mut();
        match socket.try_read(&mut buffer) {
            Ok(0) => self.close(conn, "connection_lost", 0),
            Ok(n) => self.feed(conn, &buffer[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.close(conn, "connection_lost", 0),
        }
    }

    /// Processes `data` behind what was left before; what cannot be processed yet is kept.
    fn feed(self: &Rc<Self>, conn: &Rc<Conn>, data: &[u8]) {
        let mut unread = std::mem::take(&mut conn.state.borrow_mut().unread);
        if unread.is_empty() {
            let used = self.packets(conn, data);
            unread.extend_from_slice(&data[used..]);
        } else {
            unread.extend_from_slice(data);
            let used = self.packets(conn, &unread);
            unread.drain(..used);
        }
        if unread.is_empty() && unread.capacity() > 4096 {
            unread = Vec::new();
        }
        let is_part = !unread.is_empty() && !conn.stalled.get();
        conn.state.borrow_mut().unread = unread;
        self.account(conn);
        if is_part && !self.has_room() {
            // Nothing is read that would complete the packet, and so its bytes would never be free again.
            self.close(conn, "held_bytes", 0x97);
        }
    }

    /// Processes whole packets until a bound, and returns the bytes used.
    fn packets(self: &Rc<Self>, conn: &Rc<Conn>, bytes: &[u8]) -> usize {
        let len_max = self.shared.config.bounds.packet_bytes_max;
        let mut used = 0;
        conn.stalled.set(false);
        while used < bytes.len() && !conn.is_closing() {
            if !self.may_take(conn) {
                conn.stalled.set(true);
                break;
            }
            match gate::frame(&bytes[used..], len_max) {
                Frame::Incomplete => break,
                Frame::TooLarge => {
                    self.meters.refused("packet_too_large");
                    self.close(conn, "packet_too_large", 0x95);
                }
                Frame::Malformed => {
                    self.meters.refused("remaining_length");
                    self.close(conn, "protocol_error", 0x81);
                }
                Frame::Packet { len, header } => {
                    self.packet(conn, &bytes[used..used + len], header);
                    used += len;
                }
            }
        }
        used
    }

    fn packet(self: &Rc<Self>, conn: &Rc<Conn>, packet: &[u8], header: usize) {
        let phase = match conn.state.borrow().level {
            0 => gate::Phase::New,
            level => gate::Phase::Connected(level),
        };
        match gate::check(packet, header, phase) {
            Ok(Some(level)) => conn.state.borrow_mut().level = level,
            Ok(None) => {}
            Err(violation) => return self.violated(conn, violation, &packet[header..]),
        }
        let mut cursor = Cursor::new(packet);
        let events = conn.protocol.borrow_mut().recv(&mut cursor);
        self.handle(conn, events);
    }

    fn violated(self: &Rc<Self>, conn: &Rc<Conn>, violation: Violation, body: &[u8]) {
        self.meters.refused(violation.reason());
        let reason = violation.reason();
        let peer = conn.peer;
        self.meters.log(|more| tracing::warn!(%peer, reason, more, "refused an MQTT packet"));
        if conn.phase() == Phase::New {
            self.meters.connect(reason);
            let reply = packets::refused_connect(violation, body);
            conn.state.borrow_mut().out.extend_from_slice(&reply);
        }
        let cause = match violation {
            Violation::Qos => "qos_not_supported",
            Violation::Retain => "retain_not_supported",
            _ => "protocol_error",
        };
        self.close(conn, cause, violation.code());
    }

    /// Handles what the crate says; no borrow of it is held.
    fn handle(self: &Rc<Self>, conn: &Rc<Conn>, events: Vec<Event>) {
        // Any error closes, and its cause is named behind the request to close.
        let error = events.iter().find_map(|event| match event {
            Event::NotifyError(e) => Some(*e),
            _ => None,
        });
        for event in events {
            match event {
                Event::NotifyPacketReceived(packet) if error.is_none() => self.received(conn, packet),
                Event::RequestSendPacket { packet, .. } => {
                    conn.state.borrow_mut().out.extend_from_slice(&packet.to_continuous_buffer());
                }
                Event::RequestTimerReset { kind: TimerKind::PingreqRecv, duration_ms } => {
                    let mut state = conn.state.borrow_mut();
                    if state.phase == Phase::Open {
                        state.deadline = Some(self.now.get() + Duration::from_millis(duration_ms));
                    }
                }
                Event::RequestClose if error.is_none() => self.close(conn, "protocol_error", 0),
                _ => {}
            }
        }
        if let Some(error) = error {
            self.meters.refused("protocol_error");
            let peer = conn.peer;
            self.meters.log(|more| tracing::warn!(%peer, ?error, more, "closing an MQTT connection"));
            // The crate has put the DISCONNECT of MQTT 5 in front of the error itself.
            self.close(conn, "protocol_error", 0);
        }
    }

    fn received(self: &Rc<Self>, conn: &Rc<Conn>, packet: Packet) {
        match packet {
            Packet::V3_1_1Publish(p) => {
                let id = p.packet_id().filter(|_| p.qos() != Qos::AtMostOnce).unwrap_or(0);
                self.publish(conn, p.topic_name(), p.payload().as_slice(), id, p.dup(), &[]);
            }
            Packet::V5_0Publish(p) => {
                let id = p.packet_id().filter(|_| p.qos() != Qos::AtMostOnce).unwrap_or(0);
                let properties = packets::publish_properties(p.props());
                self.publish(conn, p.topic_name(), p.payload().as_slice(), id, p.dup(), &properties);
            }
            Packet::V3_1_1Connect(p) => self.connect(conn, Connect::v3(&p)),
            Packet::V5_0Connect(p) => self.connect(conn, Connect::v5(&p)),
            Packet::V3_1_1Subscribe(p) => {
                let filters = p.entries().iter().map(|e| (e.topic_filter(), e.sub_opts().qos() as u8));
                self.subscribe(conn, p.packet_id(), filters);
            }
            Packet::V5_0Subscribe(p) => {
                let filters = p.entries().iter().map(|e| (e.topic_filter(), e.sub_opts().qos() as u8));
                self.subscribe(conn, p.packet_id(), filters);
            }
            Packet::V3_1_1Unsubscribe(p) => {
                self.unsubscribe(conn, p.packet_id(), p.entries().iter().map(|e| e.as_str()));
            }
            Packet::V5_0Unsubscribe(p) => {
                self.unsubscribe(conn, p.packet_id(), p.entries().iter().map(|e| e.as_str()));
            }
            Packet::V3_1_1Disconnect(_) => {
                conn.state.borrow_mut().will_void = true;
                self.close(conn, "client", 0);
            }
            Packet::V5_0Disconnect(p) => {
                // 0x04 asks for the will although the client leaves properly.
                let keeps_will = p.reason_code().is_some_and(|code| code as u8 == 0x04);
                let expiry = p.props().as_ref().and_then(|props| {
                    props.iter().find_map(|property| match property {
                        Property::SessionExpiryInterval(p) => Some(p.val()),
                        _ => None,
                    })
                });
                self.leaves(conn, keeps_will, expiry);
            }
            // PINGREQ was answered by the crate; acknowledgements of what was never sent are its errors.
            _ => {}
        }
    }
}

async fn serve(worker: Rc<Worker>, conn: Rc<Conn>, mut socket: OwnedReadHalf) {
    while !conn.is_closing() {
        let taking = worker.may_take(&conn);
        let reading = taking && worker.has_room();
        if taking && !reading {
            worker.crowded.set(true);
        }
        worker.set_paused(&conn, !reading);
        if taking && conn.stalled.get() {
            worker.feed(&conn, &[]);
            if !conn.flush() {
                worker.close(&conn, "connection_lost", 0);
            }
            tokio::task::yield_now().await;
            continue;
        }
        let writing = !conn.state.borrow().out.is_empty();
        let interest = match (reading, writing) {
            (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
            (true, false) => Some(Interest::READABLE),
            (false, true) => Some(Interest::WRITABLE),
            (false, false) => None,
        };
        tokio::select! {
            () = conn.wake.notified() => {}
            ready = ready(&socket, interest) => match ready {
                Ok(ready) => {
                    // Others may have filled the room since it was asked for.
                    let reading = reading && worker.has_room();
                    if reading && (ready.is_readable() || ready.is_read_closed()) {
                        worker.read(&conn, &socket);
                    }
                    if !conn.flush() {
                        worker.close(&conn, "connection_lost", 0);
                    }
                }
                Err(_) => worker.close(&conn, "connection_lost", 0),
            }
        }
    }
    worker.set_paused(&conn, false);
    worker.lingering.set(worker.lingering.get() + 1);
    worker.left(&conn);
    let linger = async {
        while !conn.state.borrow().out.is_empty() && conn.flush() {
            if !conn.state.borrow().out.is_empty() && socket.ready(Interest::WRITABLE).await.is_err() {
                return;
            }
        }
        // Dropping the write half says that nothing more comes; then the peer's rest is read away, so that
        // the system does not reset the connection over it.
        conn.write.borrow_mut().take();
        let mut rest = [0u8; 4096];
        while socket.read(&mut rest).await.is_ok_and(|n| n > 0) {}
    };
    // A peer that does not go in time is reset.
    let _ = tokio::time::timeout(LINGER, linger).await;
    conn.write.borrow_mut().take();
    worker.shared.forget_connection();
    worker.lingering.set(worker.lingering.get() - 1);
    // It may have been the last that a drain waits for.
    worker.shared.inboxes.wake(worker.index);
}

async fn ready(socket: &OwnedReadHalf, interest: Option<Interest>) -> std::io::Result<tokio::io::Ready> {
    match interest {
        Some(interest) => socket.ready(interest).await,
        None => std::future::pending().await,
    }
}
