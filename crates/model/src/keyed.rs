//! The keyed state of one partition of a decide stage: in memory, with the keys changed since the last
//! commit.

use crate::codec::{Codec, CodecError};
use hashbrown::HashMap;

/// A value of a decide stage's state. Its bytes are what the changelog topic holds.
pub trait KeyedState: Default + Send + 'static {
    /// Appends the bytes for the changelog.
    ///
    /// # Errors
    /// When the value does not fit its schema, which is a defect of the stage.
    fn encode(&self, codec: &Codec, out: &mut Vec<u8>) -> Result<(), CodecError>;

    /// Reads what [`KeyedState::encode`] wrote.
    ///
    /// # Errors
    /// When the bytes are not a state: the changelog was written by something else.
    fn decode(bytes: &[u8], codec: &Codec) -> Result<Self, CodecError>;
}

struct Slot<S> {
    value: S,
    dirty: bool,
    touched: bool,
}

/// States by key (`site/device`, or a rule id), of one partition.
pub struct Keyed<S> {
    slots: HashMap<String, Slot<S>, foldhash::fast::RandomState>,
    dirty: Vec<String>,
    touched: Vec<String>,
}

impl<S> Default for Keyed<S> {
    fn default() -> Self {
        Self { slots: HashMap::default(), dirty: Vec::new(), touched: Vec::new() }
    }
}

impl<S: Default> Keyed<S> {
    /// Returns the state under `key`.
    pub fn get(&self, key: &str) -> Option<&S> {
        self.slots.get(key).map(|slot| &slot.value)
    }

    /// Returns the state under `key`, made by default where there is none, and marks it changed.
    pub fn get_mut(&mut self, key: &str) -> &mut S {
        let slot = self.slots.entry_ref(key).or_insert_with(|| Slot {
            value: S::default(),
            dirty: false,
            touched: false,
        });
        if !slot.dirty {
            slot.dirty = true;
            self.dirty.push(key.into());
        }
        if !slot.touched {
            slot.touched = true;
            self.touched.push(key.into());
        }
        &mut slot.value
    }

    /// Puts a restored state in place without marking it changed; `None` removes it.
    pub fn restore(&mut self, key: &str, state: Option<S>) {
        match state {
            Some(value) => {
                self.slots.insert(key.into(), Slot { value, dirty: false, touched: false });
            }
            None => {
                self.slots.remove(key);
            }
        }
    }

    /// Passes every key changed since the last call with its state, then forgets that they changed.
    ///
    /// # Errors
    /// The first error of `write`; the marks are then kept.
    pub fn drain_dirty<E>(&mut self, mut write: impl FnMut(&str, &S) -> Result<(), E>) -> Result<(), E> {
        for key in &self.dirty {
            if let Some(slot) = self.slots.get(key) {
                write(key, &slot.value)?;
            }
        }
        for key in self.dirty.drain(..) {
            if let Some(slot) = self.slots.get_mut(&key) {
                slot.dirty = false;
            }
        }
        Ok(())
    }

    /// Passes every key touched since the last call, for whoever keeps an index over the states.
    pub fn drain_touched(&mut self, mut visit: impl FnMut(&str, &S)) {
        for key in self.touched.drain(..) {
            if let Some(slot) = self.slots.get_mut(&key) {
                slot.touched = false;
                visit(&key, &slot.value);
            }
        }
    }

    /// Iterates over all states, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &S)> {
        self.slots.iter().map(|(k, slot)| (k.as_str(), &slot.value))
    }

    /// Returns the number of keys.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Says whether there is no state.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Returns the number of keys changed since the last commit.
    pub fn dirty_len(&self) -> usize {
        self.dirty.len()
    }
}
