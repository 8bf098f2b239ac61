//! CONNECT, SUBSCRIBE, leaving and takeover.

use super::conn::{Client, Conn, Phase, Will};
use super::packets::{self, Connect, Granted, Offer, Refusal};
use super::wills::will_publish;
use super::worker::{Worker, wall_clock};
use super::{Command, Event};
use crate::auth::Login;
use crate::sessions::{Asked, Happened, Owner, device_from_client_id, device_of_client, push_event};
use crate::transform::{Scope, Verdict};
use mqtt_protocol_core::mqtt::packet::{GenericPacketTrait, Packet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use throughline_model::ids::check_name;
use throughline_model::record::Outbox;

/// Bytes of a client id. It is kept for as long as the session, and repeated in events and dead letters. The
/// standard asks servers for 23 and lets them take more.
const CLIENT_ID_BYTES_MAX: usize = 1_024;

impl Worker {
    /// Takes a CONNECT: decides whether a password is to be checked, and by whom.
    pub(crate) fn connect(self: &Rc<Self>, conn: &Rc<Conn>, connect: Connect) {
        if self.draining.get().is_some() {
            return self.refuse(conn, Refusal::ServerBusy);
        }
        if connect.authentication {
            return self.refuse(conn, Refusal::AuthenticationMethod);
        }
        if connect.client_id.len() > CLIENT_ID_BYTES_MAX {
            return self.refuse(conn, Refusal::ClientId);
        }
        let Some(user) = &connect.user else {
            let anonymous = self.shared.config.anonymous_on_loopback && conn.peer.ip().is_loopback();
            return match anonymous {
                true => self.welcome(conn, connect, None),
                false => self.refuse(conn, Refusal::NotAuthorized),
            };
        };
        let Some(login) = self.shared.logins.find(user).cloned() else {
            return self.refuse(conn, Refusal::BadCredentials);
        };
        conn.state.borrow_mut().phase = Phase::Authenticating;
        let worker = Rc::clone(self);
        let conn = Rc::clone(conn);
        tokio::task::spawn_local(async move {
            // A hash of many rounds takes long, so it is not made on the worker's thread, and only so many at
            // once: a client whose time is over when its turn comes costs nothing.
            let turn = worker.verifying.acquire().await;
            if conn.phase() != Phase::Authenticating {
                return;
            }
            let checked = Arc::clone(&login);
            let password = connect.password.clone().unwrap_or_default();
            let verified = tokio::task::spawn_blocking(move || checked.verify(&password)).await;
            drop(turn);
            if conn.phase() != Phase::Authenticating {
                return;
            }
            match verified {
                Ok(true) => worker.welcome(&conn, connect, Some(login)),
                _ => worker.refuse(&conn, Refusal::BadCredentials),
            }
        });
    }

    fn refuse(self: &Rc<Self>, conn: &Rc<Conn>, refusal: Refusal) {
        self.meters.connect(refusal.reason());
        let (peer, reason) = (conn.peer, refusal.reason());
        self.meters.log(|more| tracing::warn!(%peer, reason, more, "refused an MQTT client"));
        {
            let mut state = conn.state.borrow_mut();
            let level = state.level;
            state.out.extend_from_slice(&refusal.connack(level)[..packets::connack_len(level)]);
        }
        self.close(conn, refusal.reason(), 0);
    }

    fn welcome(self: &Rc<Self>, conn: &Rc<Conn>, mut connect: Connect, login: Option<Arc<Login>>) {
        let assigned = connect.client_id.is_empty().then(|| {
            let random = self.transformer.borrow_mut().random();
            format!("tl-{random:016x}")
        });
        if let Some(id) = &assigned {
            connect.client_id.clone_from(id);
        }
        let scope = login.as_deref().map(Login::scope).unwrap_or_default();
        let will = connect.will.as_ref();
        if will.is_some_and(|will| !self.may_publish(&connect.client_id, login.as_deref(), will)) {
            return self.refuse(conn, Refusal::NotAuthorized);
        }
        if !self.shared.keep_will(will.map_or(0, Will::bytes)) {
            return self.refuse(conn, Refusal::WillQuota);
        }
        let bounds = &self.shared.config.bounds;
        let expiry_s = connect.session_expiry_s.min(bounds.session_expiry_max_s);
        let asked = Asked { clean: connect.clean, expiry: Duration::from_secs(u64::from(expiry_s)) };
        let now = Instant::now();
        let opened = self.shared.registry.open(&connect.client_id, asked, conn.owner, now, wall_clock());
        // Its delay begins anew when the client leaves again, with the will that it brings now.
        self.shared.wills.void(&connect.client_id);
        if let Some(owner) = opened.taken_over {
            self.shared.command(owner.worker, Command::TakeOver(owner));
        }
        let device = device_of_client(&connect.client_id)
            .filter(|(site, device)| scope.permits(site, device))
            .map(|(site, device)| (site.to_owned(), device.to_owned()));
        let offer = Offer {
            session_present: opened.present,
            receive_maximum: bounds.open_publishes_max,
            packet_bytes_max: u32::try_from(bounds.packet_bytes_max).unwrap_or(u32::MAX),
            assigned_client_id: assigned.as_deref(),
            session_expiry_s: (expiry_s != connect.session_expiry_s).then_some(expiry_s),
        };
        let connack = packets::connack_accepted(connect.level, &offer);
        let client = Client {
            id: connect.client_id,
            login,
            session_generation: opened.generation,
            session_expiry: asked.expiry,
            keep_alive: connect.keep_alive,
            will: connect.will,
            device,
            announced: false,
            resent: opened.unacknowledged,
        };
        {
            let mut state = conn.state.borrow_mut();
            state.phase = Phase::Open;
            // Keep-alive 0 has no timer, so nothing else would lift the deadline for CONNECT.
            let keep_alive = client.keep_alive;
            state.deadline = (!keep_alive.is_zero()).then(|| now + keep_alive * 3 / 2);
            state.client = Some(client);
        }
        self.meters.connect("accepted");
        if connack.is_none_or(|packet| !self.send_packet(conn, packet)) {
            return self.close(conn, "protocol_error", 0);
        }
        self.announce(conn, None);
        // What came while the password was checked is processed by the connection's own task.
        conn.stalled.set(true);
        conn.wake.notify_one();
    }

    /// Sends a packet through the crate; returns false where it refuses.
    fn send_packet(&self, conn: &Conn, packet: Packet) -> bool {
        let events = conn.protocol.borrow_mut().send(packet);
        let mut state = conn.state.borrow_mut();
        let mut fine = true;
        for event in events {
            match event {
                Event::RequestSendPacket { packet, .. } => {
                    state.out.extend_from_slice(&packet.to_continuous_buffer());
                }
                Event::NotifyError(_) | Event::RequestClose => fine = false,
                _ => {}
            }
        }
        fine
    }

    fn may_publish(&self, client_id: &str, login: Option<&Login>, will: &Will) -> bool {
        let scope = login.map(Login::scope).unwrap_or_default();
        let publish = will_publish(client_id, login, will);
        let verdict = self.transformer.borrow_mut().admit(&publish, &scope, None);
        !matches!(verdict, Verdict::Forbidden(_))
    }

    /// Takes a SUBSCRIBE: a client gets its own command and desired topics and nothing else.
    pub(crate) fn subscribe<'f>(
        self: &Rc<Self>,
        conn: &Rc<Conn>,
        packet_id: u16,
        filters: impl Iterator<Item = (&'f str, u8)>,
    ) {
        let (granted, level) = {
            let state = conn.state.borrow();
            let Some(client) = &state.client else { return };
            let scope = client.scope();
            let mut granted = Vec::new();
            for (filter, qos) in filters {
                let mut outcome = grant(filter, qos, &scope);
                let granted_qos = matches!(outcome, Granted::Qos(_));
                if granted_qos && !self.shared.registry.subscribe(&client.id, filter) {
                    outcome = Granted::Quota;
                }
                if !matches!(outcome, Granted::Qos(_)) {
                    self.meters.refused("subscription");
                }
                granted.push(outcome);
            }
            (granted, state.level)
        };
        let sent = packets::suback(level, packet_id, &granted).is_some_and(|p| self.send_packet(conn, p));
        if !sent {
            self.close(conn, "protocol_error", 0x82);
        }
    }

    /// Takes an UNSUBSCRIBE.
    pub(crate) fn unsubscribe<'f>(
        self: &Rc<Self>,
        conn: &Rc<Conn>,
        packet_id: u16,
        filters: impl Iterator<Item = &'f str>,
    ) {
        let (existed, level) = {
            let state = conn.state.borrow();
            let Some(client) = &state.client else { return };
            let registry = &self.shared.registry;
            let existed: Vec<bool> = filters.map(|f| registry.unsubscribe(&client.id, f)).collect();
            (existed, state.level)
        };
        let sent = packets::unsuback(level, packet_id, &existed).is_some_and(|p| self.send_packet(conn, p));
        if !sent {
            self.close(conn, "protocol_error", 0x82);
        }
    }

    /// Takes a DISCONNECT of MQTT 5.
    pub(crate) fn leaves(self: &Rc<Self>, conn: &Rc<Conn>, keeps_will: bool, expiry_s: Option<u32>) {
        {
            let mut state = conn.state.borrow_mut();
            state.will_void = !keeps_will;
            let expiry_max = self.shared.config.bounds.session_expiry_max_s;
            if let (Some(client), Some(seconds)) = (&mut state.client, expiry_s) {
                // A session that was to end with the connection cannot be prolonged (MQTT 5, 3.14.2.2.2).
                if !client.session_expiry.is_zero() {
                    client.session_expiry = Duration::from_secs(u64::from(seconds.min(expiry_max)));
                }
            }
        }
        self.close(conn, if keeps_will { "client_with_will" } else { "client" }, 0);
    }

    /// Closes a connection whose client id another one took.
    pub(crate) fn take_over(self: &Rc<Self>, owner: Owner) {
        let conn = self.slots.borrow().get(owner.slot, owner.generation).cloned();
        if let Some(conn) = conn {
            self.close(&conn, "taken_over", 0x8e);
        }
    }

    /// Ends a connection: nothing is read any more, and its task says good-bye. On MQTT 5 a `code` other
    /// than 0 is sent first.
    pub(crate) fn close(self: &Rc<Self>, conn: &Rc<Conn>, cause: &'static str, code: u8) {
        let mut state = conn.state.borrow_mut();
        if state.phase == Phase::Closing {
            return;
        }
        if code != 0 && state.level == 5 && state.phase == Phase::Open {
            state.out.extend_from_slice(&packets::disconnect(code));
        }
        state.phase = Phase::Closing;
        state.cause = cause;
        state.unread = Vec::new();
        state.deadline = None;
        conn.wake.notify_one();
    }

    /// Says what is to be said of a connection that is closing: session events, its will, its session.
    pub(crate) fn left(self: &Rc<Self>, conn: &Rc<Conn>) {
        let (client, cause, will_void, ring, outstanding) = {
            let mut state = conn.state.borrow_mut();
            state.held = None;
            state.unread = Vec::new();
            (
                state.client.take(),
                state.cause,
                state.will_void,
                std::mem::take(&mut state.ring),
                state.outstanding,
            )
        };
        self.held.borrow_mut().retain(|held| !Rc::ptr_eq(held, conn));
        self.blocked.borrow_mut().retain(|blocked| !Rc::ptr_eq(blocked, conn));
        let unacknowledged = ring.unacknowledged();
        self.slots.borrow_mut().remove(conn.owner.slot, outstanding, ring);
        self.meters.disconnect(cause);
        self.account(conn);
        let Some(client) = client else { return };
        self.shared.forget_will(client.will.as_ref().map_or(0, Will::bytes));
        let now = Instant::now();
        let level = conn.state.borrow().level;
        let mut records = Outbox::default();
        if !client.announced {
            self.event(&mut records, &client, level, "connected", None);
        }
        let event = if cause == "taken_over" { "taken_over" } else { "disconnected" };
        self.event(&mut records, &client, level, event, Some(cause));
        self.asides.borrow_mut().push(records);
        // A drained instance and faults and bounds of the platform say nothing about the device.
        let ours = matches!(cause, "shutdown" | "delivery_failed" | "held_bytes");
        let will = client.will.as_ref().filter(|_| !will_void && !ours);
        let close = || {
            let registry = &self.shared.registry;
            registry.close(&client.id, conn.owner, client.session_expiry, unacknowledged, now)
        };
        match will {
            Some(will) => self.will(&client, level, will, now, close),
            None => {
                close();
            }
        }
        self.asides.borrow_mut().send(&self.shared.outflow);
        self.shared.inboxes.wake(self.index);
    }

    /// Says that a client is connected, as soon as its device is known: by its client id, or by what it
    /// publishes first.
    pub(crate) fn announce(&self, conn: &Conn, published: Option<(&str, &str)>) {
        let mut records = Outbox::default();
        {
            let mut state = conn.state.borrow_mut();
            let level = state.level;
            let Some(client) = &mut state.client else { return };
            if client.announced {
                return;
            }
            if client.device.is_none() {
                client.device = published.map(|(site, device)| (site.to_owned(), device.to_owned()));
            }
            if client.device.is_none() {
                return;
            }
            client.announced = true;
            self.event(&mut records, client, level, "connected", None);
        }
        let mut asides = self.asides.borrow_mut();
        asides.push(records);
        asides.send(&self.shared.outflow);
    }

    pub(super) fn event(
        &self,
        records: &mut Outbox,
        client: &Client,
        level: u8,
        event: &'static str,
        cause: Option<&str>,
    ) {
        let unknown;
        let (site, device) = match &client.device {
            Some((site, device)) => (site.as_str(), device.as_str()),
            None => {
                unknown = device_from_client_id(&client.id);
                let site = client.login.as_deref().and_then(Login::single_site).unwrap_or("unknown");
                (site, unknown.as_str())
            }
        };
        let happened = Happened {
            site,
            device,
            event,
            cause,
            client_id: &client.id,
            protocol: if level == 5 { "mqtt/5" } else { "mqtt/3.1.1" },
            generation: client.session_generation,
            boundary: "kafka",
            at: wall_clock(),
        };
        let random = self.transformer.borrow_mut().random();
        let pushed = push_event(records, &self.shared.codec, &self.shared.instance, random, &happened);
        if let Err(e) = pushed {
            tracing::error!(error = %e, event, "a session event does not fit its schema");
        }
    }
}

fn grant(filter: &str, qos: u8, scope: &Scope<'_>) -> Granted {
    if filter.starts_with("$share/") {
        return Granted::Shared;
    }
    if filter.contains(['+', '#']) {
        return Granted::Wildcard;
    }
    let levels: Vec<&str> = filter.split('/').collect();
    match levels[..] {
        ["tl", site, device, "command" | "desired"]
            if check_name("site", site).is_ok()
                && check_name("device", device).is_ok()
                && scope.permits(site, device) =>
        {
            Granted::Qos(qos.min(1))
        }
        _ => Granted::NotOwn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_subscribes_to_its_own_topics_only() {
        let sites = ["s".to_owned()];
        let devices = ["s/d".to_owned()];
        let of_site = Scope { sites: Some(&sites), devices: None };
        let of_device = Scope { sites: Some(&sites), devices: Some(&devices) };
        for (filter, qos, scope, expected) in [
            ("tl/s/d/command", 2, &of_device, Granted::Qos(1)),
            ("tl/s/d/desired", 0, &of_device, Granted::Qos(0)),
            ("tl/s/e/command", 1, &of_device, Granted::NotOwn),
            ("tl/s/e/command", 1, &of_site, Granted::Qos(1)),
            ("tl/t/e/command", 1, &of_site, Granted::NotOwn),
            ("tl/s/d/telemetry", 1, &of_site, Granted::NotOwn),
            ("tl/s/+/command", 1, &of_site, Granted::Wildcard),
            ("#", 1, &Scope::default(), Granted::Wildcard),
            ("$share/g/tl/s/d/command", 1, &of_site, Granted::Shared),
            ("tl/x/y/command", 1, &Scope::default(), Granted::Qos(1)),
            ("tl/x//command", 1, &Scope::default(), Granted::NotOwn),
            ("tl/x/a b/command", 1, &Scope::default(), Granted::NotOwn),
            (&format!("tl/x/{}/command", "y".repeat(129)), 1, &Scope::default(), Granted::NotOwn),
        ] {
            assert_eq!(grant(filter, qos, scope), expected, "{filter}");
        }
    }
}
