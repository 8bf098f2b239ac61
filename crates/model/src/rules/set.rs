//! The rules in force, indexed by the measurements they read, so that a message touches only its own.

use super::definition::{Rule, RuleDefinition};
use super::expression::Names;
use super::program::Compare;
use crate::strict_toml::FileError;
use hashbrown::HashMap;
use std::collections::BTreeMap;

/// Many compiled rules that share slots. Rules are kept in the order of their ids, so that what they do
/// does not depend on the order in which they were put in.
#[derive(Debug, Default)]
pub struct RuleSet {
    names: Names,
    by_id: BTreeMap<Box<str>, Rule>,
    rules: Vec<Rule>,
    indices: HashMap<Box<str>, u32, foldhash::fast::RandomState>,
    /// Slot to the rules that cannot begin to hold without a comparison of it, which screens them: most
    /// rules are idle for most messages, and a glance at a few bytes says so.
    screened: Vec<Vec<Screen>>,
    /// Slot to the other rules that read it.
    readers: Vec<Vec<u32>>,
    /// Rules that may begin to hold for a message without any of their measurements.
    always: Vec<u32>,
    /// Slot to whether a rule asks for its value before.
    remembered: Vec<bool>,
}

/// What an idle rule needs at least.
#[derive(Clone, Copy, Debug)]
pub(super) struct Screen {
    pub(super) rule: u32,
    pub(super) compare: Compare,
    pub(super) limit: f64,
    pub(super) lateness_us: i64,
}

impl RuleSet {
    /// Puts `version` of a rule in force, instead of any earlier one. A rule that is not enabled is taken
    /// out. The rules stay in force together until [`RuleSet::index`] is called.
    ///
    /// # Errors
    /// The first fault of the definition; the rule of that id, if any, then stays as it was.
    pub fn put(&mut self, file: &str, text: &str, version: i64) -> Result<(), FileError> {
        let definition = RuleDefinition::parse(file, text)?;
        let rule = definition.compile(file, text, version, &mut self.names)?;
        if rule.enabled {
            self.by_id.insert(rule.id.clone(), rule);
        } else {
            self.by_id.remove(&rule.id);
        }
        Ok(())
    }

    /// Takes a rule out of force, from the next [`RuleSet::index`] on.
    pub fn remove(&mut self, id: &str) {
        self.by_id.remove(id);
    }

    /// Makes what was put and removed take effect.
    pub fn index(&mut self) {
        self.rules = self.by_id.values().cloned().collect();
        self.indices = self.rules.iter().zip(0..).map(|(rule, i)| (rule.id.clone(), i)).collect();
        self.screened = vec![Vec::new(); self.names.len()];
        self.readers = vec![Vec::new(); self.names.len()];
        self.remembered = vec![false; self.names.len()];
        self.always.clear();
        for (rule, index) in self.rules.iter().zip(0..) {
            for slot in rule.before() {
                self.remembered[slot as usize] = true;
            }
            if let Some((slot, compare, limit)) = rule.when.root.screen() {
                let screen = Screen { rule: index, compare, limit, lateness_us: rule.lateness_us };
                self.screened[slot as usize].push(screen);
                continue;
            }
            if !rule.when.root.needs_a_measurement() {
                self.always.push(index);
                continue;
            }
            for slot in rule.when.now.iter().copied() {
                let readers = &mut self.readers[slot as usize];
                if readers.last() != Some(&index) {
                    readers.push(index);
                }
            }
        }
    }

    /// Returns the rule in force under `id`.
    pub fn get(&self, id: &str) -> Option<&Rule> {
        self.index_of(id).map(|i| self.at(i))
    }

    /// Returns the rule at `index`, which an evaluation of this set gave.
    ///
    /// # Panics
    /// When `index` is not below [`RuleSet::len`].
    pub fn at(&self, index: u32) -> &Rule {
        &self.rules[index as usize]
    }

    /// Returns the number of rules in force.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Says whether no rule is in force.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Iterates over the rules in force in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter()
    }

    pub(super) fn names(&self) -> &Names {
        &self.names
    }

    pub(super) fn index_of(&self, id: &str) -> Option<u32> {
        self.indices.get(id).copied()
    }

    pub(super) fn screened(&self, slot: u32) -> &[Screen] {
        self.screened.get(slot as usize).map_or(&[], Vec::as_slice)
    }

    pub(super) fn always(&self) -> &[u32] {
        &self.always
    }

    pub(super) fn reading(&self, slot: u32) -> &[u32] {
        self.readers.get(slot as usize).map_or(&[], Vec::as_slice)
    }

    pub(super) fn remembers(&self) -> bool {
        self.remembered.contains(&true)
    }

    pub(super) fn remembers_name(&self, name: &str) -> bool {
        self.names.slot(name).is_some_and(|s| self.remembered.get(s as usize) == Some(&true))
    }
}
