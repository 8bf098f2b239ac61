//! The timers of one task, an index over its states.

use std::collections::BTreeSet;
use throughline_model::keyed::{Keyed, KeyedState};
use throughline_model::time::Timestamp;

/// Which key is due when. The states are the truth; this index is made from them and follows them.
#[derive(Default)]
pub(crate) struct Timers {
    order: BTreeSet<(Timestamp, Box<str>)>,
    due: hashbrown::HashMap<Box<str>, Timestamp>,
}

impl Timers {
    /// Builds the index over restored states.
    pub(crate) fn of<S: KeyedState>(states: &Keyed<S>, due_at: impl Fn(&S) -> Option<Timestamp>) -> Self {
        let mut timers = Self::default();
        for (key, state) in states.iter() {
            timers.set(key, due_at(state));
        }
        timers
    }

    /// Takes over what changed in the states since the last call.
    pub(crate) fn follow<S: KeyedState>(
        &mut self,
        states: &mut Keyed<S>,
        due_at: impl Fn(&S) -> Option<Timestamp>,
    ) {
        states.drain_touched(|key, state| self.set(key, due_at(state)));
    }

    /// Returns the first timer in order of (due time, key) that is due at or before `now`.
    pub(crate) fn first_due(&self, now: Timestamp) -> Option<(Timestamp, &str)> {
        self.order.first().filter(|(due, _)| *due <= now).map(|(due, key)| (*due, &**key))
    }

    /// Returns when the first timer is due.
    pub(crate) fn next(&self) -> Option<Timestamp> {
        self.order.first().map(|(due, _)| *due)
    }

    /// Returns when `key` is due.
    pub(crate) fn due(&self, key: &str) -> Option<Timestamp> {
        self.due.get(key).copied()
    }

    fn set(&mut self, key: &str, due: Option<Timestamp>) {
        // Most stages have no timers: nothing is hashed for them.
        if due.is_none() && self.due.is_empty() {
            return;
        }
        let before = self.due.get(key).copied();
        if before == due {
            return;
        }
        if let Some(before) = before {
            self.order.remove(&(before, key.into()));
        }
        match due {
            Some(due) => {
                self.order.insert((due, key.into()));
                self.due.insert(key.into(), due);
            }
            None => {
                self.due.remove(key);
            }
        }
    }
}
