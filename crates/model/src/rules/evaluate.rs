//! Holds one message against the rules that it touches.

use super::program::{Fact, Operand};
use super::set::RuleSet;
use super::state::{DeviceRules, Past, PastValue, Phase};
use crate::envelope::Measurement;
use crate::time::Timestamp;
use serde::Deserialize;

/// A measurement as it lies in a record, borrowed.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct MeasurementRef<'a> {
    /// Name; nested objects are dotted names.
    #[serde(borrow)]
    pub name: &'a str,
    /// A number.
    #[serde(default)]
    pub number: Option<f64>,
    /// A text.
    #[serde(borrow, default)]
    pub text: Option<&'a str>,
    /// A boolean.
    #[serde(default)]
    pub flag: Option<bool>,
    /// Unit of the number.
    #[serde(borrow, default)]
    pub unit: Option<&'a str>,
}

impl MeasurementRef<'_> {
    /// Copies it out of the record.
    pub fn to_owned(&self) -> Measurement {
        Measurement {
            name: self.name.to_owned(),
            number: self.number,
            text: self.text.map(str::to_owned),
            flag: self.flag,
            unit: self.unit.map(str::to_owned),
        }
    }
}

/// What a message says, as far as conditions may ask.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The site.
    pub site: &'a str,
    /// The device within the site.
    pub device: &'a str,
    /// Version of the sending agent.
    pub agent_version: Option<&'a str>,
    /// Version of its configuration.
    pub config_version: Option<&'a str>,
    /// The stream.
    pub stream: &'a str,
    /// The values.
    pub measurements: &'a [MeasurementRef<'a>],
    /// How far the message's own time lies behind the record's, µs; negative where it lies ahead.
    pub age: i64,
}

/// What the rule at `rule` does because of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Index of the rule, see [`RuleSet::at`].
    pub rule: u32,
    /// What it does.
    pub kind: StepKind,
}

/// What a rule does because of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// The condition came to hold.
    Begin,
    /// It ceased to hold before it had held long enough.
    Abandon,
    /// The alert clears.
    Clear,
    /// It holds and the rule forwards messages for which it does.
    Forward,
}

/// Working memory for holding messages against rules; one a stage, reused.
#[derive(Debug, Default)]
pub struct Evaluator {
    /// Slot to index of the measurement plus one; 0 is absent.
    now: Vec<u32>,
    /// Slot to index of the remembered value plus one; 0 is absent.
    before: Vec<u32>,
    touched_now: Vec<u32>,
    touched_before: Vec<u32>,
    /// Rule to the number of the last message held against it.
    seen: Vec<u64>,
    message: u64,
    steps: Vec<Step>,
    late: bool,
}

impl Evaluator {
    /// Holds a message against every rule of `rules` that it touches, and returns what they do: first the
    /// rules that are active, in the order of their ids, then the others in the order in which its
    /// measurements mention them. Changes nothing: the caller carries the steps
    /// out. Rules whose lateness bound the message exceeds are passed over, see [`Evaluator::passed_over`].
    pub fn evaluate(&mut self, rules: &RuleSet, facts: &Facts<'_>, state: &DeviceRules) -> &[Step] {
        self.steps.clear();
        self.late = false;
        self.message += 1;
        self.now.resize(rules.names().len(), 0);
        self.before.resize(rules.names().len(), 0);
        self.seen.resize(rules.len().max(self.seen.len()), 0);
        for (i, measurement) in facts.measurements.iter().enumerate() {
            if let Some(slot) = rules.names().slot(measurement.name) {
                self.now[slot as usize] = i as u32 + 1;
                self.touched_now.push(slot);
            }
        }
        for (i, past) in state.previous.iter().enumerate() {
            if let Some(slot) = rules.names().slot(&past.name) {
                self.before[slot as usize] = i as u32 + 1;
                self.touched_before.push(slot);
            }
        }
        let view = View { now: &self.now, before: &self.before, facts, previous: &state.previous };
        let mut hold = |rule: u32| {
            if std::mem::replace(&mut self.seen[rule as usize], self.message) != self.message {
                hold_against(rules, rule, &view, state, &mut self.steps, &mut self.late);
            }
        };
        for active in &state.active {
            rules.index_of(&active.rule).into_iter().for_each(&mut hold);
        }
        rules.always().iter().copied().for_each(&mut hold);
        for slot in &self.touched_now {
            if let Some(number) = view.number(Operand::Now(*slot)) {
                for screen in rules.screened(*slot) {
                    if facts.age > screen.lateness_us || screen.compare.admits(number, screen.limit) {
                        hold(screen.rule);
                    }
                }
            }
            rules.reading(*slot).iter().copied().for_each(&mut hold);
        }
        for slot in self.touched_now.drain(..) {
            self.now[slot as usize] = 0;
        }
        for slot in self.touched_before.drain(..) {
            self.before[slot as usize] = 0;
        }
        &self.steps
    }

    /// Says whether the last message was too late for a rule that would have looked at it.
    pub fn passed_over(&self) -> bool {
        self.late
    }
}

fn hold_against(
    rules: &RuleSet,
    index: u32,
    view: &View<'_>,
    state: &DeviceRules,
    steps: &mut Vec<Step>,
    late: &mut bool,
) {
    let rule = rules.at(index);
    if !rule.scope.covers(view.facts.site, view.facts.device) {
        return;
    }
    if view.facts.age > rule.lateness_us {
        *late = true;
        return;
    }
    let active = if state.active.is_empty() { None } else { state.active_of(&rule.id) };
    let when = rule.when.eval(view);
    let mut step = |kind| steps.push(Step { rule: index, kind });
    match active.map(|a| &a.phase) {
        None if when == Some(true) => step(StepKind::Begin),
        Some(Phase::Pending { .. }) if when == Some(false) => step(StepKind::Abandon),
        Some(Phase::Raised { .. }) => {
            let clears = match &rule.clear_when {
                Some(clear_when) => clear_when.eval(view) == Some(true),
                None => when == Some(false),
            };
            if clears {
                step(StepKind::Clear);
            }
        }
        _ => {}
    }
    if when == Some(true) && rule.forward.is_some() {
        step(StepKind::Forward);
    }
}

/// What a condition sees: the measurements of the message and those before it, by slot.
pub(super) struct View<'a> {
    now: &'a [u32],
    before: &'a [u32],
    facts: &'a Facts<'a>,
    previous: &'a [Past],
}

impl<'a> View<'a> {
    fn current(&self, slot: u32) -> Option<&'a MeasurementRef<'a>> {
        // A name that another rule brought in after this message was resolved has no entry.
        let at = *self.now.get(slot as usize)?;
        self.facts.measurements.get((at as usize).wrapping_sub(1))
    }

    fn past(&self, slot: u32) -> Option<&'a PastValue> {
        let at = *self.before.get(slot as usize)?;
        self.previous.get((at as usize).wrapping_sub(1)).map(|p| &p.value)
    }

    pub(super) fn number(&self, operand: Operand) -> Option<f64> {
        match operand {
            Operand::Now(slot) => self.current(slot)?.number,
            Operand::Before(slot) => match self.past(slot)? {
                PastValue::Number(number) => Some(*number),
                _ => None,
            },
        }
    }

    pub(super) fn text(&self, operand: Operand) -> Option<&'a str> {
        match operand {
            Operand::Now(slot) => self.current(slot)?.text,
            Operand::Before(slot) => match self.past(slot)? {
                PastValue::Text(text) => Some(text),
                _ => None,
            },
        }
    }

    pub(super) fn flag(&self, operand: Operand) -> Option<bool> {
        match operand {
            Operand::Now(slot) => self.current(slot)?.flag,
            Operand::Before(slot) => match self.past(slot)? {
                PastValue::Flag(flag) => Some(*flag),
                _ => None,
            },
        }
    }

    /// Says whether there is a value of any type; a JSON null is none.
    pub(super) fn has(&self, operand: Operand) -> bool {
        match operand {
            Operand::Now(slot) => {
                self.current(slot).is_some_and(|m| m.number.is_some() || m.text.is_some() || m.flag.is_some())
            }
            Operand::Before(slot) => self.past(slot).is_some(),
        }
    }

    pub(super) fn fact(&self, fact: Fact) -> Option<&'a str> {
        match fact {
            Fact::Site => Some(self.facts.site),
            Fact::Device => Some(self.facts.device),
            Fact::AgentVersion => self.facts.agent_version,
            Fact::ConfigVersion => self.facts.config_version,
            Fact::Stream => Some(self.facts.stream),
        }
    }
}

impl Facts<'_> {
    /// Returns how far a message's own time lies behind its record's, µs.
    pub fn age_of(occurred_at: Timestamp, time: Timestamp) -> i64 {
        time.0.saturating_sub(occurred_at.0)
    }
}
