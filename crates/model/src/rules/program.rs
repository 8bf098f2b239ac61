//! What a condition is compiled to: typed operations over slots.
//!
//! A result is `None` where it is *unknown*: a measurement is missing or of another type, an integer
//! overflowed or was divided by zero. Unknown is CEL's error: it passes through every operation but the
//! side of `&&` or `||` that the other side decides, and the branch of a conditional not taken.

use super::evaluate::View;
use std::cmp::Ordering;

/// A measurement by slot: of this message, or the device's value before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Operand {
    Now(u32),
    Before(u32),
}

impl Operand {
    pub(super) fn slot(self) -> u32 {
        match self {
            Self::Now(slot) | Self::Before(slot) => slot,
        }
    }
}

/// What is known of the device besides measurements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fact {
    Site,
    Device,
    AgentVersion,
    ConfigVersion,
    Stream,
}

/// A comparison.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Compare {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl Compare {
    /// Says whether two numbers compare so; what is unknown does not.
    pub(super) fn admits(self, number: f64, limit: f64) -> bool {
        self.holds(number.partial_cmp(&limit)) == Some(true)
    }

    /// Says whether the comparison holds. Values without an order (NaN) are unequal, and which is less
    /// is unknown.
    fn holds(self, order: Option<Ordering>) -> Option<bool> {
        match self {
            Self::Equal => Some(order == Some(Ordering::Equal)),
            Self::NotEqual => Some(order != Some(Ordering::Equal)),
            Self::Less => order.map(Ordering::is_lt),
            Self::LessOrEqual => order.map(Ordering::is_le),
            Self::Greater => order.map(Ordering::is_gt),
            Self::GreaterOrEqual => order.map(Ordering::is_ge),
        }
    }

    /// Returns the comparison with its sides exchanged.
    pub(super) fn mirrored(self) -> Self {
        match self {
            Self::Less => Self::Greater,
            Self::LessOrEqual => Self::GreaterOrEqual,
            Self::Greater => Self::Less,
            Self::GreaterOrEqual => Self::LessOrEqual,
            same => same,
        }
    }
}

/// Arithmetic of two sides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Arithmetic {
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
}

/// A truth value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Flag {
    Constant(bool),
    Measured(Operand),
    Not(Box<Flag>),
    All(Vec<Flag>),
    Any(Vec<Flag>),
    If(Box<(Flag, Flag, Flag)>),
    /// A number of this message beside a constant: the commonest condition, without a level of pointers.
    Threshold(u32, Compare, f64),
    Numbers(Compare, Box<(Number, Number)>),
    Integers(Compare, Box<(Integer, Integer)>),
    Texts(Compare, Box<(Text, Text)>),
    Flags(Compare, Box<(Flag, Flag)>),
    /// Two measurements whose type nothing else tells: by the type that both turn out to have.
    Measurements(Compare, Operand, Operand),
    NumberIn(Box<(Number, Vec<Number>)>),
    TextIn(Box<(Text, Vec<Text>)>),
    TruthIn(Box<(Flag, Vec<Flag>)>),
    Has(Operand),
    HasFact(Fact),
    StartsWith(Box<(Text, Text)>),
    EndsWith(Box<(Text, Text)>),
    Contains(Box<(Text, Text)>),
}

/// A number: every measurement is one, and an integer becomes one beside it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Number {
    Constant(f64),
    Measured(Operand),
    Integer(Box<Integer>),
    Negative(Box<Number>),
    Absolute(Box<Number>),
    Arithmetic(Arithmetic, Box<(Number, Number)>),
    Least(Vec<Number>),
    Greatest(Vec<Number>),
    If(Box<(Flag, Number, Number)>),
}

/// An integer: a literal, a size, or arithmetic of nothing else.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Integer {
    Constant(i64),
    Size(Box<Text>),
    Negative(Box<Integer>),
    Absolute(Box<Integer>),
    Arithmetic(Arithmetic, Box<(Integer, Integer)>),
    Least(Vec<Integer>),
    Greatest(Vec<Integer>),
    If(Box<(Flag, Integer, Integer)>),
}

/// A text.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Text {
    Constant(Box<str>),
    Measured(Operand),
    Fact(Fact),
    If(Box<(Flag, Text, Text)>),
}

impl Flag {
    /// Says whether the condition holds; `None` is unknown.
    pub(super) fn eval(&self, view: &View<'_>) -> Option<bool> {
        match self {
            Self::Threshold(slot, compare, limit) => {
                compare.holds(view.number(Operand::Now(*slot))?.partial_cmp(limit))
            }
            Self::Constant(flag) => Some(*flag),
            Self::Measured(operand) => view.flag(*operand),
            Self::Not(flag) => flag.eval(view).map(|f| !f),
            Self::All(flags) => decide(flags, false, view),
            Self::Any(flags) => decide(flags, true, view),
            Self::If(parts) => if parts.0.eval(view)? { &parts.1 } else { &parts.2 }.eval(view),
            Self::Numbers(compare, sides) => {
                let (left, right) = (sides.0.eval(view)?, sides.1.eval(view)?);
                compare.holds(left.partial_cmp(&right))
            }
            Self::Integers(compare, sides) => {
                let (left, right) = (sides.0.eval(view)?, sides.1.eval(view)?);
                compare.holds(Some(left.cmp(&right)))
            }
            Self::Texts(compare, sides) => {
                let (left, right) = (sides.0.eval(view)?, sides.1.eval(view)?);
                compare.holds(Some(left.cmp(right)))
            }
            Self::Flags(compare, sides) => {
                let (left, right) = (sides.0.eval(view)?, sides.1.eval(view)?);
                compare.holds(Some(left.cmp(&right)))
            }
            Self::Measurements(compare, left, right) => same(*compare, *left, *right, view),
            Self::NumberIn(parts) => {
                let wanted = parts.0.eval(view)?;
                member(&parts.1, |n| Some(n.eval(view)? == wanted))
            }
            Self::TextIn(parts) => {
                let wanted = parts.0.eval(view)?;
                member(&parts.1, |t| Some(t.eval(view)? == wanted))
            }
            Self::TruthIn(parts) => {
                let wanted = parts.0.eval(view)?;
                member(&parts.1, |f| Some(f.eval(view)? == wanted))
            }
            Self::Has(operand) => Some(view.has(*operand)),
            Self::HasFact(fact) => Some(view.fact(*fact).is_some()),
            Self::StartsWith(parts) => Some(parts.0.eval(view)?.starts_with(parts.1.eval(view)?)),
            Self::EndsWith(parts) => Some(parts.0.eval(view)?.ends_with(parts.1.eval(view)?)),
            Self::Contains(parts) => Some(parts.0.eval(view)?.contains(parts.1.eval(view)?)),
        }
    }

    /// Returns a comparison of this message without which the condition cannot hold, where it has one.
    pub(super) fn screen(&self) -> Option<(u32, Compare, f64)> {
        match self {
            Self::Threshold(slot, compare, limit) => Some((*slot, *compare, *limit)),
            Self::All(flags) => flags.iter().find_map(Self::screen),
            _ => None,
        }
    }

    /// Says whether the condition is unknown for every message that has none of its measurements, so that
    /// such messages need not be held against it.
    pub(super) fn needs_a_measurement(&self) -> bool {
        match self {
            Self::Constant(_) | Self::Has(_) | Self::HasFact(_) => false,
            Self::Threshold(..) => true,
            Self::Measured(operand) => needs(*operand),
            Self::Not(flag) => flag.needs_a_measurement(),
            Self::All(flags) | Self::Any(flags) => flags.iter().all(Self::needs_a_measurement),
            Self::If(p) => {
                p.0.needs_a_measurement() || (p.1.needs_a_measurement() && p.2.needs_a_measurement())
            }
            Self::Numbers(_, p) => p.0.needs_a_measurement() || p.1.needs_a_measurement(),
            Self::Integers(_, p) => p.0.needs_a_measurement() || p.1.needs_a_measurement(),
            Self::Texts(_, p) => p.0.needs_a_measurement() || p.1.needs_a_measurement(),
            Self::Flags(_, p) => p.0.needs_a_measurement() || p.1.needs_a_measurement(),
            Self::Measurements(_, left, right) => needs(*left) || needs(*right),
            Self::NumberIn(p) => p.0.needs_a_measurement() || p.1.iter().any(Number::needs_a_measurement),
            Self::TextIn(p) => p.0.needs_a_measurement() || p.1.iter().any(Text::needs_a_measurement),
            Self::TruthIn(p) => p.0.needs_a_measurement() || p.1.iter().any(Self::needs_a_measurement),
            Self::StartsWith(p) | Self::EndsWith(p) | Self::Contains(p) => {
                p.0.needs_a_measurement() || p.1.needs_a_measurement()
            }
        }
    }
}

impl Number {
    fn eval(&self, view: &View<'_>) -> Option<f64> {
        Some(match self {
            Self::Constant(number) => *number,
            Self::Measured(operand) => view.number(*operand)?,
            Self::Integer(integer) => integer.eval(view)? as f64,
            Self::Negative(number) => -number.eval(view)?,
            Self::Absolute(number) => number.eval(view)?.abs(),
            Self::Arithmetic(op, sides) => {
                let (left, right) = (sides.0.eval(view)?, sides.1.eval(view)?);
                match op {
                    Arithmetic::Add => left + right,
                    Arithmetic::Subtract => left - right,
                    Arithmetic::Multiply => left * right,
                    Arithmetic::Divide => left / right,
                    Arithmetic::Remainder => left % right,
                }
            }
            Self::Least(numbers) => fold(numbers, |n| n.eval(view), |a, b| b < a)?,
            Self::Greatest(numbers) => fold(numbers, |n| n.eval(view), |a, b| b > a)?,
            Self::If(parts) => if parts.0.eval(view)? { &parts.1 } else { &parts.2 }.eval(view)?,
        })
    }

    fn needs_a_measurement(&self) -> bool {
        match self {
            Self::Constant(_) => false,
            Self::Measured(operand) => needs(*operand),
            Self::Integer(integer) => integer.needs_a_measurement(),
            Self::Negative(number) | Self::Absolute(number) => number.needs_a_measurement(),
            Self::Arithmetic(_, p) => p.0.needs_a_measurement() || p.1.needs_a_measurement(),
            Self::Least(numbers) | Self::Greatest(numbers) => numbers.iter().any(Self::needs_a_measurement),
            Self::If(p) => {
                p.0.needs_a_measurement() || (p.1.needs_a_measurement() && p.2.needs_a_measurement())
            }
        }
    }
}

impl Integer {
    fn eval(&self, view: &View<'_>) -> Option<i64> {
        match self {
            Self::Constant(integer) => Some(*integer),
            Self::Size(text) => i64::try_from(text.eval(view)?.chars().count()).ok(),
            Self::Negative(integer) => integer.eval(view)?.checked_neg(),
            Self::Absolute(integer) => integer.eval(view)?.checked_abs(),
            Self::Arithmetic(op, sides) => {
                let (left, right) = (sides.0.eval(view)?, sides.1.eval(view)?);
                match op {
                    Arithmetic::Add => left.checked_add(right),
                    Arithmetic::Subtract => left.checked_sub(right),
                    Arithmetic::Multiply => left.checked_mul(right),
                    Arithmetic::Divide => left.checked_div(right),
                    Arithmetic::Remainder => left.checked_rem(right),
                }
            }
            Self::Least(integers) => fold(integers, |n| n.eval(view), |a, b| b < a),
            Self::Greatest(integers) => fold(integers, |n| n.eval(view), |a, b| b > a),
            Self::If(parts) => if parts.0.eval(view)? { &parts.1 } else { &parts.2 }.eval(view),
        }
    }

    fn needs_a_measurement(&self) -> bool {
        match self {
            Self::Constant(_) => false,
            Self::Size(text) => text.needs_a_measurement(),
            Self::Negative(integer) | Self::Absolute(integer) => integer.needs_a_measurement(),
            Self::Arithmetic(_, p) => p.0.needs_a_measurement() || p.1.needs_a_measurement(),
            Self::Least(all) | Self::Greatest(all) => all.iter().any(Self::needs_a_measurement),
            Self::If(p) => {
                p.0.needs_a_measurement() || (p.1.needs_a_measurement() && p.2.needs_a_measurement())
            }
        }
    }
}

impl Text {
    fn eval<'v>(&'v self, view: &View<'v>) -> Option<&'v str> {
        match self {
            Self::Constant(text) => Some(text),
            Self::Measured(operand) => view.text(*operand),
            Self::Fact(fact) => view.fact(*fact),
            Self::If(parts) => if parts.0.eval(view)? { &parts.1 } else { &parts.2 }.eval(view),
        }
    }

    fn needs_a_measurement(&self) -> bool {
        match self {
            Self::Constant(_) | Self::Fact(_) => false,
            Self::Measured(operand) => needs(*operand),
            Self::If(p) => {
                p.0.needs_a_measurement() || (p.1.needs_a_measurement() && p.2.needs_a_measurement())
            }
        }
    }
}

fn needs(operand: Operand) -> bool {
    matches!(operand, Operand::Now(_))
}

/// Folds `&&` (decided by false) or `||` (decided by true): one deciding side outweighs any unknown.
fn decide(flags: &[Flag], deciding: bool, view: &View<'_>) -> Option<bool> {
    let mut result = Some(!deciding);
    for flag in flags {
        match flag.eval(view) {
            Some(f) if f == deciding => return Some(deciding),
            Some(_) => {}
            None => result = None,
        }
    }
    result
}

/// Says whether an element equals; every element is evaluated, as CEL makes the list first.
fn member<T>(list: &[T], equals: impl Fn(&T) -> Option<bool>) -> Option<bool> {
    let mut found = false;
    for element in list {
        found |= equals(element)?;
    }
    Some(found)
}

fn fold<T, N: Copy>(list: &[T], eval: impl Fn(&T) -> Option<N>, better: impl Fn(N, N) -> bool) -> Option<N> {
    let mut best: Option<N> = None;
    for element in list {
        let value = eval(element)?;
        best = Some(best.filter(|b| !better(*b, value)).unwrap_or(value));
    }
    best
}

fn same(compare: Compare, left: Operand, right: Operand, view: &View<'_>) -> Option<bool> {
    let order = if let (Some(l), Some(r)) = (view.number(left), view.number(right)) {
        l.partial_cmp(&r)
    } else if let (Some(l), Some(r)) = (view.text(left), view.text(right)) {
        Some(l.cmp(r))
    } else {
        let order = view.flag(left)?.cmp(&view.flag(right)?);
        matches!(compare, Compare::Equal | Compare::NotEqual).then_some(order)
    };
    compare.holds(order)
}
