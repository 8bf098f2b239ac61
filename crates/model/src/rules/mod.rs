//! Rules as data: the file a person writes, the subset of CEL that its conditions are written in, and the
//! set of rules that a message is held against.
//!
//! A condition is parsed and checked in full when its rule is applied, and compiled to a closed tree of
//! typed operations over *slots*: every measurement name that any rule mentions has one number, resolved
//! once a message. Evaluation allocates nothing and knows no name. `docs/rules.md` describes the language
//! for its users.

mod check;
mod definition;
mod evaluate;
mod expression;
mod program;
mod set;
mod state;

#[cfg(test)]
mod tests;

pub use definition::{
    CommandAction, LATENESS_DEFAULT, Rule, RuleDefinition, SEVERITIES, SiteScope, Span, forward_topics,
};
pub use evaluate::{Evaluator, Facts, MeasurementRef, Step, StepKind};
pub use expression::{EXPRESSION_BYTES_MAX, Expression, ExpressionError, Names};
pub use set::RuleSet;
pub use state::{Active, Cause, DeviceRules, Past, PastValue, Phase};
