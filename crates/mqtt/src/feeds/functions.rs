//! The functions that feeds have beside CEL's own. `split`, `join`, `replace` and `trim` come from CEL's
//! strings extension; these are ours.

use super::decode::from_json;
use cel::extractors::This;
use cel::{Context, ExecutionError, Program, Value};
use std::sync::Arc;

/// Which of our functions a feed uses: only those are added, because it is done once a message.
#[derive(Debug, Default)]
pub struct Functions {
    lower: bool,
    upper: bool,
    number: bool,
    json: bool,
}

impl Functions {
    /// Looks which are used.
    pub fn used_by<'p>(programs: impl Iterator<Item = &'p Program>) -> Self {
        let mut used = Self::default();
        for program in programs {
            let references = program.references();
            used.lower |= references.has_function("lower");
            used.upper |= references.has_function("upper");
            used.number |= references.has_function("number");
            used.json |= references.has_function("json");
        }
        used
    }

    /// Adds them to a context.
    pub fn add(&self, context: &mut Context<'_, '_>) {
        let added = [
            self.lower.then(|| context.add_function("lower", |This(t): This<Arc<String>>| t.to_lowercase())),
            self.upper.then(|| context.add_function("upper", |This(t): This<Arc<String>>| t.to_uppercase())),
            self.number.then(|| context.add_function("number", number)),
            self.json.then(|| context.add_function("json", json)),
        ];
        for result in added.into_iter().flatten() {
            result.expect("CEL declares none of these names");
        }
    }
}

/// Makes a number of a text or a number: what CEL's `double` does, and white space around it is allowed.
fn number(This(value): This<Value>) -> Result<f64, ExecutionError> {
    let number = match &value {
        Value::Int(n) => Some(*n as f64),
        Value::UInt(n) => Some(*n as f64),
        Value::Float(n) => Some(*n),
        Value::String(text) => text.trim().parse::<f64>().ok(),
        _ => None,
    };
    let finite = number.filter(|n| n.is_finite());
    finite.ok_or_else(|| ExecutionError::function_error("number", "this is not a number"))
}

/// Reads JSON that stands in a text.
fn json(This(text): This<Arc<String>>) -> Result<Value, ExecutionError> {
    match serde_json::from_str(&text) {
        Ok(value) => Ok(from_json(&value)),
        Err(e) => Err(ExecutionError::function_error("json", e)),
    }
}
