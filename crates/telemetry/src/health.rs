//! What the roles of this process say about themselves.

use crate::{Metric, gauge};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A role whose loop has not turned for this long is stuck. It is longer than the longest that one turn may
/// block on a dependency that does not answer: a store may take 30 s to connect and 30 s to write. Waiting for
/// a dependency is no reason to be killed.
pub const STALL_LIMIT: Duration = Duration::from_secs(75);

/// The health of a process: the sum of its roles. A clone is the same health.
#[derive(Clone, Debug)]
pub struct Health(Arc<Process>);

#[derive(Debug)]
struct Process {
    started: Instant,
    started_unix_seconds: f64,
    stall_limit: Duration,
    roles: Mutex<BTreeMap<String, RoleHealth>>,
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

impl Health {
    /// Makes the health of a process without roles, with [`STALL_LIMIT`].
    pub fn new() -> Self {
        Self::with_stall_limit(STALL_LIMIT)
    }

    /// Makes it with another limit for how long a loop may take to turn.
    pub fn with_stall_limit(stall_limit: Duration) -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        gauge(Metric::ProcessStartTimeSeconds, &[]).set(unix);
        gauge(Metric::BuildInfo, &[("version", env!("CARGO_PKG_VERSION"))]).set(1.0);
        Self(Arc::new(Process {
            started: Instant::now(),
            started_unix_seconds: unix,
            stall_limit,
            roles: Mutex::default(),
        }))
    }

    /// Returns the health of a role, made at the first call: alive, and not ready because it starts.
    pub fn role(&self, name: &str) -> RoleHealth {
        let mut roles = self.0.roles.lock();
        if let Some(role) = roles.get(name) {
            return role.clone();
        }
        let role = RoleHealth(Arc::new(Role {
            name: name.to_owned(),
            started: self.0.started,
            turned_ms: AtomicU64::new(millis(self.0.started)),
            said: Mutex::new(Said { why: "starting".to_owned(), ..Said::default() }),
        }));
        gauge(Metric::RoleReady, &[("role", name)]).set(0.0);
        roles.insert(name.to_owned(), role.clone());
        role
    }

    /// Returns one sentence for each role whose loop does not turn; empty means alive.
    pub fn stuck(&self) -> Vec<String> {
        let roles = self.0.roles.lock();
        roles.values().filter_map(|role| role.stuck(self.0.stall_limit)).collect()
    }

    /// Returns one sentence for each role whose loop has not turned for longer than `limit` although nothing
    /// has stopped it: a call that it made does not come back.
    pub fn hung(&self, limit: Duration) -> Vec<String> {
        let roles = self.0.roles.lock();
        let working = roles.values().filter(|role| role.0.said.lock().stopped.is_none());
        working.filter_map(|role| role.stuck(limit)).collect()
    }

    /// Returns one sentence for each role that cannot do its job; empty means ready. A process without
    /// roles is ready for nothing and says so.
    pub fn unready(&self) -> Vec<String> {
        let roles = self.0.roles.lock();
        if roles.is_empty() {
            return vec!["no role has started yet".to_owned()];
        }
        let mut sentences = Vec::new();
        for role in roles.values() {
            let said = role.0.said.lock();
            if !said.ready {
                sentences.push(format!("role {} is not ready: {}", role.0.name, said.why));
            }
        }
        sentences
    }

    /// Returns everything that is known, without asking anybody.
    pub fn status(&self) -> Value {
        let roles: Map<String, Value> = {
            let roles = self.0.roles.lock();
            let rendered = roles.iter().map(|(name, role)| (name.clone(), role.status(self.0.stall_limit)));
            rendered.collect()
        };
        json!({
            "schema": "throughline.status/1",
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "started_at_unix_seconds": self.0.started_unix_seconds,
            "uptime_seconds": self.0.started.elapsed().as_secs_f64(),
            "alive": self.stuck().is_empty(),
            "ready": self.unready().is_empty(),
            "roles": roles,
        })
    }
}

/// What one role says about itself. A clone is the same role.
#[derive(Clone, Debug)]
pub struct RoleHealth(Arc<Role>);

#[derive(Debug)]
struct Role {
    name: String,
    started: Instant,
    /// Milliseconds from the start of the process to the last turn of the loop.
    turned_ms: AtomicU64,
    said: Mutex<Said>,
}

#[derive(Debug, Default)]
struct Said {
    ready: bool,
    why: String,
    stopped: Option<String>,
    dependencies: BTreeMap<&'static str, Dependency>,
    notes: BTreeMap<&'static str, Value>,
}

#[derive(Debug)]
struct Dependency {
    up: bool,
    message: String,
    since: Instant,
}

impl RoleHealth {
    /// Says that the loop turned. Costs a clock reading and a store; call it once a turn, not once a record.
    pub fn turned(&self) {
        self.0.turned_ms.store(millis(self.0.started), Ordering::Relaxed);
    }

    /// Says whether the role can do its job now, or hold its clients safely; `why` is shown where it cannot.
    pub fn ready(&self, ready: bool, why: &str) {
        let mut said = self.0.said.lock();
        if said.ready == ready && said.why == why {
            return;
        }
        said.ready = ready;
        why.clone_into(&mut said.why);
        gauge(Metric::RoleReady, &[("role", &self.0.name)]).set(f64::from(u8::from(ready)));
    }

    /// Says what the last use of a dependency showed. `message` is what it said last; it never holds a
    /// credential or payload.
    pub fn dependency(&self, name: &'static str, up: bool, message: &str) {
        let mut said = self.0.said.lock();
        match said.dependencies.get_mut(name) {
            Some(known) if known.up == up => {
                if known.message != message {
                    message.clone_into(&mut known.message);
                }
                return;
            }
            _ => {}
        }
        let dependency = Dependency { up, message: message.to_owned(), since: Instant::now() };
        said.dependencies.insert(name, dependency);
        let labels = [("role", self.0.name.as_str()), ("dependency", name)];
        gauge(Metric::DependencyUp, &labels).set(f64::from(u8::from(up)));
    }

    /// Puts a fact into `/v1/status`, for instance how much is in flight, in place of the one before.
    pub fn note(&self, key: &'static str, value: Value) {
        self.0.said.lock().notes.insert(key, value);
    }

    /// Says that the loop has ended and will not turn again: the role is then neither alive nor ready. Call
    /// [`RoleHealth::turned`] no more.
    pub fn stopped(&self, why: &str) {
        let mut said = self.0.said.lock();
        said.stopped = Some(why.to_owned());
        said.ready = false;
        said.why = format!("stopped: {why}");
        gauge(Metric::RoleReady, &[("role", &self.0.name)]).set(0.0);
    }

    /// Returns the name of the role.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    fn idle(&self) -> Duration {
        let turned = Duration::from_millis(self.0.turned_ms.load(Ordering::Relaxed));
        self.0.started.elapsed().saturating_sub(turned)
    }

    fn stuck(&self, limit: Duration) -> Option<String> {
        let name = &self.0.name;
        if let Some(why) = &self.0.said.lock().stopped {
            return Some(format!("role {name} has stopped: {why}"));
        }
        let idle = self.idle();
        let message = || {
            let (idle, limit) = (idle.as_secs_f64(), limit.as_secs_f64());
            format!("role {name} is stuck: its loop has not turned for {idle:.1} s (limit {limit} s)")
        };
        (idle > limit).then(message)
    }

    fn status(&self, limit: Duration) -> Value {
        let stuck = self.stuck(limit);
        let said = self.0.said.lock();
        let dependencies: Map<String, Value> = said
            .dependencies
            .iter()
            .map(|(name, dependency)| {
                let value = json!({
                    "up": dependency.up,
                    "message": dependency.message,
                    "since_seconds": dependency.since.elapsed().as_secs_f64(),
                });
                ((*name).to_owned(), value)
            })
            .collect();
        json!({
            "alive": stuck.is_none(),
            "stuck": stuck,
            "last_turn_seconds": self.idle().as_secs_f64(),
            "ready": said.ready,
            "why": said.why,
            "dependencies": dependencies,
            "notes": said.notes,
        })
    }
}

fn millis(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_known_by_its_name() {
        let health = Health::new();
        health.role("bridge").ready(true, "");
        assert!(health.unready().is_empty());
        health.role("watch");
        assert_eq!(health.unready(), ["role watch is not ready: starting"]);
    }

    #[test]
    fn a_dependency_keeps_the_time_of_its_last_change() {
        let health = Health::new();
        let role = health.role("load_warehouse");
        role.dependency("database", false, "connection refused");
        let since = role.0.said.lock().dependencies["database"].since;
        role.dependency("database", false, "the database is starting");
        let said = role.0.said.lock();
        assert_eq!(said.dependencies["database"].since, since);
        assert_eq!(said.dependencies["database"].message, "the database is starting");
    }

    #[test]
    fn a_stopped_role_is_neither_alive_nor_ready() {
        let health = Health::new();
        let role = health.role("update_twin");
        role.ready(true, "");
        assert_eq!((health.hung(Duration::ZERO).len(), health.hung(STALL_LIMIT).len()), (1, 0));
        role.stopped("TL-KAFKA-004: the offset was moved");
        assert!(health.hung(Duration::ZERO).is_empty(), "a restart meets the same cause");
        assert_eq!(health.stuck(), ["role update_twin has stopped: TL-KAFKA-004: the offset was moved"]);
        assert_eq!(health.status()["ready"], false);
    }
}
