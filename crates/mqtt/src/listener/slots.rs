//! The connections of a worker by slot. A slot is free again only when Kafka has answered for every record
//! that was sent in its name, so a late answer never meets another connection.

use super::conn::Conn;
use crate::inbox::{GENERATION_MASK, Token};
use crate::ring::Ring;
use std::collections::VecDeque;
use std::rc::Rc;

enum Entry {
    Free,
    Live(Rc<Conn>),
    /// The connection is gone; so many answers are awaited for its publishes.
    Awaiting(u32, Ring),
}

struct Slot {
    generation: u16,
    entry: Entry,
}

/// The slots.
#[derive(Default)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    free: VecDeque<u32>,
    live: usize,
}

impl Slots {
    /// Returns the number of connections.
    pub(crate) const fn live(&self) -> usize {
        self.live
    }

    /// Takes a slot for a connection made by `make` from slot and generation; `None` where `slots_max` are
    /// in use.
    pub(crate) fn insert(
        &mut self,
        slots_max: usize,
        make: impl FnOnce(u32, u16) -> Rc<Conn>,
    ) -> Option<Rc<Conn>> {
        let slot = match self.free.pop_front() {
            Some(slot) => slot,
            None if self.slots.len() < slots_max => {
                self.slots.push(Slot { generation: 0, entry: Entry::Free });
                (self.slots.len() - 1) as u32
            }
            None => return None,
        };
        let entry = &mut self.slots[slot as usize];
        entry.generation = (entry.generation + 1) & GENERATION_MASK;
        let conn = make(slot, entry.generation);
        entry.entry = Entry::Live(Rc::clone(&conn));
        self.live += 1;
        Some(conn)
    }

    /// Returns the connection in a slot, if it is the one of `generation`.
    pub(crate) fn get(&self, slot: u32, generation: u16) -> Option<&Rc<Conn>> {
        let slot = self.slots.get(slot as usize).filter(|s| s.generation == generation)?;
        match &slot.entry {
            Entry::Live(conn) => Some(conn),
            _ => None,
        }
    }

    /// Takes an answer for a slot whose connection is gone, and returns the mark of its publish.
    pub(crate) fn answered(&mut self, token: Token) -> Option<u64> {
        let slot = self.slots.get_mut(token.slot as usize).filter(|s| s.generation == token.generation)?;
        let Entry::Awaiting(left, ring) = &mut slot.entry else { return None };
        let mark = ring.mark(token.sequence);
        *left = left.saturating_sub(1);
        if *left == 0 {
            slot.entry = Entry::Free;
            self.free.push_back(token.slot);
        }
        mark
    }

    /// Removes a connection for whose records, those of `ring`, `outstanding` answers are awaited.
    pub(crate) fn remove(&mut self, slot: u32, outstanding: u32, ring: Ring) {
        let Some(entry) = self.slots.get_mut(slot as usize) else { return };
        self.live -= 1;
        if outstanding > 0 {
            entry.entry = Entry::Awaiting(outstanding, ring);
        } else {
            entry.entry = Entry::Free;
            self.free.push_back(slot);
        }
    }

    /// Returns every connection.
    pub(crate) fn all(&self) -> Vec<Rc<Conn>> {
        let live = |slot: &Slot| match &slot.entry {
            Entry::Live(conn) => Some(Rc::clone(conn)),
            _ => None,
        };
        self.slots.iter().filter_map(live).collect()
    }
}
