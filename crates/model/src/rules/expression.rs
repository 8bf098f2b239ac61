//! Expressions as text: parsing with CEL's own grammar, and errors that point at the place.

use super::check;
use super::evaluate::View;
use super::program::Flag;
use hashbrown::HashMap;
use std::fmt;

/// The longest expression in bytes. It also bounds how deep the parser recurses.
pub const EXPRESSION_BYTES_MAX: usize = 2_048;
/// How many brackets may be open at a time; CEL asks an implementation for at least 12 levels.
const OPEN_BRACKETS_MAX: usize = 24;

/// The names of measurements that expressions mention, each with its slot. It only grows: a slot keeps its
/// meaning for as long as any compiled expression lives.
#[derive(Clone, Debug, Default)]
pub struct Names {
    slots: HashMap<Box<str>, u32, foldhash::fast::RandomState>,
}

impl Names {
    /// Returns the number of names.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Says whether there is no name.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Returns the slot of `name`, if any expression mentions it.
    pub fn slot(&self, name: &str) -> Option<u32> {
        self.slots.get(name).copied()
    }

    /// Returns the slot of `name`, making one where there is none.
    pub(super) fn slot_or_new(&mut self, name: &str) -> u32 {
        if let Some(slot) = self.slots.get(name) {
            return *slot;
        }
        let slot = u32::try_from(self.slots.len()).expect("rules mention far fewer than 2^32 names");
        self.slots.insert(name.into(), slot);
        slot
    }
}

/// A condition, checked and compiled.
#[derive(Clone, Debug, PartialEq)]
pub struct Expression {
    pub(super) root: Flag,
    /// Slots of measurements of this message that it reads.
    pub(super) now: Vec<u32>,
    /// Slots of measurements before this message that it reads.
    pub(super) before: Vec<u32>,
    /// Names of measurements of this message that it reads.
    pub(super) names: Vec<Box<str>>,
}

impl Expression {
    /// Checks and compiles `text`, alone.
    ///
    /// # Errors
    /// [`ExpressionError`] with the place: it is not CEL, is outside the subset, names something unknown,
    /// or a type does not fit.
    pub fn compile(text: &str, names: &mut Names) -> Result<Self, ExpressionError> {
        check::compile(text, names, &mut check::Types::default())
    }

    /// Says whether the condition holds; `None` is unknown.
    pub(super) fn eval(&self, view: &View<'_>) -> Option<bool> {
        self.root.eval(view)
    }
}

/// What is wrong with an expression, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpressionError {
    /// What is wrong and, where it is known, what helps.
    pub what: String,
    /// Line within the expression, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The line of the expression that it is about.
    pub source_line: String,
}

impl ExpressionError {
    /// Places an error at a byte of `text`.
    pub(super) fn at(text: &str, offset: usize, what: impl Into<String>) -> Self {
        let mut line = 1;
        let mut column = 1;
        for (_, c) in text.char_indices().take_while(|(at, _)| *at < offset) {
            (line, column) = if c == '\n' { (line + 1, 1) } else { (line, column + 1) };
        }
        Self::at_line(text, line, column, what)
    }

    fn at_line(text: &str, line: usize, column: usize, what: impl Into<String>) -> Self {
        let source_line = text.lines().nth(line.saturating_sub(1)).unwrap_or_default().to_owned();
        Self { what: what.into(), line, column, source_line }
    }
}

impl fmt::Display for ExpressionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} (at {}:{})", self.what, self.line, self.column)?;
        writeln!(f, "  | {}", self.source_line)?;
        write!(f, "  | {:>width$}", "^", width = self.column)
    }
}

impl std::error::Error for ExpressionError {}

/// An expression as the parser understood it, with the place of every node.
pub(super) struct Parsed<'t> {
    pub(super) text: &'t str,
    pub(super) root: cel::IdedExpr,
    places: cel::common::ast::SourceInfo,
}

impl Parsed<'_> {
    /// Makes an error at the node with `id`.
    pub(super) fn error(&self, id: u64, what: impl Into<String>) -> ExpressionError {
        let (start, _) = self.places.offset_for(id).unwrap_or_default();
        ExpressionError::at(self.text, start as usize, what)
    }

    /// Returns the place of a node as `line:column`.
    pub(super) fn place(&self, id: u64) -> String {
        let error = self.error(id, "");
        format!("{}:{}", error.line, error.column)
    }
}

/// Parses `text` with CEL's grammar, without expanding its macros: the subset has none, and `has` may name
/// a measurement directly.
pub(super) fn parse(text: &str) -> Result<Parsed<'_>, ExpressionError> {
    if text.trim().is_empty() {
        return Err(ExpressionError::at(text, 0, "the expression is empty"));
    }
    if text.len() > EXPRESSION_BYTES_MAX {
        let what = format!("the expression has {} bytes, more than {EXPRESSION_BYTES_MAX}", text.len());
        return Err(ExpressionError::at(text, 0, what));
    }
    check_nesting(text)?;
    let (root, places) = cel::Env::default()
        .with_optional_support(false)
        .parser()
        .parse_with_source_info(text)
        .map_err(|errors| {
            let first = errors.errors.into_iter().find(|e| e.pos.0 > 0);
            let (pos, what) = first.map_or(((1, 1), "it cannot be read".to_owned()), |e| (e.pos, e.msg));
            let narrow = |n: isize| usize::try_from(n).unwrap_or(1).max(1);
            ExpressionError::at_line(text, narrow(pos.0), narrow(pos.1), format!("not CEL: {}", tidy(&what)))
        })?;
    Ok(Parsed { text, root, places })
}

/// Refuses deep nesting before the parser sees it, because its recursion is not bounded by itself.
/// Brackets within string literals count too, which errs on the safe side.
fn check_nesting(text: &str) -> Result<(), ExpressionError> {
    let mut open: usize = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' => open += 1,
            ')' | ']' | '}' => open = open.saturating_sub(1),
            _ => {}
        }
        if open > OPEN_BRACKETS_MAX {
            let what = format!("more than {OPEN_BRACKETS_MAX} brackets are open");
            return Err(ExpressionError::at(text, at, what));
        }
    }
    Ok(())
}

fn tidy(message: &str) -> String {
    message.trim_start_matches("Syntax error: ").lines().next().unwrap_or_default().to_owned()
}
