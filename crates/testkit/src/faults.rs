//! Faults by script: the n-th time a point is passed, something goes wrong there.

use parking_lot::Mutex;
use std::sync::Arc;
use throughline_runtime::ports::Failure;

/// The code with which a killed process "stops"; nothing that it did not finish happens any more.
pub const KILLED: &str = "TL-TEST-000";

/// A place where an in-memory port can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Point {
    Begin,
    Produce,
    SendOffsets,
    CommitBefore,
    CommitAfter,
    Reset,
    Committed,
    Start,
    Restore,
    Follow,
    Stretch,
    Schema,
    StorePositions,
    StoreBefore,
    StoreAfter,
    Outlet,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The dependency does not answer.
    Dependency,
    /// The writer was fenced.
    Fenced,
    /// The process is killed: this and every later use of a port fails until [`Faults::revive`].
    Kill,
}

struct Scripted {
    point: Option<Point>,
    passes_before: u64,
    fault: Fault,
}

#[derive(Default)]
struct Script {
    scripted: Vec<Scripted>,
    down: Vec<Point>,
    killed: bool,
    passed: Vec<Point>,
}

/// The script of a cluster and its stores, shared by its clones.
#[derive(Clone, Default)]
pub struct Faults(Arc<Mutex<Script>>);

impl Faults {
    /// Lets `point` fail once, after it was passed `passes_before` more times.
    pub fn script(&self, point: Point, passes_before: u64, fault: Fault) {
        self.0.lock().scripted.push(Scripted { point: Some(point), passes_before, fault });
    }

    /// Lets whatever point comes after `passes_before` more passes of any point fail once.
    pub fn script_any(&self, passes_before: u64, fault: Fault) {
        self.0.lock().scripted.push(Scripted { point: None, passes_before, fault });
    }

    /// Lets `point` fail as a dependency until it is `up` again.
    pub fn set_up(&self, point: Point, up: bool) {
        let mut script = self.0.lock();
        script.down.retain(|down| *down != point);
        if !up {
            script.down.push(point);
        }
    }

    /// Starts a new process after a kill.
    pub fn revive(&self) {
        self.0.lock().killed = false;
    }

    /// Forgets what is scripted and did not happen yet.
    pub fn clear(&self) {
        let mut script = self.0.lock();
        script.scripted.clear();
        script.down.clear();
    }

    /// Says whether everything that was scripted to happen once has happened.
    pub fn has_struck(&self) -> bool {
        self.0.lock().scripted.is_empty()
    }

    /// Returns how often `point` was passed, failures included.
    pub fn passed(&self, point: Point) -> usize {
        self.0.lock().passed.iter().filter(|passed| **passed == point).count()
    }

    /// Passes `point`.
    ///
    /// # Errors
    /// The fault that the script has for this pass.
    pub fn pass(&self, point: Point) -> Result<(), Failure> {
        let mut script = self.0.lock();
        script.passed.push(point);
        let mut struck = None;
        script.scripted.retain_mut(|scripted| {
            if scripted.point.is_some_and(|p| p != point) {
                return true;
            }
            if scripted.passes_before > 0 || struck.is_some() {
                scripted.passes_before = scripted.passes_before.saturating_sub(1);
                return true;
            }
            struck = Some(scripted.fault);
            false
        });
        if struck == Some(Fault::Kill) {
            script.killed = true;
        }
        if script.killed {
            return Err(Failure::Stop { code: KILLED, message: format!("killed at {point:?}") });
        }
        if script.down.contains(&point) {
            struck.get_or_insert(Fault::Dependency);
        }
        match struck {
            None => Ok(()),
            Some(Fault::Fenced) => Err(Failure::Fenced(format!("scripted at {point:?}"))),
            Some(_) => Err(Failure::Dependency {
                dependency: dependency_of(point),
                message: format!("scripted at {point:?}"),
            }),
        }
    }
}

fn dependency_of(point: Point) -> &'static str {
    match point {
        Point::Schema => "registry",
        Point::StorePositions | Point::StoreBefore | Point::StoreAfter => "database",
        _ => "kafka",
    }
}
